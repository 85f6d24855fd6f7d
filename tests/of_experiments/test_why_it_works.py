"""`why_it_works` runs, goes on where it was, and shows what it is about."""

import dataclasses

import numpy as np
import pytest

from experiments import why_it_works
from experiments.common import results, study
from experiments.common.studies import why_plot, why_tables
from experiments.common.studies.cells import load_images
from experiments.common.studies.rated import Rated

pytestmark = pytest.mark.experiment

NAME, PICTURE = "why_it_works.jsonl", "why_it_works_digits.png"


def test_smoke_and_again(tmp_path, capsys):
    config = why_it_works.Config(smoke=True, out=tmp_path)
    assert study.main(why_it_works.STUDY, config) == 0
    printed = capsys.readouterr().out
    assert "test accuracy (%) at rate" in printed
    assert "the best rate without BN, BN gains" in printed
    path, picture = tmp_path / NAME, (tmp_path / PICTURE).read_bytes()
    records = results.read(path)
    cells = {r["cell"]["net"]: r["result"] for r in records if r["kind"] == "cell"}
    assert set(cells) == {"plain", "bn"}
    for result in cells.values():
        assert np.isfinite(result["loss"] + result["smoothness"]).all()
        assert np.shape(result["losses"]) == np.shape(result["changes"]) == (2, 2)
        assert np.shape(result["cosine"]) == np.shape(result["shift"]) == (2, 4)
        assert [row[0] for row in result["shift"]] == [0, 0]
        low, high = np.transpose(result["losses"])
        assert (low < high).all()
    # At a large rate, the network with BN learns faster.
    assert cells["bn"]["loss"][-1] < cells["plain"]["loss"][-1] - 0.2

    trained = []

    def train(config, cells):
        trained.extend(cell.net for cell in cells)
        return why_it_works.train(config, cells)

    lines = path.read_bytes().splitlines(True)
    again = why_it_works.STUDY._replace(train=train)
    assert study.main(again, config) == 0
    assert (trained, path.read_bytes()) == ([], b"".join(lines))
    assert (tmp_path / PICTURE).read_bytes() == picture
    path.write_bytes(b"".join(lines[:2]) + lines[2][:99])
    assert study.main(again, config) == 0
    assert trained == ["bn"]
    found = [r["result"] for r in results.read(path) if r["kind"] == "cell"]
    assert found == [cells["plain"], cells["bn"]]


def test_a_training_that_fails_is_recorded_as_far_as_it_went():
    config = dataclasses.replace(
        why_it_works.Config(), **why_it_works.SMOKE | {"rates": (1e38,)}
    )
    cell = why_it_works.cells(config)[0]
    assert cell.net == "plain"
    data = load_images("digits", None)
    result = why_it_works.run(
        cell, why_it_works.make_descent(config, "plain", data), data
    )
    assert np.isfinite(result["first"]).all()
    assert result["smoothness"][-1] is None
    assert result["cosine"][-1] == [None] * 4
    assert np.shape(result["loss"]) == (2,)
    assert result["loss"][-1] is None


def made(test, validation, **other):
    """A record with numbers of its own at two measured steps and three layers."""
    return {
        "test": test,
        "validation": validation,
        "loss": [2.0, 1.0],
        "losses": [[1.0, 3.0], [1.0, 5.0]],
        "changes": [[0.0, 1.0], [0.0, 3.0]],
        "smoothness": [4.0, 6.0],
        "shift": [[0.0, 0.5, 0.5], [0.0, 0.7, 0.7]],
        "cosine": [[1.0, 0.2, 0.4], [1.0, 0.2, 0.4]],
        **other,
    }


@pytest.fixture
def known():
    """Two seeds of either network: best without BN is 0.1, with it 1."""
    failed = made(0.1, 0.1, smoothness=[4.0, None], losses=[[1.0, 2.0], [None, None]])
    return Rated(
        {
            ("plain", 0.1): [made(0.5, 0.6), made(0.7, 0.6)],
            ("plain", 1.0): [failed, failed],
            ("bn", 0.1): [made(0.61, 0.5), made(0.63, 0.5)],
            ("bn", 1.0): [made(0.8, 0.7), made(0.9, 0.9)],
        }
    )


def test_what_is_concluded(known):
    assert why_plot.shared(known) == 0.1
    assert why_tables.conclusion(known) == (
        "At 0.1, the best rate without BN, BN gains +2.0 points over 60.0 %; at 1, its "
        "own best, +25.0."
    )
    table = why_tables.around(known)
    columns = [list(column.cells) for column in table.columns]
    assert columns[1] == ["0.1", "0.1", "1"]
    medians = [column[0] for column in columns[2:]]
    assert medians == ["3", "2", "5", "0.6", "0.3"]
    assert (
        np.isnan(known.of("plain", 1.0, "smoothness")).tolist() == [[False, True]] * 2
    )
    assert np.isnan(known.of("noise", 1.0, "test")).all()

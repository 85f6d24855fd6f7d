"""`normalizers` runs, goes on where it was, and compares what is to be compared."""

import numpy as np
import pytest

from experiments import normalizers
from experiments.common import results, study
from experiments.common.studies import contest
from experiments.common.studies.rated import Rated

pytestmark = pytest.mark.experiment

NAME, PICTURE = "normalizers.jsonl", "normalizers_digits.png"


def test_smoke_and_again(tmp_path, capsys):
    config = normalizers.Config(smoke=True, out=tmp_path)
    assert study.main(normalizers.STUDY, config) == 0
    printed = capsys.readouterr().out
    assert "batch norm" in printed
    assert "ms per step" in printed
    path, picture = tmp_path / NAME, (tmp_path / PICTURE).read_bytes()
    first, timing, *trainings, last = results.read(path)
    assert (first["kind"], last["kind"]) == ("run", "end")
    assert set(timing["result"]["seconds"]) == {"batch", "none"}
    assert min(timing["result"]["seconds"].values()) > 0
    assert [r["cell"]["method"] for r in trainings] == ["batch", "none"]
    for record in trainings:
        assert record["result"]["steps"] == [10, 20]
        assert np.shape(record["result"]["test"]) == (2,)
        assert record["result"]["test"][-1] == pytest.approx(
            record["result"]["final"], abs=1e-4
        )
        assert record["result"]["final"] > 0.15  # more than chance after 20 steps

    trained = []

    def train(config, cells):
        trained.extend(cells)
        return normalizers.train(config, cells)

    lines = path.read_bytes().splitlines(True)
    again = normalizers.STUDY._replace(train=train)
    assert study.main(again, config) == 0
    assert (trained, path.read_bytes()) == ([], b"".join(lines))
    assert (tmp_path / PICTURE).read_bytes() == picture
    path.write_bytes(b"".join([*lines[:3], lines[3][:50]]))
    assert study.main(again, config) == 0
    assert [cell.method for cell in trained] == ["none"]
    newest = [r for r in results.read(path) if r["kind"] == "cell"][-1]
    assert newest["result"] == trainings[1]["result"]


def made(test, validation):
    return {
        "test": test,
        "validation": validation,
        "final": test[-1],
        "steps": [10, 20, 30],
    }


def test_steps_and_time_to_what_none_comes_to():
    known = Rated(
        {
            ("batch", 0.1): [made([0.5, 0.7, 0.8], 0.5), made([0.5, 0.9, 0.9], 0.9)],
            ("batch", 1.0): [made([0.9, 0.9, 0.9], 0.6)] * 2,
            ("weight", 0.1): [made([0.1, 0.2, 0.3], 0.3)] * 2,
            ("none", 1.0): [made([0.1, 0.6, 0.75], 0.5)] * 2,
        }
    )
    seconds = {"batch": 0.2, "none": 0.1}
    table = contest.summary(known, seconds)
    columns = [list(column.cells) for column in table.columns]
    assert table.columns[5].header == "steps to 25.0 %"
    assert columns[0] == ["batch norm", "weight norm", "none"]
    assert columns[1] == ["0.1", "0.1", "1"]  # by held-out images, not by the test's
    assert columns[2] == ["15.0 ± 7.1", "70.0 ± 0.0", "25.0 ± 0.0"]
    assert columns[4] == ["1.00", "nan", "0.50"]
    assert columns[5] == ["20", "inf", "30"]
    assert columns[6] == ["4.0", "nan", "3.0"]


def test_each_training_is_one_cell():
    cells = normalizers.cells(normalizers.Config(seeds=(0, 1), steps=7))
    assert len(cells) == len(set(cells)) == 1 + 7 * 5 * 2
    assert {cell.steps for cell in cells[1:]} == {7}

"""Every experiment imports, smoke runs keep nothing, and records last."""

import importlib
import pkgutil
import struct
from pathlib import Path

import numpy as np
import pytest

import experiments
from experiments import small_batch
from experiments.common import intervals, results, study

pytestmark = pytest.mark.experiment

REPOSITORY = Path(__file__).parents[2]
MODULES = [
    module.name
    for module in pkgutil.walk_packages(experiments.__path__, "experiments.")
]


def png_size(path: Path) -> list[int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return list(struct.unpack(">II", header[16:]))


@pytest.mark.parametrize("name", MODULES)
def test_imports(name):
    assert importlib.import_module(name).__name__ == name


def test_all_modules_are_found():
    found = {name.replace(".", "/") + ".py" for name in MODULES}
    files = (REPOSITORY / "experiments").rglob("[!_]*.py")
    assert {str(path.relative_to(REPOSITORY)) for path in files} <= found


@pytest.mark.parametrize("given", [False, True])
def test_a_smoke_run_keeps_nothing_unless_told_where(tmp_path, given):
    seen = []

    def work(config):
        seen.append(config)
        assert config.out.is_dir()
        (config.out / "file").touch()
        return 7

    out = tmp_path if given else study.RUNS
    config = small_batch.Config(smoke=True, out=out, record=True)
    assert study.start(work, {"steps": 3}, config) == 7
    (used,) = seen
    assert (used.smoke, used.steps, used.record) == (False, 3, False)
    assert used.out.exists() == given
    study.start(seen.append, {"steps": 3}, small_batch.Config(steps=9))
    assert (seen[1].steps, seen[1].out) == (9, study.RUNS)


def test_records_survive_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"kind": "run"}\n{"kind": "measu')
    with results.Log(path) as log:
        log.add("run", value=float("nan"), array=np.array([1.5, np.inf]))
    first, second = results.read(path)
    assert first == {"kind": "run"}
    assert (second["value"], second["array"]) == (None, [1.5, None])
    assert second["run"] == log.run


def counting_study(trained):
    """Ten trainings, whose result is their number."""

    def train(config, cells):
        for cell in cells:
            trained.append(cell)
            yield study.Trained(cell, {"number": cell.seed})

    cells = [
        small_batch.make_cell(small_batch.Config(), "ghost", 4, "mixed", s, 0.1)
        for s in range(10)
    ]
    drawn = []
    made = study.Study(
        "counting",
        lambda config: cells,
        train,
        lambda config, found: [],
        lambda config, found, folder: drawn.append(len(found)) or [],
        smoke={},
    )
    return made, cells, drawn


def test_parts_share_the_trainings(tmp_path):
    """Each training is in one part; a part draws nothing, all of them are drawn."""
    trained = []
    made, cells, drawn = counting_study(trained)
    for part, expected in ((2, cells[1::3]), (3, cells[2::3]), (1, cells[::3])):
        trained.clear()
        config = small_batch.Config(out=tmp_path, part=(part, 3))
        assert study.main(made, config) == 0
        assert trained == expected
    assert not drawn
    trained.clear()
    assert study.main(made, small_batch.Config(out=tmp_path)) == 0
    assert not trained
    assert drawn == [10]


@pytest.mark.parametrize("part", [(0, 2), (3, 2), (1, 0)])
def test_a_part_that_does_not_exist(tmp_path, capsys, part):
    made, _, _ = counting_study([])
    assert study.main(made, small_batch.Config(out=tmp_path, part=part)) == 1
    assert f"received part {part[0]} of {part[1]}" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_records_of_two_processes(tmp_path):
    """Long records that two logs write to one file at the same time stay whole."""
    path = tmp_path / "results.jsonl"
    with results.Log(path) as first, results.Log(path) as second:
        for number in range(20):
            first.add("cell", number=number, curve=[0.123456] * 5_000)
            second.add("cell", number=-number, curve=[0.123456] * 5_000)
    found = [record["number"] for record in results.read(path)]
    assert found == [sign * n for n in range(20) for sign in (1, -1)]


def test_intervals():
    """Student's t of two degrees of freedom, from a table: 4.303 (95 %), 2.920 (90)."""
    values = np.array([1.0, 2.0, 6.0])
    error = np.sqrt(7 / 3)  # of the mean: the deviation is sqrt(7)
    found = intervals.interval(values)
    assert found.mean == 3
    assert found.half == pytest.approx(4.303 * error, rel=1e-3)
    assert (found.low, found.high) == (3 - found.half, 3 + found.half)
    assert intervals.interval(values, 0.9).half == pytest.approx(
        2.920 * error, rel=1e-3
    )
    assert str(intervals.Interval(-1.26, 0.84)) == "-1.3 ± 0.8"
    assert intervals.interval(values[:1]) == (1.0, np.inf)
    assert str(intervals.interval(values[:1])) == "+1.0"

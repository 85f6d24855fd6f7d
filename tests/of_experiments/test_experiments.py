"""Every experiment imports, smoke runs keep nothing, and records last."""

import importlib
import pkgutil
import struct
from pathlib import Path

import numpy as np
import pytest

import experiments
from experiments import small_batch
from experiments.common import results, study

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

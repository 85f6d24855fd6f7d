"""The experiment on population statistics shows its claim."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import population as experiment
from experiments.common import results

pytestmark = pytest.mark.experiment


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("smoke")
    process = subprocess.run(
        [sys.executable, "-m", "experiments.population", "--smoke", "--out", out],
        cwd=Path(__file__).parents[2],
        env=dict(os.environ, COLUMNS="90"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    return out, process.stdout


def test_smoke_shows_the_claim(smoke):
    out, stdout = smoke
    assert "running average, debiased" in stdout
    start, rows = experiment.last_run(results.read(out / "population.jsonl"), "digits")
    assert {"versions", "hardware", "commit", "time"} <= start.keys()
    assert list(rows) == experiment.measured_steps(50)
    last = {kind: values.mean() for kind, values in rows[50].items()}
    assert last["ema"] < 0.4 < 0.8 < last["batch"]
    for kind in ("pooled", "algorithm_2"):
        assert last[kind] > last["batch"] - 0.02
    assert last["debiased_ema"] > last["ema"] + 0.4


def test_results_alone_redraw_the_picture(smoke, tmp_path, capsys):
    records = (smoke[0] / "population.jsonl").read_bytes()
    (tmp_path / "population.jsonl").write_bytes(records)
    settings = experiment.Config(out=tmp_path, plot_only=True)
    assert experiment.main(settings) == 0
    picture = (tmp_path / "population_digits.png").read_bytes()
    assert picture == (smoke[0] / "population_digits.png").read_bytes()
    assert len(picture) > 20_000
    capsys.readouterr()
    (tmp_path / "population.jsonl").write_text("")
    assert experiment.main(settings) == 1
    assert "the newest of 0 runs on 'digits' has no measure" in capsys.readouterr().out


def test_measured_steps():
    assert experiment.measured_steps(16) == [1, 2, 3, 5, 7, 10, 15, 16]

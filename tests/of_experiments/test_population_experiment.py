"""The experiment on population statistics shows its claim."""

import pytest

from experiments import population as experiment

pytestmark = pytest.mark.experiment


def test_fifty_steps_show_the_claim(tmp_path, capsys):
    config = experiment.Config(steps=50, seeds=(0, 1), out=tmp_path)
    assert experiment.main(config) == 0
    assert "running average, debiased" in capsys.readouterr().out
    settings, rows = experiment.last_run(tmp_path / "population.jsonl", "digits")
    assert settings["steps"] == 50
    assert list(rows) == experiment.measured_steps(50)
    last = {kind: values.mean() for kind, values in rows[50].items()}
    assert last["ema"] < 0.4 < 0.8 < last["batch"]
    for kind in ("pooled", "algorithm_2"):
        assert last[kind] > last["batch"] - 0.02
    assert last["debiased_ema"] > last["ema"] + 0.4
    picture = (tmp_path / "population.png").read_bytes()
    config = experiment.Config(out=tmp_path, plot_only=True)
    assert experiment.main(config) == 0
    assert (tmp_path / "population.png").read_bytes() == picture
    assert len(picture) > 20_000


def test_nothing_to_draw(tmp_path, capsys):
    config = experiment.Config(out=tmp_path, plot_only=True)
    assert experiment.main(config) == 1
    assert "no measurements with data digits" in capsys.readouterr().out


def test_measured_steps():
    assert experiment.measured_steps(16) == [1, 2, 3, 5, 7, 10, 15, 16]

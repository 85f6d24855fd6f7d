"""Every committed picture is drawn from committed results."""

from pathlib import Path

import pytest

from experiments import figures

pytestmark = pytest.mark.experiment

HERE = Path(figures.__file__).parent


def test_every_picture_is_drawn_from_results(tmp_path, capsys):
    assert figures.main(figures.Config(out=tmp_path)) == 0
    drawn = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert drawn.keys() == {path.name for path in (HERE / "figures").iterdir()}
    assert min(drawn.values()) > 20_000
    printed = "".join(capsys.readouterr().out.split())
    assert all(name in printed for name in drawn)


def test_missing_results_are_named(tmp_path, capsys):
    kept = (HERE / "results" / "population.jsonl").read_bytes()
    (tmp_path / "population.jsonl").write_bytes(kept)
    (tmp_path / "bench_step.jsonl").write_text("")
    config = figures.Config(results=tmp_path, out=tmp_path / "pictures")
    assert figures.main(config) == 1
    assert [p.name for p in (tmp_path / "pictures").iterdir()] == ["population.png"]
    printed = capsys.readouterr().out
    assert "mnist: [Errno 2]" in printed
    assert "bench.step: " in printed
    assert "holds no run" in printed

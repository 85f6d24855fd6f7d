"""Every committed picture is drawn from committed results."""

import re
from pathlib import Path

import pytest

from experiments import figures
from experiments.common import results

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
    assert "has no measurements with data mnist" in printed
    assert "bench.step: " in printed
    assert "holds no run" in printed


def test_the_table_names_the_commits_of_the_records():
    text = (HERE / "README.md").read_text(encoding="utf-8")
    row = r"\| `experiments\.([\w.]+)[^|]*\|.*\| ([0-9a-f]{7}) \|$"
    rows = re.findall(row, text, re.MULTILINE)
    assert len(rows) >= 11
    for name, commit in rows:
        path = HERE / "results" / f"{name.replace('.', '_')}.jsonl"
        stamps = [r["commit"] for r in results.read(path) if "commit" in r]
        assert stamps[-1].startswith(commit), name

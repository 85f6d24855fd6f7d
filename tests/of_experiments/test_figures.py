"""Every committed picture is drawn from committed results."""

import json
import re
from pathlib import Path

import pytest
import tyro

from experiments import figures
from experiments.common import results, study

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
    row = r"\| `experiments\.([\w.]+)([^`]*)`[^|]*\|.*\| ([0-9a-f]{7}) \|$"
    rows = re.findall(row, text, re.MULTILINE)
    assert len(rows) >= 11
    for name, options, commit in rows:
        assert newest_commit(name, options.split()).startswith(commit), (name, options)


def newest_commit(name: str, options: list[str]) -> str:
    """Of the records of a command; of a study, of the trainings that it asks for."""
    records = results.read(HERE / "results" / f"{name.replace('.', '_')}.jsonl")
    commits = {r["run"]: r["commit"] for r in records if "commit" in r}
    studies = {module.STUDY.name: module for module in figures.STUDIES}
    if name not in studies:
        return [*commits.values()][-1]
    config = tyro.cli(studies[name].Config, args=options)
    asked = {study.key(cell) for cell in studies[name].cells(config)}
    cells = (record for record in records if record["kind"] == "cell")
    runs = [r["run"] for r in cells if json.dumps(r["cell"], sort_keys=True) in asked]
    return commits[runs[-1]]

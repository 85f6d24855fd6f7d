"""Every table of the site is drawn from committed results."""

import importlib.util
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.experiment

DOCS = Path(__file__).parents[2] / "docs"
PLACE = re.compile(r"^<!-- table: (\w+) -->$", re.MULTILINE)


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", DOCS / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_table_of_a_page_is_drawn(tables):
    pages = (page.read_text() for page in (DOCS / "pages").rglob("*.md"))
    names = [name for page in pages for name in PLACE.findall(page)]
    assert set(names) == set(tables.TABLES)
    for name in names:
        text = tables.TABLES[name]()
        rows = [re.split(r"(?<!\\)\|", line) for line in text.splitlines()]
        assert len(rows) > 3
        assert len({len(row) for row in rows}) == 1, name
        assert not re.search(r"\b(nan|inf)\b", text), name


def test_numbers_of_a_table(tables):
    """Pooled statistics at the last step, from the records themselves."""
    first = [r for r in tables.read("population") if r["kind"] == "run"][-1]
    rows = [r for r in tables.read("population") if r["run"] == first["run"]]
    last = max(row.get("step", 0) for row in rows)
    pooled = [r["accuracy"]["pooled"] for r in rows if r.get("step") == last]
    (line,) = (s for s in tables.population().splitlines() if "| pooled |" in s)
    assert line.endswith(f"| {100 * sum(pooled) / len(pooled):.1f} |")

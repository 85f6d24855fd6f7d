"""The code of the site runs and prints what is shown; the reference is complete."""

import contextlib
import functools
import inspect
import io
import re
from pathlib import Path

import pytest

import bnjax

PAGES = Path(__file__).parent.parent / "docs" / "pages"
# A block, and what it prints, if that is shown.
BLOCK = re.compile(
    r"^( *)```(python)[^\n]*\n(.*?)^\1```\n(?:\n*^\1```text\n(.*?)^\1```$)?",
    re.DOTALL | re.MULTILINE,
)


def blocks(text):
    for indent, _, code, shown in BLOCK.findall(text):
        yield tuple(re.sub(f"^{indent}", "", s, flags=re.M) for s in (code, shown))


@pytest.mark.full
@pytest.mark.parametrize(
    "page", sorted(PAGES.rglob("*.md")), ids=lambda page: str(page.relative_to(PAGES))
)
def test_code_blocks(page, tmp_path, monkeypatch):
    """In order, in one namespace, as a reader pastes them; files go to a new folder."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for code, shown in blocks(page.read_text()):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(page), "exec"), names)
        if shown:
            assert printed.getvalue().split() == shown.split(), code


def test_blocks_are_found():
    text = "a\n```python\nprint(1)\n```\n\n```text\n1\n```\n"
    text += "    ```python\n    x\n    ```\n"
    assert list(blocks(text)) == [("print(1)\n", "1\n"), ("x\n", "")]


ENTRY = re.compile(r"^::: (\S+)$", re.MULTILINE)


def public():
    """Every public name; some objects have two."""
    for name in bnjax.__all__:
        thing = getattr(bnjax, name)
        yield f"bnjax.{name}", thing
        if inspect.ismodule(thing):
            yield from ((f"bnjax.{name}.{n}", getattr(thing, n)) for n in thing.__all__)


def test_the_reference_has_every_public_object_once():
    pages = [page.read_text() for page in (PAGES / "api").glob("*.md")]
    entries = [entry for page in pages for entry in ENTRY.findall(page)]
    names = dict(public())
    assert set(entries) <= set(names)
    described = [id(names[entry]) for entry in entries]
    assert len(described) == len(set(described))
    assert [n for n, thing in names.items() if id(thing) not in described] == []


@pytest.mark.parametrize("name", dict(public()))
def test_docstrings_are_markdown(name):
    """No line is taken for a quotation, and no name for bold type."""
    doc = inspect.getdoc(functools.reduce(getattr, name.split(".")[1:], bnjax)) or ""
    text = re.sub(r"`[^`\n]+`|^ *(>>>|\.\.\.) .*$", "", doc, flags=re.MULTILINE)
    assert not re.search(r"^\s*(\w+: )?>", text, re.MULTILINE)
    assert not re.search(r"\b__\w+__\b", text)

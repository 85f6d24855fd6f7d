"""The code blocks of the site run, and print what is shown below them."""

import contextlib
import io
import re
from pathlib import Path

import pytest

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
    text = "a\n```python\nprint(1)\n```\n\n```text\n1\n```\n    ```python\n    x\n    ```\n"
    assert list(blocks(text)) == [("print(1)\n", "1\n"), ("x\n", "")]

"""The README's code runs, its commands and links exist, and it stays short."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.full
def test_code_blocks(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    names = {}  # a reader pastes one after the other
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert capsys.readouterr().out.split() == "[1. 1. 1. 1. 1. 1. 1. 1.]".split()


def test_links():
    links = re.findall(r"\]\(([^)#]+)", README)
    assert len(links) > 20
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_two_commands():
    assert 'pip install -e ".[experiments]" && python -m experiments.mnist' in README
    assert 'pip install -e ".[test]" && pytest' in README

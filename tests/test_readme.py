"""The README's code runs and prints what it says; its table names what there is."""

import pathlib
import re

import pytest

import bnjax

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.full
def test_code_blocks(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    names = {}  # a reader pastes one after the other
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert set(re.findall(r"[\d.]+", capsys.readouterr().out)) >= {"0.95", "0.96"}


def test_every_public_name_is_in_the_table():
    for name in bnjax.__all__:
        assert f"`bnjax.{name}" in README, name
    for room in (bnjax.running, bnjax.training):
        for name in room.__all__:
            if name[0].islower():
                assert name in README


def test_the_two_commands():
    assert 'pip install -e ".[experiments]" && python -m experiments.mnist' in README
    assert 'pip install -e ".[test]" && pytest' in README

"""The README's code runs and prints what it says; its table names what there is."""

import pathlib
import re

import bnjax

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


def test_code_blocks(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert set(re.findall(r"[\d.]+", capsys.readouterr().out)) == {"0.95", "0.96"}


def test_every_public_name_is_in_the_table():
    for name in bnjax.__all__:
        if name not in ("linen", "running"):
            assert f"`bnjax.{name}" in README, name
    for name in ("ema", "debiased_ema", "cumulative"):
        assert name in README


def test_the_two_commands():
    assert 'pip install -e ".[experiments]" && python -m experiments.mnist' in README
    assert 'pip install -e ".[test]" && pytest' in README

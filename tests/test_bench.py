"""The benches run, and the counts that the README quotes."""

import subprocess
import sys
from pathlib import Path

import pytest

from experiments.bench import collectives

REPOSITORY = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["layer", "collectives"])
def test_smoke(name, tmp_path):
    command = [sys.executable, "-m", f"experiments.bench.{name}", "--smoke"]
    if name == "layer":
        command += ["--output", str(tmp_path / "bench.jsonl")]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "bnjax" in done.stdout


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", collectives.MODES)
def test_what_a_layer_sends(mode, masked):
    """3C + 1 numbers of four bytes forward, from each of 8; 2C backward."""
    config = collectives.Config(features=24)
    text = collectives.program(config, mode, "bnjax", masked, True)
    forward = ("all-gather", 4 * (3 * 24 + 1))
    if mode == "jit":
        forward = ("all-reduce", 4 * 8 * (3 * 24 + masked))
    found = collectives.collectives(text, config.devices)
    assert sorted(found) == sorted([forward, ("all-reduce", 4 * 2 * 24)])

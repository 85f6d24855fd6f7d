"""The benches run, and the counts that the README quotes."""

import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments.bench import bars, collectives, layer, rivals, timing
from experiments.bench.right import check
from experiments.common import results

pytestmark = pytest.mark.experiment

REPOSITORY = Path(__file__).parents[2]
PNG = b"\x89PNG"


def smoke(name, *options):
    command = [sys.executable, "-m", f"experiments.bench.{name}", "--smoke", *options]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_smoke_of_collectives():
    assert "bnjax" in smoke("collectives")


def test_smoke_of_layer(tmp_path):
    """A library is in the table, or said to be left out."""
    output, picture = tmp_path / "bench.jsonl", tmp_path / "bench.png"
    some = ("flax", "haiku", "torch")
    files = "--output", str(output), "--picture", str(picture)
    text = smoke("layer", "--rivals", *some, *files)
    start, *records = results.read(output)
    assert [r["dtype"] for r in records] == ["bfloat16", "float32"]
    assert picture.read_bytes().startswith(PNG)
    for name in some:
        assert name in text
        assert (name in start["left_out"]) != (name in records[0]["ratio"])
    for r in records:
        assert all(min(t.values()) > 0 for t in r["milliseconds"].values())
        assert all(min(t.values()) > 0 for t in r["floors"].values())
        assert r["ratio"]["bnjax"] == {"forward": 1, "both": 1}
        assert r["stored"]["bnjax"] < 1.1 < 1.9 < r["stored"]["flax"]


def test_a_wrong_layer_is_refused():
    x, dy = jax.random.normal(jax.random.key(0), (2, 8, 3, 3, 4))
    calls = rivals.calls("flax", x, dy)
    check("flax", calls, x, dy)
    y, dx, *_ = calls["both"]()
    wrong = {
        "y": {**calls, "forward": lambda: (y + 1e-3,)},
        "dx": {**calls, "both": lambda: (y, dx.at[0, 0, 0, 0].set(jnp.nan))},
    }
    for what, calls in wrong.items():
        with pytest.raises(ValueError, match=f"^{what} of flax is off by"):
            check("flax", calls, x, dy)


def test_medians_of_calls_that_take_turns():
    """The slow call's time is its own; the untimed calls are made."""
    made = {"slow": 0, "fast": 0}

    def call(name, seconds):
        made[name] += 1
        time.sleep(seconds)
        return jnp.zeros(1)

    calls = {"slow": lambda: call("slow", 0.02), "fast": lambda: call("fast", 0)}
    median = timing.interleaved(calls, 0, least=3, untimed=2)
    assert set(median) == {"slow", "fast"}
    assert median["fast"] < 0.02 <= median["slow"]
    assert made == {"slow": 3 + 3 * 3, "fast": 3 + 3 * 3}


def test_bars_draw_any_groups(tmp_path):
    """On both sides of 1; some bars are missing."""
    panels = {
        "a": {"one": {"x": 0.2, "y": 30.0}, "two": {"x": 1.0}},
        "b": {"one": {"x": 2.0, "y": 1.0}, "two": {"y": 0.9}},
    }
    path = tmp_path / "folder" / "bars.png"
    bars.draw(panels, path, title="title", note="note", label="label")
    assert path.read_bytes().startswith(PNG)


def test_picture_of_records(tmp_path):
    """Drawn from what the file holds, and nothing else."""
    both = {"flax": {"forward": 2.0, "both": 2.0}, "bnjax": {"forward": 1, "both": 1}}
    records = [
        {"shape": [4, size], "dtype": "float32", "ratio": both, "floors": both}
        for size in (2, 8)
    ]
    start = {"versions": {"jax": "1"}, "hardware": {"cpu": "any", "cores": 2}}
    layer.draw(start, records, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(PNG)
    assert layer.means(records, "ratio")["flax"]["both"] == pytest.approx(2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", collectives.MODES)
def test_what_a_layer_sends(mode, masked):
    """2C numbers of four bytes forward, one more with a mask; 2C backward."""
    config = collectives.Config(features=24)
    text = collectives.program(config, mode, "bnjax", masked, True)
    found = collectives.collectives(text)
    forward, backward = (
        ("all-reduce", 4 * (2 * 24 + masked)),
        ("all-reduce", 4 * 2 * 24),
    )
    assert sorted(found) == sorted([forward, backward])

"""The benches run, what they time is right, and their counts hold."""

import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import charts, collectives, compile, layer, step, timing

pytestmark = pytest.mark.experiment

REPOSITORY = Path(__file__).parents[2]


def smoke(name, *options):
    command = [sys.executable, "-m", f"experiments.bench.{name}", "--smoke", *options]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "bnjax" in done.stdout
    return done.stdout


def test_smoke_of_collectives():
    smoke("collectives")


@pytest.mark.parametrize("name", ["layer", "step", "scaling", "compile", "whitening"])
def test_smoke(name, tmp_path):
    """Tables and pictures come from the records."""
    text = smoke(name, "--out", str(tmp_path))
    start, *records = charts.last_run(tmp_path / f"bench_{name}.jsonl")
    assert start["settings"]["seconds" if name != "compile" else "repeats"] <= 1
    assert len(records) >= (1 if name in ("layer", "whitening") else 2)
    assert (tmp_path / f"bench_{name}.png").stat().st_size > 10_000
    if name == "layer":
        check_layers(start, records, text)


def check_layers(start, records, text):
    """A library is in the table, or said to be left out."""
    for name in layer.SMOKE["rivals"]:
        assert name in text
        assert (name in start["left_out"]) != (name in records[0]["ratio"])
    for r in records:
        assert all(min(t.values()) > 0 for t in r["milliseconds"].values())
        assert all(min(t.values()) > 0 for t in r["floors"].values())
        assert r["ratio"]["bnjax"] == {"forward": 1, "both": 1}
        assert r["stored"]["bnjax"] < 1.1 < 1.9 < r["stored"]["flax"]


def test_a_wrong_layer_is_refused():
    x, dy = jax.random.normal(jax.random.key(0), (2, 8, 3, 3, 4))
    calls = layer.calls_of("flax", x, dy)
    layer.check("flax", calls, x, dy)
    y, dx, *_ = calls["both"]()
    wrong = {
        "y": {**calls, "forward": lambda: (y + 1e-3,)},
        "dx": {**calls, "both": lambda: (y, dx.at[0, 0, 0, 0].set(jnp.nan))},
    }
    for what, calls in wrong.items():
        with pytest.raises(ValueError, match=f"^{what} of flax is off by"):
            layer.check("flax", calls, x, dy)


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


def test_bars_end_at_their_values():
    """On both sides of 1; some bars are missing."""
    groups = {"one": {"x": 0.2, "y": 30.0}, "two": {"y": 0.9}}
    _, (axes,) = charts.panels("title", 1)
    charts.bars_of_ratios(axes, groups, "label")
    assert [bar.get_label() for bar in axes.containers] == ["x", "y"]
    ends = [[p.get_x() + p.get_width() for p in bar] for bar in axes.containers]
    assert ends == [[pytest.approx(0.2)], pytest.approx([30, 0.9])]
    assert [text.get_text() for text in axes.texts] == ["0.20", "30.00", "0.90"]
    low, high = axes.get_xlim()
    assert low < 0.2 < 30 < high


def test_means_over_the_shapes():
    ratios = [{"flax": {"forward": 1.0, "both": t}} for t in (1.0, 4.0)]
    means = layer.means([{"ratio": ratio} for ratio in ratios], "ratio")
    assert means == {"flax": {"forward": 1, "both": pytest.approx(2)}}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", collectives.MODES)
def test_what_a_layer_sends(mode, masked):
    """2C numbers of four bytes forward, one more with a mask; 2C backward."""
    config = collectives.Config(features=24)
    program, _ = collectives.compiled(config, mode, "bnjax", masked, True)
    found = collectives.counted(program)
    forward, backward = 4 * (2 * 24 + masked), 4 * 2 * 24
    assert sorted(found) == [("all-reduce", s) for s in sorted([forward, backward])]


@pytest.mark.parametrize("mode", ["jit", "shard_map"])
def test_collectives_are_as_many_on_any_number_of_devices(mode):
    for devices in (2, 4):
        config = collectives.Config(devices=devices, features=8)
        program, _ = collectives.compiled(config, mode, "bnjax", False, True)
        assert len(collectives.counted(program)) == 2


def bottlenecks(dtype):
    """Every variant of a small network, and variables and data for all of them."""
    networks = {
        name: step.ResNet((1,), True, norm, dtype, width=4, classes=10)
        for name, norm in step.NORMS.items()
    }
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(4, 32, 32, 3)), dtype)
    shapes = jax.eval_shape(networks["flax"].init, jax.random.key(0), images)

    def drawn(shape):
        scale = 1 / np.sqrt(shape.size / shape.shape[-1])
        return jnp.asarray(1 + rng.normal(size=shape.shape, scale=scale), shape.dtype)

    return networks, jax.tree.map(drawn, shapes), (images, jnp.arange(4))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_variants_are_the_same_network(dtype):
    """Bottlenecks and the large stem; the smoke run has the others."""
    networks, variables, (images, _) = bottlenecks(dtype)
    found = {}
    for name, network in networks.items():
        shapes = jax.eval_shape(network.init, jax.random.key(1), images)
        assert jax.tree.structure(shapes) == jax.tree.structure(variables)
        run = jax.jit(partial(network.apply, mutable=["batch_stats"]))
        found[name] = {"loss": float(abs(run(variables, images)[0]).mean())}
    scale = found["flax"]["loss"]
    step.check(found, step.AGREE[dtype] * scale)


def test_each_variant_stores_less():
    networks, variables, data = bottlenecks("float32")
    stored = {
        name: step.stored(network, variables, *data)
        for name, network in networks.items()
    }
    order = ("bnjax remat", "bnjax fused", "bnjax", "flax")
    assert [stored[name] for name in order] == sorted(stored[n] for n in order)
    assert len(set(stored.values())) == len(stored)


def test_another_loss_is_noticed():
    with pytest.raises(RuntimeError, match="losses differ"):
        step.check({"flax": {"loss": 1.0}, "bnjax": {"loss": 1.1}}, 1e-2)


def test_equations_count_those_inside_of_others():
    def inner(x):
        return x * x + 1

    jaxpr = jax.make_jaxpr(lambda x: jax.jit(inner)(x) - 1)(1.0)
    assert compile.equations(jaxpr.jaxpr) == 4

"""The benches of whole networks run; their networks agree, and their counts hold."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import charts, collectives, compile, step
from experiments.common.training import steps

pytestmark = pytest.mark.experiment

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["step", "scaling", "compile", "whitening"])
def test_smoke(name, tmp_path):
    command = [sys.executable, "-m", f"experiments.bench.{name}", "--smoke"]
    command += ["--output", str(tmp_path / "bench.jsonl")]
    command += ["--figure", str(tmp_path / "bench.png")]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "bnjax" in done.stdout
    start, *records = charts.last_run(tmp_path / "bench.jsonl")
    assert start["bench"] == name
    assert len(records) >= (1 if name == "whitening" else 2)
    assert (tmp_path / "bench.png").stat().st_size > 10_000


@pytest.mark.parametrize("mode", ["jit", "shard_map"])
def test_collectives_are_as_many_on_any_number_of_devices(mode):
    for devices in (2, 4, 8):
        config = collectives.Config(devices=devices, features=8)
        text = collectives.program(config, mode, "bnjax", False, True)
        assert len(collectives.collectives(text)) == 2


def bottlenecks(dtype):
    """Every variant of a small network, and variables and data for all of them."""
    networks = {
        name: step.ResNet(step.Bottleneck, (1,), norm, dtype, width=4, classes=10)
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
    bytes_of = {
        name: steps.stored(network, variables, data)
        for name, network in networks.items()
    }
    order = ("bnjax remat", "bnjax fused", "bnjax", "flax")
    assert [bytes_of[name] for name in order] == sorted(bytes_of[n] for n in order)
    assert len(set(bytes_of.values())) == len(bytes_of)


def test_another_loss_is_noticed():
    with pytest.raises(RuntimeError, match="losses differ"):
        step.check({"flax": {"loss": 1.0}, "bnjax": {"loss": 1.1}}, 1e-2)


def test_equations_count_those_inside_of_others():
    def inner(x):
        return x * x + 1

    jaxpr = jax.make_jaxpr(lambda x: jax.jit(inner)(x) - 1)(1.0)
    assert compile.equations(jaxpr.jaxpr) == 4

"""Flax's ImageNet ResNet-50, its own code with our layer, data parallel.

The definition comes with the source distribution of the installed Flax, which
`flax_suite.fetch` downloads; or from the folder in the variable FLAX_SOURCES.
"""

import importlib.util
import os
import pathlib

import flax.linen
import flax_suite
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_trees_close, collectives
from jax.sharding import AxisType, PartitionSpec

import bnjax

P = PartitionSpec
LAYERS = 53
FLAX = flax.linen.BatchNorm
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def resnet50(tmp_path_factory):
    given = os.environ.get("FLAX_SOURCES")
    sources = pathlib.Path(given) if given else None
    sources = sources or flax_suite.fetch(tmp_path_factory.mktemp("flax"))
    path = sources / "examples" / "imagenet" / "models.py"
    spec = importlib.util.spec_from_file_location("imagenet_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flax.linen, "BatchNorm", bnjax.BatchNorm)
        yield module.ResNet50


def step(model, devices, variables, images, labels):
    """One step of SGD on that many devices: the loss, parameters and statistics."""
    optimizer = optax.sgd(0.1, momentum=0.9, nesterov=True)

    def replica(variables, images, labels):
        def loss(params):
            logits, updates = model.apply(
                {**variables, "params": params}, images, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return jax.lax.pmean(losses.mean(), "batch"), updates

        params = variables["params"]
        (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(params)
        changes, _ = optimizer.update(grads, optimizer.init(params), params)
        return value, {"params": optax.apply_updates(params, changes), **updates}

    mesh = jax.make_mesh(
        (devices,),
        ("batch",),
        axis_types=(AxisType.Auto,),
        devices=jax.devices()[:devices],
    )
    specs = (P(), P("batch"), P("batch"))
    f = jax.shard_map(replica, mesh=mesh, in_specs=specs, out_specs=P())
    return jax.jit(f), (variables, images, labels)


def case(resnet50, dtype):
    model = resnet50(num_classes=10, dtype=dtype)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(16, 64, 64, 3)) + np.arange(16).reshape(-1, 1, 1, 1) / 8
    labels = rng.integers(10, size=16)
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((2, 64, 64, 3)))
    assert len(jax.tree.leaves(variables["batch_stats"])) == 2 * LAYERS

    def shaken(path, p):  # the last scale of each block begins at 0
        own = path[-1].key in ("scale", "bias")
        return p + own * 0.1 * rng.normal(size=p.shape).astype(p.dtype)

    params = jax.tree.map_with_path(shaken, variables["params"])
    return model, {**variables, "params": params}, images.astype(dtype), labels


def test_eight_devices_agree_with_one(resnet50, x64):
    """In float64, where fifty layers do not amplify the rounding beyond notice."""
    model, *arrays = case(resnet50, np.float64)
    one, eight = (f(*a) for f, a in (step(model, n, *arrays) for n in (1, 8)))
    assert_trees_close(eight, jax.tree.map(np.asarray, one), tol=1e-6)


def test_eight_devices_agree_with_one_in_float32(resnet50):
    model, *arrays = case(resnet50, np.float32)
    (loss, after), (loss_8, after_8) = (
        f(*a) for f, a in (step(model, n, *arrays) for n in (1, 8))
    )
    np.testing.assert_allclose(loss_8, loss, rtol=1e-5)
    stats = jax.tree.map(np.asarray, after["batch_stats"])
    assert_trees_close(after_8["batch_stats"], stats, tol=1e-3)

    def change(after):
        moved = jax.tree.map(jnp.subtract, after["params"], arrays[0]["params"])
        return np.concatenate([np.ravel(p) for p in jax.tree.leaves(moved)])

    difference = np.linalg.norm(change(after_8) - change(after))
    assert difference < 1e-2 * np.linalg.norm(change(after))


def test_one_collective_per_layer_and_direction(resnet50):
    model, variables, images, labels = case(resnet50, np.float32)
    f, arguments = step(model, 8, variables, images, labels)
    found = collectives(f, *arguments)
    assert set(found) == {"all-reduce"}
    gradients = len(jax.tree.leaves(variables["params"]))
    # One of each layer forward and one backward; the loss, and the gradients.
    assert found["all-reduce"] <= 2 * LAYERS + 1 + gradients


def test_its_own_code_in_the_context(resnet50, monkeypatch, x64):
    """With Flax's layer in the source, run by `replacing_batch_norm`."""
    model, *arrays = case(resnet50, np.float64)
    f, arguments = step(model, 1, *arrays)
    expected = f(*arguments)
    monkeypatch.setattr(flax.linen, "BatchNorm", FLAX)
    with bnjax.linen.replacing_batch_norm() as found:
        f, arguments = step(model, 1, *arrays)
        replaced = f(*arguments)
    assert len(found) == LAYERS
    assert all(each.after == "bnjax.linen.BatchNorm" for each in found.values())
    assert_trees_close(replaced, jax.tree.map(np.asarray, expected), tol=1e-9)

"""A freeze that survives train(): statistics used and not written, whatever is said."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx
from helpers import assert_close
from registry import ENTRIES, FEATURES

import bnjax
from bnjax.nnx import BatchMoments, freeze

# What a training loop says to layers, of which frozen ones take no notice.
SAID = [
    {"use_running_average": False},
    {"use_running_average": False, "update_stats": True},
    {"use_running_average": True, "update_stats": True},
]
every_layer_and_word = pytest.mark.parametrize(
    ("name", "said"),
    [("batch norm", said) for said in SAID] + [(name, SAID[1]) for name in ENTRIES],
)


def same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def arguments(entry):
    """Those of evaluation: a domain for each example, or none."""
    return {n: v for n, v in entry.extra().items() if n == "domain"}


@every_layer_and_word
def test_linen(name, said):
    """Evaluation's output and gradients; nothing is written, nor need be mutable."""
    entry = ENTRIES[name]
    variables, x, extra = entry.variables(), entry.x(), arguments(entry)
    frozen = entry.linen(frozen=True)

    def loss(layer, variables, x, *args, **options):
        return (layer.apply(variables, x, *args, **extra, **options) ** 3).sum()

    def gradient(layer, *args, **options):
        def f(variables, x):
            return loss(layer, variables, x, *args, **options)

        return jax.jit(jax.grad(f, (0, 1)))(variables, x)

    same(gradient(frozen, **said), gradient(entry.linen(), True))
    y, updates = frozen.apply(variables, x, **extra, **said, mutable=["batch_stats"])
    same(y, entry.linen().apply(variables, x, True, **extra))
    same(updates["batch_stats"], variables["batch_stats"])


@every_layer_and_word
def test_nnx(name, said):
    entry = ENTRIES[name]
    x, extra = entry.x(), arguments(entry)
    layer = entry.nnx(frozen=True)
    state = {**entry.variables()["params"], **entry.variables()["batch_stats"]}
    nnx.update(layer, state)

    def gradients(layer, **said):
        def loss(layer, x):
            return (layer(x, **extra, **said) ** 3).sum()

        return nnx.grad(loss, argnums=(0, 1))(layer, x)

    thawed = nnx.view(layer, frozen=False, use_running_average=True)
    actual, expected = gradients(layer, **said), gradients(thawed)
    same(jax.tree.leaves(actual), jax.tree.leaves(expected))
    same(layer(x, **extra, **said), thawed(x, **extra))
    same(nnx.to_pure_dict(nnx.state(layer)), state)


def test_the_formula():
    entry = ENTRIES["batch norm"]
    x, v = entry.x(), entry.variables()
    y = entry.linen(frozen=True).apply(v, x, use_running_average=False)
    rows = (v["batch_stats"][n] for n in ("mean", "var"))
    affine = (v["params"][n] for n in ("scale", "bias"))
    assert_close(y, oracle.normalize(x, *rows, *affine, (0, 1)), tol=2e-6)


class Backbone(nnx.Module):
    def __init__(self, norm=bnjax.nnx.BatchNorm):
        rngs = nnx.Rngs(0)
        self.linear = nnx.Linear(4, FEATURES, rngs=rngs)
        self.norms = nnx.List([norm(FEATURES, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        return self.norms[1](jax.nn.relu(self.norms[0](self.linear(x))))


class Net(nnx.Module):
    def __init__(self, norm=bnjax.nnx.BatchNorm):
        self.backbone = Backbone(norm)
        self.head = bnjax.nnx.BatchNorm(FEATURES, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.head(self.backbone(x))


def data():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(1, 2, (16, 4)), jnp.float32)


def statistics(model):
    return jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))


SETTINGS = {
    "nothing": lambda model: model,
    "train": lambda model: model.train(),
    "eval, train": lambda model: (model.eval(), model.train()),
    "set_attributes": lambda m: m.set_attributes(use_running_average=False),
    "by class": lambda m: m.set_attributes(
        nnx.BatchNorm, use_running_average=False, update_stats=True
    ),
    "clone": lambda model: None,
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_survives(setting):
    """The backbone keeps its statistics through training, the head moves."""
    model, x = Net(), data()
    assert freeze(model, "backbone/**") == ("backbone/norms/0", "backbone/norms/1")
    SETTINGS[setting](model)
    if setting == "clone":
        model = nnx.merge(*nnx.split(nnx.clone(model)))
    before = statistics(model)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        grads = nnx.grad(lambda model: (model(x) ** 3).mean())(model)
        optimizer.update(model, grads)

    step(model, optimizer, x)
    after = statistics(model)
    same(after["backbone"], before["backbone"])
    assert not np.allclose(after["head"]["mean"], before["head"]["mean"])
    freeze(model, frozen=False)
    model.train()
    model(x)
    now = statistics(model)["backbone"]["norms"][0]["mean"]
    assert not np.allclose(now, before["backbone"]["norms"][0]["mean"])


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ((), ["backbone/norms/0", "backbone/norms/1", "head"]),
        (("*",), ["backbone/norms/0", "backbone/norms/1", "head"]),
        (("backbone/*",), ["backbone/norms/0", "backbone/norms/1"]),
        (("*/1", "head"), ["backbone/norms/1", "head"]),
    ],
)
def test_patterns(patterns, expected):
    model = Net()
    assert list(freeze(model, *patterns)) == expected
    frozen = {
        "/".join(map(str, path))
        for path, m in nnx.iter_modules(model)
        if getattr(m, "frozen", False)
    }
    assert frozen == {*expected}


def test_one_layer():
    layer = bnjax.nnx.GhostBatchNorm(3, virtual_batch_size=2, rngs=nnx.Rngs(0))
    assert freeze(layer) == ("",)
    assert layer.frozen


def test_messages():
    message = "pattern='encoder/*' matches none of the paths: expected a pattern"
    with pytest.raises(ValueError, match=re.escape(message)):
        freeze(Net(), "encoder/*")
    model = Net(nnx.BatchNorm)
    with pytest.raises(TypeError, match=r"backbone/norms/0 is a flax\.nnx\.BatchNorm,"):
        freeze(model, "*")
    assert not model.head.frozen  # nothing was set before
    freeze(model, "head")
    with pytest.raises(TypeError, match="the model is a flax"):
        freeze(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))


# ---- what reads the Moments ----


class Linen(nn.Module):
    frozen: bool = True

    @nn.compact
    def __call__(self, x):
        x = bnjax.BatchNorm(False, frozen=self.frozen, name="frozen")(x)
        return bnjax.BatchNorm(False, name="trained")(nn.Dense(FEATURES)(x))


def test_accumulation_leaves_frozen_statistics():
    model, x = Linen(), data()
    variables = model.init(jax.random.key(0), x)
    variables["batch_stats"]["frozen"]["mean"] += 0.5

    def loss_fn(variables, x):
        result = model.apply(variables, x, mutable=["batch_stats", "batch_moments"])
        return (result[0] ** 2).mean(), result

    found = bnjax.training.accumulate(
        loss_fn, variables, x.reshape(2, 8, 4), rule=bnjax.running.ema(0.9)
    )
    same(found.batch_stats["frozen"], variables["batch_stats"]["frozen"])
    moved = found.batch_stats["trained"]["mean"]
    assert not np.allclose(moved, variables["batch_stats"]["trained"]["mean"])
    assert found.pool["frozen"].count == 0


def test_recorded_moments_stay_empty():
    model = Net()
    freeze(model, "backbone/*")
    recording = nnx.view(model, record_moments=True)
    recording(data())
    left = nnx.to_pure_dict(nnx.pop(recording, BatchMoments))
    assert left["backbone"]["norms"][0]["moments"].count == 0
    assert left["head"]["moments"].count == 16


def test_folds_as_evaluation():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(FEATURES, name="dense")(x)
            return bnjax.BatchNorm(False, frozen=True, name="norm")(x)

    model, x = Model(), data()
    variables = model.init(jax.random.key(0), x)
    folded = bnjax.fold.fold_model(model, variables, x)
    assert folded.folded == (("dense", "norm"),)
    expected = model.apply(variables, x)
    assert_close(folded.apply(folded.params, x), np.asarray(expected), tol=2e-6)


def test_a_frozen_layer_needs_no_choice():
    layer, x = bnjax.BatchNorm(frozen=True), data()
    variables = layer.init(jax.random.key(0), x)
    same(layer.apply(variables, x), bnjax.BatchNorm(True).apply(variables, x))
    model = bnjax.nnx.BatchNorm(
        4, use_running_average=None, frozen=True, rngs=nnx.Rngs(0)
    )
    same(model(x), layer.apply(variables, x))

"""The guides' recipes for what needs no class of its own, against float64."""

import functools
import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx
from helpers import assert_close, assert_trees_close

import bnjax
from bnjax import population, training

N, H, W, C = 6, 5, 4, 3
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(1, 2, (N, H, W, C)).astype(np.float32)
TARGET = 0.5 * RNG.normal(1, 2, (N, H, W, C)).astype(np.float32) + 3


class Net(nn.Module):
    """norm, mean over the map, dense: the norm's input is the model's."""

    norm: type = bnjax.BatchNorm

    @nn.compact
    def __call__(self, x, train):
        x = self.norm(use_running_average=not train, momentum=0.9, name="norm")(x)
        return nn.Dense(4, name="head")(x.mean((1, 2)))


def trained():
    """Variables none of which is as it began."""
    variables = Net().init(jax.random.key(0), IMAGES, train=False)
    rng = np.random.default_rng(1)
    norm = {"scale": rng.normal(1, 0.3, C), "bias": rng.normal(0, 1, C)}
    stats = {"mean": rng.normal(0, 1, C), "var": rng.uniform(0.5, 2, C)}
    head = variables["params"]["head"]
    given = {"params": {"norm": norm, "head": head}, "batch_stats": {"norm": stats}}
    return jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), given)


def logits_of(variables, x, mean, var):
    """What the net makes of x by these statistics, in float64."""
    params = variables["params"]
    norm, head = params["norm"], params["head"]
    y = oracle.normalize(x, mean, var, norm["scale"], norm["bias"], (0, 1, 2))
    return y.mean((1, 2)) @ oracle.wide(head["kernel"]) + oracle.wide(head["bias"])


def batch_of(x):
    """The mean and the variance of x, in float64."""
    x = oracle.wide(x)
    return x.mean((0, 1, 2)), x.var((0, 1, 2))


# Statistics and affine of each activation.


def test_per_activation():
    layer = bnjax.BatchNorm(False, axis=(1, 2, 3), momentum=0.9)
    variables = layer.init(jax.random.key(0), IMAGES)
    shapes = {leaf.shape for leaf in jax.tree.leaves(variables)}
    assert shapes == {(H, W, C)}
    scale, bias = RNG.normal(1, 0.3, (2, H, W, C)).astype(np.float32)
    variables["params"] = {"scale": scale, "bias": bias}
    y, left = layer.apply(variables, IMAGES, mutable=["batch_stats"])
    expected = oracle.batch_norm(IMAGES, scale, bias, (0,))
    assert_close(y, expected, tol=2e-6)
    stats = left["batch_stats"]
    wide = oracle.wide(IMAGES)
    assert_close(stats["mean"], 0.1 * wide.mean(0))
    assert_close(stats["var"], 0.9 + 0.1 * wide.var(0))
    flat, _ = bnjax.batch_norm(IMAGES.reshape(N, -1), scale.ravel(), bias.ravel())
    assert_close(y, np.float64(flat).reshape(y.shape), tol=1e-6)
    inferred = bnjax.BatchNorm(True, axis=(1, 2, 3)).apply(
        variables | {"batch_stats": stats}, IMAGES
    )
    by = oracle.wide(stats["mean"]), oracle.wide(stats["var"])
    assert_close(inferred, oracle.normalize(IMAGES, *by, scale, bias, (0,)), tol=2e-6)


# Scale and bias of each example.


class ConditionalNorm(nn.Module):
    """Scale and bias from a condition, (batch, anything)."""

    @nn.compact
    def __call__(self, x, condition, train):
        norm = bnjax.BatchNorm(not train, use_scale=False, use_bias=False)
        film = nn.Dense(2 * x.shape[-1])(condition)[:, None, None]
        gamma, beta = jnp.split(film, 2, -1)
        return norm(x) * (1 + gamma) + beta


def test_conditional():
    model, condition = ConditionalNorm(), jax.nn.one_hot(jnp.arange(N) % 2, 2)
    variables = model.init(jax.random.key(0), IMAGES, condition, False)
    assert variables["batch_stats"]["BatchNorm_0"].keys() == {"mean", "var"}
    assert variables["params"].keys() == {"Dense_0"}
    film = oracle.wide(variables["params"]["Dense_0"]["kernel"])[np.arange(N) % 2]
    gamma, beta = np.split(film[:, None, None], 2, -1)
    one, zero = np.ones(C), np.zeros(C)
    y, _ = model.apply(variables, IMAGES, condition, True, mutable=["batch_stats"])
    plain = oracle.batch_norm(IMAGES, one, zero, (0, 1, 2))
    assert_close(y, plain * (1 + gamma) + beta, tol=2e-6)
    pure, _ = bnjax.batch_norm(IMAGES)
    again = pure * jnp.asarray(1 + gamma, "float32") + jnp.asarray(beta, "float32")
    assert_close(again, plain * (1 + gamma) + beta, tol=2e-6)
    still = model.apply(variables, IMAGES, condition, False)
    expected = oracle.normalize(IMAGES, zero, one, one, zero, (0, 1, 2))
    assert_close(still, expected * (1 + gamma) + beta, tol=2e-6)


# A scale that is stored as scale - 1.


def towards_one(decay):
    """Weight decay on scale - 1."""
    return optax.stateless(
        lambda updates, params: jax.tree.map(
            lambda u, p: u + decay * (p - 1), updates, params
        )
    )


def test_checkpoints_of_scale_less_one():
    """Loaded by adding 1; then the optimizer takes the same steps on either."""
    variables = trained()
    gamma = variables["params"]["norm"]["scale"] - 1  # what praxis and axlearn store

    def loss(scale):
        norm = {"scale": scale, "bias": variables["params"]["norm"]["bias"]}
        params = {**variables["params"], "norm": norm}
        given = {**variables, "params": params}
        return (Net().apply(given, IMAGES, train=False) ** 2).mean()

    expected = logits_of(variables, IMAGES, *variables["batch_stats"]["norm"].values())
    assert_close(loss(1 + gamma), (expected**2).mean(), tol=2e-6)
    tx = optax.adam(0.1)
    ends = []
    for start, f in ((gamma, lambda g: loss(1 + g)), (1 + gamma, loss)):
        value, state = start, tx.init(start)
        for _ in range(3):
            updates, state = tx.update(jax.grad(f)(value), state)
            value = optax.apply_updates(value, updates)
        ends.append(value)
    assert np.abs(ends[0] - gamma).max() > 0.1
    assert_close(ends[1], 1 + np.float64(ends[0]), tol=1e-5)


def test_decay_towards_one():
    params = trained()["params"]
    scales = training.freeze_mask(params, "norm/scale")
    tx = optax.chain(
        optax.add_decayed_weights(0.1, training.weight_decay_mask),
        optax.masked(towards_one(0.1), scales),
        optax.sgd(0.5),
    )
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    scale = oracle.wide(params["norm"]["scale"])
    kernel = oracle.wide(params["head"]["kernel"])
    assert_close(updates["norm"]["scale"], -0.5 * (1 + 0.1 * (scale - 1)))
    assert_close(updates["norm"]["bias"], np.full(C, -0.5))
    assert_close(updates["head"]["kernel"], -0.5 * (1 + 0.1 * kernel))
    assert_close(updates["head"]["bias"], np.full(4, -0.5))


# Statistics at test time.


def collect(variables, x):
    mutable = ["batch_stats", "batch_moments"]
    return Net().apply(variables, x, train=True, mutable=mutable)


def by_batch():
    """The net that normalizes by the batch where train=True, and writes nothing."""
    return Net(functools.partial(bnjax.BatchNorm, update_stats=False))


def test_adabn():
    variables = trained()
    adapted = {
        **variables,
        "batch_stats": population.pooled(collect, variables, [TARGET[:4], TARGET[4:]]),
    }
    expected = logits_of(variables, TARGET, *batch_of(TARGET))
    assert_close(Net().apply(adapted, TARGET, train=False), expected, tol=1e-5)
    assert_trees_close(adapted["params"], trained()["params"], tol=0)


def test_statistics_of_the_test_batch():
    """Without `mutable`, and nothing is written."""
    variables = trained()
    expected = logits_of(variables, TARGET, *batch_of(TARGET))
    assert_close(by_batch().apply(variables, TARGET, train=True), expected, tol=1e-5)
    layer = bnjax.nnx.BatchNorm(C, rngs=nnx.Rngs(0))
    view = nnx.view(layer, use_running_average=False, update_stats=False)
    y = view(TARGET)
    expected = oracle.batch_norm(TARGET, np.ones(C), np.zeros(C), (0, 1, 2))
    assert_close(y, expected, tol=2e-6)
    assert (layer.mean[...] == 0).all()


def entropy(logits):
    return -(jax.nn.softmax(logits) * jax.nn.log_softmax(logits)).sum(-1).mean()


def test_tent():
    """Entropy falls; scale and bias alone change, by the first step's gradient."""
    variables = trained()
    adapted = training.freeze_mask(variables["params"], "norm/*")
    others = jax.tree.map(operator.not_, adapted)
    tx = optax.chain(optax.sgd(0.5), optax.masked(optax.set_to_zero(), others))

    def loss(params):
        given = {**variables, "params": params}
        return entropy(by_batch().apply(given, TARGET, train=True))

    def expected(scale):
        """In float64."""
        norm = {**variables["params"]["norm"], "scale": scale}
        given = {"params": {**variables["params"], "norm": norm}}
        logits = logits_of(given, TARGET, *batch_of(TARGET))
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        return -(p * np.log(p)).sum(-1).mean()

    params, state = variables["params"], tx.init(variables["params"])
    start, scale = loss(params), oracle.wide(params["norm"]["scale"])
    assert_close(start, expected(scale), tol=1e-5)
    for step in range(5):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        if step == 0:
            e = 1e-5 * np.eye(C)
            slope = [expected(scale + d) - expected(scale - d) for d in e]
            assert_close(
                updates["norm"]["scale"], -0.5 * np.array(slope) / 2e-5, tol=1e-4
            )
        params = optax.apply_updates(params, updates)
    assert loss(params) < 0.99 * start
    assert_trees_close(params["head"], variables["params"]["head"], tol=0)
    for name in ("scale", "bias"):
        assert (params["norm"][name] != variables["params"]["norm"][name]).any()


# Each example in its own inference statistics.


def weighed(x, mean, var, scale, bias, weight):
    """Inference by running statistics with the example's own mixed in."""
    own = bnjax.moments(x, axis=(0, 3))  # (batch, feature)
    mixed = (1 - weight) * var[None] + weight * own.variance()
    mixed += weight * (1 - weight) * (own.mean - mean[None]) ** 2
    mean = (1 - weight) * mean[None] + weight * own.mean
    scale, bias = (jnp.broadcast_to(v, mean.shape) for v in (scale, bias))
    return bnjax.normalize(x, mean, mixed, scale, bias, axis=(0, 3))


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_example_weighing(weight):
    """As in the paper: averages of x and of x^2; 0 is inference, 1 instance norm."""
    variables = trained()
    norm = {**variables["params"]["norm"], **variables["batch_stats"]["norm"]}
    scale, bias, mean, var = (norm[k] for k in ("scale", "bias", "mean", "var"))
    x, m, v = oracle.wide(IMAGES), oracle.wide(mean), oracle.wide(var)
    first = (1 - weight) * m + weight * x.mean((1, 2))
    second = (1 - weight) * (v + m**2) + weight * (x**2).mean((1, 2))
    given = first[:, None, None], (second - first**2)[:, None, None]
    y = (x - given[0]) / np.sqrt(given[1] + 1e-5)
    y = y * oracle.wide(scale) + oracle.wide(bias)
    assert_close(weighed(IMAGES, mean, var, scale, bias, weight), y, tol=2e-6)


# The variants.


def test_ghost_batches_in_a_checkpoint_of_batch_norm():
    ghost = Net(functools.partial(bnjax.linen.GhostBatchNorm, virtual_batch_size=2))
    variables = trained()
    logits, left = ghost.apply(variables, IMAGES, train=True, mutable=["batch_stats"])
    for i in range(0, N, 2):
        expected = logits_of(variables, IMAGES[i : i + 2], *batch_of(IMAGES[i : i + 2]))
        assert_close(logits[i : i + 2], expected, tol=1e-5)
    new, old = (v["batch_stats"]["norm"] for v in (left, variables))
    for name, value in zip(("mean", "var"), batch_of(IMAGES)):
        assert_close(new[name], 0.9 * oracle.wide(old[name]) + 0.1 * value)
    expected = Net().apply(variables, IMAGES, train=False)
    assert_close(ghost.apply(variables, IMAGES, train=False), expected, tol=0)


class Critic(nn.Module):
    @nn.compact
    def __call__(self, inputs, train):
        x = nn.Dense(8, use_bias=False)(inputs)
        x = bnjax.linen.BatchRenorm(not train, activation=nn.relu, name="norm")(x)
        return nn.Dense(1)(x)[..., 0]


def test_a_joint_batch():
    """The statistics are those of now and next together."""
    now = RNG.normal(0, 1, (16, 4)).astype(np.float32)
    then = RNG.normal(2, 1, (16, 4)).astype(np.float32)
    critic = Critic()
    variables = critic.init(jax.random.key(0), now, train=False)
    both = jnp.concatenate([now, then])
    q, left = critic.apply(variables, both, train=True, mutable=["batch_stats"])
    q_now, q_then = jnp.split(q, 2)
    assert q_now.shape == q_then.shape == (16,)
    kernel = oracle.wide(variables["params"]["Dense_0"]["kernel"])
    h = oracle.wide(np.concatenate([now, then])) @ kernel
    mean, var = h.mean(0), h.var(0)
    new = left["batch_stats"]["norm"]
    assert_close(new["mean"], 0.01 * mean, tol=2e-6)
    assert_close(new["var"], 0.99 + 0.01 * var, tol=2e-6)
    sigma = np.sqrt(var + 1e-5)
    start = np.sqrt(1 + 1e-5)
    r, d = np.clip(sigma / start, 1 / 3, 3), np.clip(mean / start, -5, 5)
    y = np.maximum((h - mean) / sigma * r + d, 0)
    last = {k: oracle.wide(v) for k, v in variables["params"]["Dense_1"].items()}
    expected = (y @ last["kernel"] + last["bias"])[:, 0]
    assert_close(jnp.concatenate([q_now, q_then]), expected, tol=1e-5)


def test_an_auxiliary_batch_norm():
    """AdvProp from a checkpoint of BatchNorm; the clean half is as before."""
    split = Net(functools.partial(bnjax.linen.SplitBatchNorm, num_splits=2))
    variables = trained()
    twice = functools.partial(jax.tree.map, lambda v: jnp.stack([v, v]))
    both = {
        "params": variables["params"] | {"norm": twice(variables["params"]["norm"])},
        "batch_stats": twice(variables["batch_stats"]),
    }
    batch = jnp.concatenate([IMAGES, TARGET])
    logits, left = split.apply(both, batch, train=True, mutable=["batch_stats"])
    for part, x in zip(jnp.split(logits, 2), (IMAGES, TARGET)):
        assert_close(part, logits_of(variables, x, *batch_of(x)), tol=1e-5)
    for row, x in enumerate((IMAGES, TARGET)):
        mean = left["batch_stats"]["norm"]["mean"][row]
        old = oracle.wide(variables["batch_stats"]["norm"]["mean"])
        assert_close(mean, 0.9 * old + 0.1 * batch_of(x)[0], tol=2e-6)
    expected = Net().apply(variables, IMAGES, train=False)
    assert_close(split.apply(both, IMAGES, train=False), expected, tol=1e-6)

"""Split batch normalization: statistics of its own for each domain."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from helpers import assert_close, assert_trees_close, collectives, covering, poison
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_sharded import mesh

import bnjax
from bnjax.split import split_batch_norm, split_moments, split_normalize

SHAPE = (12, 5, 4)
AXES = (0, 1)
DOMAIN = np.array([2, 0, 0, 2, 0, 2, 2, 0, 2, 0, 2, 2])  # of three; none is of 1


def case(dtype=np.float32, splits=3):
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, *SHAPE)) * 2 + 1
    x = x + DOMAIN[:, None, None]
    scale, bias = rng.normal(size=(2, splits, 4))
    return [np.asarray(v, dtype) for v in (x, scale, bias, dy)]


def mask_of(shape=SHAPE):
    return np.random.default_rng(1).random(shape) < 0.7


# ---- the formula ----


@pytest.mark.parametrize("shape", [None, (12, 1, 1), SHAPE])
def test_the_papers_formula(shape):
    x, scale, bias, _ = case()
    mask = None if shape is None else mask_of(shape)
    seen = np.broadcast_to(True if mask is None else mask, SHAPE)
    y, moments = split_batch_norm(
        poison(x, seen), scale, bias, num_splits=3, domain=DOMAIN, mask=mask
    )
    expected = oracle.split_batch_norm(x, scale, bias, DOMAIN, mask)
    assert_close(np.asarray(y)[seen], expected[seen], tol=2e-6)
    for d in (0, 2):
        count, mean, m2 = oracle.moments(x[DOMAIN == d], AXES, seen[DOMAIN == d])
        np.testing.assert_array_equal(np.broadcast_to(moments.count[d], 4), count)
        assert_close(moments.mean[d], mean)
        assert_close(moments.m2[d], m2, tol=2e-6)
    nothing = jax.tree.map(lambda v: np.asarray(v)[1], moments)
    assert all((v == 0).all() for v in nothing)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shared", [False, True])
def test_gradients(shared):
    """Domain by domain; the shared scale and bias have the sum of all."""
    x, scale, bias, dy = case(np.float64)
    affine = (scale[0], bias[0]) if shared else (scale, bias)

    def f(x, scale, bias):
        return split_batch_norm(x, scale, bias, num_splits=3, domain=DOMAIN)[0]

    dx, dscale, dbias = jax.vjp(f, x, *affine)[1](dy)
    rows = np.zeros((2, 3, 4))
    expected = np.zeros(SHAPE)
    for d in (0, 2):
        own, row = DOMAIN == d, scale[0 if shared else d]
        found = oracle.batch_norm_gradients(x[own], row, dy[own], AXES)
        expected[own], rows[0, d], rows[1, d] = found
    if shared:
        rows = rows.sum(1)
    assert_trees_close((dx, dscale, dbias), (expected, *rows), tol=1e-10)


@pytest.mark.parametrize("splits", [2, 3])
def test_parts_are_domains_in_turn(splits):
    x, scale, bias, dy = case(splits=splits)
    mask = mask_of((12, 5, 1))

    def results(domain):
        f = functools.partial(
            split_batch_norm, num_splits=splits, domain=domain, mask=mask
        )

        @jax.jit
        def run(x, scale, bias):
            (y, moments), vjp = jax.vjp(f, x, scale, bias)
            return y, moments, vjp((dy, moments))

        return run(x, scale, bias)

    expected = results(np.arange(12) * splits // 12)
    assert_trees_close(results(None), expected, tol=1e-5)
    size = 12 // splits
    for d in range(splits):
        own = slice(d * size, (d + 1) * size)
        alone = bnjax.batch_norm(x[own], scale[d], bias[d], mask=mask[own])
        assert_close(expected[0][own], np.asarray(alone[0]), tol=2e-6)
        one = jax.tree.map(lambda v, d=d: v[d], expected[1])
        assert_trees_close(one, alone[1], tol=2e-6)


@pytest.mark.parametrize("domain", [None, 0, np.zeros(12, int)])
def test_one_domain_is_batch_norm(domain):
    """To the bit, but by example, where each has a row of its own, to rounding."""
    x, scale, bias, dy = case(splits=1)
    options = {"mask": mask_of((12, 5, 1)), "activation": nn.gelu}

    @functools.partial(jax.jit, static_argnums=0)
    def results(batch_norm, scale, bias):
        (y, moments), vjp = jax.vjp(batch_norm, x, scale, bias)
        return y, moments, vjp((dy, moments))

    split = functools.partial(split_batch_norm, num_splits=1, domain=domain, **options)
    y, moments, grads = results(split, scale, bias)
    plain = functools.partial(bnjax.batch_norm, **options)
    expected = results(plain, scale[0], bias[0])
    first = jax.tree.map(lambda v: v[0], moments)
    assert_trees_close((y, first), expected[:2])
    if np.ndim(domain) == 0:
        jax.tree.map(np.testing.assert_array_equal, (y, first), expected[:2])
    grads = grads[0], grads[1][0], grads[2][0]
    assert_trees_close(grads, expected[2], tol=1e-6)


def test_one_domain_for_the_whole_batch():
    """Known or traced; the other domains are not looked at."""
    x, scale, bias, _ = case()
    scale[0], bias[2] = np.nan, np.nan
    f = functools.partial(split_batch_norm, x, scale, bias, num_splits=3)
    y, moments = f(domain=1)
    plain, own = bnjax.batch_norm(x, scale[1], bias[1])
    np.testing.assert_array_equal(y, plain)
    for values, value in zip(moments, own, strict=True):
        np.testing.assert_array_equal(values[1], value)
        assert (np.asarray(values)[[0, 2]] == 0).all()
    traced = jax.jit(lambda domain: f(domain=domain))(jnp.uint8(1))
    assert_trees_close(traced, (y, moments), tol=2e-6)


@covering(strength=1, axis=[0, 1, (0, 2), (2, 1)], how=["parts", "by example", "one"])
def test_other_feature_axes(how, axis):
    """With a residual and an activation, in training and inference."""
    rng = np.random.default_rng(0)
    x, residual = rng.normal(size=(2, 6, 4, 8)).astype(np.float32)
    axes = sorted(a % 3 for a in np.atleast_1d(axis))
    others = [a for a in range(3) if a not in axes]
    batch, features = x.shape[others[0]], tuple(x.shape[a] for a in axes)
    scale, bias, mean = rng.normal(size=(3, 2, *features)).astype(np.float32)
    var = rng.uniform(0.5, 2, (2, *features)).astype(np.float32)
    by_example = {
        "parts": np.repeat([0, 1], batch // 2),
        "by example": np.arange(batch) % 2,
        "one": np.ones(batch, int),
    }[how]
    domain = {"parts": None, "by example": by_example, "one": 1}[how]
    options = {"axis": axis, "residual": residual, "activation": jnp.tanh}
    last = 1 if how == "one" else by_example

    @jax.jit
    def run(x):
        both = split_batch_norm(x, scale, bias, num_splits=2, domain=domain, **options)
        return both, split_normalize(x, mean, var, scale, bias, domain=last, **options)

    (y, moments), inferred = jax.tree.map(np.asarray, run(x))
    for d in np.unique(by_example):
        at = np.flatnonzero(by_example == d)
        own, more = (np.take(v, at, others[0]) for v in (x, residual))

        @jax.jit
        def alone(x, residual, mean, var, *affine):
            options = {"axis": axis, "residual": residual, "activation": jnp.tanh}
            y, moments = bnjax.batch_norm(x, *affine, **options)
            return y, moments, bnjax.normalize(x, mean, var, *affine, **options)

        vectors = (v[d] for v in (mean, var, scale, bias))
        expected, own_moments, expected_inferred = alone(own, more, *vectors)
        assert_close(np.take(y, at, others[0]), expected, tol=5e-6)
        row = jax.tree.map(lambda v, d=d: v[d], moments)
        assert_trees_close(row, own_moments, tol=5e-6)
        assert_close(np.take(inferred, at, others[0]), expected_inferred, tol=5e-6)


def test_moments_alone():
    x, *_ = case()
    options = {"num_splits": 3, "domain": DOMAIN, "mask": mask_of()}
    expected = split_batch_norm(x, **options)[1]
    assert_trees_close(split_moments(x, **options), expected)


def test_a_domain_without_a_value_takes_the_fallback():
    x, scale, bias, _ = case()
    mask = (DOMAIN != 2)[:, None, None]
    mean, var = np.random.default_rng(2).uniform(0.5, 2, (2, 3, 4)).astype(np.float32)
    y, _ = split_batch_norm(
        x, scale, bias, num_splits=3, domain=DOMAIN, mask=mask, fallback=(mean, var)
    )
    expected = oracle.split_batch_norm(x, scale, bias, DOMAIN)
    own = DOMAIN == 2
    expected[own] = oracle.normalize(x[own], mean[2], var[2], scale[2], bias[2], AXES)
    assert_close(y, expected, tol=2e-6)


def test_means_of_domains_far_from_zero():
    x = np.random.default_rng(0).normal(size=(96, 4)) + np.array([[1e4], [-300]] * 48)
    x = x.astype(np.float32)
    domain = np.arange(96) % 2
    f = jax.jit(lambda x: split_moments(x, num_splits=2, domain=domain))
    for d in range(2):
        expected = oracle.moments(x[domain == d], 0)[2]
        np.testing.assert_allclose(f(x).m2[d], expected, rtol=1e-5)


# ---- domains that are not there ----


def test_a_traced_domain_that_is_not_there_gives_nan():
    """To its own examples; neither to others nor to any statistics."""
    x, scale, bias, _ = case()
    wrong = np.where(np.arange(12) == 4, 3, np.where(np.arange(12) == 7, -1, DOMAIN))
    known = ~np.isin(np.arange(12), (4, 7))

    @jax.jit
    def f(domain):
        y, moments = split_batch_norm(x, scale, bias, num_splits=3, domain=domain)
        mean, var = moments.mean, moments.variance()
        return y, moments, split_normalize(x, mean, var, scale, bias, domain=domain)

    y, moments, inferred = f(wrong)
    expected = oracle.split_batch_norm(x[known], scale, bias, DOMAIN[known])
    for found in (y, inferred):
        assert_close(found[known], expected, tol=5e-6)
        assert np.isnan(found[~known]).all()
    own = split_moments(x[known], num_splits=3, domain=DOMAIN[known])
    assert_trees_close(moments, own, tol=2e-6)
    y, moments, inferred = f(jnp.int32(3))
    assert np.isnan(y).all()
    assert np.isnan(inferred).all()
    assert all((np.asarray(v) == 0).all() for v in moments)


def test_a_domain_that_a_batch_lacks_keeps_its_running_statistics():
    x, *_ = case()
    layer = bnjax.linen.SplitBatchNorm(False, num_splits=3, momentum=0.5)
    variables = layer.init(jax.random.key(0), x)
    updates = layer.apply(variables, x, domain=DOMAIN, mutable=["batch_stats"])[1]
    mean, var = updates["batch_stats"]["mean"], updates["batch_stats"]["var"]
    np.testing.assert_array_equal(mean[1], 0)
    np.testing.assert_array_equal(var[1], 1)
    for d in (0, 2):
        own = x[DOMAIN == d]
        assert_close(mean[d], own.mean(AXES) / 2, tol=2e-6)
        assert_close(var[d], (1 + own.var(AXES)) / 2, tol=2e-6)


# ---- the layer ----


@pytest.mark.parametrize("shared", [False, True])
def test_adversarial_and_clean_halves(shared):
    """As two layers, one for each half; inference is that of the clean one."""
    x, scale, bias, _ = case(splits=2)
    scale, bias = (scale[0], bias[0]) if shared else (scale, bias)
    fields = {"num_splits": 2, "shared_affine": shared}
    layer, plain = bnjax.linen.SplitBatchNorm(**fields), bnjax.BatchNorm()
    fresh = layer.init(jax.random.key(0), x, True)
    variables = {**fresh, "params": {"scale": scale, "bias": bias}}
    shapes = jax.tree.map(jnp.shape, fresh)
    assert shapes == jax.tree.map(jnp.shape, variables)
    y, updates = layer.apply(variables, x, False, mutable=["batch_stats"])
    moved = {**variables, **updates}
    for d, own in enumerate((slice(0, 6), slice(6, 12))):
        alone = {
            "params": {"scale": scale, "bias": bias},
            "batch_stats": jax.tree.map(lambda v, d=d: v[d], fresh["batch_stats"]),
        }
        if not shared:
            alone["params"] = {"scale": scale[d], "bias": bias[d]}
        expected, new = plain.apply(alone, x[own], False, mutable=["batch_stats"])
        assert_close(y[own], np.asarray(expected), tol=2e-6)
        stats = jax.tree.map(lambda v, d=d: v[d], updates["batch_stats"])
        assert_trees_close(stats, new["batch_stats"])
        inferred = plain.apply({**alone, **new}, x, True)
        assert_close(layer.apply(moved, x, True, domain=d), inferred, tol=2e-6)
        if d == 0:
            assert_close(layer.apply(moved, x, True), inferred, tol=2e-6)
    mixed = layer.apply(moved, x, True, domain=DOMAIN // 2)
    for d in range(2):
        own = DOMAIN // 2 == d
        each = layer.apply(moved, x[own], True, domain=d)
        assert_close(mixed[own], np.asarray(each), tol=2e-6)


def test_measures_by_domain_while_it_infers():
    """update_stats=True in evaluation: the parts are counted as in training."""
    x, *_ = case()
    layer = bnjax.nnx.SplitBatchNorm(4, num_splits=2, momentum=0.0, rngs=nnx.Rngs(0))
    y = layer(x, True, update_stats=True)
    assert_close(y, x / np.sqrt(1 + 1e-5))
    for d, own in enumerate((x[:6], x[6:])):
        assert_close(layer.mean[d], own.mean(AXES))
        assert_close(layer.var[d], own.var(AXES), tol=2e-6)


# ---- many devices ----


def test_each_domain_is_merged_over_the_replicas():
    """Also where a domain lies on some of them alone, and within groups of them."""
    x, scale, bias, _ = case()
    domain = np.where(np.arange(12) < 3, 2, 0)
    groups = [[0, 3], [1, 2]]

    def f(x, domain, groups=None):
        options = {"axis_name": "data", "axis_index_groups": groups}
        return split_batch_norm(x, scale, bias, num_splits=3, domain=domain, **options)

    arrays = x.reshape(4, 3, 5, 4), domain.reshape(4, 3)
    y, moments = jax.jit(jax.vmap(f, axis_name="data"))(*arrays)
    expected = oracle.split_batch_norm(x, scale, bias, domain)
    assert_close(y.reshape(SHAPE), expected, tol=5e-6)
    whole = split_moments(x, num_splits=3, domain=domain)
    for replica in range(4):
        found = jax.tree.map(lambda v: v[replica], moments)  # noqa: B023
        assert_trees_close(found, whole, tol=5e-6)
    within = functools.partial(f, groups=groups)
    y, _ = jax.jit(jax.vmap(within, axis_name="data"))(*arrays)
    for members in groups:
        rows = np.concatenate([np.arange(3 * i, 3 * i + 3) for i in members])
        expected = oracle.split_batch_norm(x[rows], scale, bias, domain[rows])
        assert_close(np.asarray(y).reshape(SHAPE)[rows], expected, tol=5e-6)


@covering(
    strength=1,
    how=["parts", "by example", "one"],
    kind=[AxisType.Explicit, AxisType.Auto],
)
def test_the_batch_is_never_gathered(kind, how):
    """One collective forward and one backward, but two for parts that Auto axes cut.

    Of a domain that is known as well as of one that lies by its examples.
    """
    x, scale, bias, _ = case()
    x = np.concatenate([x, x])[:16]
    domain = {"parts": None, "by example": np.arange(16) % 3, "one": 1}[how]
    splits = 2 if how == "parts" else 3
    scale, bias = scale[:splits], bias[:splits]
    placed = jax.device_put(x, NamedSharding(mesh(kind), P("data")))

    def f(x):
        return split_batch_norm(x, scale, bias, num_splits=splits, domain=domain)[0]

    def both(x):
        y, vjp = jax.vjp(f, x)
        return y, vjp(y)

    cut = how == "parts" and kind == AxisType.Auto
    assert collectives(f, placed) == {"all-reduce": 1 + cut}
    if not cut:
        assert collectives(both, placed) == {"all-reduce": 2}
    by_example = np.broadcast_to(
        np.repeat([0, 1], 8) if how == "parts" else domain, (16,)
    )
    expected = oracle.split_batch_norm(x, scale, bias, by_example)
    assert_close(jax.jit(f)(placed), expected, tol=5e-6)


# ---- messages ----

X = np.ones((12, 5, 4), np.float32)
MESSAGES = {
    "no domains": (
        {"num_splits": 0},
        ValueError,
        "num_splits=0: expected a positive integer, the number of domains. Write",
    ),
    "a fraction of a domain": ({"num_splits": 2.0}, ValueError, "num_splits=2.0: exp"),
    "parts": (
        {"num_splits": 5},
        ValueError,
        "a batch of 12 (axis 0 of (12, 5, 4)) does not fall into 5 equal parts: "
        "expected a multiple of num_splits=5. Or name each example's domain: "
        "domain=jnp.array([...]) of shape (12,).",
    ),
    "shape": (
        {"domain": np.zeros((12, 1), int)},
        ValueError,
        "domain has shape (12, 1): expected () for the whole batch, or (12,) for one "
        "domain per example of axis 0. Write domain=0, or domain.reshape(-1).",
    ),
    "a domain for each position": (
        {"domain": np.zeros(5, int)},
        ValueError,
        "domain has shape (5,)",
    ),
    "floats": (
        {"domain": np.ones(12)},
        TypeError,
        "domain has dtype float32: expected integers from 0 to 1. Write",
    ),
    "booleans": ({"domain": np.ones(12, bool)}, TypeError, "domain has dtype bool"),
    "a domain too many": (
        {"domain": [0, 1, 7, 2] * 3},
        ValueError,
        "domain holds [2, 7], but there are 2 domains: expected integers from 0 to 1. "
        "Raise num_splits, or map the new domain to one that has statistics.",
    ),
    "below zero": ({"domain": -1}, ValueError, "domain holds [-1], but there are 2"),
    "scale": (
        {"scale": np.ones((3, 4))},
        ValueError,
        "scale has shape (3, 4): expected (4,), shared by all domains, or (2, 4), a "
        "row for each. Write jnp.stack([scale] * 2).",
    ),
    "fallback": (
        {"fallback": (np.ones((2, 4)), np.ones(5))},
        ValueError,
        "var has shape (5,): expected (4,), shared",
    ),
    "no batch axis": (
        {"axis": (0, 1, 2)},
        ValueError,
        "axis=(0, 1, 2) names every axis of the input of shape (12, 5, 4)",
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_message(name):
    options, error, message = MESSAGES[name]
    with pytest.raises(error, match=re.escape(message)):
        split_batch_norm(X, **{"num_splits": 2, **options})


def test_messages_of_inference():
    stats = np.ones((2, 4), np.float32)
    with pytest.raises(ValueError, match=re.escape("domain holds [2], but there are")):
        split_normalize(X, stats, stats, domain=2)
    with pytest.raises(ValueError, match=re.escape("var has shape (3, 4): expected")):
        split_normalize(X, stats, np.ones((3, 4)))
    layer = bnjax.nnx.SplitBatchNorm(4, num_splits=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=re.escape("domain holds [5], but there are")):
        layer(X, True, domain=5)


def test_one_value_per_part_warns():
    with pytest.warns(bnjax.BatchNormWarning, match="one value per feature"):
        split_batch_norm(np.ones((3, 4), np.float32), num_splits=3)


# ---- narrow dtypes: as many domains as asked for, not as the dtype can number ----


@covering(
    strength=1,
    counted=[
        ("int4", 20),
        ("uint4", 20),
        ("int8", 300),
        ("uint8", 300),
        ("uint8", 256),
        ("uint16", 66_000),
    ],
    how=["by example", "traced", "whole batch", "given"],
)
def test_more_domains_than_the_dtype_of_domain_counts(counted, how):
    """An index of the rows in that dtype would begin again at 0."""
    dtype, splits = counted
    x = np.array([[0.0, 3.0], [2.0, 4.0], [5.0, 1.0], [9.0, 1.0]], np.float32)
    named = np.array([0, 3, 3, 0])
    domain = jnp.asarray(named, dtype)
    f = functools.partial(split_batch_norm, x, num_splits=splits)
    if how == "given":
        mean = np.arange(2 * splits, dtype=np.float32).reshape(splits, 2)
        y = split_normalize(x, mean, np.ones_like(mean), domain=domain, epsilon=0.0)
        return assert_close(y, x - mean[named])
    if how == "whole batch":
        named, domain = np.full(4, 3), domain[1]
    run = jax.jit(lambda d: f(domain=d)) if how == "traced" else lambda d: f(domain=d)
    y, moments = jax.tree.map(np.asarray, run(domain))
    for d in range(min(splits, 300)):
        own = x[named == d]
        assert moments.count[d] == len(own), d
        assert_close(moments.mean[d], own.mean(0) if len(own) else np.zeros(2))
    assert moments.count.sum() == 4
    expected = oracle.split_batch_norm(x, np.ones((4, 2)), np.zeros((4, 2)), named)
    return assert_close(y, expected, tol=2e-6)

"""Sample weights: how often a value counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import (
    assert_close,
    assert_trees_close,
    by_default,
    collectives,
    covering,
    residual_bytes,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from registry import ENTRIES, POSITIONS
from test_contracts import assert_same_bits, in_mode, loss_of, mask_of, placed_in
from test_contracts import weights as loss_weights
from test_sharded import mesh

import bnjax
from bnjax import Moments, ghost, population, running, training

SHAPE = (16, 4, 5, 3)
AXES = (0, 1, 2)
IMPLEMENTATIONS = ["xla", "reread", "subsample"]
WHERE = {
    "example": (16, 1, 1, 1),
    "position": (16, 4, 5, 1),
    "feature": SHAPE,
    "of the features alone": (1, 1, 1, 3),
}


def x_of(shape=SHAPE, seed=0, offset=1.0):
    return np.random.default_rng(seed).normal(size=shape) * 2 + offset


def weights_of(shape, seed=1, zeros=0.2):
    """Some are 0, unless there is but a weight for each feature."""
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.2, 3, shape)
    return weights * (rng.random(shape) > zeros) if np.prod(shape) > 3 else weights


def weighted(x, weights, axes=AXES):
    """(count, mean, m2), straight from the definition, in float64."""
    x, w = np.asarray(x, np.float64), np.broadcast_to(weights, x.shape)
    count = w.sum(axes, dtype=np.float64)
    mean = (w * x).sum(axes) / count
    return count, mean, (w * (x - np.expand_dims(mean, axes)) ** 2).sum(axes)


def repeated(x, weights):
    """(count, mean, m2) of each value as often as its weight says."""
    times = np.broadcast_to(weights, x.shape).reshape(-1, x.shape[-1]).astype(int)
    rows = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    each = [np.repeat(rows[:, c], times[:, c]) for c in range(x.shape[-1])]
    columns = [oracle.moments(v, (0,)) for v in each]
    return tuple(np.array(v) for v in zip(*columns, strict=True))


def assert_moments(found, expected, tol=2e-6):
    count = np.broadcast_to(found.count, np.shape(expected[0]))
    np.testing.assert_allclose(count, expected[0], rtol=1e-6)
    assert_close(found.mean, expected[1], tol=tol)
    np.testing.assert_allclose(found.m2, expected[2], rtol=1e-5)


# ---- values ----


@covering(strength=1, where=WHERE, dtype=[np.float32, jnp.bfloat16])
def test_a_weight_is_how_often_a_value_is_there(where, dtype):
    """Also in the unbiased variance."""
    x = x_of().astype(dtype)
    weights = np.random.default_rng(2).integers(where.startswith("of"), 4, WHERE[where])
    expected = repeated(x, weights)
    count, mean, m2 = expected
    y, found = bnjax.batch_norm(x, weights=weights.astype(np.float32))
    assert_moments(found, expected)
    assert found.mean.dtype == found.m2.dtype == found.count.dtype == np.float32
    np.testing.assert_allclose(found.variance(ddof=1), m2 / (count - 1), rtol=1e-5)
    exact = oracle.normalize(x, mean, m2 / count, np.ones(3), np.zeros(3), AXES)
    assert_close(y, exact, dtype=dtype, tol=2e-6 if dtype == np.float32 else 4e-3)
    assert_moments(bnjax.moments(x, weights=weights.astype(x.dtype)), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [1e-6, 0.003, 1.0, 1e6])
def test_fractions_and_sums_below_one(scale, implementation):
    """At |mean|/std = 1e4; the normalization does not depend on the scale."""
    x = x_of(offset=2e4).astype(np.float32)
    weights = (weights_of((16, 4, 1, 1)) * scale).astype(np.float32)
    y, found = bnjax.batch_norm(x, weights=weights, implementation=implementation)
    count, mean, m2 = expected = weighted(x, weights)
    assert_moments(found, expected, tol=1e-7)
    np.testing.assert_allclose(found.variance(), m2 / count, rtol=1e-5)
    exact = oracle.normalize(x, mean, m2 / count, np.ones(3), np.zeros(3), AXES)
    assert_close(y, exact, tol=2e-3)  # the mean is rounded, at 1e4 deviations
    unbiased = m2 / (count - 1) if (count > 1).all() else np.zeros(3)
    np.testing.assert_allclose(found.variance(ddof=1), unbiased, rtol=1e-5)


def test_complex_values():
    x = (x_of() + 1j * x_of(seed=3)).astype(np.complex64)
    weights = weights_of((16, 4, 5, 1)).astype(np.float32)
    found = bnjax.moments(x, weights=weights)
    real, imag = weighted(x.real, weights), weighted(x.imag, weights)
    assert_moments(
        found, (real[0], real[1] + 1j * imag[1], real[2] + imag[2]), tol=2e-6
    )


def test_weights_and_a_mask():
    """Each with axes that the other lacks; under False the weight does not matter."""
    x = x_of().astype(np.float32)
    mask = np.random.default_rng(4).random((16, 1, 1, 3)) < 0.7
    weights = weights_of((1, 4, 5, 1)).astype(np.float32)
    both = np.where(mask, weights, 0)
    found = bnjax.moments(np.where(mask, x, np.nan), mask=mask, weights=weights)
    assert_moments(found, weighted(x, both))


def test_vmap_over_weights():
    x = np.stack([x_of(seed=s) for s in range(3)]).astype(np.float32)
    weights = np.stack([weights_of((16, 1, 1, 1), s) for s in range(3)])
    f = functools.partial(bnjax.batch_norm, implementation="reread")
    _, found = jax.vmap(lambda x, w: f(x, weights=w))(x, weights)
    _, shared = jax.vmap(lambda w: f(x[0], weights=w))(weights)
    for i in range(3):
        own = (Moments(*(v[i] for v in each)) for each in (found, shared))
        for each, values in zip(own, (x[i], x[0]), strict=True):
            assert_moments(each, weighted(values, weights[i]))


def run(entry, variables, x, mask=None, weights=None, train=True, extra=None, **fields):
    """y, and the running statistics after the call."""
    extra = entry.extra() if extra is None else extra
    y, updates = entry.linen(**fields).apply(
        variables,
        x,
        not train,
        mask=mask,
        weights=weights,
        **extra,
        mutable=["batch_stats"],
    )
    return y, updates["batch_stats"]


@by_default("batch norm", "decorrelated", name=ENTRIES)
def test_ones_and_zeros_are_a_mask(name):
    """NaN under a weight of 0 changes nothing, and makes no gradient NaN."""
    entry = ENTRIES[name]
    variables, x = entry.variables(), entry.x()
    mask = mask_of(entry, "position")
    garbage = np.where(mask, x, np.nan).astype(np.float32)
    garbage[3:5] = np.where(mask[3:5], x[3:5], 1e30)

    def results(x, mask, weights):
        def f(params, x, weights):
            return run(entry, {**variables, "params": params}, x, mask, weights)

        loss = loss_of(lambda v, x: f(v, x, weights), loss_weights(entry))
        return jax.grad(loss, (0, 1), has_aux=True)(variables["params"], x)

    def by_weights(params, x, weights):
        y, stats = run(entry, {**variables, "params": params}, x, None, weights)
        return jnp.sum(jnp.sin(y) * loss_weights(entry)), (y, stats)

    @jax.jit
    def both(x, mask):
        zeros_and_ones = mask.astype(x.dtype)
        gradient = jax.grad(by_weights, (0, 1, 2), has_aux=True)
        (params, dx, dw), aux = gradient(variables["params"], x, zeros_and_ones)
        return ((params, dx), aux), dw, results(x, mask, None)

    ours, dw, expected = both(garbage, mask)
    assert_trees_close(ours, jax.tree.map(np.asarray, expected), tol=5e-6)
    assert np.isfinite(dw).all()
    assert np.abs(dw).max() > 1e-3
    ones = run(entry, variables, x, weights=np.ones((1, 1, 1), np.float32))
    plain = jax.tree.map(np.asarray, run(entry, variables, x))
    assert_trees_close(ones, plain, tol=5e-6)


# ---- derivatives ----


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.full), True])
@by_default("batch norm", "split by example", "decorrelated", name=ENTRIES)
def test_equals_its_formula(name, masked):
    """Values, statistics, gradients, tangents and products with the Hessian.

    By the parameters, x and the weights, those that are 0 as well.
    """
    entry = ENTRIES[name]
    variables, x = entry.variables(dtype=np.float64), entry.x(dtype=np.float64)
    mask = mask_of(entry, "position") if masked else None
    shape = entry.shape if entry.masks_features else (*entry.shape[:2], 1)
    weights = weights_of(shape, zeros=0.1)
    primals = variables["params"], x, weights
    rng = np.random.default_rng(5)
    along = jax.tree.map(lambda v: rng.normal(size=v.shape), primals)

    def results(f):
        def loss(params, x, weights):
            y, stats = f({**variables, "params": params}, x, weights)
            by_stats = sum(jnp.sum(jnp.sin(v)) for v in jax.tree.leaves(stats))
            return jnp.sum(jnp.sin(y) * loss_weights(entry)) + by_stats, (y, stats)

        gradient = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
        return jax.jvp(gradient, primals, along)

    ours = jax.jit(lambda: results(lambda v, x, w: run(entry, v, x, mask, w)))()
    plain = jax.jit(
        lambda: results(lambda v, x, w: entry.plain(v, x, mask, weights=w))
    )()
    assert_trees_close(ours, jax.tree.map(np.asarray, plain), tol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("by", ["weights", "both"])
def test_finite_differences(by):
    """Of y and of all the Moments; by the weights alone, and by x as well."""
    x, w = x_of((6, 4, 3)), weights_of((6, 4, 1), zeros=0) / 50  # the sum is below 1
    dy = np.cos(np.arange(x.size)).reshape(x.shape)

    def f(x, w):
        y, (count, mean, m2) = bnjax.batch_norm(x, weights=w, activation=jnp.sin)
        return (y * dy).sum() + count**2 + (mean**3).sum() + jnp.sqrt(m2).sum()

    args = (w,) if by == "weights" else (x, w)
    g = functools.partial(f, x) if by == "weights" else f
    check_grads(jax.jit(g), args, order=1, modes=("fwd", "rev"), eps=1e-5)


def test_what_is_stored_for_the_backward_pass():
    """The weights as they are given, not one for each value."""
    x = jnp.asarray(x_of((16, 8, 8, 32)), jnp.bfloat16)
    w = jnp.asarray(weights_of((16, 1, 1, 1)), jnp.float32)

    def f(x, w):
        return bnjax.batch_norm(x, weights=w, dtype=x.dtype, activation=jax.nn.relu)[0]

    assert residual_bytes(f, x, w) < 1.05 * x.nbytes


# ---- replicas ----

MODES = ["typed", "untyped", "pmap", "vmap", "Auto", "Explicit"]
OFTEN = {("batch norm", "vmap"), ("ghost", "typed"), ("decorrelated", "Explicit")}
PLACED = [
    pytest.param(
        name,
        mode,
        marks=[] if (name, mode) in OFTEN else pytest.mark.full,
    )
    for name, entry in ENTRIES.items()
    for mode in MODES
    if entry.aligned or mode != "Explicit"
]


def uneven(entry):
    """Replicas whose weights differ in sum; one has none but zeros."""
    weights = weights_of((entry.batch, POSITIONS, 1)) * np.arange(entry.batch)[
        :, None, None
    ].clip(1)
    local = entry.batch // 8
    weights[2 * local : 3 * local] = 0
    return weights


@functools.cache
def concatenated(name, replicas):
    """Gradients, output and statistics of one device, by the formula in float64."""
    entry = ENTRIES[name]
    with jax.enable_x64(True):
        variables = entry.variables(dtype=np.float64)

        def loss(x, weights):
            y, stats = entry.plain(variables, x, None, replicas, weights)
            return jnp.sum(jnp.sin(y) * loss_weights(entry)), (y, stats)

        gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
        result = gradient(entry.x(dtype=np.float64), uneven(entry))
        return jax.tree.map(np.asarray, result)


@pytest.mark.parametrize(("name", "mode"), PLACED)
def test_replicas_equal_one_device(name, mode):
    """The gradients by x and by the weights, of sums that differ, and are 0."""
    entry = ENTRIES[name]
    variables, named = entry.variables(), None if mode in MODES[4:] else "data"
    extra = entry.extra()
    split = {n: v for n, v in extra.items() if np.ndim(v)}
    shared = {n: v for n, v in extra.items() if not np.ndim(v)}

    def f(x, dy, weights, split):
        def loss(x, weights):
            own = {**split, **shared}
            y, stats = run(
                entry, variables, x, None, weights, extra=own, axis_name=named
            )
            return jnp.sum(jnp.sin(y) * dy), (y, stats)

        (dx, dw), (y, stats) = jax.grad(loss, (0, 1), has_aux=True)(x, weights)
        return jax.tree.map(lambda v: v[None], stats), dx, dw, y

    arrays = [entry.x(), loss_weights(entry), uneven(entry)]
    arrays = [v.astype(np.float32) for v in arrays]
    if mode in ("pmap", "vmap"):
        cut = functools.partial(jax.tree.map, lambda v: v.reshape(8, -1, *v.shape[1:]))
        replicate = jax.pmap if mode == "pmap" else jax.vmap
        found = jax.jit(replicate(f, axis_name="data"))(*cut((*arrays, split)))
    else:
        found = jax.jit(in_mode(mode, f))(*placed_in(mode, arrays, split))
    stats, *found = jax.tree.map(np.asarray, found)
    (dx, dw), (y, expected) = concatenated(name, 8 if named else 1)
    for got, leaf in zip(*map(jax.tree.leaves, (stats, expected)), strict=True):
        for each in got.reshape(-1, *leaf.shape):
            assert_close(each, leaf, tol=1e-5)
    for got, leaf in zip(found, (dx, dw, y), strict=True):
        assert_close(got.reshape(leaf.shape), leaf, tol=3e-5)


@covering(strength=1, masked=[False, True], where=["position", "feature"])
def test_explicit_axes_along_which_only_x_is_split(where, masked):
    """Batch and features; the gradient is split as the weights are: not at all."""
    x, weights = x_of().astype(np.float32), weights_of(WHERE[where]).astype(np.float32)
    x = np.concatenate([x, 2 * x], -1)
    weights = np.concatenate([weights] * 2, -1) if where == "feature" else weights
    mask = np.random.default_rng(4).random((16, 1, 1, 1)) < 0.7 if masked else None

    def f(x, weights):
        y, m = bnjax.batch_norm(x, mask=mask, weights=weights)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sqrt(m.m2)), (y, m)

    gradient = jax.jit(jax.grad(f, (0, 1), has_aux=True))
    expected = jax.tree.map(np.asarray, gradient(x, weights))
    two = mesh(AxisType.Explicit, data=4, model=2)
    with jax.set_mesh(two):
        split = NamedSharding(two, P("data", None, None, "model"))
        found = gradient(jax.device_put(x, split), weights)
    assert_trees_close(found, expected, tol=1e-5)


@pytest.mark.parametrize(
    "mode", [*(pytest.param(m, marks=pytest.mark.full) for m in MODES[:2]), "vmap"]
)
def test_uneven_groups(mode):
    """Also the gradient by the weights; one group has no weight at all."""
    groups = [[0, 5, 7], [1], [2, 3, 4, 6]]
    x, dy = x_of(), x_of(seed=7)
    weights = weights_of((16, 4, 1, 1))
    weights[2:4] = 0
    arrays = [v.astype(np.float32) for v in (x, dy, weights)]

    def f(x, dy, weights):
        def loss(weights):
            y, m = bnjax.batch_norm(
                x, weights=weights, axis_name="data", axis_index_groups=groups
            )
            return jnp.sum(y * dy), (y, m)

        dw, (y, m) = jax.grad(loss, has_aux=True)(weights)
        return dw, y, jax.tree.map(lambda v: v[None], m)

    if mode == "vmap":
        cut = [v.reshape(8, 2, *v.shape[1:]) for v in arrays]
        dw, y, m = jax.jit(jax.vmap(f, axis_name="data"))(*cut)
        dw, y = dw.reshape(weights.shape), y.reshape(x.shape)
        m = jax.tree.map(lambda v: v[:, 0], m)
    else:
        shared = functools.partial(
            jax.shard_map, mesh=mesh(), check_vma=mode == "typed"
        )
        split = shared(f, in_specs=P("data"), out_specs=P("data"))
        dw, y, m = jax.jit(split)(*arrays)
    for group in groups:
        rows = np.concatenate([[2 * i, 2 * i + 1] for i in group])
        own, times = jnp.asarray(arrays[0][rows]), jnp.asarray(arrays[2][rows])

        def loss(times, own=own, rows=rows):
            y, _ = bnjax.batch_norm(own, weights=times)
            return jnp.sum(y * arrays[1][rows]), y

        expected, expected_y = jax.jit(jax.grad(loss, has_aux=True))(times)
        assert_close(np.asarray(dw)[rows], np.asarray(expected), tol=2e-5)
        assert_close(np.asarray(y)[rows], np.asarray(expected_y), tol=5e-6)
        if times.any():
            for i in group:
                one = jax.tree.map(lambda v, i=i: v[i], m)
                assert_moments(one, weighted(own, times), tol=5e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mode", ["typed", "vmap"])
def test_ghost_groups_of_several_replicas(mode):
    """Two replicas a group, as on one device; one group has no weight at all."""
    x, dy = x_of(), x_of(seed=7)
    weights = weights_of((16, 4, 1, 1))
    weights[4:8] = 0
    fallback = np.array([0.5, 1, 2]), np.array([2.0, 1, 4])

    def loss(x, weights, dy, axis_name=None):
        y, m = ghost.ghost_batch_norm(
            x,
            virtual_batch_size=4,
            weights=weights,
            fallback=fallback,
            axis_name=axis_name,
        )
        if axis_name is None:  # of the pool at once, for the derivative where w = 0
            m = bnjax.moments(x, weights=weights)
        pooled = (m.mean + m.m2).sum() / (1 if axis_name is None else 8)
        return jnp.sum(y * dy) + pooled, (y, m)

    def f(x, weights, dy):
        run = functools.partial(loss, axis_name="data")
        (dx, dw), (y, m) = jax.grad(run, (0, 1), has_aux=True)(x, weights, dy)
        return dx, dw, y, jax.tree.map(lambda v: v[None], m)

    arrays = [jnp.asarray(v) for v in (x, weights, dy)]
    (dx, dw), (y, m) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(*arrays)
    if mode == "vmap":
        cut = [v.reshape(8, 2, *v.shape[1:]) for v in arrays]
        found = jax.jit(jax.vmap(f, axis_name="data"))(*cut)
        *found, moments = found
        moments = jax.tree.map(lambda v: v[:, 0], moments)
        found = [v.reshape(a.shape) for v, a in zip(found, (x, weights, y))]
    else:
        split = jax.shard_map(f, mesh=mesh(), in_specs=P("data"), out_specs=P("data"))
        *found, moments = jax.jit(split)(*arrays)
    assert_trees_close(found, [np.asarray(v) for v in (dx, dw, y)], tol=1e-9)
    for replica in range(8):
        one = jax.tree.map(lambda v, i=replica: v[i], moments)
        assert_trees_close(one, jax.tree.map(np.asarray, m), tol=1e-9)


@pytest.mark.parametrize(
    "mode",
    [
        *("typed", "untyped", "Auto"),
        *(pytest.param(m, marks=pytest.mark.full) for m in ("pmap", "Explicit")),
    ],
)
def test_one_collective_forward_and_one_backward(mode):
    """Though the gradient by the weights is asked for."""
    named = None if mode in MODES[4:] else "data"
    arrays = [x_of(), x_of(seed=7), weights_of((16, 1, 1, 1))]
    arrays = [v.astype(np.float32) for v in arrays]

    def forward(x, dy, weights):
        return bnjax.batch_norm(x, weights=weights, axis_name=named)[0]

    def both(x, dy, weights):
        y, vjp = jax.vjp(lambda x, w: forward(x, dy, w), x, weights)
        return y, vjp(dy)

    def parallel(f):
        return jax.pmap(f, axis_name="data") if mode == "pmap" else in_mode(mode, f)

    if mode == "pmap":
        arrays = [v.reshape(8, 2, *v.shape[1:]) for v in arrays]
    else:
        arrays = placed_in(mode, tuple(arrays), {})[:3]
    assert collectives(parallel(forward), *arrays) == {"all-reduce": 1}
    assert collectives(parallel(both), *arrays) == {"all-reduce": 2}


# ---- running and pooled statistics ----


@pytest.mark.parametrize("ddof", [0, 1])
def test_no_update_without_an_estimate(ddof):
    """The sum of the weights is to be above 0; above 1 for the unbiased variance."""
    x = x_of((6, 4, 3)).astype(np.float32)
    rule = running.ema(0.9, ddof=ddof)
    start = rule.init((3,))
    for total, moves in ((0.0, False), (0.5, not ddof), (1.5, True)):
        weights = np.full((6, 4, 1), total / 24, np.float32)
        state = rule.update(start, bnjax.moments(x, weights=weights))
        assert (np.asarray(state.mean) != 0).all() == moves
        assert (np.asarray(state.var) != 1).all() == moves


@by_default("batch norm", "decorrelated", name=ENTRIES)
def test_weights_that_are_all_zero(name):
    """No update; normalized by the running statistics; no gradient is NaN."""
    entry = ENTRIES[name]
    variables, x = entry.variables(), entry.x()
    x[0] = np.nan
    zeros = np.zeros((entry.batch, 1, 1), np.float32)

    def f(params, x, weights):
        v = {**variables, "params": params}
        y, stats = run(entry, v, x, None, weights)
        return jnp.sum(jnp.sin(y)), (y, stats)

    gradient = jax.jit(jax.grad(f, (0, 1, 2), has_aux=True))
    grads, (y, stats) = gradient(variables["params"], x, zeros)
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(grads))
    assert_same_bits(stats, variables["batch_stats"])
    expected, _ = entry.plain(variables, x, weights=zeros)
    assert_close(y, np.asarray(expected), tol=2e-6)


@by_default("batch norm", "split by example", name=ENTRIES)
def test_linen_equals_nnx_to_the_bit(name):
    entry = ENTRIES[name]
    variables, x = entry.variables(), entry.x()
    linen, ours = entry.linen(), entry.nnx()
    for tree in variables.values():
        for key, leaf in tree.items():
            getattr(ours, key).set_value(leaf)
    options = {"weights": uneven(entry).astype(np.float32), **entry.extra()}
    y, updates = linen.apply(variables, x, False, **options, mutable=["batch_stats"])
    assert_same_bits(ours(x, False, **options), y)
    for key, leaf in updates["batch_stats"].items():
        assert_same_bits(getattr(ours, key).get_value(), leaf)
    kept = linen.apply(
        variables, x, True, **options, update_stats=True, mutable=["batch_stats"]
    )[1]  # measured, though not normalized by
    if entry.layer != "SplitBatchNorm":  # which infers by one domain
        assert_trees_close(kept, jax.tree.map(np.asarray, updates), tol=5e-6)


def batches():
    """Four of them, and weights whose sums differ: 0.4 of the first and the second."""
    x = [x_of((6, 4, 3), seed, offset=seed) for seed in range(4)]
    weights = [weights_of((6, 4, 1), seed) for seed in range(4)]
    weights[:2] = (0.4 * w / w.sum() for w in weights[:2])
    return [
        (a.astype(np.float32), b.astype(np.float32))
        for a, b in zip(x, weights, strict=True)
    ]


def joined():
    x, weights = (np.concatenate(v) for v in zip(*batches(), strict=True))
    return weighted(x, weights, (0, 1))


LAYER = bnjax.BatchNorm(use_running_average=False, momentum=0.9)
VARIABLES = {"batch_stats": {"mean": jnp.zeros(3), "var": jnp.ones(3)}}
VARIABLES["params"] = {"scale": jnp.ones(3), "bias": jnp.zeros(3)}


def collect(variables, batch):
    x, weights = batch
    mutable = ["batch_stats", "batch_moments"]
    return LAYER.apply(variables, x, weights=weights, mutable=mutable)


def test_merged_moments():
    each = [bnjax.moments(x, weights=w) for x, w in batches()]
    assert_moments(bnjax.merge(Moments.empty((3,)), *each), joined())
    assert_moments(bnjax.merge(*each[::-1]), joined())


def test_pooled_population_statistics():
    count, mean, m2 = joined()
    found = population.pooled(collect, VARIABLES, batches())
    assert_close(found["mean"], mean, tol=2e-6)
    assert_close(found["var"], m2 / count, tol=2e-6)


def test_algorithm_2():
    """A batch whose weights sum to 1 or less has no unbiased variance."""
    each = [weighted(x, w, (0, 1)) for x, w in batches()[2:]]
    found = population.algorithm_2(collect, VARIABLES, batches())
    assert_close(found["mean"], np.mean([m for _, m, _ in each], 0), tol=2e-6)
    var = np.mean([m2 / (n - 1) for n, _, m2 in each], 0)
    assert_close(found["var"], var, tol=2e-6)


def test_accumulated_micro_batches():
    """One running update, by the moments of all of them."""
    stacked = tuple(np.stack(v) for v in zip(*batches(), strict=True))

    def loss(variables, batch):
        y, updates = collect(variables, batch)
        return jnp.sum(y), updates

    found = training.accumulate(loss, VARIABLES, stacked, rule=running.ema(0.9))
    count, mean, m2 = joined()
    assert_close(found.batch_stats["mean"], 0.1 * mean, tol=5e-6)
    assert_close(found.batch_stats["var"], 0.9 + 0.1 * m2 / count, tol=5e-6)


def test_one_value_is_warned_of():
    x, weights = np.ones((1, 3), np.float32), np.full((1, 1), 2.0, np.float32)
    with pytest.warns(bnjax.BatchNormWarning, match="one value per feature"):
        bnjax.batch_norm(x, weights=weights)

"""Moments: values, merge laws, accuracy, masks, replicas."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import assert_close, assert_trees_close, covering, poison
from hypothesis import given, settings
from hypothesis import strategies as st

import bnjax
from bnjax import Moments
from bnjax.moments import _batch

SHAPE = (6, 4, 5, 3)


def data(shape=SHAPE, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * 2 + 1
    if np.issubdtype(dtype, np.complexfloating):
        x = x + 1j * rng.normal(size=shape)
    return x.astype(dtype)


def complement(axis, ndim):
    axis = (axis,) if isinstance(axis, int) else axis
    return tuple(a for a in range(ndim) if a not in {b % ndim for b in axis})


def full(count, shape):
    """The oracle's count is per feature; one number where all agree is as good."""
    return np.broadcast_to(np.asarray(count), shape)


def check(actual: Moments, x, axes, mask=None, tol=None):
    count, mean, m2 = oracle.moments(x, axes, mask)
    np.testing.assert_array_equal(full(actual.count, mean.shape), count)
    assert_close(actual.mean, mean, tol=tol, what="mean")
    assert_close(actual.m2, m2, tol=tol, what="m2")


def test_worked_example():
    m = bnjax.moments(jnp.array([[4.0], [7.0], [5.0]]))
    assert_trees_close(
        m, Moments(np.array(3.0), np.array([16 / 3]), np.array([14 / 3]))
    )
    assert_close(m.variance(), np.array([14 / 9]))
    assert_close(m.variance(ddof=1), np.array([7 / 3]))
    merged = bnjax.merge(Moments(2.0, 5.5, 4.5), Moments(1.0, 5.0, 0.0))
    assert_trees_close(merged, Moments(*map(np.array, (3.0, 16 / 3, 14 / 3))))


@covering(
    strength=1,
    axis=[-1, 0, 1, 3, (1, 3), (-1, -3), (2, 0)],
    dtype=["float32", "bfloat16", "float16", "complex64"],
)
def test_values(axis, dtype):
    x = jnp.asarray(data(dtype=np.complex64 if dtype == "complex64" else np.float32))
    x = x.astype(dtype)
    m = jax.jit(lambda x: bnjax.moments(x, axis=axis))(x)
    check(
        m,
        np.asarray(x.astype(jnp.promote_types(x.dtype, jnp.float32))),
        complement(axis, 4),
    )
    assert m.mean.dtype == (jnp.complex64 if dtype == "complex64" else jnp.float32)
    assert m.m2.dtype == m.count.dtype == jnp.float32
    assert isinstance(m.count, jax.Array)
    assert m.count.shape == ()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_double_precision_is_kept(dtype):
    x = data(dtype=np.dtype(dtype))
    m = bnjax.moments(x)
    check(m, x, (0, 1, 2), tol=1e-13)
    assert m.mean.dtype == dtype
    assert m.m2.dtype == jnp.float64


MASKS = {
    "per example": (6, 1, 1, 1),
    "per position": (6, 4, 5, 1),
    "low rank": (5, 1),
    "per feature": (6, 4, 5, 3),
    "feature only": (3,),
    "constant over examples": (4, 5, 3),
}


@covering(
    mask_shape=MASKS.values(), garbage=[np.nan, np.inf, 1e30], axis=[-1, 1, (0, 3)]
)
def test_masked_values_change_nothing(mask_shape, garbage, axis):
    x = data()
    mask = np.random.default_rng(1).random(mask_shape) < 0.5
    m = jax.jit(lambda x: bnjax.moments(x, axis=axis, mask=mask))(
        poison(x, mask, garbage)
    )
    check(m, x, complement(axis, 4), mask)


def test_count_is_scalar_unless_the_mask_varies_by_feature():
    x = data()
    assert bnjax.moments(x, mask=np.ones((6, 1, 1, 1), bool)).count.shape == ()
    assert bnjax.moments(x, mask=np.ones(3, bool)).count.shape == (3,)
    two = bnjax.moments(x, axis=(1, 3), mask=np.ones((1, 4, 1, 1), bool))
    assert two.count.shape == (4, 3)


@functools.partial(jax.jit, static_argnames="implementation")
def batch_moments(x, mask=None, shift=None, implementation=None):
    """One program for each shape, whatever the values."""
    options = {"mask": mask, "shift": shift, "implementation": implementation}
    return bnjax.batch_norm(x, **options)[1]


def check_variance(x, mask=None, **options):
    """Within 1e-5, and the mean within its rounding."""
    axes = tuple(range(x.ndim - 1))
    count, mean, m2 = oracle.moments(np.where(np.isfinite(x), x, 0), axes, mask)
    m = batch_moments(x, mask, **options)
    np.testing.assert_allclose(m.variance(), m2 / count, rtol=1e-5)
    scale = np.abs(mean) + np.sqrt(m2 / count)
    assert (np.abs(m.mean - mean) / scale).max() < 3e-7


IMPLEMENTATIONS = (None, "xla", "reread", "subsample")


@covering(
    strength=1,
    implementation=IMPLEMENTATIONS,
    kind=["no example", "all masked", "a feature masked"],
)
def test_moments_of_nothing_do_not_know_the_shift(kind, implementation):
    x, mask = data()[0, 0], None
    if kind == "no example":
        x = x[:0]
    else:
        mask = np.broadcast_to(kind == "a feature masked", (5, 3)).copy()
        mask[:, 1] = False
    m = batch_moments(x, mask, np.float32([2, 5, -7]), implementation)
    check(m, x, (0,), mask)


@covering(
    strength=1,
    implementation=IMPLEMENTATIONS,
    shape=[(4096, 5), (64, 28, 28, 5), (300, 3), (9, 11, 2)],
)
def test_variance_at_large_mean(implementation, shape):
    """The first batch, without help of a running mean; outliers; garbage in a mask."""
    rng = np.random.default_rng(0)
    mask = rng.random((*shape[:-1], 1)) < 0.5
    mask[: shape[0] // 3] = False
    for ratio in (0.0, 1.0, 1e2, 1e3, 1e4, -1e2, -1e3, -1e4):
        x = (ratio + rng.normal(size=shape)).astype(np.float32)
        check_variance(x, implementation=implementation)
        for garbage in (np.nan, 1e30):
            poisoned = poison(x, mask, garbage)
            check_variance(poisoned, mask, implementation=implementation)
        x[: max(1, shape[0] // 50)] = 1e6
        check_variance(x, implementation=implementation)


def reread(x, **kwargs):
    return bnjax.batch_norm(x, implementation="reread", **kwargs)[1]


@pytest.mark.parametrize("ratio", [1.0, 2.9, 3.1, 8.0])
def test_plain_sums_are_used_where_they_are_exact_enough(ratio):
    """On either side of the limit, mean = 3 std; also with one feature beyond it."""
    noise = np.random.default_rng(0).normal(size=(64, 28, 28, 5)).astype(np.float32)
    for means in ([ratio] * 5, [0, 1, ratio, -ratio, 1e4]):
        x = noise + np.float32(means)
        _, mean, m2 = oracle.moments(x, (0, 1, 2))
        m = jax.jit(reread)(x)
        np.testing.assert_allclose(m.m2, m2, rtol=5e-6)
        np.testing.assert_allclose(m.mean, mean, rtol=3e-7, atol=3e-7)


def test_which_sums_are_used(monkeypatch):
    """Those about the shift for all features, or those about the mean for all."""
    x = np.random.default_rng(0).normal(size=(512, 3)).astype(np.float32)
    near, far = x + np.float32([2.8, -2.8, 0]), x + np.float32([0, 0, 3.3])

    def second_reads(x, shift=None):
        found, decide = [], _batch._centre_is_near_enough

        def recorded(*sums):
            jax.debug.callback(found.append, decide(*sums))
            return decide(*sums)

        monkeypatch.setattr(_batch, "_centre_is_near_enough", recorded)
        jax.clear_caches()
        bnjax.batch_norm(x, shift=shift, implementation="xla")
        jax.effects_barrier()
        monkeypatch.undo()
        jax.clear_caches()
        return not found[0]

    assert not second_reads(near)
    assert second_reads(far)
    assert not second_reads(far, shift=jnp.float32([0, 0, 3]))
    assert second_reads(near, shift=jnp.float32([0, 0, -4]))


@pytest.mark.parametrize("garbage", [5.0, np.nan])
@pytest.mark.parametrize("mask_shape", [(64, 1, 1), (64, 7, 1), (64, 7, 3)])
def test_plain_sums_of_what_a_mask_leaves(mask_shape, garbage):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 7, 3)).astype(np.float32)
    mask = rng.random(mask_shape) < 0.5
    count, mean, m2 = oracle.moments(x, (0, 1), mask)
    got = reread(poison(x, mask, garbage), mask=mask)
    assert_close(jnp.broadcast_to(got.count, 3), count)
    assert_close(got.mean, mean, tol=1e-6)
    assert_close(got.m2, m2, tol=2e-6)


def test_squares_that_overflow():
    x = np.random.default_rng(0).normal(size=(512, 3)) * 1e17 + 1e20
    x = x.astype(np.float32)
    m2 = oracle.moments(x.astype(np.float64) / 1e17, (0,))[2]
    near = np.float32(1e20) + np.float32(2e18)  # 20 std; its square is infinite
    for options in ({"implementation": "reread"}, {"implementation": "xla"}):
        for shift in (None, np.full(3, near)):
            m = batch_moments(x[:64], shift=shift, **options)
            variance = oracle.moments(x[:64].astype(np.float64) / 1e17, (0,))[2] / 64
            np.testing.assert_allclose(m.variance() / 1e34, variance, rtol=1e-5)
    m = jax.jit(reread)(x)
    np.testing.assert_allclose(m.variance() / 1e34, m2 / 512, rtol=1e-5)
    x[3, 1] = np.nan
    assert (np.isnan(reread(x).mean) == [False, True, False]).all()


def test_vmap_computes_one_side_of_the_condition():
    """A batch of conditions would compute both."""
    x = np.random.default_rng(0).normal(size=(4, 64, 7, 3)).astype(np.float32)
    text = jax.jit(jax.vmap(reread)).lower(x).as_text()
    assert text.count("stablehlo.case") == 1
    assert "stablehlo.select" not in text
    mask = np.random.default_rng(1).random((64, 7, 1)) < 0.5
    batched = jax.vmap(lambda x: reread(x, mask=mask))(x)
    for one, *got in zip(x, *batched, strict=True):
        _, mean, m2 = oracle.moments(one, (0, 1), mask)
        assert_close(got[1], mean, tol=2e-6)
        assert_close(got[2], m2, tol=2e-6)


@pytest.mark.parametrize("position", [0, 31, 32, 2047])
def test_one_huge_outlier_anywhere(position):
    """The subsample holds it, or not: its variance is that of the outlier."""
    x = np.random.default_rng(0).normal(size=(2048, 3)).astype(np.float32)
    x[position] = 1e8
    check(bnjax.moments(x), x, (0,), tol=1e-5)


def test_one_value_in_thirty_two_is_enough():
    """The bound of `_subsample_mean`, at its worst: the outliers are all in it."""
    x = np.random.default_rng(0).normal(size=(4096, 3)).astype(np.float32)
    x[::32] += 1e6
    check(bnjax.moments(x), x, (0,), tol=1e-5)


@pytest.mark.parametrize("every", [32, 1024])
def test_one_valid_value_in_thirty_two_is_enough(every):
    """The same under a mask, though the first valid value of many is an outlier."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4099, 3)).astype(np.float32)
    first = np.arange(5, 4099, every)
    mask = rng.random((4099, 1)) < 0.5
    mask[np.arange(4099) % every < 5] = False
    mask[first] = True
    x[first] += 1e6
    hidden = np.where(mask, x, 1e30)
    m = batch_moments(hidden, mask, None, "subsample")
    count, mean, m2 = oracle.moments(x, (0,), mask)
    assert (np.abs(m.mean - mean) < 1e-5 * np.sqrt(m2 / count)).all()
    assert_close(m.m2, m2, tol=1e-5)


def test_the_subsample_takes_the_largest_weights():
    x = np.random.default_rng(0).normal(size=(4099, 3)).astype(np.float32)
    weights = np.random.default_rng(1).uniform(0.5, 1, (4099, 1)).astype(np.float32)
    x[::32] += 1e6
    weights[::32] = 1e-6
    _, m = bnjax.batch_norm(x, weights=weights, implementation="subsample")
    mean = np.average(np.float64(x), 0, weights[:, 0])
    variance = np.average((x - mean) ** 2, 0, weights[:, 0])
    assert (np.abs(m.mean - mean) < 1e-5 * np.sqrt(variance)).all()
    assert_close(m.variance(), variance, tol=1e-5)


@pytest.mark.parametrize("shape", [(5, 3), (33, 3), (4, 70, 3), (2, 3, 41, 3)], ids=str)
def test_a_subsample_of_few_valid_values(shape):
    """Along axes of any size, the masked among them."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32) + np.float32(1e4)
    for _ in range(20):
        varies = rng.random(len(shape)) < 0.6
        mask = rng.random(np.where(varies, shape, 1)) < rng.choice([0.05, 0.5])
        axes = tuple(range(len(shape) - 1))
        hidden = np.where(mask, x, np.nan)
        m = batch_moments(hidden, mask, None, "subsample")
        _, mean, m2 = oracle.moments(np.where(mask, x, 0), axes, mask)
        assert_close(m.mean, mean, tol=1e-6)
        assert_close(m.m2, m2, tol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_variance_is_never_negative(implementation):
    """Of constants, whose sums about a shift cancel, give or take a rounding."""
    value = np.random.default_rng(0).uniform(0.1, 10, 64).astype(np.float32)
    x, shift = np.broadcast_to(value, (5003, 64)), value * np.float32(1 + 2e-5)
    m = batch_moments(x, None, shift, implementation)
    assert (m.m2 >= 0).all()
    assert (m.variance() < 1e-13 * value**2).all()


@pytest.mark.parametrize("shape", [(0, 3), (4, 0, 3)])
def test_no_values(shape):
    m = bnjax.moments(np.ones(shape, np.float32))
    assert_trees_close(m, Moments(np.array(0.0), np.zeros(3), np.zeros(3)))
    assert_close(m.variance(), np.zeros(3))
    assert_close(m.variance(ddof=1), np.zeros(3))


def test_one_value_has_variance_zero():
    m = bnjax.moments(jnp.array([[3.0, 4.0, 5.0]]))
    assert_trees_close(
        m, Moments(np.array(1.0), np.array([3.0, 4.0, 5.0]), np.zeros(3))
    )
    assert_close(m.variance(ddof=1), np.zeros(3))


def test_all_masked_is_the_identity():
    m = bnjax.moments(np.full((4, 3), np.nan, np.float32), mask=np.zeros((4, 1), bool))
    assert_trees_close(m, jax.tree.map(np.asarray, Moments.empty((3,))))


def test_empty_dtypes():
    m = Moments.empty((2, 3), jnp.complex64)
    assert m.mean.dtype == jnp.complex64
    assert m.m2.dtype == m.count.dtype == jnp.float32
    assert m.mean.shape == m.m2.shape == (2, 3)


def split_moments(x, sizes):
    parts = np.split(x, np.cumsum(sizes)[:-1])
    return [bnjax.moments(part) for part in parts]


@pytest.mark.parametrize(
    "sizes", [[64], [2, 2, 4, 8, 16, 32], [1] * 10 + [54], [0, 63, 1]]
)
@pytest.mark.parametrize("offset", [0, 1e4])
def test_merge_is_independent_of_the_split(sizes, offset):
    """What fvcore asserts of its precise batch norm, for any split."""
    x = data((64, 3)) + np.float32(offset)
    merged = bnjax.merge(*split_moments(x, sizes))
    # Each mean is rounded at 1e4, that is by 5e-4 of these standard deviations.
    check(merged, x, (0,), tol=1e-4 if offset else 1e-6)


parts = st.lists(st.integers(0, 9), min_size=3, max_size=3)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(sizes=parts, seed=st.integers(0, 9), offset=st.sampled_from([0.0, -3.0, 1e3]))
def test_merge_laws(sizes, seed, offset):
    x = data((sum(sizes), 3), seed) + np.float32(offset)
    a, b, c = split_moments(x, sizes)
    identity = Moments.empty((3,))
    for left, right in [
        (bnjax.merge(a, bnjax.merge(b, c)), bnjax.merge(bnjax.merge(a, b), c)),
        (bnjax.merge(a, b), bnjax.merge(b, a)),
    ]:
        assert_trees_close(
            left, jax.tree.map(np.asarray, right), tol=2e-5
        )  # 1e3 offset
    for same in (bnjax.merge(a, identity), bnjax.merge(identity, a)):
        jax.tree.map(np.testing.assert_array_equal, same, a)


def test_merging_nothing_with_a_huge_mean_is_finite():
    huge = Moments(jnp.array(2.0), jnp.array([1e25]), jnp.array([1.0]))
    jax.tree.map(
        np.testing.assert_array_equal, bnjax.merge(Moments.empty((1,)), huge), huge
    )


def test_merge_with_counts_per_feature():
    x = data((10, 3))
    mask = np.random.default_rng(3).random((10, 3)) < 0.5
    merged = bnjax.merge(
        bnjax.moments(x[:4], mask=mask[:4]), bnjax.moments(x[4:], mask=mask[4:])
    )
    check(merged, x, (0,), mask)


def test_merge_of_complex_values():
    x = data((10, 3), dtype=np.complex64)
    check(bnjax.merge(bnjax.moments(x[:4]), bnjax.moments(x[4:])), x, (0,))


def test_moments_pass_through_jit_scan_and_vmap():
    x = data((7, 5, 3))

    def step(total, batch):
        return bnjax.merge(total, bnjax.moments(batch)), None

    total, _ = jax.jit(lambda x: jax.lax.scan(step, Moments.empty((3,)), x))(x)
    check(total, x, (0, 1))
    each = jax.vmap(bnjax.moments)(x)
    assert each.mean.shape == (7, 3)
    for i in range(7):
        check(jax.tree.map(lambda leaf, i=i: leaf[i], each), x[i], (0,))


def test_vmapped_counts_stay_with_their_batch():
    """The count's axes are the leading ones, also where a feature axis is as long."""
    x = data((3, 10, 3))
    mask = np.arange(10)[None, :, None] < np.array([3, 6, 10])[:, None, None]
    m = jax.vmap(lambda x, k: bnjax.moments(x, mask=k))(x, mask)
    assert m.count.shape == (3,)
    twice = bnjax.merge(m, m)
    for i, n in enumerate((3, 6, 10)):
        var = x[i, :n].astype(np.float64).var(0)
        assert_close(m.variance()[i], var)
        assert_close(twice.variance()[i], var)
    rule = bnjax.running.ema(0.0)
    assert_close(rule.update(rule.init((3, 3)), m).var, np.asarray(m.variance()))


@pytest.mark.parametrize("n", [3, 7, 60])
@pytest.mark.parametrize("replicas", [5, 64, 100])
def test_the_means_of_replicas_are_merged_exactly(replicas, n):
    """Needs the shift subtracted to be the shift added back, to the last bit."""
    rng = np.random.default_rng(0)
    x = rng.normal(1e4, 1, size=(replicas, n, 8)).astype(np.float32)
    f = jax.vmap(
        lambda x: bnjax.moments(x, axis_name="i"), axis_name="i", out_axes=None
    )
    _, _, m2 = oracle.moments(x, (0, 1))
    np.testing.assert_allclose(jax.jit(f)(x).m2, m2, rtol=5e-6)


@pytest.mark.parametrize("replicas", [8, 72])
def test_vmap_axis_name(replicas):
    x = data((replicas, 5, 3)) + np.float32(1e4)
    mask = np.random.default_rng(0).random((replicas, 5, 1)) < 0.6
    mask[2] = False
    m = jax.vmap(lambda x, k: bnjax.moments(x, mask=k, axis_name="i"), axis_name="i")(
        poison(x, mask), mask
    )
    for i in (0, 2, replicas - 1):
        check(jax.tree.map(lambda leaf, i=i: leaf[i], m), x, (0, 1), mask, tol=1e-5)


SHIFTS = {
    "near": lambda mean: mean + 0.3,
    "0": lambda mean: 0 * mean,
    "far": lambda mean: mean + 1e6,
    "very far": lambda mean: -1e30 + 0 * mean,
    "NaN": lambda mean: np.nan * mean,
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_any_shift_is_right(implementation):
    """A running mean that is near, at its start, from another task, or diverged."""
    noise = np.random.default_rng(0).normal(size=(64, 9, 7, 3)) * [1, 1e-3, 1e3]
    mask = np.random.default_rng(1).random((64, 9, 7, 1)) < 0.7
    for ratio, shift in itertools.product((0.0, 30.0, 1e4), SHIFTS.values()):
        x = (noise + np.array([1, 1e-3, -1e3]) * ratio).astype(np.float32)
        guess = shift(oracle.moments(x, (0, 1, 2), mask)[1]).astype(np.float32)
        check_variance(
            poison(x, mask), mask, shift=guess, implementation=implementation
        )


def test_moments_take_a_shift():
    x = data() + np.float32(100)
    check(bnjax.moments(x, shift=np.full(3, 98.0, np.float32)), x, (0, 1, 2))
    with pytest.raises(ValueError, match="shift has shape"):
        bnjax.moments(x, shift=np.zeros(4))
    with pytest.raises(TypeError, match="shift has dtype complex64"):
        bnjax.moments(x, shift=np.zeros(3, np.complex64))


def test_a_constant_feature_near_its_running_mean_is_not_read_again():
    x, shift = jnp.full((64, 3), 7.0), jnp.full(3, 7.0) * (1 + 1e-5)
    count, d = jnp.float32(64), x - shift[None]
    assert _batch._centre_is_near_enough(count, d.sum(0), (d**2).sum(0), shift)
    far = shift + 0.1
    d = x - far[None]
    assert not _batch._centre_is_near_enough(count, d.sum(0), (d**2).sum(0), far)


# ---- counts beyond what float32 can hold ----

FULL = Moments(np.float32(2**24), np.float32([3, -1]), np.float32([2**25, 2**23]))
LONG = {  # the sizes of the sets, what they are merged into, the dtype of the counts
    "10,000 sets of 4,096": (np.full(10_000, 4096), None, "float32"),
    "of 4,097, which are rounded": (np.full(10_000, 4097), None, "float32"),
    "of any size": (
        np.random.default_rng(1).integers(0, 9000, 10_000),
        None,
        "float32",
    ),
    "100,000 of 4,000": (np.full(100_000, 4000), None, "float32"),
    "one value into 2**24": (np.ones(1), FULL, "float32"),
    "1,000 values into 2**24": (np.ones(1000), FULL, "float32"),
    "1,000 sets of three into 2**24": (np.full(1000, 3), FULL, "float32"),
    "2**24 into one value": (np.array([1, 2**24]), None, "float32"),
    "integers: one value": (np.ones(1), FULL, "int32"),
    "integers: 1,000 values": (np.ones(1000), FULL, "uint32"),
    "integers: 4,097": (np.full(10_000, 4097), None, "int32"),
    "integers: beyond 2**31": (np.full(40_000, 99_999), None, "uint32"),
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("reverse", [False, True])
def test_many_sets_merged_into_one(name, reverse):
    """Against float64; k merges may round the count by k 6e-8, integers not at all."""
    sizes, start, dtype = LONG[name]
    rng = np.random.default_rng(0)
    n = sizes.astype(np.float64)[:, None]
    mean = np.float32(rng.normal([3, -1], np.sqrt([2, 0.5] / np.maximum(n, 1))))
    m2 = np.float32(rng.chisquare(np.maximum(n - 1, 1), mean.shape) * [2, 0.5])
    m2 = np.where(n > 1, m2, 0)
    rows = Moments(sizes.astype(dtype), mean, m2)
    start = Moments.empty((2,)) if start is None else start
    start = jax.tree.map(jnp.asarray, start)._replace(count=start.count.astype(dtype))

    def step(total, batch):
        pair = (batch, total) if reverse else (total, batch)
        return bnjax.merge(*pair), None

    merged = jax.jit(lambda start, rows: jax.lax.scan(step, start, rows)[0])(
        start, rows
    )
    assert merged.count.dtype == dtype

    n0, mean0, m20 = (np.asarray(v, np.float64) for v in start)
    count = n.sum() + n0
    expected = (n * mean.astype(np.float64)).sum(0) / count + mean0 * n0 / count
    total = (
        (m2 + n * (mean - expected) ** 2).sum(0) + m20 + n0 * (mean0 - expected) ** 2
    )
    lost = len(sizes) * 2.0**-24 if dtype == "float32" else 0
    assert abs(float(merged.count) - count) <= count * lost
    if dtype != "float32":
        assert int(merged.count) == int(count)
    drift = np.abs(np.asarray(merged.mean) - expected) / np.sqrt(total / count)
    assert drift.max() < 5e-5
    assert_close(merged.variance(), total / count, tol=1e-4)


def test_an_integer_count_stops_at_the_largest():
    """It does not begin again, and the variance stays that of the values."""
    most = Moments(jnp.int32(2**31 - 10), jnp.full(2, 3.0), jnp.full(2, 2.0**32))
    merged = bnjax.merge(
        most, Moments(jnp.int32(2**20), jnp.full(2, 3.0), jnp.zeros(2))
    )
    assert int(merged.count) == 2**31 - 1
    assert_close(merged.variance(), np.full(2, 2 * (1 - 2.0**-11)), tol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "counts", "expected"),
    [
        ("int8", [120, 100], "int32"),
        ("uint8", [200, 100], "int32"),
        ("int16", [30_000, 10_000], "int32"),
        ("bool", [True, True], "int32"),
        ("float16", [50_016, 30_000], "float32"),
        ("bfloat16", [256, 1], "float32"),
        ("int64", [3_000_000_000, 1_000_000_000], "float32"),
        ("int64", [2**24, 1], "int32"),
    ],
)
def test_counts_of_narrow_dtypes(dtype, counts, expected):
    """Their sum is beyond what they hold; int64 is NumPy's, of which JAX keeps half."""
    counts = [np.asarray(c, dtype) for c in counts]
    a, b = (float(c) for c in counts)
    merged = bnjax.merge(
        Moments(counts[0], np.float32([1, 2]), np.float32([a, 0])),
        Moments(counts[1], np.float32([4, 2]), np.float32([0, b])),
    )
    assert merged.count.dtype == expected
    assert float(merged.count) == a + b
    share = b / (a + b)
    assert_close(merged.mean, np.array([1 + 3 * share, 2]))
    var = np.array([1 - share + 9 * share * (1 - share), share])
    assert_close(merged.variance(), var, tol=2e-6)


def test_moments_of_integers():
    """A mean of integers is no integer."""
    merged = bnjax.merge(Moments(2, 5, 4), Moments(1, 9, 0))
    assert int(merged.count) == 3
    assert_close(merged.mean, np.array(19 / 3), dtype="float32")
    assert_close(merged.m2, np.array(4 + 32 / 3), dtype="float32")

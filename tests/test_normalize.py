"""normalize and batch_norm: values, dtypes, masks, empty batches, fused extras."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import assert_close, assert_trees_close, covering, poison

import bnjax

SHAPE = (6, 4, 5, 3)
IMPLEMENTATIONS = [None, "xla", "reread", "subsample"]


def case(seed=0, shape=SHAPE, axis=-1, dtype=np.float32):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=shape) * 2 + 1).astype(dtype)
    features = tuple(shape[a] for a in feature_axes(axis, len(shape)))
    scale, bias = rng.normal(size=(2, *features)).astype(np.float32)
    return x, scale, bias


def feature_axes(axis, ndim):
    axis = (axis,) if isinstance(axis, int) else axis
    return tuple(sorted(a % ndim for a in axis))


def reduced(axis, ndim):
    return tuple(a for a in range(ndim) if a not in feature_axes(axis, ndim))


def test_worked_example():
    x = jnp.array([[4.0], [7.0], [5.0]])
    y, m = bnjax.batch_norm(x, epsilon=0.0)
    assert_close(y, np.array([[-4.0], [5.0], [-1.0]]) / np.sqrt(14))
    y, _ = bnjax.batch_norm(x)
    assert_close(y, np.array([[-1.069042], [1.336302], [-0.267260]]))
    dx = jax.grad(lambda x: bnjax.batch_norm(x, epsilon=0.0)[0][0, 0])(x)
    expected = np.array([[6.0], [3.0], [-9.0]]) / (7 * np.sqrt(14))
    assert_close(dx, expected)
    assert_close(m.variance(), np.array([14 / 9]))


@covering(
    strength=1,
    axis=[-1, 0, 1, (1, 3), (-1, -3), (2, 0)],
    implementation=IMPLEMENTATIONS,
)
def test_values(axis, implementation):
    x, scale, bias = case(axis=axis)
    y, m = jax.jit(
        lambda *a: bnjax.batch_norm(*a, axis=axis, implementation=implementation)
    )(x, scale, bias)
    axes = reduced(axis, 4)
    assert_close(y, oracle.batch_norm(x, scale, bias, axes), dtype="float32")
    _, mean, m2 = oracle.moments(x, axes)
    assert_close(m.mean, mean)
    assert_close(m.m2, m2)
    y = bnjax.normalize(
        x, m.mean, m.variance(), scale, bias, axis=axis, implementation=implementation
    )
    assert_close(y, oracle.batch_norm(x, scale, bias, axes))


@pytest.mark.parametrize("epsilon", [0.0, 1e-3, 1.0])
def test_epsilon(epsilon):
    x, scale, bias = case()
    y, _ = bnjax.batch_norm(x, scale, bias, epsilon=epsilon)
    assert_close(y, oracle.batch_norm(x, scale, bias, (0, 1, 2), epsilon=epsilon))


@pytest.mark.parametrize(("with_scale", "with_bias"), [(0, 0), (1, 0), (0, 1)])
def test_missing_scale_and_bias(with_scale, with_bias):
    x, scale, bias = case()
    y, _ = bnjax.batch_norm(
        x, scale if with_scale else None, bias if with_bias else None
    )
    scale = scale if with_scale else np.ones(3)
    bias = bias if with_bias else np.zeros(3)
    assert_close(y, oracle.batch_norm(x, scale, bias, (0, 1, 2)))


@pytest.mark.parametrize(
    ("x_dtype", "parameter_dtype", "dtype", "expected"),
    [
        ("bfloat16", None, None, "bfloat16"),
        ("float16", None, None, "float16"),
        ("bfloat16", "float32", None, "float32"),
        ("bfloat16", "bfloat16", None, "bfloat16"),
        ("bfloat16", "float32", "bfloat16", "bfloat16"),
        ("float32", "float32", "float16", "float16"),
        ("float32", "bfloat16", None, "float32"),
        ("complex64", "float32", None, "complex64"),
        ("float32", "float32", "complex64", "complex64"),
    ],
)
def test_output_dtype(x_dtype, parameter_dtype, dtype, expected):
    x, scale, bias = case()
    if x_dtype == "complex64":
        x = x + 1j * case(1)[0]
    x = jnp.asarray(x).astype(x_dtype)
    if parameter_dtype is None:
        scale, bias = None, None
    else:
        scale, bias = (jnp.asarray(v, parameter_dtype) for v in (scale, bias))
    y, m = bnjax.batch_norm(x, scale, bias, dtype=dtype)
    wide = np.asarray(x, np.complex64 if x.dtype == jnp.complex64 else np.float32)
    scale = np.ones(3) if scale is None else np.asarray(scale, np.float32)
    bias = np.zeros(3) if bias is None else np.asarray(bias, np.float32)
    expected_y = oracle.batch_norm(wide, scale, bias, (0, 1, 2))
    assert_close(y, expected_y, dtype=expected)
    y = bnjax.normalize(
        x, m.mean, m.variance(), *(v for v in (scale, bias)), dtype=expected
    )
    assert_close(y, expected_y, dtype=expected)
    assert m.m2.dtype == jnp.float32


@pytest.mark.usefixtures("x64")
def test_double_precision_is_kept():
    x, scale, bias = case(dtype=np.float64)
    y, m = bnjax.batch_norm(x, scale.astype(float), bias.astype(float))
    assert_close(y, oracle.batch_norm(x, scale, bias, (0, 1, 2)), dtype="float64")
    assert m.mean.dtype == jnp.float64
    y, m = bnjax.batch_norm(x.astype(np.float32), scale.astype(float))
    assert y.dtype == jnp.float64
    assert m.mean.dtype == jnp.float32  # of the input, whatever the parameters


def test_half_precision_is_rounded_once():
    """bfloat16 in and out equals the rounded float32 result, residual included."""
    x, scale, bias = case()
    x, r = jnp.asarray(x, jnp.bfloat16), jnp.asarray(case(1)[0], jnp.bfloat16)
    keywords = {"activation": jax.nn.gelu}
    y, _ = bnjax.batch_norm(x, scale, bias, residual=r, dtype=jnp.bfloat16, **keywords)
    wide, _ = bnjax.batch_norm(
        x.astype(jnp.float32), scale, bias, residual=r.astype(jnp.float32), **keywords
    )
    assert_close(y, wide, tol=2**-8)  # one rounding, relative to the largest


@covering(
    strength=1,
    garbage=[np.nan, np.inf, 1e30],
    shape=[(6, 1, 1, 1), (6, 4, 5, 1), SHAPE],
)
def test_mask(shape, garbage):
    x, scale, bias = case()
    mask = np.random.default_rng(1).random(shape) < 0.6
    expected = oracle.batch_norm(x, scale, bias, (0, 1, 2), mask)
    clean, _ = bnjax.batch_norm(x, scale, bias, mask=mask)
    assert_close(clean, expected)  # masked values are normalized like the others
    y, _ = bnjax.batch_norm(poison(x, mask, garbage), scale, bias, mask=mask)
    assert_close(np.where(mask, y, 0), np.where(mask, expected, 0))
    assert np.isfinite(y).all()


@covering(strength=1, frozen=[False, True], garbage=[-65504, 65504, -1e4])
def test_padding_that_float16_cannot_hold_once_normalized(garbage, frozen):
    """Finite there, so that (y * mask).sum() is; what is valid may still overflow."""
    x, _, bias = case()
    mask = np.random.default_rng(2).random((6, 4, 5, 1)) < 0.5
    dirty = poison((x / 1e3).astype(np.float16), mask, garbage)
    scale = np.float32([9, 1, -7])
    stats = {"mean": np.zeros(3, np.float32), "var": np.full(3, 1e-6, np.float32)}
    variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
    layer = bnjax.BatchNorm(frozen, update_stats=False, dtype=jnp.float16)

    def loss(params, x):
        y = layer.apply({**variables, "params": params}, x, mask=mask)
        return (y * mask).sum(dtype=jnp.float32)

    y = layer.apply(variables, dirty, mask=mask)
    assert y.dtype == jnp.float16
    assert jnp.isfinite(y).all()
    clean = layer.apply(variables, np.where(mask, dirty, 0), mask=mask)
    np.testing.assert_array_equal(np.where(mask, y, 0), np.where(mask, clean, 0))
    for g in jax.tree.leaves(jax.grad(loss, (0, 1))(variables["params"], dirty)):
        assert jnp.isfinite(g).all()
    everything = layer.apply(variables, dirty, mask=np.ones((1, 1, 1, 1), bool))
    assert jnp.isfinite(everything).all() != frozen  # it is valid now


@pytest.mark.parametrize("garbage", [np.nan, 1e30, 0.0])
@pytest.mark.parametrize(
    "fallback", [None, (np.array([3.0, 2, 1]), np.array([4.0, 9, 1]))]
)
def test_nothing_valid(garbage, fallback):
    """Normalized by the fallback; finite output and gradient."""
    x, scale, bias = case()
    x = poison(x, np.zeros_like(x, bool), garbage)
    mask = np.zeros((6, 1, 1, 1), bool)

    def f(x, scale, bias):
        return bnjax.batch_norm(x, scale, bias, mask=mask, fallback=fallback)

    y, m = f(x, scale, bias)
    assert_close(m.count, np.array(0.0))
    mean, var = (np.zeros(3), np.ones(3)) if fallback is None else fallback
    seen = np.where(np.abs(x) <= 1e9, x, 0)
    assert_close(y, oracle.normalize(seen, mean, var, scale, bias, (0, 1, 2)))
    for g in jax.grad(lambda *a: jnp.sin(f(*a)[0]).sum(), (0, 1, 2))(x, scale, bias):
        assert jnp.isfinite(g).all()


def test_nothing_valid_in_one_feature():
    x, scale, bias = case()
    mask = np.array([True, False, True])
    fallback = (np.array([9.0, 2.0, 9.0]), np.array([9.0, 4.0, 9.0]))
    y, m = bnjax.batch_norm(x, scale, bias, mask=mask, fallback=fallback)
    batch = oracle.batch_norm(x, scale, bias, (0, 1, 2))
    stored = oracle.normalize(x, *fallback, scale, bias, (0, 1, 2))
    assert_close(y, np.where(mask, batch, stored))
    assert_close(m.count, np.array([120.0, 0, 120]))


@pytest.mark.parametrize("shape", [(0, 3), (4, 0, 3)])
def test_size_zero(shape):
    y, m = bnjax.batch_norm(jnp.ones(shape), fallback=(jnp.ones(3), jnp.ones(3)))
    assert y.shape == shape
    assert_close(m.mean, np.zeros(3))


@pytest.mark.parametrize("activation", [None, jax.nn.relu, jnp.tanh])
@pytest.mark.parametrize("frozen", [False, True])
def test_residual_and_activation(activation, frozen):
    x, scale, bias = case()
    r = case(1)[0]
    if frozen:
        _, mean, m2 = oracle.moments(x, (0, 1, 2))
        y = bnjax.normalize(
            x, mean, m2 / 120, scale, bias, residual=r, activation=activation
        )
    else:
        y, _ = bnjax.batch_norm(x, scale, bias, residual=r, activation=activation)
    expected = oracle.batch_norm(x, scale, bias, (0, 1, 2)) + r
    if activation is not None:
        expected = np.asarray(activation(jnp.asarray(expected)))
    assert_close(y, expected, tol=2e-6)


def test_invariances():
    """To shift, to scale (epsilon 0) and to the order of the batch: section 3.3."""
    x, scale, bias = case()
    y, _ = bnjax.batch_norm(x, scale, bias, epsilon=0.0)
    order = np.random.default_rng(0).permutation(6)
    for other in (x + np.float32(64), x * np.float32(3)):
        again, _ = bnjax.batch_norm(other, scale, bias, epsilon=0.0)
        assert_close(again, np.asarray(y), tol=2e-5)  # x + 64 is rounded
    again, _ = bnjax.batch_norm(x[order], scale, bias, epsilon=0.0)
    assert_close(again, np.asarray(y)[order], tol=2e-6)


def test_large_mean_is_normalized():
    """What Flax's fast variance returns with a standard deviation of 0.02 to 12."""
    x = 1000 + 0.01 * np.random.default_rng(0).normal(size=(4096, 3))
    y, _ = bnjax.batch_norm(x.astype(np.float32))
    assert_close(
        y.std(0),
        np.std(
            oracle.batch_norm(x.astype(np.float32), np.ones(3), np.zeros(3), (0,)), 0
        ),
        tol=1e-3,
    )


@pytest.mark.parametrize("shape", [(1, 3), (3,), (1, 1, 3)])
def test_one_value_warns(shape):
    with pytest.warns(bnjax.BatchNormWarning, match="one value per feature"):
        y, _ = bnjax.batch_norm(jnp.full(shape, 7.0), None, jnp.array([1.0, 2.0, 3.0]))
    assert_close(y, np.broadcast_to([1.0, 2.0, 3.0], shape))


def test_one_value_on_each_of_two_replicas_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y, _ = jax.vmap(lambda x: bnjax.batch_norm(x, axis_name="i"), axis_name="i")(
            jnp.array([[[1.0, 4.0, 2.0]], [[3.0, 1.0, 3.0]]])
        )
    assert_close(jnp.abs(y), np.ones((2, 1, 3)), tol=1e-4)  # epsilon


def test_symbolic_batch_dimension():
    """jax.export of a training step, for three platforms at once."""
    (batch,) = jax.export.symbolic_shape("b")
    args = (
        jax.ShapeDtypeStruct((batch, 4, 5, 3), jnp.float32),
        *(jax.ShapeDtypeStruct((3,), jnp.float32) for _ in range(2)),
    )

    def step(x, scale, bias):
        f = lambda *a: bnjax.batch_norm(*a, activation=jax.nn.relu)[0].sum()  # noqa: E731
        return jax.value_and_grad(f, (0, 1, 2))(x, scale, bias)

    exported = jax.export.export(jax.jit(step), platforms=["cpu", "cuda", "tpu"])(*args)
    for n in (2, 40):
        x, scale, bias = case(shape=(n, 4, 5, 3))
        out = exported.call(x, scale, bias)
        assert_trees_close(
            out, jax.tree.map(np.asarray, step(x, scale, bias)), tol=1e-5
        )


def test_strict_dtype_promotion():
    x, scale, bias = (jnp.asarray(v) for v in case())
    mask = jnp.ones((6, 1, 1, 1), bool)
    with jax.numpy_dtype_promotion("strict"):
        for dtype in (jnp.float32, jnp.bfloat16, jnp.complex64):

            @jax.jit
            def run(t):
                y, m = bnjax.batch_norm(t, scale, bias, mask=mask, residual=t)
                z = bnjax.normalize(t, m.mean, m.variance(), scale, bias, residual=t)
                g = jax.grad(lambda t: jnp.abs(bnjax.batch_norm(t, scale)[0]).sum())(t)
                return y, z, g, bnjax.merge(m, m)

            for value in jax.tree.leaves(run(x.astype(dtype))):
                assert np.isfinite(value).all()


def test_arguments_may_be_lists_and_numpy_integers():
    y, _ = bnjax.batch_norm([[1.0, 2.0], [3.0, 5.0]], [1.0, 2.0], [0.0, 1.0])
    assert_close(y, np.array([[-1.0, -1.0], [1.0, 3.0]]), tol=1e-5)
    x, scale, bias = case(axis=1)
    y, _ = bnjax.batch_norm(x, scale, bias, axis=np.int64(1))
    assert_close(y, oracle.batch_norm(x, scale, bias, (0, 2, 3)))


def test_dtype_without_x64_does_not_warn():
    x, scale, _ = case()
    y = jax.grad(lambda x: bnjax.batch_norm(x, scale, dtype=float)[0].sum())(x)
    assert y.dtype == jnp.float32


def test_epsilon_may_be_traced():
    x, scale, bias = case()

    def f(epsilon):
        return bnjax.batch_norm(x, scale, bias, epsilon=epsilon)[0].std()

    assert_close(jax.jit(f)(1e-3), np.asarray(f(1e-3)))
    low, high = f(1.0), f(1.001)
    assert_close(jax.grad(f)(1.0), np.asarray((high - low) / 1e-3), tol=1e-2)
    y = bnjax.normalize(x, bias, scale**2, epsilon=jnp.float32(0.5))
    one = np.ones(3)
    assert_close(y, oracle.normalize(x, bias, scale**2, one, 0 * one, (0, 1, 2), 0.5))


def test_the_warning_points_at_the_callers_line():
    for call in (
        lambda: bnjax.batch_norm(jnp.ones((1, 3))),
        lambda: bnjax.BatchNorm(use_running_average=False).init_with_output(
            jax.random.key(0), jnp.ones((1, 3))
        ),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        for warning in caught:
            assert warning.filename == __file__
    norm = bnjax.BatchNorm(use_running_average=False)
    v = norm.init(jax.random.key(0), jnp.ones((1, 3)))
    with pytest.warns(bnjax.BatchNormWarning) as caught:
        norm.apply(v, jnp.ones((1, 3)), mutable=["batch_stats"])
    assert caught[0].filename == __file__


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layer", ["normalize", "BatchNorm", "frozen BatchNorm"])
def test_inference_is_plain_arithmetic(layer, dtype):
    """Other compilers read the exported program: no barrier, no choice of platform."""
    x, scale, bias = (jnp.asarray(v) for v in case())
    x, mean, var = x.astype(dtype), scale / 3, scale**2
    stats = {"mean": mean, "var": var}
    variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}

    def f(x):
        if layer == "normalize":
            return bnjax.normalize(x, mean, var, scale, bias)
        frozen = {"update_stats": False} if layer.startswith("frozen") else {}
        return bnjax.BatchNorm(use_running_average=True, **frozen).apply(variables, x)

    platforms = ["cpu", "cuda", "tpu"]
    text = str(jax.export.export(jax.jit(f), platforms=platforms)(x).mlir_module())
    used = set(re.findall(r"stablehlo\.(\w+)", text))
    arithmetic = {"subtract", "multiply", "add", "rsqrt", "convert"}
    assert arithmetic - {"convert"} <= used
    assert used <= arithmetic | {"constant", "broadcast_in_dim", "reshape", "return"}

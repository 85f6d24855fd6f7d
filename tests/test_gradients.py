"""Derivatives: exact, in every mode and order, with little stored."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import (
    GRADIENT_TOLERANCE,
    assert_close,
    assert_trees_close,
    by_default,
    compiled_text,
    covering,
    plain_batch_norm,
    poison,
    residual_bytes,
)
from jax.experimental.jet import jet
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import bnjax

SHAPE = (5, 4, 6, 3)
AXES = (0, 1, 2)


def case(dtype=np.float64, seed=0, shape=SHAPE):
    rng = np.random.default_rng(seed)
    x, dy = rng.normal(size=(2, *shape)) * 2 + 0.5
    scale, bias = rng.normal(size=(2, shape[-1]))
    return [jnp.asarray(v, dtype) for v in (x, scale, bias, dy)]


def mask_of(shape=(*SHAPE[:-1], 1), seed=1):
    return np.random.default_rng(seed).random(shape) < 0.6


@covering(
    implementation=[None, "xla", "reread", "subsample", "plain"],
    masked=[False, True],
    dtype=["float32", "bfloat16"],
)
def test_the_papers_gradient(dtype, masked, implementation):
    x, scale, bias, dy = case(dtype)
    mask = mask_of() if masked else None

    def f(*args):
        return bnjax.batch_norm(*args, mask=mask, implementation=implementation)[0]

    _, vjp = jax.vjp(f, x, scale, bias)
    exact = oracle.batch_norm_gradients(x, scale, dy, AXES, mask)
    for g, e in zip(jax.jit(vjp)(dy), exact, strict=True):
        assert_close(g, e, tol=GRADIENT_TOLERANCE[dtype], dtype=dtype)


def test_bfloat16_gradient_is_rounded_once():
    """The parts of dx are added in float32: their sum may be far smaller than they."""
    x, scale, _, dy = case("float32")
    x, dy = x.astype(jnp.bfloat16), (dy + 100).astype(jnp.bfloat16)

    def f(x):
        return bnjax.batch_norm(x, scale, dtype=jnp.bfloat16)[0]

    (dx,) = jax.vjp(f, x)[1](dy)
    exact = oracle.batch_norm_gradients(x, scale, dy, AXES)[0]
    assert_close(dx, exact, tol=4e-3)


SECOND = (2, {"residual": True, "activation": jnp.sin})
ORDERS = [
    (2, {}),
    SECOND,
    (1, {"activation": jnp.tanh}),
    (1, {"residual": True}),
    (1, {"scale": False}),
    (1, {"bias": False}),
    (1, {"scale": False, "bias": False, "activation": jnp.tanh}),
]


@pytest.mark.usefixtures("x64")
@by_default(SECOND, *ORDERS[4:], case_of=ORDERS)
@by_default(True, masked=[True, False])
def test_check_grads(case_of, masked):
    """Both modes, through y and through the Moments.

    The second order with and without all that there is; what lies between is a part of
    it.
    """
    order, options = case_of[0], dict(case_of[1])
    x, scale, bias, r = case(shape=(5, 4, 3))
    arguments = {"x": x}
    if options.pop("scale", True):
        arguments["scale"] = scale
    if options.pop("bias", True):
        arguments["bias"] = bias
    if options.pop("residual", False):
        arguments["residual"] = r
    mask = mask_of((5, 4, 1)) if masked else None

    @jax.jit
    def f(arguments):
        y, m = bnjax.batch_norm(**arguments, mask=mask, **options)
        return y, m.mean, m.m2, m.variance(ddof=1)

    check_grads(
        f, (arguments,), order=order, modes=("fwd", "rev"), atol=1e-4, rtol=1e-4
    )


@pytest.mark.usefixtures("x64")
def test_check_grads_of_normalize_and_moments():
    x, scale, bias, _ = case(shape=(5, 4, 3))
    mean, var = jnp.array([0.3, -1.0, 2.0]), jnp.array([0.5, 2.0, 1.0])
    check = functools.partial(
        check_grads, order=1, modes=("fwd", "rev"), atol=1e-4, rtol=1e-4
    )
    check(jax.jit(bnjax.normalize), (x, mean, var, scale, bias), order=2)
    mask = mask_of((5, 4, 3))
    check(jax.jit(lambda x: bnjax.moments(x, mask=mask)[1:]), (x,))

    @jax.jit
    def merged(a, b):
        return bnjax.merge(bnjax.moments(a), bnjax.moments(b))[1:]

    check(merged, (x[:2], x[2:]))


@pytest.mark.usefixtures("x64")
@by_default(1, (0, 3), axis=[0, 1, (1, 2), (0, 3)])
def test_check_grads_of_other_axes(axis):
    x, *_ = case(shape=(2, 4, 3, 5))
    features = [x.shape[a] for a in np.atleast_1d(axis)]
    scale = jnp.asarray(np.random.default_rng(0).normal(size=features))

    @jax.jit
    def f(x, scale):
        return bnjax.batch_norm(x, scale, scale + 1, axis=axis)[0]

    order = 2 if axis == (0, 3) else 1
    check_grads(f, (x, scale), order=order, modes=("fwd", "rev"), atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("x64")
def test_complex_gradient():
    x, scale, bias, r = case(shape=(5, 4, 3))
    z = x + 1j * r

    def parts(batch_norm):
        def f(re, im, scale, bias):
            y, (mean, m2) = batch_norm(re + 1j * im, scale, bias)
            return (
                jnp.sum(jnp.sin(y.real) + y.imag**3)
                + (mean.real * mean.imag * m2).sum()
            )

        return f

    ours = parts(lambda *a: (lambda y, m: (y, m[1:]))(*bnjax.batch_norm(*a)))
    plain = parts(functools.partial(plain_batch_norm, axes=(0, 1)))
    args = (z.real, z.imag, scale, bias)
    for transform in (jax.grad, jax.jacfwd):
        actual, expected = (
            jax.jit(transform(f, (0, 1, 2, 3)))(*args) for f in (ours, plain)
        )
        for a, e in zip(actual, expected):
            assert_close(a, np.asarray(e), tol=1e-10)


def test_gradient_sums_vanish():
    """The gradient is orthogonal to a constant and (for epsilon 0) to x_hat."""
    x, scale, bias, dy = case("float32")
    f = functools.partial(bnjax.batch_norm, epsilon=0.0)
    dx = jax.grad(lambda x: (f(x, scale, bias)[0] * dy).sum())(x)
    x_hat = f(x)[0]
    size = np.abs(dx).sum()
    assert np.abs(dx.sum(AXES)).max() < 1e-6 * size
    assert np.abs((dx * x_hat).sum(AXES)).max() < 1e-6 * size


@pytest.mark.usefixtures("x64")
def test_gradient_through_moments_alone():
    x, *_ = case()
    m = bnjax.moments(x)
    (dx,) = jax.vjp(lambda x: bnjax.batch_norm(x)[1].m2, x)[1](
        jnp.array([1.0, 2.0, -1.0])
    )
    assert_close(dx, 2 * np.asarray(x - m.mean[None, None, None]) * [1.0, 2.0, -1.0])
    (dx,) = jax.vjp(lambda x: bnjax.batch_norm(x)[1].mean, x)[1](
        jnp.array([1.0, 2.0, -1.0])
    )
    assert_close(dx, np.broadcast_to(np.array([1.0, 2.0, -1.0]) / 120, SHAPE))


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("shape", [(5, 1, 1, 1), (5, 4, 6, 1), SHAPE])
def test_masked_values_have_no_gradient(shape, garbage):
    """Zero where the loss does not look, never NaN, and no trace in the others."""
    x, scale, bias, dy = case("float32")
    mask = mask_of(shape)
    dy = jnp.where(mask, dy, 0)

    def f(x, scale, bias):
        y, m = bnjax.batch_norm(x, scale, bias, mask=mask, activation=jnp.tanh)
        return jnp.sum(y * dy) + m.mean.sum() + jnp.log(m.m2).sum()

    clean = jax.grad(f, (0, 1, 2))(x, scale, bias)
    dirty = jax.grad(f, (0, 1, 2))(poison(x, mask, garbage), scale, bias)
    assert_trees_close(dirty, jax.tree.map(np.asarray, clean), tol=1e-5)
    assert (np.asarray(dirty[0])[~np.broadcast_to(mask, SHAPE)] == 0).all()


def test_masked_nan_with_a_cotangent_is_finite():
    x, scale, bias, dy = case("float32")
    mask = mask_of()
    x = poison(x, mask)
    out, vjp = jax.vjp(lambda *a: bnjax.batch_norm(*a, mask=mask)[0], x, scale, bias)
    assert np.isfinite(out).all()
    for g in vjp(dy):
        assert np.isfinite(g).all()


# ---- every transform, against JAX's own derivative of the plain formula ----

MASK = mask_of()


def loss_of(batch_norm):
    def loss(x, scale, bias):
        y, (mean, m2) = batch_norm(x, scale, bias)
        return jnp.sum(jnp.sin(y) * x) + (mean * m2).sum()

    return loss


def ours(x, scale, bias, mask=MASK):
    y, m = bnjax.batch_norm(x, scale, bias, mask=mask, activation=jnp.tanh)
    return y, m[1:]


def plain(x, scale, bias, mask=MASK):
    y, m = plain_batch_norm(x, scale, bias, axes=AXES, mask=mask)
    return jnp.tanh(y), m


def directions(args, seed=9):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=a.shape)) for a in args)


ALL = (0, 1, 2)


def grad(f):
    return jax.grad(f, ALL)


def hvp_forward_over_reverse(f):
    return lambda *a: jax.jvp(grad(f), a, directions(a))[1]


def hvp_reverse_over_forward(f):
    return grad(lambda *a: jax.jvp(f, a, directions(a))[1])


def hvp_reverse_over_reverse(f):
    return grad(
        lambda *a: sum(jnp.vdot(g, d) for g, d in zip(grad(f)(*a), directions(a)))
    )


def third_order(f):
    return hvp_forward_over_reverse(
        lambda *a: sum(jnp.vdot(g, d) for g, d in zip(grad(f)(*a), directions(a, 8)))
    )


def stacked(args):
    return [jnp.stack([a, 2 * a + 1]) for a in args]


def scanned(f):
    def run(*a):
        def step(carry, one):
            return carry + f(*one), None

        return jax.lax.scan(step, 0.0, tuple(stacked(a)))[0]

    return run


def linear_transposed(f):
    def run(*a):
        _, linear = jax.linearize(f, *a)
        return jax.linear_transpose(linear, *a)(1.0)

    return run


def vmapped_cotangents(batch_norm):
    def run(*a):
        y, vjp = jax.vjp(lambda *a: batch_norm(*a)[0], *a)
        return jax.vmap(vjp)(jnp.stack([jnp.cos(y), y]))

    return run


def cond(f):
    return lambda *a: jax.lax.cond(a[1][0] > -100, f, lambda *a: a[1].sum(), *a)


names = jax.checkpoint_policies.save_only_these_names
TRANSFORMS = {
    "value": lambda f: f,
    "grad": grad,
    "jit grad": lambda f: jax.jit(grad(f)),
    "vmap grad": lambda f: lambda *a: jax.vmap(grad(f))(*stacked(a)),
    "scan": lambda f: grad(scanned(f)),
    "cond": lambda f: grad(cond(f)),
    "remat": lambda f: grad(jax.checkpoint(f)),
    "remat policy": lambda f: grad(
        jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable)
    ),
    "remat names": lambda f: grad(jax.checkpoint(f, policy=names("none"))),
    "linear_transpose": linear_transposed,
    "reverse over reverse": hvp_reverse_over_reverse,
    "third order": third_order,
    "jvp": lambda f: lambda *a: jax.jvp(f, a, directions(a)),
    "linearize": lambda f: lambda *a: jax.linearize(f, *a)[1](*directions(a)),
    "vmap jvp": lambda f: (
        lambda *a: jax.vmap(lambda *a: jax.jvp(f, a, directions(a)))(*stacked(a))
    ),
    "remat jvp": lambda f: lambda *a: jax.jvp(jax.checkpoint(f), a, directions(a)),
    "jacfwd": lambda f: jax.jacfwd(f, (1, 2)),
    "hessian": lambda f: jax.hessian(f, 1),
    "reverse over forward": hvp_reverse_over_forward,
    "forward over reverse": hvp_forward_over_reverse,
}


OFTEN = ["value", "grad", "vmap grad", "scan", "remat", "linear_transpose", "jvp"]
OFTEN += ["jacfwd", "third order", "forward over reverse", "reverse over forward"]


@pytest.mark.usefixtures("x64")
@by_default(*OFTEN, name=TRANSFORMS)
def test_transform(name):
    """The derivatives of the first order eagerly, too."""
    args = case()[:3]
    ours_, plain_ = (TRANSFORMS[name](loss_of(f)) for f in (ours, plain))
    expected = jax.jit(plain_)(*args)
    actual = (ours_ if name in ("grad", "jvp") else jax.jit(ours_))(*args)
    assert_trees_close(actual, jax.tree.map(np.asarray, expected), tol=1e-9)


@pytest.mark.usefixtures("x64")
def test_vmap_over_cotangents():
    args = case()[:3]
    expected = vmapped_cotangents(plain)(*args)
    actual = vmapped_cotangents(ours)(*args)
    assert_trees_close(actual, jax.tree.map(np.asarray, expected), tol=1e-9)


@pytest.mark.usefixtures("x64")
def test_activation_may_close_over_a_parameter():
    x, scale, bias, dy = case()

    def loss(batch_norm, slope):
        return (batch_norm(lambda y: jnp.where(y > 0, y, slope * y)) * dy).sum()

    ours = jax.jit(
        jax.grad(
            lambda s: loss(
                lambda act: bnjax.batch_norm(x, scale, bias, activation=act)[0], s
            )
        )
    )
    plain = jax.grad(
        lambda s: loss(
            lambda act: act(plain_batch_norm(x, scale, bias, axes=AXES)[0]), s
        )
    )
    assert_close(ours(0.3), np.asarray(plain(0.3)), tol=1e-10)


# ---- Taylor mode, which knows no derivative rule and no checkpoint ----


def layer_of(layer, **fields):
    def f(x):
        return layer(**fields).init_with_output(jax.random.key(0), x)[0]

    return f


EVALUATED = {"use_running_average": True}
TAYLOR = {
    "normalize": lambda x: bnjax.normalize(x, x[0, 0, 0] * 0 + 1, jnp.full(3, 2.0)),
    "batch_norm": lambda x: bnjax.batch_norm(x)[0],
    "plain in jit": jax.jit(lambda x: bnjax.batch_norm(x, implementation="plain")[0]),
    "moments": lambda x: bnjax.moments(x).variance(),
    "all options": lambda x: bnjax.batch_norm(
        x,
        mask=np.arange(6)[:, None, None, None] > 1,
        residual=x,
        activation=jnp.tanh,
        dtype=jnp.bfloat16,
    )[0],
    "evaluated layer": layer_of(bnjax.BatchNorm, **EVALUATED),
    "layer": layer_of(bnjax.BatchNorm, use_running_average=False),
    "domains": layer_of(
        bnjax.linen.SplitBatchNorm, num_splits=2, use_running_average=False
    ),
}


@by_default(*("normalize", "moments", "all options", "domains"), name=TAYLOR)
def test_taylor_mode(name):
    """The first two derivatives along a direction are those of forward mode."""
    f, x = TAYLOR[name], case("float32", shape=(6, 4, 5, 3))[0]
    along = jnp.cos(3 * x)

    def slope(x):
        return jax.jvp(f, (x,), (along,))[1]

    y, (first, second) = jet(f, (x,), ((along, jnp.zeros_like(x)),))
    expected = f(x), *jax.jvp(slope, (x,), (along,))
    tol = 2e-2 if name == "all options" else 2e-5
    assert_trees_close((y, first, second), expected, tol=tol)


def test_plain_is_the_same_function():
    """Two passes and JAX's own derivative; over replicas too."""
    x, scale, bias, dy = case("float32", shape=(6, 4, 5, 3))
    x = x + 30

    def f(x, implementation):
        def replica(x):
            options = {"axis_name": "i", "implementation": implementation}
            return bnjax.batch_norm(x, scale, bias, **options)

        y, batch = jax.vmap(replica, axis_name="i")(x.reshape(2, 3, *x.shape[1:]))
        return jnp.sum(y.reshape(dy.shape) * dy), (y, batch)

    run = jax.value_and_grad(f, has_aux=True)
    assert_trees_close(run(x, "plain"), run(x, "xla"), tol=2e-5)
    text = str(jax.make_jaxpr(lambda x: f(x, "plain"))(x))
    assert "custom_jvp" not in text
    assert "remat" not in text


# ---- what is kept for the backward pass ----


@covering(
    strength=1,
    dtype=["bfloat16", "float32"],
    activation=[None, jax.nn.relu, jax.nn.gelu],
)
def test_residuals_are_the_input(dtype, activation):
    x = jnp.ones((64, 32, 32, 64), dtype)
    scale, bias = jnp.ones(64), jnp.zeros(64)

    def f(x, scale, bias):
        return bnjax.batch_norm(x, scale, bias, activation=activation, dtype=dtype)

    assert residual_bytes(f, x, scale, bias) <= 1.001 * x.nbytes


def test_residuals_with_residual_mask_and_frozen_statistics():
    x = jnp.ones((64, 32, 32, 64), jnp.bfloat16)
    scale = jnp.ones(64)
    mask = jnp.ones((64, 32, 32, 1), bool)

    def added(x, r):
        return bnjax.batch_norm(
            x, scale, residual=r, activation=jax.nn.relu, dtype=x.dtype
        )[0]

    assert residual_bytes(added, x, x) <= 2.001 * x.nbytes  # both inputs

    def masked(x, scale):
        return bnjax.batch_norm(x, scale, mask=mask, dtype=x.dtype)[0]

    assert residual_bytes(masked, x, scale) <= 1.001 * x.nbytes + mask.nbytes

    def frozen(x, scale):
        return bnjax.normalize(
            x, scale, scale, scale, activation=jax.nn.relu, dtype=x.dtype
        )

    assert residual_bytes(frozen, x, scale) <= 1.001 * x.nbytes


def test_backward_pass_holds_two_full_reductions():
    """S and T; the statistics are not computed again."""
    x, scale, bias, dy = case("float32")
    _, vjp = jax.vjp(lambda *a: bnjax.batch_norm(*a)[0], x, scale, bias)
    jaxpr = jax.make_jaxpr(vjp)(dy)
    full = [
        eqn
        for eqn in equations(jaxpr.jaxpr)
        if eqn.primitive.name == "reduce_sum" and eqn.invars[0].aval.shape == SHAPE
    ]
    assert len(full) == 2


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_no_full_size_float32_copy_on_the_cpu():
    """Each reduction of a bfloat16 input reads the input itself."""
    x = jnp.ones((16, 32, 32, 64), jnp.bfloat16)
    scale, bias = jnp.ones(64), jnp.zeros(64)

    def f(x, scale, bias, dy):
        y, vjp = jax.vjp(
            lambda *a: bnjax.batch_norm(*a, dtype=jnp.bfloat16)[0], x, scale, bias
        )
        return y, vjp(dy)

    text = compiled_text(f, x, scale, bias, x)
    entry = text[text.index("ENTRY") :]
    assert " f32[16,32,32,64]" not in entry


@by_default(None, "subsample", implementation=[None, "xla", "reread", "subsample"])
def test_bfloat16_gradient_below_an_activation_is_rounded_once(implementation):
    """The cotangent of the affine map is no bfloat16 value there."""
    x, scale, bias, dy = case("bfloat16", shape=(512, 3))

    def f(x, dtype):
        act = functools.partial(bnjax.batch_norm, activation=jnp.tanh, dtype=dtype)
        return act(x, scale, bias, implementation=implementation)[0]

    (dx,) = jax.vjp(lambda x: f(x, jnp.bfloat16), x)[1](dy)
    wide = (t.astype(jnp.float32) for t in (x, dy))
    x, dy = wide
    (expected,) = jax.vjp(lambda x: f(x, jnp.float32), x)[1](dy)
    np.testing.assert_array_equal(dx, expected.astype(jnp.bfloat16))


@pytest.mark.parametrize("implementation", [None, "xla", "reread", "subsample"])
@pytest.mark.parametrize("activation", [jax.nn.relu, jnp.tanh])
def test_bfloat16_gradient_with_a_residual(implementation, activation):
    """What the residual receives is rounded, and the layer may use that: ReLU's is."""
    x, scale, bias, dy = case("bfloat16", shape=(512, 3))
    residual = case("bfloat16", seed=3, shape=(512, 3))[0]

    def f(x, residual, dtype):
        options = {"activation": activation, "implementation": implementation}
        options |= {"residual": residual, "dtype": dtype}
        return bnjax.batch_norm(x, scale, bias, **options)[0]

    got = jax.vjp(lambda *a: f(*a, jnp.bfloat16), x, residual)[1](dy)
    wide = [t.astype(jnp.float32) for t in (x, residual)]
    exact = jax.vjp(lambda *a: f(*a, jnp.float32), *wide)[1](dy.astype(jnp.float32))
    for one, expected in zip(got, exact, strict=True):
        assert one.dtype == jnp.bfloat16
        if activation is jax.nn.relu:
            np.testing.assert_array_equal(one, expected.astype(jnp.bfloat16))
        else:  # two roundings of 2^-9, of the largest
            assert_close(one, np.asarray(expected), tol=2**-8, dtype=None)


GARBAGE = {
    "NaN": np.nan,
    "inf": np.inf,
    "-inf": -np.inf,
    "1e36": 1e36,
    "-1e36": -1e36,
    "max": 3.3e38,  # bfloat16 holds 3.39e38
    "min": -3.3e38,
    "denormal": 1e-40,
    "just beyond": 2e9,
}
MASKED = {
    "batch_norm": bnjax.batch_norm,
    "batch_renorm": lambda x, scale, bias, **kw: bnjax.renorm.batch_renorm(
        x, 0 * scale, 1 + 0 * scale, scale, bias, **kw
    ),
    "ghost_batch_norm": functools.partial(
        bnjax.ghost.ghost_batch_norm, virtual_batch_size=8
    ),
    "split_batch_norm": functools.partial(
        bnjax.split.split_batch_norm, num_splits=2, domain=np.arange(16) % 2
    ),
    "decorrelate": bnjax.whiten.decorrelate,
}


@covering(strength=1, function=MASKED, dtype=["float32", "bfloat16"])
def test_what_lies_under_a_mask_changes_no_gradient(function, dtype):
    """Whatever its value: of first and second order, of x, scale, bias and epsilon."""
    x, scale, bias, dy = case("float32", shape=(16, 5, 3))
    x, dy = (0.05 * x).astype(dtype), dy.astype(dtype)  # x over its std may overflow
    mask = mask_of((16, 5, 1))

    def loss(x, scale, bias, epsilon):
        y, _ = MASKED[function](x, scale, bias, mask=mask, epsilon=epsilon)
        return jnp.sum(jnp.where(mask, jnp.sin(y), 0) * dy)

    @jax.jit
    def derivatives(x, scale, bias):
        gradient = jax.grad(loss, argnums=(0, 1, 2, 3))

        def slope(scale, epsilon):
            return sum(jnp.sum(g) for g in gradient(x, scale, bias, epsilon)[1:])

        first = gradient(x, scale, bias, 1e-3)
        return first, jax.grad(slope, argnums=(0, 1))(scale, 1e-3)

    clean = derivatives(jnp.where(mask, x, 0), scale, bias)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(clean))
    for name, value in GARBAGE.items():
        found = derivatives(jnp.where(mask, x, jnp.asarray(value, dtype)), scale, bias)
        for one, expected in zip(jax.tree.leaves(found), jax.tree.leaves(clean)):
            np.testing.assert_array_equal(one, expected, name)


def test_frozen_statistics_cost_no_reduction_backward():
    """Nor does a missing gradient of scale and bias: a frozen backbone."""
    x, scale, bias, dy = case("float32")

    def f(x):
        return bnjax.normalize(x, scale, scale**2, scale, bias)

    jaxpr = jax.make_jaxpr(lambda x, dy: jax.vjp(f, x)[1](dy))(x, dy).jaxpr
    assert "reduce_sum" not in {eqn.primitive.name for eqn in equations(jaxpr)}


def test_nothing_is_stacked_on_one_device():
    """A collective carries several sums; without one, packing is kernels for nothing.

    XLA:CPU compiles and starts each of them: 20 % of Flax's compile time.
    """
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8, 5, 3)), jnp.float32)
    scale, bias = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)

    def loss(x, scale, bias):
        return bnjax.batch_norm(x, scale, bias)[0].sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    assert "stablehlo.pad" not in gradient.lower(x, scale, bias).as_text()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.device_put(x, NamedSharding(mesh, P("data")))
    assert "stablehlo.pad" in gradient.lower(x, scale, bias).as_text()

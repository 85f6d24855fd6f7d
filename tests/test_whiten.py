"""Whitening: its statistics, roots, transform, derivatives; the scaling of inputs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import (
    assert_close,
    assert_trees_close,
    by_default,
    covering,
    poison,
    residual_bytes,
)
from jax import lax
from jax.test_util import check_grads

import bnjax
from bnjax import whiten
from bnjax.whiten import CoMoments

SHAPE, SIZE = (5, 4, 7, 6), 3
METHODS = ["eigh", "newton_schulz", "cholesky"]


def case(dtype=np.float32, seed=0, shape=SHAPE, offset=0.5):
    """x with correlated features, scale, bias and a cotangent."""
    rng = np.random.default_rng(seed)
    features = shape[-1]
    mixing = np.eye(features) + 0.4 * rng.normal(size=(features, features))
    x = rng.normal(size=shape) @ mixing + offset * np.arange(1, features + 1)
    scale, bias = rng.normal(size=(2, features))
    dy = rng.normal(size=shape)
    return [jnp.asarray(v, dtype) for v in (x, scale, bias, dy)]


def mask_of(shape=SHAPE, seed=1):
    return np.random.default_rng(seed).random((*shape[:-1], 1)) < 0.6


def covariance_of(variances, seed=0):
    n = len(variances)
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))
    return (basis * np.asarray(variances)) @ basis.T


# Co-moments


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("dtype", "axis", "size"),
    [
        ("float32", -1, None),
        ("float32", 1, 2),
        ("bfloat16", -1, 3),
        ("float16", -1, 2),
        ("float64", 0, 1),
    ],
)
def test_co_moments(x64, dtype, axis, size, masked):
    x = jnp.moveaxis(case(dtype)[0], -1, axis)
    mask = np.moveaxis(mask_of(), -1, axis) if masked else None
    expected = oracle.co_moments(x, axis, size or 6, mask)
    if masked:
        x = poison(x, mask)
    found = whiten.co_moments(x, axis=axis, group_size=size, mask=mask)
    wide = "float64" if dtype == "float64" else "float32"
    for value, e in zip(found, expected):
        assert_close(value, e, dtype=wide)


@pytest.mark.parametrize("far", [1e4, 1e5])
def test_means_far_from_zero(far):
    """Many standard deviations, in float32; at 1e5 the mean's rounding shows."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(64, 9, 4)) @ (np.eye(4) + 0.3 * rng.normal(size=(4, 4)))
    x = (x + far * np.array([1.0, -1.1, 0.9, 1.3])).astype(np.float32)
    for f in (whiten.co_moments, jax.jit(whiten.co_moments)):
        count, mean, m2 = oracle.co_moments(x, -1, 4)
        found = f(x)
        assert_close(found.mean, mean, tol=1e-7)
        assert_close(found.covariance(), m2 / count, tol=1e-5)


def test_merge_is_that_of_the_concatenation(x64):
    x = np.asarray(case(np.float64)[0]).reshape(-1, 6)
    whole = whiten.co_moments(x, group_size=2)
    parts = [whiten.co_moments(p, group_size=2) for p in np.split(x, [1, 17, 50])]
    assert_trees_close(whiten.merge(*parts), whole)
    empty = CoMoments.empty(3, 2, jnp.float64)
    for with_nothing in ((empty, whole), (whole, empty), (empty, whole, empty)):
        assert_trees_close(whiten.merge(*with_nothing), whole)
    assert_trees_close(whiten.merge(empty, empty), empty)
    one = whiten.co_moments(x, group_size=1)
    assert_close(one.m2.ravel(), bnjax.moments(x).m2)
    assert_close(one.covariance(1).ravel(), bnjax.moments(x).variance(1))


def test_derivative_of_co_moments(x64):
    x = case(np.float64, shape=(5, 3, 4))[0]
    mask = mask_of((5, 3, 4))
    f = functools.partial(whiten.co_moments, group_size=2, mask=mask)
    check_grads(lambda x: f(x)[1:], (x,), order=2, modes=("fwd", "rev"))


def test_masked_values_do_not_reach_the_derivative_of_co_moments(x64):
    x, _, _, tangent = case(np.float64, shape=(5, 3, 4))
    mask = mask_of((5, 3, 4))

    f = functools.partial(whiten.co_moments, group_size=2, mask=mask)

    def derivatives(x):
        _, forward = jax.jvp(lambda x: f(x)[1:], (x,), (tangent,))
        return forward, jax.grad(lambda x: (f(x).m2 ** 2).sum())(x)

    assert_trees_close(derivatives(poison(x, mask)), derivatives(x), tol=1e-10)


# Inverse roots


@pytest.mark.parametrize("method", METHODS)
def test_roots(x64, method):
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(2, 3, 5, 8))
    covariances = factors @ np.swapaxes(factors, -1, -2) / 8
    found = whiten.inverse_sqrt(covariances, epsilon=0.1, method=method)
    for i, j in np.ndindex(2, 3):
        matrix = covariances[i, j] + 0.1 * np.eye(5)
        exact = oracle.inverse_root(matrix, method)
        assert_close(found[i, j], exact, tol=1e-10, dtype="float64")
        if method != "newton_schulz":
            whitened = found[i, j] @ matrix @ found[i, j].T
            assert_close(whitened, np.eye(5), tol=1e-10)


SPECTRA = {
    "distinct": [0.3, 1.0, 2.5, 4.0],
    "repeated": [0.5, 2.0, 2.0, 2.0],
    "multiple of I": [1.5, 1.5, 1.5, 1.5],
}


@pytest.mark.parametrize(
    ("method", "spectrum"),
    [("eigh", name) for name in SPECTRA] + [("cholesky", "repeated")],
)
def test_derivative_of_roots(x64, method, spectrum):
    """Against finite differences, in both modes and the second order."""
    covariance = jnp.stack([covariance_of(SPECTRA[spectrum]), np.eye(4)])
    if spectrum == "multiple of I":
        covariance = covariance.at[0].set(1.5 * jnp.eye(4))  # to the last bit
    f = functools.partial(whiten.inverse_sqrt, epsilon=0.0, method=method)
    check_grads(f, (covariance,), order=2, modes=("fwd", "rev"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spectrum", ["distinct", "repeated"])
def test_derivative_of_the_exact_root_is_exact(x64, spectrum):
    """S A S = I, differentiated: dS A S + S dA S + S A dS = 0."""
    a = jnp.asarray(covariance_of(SPECTRA[spectrum]))
    da = np.random.default_rng(4).normal(size=(4, 4))
    da = jnp.asarray(da + da.T)
    f = functools.partial(whiten.inverse_sqrt, epsilon=0.0)
    s, ds = jax.jvp(f, (a,), (da,))
    assert_close(ds @ a @ s + s @ a @ ds, -s @ da @ s, tol=1e-12)


@pytest.mark.parametrize(
    ("features", "spread", "iterations"),
    [(8, 1, 5), (8, 10, 7), (8, 100, 9), (8, 1000, 11), (64, 1, 7), (64, 1000, 13)],
)
def test_newton_schulz_comes_close(features, spread, iterations):
    """The table of the docstring; and it stays there, in float32."""
    variances = np.geomspace(1, spread, features)
    covariance = covariance_of(variances)
    exact = oracle.inverse_root(covariance)
    f = functools.partial(
        whiten.inverse_sqrt,
        covariance.astype(np.float32),
        epsilon=0.0,
        method="newton_schulz",
    )

    def error(iterations):
        found = np.asarray(f(iterations=iterations))
        return np.linalg.norm(found - exact) / np.linalg.norm(exact)

    assert error(iterations) < 1e-2
    if iterations > 5:
        assert error(5) > 1e-2
    assert error(iterations + 12) < 2e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [0, 2])
def test_singular_covariance(method, rank):
    """Finite with epsilon 0, whitened where there is variance; so are derivatives."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(rank, 6)).astype(np.float32)
    covariance = jnp.asarray(vectors.T @ vectors)
    f = functools.partial(whiten.inverse_sqrt, epsilon=0.0, method=method)
    f = functools.partial(f, iterations=20) if method == "newton_schulz" else f
    w = f(covariance)
    gradient = jax.grad(lambda c: jnp.sum(jnp.sin(f(c))))(covariance)
    assert np.isfinite(w).all()
    assert np.isfinite(gradient).all()
    projector = np.linalg.pinv(vectors) @ vectors
    whitened = vectors @ w.T
    if rank:
        if method == "cholesky":  # the Gram matrix of n whitened vectors is that of I
            whitened = whitened @ whitened.T
            projector = np.eye(rank)
        else:
            whitened = whitened.T @ whitened
        assert_close(whitened, projector, tol=2e-3)  # rounding over the clamp


# The transform


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("method", "dtype", "axis", "size"),
    [
        ("eigh", "float32", -1, None),
        ("eigh", "bfloat16", -1, 2),
        ("newton_schulz", "float64", 1, 3),
        ("cholesky", "float16", 2, 6),
    ],
)
def test_against_the_oracle(x64, dtype, axis, size, method, masked):
    x, scale, bias, _ = case(dtype)
    x = jnp.moveaxis(x, -1, axis)
    mask = np.moveaxis(mask_of(), -1, axis) if masked else None
    expected = oracle.decorrelate(x, scale, bias, axis, size or 6, mask, 1e-3, method)
    y, batch = whiten.decorrelate(
        poison(x, mask) if masked else x,
        scale,
        bias,
        axis=axis,
        group_size=size,
        mask=mask,
        epsilon=1e-3,
        method=method,
    )
    wide = "float64" if dtype == "float64" else "float32"
    for value, e in zip(batch, oracle.co_moments(x, axis, size or 6, mask)):
        assert_close(value, e, dtype=wide)
    assert y.dtype == dtype
    seen = np.broadcast_to(True if mask is None else mask, x.shape)
    assert np.isfinite(y).all()
    tol = {"float32": 1e-5, "float64": 1e-10}.get(dtype)
    y, expected = np.asarray(y)[seen], np.asarray(expected)[seen]
    assert_close(jnp.asarray(y), expected, tol=tol)


@pytest.mark.parametrize("method", ["eigh", "cholesky"])
def test_covariance_becomes_the_identity(method):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 9, 8)) @ (np.eye(8) + 0.2 * rng.normal(size=(8, 8)))
    x = (x + np.arange(8)).astype(np.float32)
    for f in (
        whiten.decorrelate,
        jax.jit(whiten.decorrelate, static_argnames="method"),
    ):
        y, _ = f(x, epsilon=0.0, method=method)
        count, mean, m2 = oracle.co_moments(y, -1, 8)
        assert_close(jnp.asarray(m2[0] / count), np.eye(8), tol=2e-5)
        assert np.abs(mean).max() < 1e-5


def test_zca_changes_least():
    """Among the whitenings, which are rotations R W of one another."""
    x = case(shape=(40, 9, 6))[0] * 0.3
    x = x - x.mean((0, 1), keepdims=True)
    zca = whiten.decorrelate(x, epsilon=0.0)[0]
    triangular = whiten.decorrelate(x, epsilon=0.0, method="cholesky")[0]
    assert jnp.sum((zca - x) ** 2) < 0.99 * jnp.sum((triangular - x) ** 2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("method", ["eigh", "cholesky"])
def test_groups_of_one_are_batch_normalization(method, masked):
    x, scale, bias, dy = case()
    mask = mask_of() if masked else None

    def run(f, **options):
        def loss(*args):
            y, _ = f(*args, mask=mask, residual=dy, activation=jnp.tanh, **options)
            return jnp.sum(y * dy), y

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(
            x, scale, bias
        )

    (_, y), grads = run(whiten.decorrelate, group_size=1, method=method)
    (_, y_), grads_ = run(bnjax.batch_norm)
    assert_close(y, y_, tol=3e-6)
    assert_trees_close(grads, jax.tree.map(np.asarray, grads_), tol=1e-5)


def plain(x, scale, bias, mask, method, size=SIZE, epsilon=1e-3):
    """The formula in jnp, for JAX to differentiate by itself."""
    weight = jnp.ones((*x.shape[:-1], 1)) if mask is None else mask + 0.0
    n, axes = weight.sum(), tuple(range(x.ndim - 1))
    mean = (weight * x).sum(axes) / n
    c = (x - mean).reshape(-1, x.shape[-1] // size, size)
    covariance = jnp.einsum("ngi,ngj->gij", weight.reshape(-1, 1, 1) * c, c) / n
    a = covariance + epsilon * jnp.eye(size)
    if method == "eigh":
        values, vectors = jnp.linalg.eigh(a)
        w = (vectors / jnp.sqrt(values)[:, None]) @ jnp.swapaxes(vectors, 1, 2)
    elif method == "cholesky":
        w = jnp.linalg.inv(jnp.linalg.cholesky(a))
    else:
        trace = jnp.trace(a, axis1=1, axis2=2)[:, None, None]
        w = jnp.eye(size)[None]
        for _ in range(5):
            w = (3 * w - w @ w @ w @ (a / trace)) / 2
        w = w / jnp.sqrt(trace)
    y = jnp.einsum("gij,ngj->ngi", w, c).reshape(x.shape)
    return y * scale + bias, (mean, covariance * n)


@covering(strength=1, method=METHODS, masked=[True, False])
def test_gradients_are_those_of_the_plain_formula(x64, method, masked):
    """Through y and the co-moments: both modes, and unmasked the second order."""
    x, scale, bias, dy = case(np.float64)
    mask = mask_of() if masked else None
    options = {"group_size": SIZE, "epsilon": 1e-3, "method": method, "mask": mask}

    def ours(x, scale, bias):
        y, batch = whiten.decorrelate(x, scale, bias, **options)
        return y, batch[1:]

    def loss(f, *args):
        y, (mean, m2) = f(*args)
        seen = jnp.sin(y) * (1 if mask is None else mask)
        return jnp.sum(seen * dy) + jnp.sum(mean**2) + jnp.sum(jnp.cos(m2 / 50))

    theirs = functools.partial(plain, mask=mask, method=method)
    arguments, tangents = (x, scale, bias), (dy, bias, scale)

    def derivatives(f):
        """Forward; reverse; forward and reverse over reverse."""
        of = functools.partial(loss, f)

        def along(*args):
            products = jax.tree.map(jnp.vdot, jax.grad(of, (0, 1, 2))(*args), tangents)
            return sum(products)

        def run(*args):
            forward = jax.jvp(of, args, tangents)
            if masked:
                return forward, jax.grad(of, (0, 1, 2))(*args)
            again = jax.jvp(jax.grad(of, (0, 1, 2)), args, tangents)
            return forward, again, jax.grad(along, (0, 1, 2))(*args)

        return jax.jit(run)(*arguments)

    with jax.numpy_rank_promotion("allow"):
        expected = derivatives(theirs)
    assert_trees_close(derivatives(ours), jax.tree.map(np.asarray, expected), tol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_masked_has_no_influence(method):
    x, scale, bias, dy = case()
    mask = mask_of()
    dy = dy * mask

    @jax.jit
    def run(x):
        def loss(x, scale, bias):
            y, batch = whiten.decorrelate(
                x, scale, bias, mask=mask, method=method, group_size=2
            )
            return jnp.sum(y * dy) + jnp.sum(batch.m2), batch

        return jax.grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)

    expected = jax.tree.map(np.asarray, run(np.where(mask, x, 0)))
    for garbage in (np.nan, 1e30):
        assert_trees_close(run(poison(x, mask, garbage)), expected, tol=1e-6)
    assert (np.asarray(expected[0][0])[~mask[..., 0]] == 0).all()


@covering(strength=1, method=METHODS, how=["no rows", "all masked"])
def test_nothing_valid_falls_back(method, how):
    x, scale, bias, dy = case()
    mask = np.zeros((5, 1, 1, 1), bool)
    if how == "no rows":
        x, dy, mask = x[:0], dy[:0], None
    mean = np.arange(6, dtype=np.float32)
    covariance = np.stack([covariance_of([1.0, 2, 3], seed) for seed in (0, 1)])
    covariance = covariance.astype(np.float32)

    def loss(x, fallback, f):
        y, batch = f(x, fallback)
        return jnp.sum(y * dy), (y, batch)

    def empty(x, fallback):
        return whiten.decorrelate(
            x, scale, bias, group_size=3, mask=mask, method=method, fallback=fallback
        )

    def given(x, fallback):
        fallback = fallback or (0 * mean, np.stack([np.eye(3)] * 2))
        return whiten.whiten_by(x, *fallback, scale, bias, method=method), None

    for fallback in (None, (mean, covariance)):
        run = functools.partial(jax.grad(loss, has_aux=True), x, fallback)
        (dx, (y, batch)), (dx_, (y_, _)) = run(empty), run(given)
        assert_close(y, np.asarray(y_))
        assert_close(dx, np.asarray(dx_))
        assert batch.count == 0
        assert (batch.m2 == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_fewer_positions_than_features(method):
    """Values and gradients are finite, the exact ones of rank - 1 dimensions."""
    x, scale, bias, dy = case(shape=(5, 12))
    mask = np.array([[True]] * 4 + [[False]])

    def loss(x, mask, epsilon):
        y, _ = whiten.decorrelate(
            x, scale, bias, mask=mask, epsilon=epsilon, method=method
        )
        return jnp.sum(jnp.sin(y) * dy), y

    run = jax.jit(jax.grad(loss, has_aux=True))
    for epsilon, keep in ((1e-5, None), (1e-5, mask), (0.0, None)):
        gradient, y = run(x, keep, epsilon)
        assert np.isfinite(gradient).all()
        assert np.isfinite(y).all()


def test_whiten_by_is_the_transform_of_the_same_statistics():
    x, scale, bias, residual = case()
    options = {"epsilon": 1e-3, "residual": residual, "activation": jax.nn.relu}
    y, batch = whiten.decorrelate(x, scale, bias, group_size=3, **options)
    given = whiten.whiten_by(x, batch.mean, batch.covariance(), scale, bias, **options)
    assert_close(given, np.asarray(y))
    assert (np.asarray(y) >= 0).all()
    exact = oracle.whiten(
        x, batch.mean, batch.covariance(), scale, bias, -1, epsilon=1e-3
    )
    assert_close(given, np.maximum(exact + np.asarray(residual), 0), tol=1e-5)
    low = whiten.whiten_by(x, batch.mean, batch.covariance(), dtype=jnp.bfloat16)
    assert low.dtype == jnp.bfloat16


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_stored_is_the_input(method, dtype):
    x, scale, bias, residual = case(dtype, shape=(16, 20, 18, 8))

    def f(x, scale, bias):
        return whiten.decorrelate(
            x, scale, bias, group_size=4, method=method, activation=jax.nn.gelu
        )

    assert residual_bytes(f, x, scale, bias) <= 1.1 * x.nbytes
    both = functools.partial(whiten.decorrelate, residual=residual, method=method)
    assert residual_bytes(both, x, scale, bias) <= 2.1 * x.nbytes


@pytest.mark.parametrize("method", METHODS)
def test_the_backward_pass_decomposes_nothing(method):
    """What is dear is computed once: it is kept by name."""
    x, scale, bias, dy = case()

    def loss(x):
        return jnp.sum(whiten.decorrelate(x, scale, bias, method=method)[0] * dy)

    text = str(jax.make_jaxpr(jax.grad(loss))(x))
    assert len(re.findall("= eigh", text)) == (method == "eigh")
    assert len(re.findall("= cholesky", text)) == (method == "cholesky")


@by_default("newton_schulz", method=METHODS)
def test_transformations(method):
    """vmap, scan, remat and jit give what plain calls do, derivatives included."""
    batches = jnp.stack([case(seed=s, shape=(9, 4))[0] for s in range(3)])
    _, scale, bias, dy = case(shape=(9, 4))

    def gradient(x):
        def loss(x):
            y, batch = whiten.decorrelate(x, scale, bias, group_size=2, method=method)
            return jnp.sum(y * dy), (y, batch)

        return jax.grad(loss, has_aux=True)(x)

    expected = [gradient(x) for x in batches]
    expected = jax.tree.map(lambda *v: np.stack(v), *expected)
    scanned = jax.jit(lambda: lax.scan(lambda c, x: (c, gradient(x)), 0, batches)[1])()
    assert_trees_close(scanned, expected, tol=1e-5)
    assert_trees_close(jax.vmap(gradient)(batches), expected, tol=1e-5)
    again = jax.vmap(jax.checkpoint(gradient))(batches)
    assert_trees_close(again, expected, tol=1e-5)


def test_no_retrace():
    traced = []

    @functools.partial(jax.jit, static_argnames="method")
    def f(x, scale, bias, epsilon, mask, method):
        traced.append(method)
        options = {"epsilon": epsilon, "mask": mask, "method": method}
        return whiten.decorrelate(x, scale, bias, **options)

    x, scale, bias, _ = case()
    for method in METHODS:
        for epsilon in (1e-5, 1e-3):
            f(x + epsilon, scale, bias, epsilon, mask_of(), method)
    assert traced == METHODS


# Errors

X, V6 = np.ones(SHAPE, np.float32), np.ones(6, np.float32)
C = np.stack([np.eye(3, dtype=np.float32)] * 2)


def given(mean=V6, covariance=C, **options):
    return lambda: whiten.whiten_by(X, mean, covariance, **options)


def batch(x=X, **options):
    return lambda: whiten.decorrelate(x, **options)


ERRORS = {
    "integers": (batch(X.astype(int)), TypeError, "x has dtype int.*floating"),
    "complex": (batch(X + 1j), TypeError, "x has dtype complex.*real.*x.imag"),
    "complex moments": (lambda: whiten.co_moments(X * 1j), TypeError, "x has dtype"),
    "complex scale": (batch(scale=V6 * 1j), TypeError, "scale has dtype complex"),
    "complex dtype": (batch(dtype="complex64"), TypeError, "dtype=complex64.*real one"),
    "complex mean": (given(mean=V6 * 1j), TypeError, "mean has dtype complex"),
    "several axes": (
        batch(axis=(1, 3)),
        ValueError,
        r"axis=\(1, 3\) names 2 axes: expected one feature axis.*Reshape",
    ),
    "axis out of range": (batch(axis=4), ValueError, "axis=4 is out of range"),
    "group size": (
        batch(group_size=4),
        ValueError,
        r"group_size=4 does not divide the 6 features.*\(5, 4, 7, 6\).*Write gr",
    ),
    "group size of zero": (batch(group_size=0), ValueError, "group_size=0 does not"),
    "mask by feature": (
        batch(mask=np.ones((7, 6), bool)),
        ValueError,
        r"mask has shape \(7, 6\), which varies along the feature axis 3.*"
        r"Write mask.all\(axis=3, keepdims=True\)",
    ),
    "mask of another shape": (
        batch(mask=np.ones(5, bool)),
        ValueError,
        "mask has shape",
    ),
    "method": (
        batch(method="zca"),
        ValueError,
        r"method='zca' is unknown: expected one of \['eigh'.*Write method='eigh'",
    ),
    "iterations": (batch(iterations=0), ValueError, "iterations=0.*at least one"),
    "epsilon": (batch(epsilon=-1.0), ValueError, "epsilon=-1.0 is added"),
    "epsilon given": (given(epsilon=-1.0), ValueError, "epsilon=-1.0 is added"),
    "scale": (batch(scale=V6[:4]), ValueError, r"scale has shape \(4,\)"),
    "residual": (batch(residual=X[0]), ValueError, "residual has shape"),
    "activation": (batch(activation=3), TypeError, "activation=3 is not callable"),
    "dtype": (batch(dtype=int), ValueError, "dtype=int"),
    "axis name": (batch(axis_name="i"), ValueError, "axis_name='i' is not bound"),
    "groups": (batch(axis_index_groups=[[0]]), ValueError, "without axis_name"),
    "fallback": (
        batch(fallback=(V6, C)),
        ValueError,
        r"covariance has shape \(2, 3, 3\): expected \(1, 6, 6\).*Write group_size",
    ),
    "mean": (given(mean=V6[:3]), ValueError, r"mean has shape \(3,\)"),
    "covariance": (
        given(covariance=C[0]),
        ValueError,
        r"covariance has shape \(3, 3\).*Write covariance\[None\]",
    ),
    "groups of covariance": (
        given(covariance=C[:1]),
        ValueError,
        r"covariance has shape \(1, 3, 3\): expected \(2, 3, 3\)",
    ),
    "no squares": (
        lambda: whiten.inverse_sqrt(X),
        ValueError,
        r"covariance has shape \(5, 4, 7, 6\): expected square.*jnp.diag",
    ),
    "range": (
        lambda: whiten.min_max_scale(low=1.0, high=1.0),
        ValueError,
        "low=1.0 and high=1.0.*low < high",
    ),
    "epsilon of inputs": (
        lambda: whiten.zca_whiten(epsilon=-1.0),
        ValueError,
        "epsilon=-1.0",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    run, kind, message = ERRORS[name]
    with pytest.raises(kind, match=f"(?s){message}"):
        run()


def test_one_position_warns():
    x = np.arange(6, dtype=np.float32)[None]
    with pytest.warns(bnjax.BatchNormWarning, match="one value per feature"):
        y, _ = whiten.decorrelate(x, group_size=2)
    assert (np.asarray(y) == 0).all()


# Scaling of inputs

SCALERS = {
    "standardize": whiten.standardize(),
    "unbiased": whiten.standardize(ddof=1),
    "min_max_scale": whiten.min_max_scale(low=-1.0, high=3.0),
    "zca_whiten": whiten.zca_whiten(epsilon=0.0),
    "zca_whiten in groups": whiten.zca_whiten(epsilon=1e-3, group_size=2),
}


def scaled(name, x):
    """What `name` makes of the rows `x`, in float64."""
    x = np.asarray(x, np.float64)
    if name == "min_max_scale":
        low, high = x.min(0), x.max(0)
        return (x - low) / (high - low) * 4 - 1
    if name.startswith("zca"):
        groups, epsilon = (2, 1e-3) if name.endswith("groups") else (6, 0)
        return oracle.decorrelate(x, np.ones(6), np.zeros(6), -1, groups, None, epsilon)
    return (x - x.mean(0)) / x.std(0, ddof=int(name == "unbiased"))


@covering(strength=1, name=SCALERS, masked=[True, False])
def test_scalers(name, masked):
    fit, apply, invert = SCALERS[name]
    x = case()[0]
    mask = mask_of() if masked else np.ones((*SHAPE[:-1], 1), bool)
    state = jax.jit(fit)(poison(x, mask), mask) if masked else fit(x)
    rows = np.asarray(x)[mask[..., 0]]
    y = jax.jit(apply)(state, rows)
    assert_close(y, scaled(name, rows), tol=2e-5, dtype="float32")
    assert_close(invert(state, y), rows, tol=1e-5)
    assert_close(invert(state, apply(state, x)), np.asarray(x), tol=1e-5)


@by_default("min_max_scale", "zca_whiten", name=SCALERS)
def test_constant_features(name):
    """Also one that float32 does not hold exactly, and that is large."""
    fit, apply, invert = SCALERS[name]
    x = np.asarray(case(shape=(9, 6))[0]).copy()
    x[:, 2], x[:, 5] = 0.1, -12345.678
    state = fit(x)
    y = apply(state, x)
    assert np.isfinite(y).all()
    assert_close(invert(state, y), x, tol=1e-5)
    flat = -1.0 if name == "min_max_scale" else 0.0
    tolerance = 2e-2 if name.startswith("zca") else 0
    assert np.abs(np.asarray(y)[:, [2, 5]] - flat).max() <= tolerance


@by_default("standardize", "zca_whiten in groups", name=SCALERS)
def test_nothing_to_fit_to(name):
    fit, apply, invert = SCALERS[name]
    x = case(shape=(9, 6))[0]
    with pytest.raises(ValueError, match=r"x has shape \(0, 6\), without a value"):
        fit(x[:0])
    with pytest.raises(TypeError, match="x has dtype int32"):
        fit(x.astype(int))
    state = fit(x, np.zeros((9, 1), bool))
    assert_close(invert(state, apply(state, x)), np.asarray(x), tol=1e-5)
    with pytest.raises(ValueError, match=r"has shape \(6,\): expected \(4,\)|does not"):
        apply(state, x[:, :4])


def test_scalers_of_other_axes():
    x = case()[0]
    first = jnp.moveaxis(x, -1, 1)
    for make in (whiten.standardize, whiten.min_max_scale, whiten.zca_whiten):
        expected = make().apply(make().fit(x), x)
        scaler = make(axis=1)
        found = scaler.apply(scaler.fit(first), first)
        assert_close(found, np.moveaxis(expected, -1, 1), tol=1e-5)
    two = whiten.standardize(axis=(1, 3))
    y = np.asarray(two.apply(two.fit(x), x), np.float64)
    assert_close(jnp.asarray(y.mean((0, 2))) + 1, np.ones((4, 6)), tol=1e-5)
    assert_close(jnp.asarray(y.std((0, 2))), np.ones((4, 6)), tol=1e-5)


def test_missing_values():
    x = np.asarray(case(shape=(30, 6))[0]).copy()
    x[3, 1], x[7, 4] = np.nan, np.nan
    for scaler in (whiten.standardize(), whiten.min_max_scale()):
        state = scaler.fit(x, ~np.isnan(x))
        full = np.delete(x[:, 1], 3)
        expected = scaler.apply(scaler.fit(full[:, None]), full[:, None])
        assert_close(np.delete(scaler.apply(state, x)[:, 1], 3), expected[:, 0])
    with pytest.raises(ValueError, match="varies along the feature axis 1"):
        whiten.zca_whiten().fit(x, ~np.isnan(x))


def test_many_sets_merged_into_one():
    """As of Moments: the covariance does not follow the rounded count."""
    k, n = 100_000, 4000.0
    cov = np.array([[[2.0, 0.6], [0.6, 0.5]]], np.float32)
    rng = np.random.default_rng(0)
    spread = rng.chisquare(n - 1, (k, 1, 1, 1)) / n
    rows = whiten.CoMoments(
        np.full(k, n, np.float32),
        np.float32([3, -1]) + rng.normal(size=(k, 2)).astype(np.float32) * 0.02,
        np.float32(n * spread * cov),
    )
    start = whiten.CoMoments.empty(1, 2)

    def step(total, batch):
        return whiten.merge(total, batch), None

    merged = jax.jit(lambda rows: jax.lax.scan(step, start, rows)[0])(rows)
    mean = rows.mean.astype(np.float64)
    d = mean - mean.mean(0)
    expected = spread.mean(0) * cov + d.T @ d / k
    assert_close(merged.covariance(), expected, tol=1e-4)
    assert_close(merged.mean, mean.mean(0), tol=1e-4)


def test_counts_of_narrow_dtypes():
    one = whiten.CoMoments(np.uint8(200), np.ones(2, np.float32), jnp.ones((1, 2, 2)))
    merged = whiten.merge(one, one)
    assert merged.count == 400
    assert_close(merged.covariance(), np.full((1, 2, 2), 0.005))

"""What papers prove of batch normalization holds of `batch_norm`, in float64.

Santurkar et al. 2018, theorems 4.1 and 4.2: bounds as they print them, equalities here,
because the loss is the same function of what is normalized and of what is not. Ioffe &
Szegedy 2015, section 3.3.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

import bnjax

SHAPE, AXES = (6, 4, 5, 3), (0, 1, 2)
M = 6 * 4 * 5
FEATURES = range(SHAPE[-1])


@pytest.fixture
def case(x64):
    """Inputs y, scale and bias; and a loss whose Hessian has no zeros."""
    rng = np.random.default_rng(0)
    y = 2 * rng.normal(size=SHAPE) + np.array([0.5, -3, 8])
    scale, bias = np.array([0.7, -1.3, 2.0]), rng.normal(size=3)
    weights = jnp.asarray(rng.normal(size=(y[0].size, 7)) / 4)

    def loss(z):
        return 9 * jax.nn.logsumexp(z.reshape(len(z), -1) @ weights)

    return jnp.asarray(y), jnp.asarray(scale), jnp.asarray(bias), loss


def normalized(y, scale, bias, epsilon):
    return bnjax.batch_norm(y, scale, bias, epsilon=epsilon)[0]


def parts(case, epsilon):
    """g = dL/dz and d(loss of the normalized network)/dy; x_hat, and q and s."""
    y, scale, bias, loss = case
    g = jax.grad(loss)(normalized(y, scale, bias, epsilon))
    gradient = jax.grad(lambda y: loss(normalized(y, scale, bias, epsilon)))(y)
    y = np.asarray(y)
    var = y.var(AXES)
    s = np.sqrt(var + epsilon)
    return np.asarray(g), np.asarray(gradient), (y - y.mean(AXES)) / s, var / s**2, s


def squared(v):
    return (np.asarray(v) ** 2).sum(AXES)


@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 1.5])
def test_the_gradient_is_as_much_smaller_as_theorem_4_1_has_it(case, epsilon):
    """With q = var/(var + epsilon), which is 1 in the paper:

    |dLhat/dy|^2 = scale^2/s^2 (|g|^2 - <1, g>^2/m - (2 - q) <g, x_hat>^2/m)
    """
    scale = np.asarray(case[1])
    g, gradient, x_hat, q, s = parts(case, epsilon)
    along_ones = g.sum(AXES) ** 2 / M
    along_x = (2 - q) * (g * x_hat).sum(AXES) ** 2 / M
    assert (along_ones > 1e-3 * squared(g)).all()  # or the terms are not tested
    assert (along_x > 1e-3 * squared(g)).all()
    expected = scale**2 / s**2 * (squared(g) - along_ones - along_x)
    assert_close(squared(gradient), expected)


@pytest.mark.parametrize("feature", FEATURES)
def test_the_curvature_is_as_much_smaller_as_theorem_4_2_has_it(case, feature):
    """With v = dLhat/dy of one feature, and epsilon 0:

    v' Hhat v = scale^2/var v' H v - scale/(m var) <g, x_hat> |v|^2
    """
    y, scale, bias, loss = case
    g, gradient, x_hat, _, s = parts(case, 0.0)
    v = jnp.asarray(np.where(np.arange(3) == feature, gradient, 0))

    def curvature(f, at):
        return jnp.vdot(v, jax.jvp(jax.grad(f), (at,), (v,))[1])

    of_z = curvature(loss, normalized(y, scale, bias, 0.0))
    actual = curvature(lambda y: loss(normalized(y, scale, bias, 0.0)), y)
    factor = (np.asarray(scale) / s**2)[feature]
    first = np.asarray(scale)[feature] * factor * of_z
    second = factor / M * (g * x_hat)[..., feature].sum() * jnp.vdot(v, v)
    assert min(abs(first), abs(second)) > 1e-3 * abs(actual)
    assert_close(actual, np.asarray(first - second))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("a", [15.0, 0.25, np.array([3.0, 0.5, 15.0])], ids=str)
def test_the_scale_of_the_weights_is_nothing(a):
    """Section 3.3, a scalar in the paper and a number for each unit here:

    BN((aW)u) = BN(Wu),   dBN((aW)u)/du = dBN(Wu)/du,
    dBN((aW)u)/d(aW) = 1/a dBN(Wu)/dW
    """
    rng = np.random.default_rng(1)
    u, w = jnp.asarray(rng.normal(size=(7, 4))), jnp.asarray(rng.normal(size=(4, 3)))
    scale, bias = jnp.asarray(rng.normal(size=(2, 3)))
    a = jnp.broadcast_to(jnp.asarray(a), (4, 3))

    def layer(u, w):
        return normalized(u @ w, scale, bias, 0.0)

    assert_close(layer(u, a * w), np.asarray(layer(u, w)))
    for jacobian in (jax.jacrev, jax.jacfwd):
        derivative = jax.jit(jacobian(layer, (0, 1)))
        (of_u, of_w), (again_u, again_w) = derivative(u, w), derivative(u, a * w)
        assert_close(again_u, np.asarray(of_u))
        assert_close(again_w, np.asarray(of_w) / np.asarray(a))
        # So no step along the gradient shortens the weights of a unit.
        assert abs(np.einsum("nfif,if->nf", of_w, w)).max() < 1e-12
        assert abs(np.einsum("nfif->nf", of_w)).max() > 1e-3

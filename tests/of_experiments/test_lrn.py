"""Local response normalization, and its gradient, against loops in float64."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from experiments.common.models import lrn
from experiments.common.models.lrn import local_response_norm

pytestmark = pytest.mark.experiment

# Strong enough that every term shows; those of the paper change the third digit.
STRONG = {"size": 5, "k": 0.7, "alpha": 0.3, "beta": 0.75}
PAPER = {"size": 5, "k": 2.0, "alpha": 1e-4, "beta": 0.75}
NARROW = {"size": 3, "k": 1.0, "alpha": 0.5, "beta": 0.5}
WIDE = {"size": 9, "k": 0.5, "alpha": 2.0, "beta": 1.5}  # wider than the channels
ALONE = {"size": 1, "k": 0.1, "alpha": 1.0, "beta": 1.0}


def neighbours(channels: int, size: int, i: int) -> range:
    return range(max(0, i - size // 2), min(channels - 1, i + size // 2) + 1)


def divisors(x, size, k, alpha):
    """The sums of one position, k included; x (channel,)."""
    return np.array(
        [
            k + alpha * sum(x[j] ** 2 for j in neighbours(len(x), size, i))
            for i in range(len(x))
        ]
    )


def oracle(x, size, k, alpha, beta):
    rows = x.reshape(-1, x.shape[-1])
    found = [row / divisors(row, size, k, alpha) ** beta for row in rows]
    return np.reshape(found, x.shape)


def gradient(x, g, size, k, alpha, beta):
    """Of sum(g y), by the derivative of each y_i by each x_j, at one position."""
    d = divisors(x, size, k, alpha)
    found = g / d**beta
    for i in range(len(x)):
        for j in neighbours(len(x), size, i):
            found[j] -= g[i] * x[i] * beta * d[i] ** (-beta - 1) * 2 * alpha * x[j]
    return found


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(2, 3, 2, 7))


@pytest.mark.parametrize("options", [STRONG, PAPER, NARROW, WIDE, ALONE])
@pytest.mark.usefixtures("x64")
def test_against_loops(x, options):
    assert_close(
        jax.jit(lambda v: local_response_norm(v, **options))(x), oracle(x, **options)
    )


@pytest.mark.parametrize("options", [STRONG, NARROW, WIDE, ALONE])
@pytest.mark.usefixtures("x64")
def test_gradient(x, options):
    row, g = x[0, 0]
    found = jax.grad(lambda v: g @ local_response_norm(v, **options))(row)
    assert_close(found, gradient(row, g, **options))


@pytest.mark.usefixtures("x64")
def test_defaults_are_those_of_the_paper(x):
    assert_close(local_response_norm(100 * x), oracle(100 * x, **PAPER))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(x, dtype):
    values = jnp.asarray(50 * x, dtype)
    expected = oracle(np.asarray(values, np.float64), **PAPER)
    tol = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 5e-4}[dtype]  # one rounding
    assert_close(local_response_norm(values), expected, dtype=dtype, tol=tol)


def test_squares_do_not_overflow_in_half_precision():
    found = local_response_norm(jnp.full(5, 3e4, jnp.float16))
    assert np.isfinite(np.asarray(found)).all()


@pytest.mark.parametrize("size", [0, 4, -1])
def test_even_sizes_are_refused(size):
    with pytest.raises(ValueError, match=f"size is {size}: expected an odd number"):
        local_response_norm(np.ones(5, np.float32), size=size)


def test_example():
    assert doctest.testmod(lrn).failed == 0
    assert doctest.testmod(lrn).attempted == 1

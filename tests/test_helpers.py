"""The detectors detect."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import assert_close, assert_trees_close, collectives, residual_bytes

GOOD = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float32)


@pytest.mark.parametrize(
    "wrong",
    [
        GOOD * 1.01,
        np.where(GOOD == 3, np.nan, GOOD),
        np.where(GOOD == 3, np.inf, GOOD),
        GOOD[:1],
        GOOD.T,
        GOOD[..., None],
    ],
)
def test_assert_close_rejects(wrong):
    assert_close(jnp.asarray(GOOD), GOOD, dtype="float32")
    with pytest.raises(AssertionError):
        assert_close(jnp.asarray(wrong), GOOD)


def test_assert_close_rejects_dtype_and_nan_expected():
    with pytest.raises(AssertionError, match="is not float32"):
        assert_close(jnp.asarray(GOOD, jnp.bfloat16), GOOD, dtype="float32")
    nan = np.full(3, np.nan)
    with pytest.raises(AssertionError, match="expected value is not finite"):
        assert_close(jnp.asarray(nan), nan)


def test_assert_trees_close_rejects_another_tree():
    with pytest.raises(AssertionError):
        assert_trees_close({"a": jnp.ones(3)}, {"b": np.ones(3)})


def test_measures_measure():
    x = jnp.ones((5, 3))
    assert residual_bytes(jnp.sin, x) == x.nbytes
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    total = jax.shard_map(
        lambda t: jax.lax.psum(t, "data"),
        mesh=mesh,
        in_specs=jax.P("data"),
        out_specs=jax.P(),
    )
    assert collectives(total, jnp.ones((8, 3))) == {"all-reduce": 1}
    assert collectives(jnp.sin, x) == {}


def test_oracle_gradients_are_those_of_the_oracle():
    """Central differences of the float64 oracle, mask included."""
    rng = np.random.default_rng(0)
    x, scale, bias = rng.normal(size=(5, 4, 3)), rng.normal(size=3), rng.normal(size=3)
    mask = rng.random((5, 4, 1)) < 0.6
    dy = rng.normal(size=x.shape)
    args = [x, scale, bias]

    def loss(*args):
        return (oracle.batch_norm(*args, axes=(0, 1), mask=mask) * dy).sum()

    exact = oracle.batch_norm_gradients(x, scale, dy, (0, 1), mask)
    for i, gradient in enumerate(exact):
        for index in list(np.ndindex(gradient.shape))[::7]:
            sides = []
            for sign in (1, -1):
                moved = [a.copy() for a in args]
                moved[i][index] += sign * 1e-5
                sides.append(loss(*moved))
            numeric = (sides[0] - sides[1]) / 2e-5
            assert abs(numeric - gradient[index]) < 1e-6

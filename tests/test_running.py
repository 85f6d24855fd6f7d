"""Running statistics: closed forms, empty and non-finite batches, transforms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_trees_close

import bnjax
from bnjax import Moments, running

MEANS = np.array([[1.0, -2.0, 0.5], [4.0, 0.0, 0.5], [-1.0, 3.0, 2.0], [0.0, 1.0, 7.0]])
M2 = np.array([[8.0, 2.0, 4.0], [16.0, 1.0, 0.0], [2.0, 6.0, 5.0], [3.0, 3.0, 1.0]])
COUNT = 5.0
RULES = {
    "ema": running.ema(0.9),
    "debiased_ema": running.debiased_ema(0.9),
    "cumulative": running.cumulative(),
}


def batches():
    return Moments(jnp.full(4, COUNT), jnp.asarray(MEANS), jnp.asarray(M2))


def run(rule, stacked):
    def step(state, batch):
        return rule.update(state, batch), None

    start = rule.init((3,))
    return rule.read(jax.jit(lambda b: jax.lax.scan(step, start, b)[0])(stacked))


@pytest.mark.parametrize("ddof", [0, 1])
def test_closed_forms(ddof):
    var = M2 / (COUNT - ddof)
    weights = 0.1 * 0.9 ** np.arange(3, -1, -1)
    state = run(running.ema(0.9, ddof=ddof), batches())
    assert_close(state.mean, weights @ MEANS)
    assert_close(state.var, weights @ var + 0.9**4)
    state = run(running.debiased_ema(0.9, ddof=ddof), batches())
    assert_close(state.mean, weights @ MEANS / (1 - 0.9**4))
    assert_close(state.var, weights @ var / (1 - 0.9**4))
    state = run(running.cumulative(ddof=ddof), batches())
    assert_close(state.mean, MEANS.mean(0))
    assert_close(state.var, var.mean(0))


@pytest.mark.parametrize("name", RULES)
def test_nothing_seen_reads_the_standard_normal(name):
    rule = RULES[name]
    state = rule.read(rule.init((3,)))
    assert_trees_close(state, running.State(np.zeros(3), np.ones(3)))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999, 0.999999])
def test_debiased_after_one_batch_is_that_batch(decay):
    rule = running.debiased_ema(decay)
    batch = Moments(jnp.array(COUNT), jnp.asarray(MEANS[0]), jnp.asarray(M2[0]))
    state = rule.read(rule.update(rule.init((3,)), batch))
    assert_trees_close(state, running.State(MEANS[0], M2[0] / COUNT))


@pytest.mark.parametrize("name", RULES)
def test_an_empty_batch_changes_nothing(name):
    rule = RULES[name]
    state = rule.update(rule.init((3,)), jax.tree.map(lambda t: t[0], batches()))
    after = rule.update(state, Moments.empty((3,)))
    assert_trees_close(after, jax.tree.map(np.asarray, state))


@pytest.mark.parametrize("name", RULES)
def test_a_feature_without_values_keeps_its_statistics(name):
    """And its own number of batches."""
    rule = RULES[name]
    count = jnp.array([[5.0, 5, 5], [5, 0, 5], [5, 0, 5], [5, 5, 5]])
    state = run(rule, batches()._replace(count=count))
    everything = run(rule, batches())
    two = jax.tree.map(lambda t: t[jnp.array([0, 3])], batches())
    only_two = run(rule, two)
    pick = np.array([False, True, False])
    expected = jax.tree.map(lambda a, b: np.where(pick, a, b), only_two, everything)
    assert_trees_close(state, expected)


@pytest.mark.parametrize(
    "build", [running.ema, running.debiased_ema, running.cumulative]
)
def test_one_value_has_no_unbiased_variance(build):
    batch = Moments(jnp.array(1.0), jnp.ones(3), jnp.zeros(3))
    rule = build(ddof=1)
    start = rule.init((3,))
    jax.tree.map(np.testing.assert_array_equal, rule.update(start, batch), start)
    rule = build(ddof=0)
    assert (rule.read(rule.update(rule.init((3,)), batch)).var < 1).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("field", ["mean", "m2"])
@pytest.mark.parametrize(
    "build", [running.ema, running.debiased_ema, running.cumulative]
)
def test_nonfinite_batches_are_skipped_when_asked(build, field, bad):
    poisoned = batches()
    value = getattr(poisoned, field).at[2, 1].set(bad)
    poisoned = poisoned._replace(**{field: value})
    kept = jax.tree.map(lambda t: t[jnp.array([0, 1, 3])], batches())
    skipped = run(build(skip_nonfinite=True), poisoned)
    assert_trees_close(skipped, jax.tree.map(np.asarray, run(build(), kept)))
    through = run(build(), poisoned)
    assert not np.isfinite(np.asarray(through)).all()


def test_matches_pytorch():
    """Three training steps of torch.nn.BatchNorm1d(3, momentum=m), torch 2.13.0.

    x = arange(12).reshape(4, 3) ** 1.5 / 7 + step; recorded values.
    """
    golden = {
        0.1: ([0.7438581, 0.8624201, 0.9976880], [1.5074511, 1.7125738, 1.9077593]),
        None: ([2.6747532, 3.1122513, 3.6113944], [2.8725135, 3.6294239, 4.3496652]),
    }
    for momentum, (mean, var) in golden.items():
        rule = (
            running.cumulative(ddof=1) if momentum is None else running.ema(0.9, ddof=1)
        )
        state = rule.init((3,))
        for step in range(3):
            x = jnp.asarray(np.arange(12).reshape(4, 3) ** 1.5 / 7 + step, jnp.float32)
            state = rule.update(state, bnjax.moments(x))
        assert_close(rule.read(state).mean, np.array(mean))
        assert_close(rule.read(state).var, np.array(var))

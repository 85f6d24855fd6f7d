"""Running statistics: closed forms, empty and non-finite batches, transforms."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_trees_close, covering

import bnjax
from bnjax import Moments, running, whiten

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


@covering(
    strength=1,
    bad=[np.nan, np.inf],
    field=["mean", "m2"],
    build=[running.ema, running.debiased_ema, running.cumulative],
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


# ---- rules as values ----

VALUES = {
    "ema": lambda: running.ema(0.9),
    "ema, NumPy": lambda: running.ema(np.float32(0.5), ddof=1),
    "ema, JAX": lambda: running.ema(jnp.float32(0.5), skip_nonfinite=True),
    "debiased_ema": lambda: running.debiased_ema(0.9, ddof=1),
    "cumulative": lambda: running.cumulative(),
    "cumulative, unbiased": lambda: running.cumulative(ddof=1, skip_nonfinite=True),
    "standardize": lambda: whiten.standardize(),
    "standardize, two axes": lambda: whiten.standardize(axis=[0, 1], ddof=1),
    "min_max_scale": lambda: whiten.min_max_scale(low=-1.0),
    "zca_whiten": lambda: whiten.zca_whiten(),
    "zca_whiten in groups": lambda: whiten.zca_whiten(epsilon=0.1, group_size=2),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_rule_or_scaler_is_a_value(name):
    """Equal where equal, with one hash, and so after a pickle."""
    value, other = VALUES[name](), VALUES[name]()
    assert value == other
    assert hash(value) == hash(other)
    assert pickle.loads(pickle.dumps(value)) == value
    assert all(value != VALUES[n]() for n in VALUES if n != name)
    assert type(value)._fields in (("init", "update", "read"), whiten.Scaler._fields)


@pytest.mark.parametrize("name", ["ema", "debiased_ema", "cumulative", "zca_whiten"])
def test_an_equal_static_argument_compiles_nothing(name):
    """And computes the same, also from a pickle."""
    traced = []

    @functools.partial(jax.jit, static_argnums=0)
    def f(value, x):
        traced.append(value)
        if isinstance(value, running.Rule):
            return value.read(value.update(value.init((3,)), bnjax.moments(x)))
        return value.apply(value.fit(x), x)

    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    first = f(VALUES[name](), x)
    for value in (VALUES[name](), pickle.loads(pickle.dumps(VALUES[name]()))):
        jax.tree.map(np.testing.assert_array_equal, f(value, x), first)
    assert len(traced) == 1


def test_the_first_line_of_cumulative_tells_its_variance():
    """PyTorch's momentum=None is another one."""
    first = running.cumulative.__doc__.splitlines()[0]
    assert "biased" in first
    assert "ddof=1" in first

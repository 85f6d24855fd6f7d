"""Batch renormalization: corrected towards the running statistics."""

import functools
import re

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx
from helpers import assert_close, assert_trees_close, collectives, poison
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_sharded import mesh

import bnjax
from bnjax.renorm import at_step, batch_renorm

SHAPE = (6, 5, 4)
AXES = (0, 1)
# Of case(): no feature is clipped; some are; all are, and that is batch normalization.
LIMITS = {"none": (100.0, 100.0), "some": (1.5, 1.2), "all": (1.0, 0.0)}


def case(dtype=np.float64):
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, *SHAPE)) * np.array([1, 0.3, 3, 1.2]) + 0.5
    scale, bias = rng.normal(size=(2, 4))
    mean, var = np.array([[-1.0, 0.2, 2.5, 1.4], [1, 1, 1, 2]])
    return [np.asarray(v, dtype) for v in (x, mean, var, scale, bias, dy)]


def limits(name):
    return dict(zip(("r_max", "d_max"), LIMITS[name]))


def test_the_limits_clip_what_they_are_said_to():
    x, mean, var, *_ = case()
    r = np.sqrt(x.var(AXES) / var)
    d = (x.mean(AXES) - mean) / np.sqrt(var)
    for each, limit in zip((np.log(r), d), (np.log(1.5), 1.2)):
        assert (each < -limit).any()
        assert (each > limit).any()
        assert (np.abs(each) < limit).any()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", LIMITS)
def test_the_papers_formula(name, masked):
    x, mean, var, scale, bias, _ = case(np.float32)
    mask = np.random.default_rng(1).random(SHAPE) < 0.7 if masked else None
    seen = np.broadcast_to(True if mask is None else mask, SHAPE)
    y, moments = batch_renorm(
        poison(x, seen), mean, var, scale, bias, mask=mask, **limits(name)
    )
    expected = oracle.batch_renorm(x, mean, var, scale, bias, LIMITS[name], AXES, mask)
    assert_close(np.asarray(y)[seen], expected[seen], tol=2e-6)
    count, mean, m2 = oracle.moments(x, AXES, mask)
    np.testing.assert_array_equal(np.broadcast_to(moments.count, 4), count)
    assert_close(moments.mean, mean)
    assert_close(moments.m2, m2)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", LIMITS)
def test_the_papers_gradient(name, masked):
    """r and d are constants; nothing reaches the running statistics."""
    x, mean, var, scale, bias, dy = case()
    mask = np.random.default_rng(1).random(SHAPE) < 0.7 if masked else None

    def f(x, mean, var, scale, bias):
        return batch_renorm(x, mean, var, scale, bias, mask=mask, **limits(name))[0]

    dx, dmean, dvar, dscale, dbias = jax.vjp(f, x, mean, var, scale, bias)[1](dy)
    expected = oracle.batch_renorm_gradients(
        x, mean, var, scale, bias, dy, LIMITS[name], AXES, mask
    )
    assert_trees_close((dx, dscale, dbias), expected, tol=1e-10)
    np.testing.assert_array_equal((dmean, dvar), 0)


def test_clipped_to_nothing_is_batch_norm_to_the_bit():
    x, mean, var, scale, bias, dy = case(np.float32)
    mask = np.random.default_rng(1).random((6, 5, 1)) < 0.7

    def results(batch_norm):
        (y, moments), vjp = jax.vjp(batch_norm, x, scale, bias)
        return y, moments, vjp((dy, moments))

    options = {"mask": mask, "activation": jnp.tanh}
    actual = results(
        lambda x, *affine: batch_renorm(
            x, mean, var, *affine, r_max=1.0, d_max=0.0, **options
        )
    )
    expected = results(functools.partial(bnjax.batch_norm, **options))
    jax.tree.map(np.testing.assert_array_equal, actual[:2], expected[:2])
    assert_trees_close(actual[2], expected[2], tol=1e-6)


@pytest.mark.parametrize("axis", [-1, 0, 1, (0, 2), (2, 1)])
def test_unclipped_the_output_is_that_of_inference(axis):
    """For other feature axes too, with a residual and an activation."""
    rng = np.random.default_rng(0)
    x, residual = rng.normal(size=(2, 6, 5, 4)).astype(np.float32)
    features = tuple(x.shape[a] for a in sorted(a % 3 for a in np.atleast_1d(axis)))
    mean, scale, bias = rng.normal(size=(3, *features)).astype(np.float32)
    var = rng.uniform(0.5, 2, features).astype(np.float32)
    options = {"axis": axis, "residual": residual, "activation": jnp.tanh}
    y, moments = batch_renorm(
        x, mean, var, scale, bias, r_max=jnp.inf, d_max=jnp.inf, **options
    )
    inferred = bnjax.normalize(x, mean, var, scale, bias, **options)
    assert_close(y, inferred, tol=5e-6)
    assert_trees_close(moments, bnjax.moments(x, axis=axis))


def test_a_feature_without_a_value_is_inferred():
    x, mean, var, scale, bias, _ = case(np.float32)
    mask = np.broadcast_to(np.arange(4) != 2, SHAPE)

    def f(mean, var):
        return batch_renorm(x, mean, var, scale, bias, mask=mask, **limits("some"))[0]

    y, vjp = jax.vjp(f, mean, var)
    np.testing.assert_array_equal(vjp(y), 0)  # constants, there too
    inferred = bnjax.normalize(x, mean, var, scale, bias)
    assert_close(y[..., 2], np.asarray(inferred[..., 2]), tol=2e-6)


def test_the_running_statistics_are_those_before_the_update():
    x, mean, var, *_ = case(np.float32)
    layer = bnjax.linen.BatchRenorm(False, momentum=0.0, use_scale=False)
    variables = layer.init(jax.random.key(0), x)
    variables["batch_stats"] = {"mean": jnp.asarray(mean), "var": jnp.asarray(var)}
    y, updates = layer.apply(variables, x, mutable=["batch_stats"])
    assert_close(y, batch_renorm(x, mean, var)[0])
    assert_close(updates["batch_stats"]["mean"], x.mean(AXES))
    again = layer.apply({**variables, **updates}, x, mutable=["batch_stats"])[0]
    assert_close(again, np.asarray(bnjax.batch_norm(x)[0]), tol=1e-5)


def test_loads_the_variables_of_batch_norm():
    """Both frameworks; inference is the same to the bit."""
    x = case(np.float32)[0]
    plain, ours = bnjax.BatchNorm(), bnjax.linen.BatchRenorm()
    variables = plain.init(jax.random.key(0), x, False)
    fresh = ours.init(jax.random.key(0), x, False)
    assert jax.tree.structure(fresh) == jax.tree.structure(variables)
    _, updates = ours.apply(variables, x, False, mutable=["batch_stats"])
    variables = {**variables, **updates}
    np.testing.assert_array_equal(
        ours.apply(variables, x, True), plain.apply(variables, x, True)
    )


# ---- schedules ----


def test_schedules():
    """Of the step, which may be traced; layers of both frameworks."""
    x, mean, var, *_ = case(np.float32)
    r_max = optax.linear_schedule(1, 3, 40, 10)
    layer = bnjax.linen.BatchRenorm(False, r_max=r_max, d_max=lambda step: step / 50)
    other = bnjax.nnx.BatchRenorm(
        4, r_max=r_max, d_max=lambda step: step / 50, rngs=nnx.Rngs(0)
    )
    variables = layer.init(jax.random.key(0), x, step=0)
    variables["batch_stats"] = {"mean": jnp.asarray(mean), "var": jnp.asarray(var)}
    traced = []

    @jax.jit
    def train(step):
        traced.append(step)
        return layer.apply(variables, x, step=step, mutable=["batch_stats"])[0]

    for step, reached in ((0, (1.0, 0.0)), (30, (2.0, 0.6)), (99, (3.0, 1.98))):
        expected = oracle.batch_renorm(
            x, mean, var, np.ones(4), np.zeros(4), reached, AXES
        )
        assert_close(train(step), expected, tol=5e-6)
        other.mean.set_value(jnp.asarray(mean))
        other.var.set_value(jnp.asarray(var))
        assert_close(other(x, step=jnp.int32(step)), expected, tol=5e-6)
    assert len(traced) == 1
    assert at_step("r_max", 2.5, None) == 2.5


def test_evaluation_needs_no_step():
    x = case(np.float32)[0]
    layer = bnjax.linen.BatchRenorm(r_max=lambda step: 1 + step)
    variables = layer.init(jax.random.key(0), x, True)
    assert layer.apply(variables, x, True).shape == x.shape


def test_init_needs_no_step_of_a_schedule():
    """It normalizes as batch normalization, whatever the limits."""
    x = case(np.float32)[0]
    layer = bnjax.linen.BatchRenorm(False, r_max=lambda step: 1 + step)
    y, variables = layer.init_with_output(jax.random.key(0), x)
    np.testing.assert_array_equal(y, bnjax.batch_norm(x, np.ones(4), np.zeros(4))[0])
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)


@pytest.mark.usefixtures("x64")
def test_traced_limits_have_no_gradient():
    x, mean, var, *_ = case()

    def f(r_max, d_max):
        return (batch_renorm(x, mean, var, r_max=r_max, d_max=d_max)[0] ** 3).sum()

    np.testing.assert_array_equal(jax.jit(jax.grad(f, (0, 1)))(1.5, 0.4), 0)


# ---- many devices ----


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_one_collective_forward_and_one_backward(kind):
    """r and d cost none."""
    x, mean, var, scale, bias, _ = case(np.float32)
    x = np.concatenate([x] * 4)[:16]
    placed = jax.device_put(x, NamedSharding(mesh(kind), P("data")))

    def forward(x):
        return batch_renorm(x, mean, var, scale, bias, **limits("some"))[0]

    def both(x):
        y, vjp = jax.vjp(forward, x)
        return y, vjp(y)

    assert collectives(forward, placed) == {"all-reduce": 1}
    assert collectives(both, placed) == {"all-reduce": 2}
    expected = oracle.batch_renorm(x, mean, var, scale, bias, LIMITS["some"], AXES)
    assert_close(jax.jit(forward)(placed), expected, tol=5e-6)


def test_groups_of_replicas():
    x, mean, var, *_ = case(np.float32)
    groups = [[0, 4, 5], [1, 2, 3]]
    f = jax.vmap(
        lambda x: batch_renorm(
            x, mean, var, axis_name="i", axis_index_groups=groups, **limits("some")
        )[0],
        axis_name="i",
    )
    y = f(x[:, None])[:, 0]
    one, zero = np.ones(4), np.zeros(4)
    for members in groups:
        expected = oracle.batch_renorm(
            x[members], mean, var, one, zero, LIMITS["some"], AXES
        )
        assert_close(y[np.array(members)], expected, tol=5e-6)


# ---- messages ----

V4 = np.ones(4, np.float32)
MESSAGES = {
    "r_max": (
        {"r_max": 0.5},
        "r_max=0.5 limits sigma_B / sigma: expected a number >= 1. r_max=1 is batch "
        "normalization; the paper relaxes r_max to 3 and d_max to 5 during training.",
    ),
    "r_max, not a number": ({"r_max": float("nan")}, "r_max=nan limits sigma_B"),
    "d_max": (
        {"d_max": -1},
        "d_max=-1 limits (mu_B - mu) / sigma: expected a number >= 0. d_max=0 is batch",
    ),
    "d_max, NumPy": ({"d_max": np.float32(-0.5)}, "d_max="),
    "mean": ({"mean": np.ones(3)}, "mean has shape (3,): expected (4,)"),
    "scale": ({"scale": np.ones(5)}, "scale has shape (5,): expected (4,)"),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_message(name):
    options, message = MESSAGES[name]
    arguments = {"x": case(np.float32)[0], "mean": V4, "var": V4, **options}
    with pytest.raises(ValueError, match=re.escape(message)):
        batch_renorm(**arguments)


def test_message_of_a_schedule_without_a_step():
    x = case(np.float32)[0]
    message = (
        "d_max is a schedule, but no step was given: expected the number of the "
        "training step. Write layer(x, step=step), or a number for d_max."
    )
    layer = bnjax.nnx.BatchRenorm(4, d_max=optax.constant_schedule(1), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=re.escape(message)):
        layer(x)
    linen = bnjax.linen.BatchRenorm(False, d_max=optax.constant_schedule(1))
    with pytest.raises(ValueError, match=re.escape(message)):
        linen.apply(linen.init(jax.random.key(0), x), x, mutable=["batch_stats"])


def test_message_of_types():
    x = case(np.float32)[0]
    message = "x has dtype complex64: expected a real one, for batch renormalization"
    with pytest.raises(TypeError, match=message):
        batch_renorm(x.astype(np.complex64), V4, V4)
    with pytest.raises(TypeError, match="x has dtype int32: expected a floating"):
        batch_renorm(x.astype(np.int32), V4, V4)


def test_one_value_warns():
    with pytest.warns(bnjax.BatchNormWarning, match="one value per feature"):
        batch_renorm(np.ones((1, 4), np.float32), V4, V4)


# ---- a counter of its own ----

WARMUP = 2
CLIPS = {"r_max": 1.3, "d_max": 0.6}


def layers(**fields):
    """(x, stats, use_running) -> (y, stats) of each framework, and stats at first."""
    linen = bnjax.linen.BatchRenorm(momentum=0.9, **fields)
    variables = linen.init(jax.random.key(0), jnp.zeros(SHAPE), False)

    def of_linen(x, stats, running=False, **options):
        v = {**variables, "batch_stats": stats}
        y, u = linen.apply(v, x, running, mutable=["batch_stats"], **options)
        return y, u["batch_stats"]

    def of_nnx(x, stats, running=False, **options):
        layer = bnjax.nnx.BatchRenorm(4, momentum=0.9, rngs=nnx.Rngs(0), **fields)
        nnx.update(layer, stats)
        y = layer(x, running, **options)
        return y, nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))

    return {"linen": of_linen, "nnx": of_nnx}, variables["batch_stats"]


both = pytest.mark.parametrize("framework", ["linen", "nnx"])


@both
def test_warm_up(framework):
    """Batch normalization for as many updates, then the limits; never in evaluation."""
    steps, stats = layers(**CLIPS, warmup_steps=WARMUP)
    step = steps[framework]
    assert sorted(stats) == ["mean", "steps", "var"]
    assert (stats["steps"].dtype, stats["steps"].shape) == (jnp.int32, ())
    affine = np.ones(4), np.zeros(4)
    for number in range(4):
        x = case(np.float32)[0] + number
        limit = (1.0, 0.0) if number < WARMUP else tuple(CLIPS.values())
        given = stats["mean"], stats["var"]
        y, stats = step(x, stats)
        expected = oracle.batch_renorm(x, *given, *affine, limit, AXES)
        assert_close(y, expected, tol=2e-6)
        assert stats["steps"] == number + 1
        for options in ({"running": True}, {"update_stats": False}):
            assert step(x, stats, **options)[1]["steps"] == number + 1
        assert step(x, stats, running=True, update_stats=True)[1]["steps"] == number + 2


@both
def test_schedules_by_the_counter(framework):
    """No step needs to be given; one that is given is taken."""
    schedule = optax.linear_schedule(1.0, 3.0, 4)
    counted, stats = layers(r_max=schedule, d_max=lambda n: n / 4, warmup_steps=0)
    plain, bare = layers(r_max=schedule, d_max=lambda n: n / 4)
    for number in range(4):
        x = case(np.float32)[0] + number
        y, new = counted[framework](x, stats)
        expected, bare = plain[framework](x, bare, step=number)
        assert_close(y, np.asarray(expected))
        y, _ = counted[framework](x, stats, step=1)
        before = {n: stats[n] for n in ("mean", "var")}
        assert_close(y, np.asarray(plain[framework](x, before, step=1)[0]))
        stats = new
    assert "steps" not in bare


@both
def test_the_counter_in_a_scan_stops_at_the_largest(framework):
    steps, stats = layers(warmup_steps=WARMUP)
    x = case(np.float32)[0]

    def step(stats, _):
        return steps[framework](x, stats)[1], None

    run = jax.jit(lambda stats: jax.lax.scan(step, stats, None, length=5)[0])
    assert run(stats)["steps"] == 5
    last = np.int32(2**31 - 3)
    assert run({**stats, "steps": jnp.asarray(last)})["steps"] == 2**31 - 1


def test_a_checkpoint_of_sbx_loads():
    """Its tree and values: numbers before the first step, arrays after."""
    x, mean, var, scale, bias, _ = case(np.float32)
    stats = {"mean": jnp.asarray(mean), "var": jnp.asarray(var)}
    layer = bnjax.linen.BatchRenorm(False, momentum=0.99, warmup_steps=7, epsilon=1e-3)
    params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
    for steps, limit in ((6, (1, 0)), (7, (3, 5)), (jnp.int32(7), (3, 5))):
        theirs = {**stats, "steps": steps, "r_max": 3, "d_max": 5}
        variables = {"params": params, "batch_stats": theirs}
        y, updates = layer.apply(variables, x, mutable=["batch_stats"])
        expected = oracle.batch_renorm(
            x, mean, var, scale, bias, limit, AXES, epsilon=1e-3
        )
        assert_close(y, expected, tol=2e-6)
        new = updates["batch_stats"]
        assert {n: int(new[n]) for n in ("steps", "r_max", "d_max")} == {
            "steps": int(steps) + 1,
            "r_max": 3,
            "d_max": 5,
        }
        assert_close(new["mean"], 0.99 * mean + 0.01 * x.mean(AXES), tol=2e-6)
        inferred = layer.clone(use_running_average=True).apply(variables, x)
        inference = oracle.normalize(x, mean, var, scale, bias, AXES, epsilon=1e-3)
        assert_close(inferred, inference, tol=2e-6)
        ours = layer.init(jax.random.key(0), x)["batch_stats"]
        restored = flax.serialization.from_state_dict(ours, theirs)
        assert restored["steps"] == steps


def test_sbx_adds_epsilon_after_the_correction():
    """By how much its outputs differ, as the docstring says."""
    epsilon, running = 1e-3, np.geomspace(1e-6, 1e3, 200)
    for variance, low, high in ((1e-3, 0.3, 0.35), (1.0, 0, 0.01)):
        r = np.clip(np.sqrt((variance + epsilon) / (running + epsilon)), 1 / 3, 3)
        theirs = 1 / np.sqrt(variance / r**2 + epsilon)
        ours = r / np.sqrt(variance + epsilon)
        difference = np.abs(theirs / ours - 1).max()
        assert low < difference < high


@both
def test_a_counter_that_a_checkpoint_lacks(framework):
    """Statistics of batch normalization: the warm-up begins."""
    _, mean, var, *_ = case(np.float32)
    x = case(np.float32)[0]
    stats = {"mean": jnp.asarray(mean), "var": jnp.asarray(var)}
    steps, _ = layers(warmup_steps=WARMUP)
    assert steps[framework](x, stats)[1]["steps"] == 1
    layer = bnjax.linen.BatchRenorm(True, warmup_steps=WARMUP, use_scale=False)
    layer = layer.clone(use_bias=False)
    y = layer.apply({"batch_stats": stats}, x)  # evaluation needs none
    assert_close(y, oracle.normalize(x, mean, var, 1, 0, AXES), tol=2e-6)


@pytest.mark.parametrize("value", [-1, 2.5, "7"])
def test_message_of_the_warm_up(value):
    layer = bnjax.nnx.BatchRenorm(4, warmup_steps=value, rngs=nnx.Rngs(0))
    message = f"warmup_steps={value!r} is how many updates the running statistics get"
    with pytest.raises(ValueError, match=re.escape(message)):
        layer(case(np.float32)[0])
    layer = bnjax.nnx.BatchRenorm(4, r_max=0.5, warmup_steps=1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"r_max=0\.5 limits"):
        layer(case(np.float32)[0])


class Counting(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(3, name="dense")(x)
        return bnjax.linen.BatchRenorm(not train, warmup_steps=WARMUP, name="norm")(x)


def test_tools_leave_the_counter_alone():
    """Folding, accumulation, population statistics, reset and merge."""
    net, x = Counting(), jnp.asarray(case(np.float32)[0].reshape(2, 15, 4))
    variables = net.init(jax.random.key(0), x[0], True)
    stats = variables["batch_stats"]
    stats["norm"] = {**stats["norm"], "steps": jnp.int32(5), "r_max": 3, "d_max": 5}
    folded = bnjax.fold.fold_model(net, variables, x[0], train=False)
    assert folded.folded == (("dense", "norm"),)

    def collect(variables, x):
        return net.apply(variables, x, True, mutable=["batch_stats", "batch_moments"])

    def loss_fn(variables, x):
        result = collect(variables, x)
        return result[0].mean(), result

    rule = bnjax.running.ema(0.9)
    found = bnjax.training.accumulate(loss_fn, variables, x, rule=rule)
    assert found.batch_stats["norm"]["steps"] == 7  # of two micro-batches
    new = bnjax.population.pooled(collect, variables, x)
    assert new["norm"]["steps"] == 5
    assert bnjax.training.reset_batch_stats(stats)["norm"]["steps"] == 5
    rows = {n: jnp.stack([stats["norm"][n]] * 2) for n in ("mean", "var")}
    rows = {"norm": {**rows, "steps": stats["norm"]["steps"]}}
    assert bnjax.training.merge_batch_stats(rows)["norm"]["steps"] == 5

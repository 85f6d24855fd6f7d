"""Ghost batch normalization: groups of examples, each normalized by itself."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from helpers import (
    assert_close,
    assert_trees_close,
    by_default,
    collectives,
    covering,
    plain_batch_norm,
    poison,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_sharded import mesh

import bnjax
from bnjax.ghost import ghost_batch_norm
from bnjax.running import ema
from bnjax.training import accumulate

SHAPE = (12, 5, 3)
AXES = (0, 1)


def case(seed=0, shape=SHAPE, dtype=np.float32):
    rng = np.random.default_rng(seed)
    x, dy = rng.normal(size=(2, *shape)) * 2 + 1
    x = x + rng.normal(size=(shape[0], *(1 for _ in shape[1:])))
    scale, bias = rng.normal(size=(2, shape[-1]))
    return [np.asarray(v, dtype) for v in (x, scale, bias, dy)]


# ---- the formula ----


@covering(
    strength=1,
    of=[(1, "error"), (4, "error"), (12, "error"), (5, "smaller"), (30, "smaller")],
    masked=[True, False],
)
def test_the_papers_formula(of, masked):
    """The Moments are those of the whole batch."""
    size, remainder = of
    x, scale, bias, _ = case()
    mask = np.random.default_rng(1).random(SHAPE) < 0.7 if masked else None
    seen = np.broadcast_to(True if mask is None else mask, SHAPE)
    f = functools.partial(
        ghost_batch_norm, virtual_batch_size=size, remainder=remainder, mask=mask
    )
    y, moments = jax.jit(f)(poison(x, seen), scale, bias)
    expected = oracle.ghost_batch_norm(x, scale, bias, size, mask)
    assert_close(np.asarray(y)[seen], expected[seen], tol=2e-6)
    count, mean, m2 = oracle.moments(x, AXES, mask)
    np.testing.assert_array_equal(np.broadcast_to(moments.count, 3), count)
    assert_close(moments.mean, mean)
    assert_close(moments.m2, m2, tol=2e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("size", [4, 5])
def test_gradients(size):
    """Group by group; those of the Moments too."""
    x, scale, bias, dy = case(dtype=np.float64)

    def f(*args):
        options = {"virtual_batch_size": size, "remainder": "smaller"}
        return ghost_batch_norm(*args, **options)

    @jax.jit
    def forward(*args):
        return jax.vjp(f, *args)

    (_, (count, mean, _)), vjp = forward(x, scale, bias)
    vjp = jax.jit(vjp)
    dmean, dm2 = np.array([[1.0, 2.0, -1.0], [0.5, -0.2, 0.1]])
    nothing = bnjax.Moments(jnp.zeros_like(count), *jnp.zeros((2, 3)))
    found = vjp((jnp.asarray(dy), nothing))
    parts = [slice(start, start + size) for start in range(0, 12, size)]
    each = [oracle.batch_norm_gradients(x[p], scale, dy[p], AXES) for p in parts]
    dx, dscale, dbias = zip(*each, strict=True)
    expected = np.concatenate(dx), sum(dscale), sum(dbias)
    assert_trees_close(found, expected, tol=1e-10)
    along = bnjax.Moments(jnp.zeros_like(count), dmean, dm2)
    dx = vjp((jnp.zeros(SHAPE), along))[0]
    exact = dmean / float(count) + 2 * dm2 * (x - np.asarray(mean))
    assert_close(dx, exact, tol=1e-10)


@pytest.mark.parametrize("size", [12, 13])
def test_one_group_is_batch_norm_to_the_bit(size):
    x, scale, bias, dy = case()
    mask = np.random.default_rng(1).random((12, 5, 1)) < 0.7  # count is ()

    @functools.partial(jax.jit, static_argnums=0)
    def results(batch_norm):
        f = functools.partial(batch_norm, mask=mask, activation=nn.gelu)
        (y, moments), vjp = jax.vjp(f, x, scale, bias)
        return y, moments, vjp((dy, moments))

    ghost = functools.partial(
        ghost_batch_norm, virtual_batch_size=size, remainder="smaller"
    )
    actual, expected = results(ghost), results(bnjax.batch_norm)
    assert_trees_close(actual[1:], expected[1:], tol=1e-6)
    np.testing.assert_array_equal(actual[0], expected[0])


@pytest.mark.parametrize(("axis", "size"), [(0, 3), (1, 4), ((0, 2), 2), ((1, 2), 4)])
def test_other_feature_axes(axis, size):
    """The batch is the first axis that is none; residual and activation, too."""
    x = np.random.default_rng(0).normal(size=(6, 4, 3)).astype(np.float32)
    residual = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    axes = np.atleast_1d(axis)
    others = [a for a in range(3) if a not in axes]
    features = tuple(x.shape[a] for a in sorted(axes))
    scale = np.random.default_rng(2).normal(size=features).astype(np.float32)
    f = functools.partial(
        ghost_batch_norm,
        axis=axis,
        virtual_batch_size=size,
        remainder="smaller",
        activation=jnp.tanh,
        residual=residual,
    )
    y, moments = jax.jit(f)(x, scale)
    order = [*others, *sorted(axes)]
    flat = x.transpose(order).reshape(*(x.shape[a] for a in others), -1)
    plain = oracle.ghost_batch_norm(flat, scale.ravel(), np.zeros(scale.size), size)
    plain = plain.reshape([x.shape[a] for a in order]).transpose(np.argsort(order))
    assert_close(y, np.tanh(plain + residual), tol=2e-6)
    assert moments.mean.shape == features


def test_a_group_without_a_value_takes_the_fallback():
    x, scale, bias, _ = case()
    mask = np.ones((12, 1, 1), bool)
    mask[4:8] = False
    mean, var = np.float32([0.5, 1, 2]), np.float32([2, 1, 4])
    y, _ = ghost_batch_norm(
        x, scale, bias, virtual_batch_size=4, mask=mask, fallback=(mean, var)
    )
    expected = oracle.ghost_batch_norm(x, scale, bias, 4)
    expected[4:8] = oracle.normalize(x[4:8], mean, var, scale, bias, AXES)
    assert_close(y, expected, tol=2e-6)


def test_means_of_groups_far_from_zero():
    """The merge knows what the rounded means of the groups lack."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(512, 3)) + rng.normal(size=(64, 3)).repeat(8, 0) + 1e4
    x = x.astype(np.float32)
    moments = jax.jit(
        lambda x: ghost_batch_norm(x, virtual_batch_size=8, epsilon=1e-5)[1]
    )(x)
    np.testing.assert_allclose(moments.m2, oracle.moments(x, 0)[2], rtol=1e-5)


def test_one_value_per_group_warns():
    x = case(shape=(12, 3))[0]
    received = r"feature in each of 12 groups \(input shape \(12, 3\).*larger groups"
    with pytest.warns(bnjax.BatchNormWarning, match=received):
        ghost_batch_norm(x, virtual_batch_size=1)


def test_complex_values():
    x, scale, bias, imaginary = case()
    z = x + 1j * imaginary
    y, moments = ghost_batch_norm(z, scale, bias, virtual_batch_size=4)
    assert_close(y, oracle.ghost_batch_norm(z, scale, bias, 4), tol=2e-6)
    assert_close(moments.m2, oracle.moments(z, AXES)[2], tol=2e-6)


# ---- what it is the same as ----


@pytest.mark.usefixtures("x64")
def test_is_gradient_accumulation_over_the_groups():
    """Loss, gradients and running statistics of one step."""

    class Net(nn.Module):
        size: int | None = None

        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4, use_bias=False)(x)
            if self.size is None:
                norm = bnjax.BatchNorm
            else:
                norm = functools.partial(
                    bnjax.linen.GhostBatchNorm, virtual_batch_size=self.size
                )
            x = norm(use_running_average=False, momentum=0.9, name="norm")(x)
            return nn.Dense(2)(jnp.tanh(x))

    x = case(dtype=np.float64, shape=(12, 3))[0]
    variables = Net().init(jax.random.key(0), x)
    variables = jax.tree.map(lambda v: v.astype(jnp.float64), variables)

    def loss_fn(net, variables, x):
        result = net.apply(variables, x, mutable=["batch_stats", "batch_moments"])
        return (result[0] ** 3).mean(), result

    one = functools.partial(loss_fn, Net())
    step = jax.jit(lambda x: accumulate(one, variables, x, rule=ema(0.9)))
    expected = step(x.reshape(3, 4, 3))

    def loss(params):
        value, (_, updates) = loss_fn(Net(size=4), {**variables, "params": params}, x)
        return value, updates["batch_stats"]

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, stats), grads = gradient(variables["params"])
    assert_close(value, np.asarray(expected.loss), tol=1e-10)
    assert_trees_close(grads, expected.grads, tol=1e-10)
    assert_trees_close(stats, expected.batch_stats, tol=1e-10)


@pytest.mark.parametrize("check_vma", [True, False])
def test_is_replicas_that_do_not_share_statistics(check_vma):
    """One device of sixteen examples is eight that have two each."""
    x, scale, bias, _ = case(shape=(16, 5, 3))
    f = jax.shard_map(
        lambda x: bnjax.batch_norm(x, scale, bias)[0],
        mesh=mesh(),
        in_specs=P("data"),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    ghosts = ghost_batch_norm(x, scale, bias, virtual_batch_size=2)[0]
    assert_close(jax.jit(f)(x), ghosts, tol=2e-6)


# ---- many devices ----


def sharded(x, kind=AxisType.Auto):
    return jax.device_put(x, NamedSharding(mesh(kind), P("data")))


@covering(strength=1, kind=[AxisType.Auto, AxisType.Explicit], size=[1, 2, 8])
def test_a_group_on_one_device_is_normalized_there(kind, size):
    """No collective forward or backward, and one for the running statistics."""
    x, scale, bias, dy = case(shape=(64, 5, 3))

    def normalized(x):
        return ghost_batch_norm(x, scale, bias, virtual_batch_size=size)[0]

    def both(x, dy):
        y, vjp = jax.vjp(normalized, x)
        return y, vjp(dy)[0]

    def moments(x):
        return ghost_batch_norm(x, scale, bias, virtual_batch_size=size)

    arrays = sharded(x, kind), sharded(dy, kind)
    assert collectives(both, *arrays) == {}
    assert sum(collectives(moments, arrays[0]).values()) == 1
    y, dx = jax.jit(both)(*arrays)
    assert_close(y, oracle.ghost_batch_norm(x, scale, bias, size), tol=5e-6)
    parts = [slice(start, start + size) for start in range(0, 64, size)]
    exact = [oracle.batch_norm_gradients(x[p], scale, dy[p], AXES)[0] for p in parts]
    assert_close(dx, np.concatenate(exact), tol=2e-5)


@pytest.mark.parametrize(
    ("batch", "size", "groups"), [(16, 4, 4), (16, 16, 1), (24, 5, 5), (64, 9, 8)]
)
def test_a_group_on_several_devices(batch, size, groups):
    """Communicated on Auto axes, an error on Explicit ones."""
    x = case(shape=(batch, 5, 3))[0]
    f = functools.partial(
        ghost_batch_norm, virtual_batch_size=size, remainder="smaller"
    )
    y, moments = jax.jit(f)(sharded(x))
    expected = oracle.ghost_batch_norm(x, np.ones(3), np.zeros(3), size)
    assert_close(y, expected, tol=5e-6)
    assert_close(moments.m2, oracle.moments(x, AXES)[2], tol=5e-6)
    message = (
        f"{groups} group(s) of the batch axis (axis 0 of ({batch}, 5, 3)), which is "
        "split over 8 devices: expected equal groups whose number the devices divide"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.jit(f)(sharded(x, AxisType.Explicit))
    with pytest.raises(ValueError, match=re.escape("(jax.reshard)")):
        f(sharded(x, AxisType.Explicit))


@pytest.mark.parametrize("spec", [P(None, None, "data"), P(None, "data")])
def test_explicit_axes_that_do_not_split_the_batch(spec):
    x = case(shape=(12, 8, 16))[0]
    placed = jax.device_put(x, NamedSharding(mesh(AxisType.Explicit), spec))
    y, moments = jax.jit(functools.partial(ghost_batch_norm, virtual_batch_size=4))(
        placed
    )
    expected = oracle.ghost_batch_norm(x, np.ones(16), np.zeros(16), 4)
    assert_close(y, expected, tol=5e-6)
    assert_close(moments.mean, oracle.moments(x, AXES)[1], tol=5e-6)


def test_groups_of_replicas_share_the_moments_alone():
    """axis_index_groups: who pools what the running statistics see."""
    x, *_ = case(shape=(16, 5, 3))
    groups = [[0, 1, 2], [3, 4, 5, 6, 7]]
    options = {"axis_name": "data", "axis_index_groups": groups}
    f = functools.partial(ghost_batch_norm, virtual_batch_size=1, **options)
    y, moments = jax.jit(jax.vmap(f, axis_name="data"))(x.reshape(8, 2, 5, 3))
    expected = oracle.ghost_batch_norm(x, np.ones(3), np.zeros(3), 1)
    assert_close(y.reshape(x.shape), expected, tol=5e-6)
    for members in groups:
        rows = np.concatenate([x[2 * i : 2 * i + 2] for i in members])
        for i in members:
            assert_close(moments.m2[i], oracle.moments(rows, AXES)[2], tol=5e-6)


# ---- groups of several replicas ----

REPLICAS, OWN = 8, 3
POOLS = [None, [[0, 1, 2, 3, 4, 5], [6, 7]], [[7, 2], [0, 5, 1, 3], [4, 6]]]
MODES = ["check_vma", "shard_map", "pmap", "vmap"]


def over_replicas(f, mode, arrays):
    """f of each replica's part of the arrays, (y, Moments by replica)."""
    if mode in ("pmap", "vmap"):
        transform = jax.pmap if mode == "pmap" else jax.vmap
        parts = [a.reshape(REPLICAS, OWN, *a.shape[1:]) for a in arrays]
        y, moments = transform(f, axis_name="data")(*parts)
        return y.reshape(-1, *y.shape[2:]), moments

    def one(*parts):
        y, moments = f(*parts)
        return y, jax.tree.map(lambda v: v[None], moments)

    return jax.shard_map(
        one,
        mesh=mesh(),
        in_specs=P("data"),
        out_specs=P("data"),
        check_vma=mode == "check_vma",
    )(*arrays)


def of_replicas(rows, members):
    return np.concatenate([rows[OWN * i : OWN * (i + 1)] for i in members])


def groups_of(pools, several):
    pools = [list(range(REPLICAS))] if pools is None else pools
    return [
        pool[i : i + several] for pool in pools for i in range(0, len(pool), several)
    ]


@pytest.mark.filterwarnings("ignore:jax.pmap:DeprecationWarning")
@covering(
    strength=1,
    mode=MODES,
    of=[(2, POOLS[0], True), (4, POOLS[0], False), (2, POOLS[2], True)],
)
def test_groups_of_replicas(mode, of):
    """Those of the concatenated batch; the Moments are the pool's."""
    several, pools, masked = of
    x, scale, bias, _ = case(shape=(REPLICAS * OWN, 5, 3))
    mask = np.ones((len(x), 5, 1), bool)
    if masked:
        mask = np.random.default_rng(1).random((len(x), 5, 1)) < 0.6
        mask[: OWN * 3] = False  # replicas with nothing valid
    fallback = np.float32([0.5, 1, 2]), np.float32([2, 1, 4])

    def f(x, mask):
        return ghost_batch_norm(
            x,
            scale,
            bias,
            virtual_batch_size=several * OWN,
            axis_name="data",
            axis_index_groups=pools,
            mask=mask if masked else None,
            fallback=fallback,
        )

    run = jax.jit(lambda *arrays: over_replicas(f, mode, arrays))
    y, moments = run(poison(x, mask), mask)
    for group in groups_of(pools, several):
        rows, seen = of_replicas(x, group), of_replicas(mask, group)
        expected = oracle.batch_norm(rows, scale, bias, AXES, seen)
        if not seen.any():
            expected = oracle.normalize(rows, *fallback, scale, bias, AXES)
        seen = np.broadcast_to(seen, rows.shape)
        assert_close(of_replicas(np.asarray(y), group)[seen], expected[seen], tol=5e-6)
    for pool in [list(range(REPLICAS))] if pools is None else pools:
        rows, seen = of_replicas(x, pool), of_replicas(mask, pool)
        count, mean, m2 = oracle.moments(rows, AXES, seen)
        for i in pool:
            assert moments.count[i] == count[0]
            assert_close(moments.mean[i], mean, tol=2e-6)
            assert_close(moments.m2[i], m2, tol=5e-6)


@pytest.mark.usefixtures("x64")
@by_default(
    ("check_vma", 0), ("vmap", 1), of=[("check_vma", 0), ("shard_map", 1), ("vmap", 1)]
)
def test_gradients_of_groups_of_replicas(of):
    """By y and by the Moments: of the concatenated batch, in one device's formula."""
    mode, pools = of[0], POOLS[of[1]]
    x, scale, bias, dy = case(dtype=np.float64, shape=(REPLICAS * OWN, 5, 3))
    along = jnp.array([[0.5, -0.2, 0.1], [1.0, 2.0, -1.0]])

    def value(moments):
        return jnp.sin(moments.mean) @ along[1] + jnp.sqrt(moments.m2) @ along[0]

    def distributed(x, scale, bias):
        def f(x, dy):
            y, moments = ghost_batch_norm(
                x,
                scale,
                bias,
                virtual_batch_size=2 * OWN,
                axis_name="data",
                axis_index_groups=pools,
            )
            return y * dy, moments

        y, moments = over_replicas(f, mode, (x, jnp.asarray(dy)))
        first, last = (jax.tree.map(lambda v, i=i: v[i], moments) for i in (0, 7))
        return y.sum() + value(first) + value(last)

    def plain(x, scale, bias):
        total = 0
        for group in groups_of(pools, 2):
            rows = jnp.concatenate([x[OWN * i : OWN * (i + 1)] for i in group])
            y, _ = plain_batch_norm(rows, scale, bias, axes=AXES)
            total += (y * of_replicas(dy, group)).sum()
        for i in (0, 7):
            (pool,) = [p for p in pools or [list(range(REPLICAS))] if i in p]
            rows = jnp.concatenate([x[OWN * j : OWN * (j + 1)] for j in pool])
            mean, m2 = plain_batch_norm(rows, scale, bias, axes=AXES)[1]
            total += value(bnjax.Moments(0, mean, m2))
        return total

    arguments = (jnp.asarray(x), jnp.asarray(scale), jnp.asarray(bias))
    with jax.numpy_rank_promotion("allow"):
        expected = jax.jit(jax.grad(plain, (0, 1, 2)))(*arguments)
    actual = jax.jit(jax.grad(distributed, (0, 1, 2)))(*arguments)
    assert_trees_close(actual, expected, tol=1e-10)
    tangents = jax.tree.map(jnp.sin, arguments)
    slope = jax.jit(functools.partial(jax.jvp, distributed))(arguments, tangents)[1]
    exact = sum(np.vdot(e, t) for e, t in zip(expected, tangents))
    assert_close(slope, exact, tol=1e-10)


@pytest.mark.parametrize("pools", [0, 1])
def test_collectives_of_groups_of_replicas(pools):
    """One forward, for the output and the running statistics, and one backward."""
    x, scale, bias, dy = case(shape=(REPLICAS * OWN, 5, 3))
    split = functools.partial(
        jax.shard_map, mesh=mesh(), in_specs=P("data"), out_specs=P("data")
    )

    def f(x):
        return ghost_batch_norm(
            x,
            scale,
            bias,
            virtual_batch_size=2 * OWN,
            axis_name="data",
            axis_index_groups=POOLS[pools],
        )

    def forward(x):
        y, moments = f(x)
        return y, jax.tree.map(lambda v: jnp.atleast_1d(v), moments)

    def both(x, dy):
        y, vjp, moments = jax.vjp(f, x, has_aux=True)
        return y, vjp(dy)[0], jax.tree.map(jnp.atleast_1d, moments)

    assert sum(collectives(split(forward), x).values()) == 1
    assert sum(collectives(split(both), x, dy).values()) == 2


def test_pooled_moments_are_typed_replicated():
    """They become running statistics, which are the same on all replicas."""
    x = case(shape=(REPLICAS * OWN, 5, 3))[0]
    f = jax.shard_map(
        lambda x: ghost_batch_norm(x, virtual_batch_size=6, axis_name="data"),
        mesh=mesh(),
        in_specs=P("data"),
        out_specs=(P("data"), P()),
    )
    assert_close(jax.jit(f)(x)[1].mean, oracle.moments(x, AXES)[1], tol=2e-6)


def test_groups_of_replicas_far_from_zero():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(512, 3)) + rng.normal(size=(8, 3)).repeat(64, 0) + 1e4
    x = x.astype(np.float32)
    f = functools.partial(
        ghost_batch_norm, virtual_batch_size=128, axis_name="data", epsilon=0.0
    )
    y, moments = jax.jit(jax.vmap(f, axis_name="data"))(x.reshape(8, 64, 3))
    expected = oracle.ghost_batch_norm(x, np.ones(3), np.zeros(3), 128)
    assert_close(y.reshape(x.shape), expected, tol=1e-3)  # of x - mean, at 1e4
    np.testing.assert_allclose(moments.m2[0], oracle.moments(x, 0)[2], rtol=1e-5)


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_layers_with_groups_of_replicas(framework):
    """The running statistics are those of the whole batch."""
    x = case(shape=(REPLICAS * OWN, 5, 3))[0]
    options = {"virtual_batch_size": 12, "axis_name": "data", "momentum": 0.0}
    if framework == "linen":
        layer = bnjax.linen.GhostBatchNorm(use_running_average=False, **options)
        variables = layer.init(jax.random.key(0), x)

        def f(x):
            y, updates = layer.apply(variables, x, mutable=["batch_stats"])
            return y, updates["batch_stats"]
    else:

        def f(x):
            layer = bnjax.nnx.GhostBatchNorm(3, rngs=nnx.Rngs(0), **options)
            return layer(x), {"mean": layer.mean[...], "var": layer.var[...]}

    y, stats = jax.vmap(f, axis_name="data")(x.reshape(REPLICAS, OWN, 5, 3))
    expected = oracle.ghost_batch_norm(x, np.ones(3), np.zeros(3), 12)
    assert_close(y.reshape(x.shape), expected, tol=5e-6)
    count, mean, m2 = oracle.moments(x, AXES)
    for i in range(REPLICAS):
        assert_close(stats["mean"][i], mean, tol=2e-6)
        assert_close(stats["var"][i], m2 / count, tol=5e-6)


def test_groups_that_replicas_do_not_fill():
    x = case(shape=(REPLICAS * OWN, 5, 3))[0].reshape(REPLICAS, OWN, 5, 3)

    def run(size, **options):
        f = functools.partial(
            ghost_batch_norm, virtual_batch_size=size, axis_name="data", **options
        )
        return jax.vmap(f, axis_name="data")(x)

    for size in (4, 9, 48):
        message = (
            f"virtual_batch_size={size} is more than a replica has, a batch of 3 (axis "
            "0 of (3, 5, 3)), and the replicas of axis_name='data', 8 that pool their "
            "statistics, do not fall into groups of that size: expected a multiple of "
            "3 that divides 24, or a divisor of 3. Choose one; or have groups of any "
            "replicas by BatchNorm(axis_name='data', axis_index_groups=[[0, 1], ...]), "
            "and bnjax.training.merge_batch_stats for one set"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            run(size)
        y, _ = run(size, remainder="smaller")  # each replica is a group
        assert_close(y, run(3)[0], tol=1e-6)
    with pytest.raises(ValueError, match="3 that pool their statistics"):
        run(6, axis_index_groups=[[0, 1, 2], [3, 4, 5, 6, 7]])


# ---- messages ----


@pytest.mark.parametrize("size", [0, -4, 2.0, None, "4"])
def test_message_of_the_size(size):
    message = f"virtual_batch_size={size!r}: expected a positive integer"
    with pytest.raises(ValueError, match=re.escape(message)):
        ghost_batch_norm(case()[0], virtual_batch_size=size)


def test_message_of_the_remainder():
    x = case()[0]
    message = (
        "a batch of 12 (axis 0 of (12, 5, 3)) is not divisible by virtual_batch_size=5:"
        " expected a multiple. Choose one that divides it, drop the last examples, or "
        "write remainder='smaller' for a last group of 2."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        ghost_batch_norm(x, virtual_batch_size=5)
    with pytest.raises(ValueError, match=r"remainder='drop' is unknown: expected 'err"):
        ghost_batch_norm(x, virtual_batch_size=5, remainder="drop")
    layer = bnjax.linen.GhostBatchNorm(virtual_batch_size=5)
    variables = layer.init(jax.random.key(0), x, False)  # of a batch of any size
    with pytest.raises(ValueError, match=re.escape(message)):
        layer.apply(variables, x, False, mutable=["batch_stats"])
    assert layer.apply(variables, x, True).shape == x.shape


def test_message_of_no_batch_axis():
    message = "axis=(0, 1, 2) names every axis of the input of shape (12, 5, 3)"
    with pytest.raises(ValueError, match=re.escape(message)):
        ghost_batch_norm(case()[0], virtual_batch_size=2, axis=(0, 1, 2))


def test_messages_of_batch_norm_name_what_was_given():
    """Not the reshaped arrays of the groups."""
    x = case()[0]
    with pytest.raises(ValueError, match=re.escape("expected (3,)")):
        ghost_batch_norm(x, np.ones(4), virtual_batch_size=4)
    with pytest.raises(ValueError, match=re.escape("mask has shape (12,)")):
        ghost_batch_norm(x, virtual_batch_size=4, mask=np.ones(12, bool))
    with pytest.raises(ValueError, match=re.escape("residual has shape (3,)")):
        ghost_batch_norm(x, virtual_batch_size=4, residual=np.ones(3))

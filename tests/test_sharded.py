"""Replicas: the result is that of the concatenated batch, whatever the split."""

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
    collectives,
    compiled_text,
    covering,
    kinds,
    poison,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bnjax
from experiments.bench.programs import Program

SHAPE = (16, 4, 5, 3)
AXES = (0, 1, 2)
P = PartitionSpec


def mesh(kind=AxisType.Auto, **sizes):
    sizes = sizes or {"data": 8}
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes)
    )


def case():
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, *SHAPE)) * 2 + 1
    x = x + np.arange(16).reshape(16, 1, 1, 1)  # the replicas' means differ
    scale, bias = rng.normal(size=(2, 3))
    return [np.asarray(v, np.float32) for v in (x, scale, bias, dy)]


def masks():
    rng = np.random.default_rng(1)
    uneven = rng.random((16, 4, 5, 1)) < 0.5
    uneven[4:6] = False  # the third replica has nothing
    return {
        "none": None,
        "uneven": uneven,
        "per feature": (rng.random(SHAPE) < 0.5) & uneven,
        "all empty": np.zeros((16, 1, 1, 1), bool),
    }


MASKS = masks()


def weighted(x, scale, bias, dy, mask, axis_name):
    """A loss that looks at y and at the Moments."""
    y, m = bnjax.batch_norm(x, scale, bias, mask=mask, axis_name=axis_name)
    return jnp.sum(y * dy), (y, m)


def local_loss(x, scale, bias, dy, mask):
    """The loss of one replica: its share of y, and of the Moments."""
    loss, (y, m) = weighted(x, scale, bias, dy, mask, "data")
    share = (jnp.sum(m.mean) + jnp.sum(m.m2) / 100) / 8
    return loss + share, (y, m)


def global_loss(x, scale, bias, dy, mask):
    loss, (y, m) = weighted(x, scale, bias, dy, mask, None)
    return loss + jnp.sum(m.mean) + jnp.sum(m.m2) / 100, (y, m)


def in_shard_map(check_vma, outside):
    """The gradient taken outside of shard_map, or inside."""

    def run(x, scale, bias, dy, mask):
        specs = (P("data"), P(), P(), P("data"), None if mask is None else P("data"))
        outputs = (P("data"), P())
        wrap = functools.partial(
            jax.shard_map, mesh=mesh(), in_specs=specs, check_vma=check_vma
        )
        if outside:

            def summed(*args):
                loss, aux = local_loss(*args)
                return jax.lax.psum(loss, "data"), aux

            f = wrap(summed, out_specs=(P(), outputs))
            return jax.grad(f, (0, 1, 2), has_aux=True)(x, scale, bias, dy, mask)

        def inner(x, scale, bias, dy, mask):
            grads, aux = jax.grad(local_loss, (0, 1, 2), has_aux=True)(
                x, scale, bias, dy, mask
            )
            if not check_vma:  # typed, the sum over the replicas is implied
                grads = (grads[0], *jax.lax.psum(grads[1:], "data"))
            return grads, aux

        grads = (P("data"), P(), P())
        return wrap(inner, out_specs=(grads, outputs))(x, scale, bias, dy, mask)

    return jax.jit(run)


def per_replica(transform):
    """pmap and vmap: a leading axis of replicas."""

    def run(x, scale, bias, dy, mask):
        split = jax.tree.map(lambda t: t.reshape(8, 2, *t.shape[1:]), (x, dy, mask))

        def inner(x, dy, mask, scale, bias):
            grads, (y, m) = jax.grad(local_loss, (0, 1, 2), has_aux=True)(
                x, scale, bias, dy, mask
            )
            return (grads[0], *jax.lax.psum(grads[1:], "data")), (y, m)

        in_axes = (0, 0, None if mask is None else 0, None, None)
        out = transform(inner, axis_name="data", in_axes=in_axes)(*split, scale, bias)
        (dx, *rest), (y, m) = jax.tree.map(np.asarray, out)
        for leaf in jax.tree.leaves((rest, m)):
            assert (leaf == leaf[:1]).all(), "the replicas agree, bit for bit"
        first = jax.tree.map(lambda t: t[0], (rest, m))
        whole = [t.reshape(SHAPE) for t in (dx, y)]
        return (whole[0], *first[0]), (whole[1], first[1])

    return run


def in_jit(kind):
    def run(x, scale, bias, dy, mask):
        placed = NamedSharding(mesh(kind), P("data"))
        x, dy = jax.device_put((x, dy), placed)
        if mask is not None:
            mask = jax.device_put(mask, placed)
        with jax.set_mesh(mesh(kind)):
            return jax.jit(jax.grad(global_loss, (0, 1, 2), has_aux=True))(
                x, scale, bias, dy, mask
            )

    return run


MODES = {
    "shard_map typed, grad outside": in_shard_map(True, True),
    "shard_map typed, grad inside": in_shard_map(True, False),
    "shard_map untyped, grad outside": in_shard_map(False, True),
    "shard_map untyped, grad inside": in_shard_map(False, False),
    "pmap": per_replica(jax.pmap),
    "vmap": per_replica(jax.vmap),
    "jit, Auto axes": in_jit(AxisType.Auto),
    "jit, Explicit axes": in_jit(AxisType.Explicit),
}


@covering(strength=1, mode=MODES, mask=MASKS)
def test_equals_the_concatenated_batch(mode, mask):
    x, scale, bias, dy = case()
    keep = MASKS[mask]
    if keep is not None:
        x = poison(x, keep)
        dy = np.where(keep, dy, 0).astype(np.float32)
    expected = jax.grad(global_loss, (0, 1, 2), has_aux=True)(x, scale, bias, dy, keep)
    actual = MODES[mode](x, scale, bias, dy, keep)
    assert_trees_close(actual, jax.tree.map(np.asarray, expected), tol=1e-5)
    if mask != "all empty":
        clean = np.where(True if keep is None else keep, x, 0)
        y = oracle.batch_norm(clean, scale, bias, AXES, keep)
        seen = np.ones(SHAPE, bool) if keep is None else np.broadcast_to(keep, SHAPE)
        assert_close(np.asarray(actual[1][0])[seen], y[seen], tol=5e-6)


@covering(
    strength=1,
    mode=["typed", "untyped", "pmap", "vmap"],
    groups=[[[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 5, 7], [1], [2, 3, 4, 6]]],
)
def test_groups(groups, mode):
    """Uneven ones too; also the derivative."""
    x, scale, bias, dy = case()

    def inner(x, dy):
        def loss(x):
            y, m = bnjax.batch_norm(
                x, scale, bias, axis_name="data", axis_index_groups=groups
            )
            return jnp.sum(y * dy), (y, m.mean)

        dx, (y, mean) = jax.grad(loss, has_aux=True)(x)
        return dx, y, mean[None]

    if mode in ("typed", "untyped"):
        f = jax.shard_map(
            inner,
            mesh=mesh(),
            in_specs=P("data"),
            out_specs=P("data"),
            check_vma=mode == "typed",
        )
        dx, y, mean = jax.jit(f)(x, dy)
    else:
        f = (jax.pmap if mode == "pmap" else jax.vmap)(inner, axis_name="data")
        out = f(*(t.reshape(8, 2, *t.shape[1:]) for t in (x, dy)))
        dx, y, mean = (
            np.asarray(t).reshape(16 if t.ndim > 4 else 8, *t.shape[2:]) for t in out
        )
    for group in groups:
        rows = np.concatenate([[2 * i, 2 * i + 1] for i in group])
        assert_close(
            np.asarray(y)[rows], oracle.batch_norm(x[rows], scale, bias, AXES), tol=5e-6
        )
        exact = oracle.batch_norm_gradients(x[rows], scale, dy[rows], AXES)[0]
        assert_close(np.asarray(dx)[rows], exact, tol=2e-5)
        for i in group:
            assert_close(np.asarray(mean)[i], x[rows].mean(AXES), tol=2e-6)


def test_another_groups_nan_stays_there():
    x = case()[0]
    x[8:] = np.nan
    f = jax.vmap(
        lambda x: bnjax.batch_norm(
            x, axis_name="data", axis_index_groups=[[0, 1, 2, 3], [4, 5, 6, 7]]
        )[0],
        axis_name="data",
    )
    y = np.asarray(f(x.reshape(8, 2, *SHAPE[1:])))
    assert np.isfinite(y[:4]).all()
    assert np.isnan(y[4:]).all()


@pytest.mark.parametrize("mode", ["typed", "untyped", "vmap"])
def test_two_axis_names(mode):
    """Also where x varies over only one of them: the other repeats the batch."""
    x, scale, bias, _ = case()
    expected = oracle.batch_norm(x, scale, bias, AXES)

    def f(x):
        return bnjax.batch_norm(x, scale, bias, axis_name=("data", "model"))[0]

    if mode == "vmap":
        split = x.reshape(4, 2, 2, *SHAPE[1:])
        y = jax.vmap(jax.vmap(f, axis_name="model"), axis_name="data")(split)
        assert_close(np.asarray(y).reshape(SHAPE), expected, tol=5e-6)
        return
    two = mesh(data=4, model=2)
    wrap = functools.partial(jax.shard_map, mesh=two, check_vma=mode == "typed")
    both = P(("data", "model"))
    y = jax.jit(wrap(f, in_specs=both, out_specs=both))(x)
    assert_close(y, expected, tol=5e-6)
    y = jax.jit(wrap(f, in_specs=P("data"), out_specs=P("data")))
    if mode == "untyped":
        assert_close(y(x), expected, tol=5e-6)
        dx = jax.grad(lambda x: jnp.sum(jnp.sin(y(x))))(x)
    else:
        replicated = jax.jit(wrap(f, in_specs=P("data"), out_specs=P("data")))
        assert_close(replicated(x), expected, tol=5e-6)
        dx = jax.grad(lambda x: jnp.sum(jnp.sin(replicated(x))))(x)
    exact = oracle.batch_norm_gradients(x, scale, np.cos(expected), AXES)[0]
    assert_close(dx, exact, tol=1e-4)


def placed(mode, *values):
    """The batch on eight devices, as `mode` has it."""
    if mode == "pmap":
        return [v if v is None else v.reshape(8, -1, *v.shape[1:]) for v in values]
    if mode in ("typed", "untyped"):
        return values
    return jax.device_put(values, NamedSharding(mesh(AxisType[mode]), P("data")))


def data_parallel(mode, f):
    """`f(x, dy, mask)` on eight devices, to be jitted."""
    if mode in ("Auto", "Explicit"):
        return f
    if mode == "pmap":
        return jax.pmap(f, axis_name="data")

    def run(*args):
        specs = tuple(None if a is None else P("data") for a in args)
        wrap = functools.partial(jax.shard_map, mesh=mesh(), check_vma=mode == "typed")
        return wrap(f, in_specs=specs, out_specs=P("data"))(*args)

    return run


@covering(
    strength=1,
    mode=["typed", "untyped", "pmap", "Auto", "Explicit"],
    mask=[None, "uneven", "per feature"],
)
def test_one_collective_forward_and_one_backward(mode, mask):
    """Of plain sums: 2C numbers, and the counts where masks make them differ."""
    x, scale, bias, dy = case()
    keep = None if mask is None else MASKS[mask]
    named = None if mode in ("Auto", "Explicit") else "data"

    def forward(x, dy, mask):
        return bnjax.batch_norm(x, scale, bias, mask=mask, axis_name=named)[0]

    def both(x, dy, mask):
        y, vjp = jax.vjp(lambda x: forward(x, dy, mask), x)
        return y, vjp(dy)

    arrays = placed(mode, x, dy, keep)
    program = Program(compiled_text(data_parallel(mode, forward), *arrays))
    assert kinds(program.always) == {"all-reduce": 1}
    # About the mean, which a CPU knows by then.
    assert kinds(program.sometimes) == {"all-reduce": 1}
    (sent,) = program.always.collectives
    assert sent.elements == {None: 6, "uneven": 7, "per feature": 9}[mask]
    assert collectives(data_parallel(mode, both), *arrays) == {"all-reduce": 2}


def test_replicas_that_hold_different_shifts():
    """Each replica's own running mean: nothing tells in pmap that they are one."""
    x, scale, bias, _ = case()
    x = x + np.float32(100)
    guess = np.arange(8 * 3, dtype=np.float32).reshape(8, 3) * 40

    def f(x, guess):
        guess = guess.reshape(3)
        return bnjax.batch_norm(x, scale, bias, axis_name="data", shift=guess)[0]

    expected = oracle.batch_norm(x, scale, bias, AXES)
    for check_vma in (True, False):
        split = P("data")
        wrapped = jax.shard_map(
            f, mesh=mesh(), in_specs=split, out_specs=split, check_vma=check_vma
        )
        assert_close(jax.jit(wrapped)(x, guess), expected, tol=2e-5)
    y = jax.pmap(f, axis_name="data")(x.reshape(8, 2, *SHAPE[1:]), guess)
    assert_close(np.asarray(y).reshape(SHAPE), expected, tol=2e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_vmaps_within_a_typed_shard_map(masked):
    """A grid of networks over devices: batches of conditions, on shared data."""
    rng = np.random.default_rng(0)
    x = rng.normal(5, 1, size=(16, 3)).astype(np.float32)
    mask = rng.random((16, 1)) < 0.7 if masked else None
    factors = rng.normal(3, 1, size=(8, 2, 3)).astype(np.float32)

    def loss(factor, x):
        return jnp.sum(jnp.sin(bnjax.batch_norm(x, factor, mask=mask)[0]))

    def grid(factors, x):
        return jax.vmap(jax.vmap(jax.grad(loss), (0, None)), (0, None))(factors, x)

    specs = P("data"), P()
    f = jax.shard_map(grid, mesh=mesh(), in_specs=specs, out_specs=P("data"))
    assert_close(jax.jit(f)(factors, x), np.asarray(grid(factors, x)), tol=1e-4)


def test_a_shift_in_common_saves_the_second_read():
    """Typed as replicated, a running mean serves all replicas; no branch is needed."""
    x = case()[0] + np.float32(1e4)
    f = jax.shard_map(
        lambda x, shift: bnjax.moments(x, axis_name="data", shift=shift),
        mesh=mesh(),
        in_specs=(P("data"), P()),
        out_specs=P(),
    )
    _, mean, m2 = oracle.moments(x, AXES)
    got = jax.jit(f)(x, np.float32(mean) + 1)
    np.testing.assert_allclose(got.m2, m2, rtol=1e-5)


@covering(
    strength=1,
    kind=["Auto", "Explicit"],
    shape=[(4096, 3), (24, 3), (16, 5, 2)],
)
def test_jit_never_gathers_the_batch(kind, shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)

    def both(x):
        y, vjp = jax.vjp(lambda x: bnjax.batch_norm(x)[0], x)
        return y, vjp(y)

    assert collectives(both, *placed(kind, x)) == {"all-reduce": 2}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_batch_that_the_mesh_does_not_divide(kind):
    """Six examples over two axes of a mesh of eight devices: still one collective."""
    x = np.random.default_rng(0).normal(size=(6, 4, 5, 3)).astype(np.float32)
    two = mesh(kind, data=2, model=4)
    x_ = jax.device_put(x, NamedSharding(two, P("data")))
    found = collectives(lambda x: bnjax.batch_norm(x)[0], x_)
    assert found == {"all-reduce": 1}
    y = jax.jit(lambda x: bnjax.batch_norm(x)[0])(x_)
    assert_close(y, oracle.batch_norm(x, np.ones(3), np.zeros(3), AXES), tol=5e-6)


@pytest.mark.parametrize("check_vma", [True, False])
def test_groups_as_an_axis_of_the_mesh(check_vma):
    """The members of a group share statistics; nothing is sent between groups."""
    x, scale, bias, _ = case()
    two = mesh(group=2, member=4)
    f = jax.shard_map(
        lambda x: bnjax.batch_norm(x, scale, bias, axis_name="member")[0],
        mesh=two,
        in_specs=P(("group", "member")),
        out_specs=P(("group", "member")),
        check_vma=check_vma,
    )
    assert collectives(f, x) == {"all-reduce": 1}
    y = np.asarray(jax.jit(f)(x))
    for rows in (slice(0, 8), slice(8, 16)):
        exact = oracle.batch_norm(x[rows], scale, bias, AXES)
        assert_close(y[rows], exact, tol=5e-6)


@pytest.mark.parametrize("shape", [(512, 3), (64, 4, 6, 10)])
@pytest.mark.parametrize("mode", ["typed", "untyped", "pmap", "Auto", "Explicit"])
def test_large_means_that_differ_between_replicas(mode, shape):
    """One ulp of the mean, forgotten on each replica, is 7e-5 of the variance."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=shape)
    of_replica = rng.normal(size=8).repeat(shape[0] // 8)
    of_replica = of_replica.reshape(-1, *(1 for _ in shape[1:]))
    named = None if mode in ("Auto", "Explicit") else "data"

    @jax.jit
    def run(x):
        def f(x):
            m = bnjax.moments(x, axis_name=named)
            return m.mean[None], m.m2[None]

        return data_parallel(mode, f)(x)

    for offset, spread in [(0.0, 1.0), (1e4, 1.0), (-1e4, 1.0), (0.0, 1e4)]:
        x = (noise + offset).astype(np.float32)
        x += (spread * of_replica).astype(np.float32)
        means, m2s = run(*placed(mode, x))
        _, mean, m2 = oracle.moments(x, tuple(range(x.ndim - 1)))
        for got in np.asarray(m2s).reshape(-1, shape[-1]):
            np.testing.assert_allclose(got, m2, rtol=1e-5)
        size = np.abs(mean) + np.sqrt(m2 / (x.size / shape[-1]))
        for got in np.asarray(means).reshape(-1, shape[-1]):
            assert (np.abs(got - mean) / size).max() < 1e-6


@covering(
    placed_as=[
        (P(None, None, None, "model"), -1),
        (P("data", None, None, "model"), -1),
        (P("data", "model"), -1),
        (P("data", "model"), 1),
        (P("data", None, None, "model"), (1, 3)),
    ],
    strength=1,
    kind=[AxisType.Auto, AxisType.Explicit],
    how=["masked", "layer", "masked layer"],
)
def test_sharded_features_and_space(placed_as, kind, how):
    """A 2-D mesh under jit: nothing to configure, and never a gather of the batch."""
    (spec, axis), masked, layer = placed_as, "masked" in how, "layer" in how
    x = np.random.default_rng(0).normal(size=(8, 4, 6, 10)).astype(np.float32)
    two = mesh(kind, data=4, model=2)
    mask = np.random.default_rng(1).random((8, 1, 1, 1)) < 0.7 if masked else None
    norm = bnjax.BatchNorm(use_running_average=False, axis=axis)
    v = norm.init(jax.random.key(0), x)

    def f(x):
        if layer:
            y, u = norm.apply(v, x, mask=mask, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y)), (y, u["batch_stats"])
        y, m = bnjax.batch_norm(x, axis=axis, mask=mask)
        return jnp.sum(jnp.sin(y)), (y, m.mean, m.m2)

    expected = jax.grad(f, has_aux=True)(x)
    with jax.set_mesh(two):
        placed = jax.device_put(x, NamedSharding(two, spec))
        compiled = jax.jit(jax.grad(f, has_aux=True)).lower(placed).compile()
        actual, text = compiled(placed), compiled.as_text()
    assert_trees_close(actual, jax.tree.map(np.asarray, expected), tol=1e-5)
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather", text)
    assert all(np.prod([int(n) for n in g.split(",")]) < x.size / 8 for g in gathered)


@covering(
    strength=1,
    mode=["typed", "untyped", "vmap", "jit"],
    implementation=["xla", "reread", "subsample"],
)
def test_every_implementation_in_every_mode(mode, implementation):
    """By name: small inputs are left to XLA."""
    x, scale, bias, dy = case()

    def loss(x, dy, axis_name="data"):
        y, _ = bnjax.batch_norm(
            x, scale, bias, axis_name=axis_name, implementation=implementation
        )
        return jnp.sum(y * dy), y

    dx = jax.grad(loss, has_aux=True)
    if mode == "jit":
        placed = NamedSharding(mesh(AxisType.Explicit), P("data"))
        x_, dy_ = jax.device_put((x, dy), placed)
        with jax.set_mesh(mesh(AxisType.Explicit)):
            actual = jax.jit(lambda x, dy: dx(x, dy, None))(x_, dy_)
    elif mode == "vmap":
        split = [t.reshape(8, 2, *SHAPE[1:]) for t in (x, dy)]
        actual = [t.reshape(SHAPE) for t in jax.vmap(dx, axis_name="data")(*split)]
    else:
        f = jax.shard_map(
            dx,
            mesh=mesh(),
            in_specs=P("data"),
            out_specs=P("data"),
            check_vma=mode == "typed",
        )
        actual = jax.jit(f)(x, dy)
    expected = oracle.batch_norm_gradients(x, scale, dy, AXES)[0]
    assert_close(actual[0], expected, tol=1e-5)
    assert_close(actual[1], oracle.batch_norm(x, scale, bias, AXES), tol=5e-6)


@by_default(True, check_vma=[True, False])
def test_large_inputs_are_fenced_in_shard_map(check_vma):
    """The choice by platform, which has two branches of one type."""
    x = np.random.default_rng(0).normal(size=(8, 300, 301, 3)).astype(np.float32)
    f = jax.shard_map(
        jax.grad(lambda x: jnp.sum(jnp.sin(bnjax.batch_norm(x, axis_name="data")[0]))),
        mesh=mesh(),
        in_specs=P("data"),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    y = oracle.batch_norm(x, np.ones(3), np.zeros(3), AXES)
    expected = oracle.batch_norm_gradients(x, np.ones(3), np.cos(y), AXES)[0]
    assert_close(jax.jit(f)(x), expected, tol=1e-5)

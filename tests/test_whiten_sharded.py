"""Whitening over replicas equals that of the concatenated batch; and how it talks."""

import functools

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
    covering,
    poison,
)
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bnjax import whiten

SHAPE, SIZE = (16, 5, 6), 3
METHODS = ["eigh", "newton_schulz", "cholesky"]
GROUPS = [[0, 5, 7], [1, 3], [2, 4, 6]]


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((8,), ("data",), axis_types=(kind,))


def case():
    rng = np.random.default_rng(0)
    mixing = np.eye(6) + 0.4 * rng.normal(size=(6, 6))
    x, dy = rng.normal(size=(2, *SHAPE)) @ mixing
    x = x + 3 + np.arange(16).reshape(16, 1, 1)  # the replicas' means differ
    scale, bias = rng.normal(size=(2, 6))
    keep = rng.random((16, 5, 1)) < 0.6
    keep[4:6] = False  # the third replica has nothing
    return [np.asarray(v, np.float32) for v in (x, scale, bias, dy)], keep


def run(x, scale, bias, dy, keep, *, method="eigh", share=1, **over):
    """Gradients, output and co-moments, of a loss that looks at both."""

    def loss(x, scale, bias):
        y, batch = whiten.decorrelate(
            x, scale, bias, group_size=SIZE, mask=keep, method=method, **over
        )
        statistics = jnp.sum(jnp.sin(batch.mean)) + jnp.sum(jnp.cos(batch.m2 / 99))
        return jnp.sum(y * dy) + statistics / share, (y, batch)

    grads, (y, batch) = jax.grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)
    return grads, y, batch


def replica(x, dy, keep, scale, bias, *, summed, groups=None, method="eigh"):
    sizes = np.full(8, 8) if groups is None else np.zeros(8)
    for group in groups or []:
        sizes[group] = len(group)
    over = {"axis_name": "data", "axis_index_groups": groups, "method": method}
    share = jnp.asarray(sizes, jnp.float32)[lax.axis_index("data")]
    grads, y, batch = run(x, scale, bias, dy, keep, share=share, **over)
    if summed:  # typed, the sum over the replicas is implied
        grads = (grads[0], *lax.psum(grads[1:], "data"))
    return grads, y, batch


def in_shard_map(check_vma):
    def f(x, scale, bias, dy, keep, **how):
        def local(*args):
            grads, y, batch = replica(*args, summed=not check_vma, **how)
            return grads, y, jax.tree.map(lambda t: t[None], batch)

        rows = P("data")
        mapped = jax.shard_map(
            local,
            mesh=mesh(),
            in_specs=(rows, rows, None if keep is None else rows, P(), P()),
            out_specs=((rows, P(), P()), rows, rows),
            check_vma=check_vma,
        )
        return jax.jit(mapped)(x, dy, keep, scale, bias)

    return f


def per_replica(transform):
    def f(x, scale, bias, dy, keep, **how):
        split = jax.tree.map(lambda t: t.reshape(8, 2, *t.shape[1:]), (x, dy, keep))
        axes = (0, 0, None if keep is None else 0, None, None)
        local = functools.partial(replica, summed=True, **how)
        out = transform(local, axis_name="data", in_axes=axes)(*split, scale, bias)
        (dx, *rest), y, batch = jax.tree.map(np.asarray, out)
        rest = [t[0] for t in rest]
        return (dx.reshape(SHAPE), *rest), y.reshape(SHAPE), batch

    return f


def in_jit(kind):
    def f(x, scale, bias, dy, keep, **how):
        rows = NamedSharding(mesh(kind), P("data"))
        x, dy = jax.device_put((x, dy), rows)
        keep = None if keep is None else jax.device_put(keep, rows)
        with jax.set_mesh(mesh(kind)):
            whole = jax.jit(functools.partial(run, **how))
            grads, y, batch = whole(x, scale, bias, dy, keep)
        return grads, y, jax.tree.map(lambda t: np.stack([t] * 8), batch)

    return f


MODES = {
    "typed": in_shard_map(True),
    "untyped": in_shard_map(False),
    "pmap": per_replica(jax.pmap),
    "vmap": per_replica(lambda *a, **k: jax.jit(jax.vmap(*a, **k))),
    "Auto": in_jit(AxisType.Auto),
    "Explicit": in_jit(AxisType.Explicit),
}


@covering(strength=1, mode=MODES, masked=[True, False])
def test_equals_the_concatenated_batch(mode, masked):
    (x, scale, bias, dy), keep = case()
    keep = keep if masked else None
    if masked:
        dy, x = dy * keep, poison(x, keep)
    expected = jax.tree.map(np.asarray, jax.jit(run)(x, scale, bias, dy, keep))
    grads, y, batch = MODES[mode](x, scale, bias, dy, keep)
    assert_trees_close((grads, y), expected[:2], tol=2e-5)
    everywhere = [np.stack([t] * 8) for t in expected[2]]
    assert_trees_close(tuple(batch), tuple(everywhere), tol=2e-6)
    clean = np.where(True if keep is None else keep, x, 0)
    for value, e in zip(batch, oracle.co_moments(clean, -1, SIZE, keep)):
        assert_close(value[0], e, tol=2e-6)


@by_default("untyped", mode=["typed", "untyped", "Explicit"])
@by_default("newton_schulz", method=METHODS[1:])
def test_other_methods(mode, method):
    (x, scale, bias, dy), keep = case()
    how = functools.partial(run, method=method)
    expected = jax.tree.map(np.asarray, jax.jit(how)(x, scale, bias, dy, keep))
    grads, y, _ = MODES[mode](x, scale, bias, dy, keep, method=method)
    assert_trees_close((grads, y), expected[:2], tol=2e-5)


@by_default("typed", "vmap", mode=["typed", "untyped", "pmap", "vmap"])
def test_groups_of_replicas(mode):
    (x, scale, bias, dy), keep = case()
    (dx, *rest), y, batch = MODES[mode](x, scale, bias, dy, keep, groups=GROUPS)
    dx, y, batch = jax.tree.map(np.asarray, (dx, y, tuple(batch)))
    total = jax.tree.map(lambda v: np.zeros(v.shape), rest)
    for group in GROUPS:
        rows = np.ravel([[2 * i, 2 * i + 1] for i in group])
        own = (x[rows], scale, bias, dy[rows], keep[rows])
        (dx_, *rest_), y_, batch_ = jax.tree.map(np.asarray, jax.jit(run)(*own))
        assert_trees_close((dx[rows], y[rows]), (dx_, y_), tol=2e-5)
        total = jax.tree.map(np.add, total, rest_)
        for i in group:
            assert_trees_close([v[i] for v in batch], list(batch_), tol=2e-6)
    assert_trees_close(rest, total, tol=2e-5)


@by_default("typed", mode=["typed", "untyped", "pmap"])
def test_far_from_zero(mode):
    """|mean|/std = 1e4: the means of replicas are rounded, the covariance is not."""
    (x, scale, bias, dy), _ = case()
    x = x + np.array([1, -1, 1, 1, -1, 1], np.float32) * 5e4
    _, _, batch = MODES[mode](x, scale, bias, dy, None)
    for value, e in zip(batch, oracle.co_moments(x, -1, SIZE)):
        assert_close(value[0], e, tol=1e-5)


@pytest.mark.parametrize("mode", ["typed", "untyped", "Auto"])
def test_collectives(mode):
    """Two forward (the means, the products), one backward."""
    (x, scale, bias, _), _ = case()

    def forward(x):
        name = None if mode == "Auto" else "data"
        return whiten.decorrelate(x, scale, bias, group_size=SIZE, axis_name=name)[0]

    def both(x):
        return jax.grad(lambda x: jnp.sum(jnp.sin(forward(x))))(x)

    def count(f):
        rows = P("data")
        if mode == "Auto":
            sharded = jax.device_put(x, NamedSharding(mesh(), rows))
            with jax.set_mesh(mesh()):
                return collectives(f, sharded)
        wrap = functools.partial(jax.shard_map, mesh=mesh(), check_vma=mode == "typed")
        return collectives(wrap(f, in_specs=rows, out_specs=rows), x)

    if mode == "typed":  # as JAX writes it, before the compiler joins any
        rows = P("data")
        wrap = functools.partial(jax.shard_map, mesh=mesh(), in_specs=rows)
        text = jax.jit(wrap(both, out_specs=rows)).lower(x).as_text()
        assert text.count("stablehlo.all_reduce") == 4  # one of them in a branch
    assert count(forward) == {"all-reduce": 2}
    assert count(both) == {"all-reduce": 3}

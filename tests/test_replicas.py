"""A property: any split of any batch over replicas gives the result of the whole.

hypothesis draws the batch, its mask, its split and the groups; what comes out of the
layer on the replicas is compared with one device that sees the concatenated batch.
"""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_close, by_default
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bnjax

P = PartitionSpec
MODES = ["typed", "untyped", "pmap", "vmap", "Auto", "Explicit"]


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch of `replicas` times `rows` examples, and how it is split."""

    replicas: int
    rows: int
    inner: tuple[int, ...]  # sizes after the batch
    axis: int
    dtype: str
    mask: str | None
    empty: tuple[int, ...]  # replicas without a valid value, if there is a mask
    groups: tuple[tuple[int, ...], ...] | None
    offset: float
    seed: int

    def arrays(self):
        rng = np.random.default_rng(self.seed)
        shape = (self.replicas * self.rows, *self.inner)
        x, dy = rng.normal(size=(2, *shape))
        own = np.repeat(np.arange(self.replicas), self.rows)  # their means differ
        x = x * 1.5 + self.offset + own.reshape(-1, *(1 for _ in self.inner))
        keep = self.valid(rng, shape, own)
        if keep is not None:
            seen = np.broadcast_to(keep, shape)
            x, dy = np.where(seen, x, np.nan), np.where(seen, dy, 0)
        features = shape[self.axis]
        params = dict(zip(("scale", "bias"), rng.normal(size=(2, features))))
        params = {k: v.astype(np.float32) for k, v in params.items()}
        return jnp.asarray(x, self.dtype), jnp.asarray(dy, jnp.float32), keep, params

    def valid(self, rng, shape, own):
        if self.mask is None:
            return None
        if self.mask == "nothing":
            return np.zeros((shape[0], *(1 for _ in self.inner)), bool)
        varies = {"example": {0}, "element": set(range(len(shape)))}[self.mask]
        mask_shape = [n if a in varies else 1 for a, n in enumerate(shape)]
        keep = rng.random(mask_shape) < 0.6
        keep[np.isin(own, self.empty)] = False
        return keep


@st.composite
def cases(draw):
    replicas = draw(st.sampled_from([8, 4, 2, 1]))
    inner = draw(st.sampled_from([(3,), (70,), (5, 3), (4, 5, 3), (2, 3, 4, 5)]))
    order = draw(st.permutations(range(replicas)))
    cuts = draw(st.sets(st.integers(1, 7), max_size=3))
    ends = sorted(c for c in cuts if c < replicas)
    groups = [
        tuple(order[start:end])
        for start, end in zip([0, *ends], [*ends, replicas], strict=True)
    ]
    return Case(
        replicas=replicas,
        rows=draw(st.integers(2, 5)),
        inner=inner,
        axis=draw(st.sampled_from([-1, 1])),
        dtype=draw(st.sampled_from(["float32", "float32", "bfloat16"])),
        mask=draw(st.sampled_from([None, "example", "element", "element", "nothing"])),
        empty=tuple(sorted(draw(st.sets(st.integers(0, 7), max_size=5)))),
        groups=draw(st.sampled_from([None, tuple(groups)])),
        offset=draw(st.sampled_from([0.0, -3.0, 30.0])),
        seed=draw(st.integers(0, 2**16)),
    )


def run(case, x, dy, keep, params, size, **named):
    """Gradients, output, statistics: of the layer, on what one replica sees.

    `size` replicas share the loss of the Moments.
    """
    layer = bnjax.BatchNorm(
        use_running_average=False, axis=case.axis, epsilon=1e-2, momentum=0.5, **named
    )
    features = params["scale"].shape
    stats = {"mean": jnp.full(features, 0.25), "var": jnp.full(features, 2.0)}

    def loss(x, params):
        y, out = layer.apply(
            {"params": params, "batch_stats": stats},
            x,
            mask=keep,
            mutable=["batch_stats", "batch_moments"],
        )
        m = out["batch_moments"]["moments"]
        shared = jnp.sum(m.mean) + jnp.sum(m.m2) / 100
        return jnp.sum(y * dy) + shared / size, (y, out)

    return jax.grad(loss, (0, 1), has_aux=True)(x, params)


def whole(case, x, dy, keep, params):
    """Each group on one device: gradients, output; statistics of each replica."""
    dx, y = np.zeros(x.shape, x.dtype), np.zeros(x.shape, np.float32)
    dparams = jax.tree.map(np.zeros_like, params)
    each = [None] * case.replicas
    for group in case.groups or [tuple(range(case.replicas))]:
        rows = (np.array(group)[:, None] * case.rows + np.arange(case.rows)).ravel()
        here = None if keep is None else keep[rows]
        one = jax.jit(functools.partial(run, case, size=1))
        (dx_, dparams_), (y_, out) = one(x[rows], dy[rows], here, params)
        dx[rows], y[rows] = dx_, y_
        dparams = jax.tree.map(np.add, dparams, dparams_)
        for replica in group:
            each[replica] = jax.tree.map(np.asarray, out)
    return (dx, dparams), (y, jax.tree.map(lambda *t: np.stack(t), *each))


def on_replicas(case, mode, x, dy, keep, params):
    """The same from replicas."""
    sizes = np.ones(case.replicas) * case.replicas
    for group in case.groups or []:
        sizes[list(group)] = len(group)
    named = {"axis_name": "data", "axis_index_groups": case.groups}

    def replica(x, dy, keep, params):
        size = jnp.asarray(sizes, jnp.float32)[jax.lax.axis_index("data")]
        (dx, dparams), (y, out) = run(case, x, dy, keep, params, size, **named)
        if mode != "typed":  # there the sum over the replicas is implied
            dparams = jax.lax.psum(dparams, "data")
        return (dx, dparams), (y, out)

    if mode in ("pmap", "vmap"):
        devices = jax.devices()[: case.replicas]
        over = {"axis_name": "data", "in_axes": (0, 0, None if keep is None else 0)}
        over["in_axes"] += (None,)
        wrapped = (
            jax.pmap(replica, devices=devices, **over)
            if mode == "pmap"
            else jax.jit(jax.vmap(replica, **over))
        )
        split = [
            t if t is None else t.reshape(case.replicas, case.rows, *t.shape[1:])
            for t in (x, dy, keep)
        ]
        (dx, dparams), (y, out) = jax.tree.map(np.asarray, wrapped(*split, params))
        dparams = jax.tree.map(lambda t: t[0], dparams)
        return (dx.reshape(x.shape), dparams), (y.reshape(x.shape), out)

    mesh = jax.make_mesh(
        (case.replicas,),
        ("data",),
        axis_types=(AxisType.Auto,),
        devices=jax.devices()[: case.replicas],
    )

    def leading(x, dy, keep, params):
        grads, (y, out) = replica(x, dy, keep, params)
        return grads, (y, jax.tree.map(lambda t: t[None], out))

    f = jax.shard_map(
        leading,
        mesh=mesh,
        in_specs=(P("data"), P("data"), None if keep is None else P("data"), P()),
        out_specs=((P("data"), P()), P("data")),
        check_vma=mode == "typed",
    )
    return jax.jit(f)(x, dy, keep, params)


def under_jit(case, kind, x, dy, keep, params):
    """The same from an array that is split over devices; nothing is configured."""
    mesh = jax.make_mesh(
        (case.replicas,),
        ("data",),
        axis_types=(AxisType[kind],),
        devices=jax.devices()[: case.replicas],
    )
    rows, all_ = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    x, dy = jax.device_put((x, dy), rows)
    keep = None if keep is None else jax.device_put(keep, rows)
    params = jax.device_put(params, all_)
    grads, (y, out) = jax.jit(functools.partial(run, case, size=1))(x, dy, keep, params)
    each = jax.tree.map(lambda t: np.stack([np.asarray(t)] * case.replicas), out)
    return grads, (y, each)


def check(case, mode):
    if mode in ("Auto", "Explicit"):
        case = dataclasses.replace(case, groups=None)
    arrays = case.arrays()
    (dx, dparams), rest = whole(case, *arrays)
    f = under_jit if mode in ("Auto", "Explicit") else on_replicas
    (dx_, dparams_), rest_ = f(case, mode, *arrays)
    # One rounding to bfloat16, of values that differ by float32's.
    assert_trees_close(dx_, dx, tol=1e-2 if case.dtype == "bfloat16" else 1e-5)
    assert_trees_close((dparams_, rest_), (dparams, rest), tol=1e-5)


@by_default("typed", "Explicit", mode=MODES)
@hypothesis.settings(max_examples=2, deadline=None, derandomize=True, database=None)
@hypothesis.given(case=cases())
def test_any_split_equals_the_whole(mode, case):
    check(case, mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@hypothesis.seed(1)
@hypothesis.settings(max_examples=150, deadline=None, database=None)
@hypothesis.given(case=cases())
def test_any_split_equals_the_whole_at_length(mode, case):
    check(case, mode)

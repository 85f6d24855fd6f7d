"""What every layer of the registry obeys."""

import functools
import inspect

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
    covering,
    poison,
    residual_bytes,
)
from jax.sharding import AxisType, NamedSharding
from registry import ENTRIES, POSITIONS, halves
from test_sharded import mesh

import bnjax
from bnjax._layer import CallOptions

every_layer = pytest.mark.parametrize("name", ENTRIES)


def run(entry, variables, x, mask=None, extra=None, train=True, **fields):
    """y, and the running statistics after the call."""
    extra = entry.extra() if extra is None else extra
    y, updates = entry.linen(**fields).apply(
        variables, x, not train, mask=mask, **extra, mutable=["batch_stats"]
    )
    return y, updates["batch_stats"]


def weights(entry):
    return np.cos(np.arange(np.prod(entry.shape)).reshape(entry.shape))


def loss_of(f, weights):
    """(params, x) -> a loss, and what else f gives; f: (params, x) -> (y, ...)."""

    def loss(params, x):
        y, stats = f(params, x)
        return jnp.sum(jnp.sin(y) * jnp.asarray(weights, y.dtype)), (y, stats)

    return loss


def with_params(f, variables):
    return lambda params, x: f({**variables, "params": params}, x)


def mask_of(entry, kind):
    """None, or one that leaves a replica, a group or a feature with nothing."""
    if kind is None:
        return None
    if not entry.masks_features and kind == "feature":
        kind = "position"
    shape = {
        "example": (entry.batch, 1, 1),
        "position": (entry.batch, POSITIONS, 1),
        "feature": entry.shape,
    }[kind]
    mask = np.random.default_rng(4).random(shape) < 0.7
    local = entry.batch // 8
    mask[2 * local : 3 * local] = False
    mask[0] = True
    if kind == "feature":
        mask[..., 1] = False
    return mask


def assert_same_bits(actual, expected):
    for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_array_equal(a, e)


# ---- values and derivatives ----


@pytest.mark.usefixtures("x64")
@covering(strength=1, name=ENTRIES, kind=["feature", None])
def test_equals_its_formula(name, kind):
    """Values, statistics, gradients, tangents and products with the Hessian."""
    entry = ENTRIES[name]
    variables, x = entry.variables(dtype=np.float64), entry.x(dtype=np.float64)
    mask = mask_of(entry, kind)
    x = x if mask is None else poison(x, mask)
    primals = variables["params"], x
    rng = np.random.default_rng(5)
    along = jax.tree.map(lambda v: rng.normal(size=v.shape), primals)

    def results(f):
        loss = loss_of(with_params(f, variables), weights(entry))
        gradient = jax.value_and_grad(loss, (0, 1), has_aux=True)
        return jax.jvp(gradient, primals, along)

    ours = jax.jit(lambda: results(lambda v, x: run(entry, v, x, mask)))()
    plain = jax.jit(lambda: results(lambda v, x: entry.plain(v, x, mask)))()
    assert_trees_close(ours, jax.tree.map(np.asarray, plain), tol=1e-9)


@every_layer
def test_running_statistics_are_exact(name):
    """Against the oracle, from the first step on, of means 1e4 deviations away."""
    entry = ENTRIES[name]
    variables = entry.variables()
    step = jax.jit(functools.partial(run, entry, momentum=0.0))
    for offset in (0, 1e4):
        x = entry.x() + np.float32(offset)
        check_running_statistics(entry, variables, x, step(variables, x)[1])


def check_running_statistics(entry, variables, x, stats):
    groups = entry.groups(entry.batch, 1)
    stored = variables["batch_stats"]
    (spread,) = stats.keys() - {"mean"}
    for d in np.ndindex(stored["mean"].shape[:-1]):  # the domains, if there are any
        rows = x[groups == d[0]] if d else x
        count, mean, m2 = oracle_of(stats["mean"][d], stats[spread][d])(rows)
        if not len(rows):
            mean, m2, count = stored["mean"][d], stored[spread][d], 1
        np.testing.assert_allclose(stats["mean"][d], mean, rtol=1e-6, atol=1e-6)
        atol = 1e-5 * np.max(m2 / count) if spread == "cov" else 0  # may be near 0
        np.testing.assert_allclose(stats[spread][d], m2 / count, 1e-5, atol)


def oracle_of(mean, spread):
    """Of moments, or of co-moments, of one group of all features."""
    if spread.ndim > mean.ndim:
        return functools.partial(oracle.co_moments, axis=-1, size=len(mean))
    return functools.partial(oracle.moments, axes=(0, 1))


@every_layer
def test_bfloat16(name):
    """The statistics are float32, and the result is rounded once."""
    entry = ENTRIES[name]
    narrow = jnp.bfloat16
    x = entry.x().astype(narrow)

    @jax.jit
    def f(variables, wide, x):
        results = [run(entry, variables, v) for v in (wide, x)]
        results.append(run(entry, variables, x, dtype=narrow))
        return *results, run(entry, variables, x, dtype=narrow, train=False)[0]

    expected, same, rounded, inferred = f(entry.variables(), x.astype(np.float32), x)
    assert_trees_close(same, expected, tol=2e-6, dtype=jnp.float32)
    assert_close(rounded[0], np.asarray(expected[0]), tol=4e-3, dtype=narrow)
    assert_trees_close(rounded[1], expected[1], tol=2e-6, dtype=jnp.float32)
    assert inferred.dtype == narrow


@every_layer
def test_an_activation_is_not_stored(name):
    entry = ENTRIES[name]
    x = jnp.ones((entry.batch, 256, 16), jnp.bfloat16)
    layer = entry.linen(dtype=x.dtype, activation=nn.relu)
    start = functools.partial(layer.init, use_running_average=False, **entry.extra())
    shapes = jax.eval_shape(start, jax.random.key(0), x)
    variables = jax.tree.map(lambda v: jnp.ones(v.shape, v.dtype), shapes)

    def f(x):
        options = {**entry.extra(), "mutable": ["batch_stats"]}
        return layer.apply(variables, x, False, **options)[0]

    assert residual_bytes(f, x) <= 1.1 * x.nbytes


# ---- masks ----


@every_layer
def test_what_is_masked_changes_nothing(name):
    """No output, statistic or gradient, to the bit; nor is any gradient NaN."""
    entry = ENTRIES[name]
    variables, x = entry.variables(), entry.x()
    mask = mask_of(entry, "position")
    seen = np.broadcast_to(mask, x.shape)
    f = with_params(lambda v, x: run(entry, v, x, mask), variables)

    @jax.jit
    def results(x, weights):
        loss = jax.grad(loss_of(f, weights), (0, 1), has_aux=True)
        return loss(variables["params"], x)

    expected, clean = results(np.where(seen, x, 0), np.where(seen, weights(entry), 0))
    for garbage in (np.nan, np.inf):
        dirty = poison(x, mask, garbage)
        gradients, (y, stats) = results(dirty, np.where(seen, weights(entry), 0))
        y = jnp.where(seen, y, clean[0])
        assert_same_bits((gradients, y, stats), (expected, *clean))
        for leaf in jax.tree.leaves(results(dirty, weights(entry))):
            assert np.isfinite(leaf).all()
    assert (np.asarray(gradients[1])[~seen] == 0).all()


@covering(strength=1, name=ENTRIES, update_stats=[False, True])
def test_what_is_masked_changes_nothing_in_a_frozen_layer(name, update_stats):
    """That normalizes by its running statistics: no gradient by scale is NaN."""
    entry = ENTRIES[name]
    variables, x = entry.variables(), entry.x()
    mask = mask_of(entry, "position")
    seen = np.broadcast_to(mask, x.shape)
    frozen = {"train": False, "update_stats": update_stats}
    f = with_params(lambda v, x: run(entry, v, x, mask, **frozen), variables)

    @jax.jit
    def results(x, weights):
        loss = jax.grad(loss_of(f, weights), (0, 1), has_aux=True)
        return loss(variables["params"], x)

    expected, clean = results(np.where(seen, x, 0), np.where(seen, weights(entry), 0))
    for garbage in (np.nan, -np.inf, np.finfo(np.float32).min):
        dirty = poison(x, mask, garbage)
        gradients, (y, stats) = results(dirty, np.where(seen, weights(entry), 0))
        assert np.isfinite(y).all()
        y = jnp.where(seen, y, clean[0])
        assert_same_bits((gradients, y, stats), (expected, *clean))
    inferred = run(entry, variables, x, train=False)[0]
    assert_close(jnp.where(seen, clean[0], inferred), inferred)


@every_layer
def test_masked_values_of_inference_do_not_overflow_float16(name):
    entry = ENTRIES[name]
    layer, variables = entry.linen(dtype=jnp.float16), entry.variables()
    variables["params"] = jax.tree.map(lambda p: 100 * p, variables["params"])
    mask = mask_of(entry, "position")
    seen = np.broadcast_to(mask, entry.shape)
    x = poison(entry.x(dtype=np.float16), mask, np.finfo(np.float16).max)
    infer = functools.partial(layer.apply, variables, x, True, **entry.extra())
    y, unmasked = infer(mask=mask), infer()
    assert y.dtype == jnp.float16
    assert np.isfinite(y).all()
    assert not np.isfinite(unmasked).all()
    assert_same_bits(jnp.where(seen, y, 0), jnp.where(seen, unmasked, 0))


@covering(strength=1, name=ENTRIES, how=["all masked", "no example"])
def test_nothing_valid(name, how):
    """Normalized by the running statistics, which are left as they were."""
    entry = ENTRIES[name]
    variables, x = entry.variables(), entry.x()
    extra, mask = entry.extra(), np.zeros((entry.batch, 1, 1), bool)
    if how == "no example":
        x, mask = x[:0], None
        extra = {n: v[:0] if np.ndim(v) else v for n, v in extra.items()}

    @jax.jit
    def f(x):
        g = with_params(lambda v, x: run(entry, v, x, mask, extra), variables)
        loss = jax.grad(loss_of(g, weights(entry)[: len(x)]), (0, 1), has_aux=True)
        inferred = run(entry, variables, x, extra=known(entry, x, extra), train=False)
        return loss(variables["params"], x), inferred[0]

    (gradients, (y, stats)), expected = f(x)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert_close(y, expected, tol=2e-6)
    assert_same_bits(stats, variables["batch_stats"])


def known(entry, x, extra):
    """The arguments by which evaluation takes each example as training does.

    Otherwise all of them are taken to be of the main domain.
    """
    if entry.groups is not halves:
        return extra
    return {**extra, "domain": halves(len(x), 1)}


# ---- transforms ----


@by_default("batch norm", "ghost", "renorm", "split in halves", name=ENTRIES)
def test_jit_equals_eager_and_traces_once(name):
    """NumPy inputs, too; the call's own arguments may be traced, or known."""
    entry = ENTRIES[name]
    variables, extra = entry.variables(), entry.extra()
    traced = []

    @jax.jit
    def f(variables, x, mask, extra):
        traced.append(x)
        return run(entry, variables, x, mask, extra)

    for seed in (0, 6):
        x, mask = entry.x(seed), mask_of(entry, "position")
        eager = run(entry, variables, x, mask)
        assert_trees_close(f(variables, x, mask, extra), eager, tol=2e-6)
    assert len(traced) == 1
    host = jax.tree.map(np.asarray, variables)
    device = jax.tree.map(jnp.asarray, (variables, x, mask, extra))
    numpy = run(entry, host, x, mask)
    jax.tree.map(np.testing.assert_array_equal, numpy, run(entry, *device))
    shapes = jax.eval_shape(f, variables, x, mask, extra)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, eager)
    assert jax.tree.map(dtype_of, shapes) == jax.tree.map(dtype_of, eager)


def dtype_of(leaf):
    return leaf.dtype


@by_default("ghost", "renorm", "split by example", "decorrelated", name=ENTRIES)
def test_vmap(name):
    """Over inputs, masks and the call's arguments that differ, and its gradient."""
    entry = ENTRIES[name]
    variables, mask = entry.variables(), mask_of(entry, "position")

    def f(x, mask, extra):
        g = with_params(lambda v, x: run(entry, v, x, mask, extra), variables)
        loss = loss_of(g, weights(entry))
        return jax.grad(loss, (0, 1), has_aux=True)(variables["params"], x)

    turned = {n: np.roll(v, 1) for n, v in entry.extra().items()}
    calls = (entry.x(0), mask, entry.extra()), (entry.x(1), ~mask, turned)
    mapped = jax.jit(jax.vmap(f))(*jax.tree.map(lambda *v: np.stack(v), *calls))
    each = [jax.jit(f)(*call) for call in calls]
    assert_trees_close(mapped, jax.tree.map(lambda *v: np.stack(v), *each), tol=5e-6)


@pytest.mark.usefixtures("x64")
@by_default("batch norm", "ghost", "split by example", "decorrelated", name=ENTRIES)
def test_scan_and_remat(name):
    """nn.scan over three layers of nn.remat; the formula, by lax.scan."""
    entry = ENTRIES[name]
    layers = (entry.variables(seed, np.float64) for seed in range(3))
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *layers)

    def scanned(params, x):
        def body(x, own):
            return entry.plain(own, x)

        return jax.lax.scan(body, x, {**stacked, "params": params})

    lift = functools.partial(nn.remat, policy=bnjax.remat_policy, prevent_cse=False)

    class Step(nn.Module):
        @nn.compact
        def __call__(self, x):
            cls = lift(type(entry.linen()))
            layer = cls(**entry.fields, momentum=0.9, use_running_average=False)
            return layer(x, **entry.extra()), None

    def lifted(params, x):
        axes = {"params": 0, "batch_stats": 0}
        net = nn.scan(Step, variable_axes=axes, split_rngs={"params": True}, length=3)()
        (path,) = jax.eval_shape(net.init, jax.random.key(0), x)["params"]
        variables = {**stacked, "params": params}
        named = {kind: {path: v} for kind, v in variables.items()}
        (y, _), updates = net.apply(named, x, mutable=["batch_stats"])
        return y, updates["batch_stats"][path]

    def gradients(f):
        loss = jax.grad(loss_of(f, weights(entry)), (0, 1), has_aux=True)
        return jax.jit(loss)(stacked["params"], entry.x(dtype=np.float64))

    expected = gradients(scanned)
    assert_trees_close(gradients(lifted), expected, tol=1e-9)


# ---- replicas ----

MODES = ["typed", "vmap", "Auto", "Explicit", "untyped", "pmap"]
PLACED = [
    # By default every layer in one of the first four modes, in turn, the first in all.
    pytest.param(
        *(name, mode),
        marks=[] if j < 4 and number in (0, j, j + 4) else pytest.mark.full,
    )
    for number, (name, entry) in enumerate(ENTRIES.items())
    for j, mode in enumerate(MODES)
    if entry.aligned or mode != "Explicit"  # an error: see test_ghost
]


@functools.cache
def concatenated(name, replicas):
    """Gradients, output and statistics of one device, by the formula in float64."""
    entry = ENTRIES[name]
    with jax.enable_x64(True):
        variables = entry.variables(dtype=np.float64)
        mask = mask_of(entry, "position")
        f = with_params(lambda v, x: entry.plain(v, x, mask, replicas), variables)
        loss = loss_of(f, weights(entry))
        gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
        result = gradient(variables["params"], entry.x(dtype=np.float64))
        return jax.tree.map(np.asarray, result)


@pytest.mark.parametrize(("name", "mode"), PLACED)
def test_replicas_equal_one_device(name, mode):
    """Uneven masks, a replica without a value, statistics and gradients."""
    entry = ENTRIES[name]
    variables, x, mask = entry.variables(), entry.x(), mask_of(entry, "position")
    named = None if mode in ("Auto", "Explicit") else "data"
    extra = entry.extra()
    split = {n: v for n, v in extra.items() if np.ndim(v)}
    shared = {n: v for n, v in extra.items() if not np.ndim(v)}

    def f(x, w, mask, split):
        def call(v, x):
            return run(entry, v, x, mask, {**split, **shared}, axis_name=named)

        loss = jax.grad(loss_of(with_params(call, variables), w), (0, 1), has_aux=True)
        (dparams, dx), (y, stats) = loss(variables["params"], x)
        if named and mode != "typed":  # typed, the sum over the replicas is implied
            dparams = jax.lax.psum(dparams, named)
        replicated = jax.tree.map(lambda v: v[None], (dparams, stats))
        return replicated, dx, y

    arrays = x, weights(entry).astype(np.float32), mask
    if mode in ("pmap", "vmap"):
        per_replica = functools.partial(
            jax.tree.map, lambda v: v.reshape(8, -1, *v.shape[1:])
        )
        replicate = jax.pmap if mode == "pmap" else jax.vmap
        replicate = functools.partial(replicate, axis_name="data")
        found = jax.jit(replicate(f))(*per_replica((*arrays, split)))
    else:
        found = jax.jit(in_mode(mode, f))(*placed_in(mode, arrays, split))
    replicated, dx, y = jax.tree.map(np.asarray, found)
    (dparams, dx_), (y_, stats) = concatenated(name, 8 if named else 1)
    for got, leaf in zip(*map(jax.tree.leaves, (replicated, (dparams, stats)))):
        got = got.reshape(-1, *leaf.shape)
        np.testing.assert_array_equal(got, np.broadcast_to(got[:1], got.shape))
        assert_close(got[0], leaf, tol=1e-5)
    assert_close(y.reshape(x.shape), y_, tol=5e-6)
    assert_close(dx.reshape(x.shape), dx_, tol=2e-5)


def in_mode(mode, f):
    if mode in ("Auto", "Explicit"):
        return f
    specs = jax.sharding.PartitionSpec("data")
    return jax.shard_map(
        f, mesh=mesh(), in_specs=specs, out_specs=specs, check_vma=mode == "typed"
    )


def placed_in(mode, arrays, split):
    if mode not in ("Auto", "Explicit"):
        return *arrays, split
    sharding = NamedSharding(mesh(AxisType[mode]), jax.sharding.PartitionSpec("data"))
    return jax.device_put((*arrays, split), sharding)


# ---- layers ----


def test_adding_a_layer_is_adding_an_entry():
    layers = {entry.layer for entry in ENTRIES.values()}
    for room in (bnjax.linen, bnjax.nnx):
        public = {getattr(room, n) for n in room.__all__}
        assert layers == {
            v.__name__
            for v in public
            if isinstance(v, type) and issubclass(v, (nn.Module, nnx.Module))
        }


@by_default("ghost", "renorm", "split by example", "decorrelated", name=ENTRIES)
def test_linen_equals_nnx_to_the_bit(name):
    """Two training steps, evaluation, and the recorded Moments."""
    entry = ENTRIES[name]
    variables, extra = entry.variables(), entry.extra()
    fields = {"unbiased": True, "activation": nn.relu, "dtype": jnp.bfloat16}
    linen, ours = entry.linen(**fields), entry.nnx(**fields)
    for value in variables.values():
        for key, leaf in value.items():
            getattr(ours, key).set_value(leaf)
    written = ["batch_stats", "batch_moments"]
    for seed in range(2):
        x, residual = entry.x(seed), entry.x(seed + 2)
        options = {"mask": mask_of(entry, "position"), "residual": residual, **extra}
        y, updates = linen.apply(variables, x, False, **options, mutable=written)
        variables["batch_stats"] = updates["batch_stats"]
        ours.record_moments = True
        assert_same_bits(ours(x, False, **options), y)
        assert_same_bits(ours.moments.get_value(), updates["batch_moments"]["moments"])
        for key, leaf in updates["batch_stats"].items():
            assert_same_bits(getattr(ours, key).get_value(), leaf)
    del options["mask"]
    inferred = linen.apply(variables, x, True, **options)
    assert_same_bits(ours(x, True, **options), inferred)


def test_the_arguments_of_a_call_are_declared_once():
    """CallOptions holds those that `BatchNorm.__call__` shows, in both frameworks."""
    for layer in (bnjax.linen.BatchNorm, bnjax.nnx.BatchNorm):
        parameters = inspect.signature(layer.__call__).parameters.values()
        keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        assert keywords == [*CallOptions.__annotations__]


@every_layer
def test_an_unknown_argument_is_named(name):
    entry = ENTRIES[name]
    wrong = {**entry.extra(), "maks": None}
    unknown = pytest.raises(TypeError, match="unexpected keyword argument 'maks'")
    with unknown:
        entry.linen().apply(entry.variables(), entry.x(), True, **wrong)
    with unknown:
        entry.nnx()(entry.x(), True, **wrong)


@every_layer
def test_flax_sees_one_method(name):
    """Its summaries list a call of a layer once: other methods are `nn.nowrap`."""
    entry = ENTRIES[name]
    _, updates = entry.linen().apply(
        entry.variables(),
        entry.x(),
        False,
        **entry.extra(),
        capture_intermediates=lambda module, method: True,
        mutable=["batch_stats", "batch_moments"],
    )
    assert [*updates["intermediates"]] == ["__call__"]
    assert len(updates["intermediates"]["__call__"]) == 1


@every_layer
def test_two_switches(name):
    """Where the statistics come from, and whether the running ones are written."""
    entry = ENTRIES[name]
    variables, x, extra = entry.variables(), entry.x(), entry.extra()
    extra = known(entry, x, extra)
    layer = entry.linen()
    y, moved = run(entry, variables, x, extra=extra)
    frozen = layer.apply(variables, x, False, **extra, update_stats=False)
    assert_same_bits(frozen, y)
    inferred = layer.apply(variables, x, True, **extra)
    kept, stats = run(entry, variables, x, extra=extra, train=False)
    assert_same_bits((kept, stats), (inferred, variables["batch_stats"]))
    kept, stats = run(entry, variables, x, extra=extra, train=False, update_stats=True)
    assert_same_bits(kept, inferred)
    assert_trees_close(stats, moved, tol=2e-6)


@pytest.mark.parametrize("train", [False, True])
@every_layer
def test_recorded_moments(name, train):
    """Those of the batch, merged with what is there already."""
    entry = ENTRIES[name]
    variables, extra = entry.variables(), entry.extra()
    extra = known(entry, entry.x(), extra)
    kept, batches = {}, [entry.x(seed) for seed in range(2)]
    for x in batches:
        _, kept = entry.linen(update_stats=False).apply(
            {**variables, **kept}, x, not train, **extra, mutable=["batch_moments"]
        )
    moments = kept["batch_moments"]["moments"]
    groups = np.tile(entry.groups(entry.batch, 1), 2)
    both = np.concatenate(batches)
    for d in np.ndindex(moments.mean.shape[:-1]):
        rows = both[groups == d[0]] if d else both
        expected = oracle_of(moments.mean[d], moments.m2[d])(rows)
        np.testing.assert_array_equal(moments.count[d], np.ravel(expected[0])[0])
        assert_close(moments.mean[d], expected[1], tol=2e-6)
        assert_close(moments.m2[d], expected[2], tol=2e-6)

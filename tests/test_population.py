"""Population statistics: closed forms, splits, masks, devices, models."""

import functools
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from helpers import (
    BOXES,
    assert_close,
    assert_trees_close,
    by_default,
    covering,
    poison,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bnjax
from bnjax.population import algorithm_2, pooled

P = PartitionSpec
SIZES = (2, 2, 4, 8, 16, 5)
BOTH = ["batch_stats", "batch_moments"]


class Net(nn.Module):
    """`first` sees the data themselves, `second` a Dense of them, normalized."""

    @nn.compact
    def __call__(self, x, mask=None, *, train=True):
        x = bnjax.BatchNorm(not train, name="first")(x, mask=mask)
        x = nn.Dense(4, bias_init=nn.initializers.normal(1.0), name="dense")(x)
        return bnjax.BatchNorm(not train, name="second")(x, mask=mask)


NET = Net()


def collect(variables, x):
    return NET.apply(variables, x, mutable=BOTH)


def collect_masked(variables, batch):
    return NET.apply(variables, *batch, mutable=BOTH)[1]["batch_moments"]


@functools.cache
def variables():
    """Away from 0/1, so that what is left alone shows."""
    v = NET.init(jax.random.key(0), jnp.ones((2, 3)))
    return {**v, "batch_stats": jax.tree.map(lambda s: s + 7, v["batch_stats"])}


def data(n=37, offset=2.0):
    rng = np.random.default_rng(0)
    return rng.normal(offset, 1 + np.arange(3), size=(n, 3)).astype(np.float32)


def split(x, sizes=SIZES):
    return np.split(x, np.cumsum(sizes)[:-1])


def inputs(batches):
    """What either layer sees, batch by batch, in float64."""
    dense = variables()["params"]["dense"]
    kernel, bias = (np.float64(dense[name]) for name in ("kernel", "bias"))
    one = np.ones(3)
    second = [oracle.batch_norm(b, one, 0 * one, (0,)) @ kernel + bias for b in batches]
    return {"first": [oracle.wide(b) for b in batches], "second": second}


def of_algorithm_2(each):
    return {
        "mean": np.mean([b.mean(0) for b in each], 0),
        "var": np.mean([b.var(0, ddof=1) for b in each], 0),
    }


def of_all(each):
    every = np.concatenate(each)
    return {"mean": every.mean(0), "var": every.var(0)}


ESTIMATES = [(algorithm_2, of_algorithm_2), (pooled, of_all)]
both = pytest.mark.parametrize(("estimate", "exact"), ESTIMATES)


@both
def test_closed_form_with_an_uneven_last_batch(estimate, exact):
    batches = split(data())
    expected = {name: exact(each) for name, each in inputs(batches).items()}
    stats = estimate(collect, variables(), iter(batches))
    assert_trees_close(stats, expected, tol=3e-6, dtype=jnp.float32)


def test_the_worked_example():
    batches = [np.array([[v], [w]], np.float32) for v, w in ((1, 3), (5, 9))]
    layer = bnjax.BatchNorm(use_running_average=False)
    v = layer.init(jax.random.key(0), batches[0])

    def apply(v, x):
        return layer.apply(v, x, mutable=BOTH)

    two, all_ = algorithm_2(apply, v, batches), pooled(apply, v, batches)
    assert_trees_close(two, {"mean": np.array([4.5]), "var": np.array([5.0])})
    assert_trees_close(all_, {"mean": np.array([4.5]), "var": np.array([8.75])})


def test_pooled_does_not_depend_on_the_split_and_algorithm_2_does():
    x = data()
    first = [
        [
            f(collect, variables(), split(x, sizes))["first"]
            for f in (pooled, algorithm_2)
        ]
        for sizes in (SIZES, (37,), (5, 30, 2), (9, 9, 9, 10))
    ]
    for all_, _ in first:
        assert_trees_close(all_, of_all([oracle.wide(x)]))
    assert np.ptp([two["var"] for _, two in first], 0).min() > 0.01


@both
def test_a_large_mean(estimate, exact):
    """Every batch's mean is rounded to 5e-4 of a standard deviation; no merge adds."""
    rng = np.random.default_rng(1)
    batches = rng.normal(1e4, 1, size=(512, 64, 3)).astype(np.float32)
    stats = estimate(collect, variables(), batches, stacked=True)["first"]
    expected = exact(list(oracle.wide(batches)))
    assert_close(stats["mean"], expected["mean"])
    assert_close(stats["var"], expected["var"], tol=1e-5)


@both
def test_stacked_batches_in_one_scan(estimate, exact):
    batches = data(42).reshape(6, 7, 3)
    expected = estimate(collect, variables(), batches)
    stats = estimate(collect, variables(), batches, stacked=True)
    assert_trees_close(stats, jax.tree.map(np.asarray, expected))
    mask = np.arange(42).reshape(6, 7, 1) % 5 > 0
    stats = estimate(collect_masked, variables(), (batches, mask), stacked=True)
    valid = [b[m[:, 0]] for b, m in zip(oracle.wide(batches), mask)]
    assert_trees_close(stats["first"], exact(valid), tol=3e-6)


@both
def test_masks(estimate, exact):
    """Of padding, a batch of nothing else, and one with a single valid row."""
    batches = split(data(40), (8,) * 5)
    valid = np.arange(8)[:, None] < np.array([8, 3, 0, 1, 6])[:, None, None]
    poisoned = [poison(b, m) for b, m in zip(batches, valid)]
    stats = estimate(collect_masked, variables(), zip(poisoned, valid))
    each = [oracle.wide(b[m[:, 0]]) for b, m in zip(batches, valid)]
    if estimate is algorithm_2:
        each = [b for b in each if len(b) > 1]
    assert_trees_close(stats["first"], exact(each))


@both
def test_counts_that_vary_by_feature(estimate, exact):
    x, mask = data(24).reshape(3, 8, 3), np.ones((3, 8, 3), bool)
    mask[0, 2:, 0] = mask[1, :, 0] = mask[2, 5:, 1] = False
    layer = bnjax.BatchNorm(use_running_average=False)
    v = layer.init(jax.random.key(0), x[0])

    def apply(v, batch):
        return layer.apply(v, batch[0], mask=batch[1], mutable=BOTH)

    stats = estimate(apply, v, list(zip(poison(x, mask), mask)))
    for f in range(3):
        each = [oracle.wide(b[m[:, f], f]) for b, m in zip(x, mask)]
        expected = exact([b for b in each if len(b) > 1])
        assert_close(stats["var"][f], expected["var"])
        assert_close(stats["mean"][f], expected["mean"])


@covering(
    strength=1,
    estimate=[algorithm_2, pooled],
    kind=[AxisType.Auto, AxisType.Explicit],
)
def test_batches_split_over_devices(estimate, kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    batches = split(data(48), (16, 24, 8))
    expected = jax.tree.map(np.asarray, estimate(collect, variables(), batches))
    replicated = NamedSharding(mesh, P())
    v = jax.device_put(variables(), replicated)
    sharded = [jax.device_put(b, NamedSharding(mesh, P("data"))) for b in batches]
    stats = estimate(collect, v, sharded)
    assert_trees_close(stats, expected, tol=3e-6)
    assert all(s.sharding == replicated for s in jax.tree.leaves(stats))


def test_a_shard_map_of_ones_own():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    layer = bnjax.BatchNorm(use_running_average=False, axis_name="data")
    x = data(48)
    v = layer.init(jax.random.key(0), x)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()
    )
    def apply(v, x):
        return layer.apply(v, x, mutable=BOTH)[1]["batch_moments"]

    assert_trees_close(pooled(apply, v, split(x, (16, 32))), of_all([oracle.wide(x)]))


class Shared(nn.Module):
    @nn.compact
    def __call__(self, a, b):
        norm = bnjax.BatchNorm(use_running_average=False)
        return norm(a) + norm(b)


@both
def test_a_layer_that_is_called_twice(estimate, exact):
    a, b = split(data(24), (12, 12)), split(3 * data(24) + 1, (12, 12))
    v = Shared().init(jax.random.key(0), a[0], b[0])

    def apply(v, batch):
        return Shared().apply(v, *batch, mutable=BOTH)

    stats = estimate(apply, v, zip(a, b))["BatchNorm_0"]
    assert_trees_close(stats, exact([np.concatenate(p) for p in zip(a, b)]), tol=2e-6)


def test_layers_below_scan():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + bnjax.BatchNorm(use_running_average=False)(x), None

    def model(*collections):
        axes = {"params": 0, "batch_stats": 0} | dict.fromkeys(collections, 0)
        scan = nn.scan(Block, axes, split_rngs={"params": True}, length=2)
        return scan()

    x = data(12)
    v = model().init(jax.random.key(0), x, None)

    def apply(v, x):
        return model("batch_moments").apply(v, x, None, mutable=BOTH)

    stats = pooled(apply, v, [x])["BatchNorm_0"]
    hidden = oracle.wide(x)
    for layer in range(2):
        assert_close(stats["var"][layer], hidden.var(0), tol=3e-6)
        hidden = hidden + oracle.batch_norm(hidden, np.ones(3), np.zeros(3), (0,))


class NnxNet(nnx.Module):
    def __init__(self):
        norm = functools.partial(bnjax.nnx.BatchNorm, 3, rngs=nnx.Rngs(0))
        self.norms = nnx.List([norm(), norm()])

    def __call__(self, x):
        return self.norms[1](jnp.tanh(self.norms[0](x)))


@both
def test_models_of_nnx(estimate, exact):
    model = NnxNet()
    recording = nnx.view(model, record_moments=True)
    graphdef, stats, rest = nnx.split(recording, nnx.BatchStat, ...)

    def apply(variables, batch):
        model = nnx.merge(graphdef, variables["batch_stats"], variables["rest"])
        model(batch)
        return nnx.state(model, bnjax.nnx.BatchMoments)

    batches = data(30).reshape(5, 6, 3)
    states = {"batch_stats": stats, "rest": rest}
    new = estimate(apply, states, batches)
    in_one_scan = estimate(apply, states, batches, stacked=True)
    assert_trees_close(in_one_scan, jax.tree.map(np.asarray, new))
    nnx.update(model, new)
    one, each = np.ones(3), list(oracle.wide(batches))
    for norm in model.norms:
        expected = exact(each)
        assert_close(norm.mean[...], expected["mean"], tol=5e-6)
        assert_close(norm.var[...], expected["var"], tol=5e-6)
        each = [np.tanh(oracle.batch_norm(b, one, 0 * one, (0,))) for b in each]


def test_averaged_weights_get_statistics_that_fit():
    """SWA: the old statistics belong to other weights."""
    x = data(64)
    v = variables()
    other = jax.tree.map(lambda p: 3 * p + 1, v["params"])
    average = jax.tree.map(lambda a, b: (a + b) / 2, v["params"], other)
    averaged = {"params": average, "batch_stats": v["batch_stats"]}
    fresh = {**averaged, "batch_stats": pooled(collect, averaged, [x])}
    assert_trees_close(fresh["batch_stats"]["first"], of_all([oracle.wide(x)]))
    y = NET.apply(fresh, x, train=False)
    assert_close(y, NET.apply(averaged, x, mutable=BOTH)[0], tol=2e-5)


def test_complex_values_and_structure_and_dtypes():
    x = data(24) + 1j * data(24, offset=-3.0)[::-1]
    layer = bnjax.BatchNorm(use_running_average=False)
    v = layer.init(jax.random.key(0), x)
    frozen = nn.FrozenDict(v)

    def apply(v, x):
        return layer.apply(v, x, mutable=BOTH)

    stats = pooled(apply, frozen, split(x, (9, 15)))
    assert type(stats) is nn.FrozenDict
    assert_close(stats["mean"], x.mean(0), dtype=jnp.complex64)
    assert_close(stats["var"], x.var(0), dtype=jnp.float32)
    real = layer.init(jax.random.key(0), x.real)["batch_stats"]
    half = {"batch_stats": jax.tree.map(jnp.bfloat16, real)}
    stats = pooled(apply, {**v, **half}, [x.real])
    assert stats["mean"].dtype == jnp.bfloat16


def test_double_precision(x64):
    x = np.random.default_rng(0).normal(size=(24, 3))
    layer = bnjax.BatchNorm(use_running_average=False, dtype=jnp.float64)
    v = layer.init(jax.random.key(0), x)
    wide = jax.tree.map(lambda s: s.astype(jnp.float64), v["batch_stats"])

    def apply(v, x):
        return layer.apply(v, x, mutable=BOTH)

    stats = pooled(apply, {**v, "batch_stats": wide}, split(x, (9, 15)))
    assert_close(stats["var"], x.var(0), dtype=jnp.float64)


def test_kept_layers_and_what_others_keep_stay():
    v = variables()
    norm = {"sigma": jnp.full(2, 5.0)}
    stats = {**v["batch_stats"], "spectral": norm}
    v = {**v, "batch_stats": stats}
    new = pooled(collect, v, split(data()), keep=["sec*", "spectral"])
    assert_trees_close(new["first"], of_all([oracle.wide(data())]))
    assert_trees_close(new["second"], stats["second"])
    assert_trees_close(new["spectral"], norm)
    new = pooled(collect, v, split(data()))  # it has no mean and var
    assert_trees_close(new["spectral"], norm)
    with pytest.raises(
        ValueError, match=r"keep='third' matches none .*\['first', 'sec"
    ):
        pooled(collect, v, split(data()), keep="third")


def test_layers_that_were_not_called():
    class Half(nn.Module):
        @nn.compact
        def __call__(self, x):
            return bnjax.BatchNorm(False, name="first")(x)

    def apply(v, x):
        return Half().apply(v, x, mutable=BOTH)

    with pytest.raises(ValueError, match=r"batch_stats/second got no Moments"):
        pooled(apply, variables(), [data()])


def test_variables_of_another_model():
    def other(_, x):
        return {"first": {"moments": bnjax.moments(jnp.c_[x, x])}}

    expected = r"left at first, where .* \(3,\), \(3,\): expected .* shape \(6,\)"
    with pytest.raises(ValueError, match=expected):
        pooled(other, variables(), [data()], keep="second")

    def unknown(_, x):
        return {"third": {"moments": bnjax.moments(x)}}

    with pytest.raises(
        ValueError, match=r"at third, where batch_stats has .* None, No"
    ):
        pooled(unknown, variables(), [data()], keep="*")


def test_what_gives_no_moments():
    flax = nn.BatchNorm(use_running_average=False)
    v = flax.init(jax.random.key(0), data())

    def apply(v, x):
        return flax.apply(v, x, mutable=BOTH)

    for f in (apply, lambda v, x: x, lambda v, x: {"batch_moments": {}}):
        with pytest.raises(TypeError, match=r"apply_fn returned .* holds no Moments"):
            pooled(f, v, [data()])


@pytest.mark.parametrize("estimate", [algorithm_2, pooled])
def test_what_cannot_be_estimated(estimate):
    with pytest.raises(ValueError, match="batches is empty: expected at least one"):
        estimate(collect, variables(), iter([]))
    with pytest.raises(
        ValueError, match=r"collections \['params'\]: expected 'batch_s"
    ):
        estimate(collect, {"params": {}}, [data()])
    single = np.arange(4)[:, None] < 1
    few = [(data(4), single)] * (1 if estimate is pooled else 2)
    with pytest.raises(
        ValueError, match=r"first: 3 of 3 feature\(s\) had fewer than tw"
    ):
        estimate(collect_masked, variables(), few)
    mask = np.ones((4, 3), bool)
    mask[1:, 2] = False
    layer = bnjax.BatchNorm(use_running_average=False)
    v = layer.init(jax.random.key(0), data(4))

    def apply(v, x):
        return layer.apply(v, x, mask=mask, mutable=BOTH)

    with pytest.raises(ValueError, match=r"1 of 3 feature\(s\) had fewer than two"):
        estimate(apply, v, [data(4)])
    with pytest.raises(
        ValueError, match=r"/first: the Moments of batch 1 .* hold a NaN"
    ):
        estimate(collect, variables(), [data(4), data(4) * np.inf])
    with pytest.raises(ValueError, match="progress=True with stacked=True"):
        estimate(collect, variables(), [data(4)], stacked=True, progress=True)


class WithSpectralNorm(nn.Module):
    """Whose u and sigma lie in batch_stats, too, and are none of these statistics."""

    @nn.compact
    def __call__(self, x):
        x = nn.SpectralNorm(nn.Dense(3), name="spectral")(x, update_stats=True)
        return bnjax.BatchNorm(False, name="norm")(x)


@by_default("", "in one another", box=["", *BOXES])
@by_default(pooled, estimate=[algorithm_2, pooled])
def test_what_else_lies_in_batch_stats_is_kept(estimate, box):
    model, (first, *batches) = WithSpectralNorm(), split(data())
    v = model.init(jax.random.key(0), first)

    def apply(v, x):
        return model.apply(v, x, mutable=BOTH)

    boxed = jax.tree.map(BOXES[box], v["batch_stats"]) if box else v["batch_stats"]
    new = estimate(apply, {**v, "batch_stats": boxed}, batches)
    assert jax.tree.structure(new) == jax.tree.structure(boxed)
    old = jax.tree.leaves(v["batch_stats"]["spectral"])
    for kept, was in zip(jax.tree.leaves(new["spectral"]), old, strict=True):
        np.testing.assert_array_equal(kept, was)
    alone = estimate(apply, v, batches, keep=["spectral/*"])["norm"]
    assert_trees_close(jax.tree.leaves(new["norm"]), jax.tree.leaves(alone), tol=0)
    assert not np.array_equal(alone["mean"], v["batch_stats"]["norm"]["mean"])


def test_compiled_once_per_shape():
    traced = []

    def counted(v, x):
        traced.append(x.shape)
        return collect(v, x)

    for _ in range(2):
        pooled(counted, variables(), split(data(19), (4, 4, 4, 4, 3)))
    assert traced == [(4, 3), (3, 3)]


def test_progress(monkeypatch, capsys):
    stats = pooled(collect, variables(), split(data()), progress=True)
    assert "population statistics" in capsys.readouterr().out
    assert_trees_close(stats, pooled(collect, variables(), split(data())))
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(ImportError, match=r"progress=True needs rich: .* pip install"):
        pooled(collect, variables(), split(data()), progress=True)

"""The statistics of replicas: merged as those of one set, and told apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_trees_close
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bnjax
from bnjax.diagnostics import replicas_agree
from bnjax.training import merge_batch_stats

P = PartitionSpec
COUNTS = np.array([5, 9, 2, 7, 1, 30, 4, 11])


def mesh(n=8):
    return jax.make_mesh((n,), ("data",), axis_types=(AxisType.Auto,))


def values():
    """Of eight replicas with other counts, means and spreads; of two layers."""
    rng = np.random.default_rng(0)
    return {
        name: [rng.normal(r, 1 + r, size=(n, c)) for r, n in enumerate(COUNTS)]
        for name, c in (("a", 3), ("b", 4))
    }


def statistics(each):
    return {
        "mean": np.float32([v.mean(0) for v in each]),
        "var": np.float32([v.var(0) for v in each]),
    }


def apart():
    return {"block": {k: statistics(v) for k, v in values().items()}}


def whole():
    def of(each):
        every = np.concatenate(each)
        return {"mean": every.mean(0), "var": every.var(0)}

    return {"block": {k: of(v) for k, v in values().items()}}


def test_merged_by_counts():
    merged = merge_batch_stats(apart(), counts=COUNTS)
    assert_trees_close(merged, whole(), tol=1e-6)
    assert_trees_close(jax.jit(merge_batch_stats)(apart(), counts=COUNTS), whole())


def test_equal_counts_give_the_mean_of_var_and_the_variance_of_the_means():
    stats = apart()["block"]["a"]
    merged = merge_batch_stats({"a": stats})["a"]
    assert_close(merged["mean"], stats["mean"].mean(0))
    assert_close(merged["var"], stats["var"].mean(0) + stats["mean"].var(0))


@pytest.mark.parametrize("counts", [None, COUNTS])
@pytest.mark.parametrize("mode", ["typed", "untyped", "pmap", "vmap"])
def test_merged_over_an_axis(mode, counts):
    stats = apart()
    expected = merge_batch_stats(stats, counts=counts)

    def f(stats, count):
        count = None if counts is None else count
        return merge_batch_stats(stats, counts=count, axis_name="data")

    if mode in ("pmap", "vmap"):
        transform = jax.pmap if mode == "pmap" else jax.vmap
        merged = transform(f, axis_name="data")(stats, COUNTS)
        assert replicas_agree(merged, axis=0)
        merged = jax.tree.map(lambda v: np.asarray(v)[0], merged)
    else:

        def one(stats, count):
            return f(jax.tree.map(lambda v: v[0], stats), count[0])

        wrapped = jax.shard_map(
            one,
            mesh=mesh(),
            in_specs=P("data"),
            out_specs=P(),
            check_vma=mode == "typed",
        )
        merged = jax.jit(wrapped)(stats, COUNTS)
    assert_trees_close(merged, jax.tree.map(np.asarray, expected), tol=1e-6)


def test_a_large_mean():
    rng = np.random.default_rng(0)
    each = [rng.normal(1e4 + r / 4, 1, size=(64, 3)) for r in range(8)]
    merged = merge_batch_stats(statistics(each))
    mean = np.float32([v.mean(0) for v in each]).astype(np.float64)  # as it was stored
    exact = np.var(each, 1).mean(0) + mean.var(0)
    assert_close(merged["var"], exact, tol=1e-5)


def test_replicas_that_saw_nothing():
    stats = apart()["block"]["a"]
    stats = {
        k: np.where(np.arange(8)[:, None] == 2, np.nan, v) for k, v in stats.items()
    }
    counts = np.where(np.arange(8) == 2, 0, COUNTS)
    merged = merge_batch_stats(stats, counts=counts)
    every = np.concatenate([v for r, v in enumerate(values()["a"]) if r != 2])
    assert_close(merged["var"], every.var(0))
    nothing = merge_batch_stats(stats, counts=np.zeros(8))
    assert_trees_close(nothing, {"mean": np.zeros(3), "var": np.ones(3)})


def test_structure_and_dtypes_stay():
    stats = jax.tree.map(lambda v: jnp.asarray(v, jnp.bfloat16), apart())
    merged = merge_batch_stats(stats)
    assert jax.tree.structure(merged) == jax.tree.structure(stats)
    assert {v.dtype.name for v in jax.tree.leaves(merged)} == {"bfloat16"}
    frozen = bnjax.linen.flax.core.freeze(apart())
    assert type(merge_batch_stats(frozen)) is type(frozen)
    complex_ = {"mean": np.array([[1j], [3j]], np.complex64), "var": np.ones((2, 1))}
    assert_close(merge_batch_stats(complex_)["var"], [2.0])


def test_what_cannot_be_merged():
    with pytest.raises(ValueError, match=r"batch_stats/norm/u is not the statistics"):
        merge_batch_stats({"norm": {"u": np.ones((8, 3))}})
    with pytest.raises(ValueError, match=r"a/mean has shape \(\): expected a leading"):
        merge_batch_stats({"a": {"mean": 1.0, "var": 1.0}})
    with pytest.raises(ValueError, match=r"shape \(8, 3\): expected counts \(5,\)"):
        merge_batch_stats(statistics(values()["a"]), counts=np.ones(5))
    with pytest.raises(ValueError, match="axis_name='data' is not bound"):
        merge_batch_stats(apart(), axis_name="data")


def test_replicas_that_agree():
    rows = np.random.default_rng(0).normal(size=3)
    same = {"norm": {"mean": np.stack([rows] * 8), "var": np.full((8, 3), np.nan)}}
    agreement = replicas_agree(same, axis=0)
    assert agreement
    assert str(agreement) == "8 replicas agree"
    assert replicas_agree({"a": jnp.ones(3)}).replicas == 1
    assert (
        replicas_agree(jax.device_put(same, NamedSharding(mesh(), P()))).replicas == 8
    )
    assert replicas_agree({})


def test_which_differ_and_by_how_much():
    stats = apart()
    stats["block"]["a"]["mean"][:] = 2.0
    stats["block"]["a"]["var"][:] = 2.0, 5.0, np.nan  # of all replicas
    stats["block"]["a"]["var"][3, 1] = 4.0
    agreement = replicas_agree(stats, axis=0)
    assert not agreement
    assert list(agreement.differences)[-1] == "block/a/var"
    assert agreement.differences["block/a/var"] == (1.0, 0.2)
    assert "block/a/mean" not in agreement.differences
    mean = stats["block"]["b"]["mean"]
    assert agreement.differences["block/b/mean"].absolute == pytest.approx(
        np.ptp(mean, 0).max()
    )
    assert "8 replicas differ:" in str(agreement)
    assert "block/a/var: 1 (2.0e-01 of" in str(agreement)
    assert replicas_agree({"v": stats["block"]["a"]["var"]}, axis=0, rtol=0.2)
    moved = np.moveaxis(stats["block"]["a"]["var"], 0, 1)
    assert replicas_agree({"v": moved}, axis=-1).differences["v"] == (1.0, 0.2)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_replica_that_is_not_finite(value):
    stats = np.ones((8, 3))
    stats[5, 1] = value
    assert replicas_agree({"v": stats}, axis=0).differences["v"] == (np.inf, np.inf)


def test_copies_on_devices_that_jax_believes_are_equal():
    """Local statistics out of an unchecked shard_map."""
    x = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    norm = bnjax.BatchNorm(use_running_average=False)
    variables = norm.init(jax.random.key(0), x)

    def run(axis_name):
        layer = norm.clone(axis_name=axis_name)

        def update(x):
            return layer.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]

        f = jax.shard_map(
            update, mesh=mesh(), in_specs=P("data"), out_specs=P(), check_vma=False
        )
        return jax.jit(f)(x)

    apart, together = run(None), run("data")
    assert apart["mean"].is_fully_replicated
    found = replicas_agree(apart)
    assert found.replicas == 8
    assert set(found.differences) == {"mean", "var"}
    local = x.reshape(8, 8, 3).mean(1) * 0.01
    exact = np.ptp(local, 0).max()
    assert found.differences["mean"].absolute == pytest.approx(exact, rel=1e-5)
    assert replicas_agree(together)


def test_shards_of_a_split_array_are_no_copies():
    two = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    x = jax.device_put(np.arange(12.0), NamedSharding(two, P("model")))
    assert replicas_agree({"scale": x}).replicas == 4


def test_no_such_axis():
    with pytest.raises(ValueError, match=r"v has shape \(8,\), which has no axis=1"):
        replicas_agree({"v": np.ones(8)}, axis=1)

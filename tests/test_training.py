"""The training loop: the state, accumulation, masks, and the statistics of replicas."""

import functools

import flax.core
import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx
from flax.training.dynamic_scale import DynamicScale
from helpers import (
    BOXES,
    assert_close,
    assert_trees_close,
    by_default,
    covering,
    plain_batch_norm,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bnjax
from bnjax.diagnostics import replicas_agree
from bnjax.running import State, cumulative, ema
from bnjax.training import (
    TrainState,
    accumulate,
    freeze_mask,
    merge_batch_stats,
    reset_batch_stats,
    weight_decay_mask,
)

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


@pytest.mark.parametrize("dtype", ["uint8", "float16", "int64"])
def test_counts_of_any_dtype(dtype):
    """Their sum lies beyond uint8 and float16; NumPy's int64 beyond JAX's int32."""
    counts = np.array([50_000, 45_000] if dtype == "float16" else [200, 100])
    counts = (counts * (20_000_000 if dtype == "int64" else 1)).astype(dtype)
    mean, var = np.array([[1.0], [4.0]]), np.array([[2.0], [3.0]])
    share = counts[:, None] / counts.sum(dtype=np.float64)
    expected = {"mean": (share * mean).sum(0)}
    expected["var"] = (share * (var + (mean - expected["mean"]) ** 2)).sum(0)
    stats = {"norm": {"mean": np.float32(mean), "var": np.float32(var)}}
    merged = merge_batch_stats(stats, counts=counts)["norm"]
    assert_trees_close(merged, expected)


def test_equal_counts_give_the_mean_of_var_and_the_variance_of_the_means():
    stats = apart()["block"]["a"]
    merged = merge_batch_stats({"a": stats})["a"]
    assert_close(merged["mean"], stats["mean"].mean(0))
    assert_close(merged["var"], stats["var"].mean(0) + stats["mean"].var(0))


@covering(strength=1, mode=["typed", "untyped", "pmap", "vmap"], counts=[COUNTS, None])
def test_merged_over_an_axis(mode, counts):
    stats = apart()
    expected = merge_batch_stats(stats, counts=counts)

    def f(stats, count):
        count = None if counts is None else count
        return merge_batch_stats(stats, counts=count, axis_name="data")

    if mode in ("pmap", "vmap"):
        transform = jax.pmap if mode == "pmap" else jax.vmap
        merged = jax.jit(transform(f, axis_name="data"))(stats, COUNTS)
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
    frozen = flax.core.freeze(apart())
    assert type(merge_batch_stats(frozen)) is type(frozen)
    complex_ = {"mean": np.array([[1j], [3j]], np.complex64), "var": np.ones((2, 1))}
    assert_close(merge_batch_stats(complex_)["var"], [2.0])


def test_what_cannot_be_merged():
    with pytest.raises(ValueError, match=r"batch_stats/norm is not the statistics"):
        merge_batch_stats({"norm": {"mean": np.ones((8, 3))}})
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


# ---- models for what follows ----

K, SIZE = 4, 6


class Net(nn.Module):
    momentum: float = 0.9
    frozen: bool = False
    update_stats: bool | None = None

    @nn.compact
    def __call__(self, x, *, train):
        norm = functools.partial(
            bnjax.BatchNorm,
            use_running_average=not train or self.frozen,
            momentum=self.momentum,
            update_stats=self.update_stats,
        )
        x = nn.tanh(norm(name="first")(x))
        x = nn.Dense(5, use_bias=False, name="dense")(x)
        return nn.Dense(2, name="head")(norm(name="second")(x))


def batch(rows=K * SIZE):
    rng = np.random.default_rng(0)
    x = rng.normal(1 + np.arange(3), 1 + np.arange(3), size=(rows, 3))
    return {"x": np.float32(x), "t": np.float32(rng.normal(size=(rows, 2)))}


def stacked(k=K):
    return jax.tree.map(lambda v: v.reshape(k, -1, *v.shape[1:]), batch())


@functools.cache
def variables():
    v = Net().init(jax.random.key(0), batch()["x"], train=False)
    return {**v, "batch_stats": jax.tree.map(lambda s: s + 0.5, v["batch_stats"])}


def loss_fn(variables, part, model=None):
    result = (model or Net()).apply(
        variables, part["x"], train=True, mutable=["batch_stats", "batch_moments"]
    )
    return ((result[0] - part["t"]) ** 2).mean(), result


def ghost_loss(params, data):
    """Of the large batch, each group of it normalized by its own; plain formulas."""

    def norm(x, p):
        return plain_batch_norm(x, p["scale"], p["bias"], axes=(0,))[0]

    def group(x):
        x = jnp.tanh(norm(x, params["first"])) @ params["dense"]["kernel"]
        head = params["head"]
        return norm(x, params["second"]) @ head["kernel"] + head["bias"][None]

    y = jnp.concatenate([group(x) for x in data["x"].reshape(K, SIZE, 3)])
    return ((y - data["t"]) ** 2).mean()


def whole_batch_update(momentum=0.9, ddof=0):
    """One running update from the inputs of each layer, of all groups, in float64."""
    kernel = oracle.wide(variables()["params"]["dense"]["kernel"])
    groups = oracle.wide(batch()["x"]).reshape(K, SIZE, 3)
    hidden = [
        np.tanh(oracle.batch_norm(g, np.ones(3), np.zeros(3), (0,))) @ kernel
        for g in groups
    ]

    def update(old, each):
        every = np.concatenate(each)
        new = {"mean": every.mean(0), "var": every.var(0, ddof=ddof)}
        return {n: momentum * old[n] + (1 - momentum) * new[n] for n in new}

    stats = jax.tree.map(oracle.wide, variables()["batch_stats"])
    inputs = {"first": list(groups), "second": hidden}
    return {name: update(stats[name], inputs[name]) for name in inputs}


# ---- accumulate ----


@by_default(True, jit=[False, True])
def test_accumulation_is_ghost_batch_norm_of_the_large_batch(jit):
    f = functools.partial(accumulate, loss_fn, rule=ema(0.9))
    found = (jax.jit(f) if jit else f)(variables(), stacked())
    gradient = jax.jit(jax.value_and_grad(ghost_loss))
    loss, grads = gradient(variables()["params"], batch())
    assert_close(found.loss, loss)
    assert_trees_close(found.grads, jax.tree.map(np.asarray, grads), tol=2e-5)
    assert_trees_close(found.batch_stats, whole_batch_update(), tol=2e-6)
    parts = [{n: v[k] for n, v in stacked().items()} for k in range(K)]
    one = jax.jit(loss_fn)
    outputs = [one(variables(), part)[1][0] for part in parts]
    assert_close(found.output, np.stack(outputs), tol=1e-5)


def test_accumulation_with_the_unbiased_rule():
    found = accumulate(loss_fn, variables(), stacked(), rule=ema(0.7, ddof=1))
    assert_trees_close(found.batch_stats, whole_batch_update(0.7, ddof=1), tol=2e-6)


def test_accumulation_under_multi_steps_updates_once_per_optimizer_step():
    """Two calls of two micro-batches, twice: as one call of four, twice."""
    rule = ema(0.9)

    step = jax.jit(functools.partial(accumulate, loss_fn, rule=rule))

    def run(tx, k, stepped):
        state = TrainState.create(apply_fn=Net().apply, tx=tx, **variables())
        pool = None
        parts = jax.tree.map(lambda v: v.reshape(-1, k, *v.shape[1:]), stacked())
        for _ in range(2):
            for i in range(K // k):
                part = jax.tree.map(lambda v, i=i: v[i], parts)
                found = step(state.variables, part, pool=pool)
                new = state.apply_gradients(grads=found.grads)
                choose = functools.partial(
                    jax.tree.map, functools.partial(jnp.where, stepped(new.opt_state))
                )
                stats = choose(found.batch_stats, state.batch_stats)
                state = new.replace(batch_stats=stats)
                empty = jax.tree.map(jnp.zeros_like, found.pool)
                pool = choose(empty, found.pool)
        return state

    multi = optax.MultiSteps(optax.sgd(0.1), 2)
    apart = run(multi, 2, multi.has_updated)
    whole = run(optax.sgd(0.1), 4, lambda _: True)
    expected = jax.tree.map(np.asarray, whole.variables)
    assert_trees_close(apart.variables, expected, tol=2e-5)
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), expected, variables())
    assert min(jax.tree.leaves(moved)) > 1e-3


def test_accumulation_at_a_large_mean():
    """Each micro-batch's mean is rounded to 5e-4 of a standard deviation."""
    layer = bnjax.BatchNorm(use_running_average=False)
    x = np.float32(np.random.default_rng(0).normal(1e4, 1, size=(64, 512, 3)))
    v = layer.init(jax.random.key(0), x[0])

    def loss_fn(v, x):
        result = layer.apply(v, x, mutable=["batch_stats", "batch_moments"])
        return (result[0] ** 2).mean(), result

    found = accumulate(loss_fn, v, x, rule=ema(0.0))
    exact = oracle.wide(x).reshape(-1, 3).var(0)
    assert_close(found.batch_stats["var"], exact, tol=1e-5)


def test_accumulation_with_a_model_of_nnx():
    """Which holds what it leaves in Variables, that belong to one trace."""

    model = bnjax.nnx.BatchNorm(
        3, scale_init=lambda *_: jnp.arange(1.0, 4.0), rngs=nnx.Rngs(0)
    )
    parts = nnx.split(
        nnx.view(model, record_moments=True), nnx.Param, nnx.BatchStat, ...
    )
    graphdef, states = parts[0], dict(zip(("params", "batch_stats", "rest"), parts[1:]))

    def loss_fn(variables, x):
        model = nnx.merge(graphdef, *(variables[name] for name in states))
        return jnp.tanh(model(x)).mean(), nnx.state(model, bnjax.nnx.BatchMoments)

    x = stacked()["x"]
    found = accumulate(loss_fn, states, x, rule=ema(0.9))
    exact = oracle.wide(x).reshape(-1, 3)
    assert_close(found.batch_stats["mean"][...], 0.1 * exact.mean(0))
    assert_close(found.batch_stats["var"][...], 0.9 + 0.1 * exact.var(0))

    def ghost(scale):
        y = [plain_batch_norm(g, scale, jnp.zeros(3), axes=(0,))[0] for g in x]
        return jnp.tanh(jnp.stack(y)).mean()

    expected = jax.grad(ghost)(jnp.arange(1.0, 4.0))
    assert_close(found.grads["scale"][...], expected, tol=2e-5)


@pytest.mark.parametrize("mode", ["jit", "shard_map"])
def test_accumulation_over_devices(mode):
    """Each device has its part of every micro-batch, whose statistics are global."""
    norm = bnjax.BatchNorm(
        use_running_average=False, axis_name="data" if mode == "shard_map" else None
    )
    rng = np.random.default_rng(0)
    x, weight = np.float32(rng.normal(2, 3, size=(K, 16, 3))), jnp.arange(1.0, 4.0)
    v = norm.init(jax.random.key(0), x[0])

    def run(norm, x):
        def loss_fn(v, x):
            result = norm.apply(v, x, mutable=["batch_stats", "batch_moments"])
            loss = ((jnp.tanh(result[0]) + 1) @ weight).mean()  # far from 0
            return loss if norm.axis_name is None else jax.lax.pmean(loss, "data"), (
                result[1]["batch_moments"]
            )

        return accumulate(loss_fn, v, x, rule=ema(0.9))[:3]

    expected = jax.tree.map(np.asarray, run(norm.clone(axis_name=None), x))
    f = functools.partial(run, norm)
    split = P(None, "data")
    if mode == "shard_map":
        f = jax.shard_map(f, mesh=mesh(), in_specs=split, out_specs=P())
    with jax.set_mesh(mesh()):
        found = jax.jit(f)(jax.device_put(x, NamedSharding(mesh(), split)))
    assert_trees_close(found, expected, tol=2e-6)


def test_accumulation_of_masked_micro_batches():
    """Of unlike counts, one of them empty; moments alone are returned."""
    layer = bnjax.BatchNorm(use_running_average=False)
    x = batch()["x"].reshape(K, SIZE, 3)
    mask = np.arange(SIZE)[:, None] < np.array([6, 0, 2, 5])[:, None, None]
    v = layer.init(jax.random.key(0), x[0])

    def loss_fn(v, part):
        y, left = layer.apply(
            v, part[0], mask=part[1], mutable=["batch_stats", "batch_moments"]
        )
        return (y**2).mean(), left["batch_moments"]

    found = accumulate(loss_fn, v, (x, mask), rule=ema(0.0))
    valid = oracle.wide(x)[np.broadcast_to(mask, x.shape)].reshape(-1, 3)
    assert_close(found.batch_stats["var"], valid.var(0))
    assert found.output is None
    assert found.pool[""].count == 13


def test_accumulation_in_half_precision_sums_in_single():
    """512 ones: bfloat16 counts to 256 and no further."""
    layer = bnjax.BatchNorm(use_running_average=False)
    x = np.float32(np.random.default_rng(0).normal(size=(512, 4, 3)))
    v = layer.init(jax.random.key(0), x[0])
    v = {**v, "params": jax.tree.map(jnp.bfloat16, v["params"])}

    def loss_fn(v, x):
        result = layer.apply(v, x, mutable=["batch_stats", "batch_moments"])
        return v["params"]["scale"].sum().astype(jnp.float32), result

    grads = accumulate(loss_fn, v, x, rule=ema()).grads
    assert_close(grads["scale"], np.ones(3), dtype=jnp.bfloat16, tol=1e-6)


def test_kept_statistics_are_not_updated():
    found = accumulate(loss_fn, variables(), stacked(), rule=ema(0.9), keep=["first"])
    stats = found.batch_stats
    assert_trees_close(stats["first"], variables()["batch_stats"]["first"])
    assert_trees_close(stats["second"], whole_batch_update()["second"], tol=2e-6)


def test_what_cannot_be_accumulated():
    with pytest.raises(ValueError, match=r"averages in AverageState.*ema\(momentum\)"):
        accumulate(loss_fn, variables(), stacked(), rule=cumulative())
    with pytest.raises(TypeError, match=r"loss_fn returned .* holds no Moments"):
        accumulate(
            lambda v, b: (v["params"]["head"]["bias"].sum(), {}),
            variables(),
            stacked(),
            rule=ema(),
        )
    stats = {**variables()["batch_stats"], "third": {"mean": jnp.zeros(3)}}
    v = {**variables(), "batch_stats": stats}
    with pytest.raises(ValueError, match="batch_stats/third got no Moments"):
        accumulate(loss_fn, v, stacked(), rule=ema())


# ---- what else a model updates ----


class Count(nn.Module):
    """How many batches it has seen, in a collection of its own."""

    collection: str = "counters"

    @nn.compact
    def __call__(self, x):
        seen = self.variable(self.collection, "seen", jnp.zeros, (), jnp.int32)
        if not self.is_initializing() and self.is_mutable_collection(self.collection):
            seen.value += 1
        return x


class Largest(nn.Module):
    """The largest input so far, among the statistics."""

    @nn.compact
    def __call__(self, x):
        most = self.variable("batch_stats", "most", jnp.zeros, x.shape[-1:])
        if not self.is_initializing() and self.is_mutable_collection("batch_stats"):
            most.value = jnp.maximum(most.value, x.max(0))
        return x


OTHERS = {
    "spectral": lambda name: nn.SpectralNorm(nn.Dense(3), name=name),
    "flax": lambda name: nn.BatchNorm(use_running_average=False, name=name),
    "counters": lambda name: Count(name=name),
    "in batch_stats": lambda name: Largest(name=name),
    "counts in batch_stats": lambda name: Count("batch_stats", name=name),
}


class WithOthers(nn.Module):
    names: tuple[str, ...]

    @nn.compact
    def __call__(self, x):
        for i, name in enumerate(self.names):
            other = OTHERS[name](f"other{i or ''}")
            spectral = isinstance(other, nn.SpectralNorm)
            x = other(x, update_stats=True) if spectral else other(x)
        x = bnjax.BatchNorm(use_running_average=False, momentum=0.9, name="norm")(x)
        return nn.Dense(2, name="head")(nn.tanh(x))


MUTABLE = ["batch_stats", "batch_moments", "counters"]


def with_others(*names, frozen=False):
    model, x = WithOthers(names), batch()["x"]
    variables = model.init(jax.random.key(0), x)
    variables = flax.core.freeze(variables) if frozen else variables

    def loss_fn(variables, part):
        result = model.apply(variables, part["x"], mutable=MUTABLE)
        return ((result[0] - part["t"]) ** 2).mean(), result

    return variables, loss_fn


def in_turn(variables, loss_fn, parts):
    """The plain loop: everything advances but what leaves Moments. And the gradients"""
    state = {name: flax.core.unfreeze(v) for name, v in variables.items()}
    params, total = state.pop("params"), None
    for part in parts:

        def loss(params, state=state, part=part):
            return loss_fn({"params": params, **state}, part)

        (_, (_, left)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        left = flax.core.unfreeze(left)
        left.pop("batch_moments")
        left["batch_stats"]["norm"] = state["batch_stats"]["norm"]
        state |= left
        total = grads if total is None else jax.tree.map(jnp.add, total, grads)
    return state, jax.tree.map(lambda g: g / len(parts), total)


@by_default("spectral", name=OTHERS)
@by_default(False, frozen=[False, True])
def test_what_else_the_model_updates_advances_in_turn(name, frozen):
    variables, loss_fn = with_others(name, frozen=frozen)
    parts = [{n: v[k] for n, v in stacked().items()} for k in range(K)]
    state, grads = in_turn(variables, loss_fn, parts)
    found = accumulate(loss_fn, variables, stacked(), rule=ema(0.9))
    stats = flax.core.unfreeze(found.batch_stats)
    before = State(**variables["batch_stats"]["norm"])
    expected = ema(0.9).update(before, found.pool["norm"])._asdict()
    assert_trees_close(stats.pop("norm"), expected)
    state["batch_stats"].pop("norm")
    assert_trees_close(stats, state["batch_stats"], tol=1e-6)
    updates = {n: flax.core.unfreeze(v) for n, v in found.updates.items()}
    assert updates == {n: v for n, v in state.items() if n == "counters"}
    of_all = [jax.flatten_util.ravel_pytree(g)[0] for g in (found.grads, grads)]
    assert_close(*of_all, tol=2e-5)
    structures = [jax.tree.structure(t) for t in (found.batch_stats, found.grads)]
    expected = variables["batch_stats"], variables["params"]
    assert structures == [jax.tree.structure(t) for t in expected]


def test_sigma_after_twenty_micro_batches_is_the_singular_value():
    variables, loss_fn = with_others("spectral", "counters")

    @jax.jit
    def step(state):
        found = accumulate(loss_fn, {**variables, **state}, stacked(), rule=ema(0.9))
        return {"batch_stats": found.batch_stats, **found.updates}

    state = {name: variables[name] for name in ("batch_stats", "counters")}
    for _ in range(5):
        state = step(state)
    kernel = oracle.wide(variables["params"]["Dense_0"]["kernel"])
    (sigma,) = (
        v for v in jax.tree.leaves(state["batch_stats"]["other"]) if not v.shape
    )
    assert_close(sigma, np.linalg.norm(kernel, 2), tol=1e-3)
    assert state["counters"]["other1"]["seen"] == 20


def test_keep_holds_what_else_there_is():
    variables, loss_fn = with_others("flax", "in batch_stats")
    keep = ["other", "norm"]
    with pytest.raises(ValueError, match="keep='others' matches none"):
        accumulate(loss_fn, variables, stacked(), rule=ema(), keep=["others"])
    stats = dict(accumulate(loss_fn, variables, stacked(), rule=ema(), keep=keep)[2])
    largest = {"most": np.maximum(stats["other1"]["most"], 0)}
    assert_trees_close(stats.pop("other1"), largest, tol=0)
    before = dict(variables["batch_stats"])
    assert before.pop("other1")["most"].max() < largest["most"].max()
    assert_trees_close(stats, before, tol=0)


def test_what_does_not_come_back_cannot_advance():
    """No return, no advance: an error, which says what to return."""
    variables, loss_fn = with_others("spectral")

    def moments_alone(variables, part):
        loss, (_, left) = loss_fn(variables, part)
        return loss, left["batch_moments"]

    with pytest.raises(
        ValueError, match=r"batch_stats/other.*all that .*apply.* returns"
    ):
        accumulate(moments_alone, variables, stacked(), rule=ema())
    found = accumulate(moments_alone, variables, stacked(), rule=ema(), keep=["other*"])
    stats = variables["batch_stats"]
    assert_trees_close(found.batch_stats["other"], stats["other"], tol=0)


def test_variables_that_are_not_there_at_the_start():
    variables, loss_fn = with_others("flax")
    stats = {"norm": variables["batch_stats"]["norm"]}
    with pytest.raises(ValueError, match=r"left batch_stats/other/mean.*model\.init"):
        accumulate(loss_fn, {**variables, "batch_stats": stats}, stacked(), rule=ema())


def test_what_else_an_nnx_model_updates():
    class Seen(nnx.Variable):
        pass

    class Model(nnx.Module):
        def __init__(self):
            self.seen = Seen(jnp.zeros((), jnp.int32))
            self.other = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
            self.norm = bnjax.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
            self.norm.record_moments = True

        def __call__(self, x):
            self.seen[...] += 1
            return self.norm(self.other(x))

    parts = nnx.split(Model(), nnx.Param, nnx.BatchStat, ...)
    graphdef, states = parts[0], dict(zip(("params", "batch_stats", "rest"), parts[1:]))

    def loss_fn(variables, x):
        model = nnx.merge(graphdef, *(variables[name] for name in states))
        y = model(x)
        _, _, stats, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
        moments = nnx.state(model, bnjax.nnx.BatchMoments)
        left = {"batch_moments": moments, "batch_stats": stats, "rest": rest}
        return jnp.tanh(y).mean(), (y, left)

    x = stacked()["x"]
    found = accumulate(loss_fn, states, x, rule=ema(0.9))
    model = Model()
    for part in x:
        model.other(part)
    assert_close(found.batch_stats["other"]["mean"][...], model.other.mean[...])
    assert_close(found.batch_stats["other"]["var"][...], model.other.var[...])
    assert found.updates["rest"]["seen"][...] == K
    assert found.pool["norm"].count == K * SIZE
    assert found.updates["rest"]["norm"]["moments"].get_value().count == 0


@by_default("spectral", "in batch_stats", name=OTHERS)
@by_default(False, frozen=[False, True])
def test_reset_and_merge_leave_alone_what_is_no_mean_and_var(name, frozen):
    other = with_others(name)[0]["batch_stats"]
    stats = {"of": jax.tree.map(lambda v: v + 1, flax.core.unfreeze(other))}
    stats["mixed"] = {**stats["of"]["norm"], "most": jnp.full(3, 7.0)}
    stats = flax.core.freeze(stats) if frozen else stats
    apart = jax.tree.map(lambda v: jnp.stack([v, 3 * v]), stats)
    reset, merged = reset_batch_stats(stats), merge_batch_stats(apart)
    for new in (reset, merged):
        assert jax.tree.structure(new) == jax.tree.structure(stats)
        assert type(new) is type(stats)
    given = dict(jax.tree.flatten_with_path(stats)[0])
    for path, value in given.items():
        leaf = path[-1].key
        new = dict(jax.tree.flatten_with_path(reset)[0])[path]
        of = dict(jax.tree.flatten_with_path(merged)[0])[path]
        if leaf in ("mean", "var"):
            assert_close(new, np.full(value.shape, float(leaf == "var")))
            mean = np.asarray(given[(*path[:-1], jax.tree_util.DictKey("mean"))])
            expected = 2 * np.asarray(value) + (mean**2 if leaf == "var" else 0)
            assert_close(of, expected)
        else:
            assert new is value
            assert_close(of, np.stack([value, 3 * np.asarray(value)]), tol=0)


@pytest.mark.parametrize("box", BOXES)
def test_reset_and_merge_in_metadata_boxes(box):
    """Unboxed on the way in, boxed again on the way out; `moments` have none."""
    stats = with_others("spectral", "in batch_stats")[0]["batch_stats"]
    stats = jax.tree.map(lambda v: v + 1, stats)
    apart = jax.tree.map(lambda v: jnp.stack([v, 3 * v]), stats)
    for f, given in ((reset_batch_stats, stats), (merge_batch_stats, apart)):
        assert_trees_close(
            f(jax.tree.map(BOXES[box], given)), jax.tree.map(BOXES[box], f(given))
        )


@pytest.mark.parametrize("box", ["Partitioned", "LogicallyPartitioned"])
def test_merge_over_an_axis_in_metadata_boxes(box):
    stats = {"norm": {"mean": jnp.float32([[2], [7]]), "var": jnp.float32([[1], [4]])}}

    def merged(stats, boxed):
        boxed = jax.tree.map(BOXES[box], stats) if boxed else stats
        return jax.tree.leaves(merge_batch_stats(boxed, axis_name="i"))

    plain, boxed = (
        jax.jit(jax.vmap(functools.partial(merged, boxed=b), axis_name="i"))(stats)
        for b in (False, True)
    )
    assert_trees_close(boxed, plain)


def test_half_of_a_layers_statistics_is_refused():
    whitened = {"whiten": {"mean": jnp.ones((2, 3)), "cov": jnp.ones((2, 1, 3, 3))}}
    for refuse in (merge_batch_stats, reset_batch_stats):
        with pytest.raises(ValueError, match=r"batch_stats/whiten.* is not the stat"):
            refuse(whitened)


# ---- TrainState ----


def train_state(tx):
    return TrainState.create(apply_fn=Net().apply, tx=tx, **variables())


def gradients(state, data):
    def loss_fn(params):
        y, batch_stats = state.apply(params, data["x"], train=True)
        return ((y - data["t"]) ** 2).mean(), batch_stats

    return jax.grad(loss_fn, has_aux=True)(state.params)


def test_state_has_one_return_type_for_training_and_evaluation():
    state = train_state(optax.sgd(0.1))
    x = batch()["x"]
    y, stats = state.apply(state.params, x, train=False)
    assert_close(y, Net().apply(variables(), x, train=False))
    assert_trees_close(stats, variables()["batch_stats"])
    y, stats = state.apply(state.params, x, train=True)
    expected, updates = Net().apply(variables(), x, train=True, mutable=["batch_stats"])
    assert_close(y, expected)
    assert_trees_close(stats, updates["batch_stats"])
    dense = nn.Dense(2)
    v = dense.init(jax.random.key(0), x)
    plain = TrainState.create(apply_fn=dense.apply, tx=state.tx, batch_stats={}, **v)
    assert plain.apply(plain.params, x)[1] == {}


def test_state_takes_a_step():
    state = train_state(optax.sgd(0.1))
    grads, stats = gradients(state, batch())
    new = jax.jit(lambda s, g, b: s.apply_gradients(grads=g, batch_stats=b))(
        state, grads, stats
    )
    assert new.step == 1
    assert_trees_close(new.batch_stats, stats)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, grads)
    assert_trees_close(new.params, expected)
    assert_trees_close(new.apply_gradients(grads=grads).batch_stats, stats)


def poisoned():
    data = batch()
    data["x"][2, 1] = np.inf
    return data


SKIPPING = {
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.1), 5),
    "within a chain": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.apply_if_finite(optax.adam(0.1), 5)
    ),
    "MultiSteps": lambda: optax.MultiSteps(
        optax.adam(0.1), 1, should_skip_update_fn=optax.skip_not_finite
    ),
}


@pytest.mark.parametrize("name", SKIPPING)
def test_a_step_that_the_optimizer_skips_keeps_the_statistics(name):
    state = train_state(SKIPPING[name]())

    @jax.jit
    def step(state, data):
        grads, stats = gradients(state, data)
        return state.apply_gradients(grads=grads, batch_stats=stats)

    skipped = step(state, poisoned())
    assert skipped.step == 1
    assert_trees_close(skipped.variables, variables(), tol=0)
    taken = step(skipped, batch())  # the refusal before it is not remembered
    _, stats = gradients(state, batch())
    assert_trees_close(taken.batch_stats, jax.tree.map(np.asarray, stats))
    assert (
        jnp.abs(taken.params["head"]["bias"] - state.params["head"]["bias"]).min() > 0
    )


def test_multi_steps_around_apply_if_finite():
    """A refusal stays in the inner state until the next step of the optimizer."""
    tx = optax.MultiSteps(optax.apply_if_finite(optax.sgd(0.1), 5), 2)
    state = train_state(tx)
    for data in (batch(), poisoned()):
        before = state.batch_stats
        grads, stats = gradients(state, data)
        state = state.apply_gradients(grads=grads, batch_stats=stats)
    assert_trees_close(state.batch_stats, before, tol=0)
    grads, stats = gradients(state, batch())
    state = state.apply_gradients(grads=grads, batch_stats=stats)
    assert_trees_close(state.batch_stats, stats, tol=0)


def test_dynamic_scale_restores_the_statistics():
    class Mine(TrainState):
        scale: DynamicScale

    state = Mine.create(
        apply_fn=Net().apply, tx=optax.adam(0.1), scale=DynamicScale(), **variables()
    )

    @jax.jit
    def step(state, data):
        def loss_fn(params):
            y, stats = state.apply(params, data["x"], train=True)
            return ((y - data["t"]) ** 2).mean(), stats

        f = state.scale.value_and_grad(loss_fn, has_aux=True)
        scale, finite, (_, stats), grads = f(state.params)
        return state.apply_gradients(
            grads=grads, batch_stats=stats, finite=finite, scale=scale
        )

    skipped = step(state, poisoned())
    assert_trees_close(skipped.variables, variables(), tol=0)
    assert_trees_close(skipped.opt_state, state.opt_state, tol=0)
    assert skipped.scale.scale == state.scale.scale / 2
    taken = step(skipped, batch())
    _, stats = gradients(state, batch())
    assert_trees_close(taken.batch_stats, jax.tree.map(np.asarray, stats), tol=1e-5)
    assert (
        jnp.abs(taken.params["head"]["bias"] - state.params["head"]["bias"]).min() > 0
    )


# ---- masks, reset ----


def test_weight_decay_leaves_scale_and_biases_alone():
    params = variables()["params"]
    mask = weight_decay_mask(params)
    kernels = {"first", "second"}
    assert {n for n, m in mask.items() if not any(m.values())} == kernels
    assert mask["dense"] == {"kernel": True}
    assert mask["head"] == {"kernel": True, "bias": False}
    tx = optax.adamw(0.1, weight_decay=0.5, mask=weight_decay_mask)
    masked = optax.masked(optax.add_decayed_weights(0.5), mask)
    zeros = jax.tree.map(jnp.zeros_like, params)
    ones = jax.tree.map(jnp.ones_like, params)
    for optimizer, factor in ((tx, -0.05), (masked, 0.5)):
        updates, _ = optimizer.update(zeros, optimizer.init(ones), ones)
        expected = {
            layer: {n: np.full(p.shape, factor * mask[layer][n]) for n, p in of.items()}
            for layer, of in params.items()
        }
        assert_trees_close(updates, expected)


def test_weight_decay_knows_batch_norm_by_its_statistics():
    params = {
        "odd": {"gain": 1.0, "scale": 1.0},
        "layer_norm": {"scale": 1.0, "bias": 1.0},
        "conv": {"kernel": 1.0, "norm": {"scale": 1.0}},
    }
    stats = {"odd": {"mean": 0.0, "var": 1.0}, "conv": {"norm": {"mean": 0.0}}}
    assert weight_decay_mask(params, batch_stats=stats) == {
        "odd": {"gain": False, "scale": False},
        "layer_norm": {"scale": True, "bias": False},
        "conv": {"kernel": True, "norm": {"scale": False}},
    }
    by_name = weight_decay_mask(params)
    assert by_name["odd"] == {"gain": True, "scale": False}
    assert by_name["layer_norm"]["scale"] is False
    frozen = nn.FrozenDict(params)
    assert type(weight_decay_mask(frozen)) is nn.FrozenDict


def test_masks_of_nnx_parameters():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(3, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)

    model = Model(nnx.Rngs(0))
    params, stats = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
    for mask in (
        weight_decay_mask(params),
        weight_decay_mask(params, batch_stats=stats),
        freeze_mask(params, "*/kernel"),
    ):
        assert nnx.to_pure_dict(mask) == {
            "dense": {"kernel": True, "bias": False},
            "norm": {"scale": False, "bias": False},
        }
    tx = optax.adamw(0.1, weight_decay=0.5, mask=weight_decay_mask)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    kernel = np.asarray(model.dense.kernel[...])
    optimizer.update(model, jax.tree.map(jnp.zeros_like, params))
    assert_close(model.dense.kernel[...], 0.95 * kernel)
    assert_close(model.norm.scale[...], np.ones(4), tol=0)
    assert_close(reset_batch_stats(stats)["norm"]["var"][...], np.ones(4))


def test_freeze_by_path():
    params = variables()["params"]
    mask = freeze_mask(params, "first/*", "*/kernel")
    assert mask["first"] == {"scale": True, "bias": True}
    assert mask["head"] == {"kernel": True, "bias": False}
    assert mask["second"] == {"scale": False, "bias": False}
    for pattern in ("third/*", "scale"):
        with pytest.raises(ValueError, match=f"pattern='{pattern.replace('*', '.')}'"):
            freeze_mask(params, pattern)


FREEZING = {
    "used, not updated": (True, None, True, False),
    "used and updated": (True, True, True, True),
    "neither": (False, False, False, False),
    "updated, not used": (False, None, False, True),
}


@pytest.mark.parametrize("name", FREEZING)
def test_frozen_statistics_used_and_updated_are_two_answers(name):
    frozen, update_stats, used, updated = FREEZING[name]
    model = Net(frozen=frozen, update_stats=update_stats)
    mask = freeze_mask(variables()["params"], "first/*", "second/*")
    tx = optax.chain(optax.sgd(0.1), optax.masked(optax.set_to_zero(), mask))
    state = TrainState.create(apply_fn=model.apply, tx=tx, **variables())
    grads, stats = gradients(state, batch())
    new = state.apply_gradients(grads=grads, batch_stats=stats)
    x = batch()["x"]
    y, _ = state.apply(state.params, x, train=True)
    running = Net().apply(variables(), x, train=False)
    assert (jnp.abs(y - running).max() < 1e-6) == used
    change = jnp.abs(new.batch_stats["first"]["mean"] - stats_before("first"))
    assert (change.min() > 0) == (change.max() > 0) == updated
    for layer in ("first", "second"):
        assert_trees_close(new.params[layer], state.params[layer], tol=0)
    assert jnp.abs(new.params["head"]["bias"] - state.params["head"]["bias"]).min() > 0


def stats_before(layer):
    return variables()["batch_stats"][layer]["mean"]


def test_statistics_frozen_by_a_mask():
    """Of one layer, without a change of the model; batch statistics are still used."""
    old = variables()["batch_stats"]
    state = train_state(optax.sgd(0.1))
    _, stats = gradients(state, batch())
    frozen = freeze_mask(old, "first/*")
    kept = jax.tree.map(jnp.where, frozen, old, stats)
    assert_trees_close(kept["first"], old["first"], tol=0)
    assert_trees_close(kept["second"], stats["second"], tol=0)


def test_reset():
    stats = {**variables()["batch_stats"], "half": {"mean": jnp.ones(2, jnp.bfloat16)}}
    new = reset_batch_stats(stats)
    for name, layer in new.items():
        for leaf, value in layer.items():
            assert value.dtype == stats[name][leaf].dtype
            expected = np.full(value.shape, float(leaf == "var"))
            assert_close(value, expected)

"""The tools on every variant: what they accept, and what they say where they do not."""

import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx
from helpers import assert_close, assert_trees_close, by_default

import bnjax
from bnjax import Moments, convert, diagnostics, population, training
from bnjax.fold import fold_model

N, K, C = 12, 5, 7  # batch, features in, features
X = np.random.default_rng(0).normal(1, 2, (N, K)).astype(np.float32)
DOMAIN = np.array([0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0, 1])
LAYERS = {
    "plain": bnjax.BatchNorm,
    "ghost": functools.partial(bnjax.linen.GhostBatchNorm, virtual_batch_size=4),
    "renorm": bnjax.linen.BatchRenorm,
    "split": functools.partial(bnjax.linen.SplitBatchNorm, num_splits=2),
    "shared": functools.partial(
        bnjax.linen.SplitBatchNorm, num_splits=2, shared_affine=True
    ),
}
NNX_LAYERS = {
    "plain": bnjax.nnx.BatchNorm,
    "ghost": functools.partial(bnjax.nnx.GhostBatchNorm, virtual_batch_size=4),
    "renorm": bnjax.nnx.BatchRenorm,
    "split": functools.partial(bnjax.nnx.SplitBatchNorm, num_splits=2),
    "shared": functools.partial(
        bnjax.nnx.SplitBatchNorm, num_splits=2, shared_affine=True
    ),
}
SPLIT = ("split", "shared")
every = pytest.mark.parametrize("name", LAYERS)


def split_only(name, **options):
    return options if name in SPLIT else {}


class Net(nn.Module):
    """dense, norm, relu, dense."""

    name_of_norm: str
    epsilon: float = 1e-2
    default: Any = None

    @nn.compact
    def __call__(self, x, train=False, domain=None):
        domain = self.default if domain is None else domain
        layer = LAYERS[self.name_of_norm]
        norm = layer(not train, momentum=0.8, epsilon=self.epsilon, name="norm")
        x = nn.Dense(C, name="dense")(x)
        x = nn.relu(norm(x, **split_only(self.name_of_norm, domain=domain)))
        return nn.Dense(3, name="head")(x)


class NnxNet(nnx.Module):
    def __init__(self, name):
        rngs = nnx.Rngs(0)
        self.name_of_norm = name
        self.dense = nnx.Linear(K, C, rngs=rngs)
        self.norm = NNX_LAYERS[name](C, momentum=0.8, epsilon=1e-2, rngs=rngs)
        self.head = nnx.Linear(C, 3, rngs=rngs)

    def __call__(self, x, domain=None):
        options = split_only(self.name_of_norm, domain=domain)
        return self.head(nnx.relu(self.norm(self.dense(x), **options)))


def randomized(tree):
    """The tree with values as after some training."""
    leaves, structure = jax.tree.flatten_with_path(tree)
    rng = np.random.default_rng(3)
    new = []
    for path, old in leaves:
        value = rng.normal(0.3, 1, old.shape)
        value = np.exp(value) if "var" in jax.tree_util.keystr(path) else value
        new.append(jnp.asarray(value, jnp.float32))
    return jax.tree.unflatten(structure, new)


def variables_of(name):
    return randomized(Net(name).init(jax.random.key(0), X))


def hidden(variables):
    """The input of the normalization, in float64."""
    dense = variables["params"]["dense"]
    return oracle.wide(X) @ oracle.wide(dense["kernel"]) + oracle.wide(dense["bias"])


def expected_of(variables, domains, epsilon=1e-2):
    """What the net infers, in float64, by the rows of each example's domain."""
    h, params = hidden(variables), variables["params"]
    norm = {**params["norm"], **variables["batch_stats"]["norm"]}
    rows = {k: oracle.wide(v) for k, v in norm.items()}
    own = {k: v[domains] if v.ndim > 1 else v[None] for k, v in rows.items()}
    y = (h - own["mean"]) / np.sqrt(own["var"] + epsilon) * own["scale"] + own["bias"]
    head = {k: oracle.wide(v) for k, v in params["head"].items()}
    return np.maximum(y, 0) @ head["kernel"] + head["bias"]


# Folding.


@every
def test_folded_by_the_main_domain(name):
    variables = variables_of(name)
    folded = fold_model(Net(name), variables, X)
    assert (folded.folded, folded.kept) == ((("dense", "norm"),), ())
    assert folded.params.keys() == {"dense", "head"}
    expected = expected_of(variables, np.zeros(N, int))
    assert_close(folded.apply(folded.params, X), expected, tol=1e-5)


@every
def test_folded_in_nnx(name):
    model = NnxNet(name)
    model.eval()
    nnx.update(model, randomized(nnx.state(model)))
    expected = model(X)
    folded = fold_model(model, X)
    assert (folded.folded, folded.kept) == ((("dense", "norm"),), ())
    assert_close(folded.apply(folded.params, X), expected, tol=1e-5)


@pytest.mark.parametrize("name", SPLIT)
def test_folded_by_a_domain(name):
    """A number that is known takes its row, which `apply` remembers, or insists on."""
    variables = variables_of(name)
    for domain in (1, np.array(1)):
        folded = fold_model(Net(name, default=domain), variables, X)
        assert folded.folded == (("dense", "norm"),)
        expected = expected_of(variables, np.ones(N, int))
        assert_close(folded.apply(folded.params, X), expected, tol=1e-5)
    folded = fold_model(Net(name), variables, X, domain=1)
    assert_close(folded.apply(folded.params, X), expected, tol=1e-5)
    for other in (0, None):
        with pytest.raises(ValueError, match=f"domain={other}: expected 1"):
            folded.apply(folded.params, X, domain=other)

    model = NnxNet(name)
    model.eval()
    nnx.update(model, randomized(nnx.state(model)))
    folded = fold_model(model, X, domain=1)
    assert_close(folded.apply(folded.params, X), model(X, domain=1), tol=1e-5)
    with pytest.raises(ValueError, match="domain=0: expected 1"):
        folded.apply(folded.params, X, domain=0)


@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize("domain", [DOMAIN, np.array(1)], ids=["by example", "traced"])
def test_an_array_of_domains_stays(name, domain):
    variables = variables_of(name)
    folded = fold_model(Net(name), variables, X, domain=domain)
    assert folded.folded == ()
    ((path, why),) = folded.kept
    assert path == "norm"
    assert "domain is not one number, known in advance" in why
    for given in (domain, 1 - domain):
        expected = expected_of(variables, np.broadcast_to(given, N))
        actual = jax.jit(folded.apply)(folded.params, X, domain=given)
        assert_close(actual, expected, tol=1e-5)


def test_an_array_of_domains_stays_in_nnx():
    model = NnxNet("split")
    model.eval()
    nnx.update(model, randomized(nnx.state(model)))
    folded = fold_model(model, X, domain=DOMAIN)
    ((path, why),) = folded.kept
    assert path == "norm"
    assert "domain is not one number, known in advance" in why
    for domain in (DOMAIN, 1 - DOMAIN):
        expected = model(X, domain=domain)
        assert_close(folded.apply(folded.params, X, domain=domain), expected, tol=1e-6)


def test_two_domains_of_one_layer_stay():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = LAYERS["split"](True, name="norm")
            return norm(x, domain=0) + 2 * norm(x, domain=1)

    model = Twice()
    variables = randomized(model.init(jax.random.key(0), X))
    folded = fold_model(model, variables, X)
    assert "domain is not one number" in folded.kept[0][1]
    expected = model.apply(variables, X)
    assert_close(folded.apply(folded.params, X), expected, tol=1e-6)


@pytest.mark.parametrize("name", SPLIT)
def test_a_domain_that_nothing_takes_in_becomes_an_affine_map(name):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = LAYERS[name](True, epsilon=1e-2, name="norm")
            return nn.Dense(C, name="dense")(norm(nn.relu(x), domain=1))

    model = Model()
    variables = randomized(model.init(jax.random.key(0), X))
    folded = fold_model(model, variables, X)
    assert folded.folded == ()
    assert {k: v.shape for k, v in folded.params["norm"].items()} == {
        "mean": (K,),
        "multiplier": (K,),
        "bias": (K,),
    }
    expected = model.apply(variables, X)
    assert_close(folded.apply(folded.params, X), expected, tol=1e-5)


def test_batch_statistics_of_variants_are_refused():
    for name in LAYERS:
        with pytest.raises(ValueError, match="'norm' normalizes by the batch"):
            fold_model(Net(name), variables_of(name), X, train=True)


class Whitening(nn.Module):
    """Normalizes, whitens; the whitening is no affine map of each feature."""

    @nn.compact
    def __call__(self, x, train=False):
        x = bnjax.BatchNorm(not train, name="norm")(nn.Dense(C, name="dense")(x))
        return bnjax.linen.DecorrelatedBatchNorm(not train, name="whiten")(x)


def whitening():
    """Whitening(), and variables whose covariance is one."""
    variables = randomized(Whitening().init(jax.random.key(0), X))
    stats = variables["batch_stats"]["whiten"]
    stats["cov"] = stats["cov"] @ stats["cov"].mT + jnp.eye(C)[None]
    return Whitening(), variables


def test_whitening_stays_and_is_named():
    model, variables = whitening()
    folded = fold_model(model, variables, X)
    assert folded.folded == (("dense", "norm"),)
    ((path, why),) = folded.kept
    assert path == "whiten"
    assert why.startswith(
        "a DecorrelatedBatchNorm with the variables bias, cov, mean, scale is not one "
        "that fold_model knows: expected BatchNorm, GhostBatchNorm, BatchRenorm, Split"
    )
    expected = model.apply(variables, X)
    assert_close(folded.apply(folded.params, X), expected, tol=1e-4)  # W of the folded

    layer = bnjax.nnx.DecorrelatedBatchNorm(K, rngs=nnx.Rngs(0))
    layer.eval()
    ((path, why),) = fold_model(nnx.Sequential(layer), X).kept
    assert path == "layers/0"
    assert "DecorrelatedBatchNorm" in why
    assert "is not one that fold_model knows" in why


def test_layers_that_are_not_called_say_so():
    class Model(nnx.Module):
        def __init__(self):
            self.unused = bnjax.nnx.BatchNorm(K, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return 2 * x

    ((path, why),) = fold_model(Model(), X).kept
    assert path == "unused"
    assert why.startswith("no call of it was seen")


# Population statistics.

BATCHES = X[:8], X[8:]


def rows_of(values, domains):
    return [values[domains == d] for d in range(2)]


def population_of(variables, name, ddof_and_mean):
    """(mean, var) from the inputs of the normalization, by row."""
    h = hidden(variables)
    parts = [h[:8], h[8:]]
    if name in SPLIT:
        halves = [np.split(p, 2) for p in parts]
        found = [ddof_and_mean([half[d] for half in halves]) for d in range(2)]
        return {k: np.stack([f[k] for f in found]) for k in ("mean", "var")}
    return ddof_and_mean(parts)


def by_algorithm_2(parts):
    return {
        "mean": np.mean([p.mean(0) for p in parts], 0),
        "var": np.mean([p.var(0, ddof=1) for p in parts], 0),
    }


def by_pooled(parts):
    values = np.concatenate(parts)
    return {"mean": values.mean(0), "var": values.var(0)}


ESTIMATES = [(population.algorithm_2, by_algorithm_2), (population.pooled, by_pooled)]


def collect(name, domain=None):
    def apply_fn(variables, x):
        mutable = ["batch_stats", "batch_moments"]
        own = None if domain is None else x[:, 0].astype(jnp.int32)
        return Net(name).apply(variables, x, True, own, mutable=mutable)

    return apply_fn


@every
@pytest.mark.parametrize(("estimate", "exact"), ESTIMATES)
def test_population_statistics(name, estimate, exact):
    """A ghost layer's batch is the whole batch: 8 and 4 values, whatever its groups."""
    variables = variables_of(name)
    new = estimate(collect(name), variables, BATCHES)
    expected = population_of(variables, name, exact)
    assert_trees_close(new, {"norm": expected}, tol=1e-5)


@pytest.mark.parametrize("name", SPLIT)
def test_population_statistics_in_nnx(name):
    model = NnxNet(name)
    recording = nnx.view(model, record_moments=True)
    graphdef, stats, rest = nnx.split(recording, nnx.BatchStat, ...)

    def apply_fn(variables, x):
        model = nnx.merge(graphdef, variables["batch_stats"], variables["rest"])
        model(x)
        return nnx.state(model, bnjax.nnx.BatchMoments)

    given = {"batch_stats": stats, "rest": rest}
    nnx.update(model, population.pooled(apply_fn, given, BATCHES))
    dense = {"kernel": model.dense.kernel[...], "bias": model.dense.bias[...]}
    expected = population_of({"params": {"dense": dense}}, name, by_pooled)
    assert_close(model.norm.mean[...], expected["mean"], tol=1e-5)
    assert_close(model.norm.var[...], expected["var"], tol=1e-5)


@pytest.mark.parametrize("estimate", [population.algorithm_2, population.pooled])
def test_a_domain_that_never_occurs(estimate):
    variables = variables_of("split")
    with pytest.raises(ValueError, match=rf"{C} of {2 * C} .*axis: \[1\]\): expected"):
        estimate(collect("split", "by example"), variables, [0 * X])
    new = estimate(collect("split", "by example"), variables, [0 * X], keep=["norm"])
    assert_trees_close(new, variables["batch_stats"], tol=0)


# Diagnostics.


def moments_of(variables, name):
    return collect(name)(variables, X)[1]["batch_moments"]


def trained(name):
    """Variables whose running statistics are those of X."""
    variables = variables_of(name)
    variables["params"] = jax.tree.map(jnp.ones_like, variables["params"])
    variables["params"]["dense"] = variables_of(name)["params"]["dense"]
    new = population.pooled(collect(name), variables, [X])
    return {"params": variables["params"], "batch_stats": new}


@by_default("split", name=LAYERS)
def test_healthy_variants_have_no_findings(name):
    variables = trained(name)
    batch = moments_of(variables, name)
    report = diagnostics.report(variables, batch_moments=batch)
    assert not report, str(report)
    assert str(report) == "1 layers, 0 findings"
    drift = diagnostics.drift(variables["batch_stats"], batch)["norm"]
    assert np.abs(drift.mean).max() < 1e-4
    assert np.abs(drift.std - 1).max() < 1e-4


@every
def test_new_variants_were_never_updated(name):
    variables = Net(name).init(jax.random.key(0), X)
    (finding,) = diagnostics.report(variables)
    assert finding.what == "statistics never updated"
    fresh = diagnostics.never_updated(variables["batch_stats"])["norm"]
    assert fresh.shape == ((2,) if name in SPLIT else ())
    assert fresh.all()


@pytest.mark.parametrize("name", SPLIT)
def test_faults_of_one_domain(name):
    """Each is found in its own domain; counts are those of the domains."""
    variables = trained(name)
    stats = jax.tree.map(np.array, variables["batch_stats"]["norm"])
    over = {"params": variables["params"]}

    def found(mean=None, var=None, **options):
        new = {"mean": stats["mean"].copy(), "var": stats["var"].copy()}
        if mean is not None:
            new["mean"][1, 3] = mean
        if var is not None:
            new["var"][1, 3] = var
        return [*diagnostics.report(over | {"batch_stats": {"norm": new}}, **options)]

    (dead,) = found(var=0)
    assert (dead.what, dead.figure) == ("dead", f"1 of {2 * C} channels ([1, 3])")
    (exploded,) = found(mean=np.nan)
    assert exploded.figure == f"1 of {2 * C} channels ([1, 3])"

    counts = np.array([4, 400], np.float32)
    std = np.sqrt(stats["var"])
    m2 = stats["var"] * counts[:, None]
    batch = Moments(counts, stats["mean"] + 2 * std, m2)
    (drifted,) = found(batch_moments={"norm": {"moments": batch}})
    assert drifted.what == "mean drifted"
    assert re.search(r"\(channel \[1, \d\]\)", drifted.figure), drifted

    stats["mean"][1], stats["var"][1] = 0, 1
    (fresh,) = found(batch_moments={"norm": {"moments": batch}})
    assert fresh.figure == "mean 0, var 1 in the rows 1"


def test_whitening_is_not_looked_at_which_the_report_says():
    model, variables = whitening()
    collect = functools.partial(model.apply, mutable=["batch_stats", "batch_moments"])
    batch = collect(variables, X, True)[1]["batch_moments"]
    variables["batch_stats"]["norm"] = population.pooled(
        lambda v, x: collect(v, x, True), variables, [X], keep=["whiten"]
    )["norm"]
    variables["params"]["norm"]["scale"] = jnp.ones(C)
    for moments in (batch, {"whiten": batch["whiten"]}, None):
        report = diagnostics.report(variables, batch_moments=moments)
        assert report.others == ("whiten",)
        assert not report, str(report)
        assert str(report) == (
            "1 layers, 0 findings\n  not looked at, without a mean and a var: whiten"
        )
    assert report.__rich__().caption.endswith("var: whiten")
    assert diagnostics.drift(variables["batch_stats"], batch).keys() == {"norm"}


# Training.


@by_default("ghost", "renorm", "shared", name=LAYERS)
def test_accumulated(name):
    """One update from the Moments of all micro-batches, by domain where there are."""
    variables = variables_of(name)

    def loss_fn(variables, x):
        mutable = ["batch_stats", "batch_moments"]
        result = Net(name).apply(variables, x, True, mutable=mutable)
        return (result[0] ** 2).mean(), result

    batches = X.reshape(3, 4, K)
    rule = bnjax.running.ema(0.8, ddof=1)
    run = jax.jit(functools.partial(training.accumulate, loss_fn, rule=rule))
    found = run(variables, batches)
    parts = hidden(variables).reshape(3, 4, C)
    rows = np.split(parts, 2, 1) if name in SPLIT else [parts]
    rows = [row.reshape(-1, C) for row in rows]
    new = {
        "mean": np.stack([row.mean(0) for row in rows]),
        "var": np.stack([row.var(0, ddof=1) for row in rows]),
    }
    for key, value in new.items():
        old = oracle.wide(variables["batch_stats"]["norm"][key])
        expected = 0.8 * old + 0.2 * value.reshape(old.shape)
        actual = found.batch_stats["norm"][key]
        assert_close(actual, expected, tol=1e-5, what=key)
    again = run(variables, batches, pool=found.pool)
    assert_close(again.pool["norm"].count, 2 * found.pool["norm"].count)


@every
def test_merged_and_reset(name):
    """Each domain's statistics are merged with the other replicas' of that domain."""
    stats = variables_of(name)["batch_stats"]
    other = jax.tree.map(lambda v: 3 * v, stats)
    apart = jax.tree.map(lambda *v: jnp.stack(v), stats, other)
    merged = training.merge_batch_stats(apart, counts=np.array([1, 3]))["norm"]
    mean, var = (oracle.wide(stats["norm"][k]) for k in ("mean", "var"))
    assert_close(merged["mean"], 2.5 * mean, tol=1e-5)
    assert_close(merged["var"], 2.5 * var + 3 / 16 * (2 * mean) ** 2, tol=1e-5)
    reset = training.reset_batch_stats(stats)
    fresh = Net(name).init(jax.random.key(0), X)["batch_stats"]
    assert_trees_close(reset, fresh, tol=0)


def test_covariances_are_refused_or_kept():
    """By name; the other layers' statistics are estimated."""
    model, variables = whitening()
    stats = variables["batch_stats"]
    for refuse in (training.merge_batch_stats, training.reset_batch_stats):
        with pytest.raises(
            ValueError, match=r"whiten.* is not the statistics of a bat"
        ):
            refuse(jax.tree.map(lambda v: v[None], stats))
    with pytest.raises(ValueError, match=r"whiten/cov: its name is not known"):
        convert.to_torch(variables)

    def loss_fn(variables, x):
        mutable = ["batch_stats", "batch_moments"]
        result = model.apply(variables, x, True, mutable=mutable)
        return result[0].mean(), result

    def collect(variables, x):
        return loss_fn(variables, x)[1]

    def pool(keep):
        return population.pooled(collect, variables, [X], keep=keep)

    def accumulate(keep):
        batches, rule = X.reshape(2, 6, K), bnjax.running.ema(0)
        return training.accumulate(
            loss_fn, variables, batches, rule=rule, keep=keep
        ).batch_stats

    for estimate in (pool, accumulate):
        with pytest.raises(ValueError, match=r"batch_stats/whiten got no .*covariance"):
            estimate([])
        new = estimate(["whiten"])
        assert_trees_close(new["whiten"], stats["whiten"], tol=0)
        assert_close(new["norm"]["mean"], hidden(variables).mean(0), tol=1e-5)


@every
def test_masks(name):
    variables = variables_of(name)
    params, stats = variables["params"], variables["batch_stats"]
    expected = {
        "dense": {"kernel": True, "bias": False},
        "norm": {"scale": False, "bias": False},
        "head": {"kernel": True, "bias": False},
    }
    assert training.weight_decay_mask(params, batch_stats=stats) == expected
    assert training.weight_decay_mask(params) == expected
    assert training.freeze_mask(stats, "norm/*") == {
        "norm": {"mean": True, "var": True}
    }
    tx = optax.adamw(0.1, weight_decay=1e9, mask=training.weight_decay_mask)
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert (updates["norm"]["scale"] == 0).all()


@every
def test_train_state(name):
    model = Net(name)
    variables = variables_of(name)
    state = training.TrainState.create(
        apply_fn=model.apply, tx=optax.sgd(0.1), **variables
    )
    _, stats = state.apply(state.params, X, train=True)
    new = state.apply_gradients(grads=state.params, batch_stats=stats)
    assert_trees_close(new.batch_stats, stats, tol=0)
    expected = model.apply(variables, X, train=True, mutable=["batch_stats"])[1]
    assert_trees_close(stats, expected["batch_stats"], tol=1e-6)

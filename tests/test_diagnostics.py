"""Planted faults: found in the layer that has them and in no other."""

import builtins

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from helpers import BOXES, assert_close

import bnjax
from bnjax import Moments, diagnostics
from bnjax.diagnostics import _judge

N, C = 64, 5


class Net(nn.Module):
    """Three layers, one of them in a module."""

    @nn.compact
    def __call__(self, x, train=True):
        for name in ("first", "second", "third"):
            x = nn.Dense(C, name=f"{name}_dense")(x)
            x = nn.relu(bnjax.BatchNorm(not train, momentum=0.5, name=name)(x))
        return x


def healthy():
    """(variables after ten steps, the moments of a further batch)."""

    def batch(seed):
        return jax.random.normal(jax.random.key(seed), (N, 7)) * 3 + 1

    net = Net()
    variables = net.init(jax.random.key(0), batch(0))
    step = jax.jit(
        lambda v, x: net.apply(v, x, mutable=["batch_stats", "batch_moments"])[1]
    )
    for seed in range(10):
        stats = step(variables, batch(seed))["batch_stats"]
        variables = {"params": variables["params"], "batch_stats": stats}
    moments = step(variables, batch(99))["batch_moments"]
    return jax.tree.map(np.array, variables), jax.tree.map(np.array, moments)


@pytest.fixture(scope="module")
def _trained():
    return healthy()


@pytest.fixture
def variables(_trained):
    return jax.tree.map(np.copy, _trained[0])


@pytest.fixture
def moments(_trained):
    return jax.tree.map(np.copy, _trained[1])


def test_a_healthy_net_has_no_findings(variables, moments):
    assert not diagnostics.report(variables)
    report = diagnostics.report(variables, batch_moments=moments)
    assert not report
    assert list(report) == []
    assert str(report) == "3 layers, 0 findings"
    assert all(
        v is False or not v
        for v in diagnostics.never_updated(variables["batch_stats"]).values()
    )
    for flags in diagnostics.channels(variables).values():
        assert not np.any(flags)


def plant_never_updated(variables, moments):
    stats = variables["batch_stats"]["second"]
    stats["mean"][:], stats["var"][:] = 0, 1


def plant_dead_in_running(variables, moments):
    variables["batch_stats"]["second"]["var"][3] = 1e-7
    moments["second"]["moments"].m2[3] = N * 1e-7


def plant_dead_in_batch(variables, moments):
    moments["second"]["moments"].m2[3] = 0


def plant_nan(variables, moments):
    variables["batch_stats"]["second"]["mean"][3] = np.nan


def plant_exploded_batch(variables, moments):
    moments["second"]["moments"].m2[3] = N * 1e9


def plant_large_mean(variables, moments):
    moments["second"]["moments"].mean[3] = -2e4


def plant_gamma(variables, moments):
    variables["params"]["second"]["scale"][3] = -5e-4


def plant_mean_drift(variables, moments):
    var = variables["batch_stats"]["second"]["var"][3]
    variables["batch_stats"]["second"]["mean"][3] += 3 * np.sqrt(var)


def plant_wide(variables, moments):
    moments["second"]["moments"].m2[3] *= 25


def plant_narrow(variables, moments):
    moments["second"]["moments"].m2[3] /= 25


@pytest.mark.parametrize(
    ("plant", "what", "figure"),
    [
        (plant_never_updated, "statistics never updated", "mean 0, var 1"),
        (plant_dead_in_running, "dead", "1 of 5 channels (3)"),
        (plant_dead_in_batch, "dead", "1 of 5 channels (3)"),
        (plant_nan, "exploded", "1 of 5 channels (3)"),
        (plant_exploded_batch, "exploded", "1 of 5 channels (3)"),
        (plant_large_mean, "exploded", "1 of 5 channels (3)"),
        (plant_gamma, "gamma near zero", "1 of 5 channels (3)"),
        (plant_mean_drift, "mean drifted", " standard deviations (channel 3)"),
        (plant_wide, "variance drifted", " running standard deviations (channel 3)"),
        (plant_narrow, "variance drifted", " (channel 3)"),
    ],
)
def test_a_planted_fault_is_the_only_finding(variables, moments, plant, what, figure):
    plant(variables, moments)
    report = diagnostics.report(variables, batch_moments=moments)
    assert len(report) == 1, str(report)
    (finding,) = report
    assert (finding.layer, finding.what) == ("second", what)
    assert figure in finding.figure
    assert finding.cure
    text = str(report)
    assert text.startswith("3 layers, 1 findings\n  second: " + what)
    assert finding.cure in text


def test_without_moments_the_running_statistics_are_judged(variables, moments):
    plant_dead_in_running(variables, moments)
    plant_gamma(variables, moments)
    whats = [(f.layer, f.what) for f in diagnostics.report(variables)]
    assert whats == [("second", "dead"), ("second", "gamma near zero")]


def test_a_new_model_was_never_updated():
    variables = Net().init(jax.random.key(0), jnp.ones((3, 7)))
    report = diagnostics.report(variables)
    assert [f.what for f in report] == ["statistics never updated"] * 3
    assert {f.layer for f in report} == {"first", "second", "third"}


def test_small_batches_drift_by_chance(variables):
    """A few values lie a standard deviation off, and that is no finding."""
    stats = variables["batch_stats"]["first"]
    std = np.sqrt(stats["var"])
    few = Moments(np.float32(4), stats["mean"] + 2 * std, 4 * stats["var"])
    many = few._replace(count=np.float32(400), m2=400 * stats["var"])
    for batch, expected in ((few, []), (many, ["mean drifted"])):
        found = diagnostics.report(
            variables, batch_moments={"first": {"moments": batch}}
        )
        assert [f.what for f in found] == expected


def healthy_batch(rng, count, features, *, biased=False, wide=1.0, moved=0.0):
    """Running statistics, and the Moments of normal values; one feature is off."""
    x = rng.normal(size=(count, features))
    x[:, -1] = x[:, -1] * wide + moved
    mean, var = rng.normal(size=features), rng.uniform(0.5, 4, features)
    x = x * np.sqrt(var) + mean
    batch = Moments(count, x.mean(0), count * x.var(0))
    var = var * (count - 1) / count if biased else var
    stats = {"norm": {"mean": np.float32(mean), "var": np.float32(var)}}
    batch = {"norm": {"moments": Moments(*map(np.float32, batch))}}
    return {"batch_stats": stats}, batch


def alarms(trials, count, features, **fault):
    """How many of the reports find a drift."""
    rng = np.random.default_rng(count * features)
    each = (healthy_batch(rng, count, features, **fault) for _ in range(trials))
    reports = [diagnostics.report(v, batch_moments=b) for v, b in each]
    return sum(any("drifted" in f.what for f in found) for found in reports)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("count", "features"), [(2, 64), (4, 8), (8, 512), (12, 64)])
def test_chance_is_no_drift(count, features, biased):
    """Also where the running variance is that of such batches, (n - 1)/n."""
    assert alarms(20, count, features, biased=biased) == 0


@pytest.mark.slow
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("features", [8, 64, 512])
@pytest.mark.parametrize("count", [2, 3, 4, 8, 64, 1000])
def test_chance_is_a_drift_once_in_a_hundred_reports_at_most(count, features, biased):
    assert alarms(1000, count, features, biased=biased) < 10


@pytest.mark.parametrize(
    ("count", "factor"),
    [(3, 12.0), (4, 8.0), (8, 5.0), (64, 2.5), (1000, 2.1), (16, 0.15), (64, 0.4)],
)
def test_what_the_count_can_show_is_found(count, factor):
    """A standard deviation that chance, among 64 features, hardly ever shows."""
    assert alarms(20, count, 64, wide=factor) >= 10


@pytest.mark.parametrize(("count", "moved"), [(4, 4.0), (16, 2.0), (400, 1.1)])
def test_a_mean_that_the_count_can_show_is_found(count, moved):
    assert alarms(20, count, 64, moved=moved) >= 10


@pytest.mark.parametrize("count", [2, 3, 5, 8, 20, 64, 400])
@pytest.mark.parametrize("features", [8, 512])
def test_the_limits_are_close_to_the_quantiles(count, features):
    """Of the chi-squared and the normal distribution, and never inside of them.

    But for the low end of 2 and 3 values, where the quantile is a dead channel's.
    """
    stats = pytest.importorskip("scipy.stats")
    p, k = 1e-3 / 4 / features, count - 1

    def beyond(field, drift):
        value = {"mean": np.zeros(1), "std": np.ones(1)} | {field: np.array([drift])}
        found = _judge._beyond_chance(
            diagnostics.Drift(**value), np.array([count]), features
        )
        return bool(getattr(found, field)[0])

    above = np.sqrt(stats.chi2.isf(p, k) / k)
    assert not beyond("std", above)
    assert beyond("std", 1.25 * above)
    below = np.sqrt(stats.chi2.ppf(p, k) / count)
    assert not beyond("std", below)
    assert beyond("std", (0.7 if count > 3 else 1e-4) * below)
    shift = stats.norm.isf(p) / np.sqrt(k)
    assert not beyond("mean", shift * 0.999)
    assert beyond("mean", shift * 1.001)


def test_the_channel_that_drifted_is_named():
    """Not one of few values, which is further off by chance."""
    mean, var = np.zeros(3, np.float32), np.ones(3, np.float32) * 2
    count = np.float32([3, 500, 500])
    batch = Moments(count, np.float32([3, 2, 0]), np.float32([60, 1000, 9000]))
    found = diagnostics.report(
        {"batch_stats": {"mean": mean, "var": var}}, batch_moments={"moments": batch}
    )
    whats = [(f.what, f.figure.partition("(")[2]) for f in found]
    assert whats == [("mean drifted", "channel 1)"), ("variance drifted", "channel 2)")]


def test_features_without_a_value_are_not_judged(variables):
    """A mask that varies by feature: counts of 0 and of 1."""
    stats = variables["batch_stats"]["first"]
    count = np.array([0, 1, N, N, N], np.float32)
    mean = np.where(count > 0, stats["mean"], 0)
    batch = Moments(count, mean, np.where(count > 1, count * stats["var"], 0))
    drift = diagnostics.drift(stats, {"moments": batch})[""]
    assert drift.mean[0] == 0
    assert drift.std[0] == 1
    found = diagnostics.report(variables, batch_moments={"first": {"moments": batch}})
    assert [f.what for f in found] == [], str(found)


def test_drift_against_numpy():
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (30, C)) * [1, 2, 3, 4, 5]
    stats = {"mean": rng.normal(size=C), "var": rng.uniform(0.5, 4, C)}
    stats = {k: v.astype(np.float32) for k, v in stats.items()}
    batch = {"a": {"b": {"moments": bnjax.moments(jnp.asarray(x, jnp.float32))}}}
    drift = jax.jit(diagnostics.drift)({"a": {"b": stats}}, batch)["a/b"]
    std = np.sqrt(np.float64(stats["var"]) + 1e-5)
    assert_close(drift.mean, (x.mean(0) - stats["mean"]) / std, tol=1e-5)
    assert_close(drift.std, np.sqrt(x.var(0) + 1e-5) / std, tol=1e-5)


def test_drift_asks_for_one_model(variables, moments):
    stats = variables["batch_stats"]
    with pytest.raises(ValueError, match=r"mutable=\['batch_moments'\]"):
        diagnostics.drift(stats, {})
    del stats["second"]
    with pytest.raises(
        ValueError, match=r"batch_moments/second .* first \(5,\), third"
    ):
        diagnostics.drift(stats, moments)
    stats["second"] = {"mean": np.zeros(3), "var": np.ones(3)}
    with pytest.raises(ValueError, match=r"batch_moments/second is of \(5,\)"):
        diagnostics.drift(stats, moments)


def test_channels_run_in_jit_and_need_no_params(variables):
    flags = jax.jit(diagnostics.channels)({"batch_stats": variables["batch_stats"]})
    assert not np.any(flags["first"].gamma_near_zero)
    scale = np.array([1e-2, -1e-2, -1, 2, 3], np.float32)
    variables["params"]["first"]["scale"] = scale
    flags = diagnostics.channels(variables, smallest_gamma=0.1)["first"]
    assert np.flatnonzero(flags.gamma_near_zero).tolist() == [0, 1]
    variables["batch_stats"]["first"]["mean"][:] = [0, 11, -11, 9, np.inf]
    flags = diagnostics.channels(variables, largest=10.0)["first"]
    assert np.flatnonzero(flags.exploded).tolist() == [1, 2, 4]


@pytest.mark.parametrize("f", [diagnostics.channels, diagnostics.report])
def test_variables_without_statistics(f, variables):
    with pytest.raises(ValueError, match=r"\['first', 'second', 'third'\]: expected"):
        f(variables["batch_stats"])


def test_never_updated_is_by_layer_and_in_jit(variables):
    stats = variables["batch_stats"]
    stats["third"] = {"mean": np.zeros(C, np.float32), "var": np.ones(C, np.float32)}
    found = jax.jit(diagnostics.never_updated)(stats)
    assert {k: bool(v) for k, v in found.items()} == {
        "first": False,
        "second": False,
        "third": True,
    }
    for name, value in (("mean", 1e-9), ("var", 0.99)):
        touched = {"mean": np.zeros(C, np.float32), "var": np.ones(C, np.float32)}
        touched[name][4] = value
        assert not diagnostics.never_updated(touched)[""]


def test_percentiles_against_numpy():
    x = np.random.default_rng(0).normal(size=(6, 4, 3)).astype(np.float32)
    q = np.array([15.0, 50.0, 85.0])
    assert_close(diagnostics.percentiles(x, q), np.percentile(x, q, (0, 1)), tol=1e-5)
    assert_close(
        diagnostics.percentiles(x, 15, axis=(0, -1)), np.percentile(x, 15, 1), tol=1e-5
    )
    with pytest.raises(TypeError, match="dtype int32"):
        diagnostics.percentiles(jnp.arange(6).reshape(2, 3), 50)


def test_effective_rank_against_numpy():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 3)) @ rng.normal(size=(3, 7)) + rng.normal(size=7)
    p = np.linalg.eigvalsh(np.cov(x.T))[-3:]  # the others are 0
    p = p / p.sum()
    expected = np.exp(-(p * np.log(p)).sum())
    x = x.astype(np.float32)
    assert_close(diagnostics.effective_rank(x), expected, tol=1e-3)  # of eigenvalues
    moved = x.reshape(5, 10, 7).transpose(0, 2, 1)
    assert_close(diagnostics.effective_rank(moved, axis=1), expected, tol=1e-3)
    both = np.stack([x, x * 2], 1)  # (50, 2, 7): two feature axes, as many directions
    assert_close(diagnostics.effective_rank(both, axis=(1, 2)), expected, tol=1e-3)


def test_effective_rank_of_the_simple_cases():
    x = np.random.default_rng(0).normal(size=(20_000, 4)).astype(np.float32)
    assert_close(diagnostics.effective_rank(x), 4.0, tol=1e-2)  # 20,000 samples
    one = x[:, :1] * np.arange(1, 5, dtype=np.float32) + 100
    assert_close(diagnostics.effective_rank(one), 1.0, tol=1e-3)
    assert diagnostics.effective_rank(np.ones((6, 3), np.float32)) == 0
    half = diagnostics.effective_rank(x[:50].astype(jnp.bfloat16))
    assert_close(half, diagnostics.effective_rank(x[:50]), tol=1e-2, dtype="float32")


def test_report_as_a_table(variables, moments, monkeypatch):
    plant_gamma(variables, moments)
    variables["batch_stats"]["first"]["mean"][0] = np.nan
    report = diagnostics.report(variables)
    out = rich.console.Console(width=300)
    with out.capture() as captured:
        out.print(report)
    for part in (*report.findings[0], *report.findings[1], "3 layers, 2 findings"):
        assert part in captured.get()

    def without_rich(name, *args, real=builtins.__import__, **kwargs):
        assert not name.startswith("rich")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_rich)
    assert "gamma near zero" in str(diagnostics.report(variables))


# Flax's metadata boxes.


@pytest.mark.parametrize("box", BOXES)
def test_boxes(box, variables, moments):
    """What is found is what is found without them."""
    variables["batch_stats"]["first"]["var"][2] = 1e9
    variables["params"]["second"]["scale"][1] = 0
    variables["batch_stats"]["third"]["mean"][3] += 50
    boxed = jax.tree.map(BOXES[box], variables)
    plain, stats = variables["batch_stats"], boxed["batch_stats"]
    assert diagnostics.report(boxed) == diagnostics.report(variables)
    both = [
        diagnostics.report(tree, batch_moments=moments) for tree in (boxed, variables)
    ]
    assert len(both[0]) >= 3
    assert both[0] == both[1]
    assert str(diagnostics.channels(boxed)) == str(diagnostics.channels(variables))
    drifts = [str(diagnostics.drift(tree, moments)) for tree in (stats, plain)]
    assert drifts[0] == drifts[1]
    fresh = [str(diagnostics.never_updated(tree)) for tree in (stats, plain)]
    assert fresh[0] == fresh[1]
    copies = jax.tree.map(lambda leaf: np.stack([leaf, 2 * leaf]), plain)
    differences = [
        diagnostics.replicas_agree(tree, axis=0).differences
        for tree in (jax.tree.map(BOXES[box], copies), copies)
    ]
    assert differences[0]
    assert differences[0] == differences[1]


@pytest.mark.parametrize("box", BOXES)
def test_trees_of_boxes(box, variables):
    """Masks and statistics of other rooms, which share how they read a tree."""
    boxed = jax.tree.map(BOXES[box], variables)
    mask = bnjax.training.weight_decay_mask(boxed["params"])
    expected = bnjax.training.weight_decay_mask(variables["params"])
    assert mask == jax.tree.map(BOXES[box], expected)
    mask = bnjax.training.freeze_mask(boxed["params"], "first/*")
    assert sum(jax.tree.leaves(mask)) == 2
    stats = bnjax.training.reset_batch_stats(boxed["batch_stats"])
    assert jax.tree.structure(stats) == jax.tree.structure(boxed["batch_stats"])


def test_boxes_of_an_initialized_model():
    """A scale that is partitioned, as `init` gives it."""

    def partitioned(init):
        return nn.with_partitioning(init, ("model",))

    scale = {"scale_init": partitioned(nn.initializers.zeros)}
    net = bnjax.BatchNorm(False, **scale)
    variables = net.init(jax.random.key(0), jnp.zeros((3, C)))
    assert isinstance(variables["params"]["scale"], nn.Partitioned)
    found = {finding.what for finding in diagnostics.report(variables)}
    assert found == {"gamma near zero", "statistics never updated"}

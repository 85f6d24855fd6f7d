"""Planted faults: found in the layer that has them and in no other."""

import ast
import builtins
import functools
import json
import pathlib
import re
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.style
import numpy as np
import pytest
import rich.console
from flax import nnx
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


# The momentum that a step shows.


def linen_step(layer, x, **options):
    """(variables, what a step returns) of a layer that has seen one batch before."""
    variables = layer.init(jax.random.key(0), x, **options)
    apply = functools.partial(layer.apply, mutable=["batch_stats", "batch_moments"])
    first = apply(variables, x * 3 + 2, **options)[1]["batch_stats"]
    variables = {"params": variables["params"], "batch_stats": first}
    return variables, apply(variables, x, **options)[1]


def reported(variables, updates, **options):
    return diagnostics.report(
        variables,
        batch_moments=updates["batch_moments"],
        updated=updates["batch_stats"],
        largest_drift=1e3,
        **options,
    )


def batch_of(*shape):
    return np.random.default_rng(0).normal(1, 2, shape).astype(np.float32)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("momentum", [0.1, 0.9, 0.99])
def test_the_momentum_of_a_linen_layer(momentum, unbiased):
    layer = bnjax.BatchNorm(False, momentum=momentum, unbiased=unbiased)
    report = reported(*linen_step(layer, batch_of(6, 4, 3)))
    (measures,) = report.measures
    assert measures.momentum == pytest.approx(momentum, abs=1e-5)  # float32
    expected = ["momentum too small"] if momentum == 0.1 else []
    assert [finding.what for finding in report] == expected


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("momentum", [0.1, 0.9, 0.99])
def test_the_momentum_of_an_nnx_layer(momentum, unbiased):
    """States are read as they are."""
    layer = bnjax.nnx.BatchNorm(
        3, momentum=momentum, unbiased=unbiased, rngs=nnx.Rngs(0)
    )
    x = batch_of(6, 4, 3)
    layer(x * 3 + 2)
    layer.record_moments = True

    def state(kind):
        return jax.tree.map(jnp.copy, nnx.state(layer, kind))

    variables = {"params": state(nnx.Param), "batch_stats": state(nnx.BatchStat)}
    layer(x)
    moments = state(bnjax.nnx.BatchMoments)
    updates = {"batch_moments": moments, "batch_stats": state(nnx.BatchStat)}
    report = reported(variables, updates)
    (measures,) = report.measures
    assert measures.layer == ""
    assert measures.momentum == pytest.approx(momentum, abs=1e-5)  # float32
    expected = ["momentum too small"] if momentum == 0.1 else []
    assert [finding.what for finding in report] == expected
    copies = jax.tree.map(lambda leaf: np.stack([leaf, leaf + 1]), state(nnx.BatchStat))
    differ = diagnostics.replicas_agree(copies, axis=0)
    assert sorted(differ.differences) == ["mean", "var"]
    assert diagnostics.report(variables, replicas=differ).measures[0].difference > 0


@pytest.mark.parametrize(
    "layer",
    [
        bnjax.linen.GhostBatchNorm(False, virtual_batch_size=2, momentum=0.7),
        bnjax.linen.BatchRenorm(False, momentum=0.7),
    ],
    ids=["ghost", "renorm"],
)
def test_the_momentum_of_variants(layer):
    (measures,) = reported(*linen_step(layer, batch_of(6, 4, 3))).measures
    assert measures.momentum == pytest.approx(0.7, abs=1e-5)  # float32


def test_the_momentum_of_domains():
    """By row; a domain without an example in the batch was rightly not updated."""
    layer = bnjax.linen.SplitBatchNorm(False, momentum=0.1, num_splits=3)
    x = batch_of(6, 4, 3)
    variables, _ = linen_step(layer, x, domain=np.array([0, 1, 2, 0, 1, 2]))
    domain = np.array([0, 2, 2, 0, 0, 0])
    _, updates = layer.apply(
        variables, x, domain=domain, mutable=["batch_stats", "batch_moments"]
    )
    report = reported(variables, updates)
    (finding,) = report
    assert finding.figure == "0.1, an average of 1.1 batches in the rows 0, 2"
    assert [m.row for m in report.measures] == [(0,), (1,), (2,)]
    assert [m.name for m in report.measures] == [".[0]", ".[1]", ".[2]"]
    momenta = [m.momentum for m in report.measures]
    assert np.isnan(momenta[1])
    assert np.isnan(report.measures[1].drift.mean).all()
    assert momenta[0::2] == pytest.approx([0.1, 0.1], abs=1e-5)  # float32


def test_a_step_that_updates_nothing():
    variables, updates = linen_step(bnjax.BatchNorm(False), batch_of(6, 4, 3))
    still = updates | {"batch_stats": variables["batch_stats"]}
    (finding,) = reported(variables, still)
    assert finding[:3] == ("", "not updated by the step", "mean as before")
    assert reported(variables, still).measures[0].momentum == 1
    moments = updates["batch_moments"]["moments"]
    for factor in (1, 1 + 3e-7):  # the batch has the running mean, but for rounding
        mean = variables["batch_stats"]["mean"] * np.float32(factor)
        same = {"moments": moments._replace(mean=mean)}
        report = reported(variables, still | {"batch_moments": same})
        assert not report
        assert np.isnan(report.measures[0].momentum)


def test_a_large_momentum_is_an_update():
    """Although most channels are too close to the batch to show it."""
    batch = Moments(np.float32(64), np.float32([1, 2, 3]), np.float32([64, 64, 64]))
    old = {"mean": np.float32([2, 3, 4]), "var": np.ones(3, np.float32)}
    new = old | {"mean": np.float32([2, 3, np.nextafter(np.float32(4), 0)])}
    variables = {"batch_stats": old}
    report = reported(
        variables, {"batch_moments": {"moments": batch}, "batch_stats": new}
    )
    assert not report
    assert 0.99 < report.measures[0].momentum < 1


@pytest.mark.parametrize(
    "rule",
    [bnjax.running.cumulative(), bnjax.running.debiased_ema(0.7)],
    ids=["cumulative", "debiased"],
)
def test_averages_that_start_at_zero_are_no_small_momentum(rule):
    """In their first steps a batch weighs much."""
    rng = np.random.default_rng(0)
    state = rule.init((5,))
    for _ in range(4):
        x = jnp.asarray(rng.normal(1, 2, (60, 5)), jnp.float32)
        batch = bnjax.moments(x)
        old = rule.read(state)._asdict()
        state = rule.update(state, batch)
        updates = {
            "batch_moments": {"moments": batch},
            "batch_stats": rule.read(state)._asdict(),
        }
        whats = [f.what for f in reported({"batch_stats": old}, updates)]
        assert whats in ([], ["statistics never updated"])


def test_a_batch_that_is_skipped_is_no_step_without_update():
    layer = bnjax.BatchNorm(False, skip_nonfinite_updates=True)
    x = batch_of(6, 4, 3)
    variables, _ = linen_step(layer, x)
    x[0, 0, 1] = np.nan
    collections = ["batch_stats", "batch_moments"]
    report = reported(variables, layer.apply(variables, x, mutable=collections)[1])
    assert [finding.what for finding in report] == ["exploded"]
    assert np.isnan(report.measures[0].momentum)


def test_frozen_layers_are_no_step_without_update():
    x = batch_of(6, 4, 3)
    variables, _ = linen_step(bnjax.BatchNorm(False), x)
    frozen = bnjax.BatchNorm(False, frozen=True)
    updates = frozen.apply(variables, x, mutable=["batch_stats", "batch_moments"])[1]
    updates = {"batch_stats": variables["batch_stats"]} | updates
    report = reported(variables, updates)
    assert not report, str(report)
    assert np.isnan(report.measures[0].momentum)


def test_the_update_of_another_batch_tells_no_momentum():
    layer, x = bnjax.BatchNorm(False, momentum=0.9), batch_of(6, 4, 3)
    variables, updates = linen_step(layer, x)
    other = linen_step(layer, x[:, ::-1, ::-1] ** 2)[1]
    report = reported(variables, updates | {"batch_stats": other["batch_stats"]})
    assert np.isnan(report.measures[0].momentum)


def test_updated_is_of_the_same_step_and_model(variables, moments):
    stats = variables["batch_stats"]
    with pytest.raises(ValueError, match=r"updated= without batch_moments: .* Write "):
        diagnostics.report(variables, updated=stats)
    for wrong in ({"first": stats["first"]}, {"batch_stats": stats}):
        with pytest.raises(ValueError, match=r"updated/\w+ is missing: .* \(5,\)"):
            diagnostics.report(variables, batch_moments=moments, updated=wrong)
    wide = jax.tree.map(lambda a: np.ones(7), stats)
    with pytest.raises(ValueError, match=r"updated/\w+ is of \(7,\) features: .*\(5,"):
        diagnostics.report(variables, batch_moments=moments, updated=wide)


# Replicas.


def test_replicas_that_differ(variables):
    """Whichever tree was compared; a layer that is none of ours is named too."""
    copies = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), variables)
    copies["batch_stats"]["second"]["mean"][1] += 3
    copies["batch_stats"]["third"]["var"][1, 2] = np.nan
    copies["params"]["first_dense"]["kernel"][0, 0, 0] += 9
    agreement = diagnostics.replicas_agree(copies, axis=0)
    report = diagnostics.report(variables, replicas=agreement)
    relative = agreement.differences["batch_stats/second/mean"].relative
    assert [finding[:3] for finding in report] == [
        ("second", "replicas differ", f"by {relative:.1e} of the largest value (mean)"),
        ("third", "replicas differ", "one is not finite (var)"),
        ("first_dense", *report.findings[2][1:3]),
    ]
    assert report.findings[2].figure.endswith("value (kernel)")
    assert [m.difference for m in report.measures] == [0, relative, np.inf]
    stats = diagnostics.replicas_agree(copies["batch_stats"], axis=0)
    assert diagnostics.report(variables, replicas=stats).findings == report.findings[:2]
    same = diagnostics.replicas_agree(variables)
    assert not diagnostics.report(variables, replicas=same)
    assert diagnostics.report(variables).measures[0].difference is None


# What a report keeps, and its forms.


def chain(names, seed=0):
    """A step of healthy layers: (variables, what apply returns), both NumPy's."""
    rng = np.random.default_rng(seed)
    trees = {"batch_stats": {}, "params": {}}, {"batch_stats": {}, "batch_moments": {}}
    for name in names:
        mean, var = rng.normal(size=C), rng.uniform(0.5, 2, C)
        batch, wide = mean + 0.1 * rng.normal(size=C), var * rng.uniform(0.9, 1.1, C)
        stats = {"mean": mean, "var": var}
        new = {"mean": 0.9 * mean + 0.1 * batch, "var": 0.9 * var + 0.1 * wide}
        moments = Moments(np.float32(400), np.float32(batch), np.float32(400 * wide))
        trees[0]["batch_stats"][name] = jax.tree.map(np.float32, stats)
        trees[0]["params"][name] = {"scale": np.ones(C, np.float32)}
        trees[1]["batch_stats"][name] = jax.tree.map(np.float32, new)
        trees[1]["batch_moments"][name] = {"moments": moments}
    return trees


def broken_chain(names):
    """Each fault in another layer; the first layer and the last are healthy."""
    variables, updates = chain(names)
    stats, new = variables["batch_stats"], updates["batch_stats"]
    moments = {k: v["moments"] for k, v in updates["batch_moments"].items()}
    stats[names[1]] = {"mean": np.zeros(C, np.float32), "var": np.ones(C, np.float32)}
    moments[names[2]].mean[3] = np.nan
    moments[names[3]].m2[[1, 4]] = 0
    variables["params"][names[4]]["scale"][0] = 0
    moments[names[5]].mean[2] += 30
    new[names[5]]["mean"][2] += 3
    new[names[6]] = jax.tree.map(np.copy, stats[names[6]])
    difference = (moments[names[7]].mean, stats[names[7]]["mean"])
    new[names[7]]["mean"][:] = 0.9 * difference[0] + 0.1 * difference[1]
    replicas = diagnostics.Agreement(
        2,
        {
            f"{names[8]}/mean": diagnostics.Difference(3.0, 0.25),
            f"{names[9]}/var": diagnostics.Difference(np.inf, np.inf),
        },
    )
    return diagnostics.report(
        variables,
        batch_moments=updates["batch_moments"],
        updated=new,
        replicas=replicas,
    )


NAMES = [f"block_{i}" for i in range(12)]
BROKEN = {
    "block_1": "statistics never updated",
    "block_2": "exploded",
    "block_3": "dead",
    "block_4": "gamma near zero",
    "block_5": "mean drifted",
    "block_6": "not updated by the step",
    "block_7": "momentum too small",
    "block_8": "replicas differ",
    "block_9": "replicas differ",
}


def test_findings_and_measures_are_in_natural_order():
    report = broken_chain(NAMES)
    assert {f.layer: f.what for f in report} == BROKEN, str(report)
    assert [f.layer for f in report] == list(BROKEN)
    assert [m.layer for m in report.measures] == NAMES
    assert all(finding.cure for finding in report)


def test_measures_against_numpy():
    variables, updates = chain(["a", "b"])
    report = reported(variables, updates)
    assert not report
    for measures in report.measures:
        stats = variables["batch_stats"][measures.layer]
        batch = updates["batch_moments"][measures.layer]["moments"]
        std = np.sqrt(np.float64(stats["var"]) + 1e-5)
        shift = (np.float64(batch.mean) - stats["mean"]) / std
        ratio = np.sqrt(np.float64(batch.m2) / 400 + 1e-5) / std
        assert isinstance(measures.drift.mean, np.ndarray)
        assert_close(measures.drift.mean, shift, tol=1e-5)
        assert_close(measures.drift.std, ratio, tol=1e-5)
        assert not np.any(measures.drifted)
        assert not np.any(measures.channels)
        assert not measures.never_updated
        assert measures.momentum == pytest.approx(0.9, abs=1e-4)  # float32


def test_channels_that_are_not_judged_have_no_drift():
    measures = {m.layer: m for m in broken_chain(NAMES).measures}
    known = {k: np.isfinite(m.drift.mean).tolist() for k, m in measures.items()}
    assert known["block_0"] == [True] * C
    assert known["block_1"] == [False] * C
    assert known["block_2"] == [True, True, True, False, True]
    assert known["block_3"] == [True, False, True, True, False]
    assert measures["block_5"].drifted.mean.tolist() == [0, 0, 1, 0, 0]


def test_rows_and_scalars_are_plain():
    """JSON takes them: no NaN, no infinity, no arrays."""
    report = broken_chain(NAMES)
    rows = report.rows()
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert [row["layer"] for row in rows] == NAMES
    assert [row["findings"] for row in rows] == [BROKEN.get(n, "") for n in NAMES]
    counts = ("never_updated", "exploded", "dead", "gamma_near_zero")
    found = {k: [row[k] for row in rows if row[k]] for k in counts}
    assert list(found.values()) == [[1], [1], [2], [1]]
    assert {row["channels"] for row in rows} == {C}
    drift = report.measures[5].drift
    assert rows[5]["mean_drift"] == pytest.approx(np.abs(drift.mean).max())
    assert rows[5]["mean_drift"] > 10
    ratios = [row["std_ratio"] for row in rows if row["layer"] != "block_1"]
    for ratio, measures in zip(ratios, report.measures[:1] + report.measures[2:]):
        std = measures.drift.std[np.isfinite(measures.drift.std)]
        assert ratio == pytest.approx(std[np.argmax(np.abs(np.log(std)))])
    assert min(ratios) < 1 < max(ratios)
    momenta = [row["momentum"] for row in rows]
    assert momenta[1:3] == [None, None]
    assert momenta[6:8] == [1, pytest.approx(0.1, abs=1e-4)]  # float32
    assert [row["replica_difference"] for row in rows[7:]] == [0, 0.25, None, 0, 0]

    scalars = report.to_dict()
    assert json.loads(json.dumps(scalars, allow_nan=False)) == scalars
    assert all(type(value) in (int, float) for value in scalars.values())
    assert (scalars["layers"], scalars["findings"]) == (12, 9)
    assert scalars["block_5/mean_drift"] == rows[5]["mean_drift"]
    assert "block_1/momentum" not in scalars


def test_rows_leave_out_what_was_not_measured(variables):
    (row, *_), others = diagnostics.report(variables).rows(), {"layer", "channels"}
    counts = {"never_updated", "exploded", "dead", "gamma_near_zero", "findings"}
    assert set(row) == others | counts
    assert diagnostics.Report(0, ()).rows() == []
    assert diagnostics.Report(0, ()).to_dict() == {"layers": 0, "findings": 0}


def test_html_is_escaped():
    stats = {"<b>": {"mean": np.zeros(3), "var": np.ones(3)}, "<i>": {"cov": np.eye(3)}}
    report = diagnostics.report({"batch_stats": stats})
    page = report._repr_html_()
    assert "<td" in page
    assert "&lt;b&gt;" in page
    assert "&lt;i&gt;" in page
    assert "<b>" not in page.replace("<p><b>1 layers, 1 findings</b></p>", "")
    assert "<i>" not in page
    for colour in ("background", "color"):
        assert colour not in page
    assert "<td" not in diagnostics.Report(3, ())._repr_html_()


def panels_of(figure):
    """The panels of a picture, by title."""
    return {axes.get_title("left"): axes for axes in figure.axes}


CHANNELS, MEAN, STD, MOMENTUM, REPLICAS = (
    "Share of channels in trouble (full height: all of the layer)",
    "Mean of the batch, from the running mean",
    "Standard deviation of the batch, over the running one",
    "Momentum that the step shows",
    "Difference between replicas, over the largest value",
)


def points(axes):
    """(those that are not reported, those that are), each (x, y)."""
    lines = [line.get_data() for line in axes.lines if line.get_linestyle() == "None"]
    return lines[:2]


@pytest.fixture(scope="module")
def broken():
    return broken_chain(NAMES)


def test_a_picture_has_a_panel_for_each_kind_of_finding(broken, variables):
    figure = broken.figure()
    assert list(panels_of(figure)) == [CHANNELS, MEAN, STD, MOMENTUM, REPLICAS]
    assert figure.get_suptitle() == "12 layers, 9 findings"
    assert [t.get_text() for t in figure.axes[-1].get_xticklabels()] == NAMES
    assert list(panels_of(diagnostics.report(variables).figure())) == [CHANNELS]
    healthy = reported(*chain(NAMES), replicas=diagnostics.Agreement(8, {}))
    assert list(panels_of(healthy.figure())) == [CHANNELS, MEAN, STD, MOMENTUM]
    assert diagnostics.Report(0, ()).figure().axes == []
    assert figure._repr_png_().startswith(b"\x89PNG")
    for axes in figure.axes[1:]:
        assert axes.get_ylabel()


def test_the_points_of_a_picture(broken):
    panels = panels_of(broken.figure())
    judged = 12 * C - C - 1 - 2  # never updated, exploded, dead
    (x, y), (reported_x, reported_y) = points(panels[MEAN])
    assert len(x) == judged - 1
    assert np.abs(y).max() < 1
    assert np.round(reported_x) == [5]
    assert reported_y == broken.measures[5].drift.mean[2]
    low, high = panels[MEAN].get_ylim()
    assert low < reported_y < high
    assert panels[MEAN].get_yscale() == "symlog"
    (x, _), (reported_x, _) = points(panels[STD])
    assert (len(x), len(reported_x)) == (judged, 0)
    (x, y), (reported_x, reported_y) = points(panels[MOMENTUM])
    assert reported_x == [7]
    assert reported_y == pytest.approx([1 / 0.9], rel=1e-4)  # float32
    shown = np.isfinite(y)
    assert x[shown].tolist() == [0, 3, 4, 5, 8, 9, 10, 11]
    assert y[shown] == pytest.approx([10] * 8, rel=1e-3)  # float32
    assert [text.get_text() for text in panels[MOMENTUM].texts] == ["not updated"]
    assert [bar.get_height() for bar in panels[REPLICAS].patches] == [0.25]
    (text,) = panels[REPLICAS].texts
    assert (text.get_position()[0], text.get_text()) == (9, "not finite")


def test_the_strips_of_a_picture(broken):
    axes = panels_of(broken.figure())[CHANNELS]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["gamma near zero", "dead", "exploded", "never updated"]
    heights = np.reshape([bar.get_height() for bar in axes.patches], (4, 12))
    assert [np.flatnonzero(row).tolist() for row in heights] == [[4], [3], [2], [1]]
    assert heights[1, 3] == pytest.approx(0.8 * 2 / C)
    assert heights[3, 1] == pytest.approx(0.8)
    assert [text.get_text() for text in axes.texts] == [
        "1 of 60 channels",
        "2 of 60 channels",
        "1 of 60 channels",
        "1 of 12 layers",
    ]


def test_the_limit_is_drawn():
    variables, updates = chain(NAMES[:3])
    options = {"batch_moments": updates["batch_moments"], "largest_drift": 0.5}
    panels = panels_of(diagnostics.report(variables, **options).figure())
    drawn = {
        title: sorted({line.get_ydata()[0] for line in axes.lines[2:]})
        for title, axes in panels.items()
    }
    assert drawn[MEAN] == [-0.5, 0.5]
    assert drawn[STD] == pytest.approx([1 / 1.5, 1.5])


def test_limits_at_the_ends(variables, moments):
    """Of 0, where chance alone is the limit; and none at all."""
    for limit, lines in ((0.0, {-0.0, 0.0}), (np.inf, set())):
        report = diagnostics.report(
            variables, batch_moments=moments, largest_drift=limit
        )
        figure = report.figure()
        figure.draw_without_rendering()
        axes = panels_of(figure)[MEAN]
        assert {line.get_ydata()[0] for line in axes.lines[2:]} == lines
        assert np.isfinite(axes.get_ylim()).all()
    assert not any("drifted" in finding.what for finding in report)
    for wrong in (-1.0, np.nan):
        with pytest.raises(ValueError, match=r"largest_drift=.*expected a number >= 0"):
            diagnostics.report(variables, largest_drift=wrong)


def test_a_name_is_no_formula():
    stats = {"mean": np.zeros(3), "var": np.full(3, 2.0)}
    figure = diagnostics.report({"batch_stats": {"$x_{1$": stats}}).figure()
    figure.draw_without_rendering()


def test_a_picture_of_many_layers_names_those_with_findings():
    """Names are thinned and shortened; the picture is no wider than a screen."""
    names = [f"stage/BottleneckResidualBlock_{i}/norm" for i in range(120)]
    figure = broken_chain(names).figure()
    shown = {t.get_text(): t.get_color() for t in figure.axes[-1].get_xticklabels()}
    assert len(shown) < 80
    assert figure.get_figwidth() <= 14
    coloured = [name for name, colour in shown.items() if colour == "#d55e00"]
    assert coloured[0] == "stage/Bottlen…lock_1/norm"  # before that of block 0
    assert set(coloured) <= {f"stage/Bottlen…lock_{i}/norm" for i in range(1, 10)}
    few = chain(NAMES[:1])
    assert reported(*few).figure().get_figwidth() < 8


def test_a_picture_has_the_colours_of_the_style(broken):
    with matplotlib.style.context("dark_background"):
        dark = broken.figure()
    light = broken.figure()
    assert (dark.get_facecolor(), light.get_facecolor()) == ((0, 0, 0, 1), (1, 1, 1, 1))
    for figure, colour in ((dark, "white"), (light, "black")):
        assert panels_of(figure)[MEAN].lines[2].get_color() == colour


def test_a_row_of_statistics_is_a_column_of_the_picture():
    """Layers of nn.scan; the name of a row is coloured, if the finding is its own."""
    variables, updates = chain(NAMES[:3])
    rows = [updates["batch_moments"][name]["moments"] for name in NAMES[:3]]
    stacked = Moments(*(np.stack(field) for field in zip(*rows)))
    stacked.mean[1, 4] += 30
    stats = jax.tree.map(
        lambda *rows: np.stack(rows), *variables["batch_stats"].values()
    )
    report = diagnostics.report(
        {"batch_stats": {"scan": stats}}, batch_moments={"scan": {"moments": stacked}}
    )
    labels = report.figure().axes[-1].get_xticklabels()
    assert [t.get_text() for t in labels] == ["scan[0]", "scan[1]", "scan[2]"]
    assert [t.get_color() == "#d55e00" for t in labels] == [False, True, False]
    assert [row["layer"] for row in report.rows()] == ["scan[0]", "scan[1]", "scan[2]"]


def test_a_picture_needs_matplotlib(broken, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "bnjax.diagnostics._figure", raising=False)
    monkeypatch.delattr(diagnostics, "_figure", raising=False)
    with pytest.raises(ImportError, match=r"needs matplotlib: .*\[plot\]"):
        broken.figure()


def test_nothing_imports_matplotlib_and_rich_with_the_library():
    folder, may = pathlib.Path(bnjax.__file__).parent, ("_figure", "_command_line")
    pattern = rf"\b(matplotlib|rich|{'|'.join(may)})\b"
    for path in folder.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom) and path.stem not in may:
                assert not re.search(pattern, ast.unparse(node)), path

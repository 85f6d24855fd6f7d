"""The claim table of experiments/README.md says what the committed records say.

Each function below writes the sentence of one row from the records; the row must have
it, word by word. A verdict is checked against the numbers that it stands for.
"""

import itertools
import re
from pathlib import Path

import pytest

from experiments import (
    mnist,
    normalizers,
    population,
    regularization,
    saturation,
    scale_invariance,
    small_batch,
    weight_averaging,
    why_it_works,
)
from experiments.common import results, study
from experiments.common.intervals import Interval
from experiments.common.rates import ByRate, percent

pytestmark = pytest.mark.experiment

HERE = Path(results.HERE)


def rows() -> list[dict[str, str]]:
    """All rows of the claim tables, by column."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    tables = [
        part.splitlines() for part in text.split("\n\n") if part[:8] == "| claim "
    ]
    found = []
    for head, _, *lines in tables:
        columns = [name.strip() for name in head.strip("|").split(" | ")]
        for line in lines:
            cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
            found.append(dict(zip(columns, cells, strict=True)))
    return found


def row_of(command: str) -> dict[str, str]:
    """The first row whose command begins so."""
    for row in rows():
        if row["command"].strip("`").startswith(command):
            return row
    raise LookupError(f"no row of the claim tables has the command {command}")


def path_of(name: str) -> Path:
    return HERE / "results" / f"{name}.jsonl"


def trained(module, **settings):
    """The settings of a run, and the records of all of its trainings."""
    config = module.Config(**settings)
    found = study.load(module.STUDY, config, path_of(module.STUDY.name))
    assert len(found) == len(set(module.cells(config)))
    return config, found


def test_time_of_all_commands():
    times = [
        float(number) * {"s": 1 / 60, "min": 1}[unit]
        for row in rows()
        for number, unit in re.findall(r"([\d.]+) (s|min)\b", row["time"])
    ]
    assert len(times) >= len(rows()) - 1  # one row is of the same command
    assert max(times) <= 60
    text = (HERE / "README.md").read_text(encoding="utf-8")
    assert f"{sum(times) / 60:.1f} hours in all, none above one hour" in text


def test_mnist():
    _, steps, measured = mnist.last_run(path_of("mnist"), "mnist")
    plain, bn = measured["plain"], measured["bn"]
    rates = range(plain["test"].shape[2])
    faster = [
        mnist.steps_to(steps, plain, i, 0.8) / mnist.steps_to(steps, bn, i, 0.8)
        for i in rates
    ]
    ends = [m["test"][-1, :, mnist.best_rate(m)] for m in (plain, bn)]
    same = mnist.best_rate(plain)
    reached = mnist.steps_to(steps, bn, same, ends[0].mean())
    row = row_of("experiments.mnist")
    assert row["measured"] == (
        f"80 % after {min(faster):.0f} to {max(faster):.0f} times fewer steps, at each "
        f"of {len(faster)} rates; without {percent(ends[0])} %, which is reached with "
        f"it after {reached:,.0f} of {steps[-1]:,} steps; then {percent(ends[1])} %"
    )
    assert row["verdict"] == "confirmed"
    assert min(faster) > 1
    assert ends[1].min() > ends[0].max()
    assert ends[0].size == ends[1].size == 3


def test_population():
    settings, rows = population.last_run(path_of("population"), "digits")
    after = {kind: percent(rows[50][kind]) for kind in ("ema", "pooled", "batch")}
    row = row_of("experiments.population")
    assert row["measured"] == (
        f"after 50 steps {after['ema']} % by the running average, {after['pooled']} "
        f"pooled, {percent(rows[50]['algorithm_2'])} by Algorithm 2, {after['batch']} "
        "by the statistics of the batch"
    )
    assert row["verdict"].startswith("confirmed")
    assert rows[50]["ema"].max() < rows[50]["algorithm_2"].min() - 0.2
    assert abs(rows[50]["algorithm_2"] - rows[50]["batch"]).mean() < 0.02
    assert len(settings["seeds"]) >= 3


def test_saturation():
    config, found = trained(saturation)
    kinds = saturation.by_kind(found)

    def trains(activation: str, normalize: bool, depth: int) -> str:
        accuracies = kinds[activation, normalize, depth]
        shares = saturation.summary(config.rates, **accuracies)
        return shares["networks that train (%)"]

    def best(normalize: bool, depth: int) -> str:
        accuracies = kinds["sigmoid", normalize, depth]
        return saturation.summary(config.rates, **accuracies)[
            "accuracy of the best (%)"
        ]

    row = row_of("experiments.saturation")
    count = len(config.rates) * len(config.scales)
    assert row["measured"] == (
        f"of {count} rates and scales, with BN and without: 20 layers of sigmoids "
        f"{trains('sigmoid', True, 20)} and {trains('sigmoid', False, 20)} % train, "
        f"50 layers {trains('sigmoid', True, 50)} and {trains('sigmoid', False, 50)} "
        f"%; the best of 3 layers is right on {best(True, 3)} and {best(False, 3)} %"
    )
    assert row["verdict"] == "confirmed"
    assert len(config.seeds) == 3
    for activation, depth in itertools.product(config.activations, config.depths):
        with_bn, without = (
            kinds[activation, normalize, depth]["test"] > saturation.TRAINS
            for normalize in (True, False)
        )
        assert with_bn.mean() > without.mean()
        if activation == "sigmoid" and depth >= 20:
            assert not without.any()


def test_scale_invariance():
    config, found = trained(scale_invariance)
    ((_, deviations, _),) = scale_invariance.series(found, "deviations", "bn")
    of_factors = deviations.max((0, 1))  # over seeds and quantities
    largest = dict(zip(scale_invariance.FACTORS, of_factors, strict=True))
    middle = {}
    names = scale_invariance.BY_SCALE
    place = scale_invariance.PERCENTILES.index(50)
    for kind, values, _ in scale_invariance.series(found, "singular", *names):
        middle[kind] = (
            values[:, -1].mean((0, 1))[place],
            values[:, 0].mean((0, 1))[place],
        )
    after = {kind: f"{values[0]:.2f}" for kind, values in middle.items()}
    from_two = max(v for a, v in largest.items() if a >= 2)
    row = row_of("experiments.scale_invariance")
    assert row["measured"] == (
        f"relative error of the identities, because of epsilon: {from_two:.0e} for a ≥ "
        f"2, {largest[0.1]:.1e} at 0.1, {largest[0.01]:.2f} at 0.01. Median singular "
        f"value after training: {after['bn']} with BN, {after['plain']} without; from "
        f"weights 4 times as large {after['bn large']} and {after['plain large']}"
    )
    assert row["verdict"] == "identities confirmed, conjecture not"
    assert from_two < 1e-4
    assert abs(middle["bn"][0] - middle["plain"][0]) < 0.1
    before = [middle[kind][1] for kind in names[:3]]
    assert max(before) - min(before) < 0.01  # with BN the scale does not matter
    assert len({cell.seed for cell in found}) == 3
    _, tuned = trained(scale_invariance, tune=True)
    by_rate = ByRate.grouped((cell.kind, cell.rate, r) for cell, r in tuned.items())
    assert by_rate.best("bn") == by_rate.best("plain") == config.rate


def test_regularization():
    config, found = trained(regularization)
    known = regularization.findings(config, found)
    heart = {
        normalize: regularization.errors(
            config, found, normalize, regularization.EVERYTHING, field="training"
        )
        for normalize in regularization.WITH
    }
    assert max(errors.max() for errors in heart.values()) < 0.02  # learned by heart
    row = row_of("experiments.regularization")

    def cost(change: str) -> str:
        of_change = known[change]
        return f"{of_change.with_bn} with BN, {of_change.without_bn} without"

    assert row["measured"] == (
        f"points of error that removing costs: dropout {cost('no dropout')}; four "
        f"fifths of L2 {cost('a fifth of L2')}; both "
        f"{cost('no dropout, a fifth of L2')}; dropout and all of L2 "
        f"{cost('no dropout, no L2')}. LRN as well costs {cost('LRN as well')}"
    )
    assert row["verdict"] == (
        "dropout and LRN confirmed, L2 contradicted; less than without BN not shown"
    )
    assert known["no dropout"].with_bn.high < 0
    assert known["LRN as well"].with_bn.mean > 0
    assert known["a fifth of L2"].with_bn.low > 0
    for change in ("no dropout", "a fifth of L2", "no dropout, no L2"):
        assert known[change].less.low < 0


def test_normalizers():
    config, found = trained(normalizers)
    known = normalizers.findings(config, found)
    row = row_of("experiments.normalizers")
    errors = {name: percent(f.errors / 100) for name, f in known.items()}
    assert row["measured"] == (
        f"% wrong, each at its best rate: batch {errors['batch']}, group "
        f"{errors['group']}, layer {errors['layer']}, weight {errors['weight']}, "
        f"whitening {errors['whitening_eigh']} (eigenvalues) and "
        f"{errors['whitening_newton']} (Newton), none {errors['none']}; whitening "
        f"takes {known['whitening_eigh'].relative_time:.2f} and "
        f"{known['whitening_newton'].relative_time:.2f} of batch norm's time"
    )
    assert row["verdict"] == "order confirmed, with larger gaps; whitening is better"
    worse = [known[name].difference for name in ("group", "layer", "weight", "none")]
    assert min(difference.low for difference in worse) > 0
    assert known["weight"].difference.mean > known["group"].difference.mean + 1
    for name in ("whitening_eigh", "whitening_newton"):
        assert known[name].difference.high < 0
        assert known[name].relative_time > 1


def test_why_it_works():
    config, found = trained(why_it_works)
    known = why_it_works.findings(config, found)
    ratios = {
        name: f"{mean:.2g} ± {spread:.1g}"
        for name, (mean, spread) in known.ratios.items()
    }
    row = row_of("experiments.why_it_works")
    assert row["measured"] == (
        f"at rate {known.rate:g}, the best without BN, without BN over with: range of "
        f"the loss along the gradient {ratios['range of loss']}, change of the "
        f"gradient {ratios['change of gradient']}, per distance "
        f"{ratios['smoothness']}. Noise alone: {known.noise_alone} points of accuracy"
    )
    assert row["verdict"] == "smoother: not confirmed; noise alone trains"
    assert known.ratios["smoothness"][0] < 2
    by_rate = why_it_works.by_rate(found)
    assert by_rate.of("noisy plain", known.rate, "test").min() > 0.3
    row = row_of("the same")
    assert row["measured"] == (
        f"at {known.rate:g} BN gains {known.gain} points over "
        f"{percent(known.plain / 100)} %; at {known.bn_rate:g}, its own best rate, "
        f"{known.gain_at_best}"
    )
    assert row["verdict"] == "contradicted: most is gained at the small rate"
    assert known.gain.low > known.gain_at_best.mean / 2


def test_weight_averaging():
    config, found = trained(weight_averaging)
    known = weight_averaging.findings(config, found)
    swa = known.differences["swa"]
    last = percent(known.final["last"]["pooled_351"] / 100)
    averaged = percent(known.final["swa"]["pooled_351"] / 100)
    row = row_of("experiments.weight_averaging")
    assert row["measured"] == (
        f"% wrong: last weights {last}, averaged {averaged} (both pooled); pooled "
        f"statistics recover {swa['recovered']} points against the last running "
        f"average, {swa['recovered (averaged)']} against the averaged one. After 50 "
        f"steps the running average costs {known.lag[50]} points"
    )
    assert row["verdict"] == "confirmed; statistics averaged as the weights do as well"
    assert min(swa["gained"].low, swa["recovered"].low, known.lag[50].low) > 0
    assert swa["recovered (averaged)"].low < 0 < swa["recovered (averaged)"].high
    assert abs(swa["recovered (averaged)"].mean) < 0.5


def test_small_batch():
    config, found = trained(small_batch)
    known = small_batch.findings(config, found)
    whole = small_batch.curves(config, found)["mixed"][small_batch.BN][:, -1]

    def cost(row: str) -> str:
        mixed, by_class = (known[row, order, 2].cost for order in small_batch.ORDERS)
        return f"{mixed} and {by_class}"

    row = row_of("experiments.small_batch")
    shared = known["cross-replica BN", "mixed", 2].cost
    assert row["measured"] == (
        f"points of error above one group of 128 ({percent(whole)} %), in groups of 2, "
        f"iid and of one class: {cost(small_batch.BN)}; cross-replica {shared}; the "
        f"last fifth of the steps frozen {cost('BN, frozen at the end')}; renorm "
        f"{cost('batch renorm')}; group norm {known['group norm', 'mixed', 2].cost}"
    )
    assert row["verdict"] == (
        "confirmed, but for renorm, which is better than BN only in groups of 32 of "
        "one class"
    )
    for order in small_batch.ORDERS:
        assert known[small_batch.BN, order, 2].cost.low > 0
        assert known["BN, frozen at the end", order, 2].change.high < 0
        assert known["cross-replica BN", order, 2].change.high < 0
    better = {
        (order, size)
        for order in small_batch.ORDERS
        for size in config.sizes[:-1]
        if known["batch renorm", order, size].change.high < 0
    }
    assert better == {("by class", 32)}


def test_small_batch_deeper():
    config, found = trained(small_batch, deeper=True)
    known = small_batch.findings_deeper(config, found)
    depths = sorted({stop.convolutions for stop in known})

    def by_depth(when: str) -> list[Interval]:
        stops = (small_batch.Stop(n, 1_600, 32, when) for n in depths)
        return [known[stop]["running"] for stop in stops]

    halfway, end = by_depth("halfway"), by_depth("end")
    row = row_of("experiments.small_batch --deeper")
    assert row["measured"] == (
        "points of error by pooled statistics minus the running average's, groups of "
        f"32, 1,600 steps, {depths[0]}, {depths[1]} and {depths[2]} convolutions: "
        f"after half of the steps {halfway[0]}, {halfway[1]} and {halfway[2]}; after "
        f"all {end[0]}, {end[1]} and {end[2]}"
    )
    assert (
        row["verdict"]
        == "confirmed while the rate is high; at the end not, at any depth"
    )
    assert halfway[0].high < 0
    assert halfway[1].high < 0
    assert halfway[0].mean > halfway[1].mean > halfway[2].mean
    ends = [of["running"] for stop, of in known.items() if stop.when == "end"]
    assert all(each.high > 0 for each in ends)

"""`weight_averaging`: the averages of weights, their statistics, and what is kept."""

import copy
import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import assert_close, assert_trees_close
from jax import lax

import bnjax
from experiments import weight_averaging
from experiments.common import convnet, intervals, results, study
from experiments.common.images import Dataset, Split, draw_batches

pytestmark = pytest.mark.experiment

RESULTS = Path(weight_averaging.__file__).parent / "results" / "weight_averaging.jsonl"
SCHEDULE = weight_averaging.Schedule(
    steps=9,
    averaged_steps=6,
    every=2,
    early=(2, 5),
    early_batches=2,
    batches=(1, 3),
)


@pytest.fixture
def cell(monkeypatch):
    """A training of nine steps of ten images, by a network of two convolutions."""
    task = convnet.Task((4, 8), (2, 1), center=50, spread=9, held_out=0)
    monkeypatch.setitem(convnet.TASKS, "digits", task)
    monkeypatch.setitem(weight_averaging.SCHEDULES, "digits", SCHEDULE)
    config = weight_averaging.Config(data="digits", batch_size=10, seeds=(3,))
    return weight_averaging.cells(config)[0]


@pytest.fixture
def data():
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (50, 5, 4, 2)).astype(np.uint8)
    labels = random.integers(0, 3, 50).astype(np.int32)
    parts = np.split(pixels, [35, 40]), np.split(labels, [35, 40])
    return Dataset(*(Split(*part) for part in zip(*parts)))


@pytest.fixture
def network(cell):
    return weight_averaging.Network(cell)


def wide(tree):
    return jax.tree.map(lambda value: np.asarray(value, np.float64), tree)


def first_layer(params, images):
    """The inputs of the first normalization, (batch, value, channel)."""
    y = lax.conv_general_dilated(
        *((images.astype(np.float32) - 50) / 9, params["Conv_0"]["kernel"]),
        *((2, 2), "SAME"),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return np.asarray(y, np.float64).reshape(-1, 4)


# ---- training ----


def test_averages_of_weights(cell, data, network):
    """Each in NumPy, from the weights after each step."""
    states = dict(weight_averaging.fit(cell, network, data.train))
    assert list(states) == [*range(1, 10)]
    each = {step: wide(state.trained.variables) for step, state in states.items()}
    moved = (
        each[9]["params"]["Conv_0"]["kernel"] - each[5]["params"]["Conv_0"]["kernel"]
    )
    assert np.abs(moved).max() > 1e-3

    mean = jax.tree.map(lambda *v: np.float32(sum(v) / 3), each[5], each[7], each[9])
    assert_trees_close(states[9].swa, mean, tol=1e-6)
    powers = 0.99 ** np.arange(8, -1, -1)
    moving = jax.tree.map(
        lambda *v: np.float32(np.average(v, 0, powers)), *each.values()
    )
    assert_trees_close(states[9].ema, moving, tol=1e-6)


def test_tracked_statistics(cell, data, network):
    """Of the first layer, from the batches and the weights before each step."""
    kernel = network.init(cell.seed, data.train.images[:2]).trained.params
    batches = draw_batches(cell.seed, 35, cell.steps, cell.batch_size)
    slow = fast = np.stack([np.zeros(4), np.ones(4)])
    debiased = 0.0
    for (step, state), batch in zip(
        weight_averaging.fit(cell, network, data.train), batches, strict=True
    ):
        y = first_layer(kernel, data.train.images[batch])
        of_batch = np.stack([y.mean(0), y.var(0)])
        slow = 0.99 * slow + 0.01 * of_batch
        fast = 0.9 * fast + 0.1 * of_batch
        debiased = 0.99 * debiased + 0.01 * of_batch
        kernel = state.trained.params
        if step in (2, 9):
            images = data.train.images[batches[:2]]
            found = weight_averaging.early_statistics(network, state, images)
            y = first_layer(kernel, images.reshape(-1, 5, 4, 2))
            expected = {
                "running": slow,
                "running_0.9": fast,
                "debiased": debiased / (1 - 0.99**step),
                "pooled": np.stack([y.mean(0), y.var(0)]),
            }
            assert expected.keys() == found.keys() == weight_averaging.EARLY.keys()
            for name, (mean, var) in expected.items():
                layer = found[name]["BatchNorm_0"]
                assert_close(layer["mean"], np.float32(mean), tol=1e-5, what=name)
                assert_close(layer["var"], np.float32(var), tol=1e-5, what=name)


def test_the_rate_rises_then_is_constant(cell):
    """Weight decay alone, without momentum's past: the rate can be read off."""
    cell = dataclasses.replace(cell, steps=40)
    optimizer = weight_averaging.Network(cell).optimizer
    params = {"Dense_0": {"kernel": np.ones((2, 2)), "bias": np.ones(2)}}
    zero = jax.tree.map(np.zeros_like, params)
    state, velocity, rates = optimizer.init(params), 0.0, []
    for _ in range(9):
        update, state = optimizer.update(zero, state, params)
        assert not np.any(update["Dense_0"]["bias"])
        velocity = 0.9 * velocity + 5e-4
        step = 0.9 * velocity + 5e-4  # Nesterov's
        rates.append(-float(update["Dense_0"]["kernel"][0, 0]) / step)
    expected = 0.1 * np.array([0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1])
    np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-9)


def test_seeds_are_compiled_once(cell, data, network):
    before = weight_averaging.Network.step._cache_size()
    ends = []
    for seed in (0, 1):
        of_seed = dataclasses.replace(cell, seed=seed)
        *_, (_, state) = weight_averaging.fit(of_seed, network, data.train)
        ends.append(state.swa["params"]["Dense_0"]["kernel"])
    assert weight_averaging.Network.step._cache_size() == before + 1
    assert np.abs(ends[0] - ends[1]).max() > 0.01


# ---- evaluation ----


def test_statistics_of_averaged_weights(cell, data, network):
    *_, (_, state) = weight_averaging.fit(cell, network, data.train)
    images = data.train.images[:30].reshape(3, 10, 5, 4, 2)
    last = state.trained.batch_stats
    for weights, own in (
        ("last", state.trained.variables),
        ("swa", state.swa),
        ("ema", state.ema),
    ):
        pairs = weight_averaging.variants(cell, network, state, weights, images)
        found = dict(pairs)
        kinds = set(weight_averaging.kinds(SCHEDULE))
        assert found.keys() == kinds - ({"averaged"} if weights == "last" else set())
        for variables in found.values():
            assert_trees_close(variables["params"], own["params"], tol=0)
        stats = {kind: wide(v["batch_stats"]) for kind, v in found.items()}
        assert_trees_close(stats["running"], wide(last), tol=0)
        fast = weight_averaging.early_statistics(network, state, images)["running_0.9"]
        assert_trees_close(stats["running_0.9"], wide(fast), tol=0)
        if weights != "last":
            assert_trees_close(stats["averaged"], wide(own["batch_stats"]), tol=0)
        batches = [first_layer(own["params"], batch) for batch in images]
        n, values = len(batches[0]), np.concatenate(batches)
        expected = {
            "pooled_1": (batches[0].mean(0), batches[0].var(0)),
            "pooled_3": (values.mean(0), values.var(0)),
            "algorithm_2": (
                values.mean(0),
                np.mean([n / (n - 1) * b.var(0) for b in batches], 0),
            ),
        }
        for kind, (mean, var) in expected.items():
            layer = found[kind]["batch_stats"]["BatchNorm_0"]
            assert_close(layer["mean"], np.float32(mean), tol=1e-5)
            assert_close(layer["var"], np.float32(var), tol=1e-5)


def test_the_errors_of_a_training(cell, data, network, monkeypatch):
    """Each of the variables that it says, on the images that it says."""
    monkeypatch.setattr(weight_averaging, "EARLY_IMAGES", 4)
    found = weight_averaging.train_cell(cell, network, data)
    images = data.train.images[draw_batches(cell.seed, 35, 3, 10)]
    test = data.test
    assert len(test.labels) == 10

    def error(variables, count):
        logits = network.model.apply(variables, test.images[:count], train=False)
        return float((logits.argmax(-1) != test.labels[:count]).mean())

    early = {name: [] for name in weight_averaging.EARLY}
    for step, state in weight_averaging.fit(cell, network, data.train):
        if step in (2, 5):
            each = weight_averaging.early_statistics(network, state, images[:2])
            for name, stats in each.items():
                variables = {"params": state.trained.params, "batch_stats": stats}
                early[name].append(error(variables, 4))
    for name, errors in early.items():
        assert found["early"][name] == pytest.approx(errors), name
    for weights, errors in found["final"].items():
        pairs = weight_averaging.variants(cell, network, state, weights, images)
        expected = {kind: error(variables, 10) for kind, variables in pairs}
        assert errors == pytest.approx(expected), weights


def test_new_statistics_are_needed():
    """Weights of half the length: only statistics of their own undo that."""
    images = np.random.default_rng(0).integers(0, 2, (64, 8, 8, 1)).astype(np.uint8)
    cell = weight_averaging.cells(weight_averaging.Config(data="digits"))[0]
    cell = dataclasses.replace(cell, batches=(1, 2))
    network = weight_averaging.Network(cell)
    state = network.init(0, images[:2])
    batches = images.reshape(2, 32, 8, 8, 1)
    fit = {**state.trained.variables}
    fit["batch_stats"] = bnjax.population.pooled(network.collect, fit, batches)
    halved = jax.tree.map(lambda v: v / 2, fit["params"])
    halved["Dense_0"] = fit["params"]["Dense_0"]
    halved = {
        name: fit["params"][name] if name.startswith("BatchNorm") else value
        for name, value in halved.items()
    }
    state = state._replace(
        trained=state.trained.replace(batch_stats=fit["batch_stats"]),
        swa={**fit, "params": halved},
    )
    found = dict(weight_averaging.variants(cell, network, state, "swa", batches))
    logits = {
        kind: np.asarray(network.model.apply(variables, images, train=False))
        for kind, variables in found.items()
    }
    expected = network.model.apply(fit, images, train=False)
    assert_close(logits["pooled_2"], expected, tol=1e-3)
    for kind in ("running", "averaged"):
        assert np.abs(logits[kind] - expected).max() > 0.1 * np.abs(expected).max()


# ---- tables and picture ----

CIFAR10 = weight_averaging.Config()
KINDS = weight_averaging.kinds(weight_averaging.SCHEDULES["cifar10"])


def made_up(config=CIFAR10):
    """Errors in percent, seed by seed, so that the differences are known."""
    records = {}
    for cell, shift in zip(weight_averaging.cells(config), (0, 1, 5)):
        early = {
            "running": [90, 80, 70, 60, 50, 40],
            "running_0.9": [80, 70, 60, 50, 45, 40],
            "debiased": [75, 65, 55, 50, 45, 40],
            "pooled": [70, 60, 50 - shift, 45, 40, 40],
        }
        final = {
            "last": dict.fromkeys(KINDS, 35 + shift),
            "swa": dict.fromkeys(KINDS, 31),
            "ema": dict.fromkeys(KINDS, 33 + shift),
        }
        final["last"]["pooled_351"] -= 2 * shift
        del final["last"]["averaged"]
        final["swa"] |= {"running": 45 + 2 * shift, "averaged": 40, "pooled_351": 30}
        final["ema"] |= {"running": 37 + shift, "algorithm_2": 1}
        records[cell] = {
            "early": {name: [e / 100 for e in v] for name, v in early.items()},
            "final": {
                weights: {kind: e / 100 for kind, e in errors.items()}
                for weights, errors in final.items()
            },
        }
    return records


def test_findings():
    known = weight_averaging.findings(CIFAR10, made_up())
    shift = np.array([0, 1, 5])
    assert_close(known.final["swa"]["running"], np.float32(45 + 2 * shift))
    assert_close(known.early["pooled"][:, 2], np.float32(50 - shift))
    expected = {
        "last": {"recovered": 2 * shift},
        "swa": {
            "lost": 10 + shift,
            "recovered": 15 + 2 * shift,
            "recovered (averaged)": np.full(3, 10),
            "gained": 5 - shift,
        },
        "ema": {
            "lost": np.full(3, 2),
            "recovered": np.full(3, 4),
            "recovered (averaged)": np.full(3, 0),
            "gained": np.full(3, 2) - 2 * shift,
        },
    }
    assert known.differences.keys() == expected.keys()
    for weights, differences in expected.items():
        assert known.differences[weights].keys() == differences.keys()
        for name, values in differences.items():
            found = known.differences[weights][name]
            assert found == pytest.approx(intervals.interval(values)), (weights, name)
    assert known.lag.keys() == {10, 20, 50, 100, 200, 500}
    assert known.lag[50] == pytest.approx(intervals.interval(20 + shift))
    assert known.lag[500] == pytest.approx((0, 0))


def test_findings_of_some_seeds():
    """Those that are not trained yet are left out, and do not shift the others."""
    records = made_up()
    del records[weight_averaging.cells(CIFAR10)[1]]
    known = weight_averaging.findings(CIFAR10, records)
    assert known.final["last"]["running"] == pytest.approx([35, 40])
    assert known.differences["swa"]["lost"].mean == pytest.approx(12.5)


def test_tables():
    _, early, _, final, _, changes = weight_averaging.report(CIFAR10, made_up())

    def rows(table):
        return [list(row) for row in zip(*(column.cells for column in table.columns))]

    assert rows(early)[0][:3] == ["running average, 0.99", "90.0 ± 0.0", "80.0 ± 0.0"]
    assert rows(early)[-1][3] == "+22.0 ± 6.6"
    names = [row[0] for row in rows(final)]
    assert names == list(KINDS.values())
    assert rows(final)[0][1:] == ["37.0 ± 2.6", "49.0 ± 5.3", "39.0 ± 2.6"]
    assert rows(final)[2][1:] == ["", "40.0 ± 0.0", "35.0 ± 2.6"]
    assert rows(final)[-1][2:] == ["31.0 ± 0.0", "1.0 ± 0.0"]
    last, swa, _ = rows(changes)
    assert last == ["last weights", "", "+4.0 ± 13.1", "", ""]
    assert swa[1:] == ["+12.0 ± 6.6", "+19.0 ± 13.1", "+10.0 ± 0.0", "+3.0 ± 6.6"]


def test_picture(tmp_path):
    (path,) = weight_averaging.draw(CIFAR10, made_up(), tmp_path)
    assert path == tmp_path / "weight_averaging_cifar10.png"
    drawn = path.read_bytes()
    assert len(drawn) > 20_000
    records = copy.deepcopy(made_up())
    for record in records.values():
        record["final"]["swa"]["averaged"] = 0.6
    weight_averaging.draw(CIFAR10, records, tmp_path)
    assert path.read_bytes() != drawn


# ---- the experiment ----


@pytest.mark.parametrize("data", weight_averaging.SCHEDULES)
def test_schedules_fit_the_data(data):
    schedule = weight_averaging.SCHEDULES[data]
    images = {"digits": 1_097, "cifar10": 45_000}[data]
    assert schedule.batches[-1] == images // 128  # one pass
    assert max(schedule.early) <= schedule.steps - schedule.averaged_steps * (
        data == "cifar10"
    )
    assert schedule.averaged_steps % schedule.every == 0


def test_committed_records_are_of_these_cells():
    found = study.load(weight_averaging.STUDY, CIFAR10, RESULTS)
    assert len(found) == len(weight_averaging.cells(CIFAR10)) == 3


def test_smoke(tmp_path, monkeypatch):
    """Finished trainings are not run again, and draw the same picture."""
    config = weight_averaging.Config(out=tmp_path, smoke=True)
    path = tmp_path / "weight_averaging.jsonl"
    picture = tmp_path / "weight_averaging_digits.png"
    assert study.main(weight_averaging.STUDY, config) == 0
    first, found, last = results.read(path)
    assert {"versions", "hardware", "commit", "time"} <= first.keys()
    assert (last["kind"], last["finished"]) == ("end", True)
    early = found["result"]["early"]
    assert early["running"][2] > early["pooled"][2] + 0.1  # after 20 steps
    assert set(found["result"]["final"]) == {"last", "swa", "ema"}
    records, drawn = path.read_bytes(), picture.read_bytes()
    assert len(drawn) > 20_000

    trained = []

    def train_cell(cell, network, data):
        trained.append(cell.seed)
        return found["result"]

    monkeypatch.setattr(weight_averaging, "train_cell", train_cell)
    assert study.main(weight_averaging.STUDY, config) == 0
    assert (path.read_bytes(), picture.read_bytes()) == (records, drawn)
    assert not trained
    more = weight_averaging.Config(out=tmp_path, data="digits", seeds=(0, 1, 2))
    assert study.main(weight_averaging.STUDY, more) == 0
    assert trained == [1, 2]
    path.write_bytes(b"".join(records.splitlines(True)[:2])[:-30])  # cut off
    assert study.main(weight_averaging.STUDY, config) == 0
    assert trained == [1, 2, 0]

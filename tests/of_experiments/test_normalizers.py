"""`normalizers` runs, goes on where it was, and compares what is to be compared."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_trees_close

from experiments import normalizers
from experiments.common import convnet, results, study

pytestmark = pytest.mark.experiment

NAME, PICTURE = "normalizers.jsonl", "normalizers_digits.png"


def test_smoke_and_again(tmp_path, capsys):
    config = normalizers.Config(smoke=True, out=tmp_path)
    assert study.main(normalizers.STUDY, config) == 0
    printed = capsys.readouterr().out
    assert "batch norm" in printed
    assert "ms per step" in printed
    path, picture = tmp_path / NAME, (tmp_path / PICTURE).read_bytes()
    first, timing, *trainings, last = results.read(path)
    assert (first["kind"], last["kind"]) == ("run", "end")
    assert set(timing["result"]["seconds"]) == {"batch", "none"}
    assert min(timing["result"]["seconds"].values()) > 0
    assert [r["cell"]["method"] for r in trainings] == ["batch", "none"]
    for record in trainings:
        assert record["result"]["steps"] == [10, 20]
        assert np.shape(record["result"]["test"]) == (2,)
        assert record["result"]["test"][-1] == pytest.approx(
            record["result"]["final"], abs=1e-4
        )
        assert record["result"]["final"] > 0.15  # more than chance after 20 steps

    trained = []

    def train(config, cells):
        trained.extend(cells)
        return normalizers.train(config, cells)

    lines = path.read_bytes().splitlines(True)
    again = normalizers.STUDY._replace(train=train)
    assert study.main(again, config) == 0
    assert (trained, path.read_bytes()) == ([], b"".join(lines))
    assert (tmp_path / PICTURE).read_bytes() == picture
    path.write_bytes(b"".join([*lines[:3], lines[3][:50]]))
    assert study.main(again, config) == 0
    assert [cell.method for cell in trained] == ["none"]
    newest = [r for r in results.read(path) if r["kind"] == "cell"][-1]
    assert newest["result"] == trainings[1]["result"]


def config_and_results(errors, seconds, **settings):
    """Made-up records: by method, the final errors of the seeds in percent."""
    seeds = tuple(range(max(map(len, errors.values()))))
    config = normalizers.Config(methods=tuple(errors), seeds=seeds, **settings)
    curve = [0.1, 0.6]  # accuracies, before the final one
    results = {}
    for cell in normalizers.cells(config):
        if isinstance(cell, normalizers.Timing):
            results[cell] = {"seconds": seconds}
        elif cell.seed < len(errors[cell.method]):
            final = 1 - errors[cell.method][cell.seed] / 100
            test = [*curve, final]
            steps = [10, 20, 30]
            results[cell] = {"test": test, "final": final, "steps": steps}
    return config, results


def test_differences_to_batch_norm_are_paired(monkeypatch):
    rates = {"batch": 1.0, "group": 0.3, "none": 0.03}
    monkeypatch.setitem(normalizers.RATES, "cifar10", rates)
    errors = {"batch": [20, 30, 40], "group": [21, 32, 43], "none": [35, 45]}
    config, results = config_and_results(errors, {"batch": 0.2, "none": 0.1})
    found = normalizers.findings(config, results)
    assert [finding.rate for finding in found.values()] == [1.0, 0.3, 0.03]
    for method, finding in found.items():
        np.testing.assert_allclose(finding.errors, errors[method])
    assert found["batch"].difference is None
    # Differences of 1, 2, 3: 4.303 is Student's t of two degrees of freedom.
    assert found["group"].difference == pytest.approx((2, 4.303 / 3**0.5), rel=1e-3)
    assert found["none"].difference.mean == pytest.approx(15)  # of the shared seeds
    times = [finding.relative_time for finding in found.values()]
    np.testing.assert_allclose(times, [1, np.nan, 0.5])

    alone, results = config_and_results({"group": [21]}, {})
    assert normalizers.findings(alone, results)["group"].difference is None


def test_steps_and_time_to_what_none_comes_to(monkeypatch):
    rates = {"batch": 1.0, "weight": 0.1, "none": 0.3}
    monkeypatch.setitem(normalizers.RATES, "cifar10", rates)
    errors = {"batch": [15, 25], "weight": [70, 70], "none": [40, 42]}
    seconds = {"batch": 0.2, "none": 0.1}
    config, results = config_and_results(errors, seconds)
    (table,) = normalizers.report(config, results)
    columns = [list(column.cells) for column in table.columns]
    assert table.columns[6].header == "steps to 41.0 %"
    assert columns[0] == ["batch norm", "weight norm", "none"]
    assert columns[1] == ["1", "0.1", "0.3"]
    assert columns[2] == ["20.0 ± 7.1", "70.0 ± 0.0", "41.0 ± 1.4"]
    assert columns[3] == ["", "+50.0 ± 63.5", "+21.0 ± 50.8"]
    assert columns[4] == ["200.0", "nan", "100.0"]
    assert columns[5] == ["1.00", "nan", "0.50"]
    assert columns[6] == ["20", "20", "20"]
    config, results = config_and_results(errors | {"none": [35, 35]}, seconds)
    (table,) = normalizers.report(config, results)
    columns = [list(column.cells) for column in table.columns]
    assert columns[6] == ["30", "inf", "30"]
    assert columns[7] == ["6.0", "nan", "3.0"]


def test_tuning_is_by_held_out_images():
    config = normalizers.Config(tune=True, methods=("batch", "none"), rates=(0.1, 1, 3))
    validation = {
        "batch": {0.1: 0.5, 1: 0.6, 3: 0.21},
        "none": {0.1: 0.2, 1: 0.1, 3: 0.1},
    }
    results = {
        cell: {"validation": validation[cell.method][cell.rate], "final": cell.rate / 9}
        for cell in normalizers.cells(config)
    }
    errors, best = normalizers.report(config, results)
    assert [list(column.cells) for column in errors.columns[1:]] == [
        ["50.0", "80.0"],
        ["40.0", "90.0"],
        ["79.0", "90.0"],
    ]
    assert [list(column.cells) for column in best.columns] == [
        ["batch norm", "none"],
        ["1", "0.1"],
        ["3", "nan"],
    ]


def test_each_training_is_one_cell():
    """The comparison repeats no training of --tune at a rate that was chosen."""
    config = normalizers.Config(seeds=(5, 6), steps=7)
    timing, *cells = normalizers.cells(config)
    assert isinstance(timing, normalizers.Timing)
    assert len(cells) == len(set(cells)) == 7 * 2
    rates = normalizers.RATES["cifar10"]
    assert {(cell.method, cell.rate) for cell in cells} == set(rates.items())
    assert {cell.steps for cell in cells} == {7}
    tuning = normalizers.cells(dataclasses.replace(config, tune=True))
    assert len(tuning) == len(set(tuning)) == 7 * 4
    assert set(tuning) & set(cells) == {cell for cell in cells if cell.seed == 5}


@pytest.mark.parametrize("tune", [True, False])
def test_two_parts_share_the_work(tune):
    """A part trains every other cell: the same number, and half of the methods."""
    listed = normalizers.cells(normalizers.Config(tune=tune))
    parts = [
        [cell.method for cell in listed[first::2] if isinstance(cell, normalizers.Cell)]
        for first in (0, 1)
    ]
    assert abs(len(parts[0]) - len(parts[1])) <= 1
    assert set(parts[0]) & set(parts[1]) == {"none"}


def test_the_rates_are_those_that_tuning_chose():
    """In the committed records, each method's best rate is the one of `RATES`."""
    config = normalizers.Config(tune=True)
    path, _ = results.places(normalizers.STUDY.name, config.out, record=True)
    trainings = normalizers.by_rate(study.load(normalizers.STUDY, config, path))
    best = {method: trainings.best(method) for method in trainings.names()}
    assert best == normalizers.RATES["cifar10"]


# ---- the networks ----

METHODS = typing.get_args(normalizers.Method)
IMAGES = np.random.default_rng(0).integers(0, 2, (13, 6, 5, 1)).astype(np.uint8)
LABELS = np.random.default_rng(1).integers(0, 3, 13).astype(np.int32)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    task = convnet.Task((4, 16), (2, 1), center=0, spread=1, held_out=0)
    monkeypatch.setitem(convnet.TASKS, "tiny", task)
    monkeypatch.setitem(normalizers.WHITENING_GROUP_SIZE, "tiny", 4)


@pytest.mark.parametrize("method", METHODS)
def test_normalizers(method):
    """What each does to whom: the scale of weights, other images, and biases."""
    model = normalizers.make_model("tiny", method)
    variables = model.init(jax.random.key(0), IMAGES, train=False)

    @jax.jit
    def apply(params, x):
        changed = {**variables, "params": params}
        return model.apply(changed, x, train=True, mutable=["batch_stats"])[0]

    params = variables["params"]
    biased = method in ("weight", "none")
    for conv in ("Conv_0", "Conv_1"):
        assert ("bias" in params[conv]) == biased
    y = np.asarray(apply(params, IMAGES))
    larger = {**params, "Conv_0": {**params["Conv_0"]}}
    larger["Conv_0"]["kernel"] = 3 * params["Conv_0"]["kernel"]
    same = np.allclose(apply(larger, IMAGES), y, rtol=1e-2, atol=1e-2)
    assert same == (method != "none")
    alone = np.allclose(apply(params, IMAGES[:9]), y[:9], rtol=1e-4, atol=1e-4)
    assert alone == (method in ("group", "layer", "weight", "none"))


def test_weight_normalization_begins_with_the_length_of_hes_weights():
    first = {}
    for method in ("weight", "none"):
        model = normalizers.make_model("tiny", method)
        variables = model.init(jax.random.key(0), IMAGES, train=False)
        _, state = model.apply(
            variables, IMAGES, train=True, capture_intermediates=True
        )
        layers = state["intermediates"]
        key = "WeightNorm_0" if method == "weight" else "Conv_0"
        first[method] = layers[key]["__call__"][0]
    assert float(first["weight"].std() / first["none"].std()) == pytest.approx(
        1, abs=0.4
    )


def test_a_step_is_nesterovs():
    """As optax's, with the same rates inside of the optimizer."""
    model = normalizers.make_model("tiny", "batch")
    rates = np.array([0.0, 0.3, 0.1], np.float32)
    state = normalizers.init(model, 5, IMAGES[:2])
    inside = optax.sgd(lambda step: jnp.asarray(rates)[step], 0.9, nesterov=True)
    variables, memory = state.variables, inside.init(state.variables["params"])

    @functools.partial(jax.grad, has_aux=True)
    def gradient_of(params, stats):
        logits, updates = model.apply(
            {**stats, "params": params}, IMAGES, train=True, mutable=["batch_stats"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
        return losses.mean(), updates

    for rate in rates:
        state = normalizers.train_step(model, state, IMAGES, LABELS, rate)
        params = variables["params"]
        gradient, stats = jax.jit(gradient_of)(params, variables)
        change, memory = inside.update(gradient, memory)
        variables = {"params": optax.apply_updates(params, change), **stats}
    assert_trees_close(state.variables, variables, tol=1e-5)

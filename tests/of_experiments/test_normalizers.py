"""`normalizers` runs, goes on where it was, and compares what is to be compared."""

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
from experiments.common.rates import ByRate

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


def made(test, validation):
    return {
        "test": test,
        "validation": validation,
        "final": test[-1],
        "steps": [10, 20, 30],
    }


def test_steps_and_time_to_what_none_comes_to():
    known = ByRate(
        {
            ("batch", 0.1): [made([0.5, 0.7, 0.8], 0.5), made([0.5, 0.9, 0.9], 0.9)],
            ("batch", 1.0): [made([0.9, 0.9, 0.9], 0.6)] * 2,
            ("weight", 0.1): [made([0.1, 0.2, 0.3], 0.3)] * 2,
            ("none", 1.0): [made([0.1, 0.6, 0.75], 0.5)] * 2,
        }
    )
    seconds = {"batch": 0.2, "none": 0.1}
    table = normalizers.summary(known, seconds)
    columns = [list(column.cells) for column in table.columns]
    assert table.columns[5].header == "steps to 25.0 %"
    assert columns[0] == ["batch norm", "weight norm", "none"]
    assert columns[1] == ["0.1", "0.1", "1"]  # by held-out images, not by the test's
    assert columns[2] == ["15.0 ± 7.1", "70.0 ± 0.0", "25.0 ± 0.0"]
    assert columns[4] == ["1.00", "nan", "0.50"]
    assert columns[5] == ["20", "inf", "30"]
    assert columns[6] == ["4.0", "nan", "3.0"]


def test_each_training_is_one_cell():
    cells = normalizers.cells(normalizers.Config(seeds=(0, 1), steps=7))
    assert len(cells) == len(set(cells)) == 1 + 7 * 5 * 2
    assert {cell.steps for cell in cells[1:]} == {7}


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

"""Section 4.2's networks, their switches, their training, and what is made of it."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from helpers import assert_close
from rich.console import Console
from test_experiments import png_size

from experiments import inception
from experiments.common import results, study
from experiments.common.data import pipeline, sources
from experiments.common.data.examples import Batch
from experiments.common.models.convolutions import Convolution, Style, pool
from experiments.common.models.inception import Inception, Module
from experiments.common.studies import entries, races, recipes, trainings
from experiments.common.studies.recipes import CHANGES, MODELS, ORIGINAL, X5, Recipe
from experiments.common.training import commands, optimizers, replicas, voting
from experiments.common.training.guard import Guard

pytestmark = pytest.mark.experiment

REPOSITORY = Path(__file__).parents[2]
# Figure 5 once more: 1x1, 3x3 reduce, 3x3, double reduce, double, projection; outputs.
FIGURE_5 = {
    "3a": (64, 64, 64, 64, 96, 32, 28, 256),
    "3b": (64, 64, 96, 64, 96, 64, 28, 320),
    "3c": (0, 128, 160, 64, 96, 0, 14, 576),
    "4a": (224, 64, 96, 96, 128, 128, 14, 576),
    "4b": (192, 96, 128, 96, 128, 128, 14, 576),
    "4c": (160, 128, 160, 128, 160, 96, 14, 576),
    "4d": (96, 128, 192, 160, 192, 96, 14, 576),
    "4e": (0, 128, 192, 192, 256, 0, 7, 1024),
    "5a": (352, 192, 320, 160, 224, 128, 7, 1024),
    "5b": (352, 192, 320, 192, 224, 128, 7, 1024),
}
TINY = {
    "data": "digits",
    "modules": (),
    "divisor": 16,
    "batch_size": 16,
    "steps": 30,
    "evaluate_every": 10,
    "checkpoint_every": 10,
    "learning_rate": 0.03,
}


def shapes(network: nn.Module, side: int, colours: int = 3):
    """Of the variables and the output of each module; nothing is computed."""
    images = jax.ShapeDtypeStruct((2, side, side, colours), np.uint8)

    def both(images):
        variables = network.init(jax.random.key(0), images, train=False)
        kept = network.apply(
            variables,
            images,
            train=False,
            capture_intermediates=lambda module, _: isinstance(module, Module),
            mutable=["intermediates"],
        )[1]["intermediates"]
        return variables, {name: v["__call__"][0] for name, v in kept.items()}

    return jax.eval_shape(both, images)


def size(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_full_network_is_figure_5s():
    variables, outputs = shapes(Inception(), 224)
    expected = {name: (2, row[6], row[6], row[7]) for name, row in FIGURE_5.items()}
    assert {name: y.shape for name, y in outputs.items()} == expected

    kernels, features = 49 * 3 * 64 + 64 * 64 + 9 * 64 * 192, 64 + 64 + 192
    depth = 192
    for (
        one,
        three_reduce,
        three,
        double_reduce,
        double,
        projection,
        *_,
    ) in FIGURE_5.values():
        kernels += depth * (one + three_reduce + double_reduce + projection)
        kernels += 9 * (three_reduce * three + double_reduce * double + double**2)
        features += one + three_reduce + three + double_reduce + 2 * double + projection
        depth = one + three + double + (projection or depth)
    matrix = 1024 * 1000 + 1000
    assert size(variables["params"]) == kernels + 2 * features + matrix
    assert size(variables["batch_stats"]) == 2 * features
    assert size(variables["params"]) == 11_194_984


def test_narrow_network_has_the_same_modules():
    _, outputs = shapes(Inception(Style(divisor=8), small=True, classes=10), 32)
    expected = {
        name: (2, 4 * row[6] // 7, 4 * row[6] // 7, row[7] // 8)
        for name, row in FIGURE_5.items()
    }
    assert {name: y.shape for name, y in outputs.items()} == expected


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("kind", ["mean", "max"])
def test_pool(kind, strides):
    reference = {"mean": nn.avg_pool, "max": nn.max_pool}[kind]
    for height, width in ((8, 7), (2, 1)):
        x = jax.random.normal(jax.random.key(0), (2, height, width, 3))

        def theirs(x):
            return reference(x, (3, 3), (strides, strides), "SAME")

        y, back = jax.vjp(lambda x: pool(x, kind, strides), x)
        expected, expected_back = jax.vjp(theirs, x)
        assert_close(y, expected)
        g = jax.random.normal(jax.random.key(1), y.shape)
        assert_close(back(g)[0], expected_back(g)[0])


def narrow(recipe: Recipe, **changed) -> Inception:
    amounts = recipes.Amounts(divisor=16, modules=("3a", "3c"), **changed)
    return recipes.network(recipe, amounts, side=8, classes=10)


def jaxpr(recipe: Recipe, **changed) -> str:
    network = narrow(recipe, **changed)
    images = jnp.zeros((2, 8, 8, 1), np.uint8)
    variables = jax.eval_shape(
        lambda: network.init(jax.random.key(0), images, train=False)
    )

    def training(variables):
        rngs = {"dropout": jax.random.key(0)}
        mutable = ["batch_stats"]
        return network.apply(variables, images, train=True, mutable=mutable, rngs=rngs)

    return str(jax.make_jaxpr(training)(variables))


def test_normalization_takes_the_place_of_biases():
    plain, _ = shapes(narrow(ORIGINAL), 8, 1)
    normalized, _ = shapes(narrow(recipes.MODELS["bn_baseline"]), 8, 1)
    assert set(plain) == {"params"}
    assert set(normalized) == {"params", "batch_stats"}
    one = plain["params"]["3a"]["double_2"]
    assert {k: v.shape for k, v in one["conv"].items()} == {
        "kernel": (3, 3, 6, 6),
        "bias": (6,),
    }
    one = normalized["params"]["3a"]["double_2"]
    assert set(one["conv"]) == {"kernel"}
    assert set(one["bn"]) == {"scale", "bias"}


def test_switches_reach_the_network():
    texts = {model: jaxpr(recipe) for model, recipe in MODELS.items()}
    for model, recipe in MODELS.items():
        lrn, dropout = texts[model].count("reduce_window"), "random_bits"
        assert lrn == (0 if recipe.no_lrn else 2), model
        assert (dropout in texts[model]) == (not recipe.no_dropout), model
        assert ("logistic" in texts[model]) == (recipe.activation == "sigmoid"), model
    assert "random_bits" not in jaxpr(ORIGINAL, dropout=0.0)
    assert narrow(recipes.member(0)[0], dropout=0.05).dropout == 0.05


def test_larger_first_weights():
    def deviation(recipe):
        layer = Convolution(32, 3, narrow(recipe).style)
        x = jnp.zeros((1, 1, 1, 8))
        params = jax.jit(layer.init, static_argnums=2)(jax.random.key(0), x, False)
        return np.std(params["params"]["conv"]["kernel"])

    assert_close(deviation(X5), (2 / 9 / 8) ** 0.5, tol=0.1)
    larger = dataclasses.replace(X5, weights=1.5)
    assert_close(deviation(larger) / deviation(X5), 1.5)


def test_each_change_is_one_of_seven():
    assert len(CHANGES) == 7
    for change in CHANGES:
        one, other = dataclasses.asdict(recipes.without(change)), dataclasses.asdict(X5)
        assert [k for k in one if one[k] != other[k]] == [change]
        assert one[change] == getattr(ORIGINAL, change)
    fields = {field.name for field in dataclasses.fields(Recipe)}
    changed = {k for k in fields if getattr(X5, k) != getattr(ORIGINAL, k)}
    assert changed == {*CHANGES, "normalize"}


def test_rate_and_its_decay():
    amounts = recipes.Amounts(learning_rate=0.02, decay=0.5)
    original = recipes.optimizer(ORIGINAL, amounts, 100).schedule
    assert_close([original(s) for s in (0, 50, 100)], [0.02, 0.02 / 2**0.5, 0.01])
    x30 = recipes.optimizer(MODELS["bn_x30"], amounts, 100).schedule
    assert_close([x30(s) for s in (0, 50, 100)], [0.6, 0.6 / 8, 0.6 / 64])
    slow = recipes.optimizer(recipes.without("faster_decay"), amounts, 100).schedule
    assert_close([slow(s) for s in (0, 100)], [0.1, 0.05])


@pytest.mark.parametrize(("recipe", "factor"), [(ORIGINAL, 1), (X5, 5)])
def test_kernels_decay(recipe, factor):
    """By the rate times the weight of L2, if the gradient is 0; nothing else does."""
    amounts = recipes.Amounts(learning_rate=0.01, l2=0.003)
    params = {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.ones(3)}
    transformation = recipes.optimizer(recipe, amounts, 100).transformation
    gradient = jax.tree.map(jnp.zeros_like, params)
    change, _ = transformation.update(gradient, transformation.init(params), params)
    rate = 0.01 * recipe.rate
    assert_close(change["kernel"], np.full((2, 3), -rate * 0.003 / factor * 2))
    assert_close(change["bias"], np.zeros(3))


def test_momentum():
    transformation, _ = optimizers.exponential(1, 1.0, 0.1, 0.0)
    state = transformation.init(jnp.zeros(1))
    for expected in (-0.1, -0.19, -0.271):
        change, state = transformation.update(jnp.ones(1), state, jnp.zeros(1))
        assert_close(change, [expected])


def config(**changed) -> inception.Config:
    return inception.Config(**{**TINY, **changed})


def test_changes_reach_the_data():
    data = sources.load("digits")
    for model, order, colours in (
        ("inception", "shards-only", "strong"),
        ("bn_x5", "within-shards", "weak"),
    ):
        cell = entries.cell(config(), model, MODELS[model])
        changed = entries.varied(data, cell)
        assert changed.colours == colours
        job = entries.make_job(data, Path("nowhere"), cell)
        expected = pipeline.training(changed, 0, 16, 0, 1, shuffle=order)[5]
        np.testing.assert_array_equal(job.batches[5].labels, expected.labels)
        np.testing.assert_array_equal(job.batches[5].images, expected.images)


def test_held_out_images_are_not_trained_on():
    data = sources.load("digits")
    cell = entries.cell(config(), "inception", ORIGINAL, held_out=True)
    tuned = entries.varied(data, cell)
    parts = [part.images for part in (tuned.train, tuned.test)]
    assert [len(part) for part in parts] == [1397 - 139, 139]
    np.testing.assert_array_equal(np.concatenate(parts), data.train.images)


def test_dropout_differs_from_step_to_step():
    """At rate 0 nothing else changes between two steps on the same batch."""
    batch = sources.load("digits").test
    batch = Batch(batch.images[:16], batch.labels[:16])

    def losses(dropout, seed=0):
        network = narrow(ORIGINAL, dropout=dropout).clone(modules=())
        still = optimizers.exponential(1, 1.0, 0.0, 0.0)
        state, functions = replicas.start(network, still, batch, batch, seed)
        assert state.batch_stats == {}
        found = []
        for _ in range(2):
            state, metrics = functions.train(state, functions.place(batch))
            found.append(float(metrics["loss"]))
        return found

    first, second = losses(0.5)
    assert first != second
    assert losses(0.5) == [first, second]
    first, second = losses(0.0)
    assert first == second


def result(steps, accuracy, diverged=False, seconds=60.0):
    return {
        "steps": steps,
        "accuracy": accuracy,
        "diverged": diverged,
        "seconds": seconds,
    }


def test_table_by_hand():
    results = {
        "inception": [result([10, 20, 30, 40], [0.1, 0.5, 0.72, 0.7])],
        "bn_x5": [result([10, 20, 30, 40], [0.6, 0.74, 0.73, 0.75], seconds=120.0)],
        "sigmoid": [result([10, 20, 30, 40], [0.1, 0.1, 0.1, 0.1])],
        "inception_x5": [result([10], [0.2], diverged=True)],
        "bn_x30": [result([], [], diverged=True)],
    }
    curves = {name: races.mean(each) for name, each in results.items()}
    rows = races.rows(curves, "inception")
    inf = float("inf")
    found = {row.name: row[1:] for row in rows}
    assert found.pop("bn_x30")[:2] == (inf, inf)
    assert found == {
        "inception": (30, 1, 0.72, 0, 60),
        "bn_x5": (20, 20 / 30, 0.75, 0, 120),
        "sigmoid": (inf, inf, 0.1, 0, 60),
        "inception_x5": (inf, inf, 0.2, 1, 60),
    }
    console = Console(width=120)
    with console.capture() as capture:
        table = races.table("A title", rows, inception.NAMES, inception.PAPER)
        console.print(table)
    lines = [" ".join(line.split()) for line in capture.get().splitlines()]
    assert "Inception 30 1.00 72.00 1.0 31.0e6 1.00 72.2" in lines
    assert "BN-x5 20 0.67 75.00 2.0 2.1e6 0.07 73.0" in lines
    assert "Inception, sigmoid - - 10.00 1.0 - - 0.1" in lines
    assert "Inception, x5 - - 20.00 (diverged) 1.0 - - diverged" in lines
    assert "BN-x30 - - - (diverged) 1.0 2.7e6 0.09 74.8" in lines


def test_seeds_are_averaged_as_far_as_all_were_measured():
    curve = races.mean(
        [result([1, 2, 3], [0.1, 0.4, 0.7]), result([1, 2], [0.3, 0.5], True)]
    )
    np.testing.assert_array_equal(curve.steps, [1, 2])
    assert_close(curve.accuracy, [0.2, 0.45])
    assert curve.diverged == 1
    assert_close(curve.spread, 0.2 / 2**0.5)


def test_votes_are_averaged():
    """Each member is wrong once; by the mean, not by the majority, none is."""
    labels = np.array([0, 1])
    members = [
        voting.Votes(np.array([[0.9, 0.1], [0.6, 0.4]]), labels),
        voting.Votes(np.array([[0.4, 0.6], [0.1, 0.9]]), labels),
        voting.Votes(np.array([[0.4, 0.6], [0.6, 0.4]]), labels),
    ]
    assert [member.accuracy() for member in members] == [0.5, 0.5, 0]
    mean = voting.together(members)
    assert_close(mean.probabilities, [[1.7 / 3, 1.3 / 3], [1.3 / 3, 1.7 / 3]])
    assert mean.accuracy() == 1


class Stopped(Exception):
    pass


def trained(folder: Path, cell: entries.Cell, settings: inception.Config):
    """A record, without how long it took; one network in a process."""
    settings = dataclasses.replace(settings, resume=True)
    guard = Guard(folder, active=False, timeout=1, advice="")
    data = sources.load("digits")
    found, last = trainings.train(data, folder / "cell", settings, guard, cell)
    assert found.pop("seconds") > 0
    return found, last


def test_a_stopped_training_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    cell = entries.cell(config(dropout=0.3), "bn_baseline", MODELS["bn_baseline"])
    whole, last = trained(tmp_path / "whole", cell, config())
    assert whole["steps"] == [10, 20, 30]
    assert not whole["diverged"]
    votes = last.votes()
    # The images that were left out to fill the last batch of 200 are not voted on.
    assert votes.probabilities.shape == (400, 10)
    assert_close(votes.probabilities.sum(-1), np.ones(400))
    assert_close(votes.accuracy(), np.float64(whole["accuracy"][-1]), tol=1e-7)

    with monkeypatch.context() as patch:

        def stop(self, step, metrics, *, record):
            if step == 26:
                saved = tmp_path / "stopped" / "cell" / "checkpoints" / "20"
                deadline = time.monotonic() + 60
                while not saved.exists() and time.monotonic() < deadline:
                    time.sleep(0.05)
                raise Stopped

        patch.setattr("experiments.common.training.report.Report.step", stop)
        with pytest.raises(Stopped):
            trained(tmp_path / "stopped", cell, config())
    again, other = trained(tmp_path / "stopped", cell, config())
    assert again == whole
    digests = [replicas.digest(end.state) for end in (last, other)]
    assert digests[0] == digests[1]
    path = tmp_path / "stopped" / "cell" / "training.jsonl"
    starts = [r["from_step"] for r in results.read(path) if r["kind"] == "run"]
    assert starts == [0, 20]


def test_divergence_is_a_result(tmp_path, capsys):
    """It ends a training, not the run; the next start does not repeat it."""
    wild = config(models=("inception",), learning_rate=1e30, out=tmp_path)
    assert study.main(inception.STUDY, wild) == 0
    (line,) = (r for r in study.finished(tmp_path / "inception.jsonl").values())
    assert line["diverged"]
    assert max(line["steps"], default=0) < 30
    assert "Inception" in capsys.readouterr().out
    assert list((tmp_path / "inception").iterdir()) == []


@pytest.mark.slow
def test_ensemble(tmp_path, capsys):
    two = config(ensemble=2, steps=20, evaluate_every=20, out=tmp_path)
    assert study.main(inception.STUDY, two) == 0
    (found,) = study.finished(tmp_path / "inception.jsonl").values()
    assert len(found["members"]) == 2
    assert found["diverged"] == 0
    gain = found["together"] - np.mean(found["members"])
    assert abs(found["gain"] - gain) < 1e-5
    assert "points over their mean" in capsys.readouterr().out


def test_cells():
    def models(**changed):
        return [cell.model for cell in inception.cells(config(**changed))]

    assert models() == list(MODELS)
    assert models(models=("sigmoid",), seeds=(0, 1)) == ["sigmoid"] * 2
    assert models(ablate=True) == ["inception", "bn_x5", *CHANGES]
    (ensemble,) = inception.cells(config(ensemble=4))
    assert {(m.dropout, m.recipe.weights) for m in ensemble.members} == {
        (0.05, 1.0),
        (0.1, 1.0),
        (0.05, 1.5),
        (0.1, 1.5),
    }
    assert [m.seed for m in ensemble.members] == [0, 1, 2, 3]
    assert not any(m.recipe.no_dropout for m in ensemble.members)
    tuned = inception.cells(config(tune=True))
    assert [cell.learning_rate for cell in tuned] == list(inception.RATES)
    assert all(cell.held_out for cell in tuned)
    names = {entries.name(cell) for cell in (*tuned, ensemble)}
    assert len(names) == len(tuned) + 1


def test_command_line(tmp_path):
    settings = config(models=("bn_x5", "sigmoid"), seeds=(1, 2), out=tmp_path)
    words = commands.command("m", settings)[2:]
    assert tyro.cli(inception.Config, args=words) == settings
    assert commands.command("m", inception.Config()) == ["-m", "m"]


def start(*options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.inception", *map(str, options)]
    environment = {k: v for k, v in os.environ.items() if k != "BNJAX_DATA"}
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("smoke")
    done = start("--smoke", "--out", out)
    assert done.returncode == 0, done.stderr + done.stdout
    return out, done.stdout


def test_smoke(smoke):
    out, stdout = smoke
    assert "Steps to Inception's best test accuracy" in stdout
    assert "2.1e6" in stdout
    first, cell, last = results.read(out / "inception.jsonl")
    assert first["kind"] == "run"
    assert {"jax", "flax", "bnjax"} <= first["versions"].keys()
    assert (last["kind"], last["finished"]) == ("end", True)
    assert cell["cell"]["model"] == "bn_x5"
    assert cell["result"]["steps"] == [20, 40, 60]
    assert cell["result"]["accuracy"][-1] > 0.3  # chance is 0.1
    assert not list((out / "inception").iterdir())


def test_smoke_draws(smoke, tmp_path):
    picture = "inception_digits.png"
    width, height = png_size(smoke[0] / picture)
    assert [width, height] == [round(inch * races.DPI) for inch in races.INCHES]
    (tmp_path / "inception.jsonl").write_bytes(
        (smoke[0] / "inception.jsonl").read_bytes()
    )
    again = inception.Config(smoke=True, out=tmp_path, plot_only=True)
    assert study.main(inception.STUDY, again) == 0
    assert (tmp_path / picture).read_bytes() == (smoke[0] / picture).read_bytes()
    jax.config.update("jax_disable_most_optimizations", False)


def test_finished_cells_are_not_trained_again(smoke, tmp_path):
    """Those of a file that was cut off in the middle of its last result are."""
    lines = (smoke[0] / "inception.jsonl").read_text().splitlines()
    path = tmp_path / "inception.jsonl"
    path.write_text(lines[0] + "\n" + lines[1][:80])
    asked = []

    def train(config, missing):
        asked.extend(missing)
        for cell in missing:
            yield study.Trained(cell, result([20], [0.5]))

    watched = inception.STUDY._replace(train=train)
    again = inception.Config(smoke=True, out=tmp_path)
    assert study.main(watched, again) == 0
    assert [cell.model for cell in asked] == ["bn_x5"]
    assert study.main(watched, again) == 0
    assert len(asked) == 1
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.slow
def test_two_processes(tmp_path):
    """The same curves as in one, but for rounding; and one file."""
    both = ("--smoke", "--local-processes", 2, "--out", tmp_path / "two")
    one = ("--smoke", "--devices-per-process", 2, "--out", tmp_path / "one")
    found = []
    for options in (both, one):
        begin = time.monotonic()
        done = start(*options)
        print(f"{time.monotonic() - begin:.1f} s")
        assert done.returncode == 0, done.stderr + done.stdout
        lines = (options[-1] / "inception.jsonl").read_text().splitlines()
        records = list(map(json.loads, lines))
        found.append([r["result"]["accuracy"] for r in records if r["kind"] == "cell"])
    np.testing.assert_allclose(*found, atol=0.02)

"""Figure 1: what is trained, what is measured, and what is made of it."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import assert_close, assert_trees_close

from experiments import mnist
from experiments.common import images

pytestmark = pytest.mark.experiment

REPOSITORY = Path(__file__).parents[2]
SHORT = mnist.Config(
    steps=60, measurements=6, learning_rates=(0.1, 0.3), seeds=(0, 1), batch_size=30
)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The records of a run of sixty steps."""
    path = tmp_path_factory.mktemp("mnist") / "mnist.jsonl"
    mnist.train(SHORT, path)
    return path


def model(normalize):
    return mnist.Network(normalize, SHORT.weight_std, SHORT.momentum)


def test_both_networks_start_from_the_same_weights():
    plain, normalized = (
        model(normalize).init(jax.random.key(0), np.ones((5, 6)), train=False)["params"]
        for normalize in (False, True)
    )
    layers = [name for name in plain if name.startswith("Dense")]
    assert len(layers) == 4
    for name in layers:
        np.testing.assert_array_equal(plain[name]["kernel"], normalized[name]["kernel"])
    assert [name for name in layers if "bias" in normalized[name]] == ["Dense_3"]


def test_a_step_is_the_papers():
    """One step from the definition, in float64: the last layer and its statistics."""
    rng = np.random.default_rng(0)
    batch = images.Split(rng.integers(0, 2, (7, 9), np.uint8), rng.integers(0, 10, 7))
    network = model(True)
    variables = network.init(jax.random.key(1), batch.images, train=False)
    new = mnist.train_step(network, variables, 0.5, batch)
    params = jax.tree.map(oracle.wide, variables["params"])
    x = oracle.wide(batch.images)
    for i in range(3):
        norm, stats = params[f"BatchNorm_{i}"], new["batch_stats"][f"BatchNorm_{i}"]
        z = x @ params[f"Dense_{i}"]["kernel"]
        assert_close(stats["mean"], 0.1 * z.mean(0), tol=1e-5)
        assert_close(stats["var"], 0.9 + 0.1 * z.var(0), tol=1e-5)
        z = oracle.batch_norm(z, norm["scale"], norm["bias"], (0,))
        x = 1 / (1 + np.exp(-z))
    logits = x @ params["Dense_3"]["kernel"] + params["Dense_3"]["bias"]
    guess = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    error = (guess - np.eye(10)[batch.labels]) / 7
    expected = params["Dense_3"]["kernel"] - 0.5 * x.T @ error
    assert_close(new["params"]["Dense_3"]["kernel"], expected, tol=1e-5)


def test_a_network_of_the_grid_is_trained_as_alone():
    """Whatever the other rates and seeds, and wherever the steps are cut."""
    data, *_ = mnist.load_binary("digits")
    network, rates = model(True), np.array([0.1, 0.3], np.float32)
    keys = jax.vmap(jax.random.key)(np.array([0, 1]))

    def trained(rates, keys, stops):
        start = jax.vmap(lambda k: network.init(k, data.images[:1], train=False))(keys)
        grid = jax.tree.map(lambda v: jnp.stack([v] * len(rates), 1), start)
        for begin, end in itertools.pairwise(stops):
            grid = mnist.advance(
                network, grid, rates, keys, data, begin, end, batch_size=30
            )
        return grid

    both = trained(rates, keys, [0, 5, 12])
    one = trained(rates[1:], keys[1:], [0, 12])
    expected = jax.tree.map(lambda v: np.asarray(v[:1, :1]), one)
    found = jax.tree.map(lambda v: v[1:, 1:], both)
    assert_trees_close(found, expected, tol=1e-5)


def test_records(short):
    first, *rest = map(json.loads, short.read_text().splitlines())
    assert first["kind"] == "run"
    assert {"versions", "hardware", "commit", "time"} <= first.keys()
    assert first["settings"]["steps"] == 60
    assert "out" not in first["settings"]  # nor any other path
    assert [r["step"] for r in rest[::2]] == [0, 1, 2, 5, 11, 26, 60]
    assert [r["network"] for r in rest] == ["bn", "plain"] * 7
    for record in rest:
        assert np.shape(record["test"]) == np.shape(record["validation"]) == (2, 2)
        low, middle, high = np.moveaxis(record["percentiles"], -1, 0)
        assert (low <= middle).all()
        assert (middle <= high).all()


def test_the_normalized_network_learns_faster(short, tmp_path):
    settings, steps, measured = mnist.last_run(short, "digits")
    assert measured["bn"]["test"][0].max() < 0.3
    assert measured["bn"]["test"][-1].min() > 0.6
    assert measured["plain"]["test"][-1].max() < 0.4
    table, sentence = mnist.summary(settings, steps, measured)
    assert len(table.rows) == 3
    assert sentence.startswith("At learning rate 0.3, the network without BN reaches")
    assert "the one with BN after" in sentence
    swapped = {"bn": measured["plain"], "plain": measured["bn"]}
    assert "the one with BN does not." in mnist.summary(settings, steps, swapped)[1]
    pictures = [tmp_path / name for name in ("first.png", "second.png")]
    for picture in pictures:
        mnist.draw(settings, steps, measured, picture)
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert pictures[0].stat().st_size > 20_000


def test_steps_to_an_accuracy():
    test = np.array([0.1, 0.5, 0.7, 0.6])[:, None, None]
    measured = {"test": np.concatenate([test, test + 0.1], -1), "validation": test}
    steps = np.array([0, 10, 20, 40])
    assert mnist.steps_to(steps, measured, 0, 0.6) == 20
    assert mnist.steps_to(steps, measured, 1, 0.6) == 10
    assert mnist.steps_to(steps, measured, 1, 0.9) == np.inf


def test_the_command(tmp_path):
    """Nothing in the repository is changed, and --plot-only draws the same again."""
    command = [sys.executable, "-m", "experiments.mnist", "--steps", "20"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "100"}
    for last in ([], ["--plot-only"]):
        process = subprocess.run(
            [*command, *last],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert process.returncode == 0, process.stderr
        assert "Each at its best rate" in process.stdout
    names = {path.name for path in (tmp_path / "runs").iterdir()}
    assert names == {"mnist.jsonl", "mnist.png"}


def test_what_cannot_be_drawn_or_read(tmp_path, capsys):
    config = mnist.Config(out=tmp_path, plot_only=True)
    assert mnist.main(config) == 1
    assert "has no measurements with data digits" in capsys.readouterr().out
    config = mnist.Config(data="mnist", data_dir=tmp_path / "nowhere", out=tmp_path)
    assert mnist.main(config) == 1
    assert "mnist cannot be read from" in capsys.readouterr().out
    assert not (tmp_path / "mnist.jsonl").exists()

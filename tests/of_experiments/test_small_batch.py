"""`small_batch`: the groups of a batch, what normalizes them, and what is kept."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import assert_close, assert_trees_close
from jax import lax

from experiments import small_batch
from experiments.common import convnet, results, study
from experiments.common.images import Split, draw_batches

pytestmark = pytest.mark.experiment

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def small_batches(tmp_path_factory):
    out = tmp_path_factory.mktemp("small_batch")
    process = subprocess.run(
        [sys.executable, "-m", "experiments.small_batch", "--smoke", "--out", out],
        cwd=REPOSITORY,
        env=dict(os.environ, COLUMNS="90"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    return out, process.stdout


def test_small_batches_smoke_shows_the_claim(small_batches):
    out, stdout = small_batches
    assert "not iid" in stdout
    assert "| BN, running average " in stdout
    first, *found, last = results.read(out / "small_batch.jsonl")
    assert {"versions", "hardware", "commit", "time"} <= first.keys()
    assert (last["kind"], last["finished"]) == ("end", True)
    error = {
        (r["cell"]["method"], r["cell"]["order"]): r["result"]["running"] for r in found
    }
    assert error["batch_norm", "by class"] > error["batch_norm", "mixed"] + 0.2
    assert set(found[0]["result"]) == {"running", "pooled", "pooled_groups", "batch"}


def test_small_batches_are_not_trained_twice(small_batches, tmp_path, monkeypatch):
    lines = (small_batches[0] / "small_batch.jsonl").read_bytes().splitlines(True)
    path = tmp_path / "small_batch.jsonl"
    config = small_batch.Config(out=tmp_path, **small_batch.STUDY.smoke)
    main = functools.partial(study.main, small_batch.STUDY, config)
    trained = []

    def evaluate(cell, network, data):
        trained.append((cell.method, cell.order))
        return {"running": 0.5}

    monkeypatch.setattr(small_batch, "evaluate", evaluate)
    path.write_bytes(b"".join(lines))
    assert main() == 0
    assert (trained, path.read_bytes()) == ([], b"".join(lines))
    picture = (tmp_path / "small_batch_digits.png").read_bytes()
    kept = small_batches[0] / "small_batch_digits.png"
    assert picture == kept.read_bytes()
    assert len(picture) > 20_000

    path.write_bytes(b"".join([*lines[:2], *lines[3:-1], lines[-1][:9]]))
    assert main() == 0
    assert trained == [("batch_norm", "by class")]


def test_small_batches_refuse(tmp_path, capsys):
    config = small_batch.Config(out=tmp_path, sizes=(2, 3))
    assert study.main(small_batch.STUDY, config) == 1
    assert "sizes has [3]: expected divisors of batch_size, 128" in capture(capsys)
    (tmp_path / "small_batch.jsonl").write_text("")
    config = small_batch.Config(out=tmp_path, plot_only=True)
    assert study.main(small_batch.STUDY, config) == 1
    assert "none of the 0 trainings in" in capture(capsys)


def capture(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


@pytest.fixture
def images(monkeypatch):
    """Thirteen images, and a task with a network of two convolutions for them."""
    task = convnet.Task((4, 8), (2, 1), center=50, spread=9, held_out=0)
    monkeypatch.setitem(convnet.TASKS, "digits", task)
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (13, 5, 4, 2)).astype(np.uint8)
    return Split(pixels, random.integers(0, 3, 13).astype(np.int32))


def make_cell(method, size=4, **changes):
    config = small_batch.Config(batch_size=12, steps=9, momentum=0.75)
    cell = small_batch.make_cell(config, method, size, "mixed", seed=0)
    return dataclasses.replace(cell, **changes)


def fitted(cell, images, batches):
    return small_batch.fit(cell, small_batch.Network(cell), images, batches)


def test_the_images_of_a_task():
    digits = convnet.load("digits")
    assert [len(split.labels) for split in digits] == [1097, 300, 400]
    for pixels, labels in digits:
        assert set(np.unique(pixels)) == {0, 1}
        assert pixels.shape == (len(labels), 8, 8, 1)
        assert set(labels) == set(range(10))


def test_batches_split_by_class():
    labels = np.random.default_rng(0).integers(0, 3, 50)
    drawn = draw_batches(0, 50, 7, 12)
    assert drawn.shape == (7, 12)
    assert len(np.unique(drawn[:4])) == 48  # an epoch repeats none
    mixed = small_batch.split(drawn, labels, make_cell("renorm"))
    np.testing.assert_array_equal(mixed.reshape(7, 12), drawn)
    cell = make_cell("renorm", order="by class")
    by_class = small_batch.split(drawn, labels, cell)
    assert by_class.shape == (7, 3, 4)
    for batch, groups in zip(drawn, by_class, strict=True):
        assert sorted(groups.ravel()) == sorted(batch)
        assert (np.diff(labels[groups].ravel()) >= 0).all()
    ghost = dataclasses.replace(cell, method="ghost")
    whole = small_batch.split(drawn, labels, ghost)
    np.testing.assert_array_equal(whole, by_class.reshape(7, 1, 12))


def test_each_test_image_is_counted_once(images):
    """Thirteen images in batches of twelve: the second is filled up."""
    cell = make_cell("batch_norm", order="by class")
    network = small_batch.Network(cell)
    state = network.init(0, images.images[:2])
    places = np.arange(24).reshape(2, 12)
    groups = small_batch.split(places, np.resize(images.labels, 24), cell)
    wrong = []
    for group in groups.reshape(-1, 4):
        rows = group % 13
        logits, _ = network.model.apply(
            state.variables, images.images[rows], train=True, mutable=["batch_stats"]
        )
        known = group < 13
        wrong += (logits.argmax(-1) != images.labels[rows])[known].tolist()
    assert len(wrong) == 13
    found = small_batch.error_by_group(cell, network, state, images)
    assert found == pytest.approx(np.mean(wrong))


def test_running_statistics_are_averaged_over_the_groups(images):
    cell, batch = make_cell("batch_norm"), np.arange(12).reshape(1, 3, 4)
    start = fitted(cell, images, batch[:0])
    after = fitted(cell, images, batch).batch_stats["BatchNorm_0"]
    pixels = (images.images[:12].astype(np.float32) - 50) / 9
    y = lax.conv_general_dilated(
        *(pixels, start.params["Conv_0"]["kernel"], (2, 2), "SAME"),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    groups = np.asarray(y, np.float64).reshape(3, -1, 4)
    assert_close(after["mean"], np.float32(0.25 * groups.mean((0, 1))))
    assert_close(after["var"], np.float32(0.75 + 0.25 * groups.var(1).mean(0)))


def test_cross_replica_groups_are_one(images):
    cells = (
        make_cell("cross_replica", 4, rate=0.5),
        make_cell("batch_norm", 12, rate=0.5),
    )
    batch = np.arange(12).reshape(1, 3, 4).repeat(2, 0)
    groups = fitted(cells[0], images, batch).variables
    whole = fitted(cells[1], images, batch.reshape(2, 1, 12)).variables
    assert_trees_close(groups, whole, tol=1e-5)  # another order of sums


def test_frozen_steps_leave_the_statistics(images):
    batch = np.arange(12).reshape(1, 3, 4)
    cell = make_cell("frozen", steps=5, rate=0.5)  # the last of five is frozen
    before = fitted(cell, images, batch.repeat(4, 0))
    after = fitted(cell, images, batch.repeat(5, 0))
    assert_trees_close(after.batch_stats, before.batch_stats)
    moved = after.params["Conv_0"]["kernel"] - before.params["Conv_0"]["kernel"]
    assert abs(moved).max() > 1e-3


@pytest.mark.parametrize("method", small_batch.METHODS)
def test_every_normalization_can_be_trained(images, method):
    cell = make_cell(method)
    batches = small_batch.split(np.arange(12)[None], images.labels, cell)
    state = jax.eval_shape(functools.partial(fitted, cell, images, batches))
    assert state.params["Conv_1"]["kernel"].shape == (3, 3, 4, 8)
    kinds = {"group_norm": "GroupNorm_1", "layer_norm": "GroupNorm_1"}
    kinds |= {"ghost": "GhostBatchNorm_1", "renorm": "BatchRenorm_1"}
    kinds["decorrelated"] = "DecorrelatedBatchNorm_1"
    layer = state.params[kinds.get(method, "BatchNorm_1")]
    assert layer["scale"].shape == (8,)

"""Regularizers with and without batch normalization: each part, and the experiment."""

import dataclasses
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from jax import lax

from experiments import regularization
from experiments.common import study
from experiments.common.images import Split
from experiments.common.results import read

pytestmark = pytest.mark.experiment

RESULTS = Path(regularization.__file__).parent / "results" / "regularization.jsonl"
CONFIG = regularization.Config()
BASE = regularization.cell_of(CONFIG, True, regularization.NOTHING, 0)


def changed(**others) -> regularization.Cell:
    return dataclasses.replace(BASE, **others)


# ---- the order of the examples ----


def epochs(shuffling, examples=57, size=5, count=4):
    whole = examples // size
    drawn = regularization.batches(
        changed(
            seed=3,
            images=examples,
            steps=count * whole,
            batch_size=size,
            shuffling=shuffling,
        )
    )
    assert drawn.shape == (count * whole, size)
    return drawn.reshape(count, -1)


def test_orders():
    full, shards, none = map(epochs, ("full", "within shards", "none"))
    for orders in (full, shards, none):
        np.testing.assert_array_equal(orders[0], none[0])  # all begin alike
        for epoch in orders:
            assert len(set(epoch)) == 55
            assert set(epoch) <= set(range(57))
    assert (none == none[0]).all()
    for later in full[1:]:
        assert set(later[:11]) != set(full[0][:11])
    pieces = [np.array_split(epoch, 10) for epoch in shards]
    for epoch in pieces[1:]:
        for here, first in zip(epoch, pieces[0], strict=True):
            assert set(here) == set(first)
    assert all((a != b).any() for a, b in itertools.pairwise(shards))


# ---- augmentation ----


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(1, 256, (200, 6, 5, 3), np.uint8)


def test_moved_images(images):
    found = np.asarray(regularization.move(jax.random.key(0), images, 1))
    assert found.dtype == np.uint8
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    places = []
    for image, frame in zip(found, padded, strict=True):
        options = {
            (t, s): frame[t : t + 6, s : s + 5] for t in range(3) for s in range(3)
        }
        (place,) = (p for p, o in options.items() if (o == image).all())
        places.append(place)
    assert len(set(places)) == 9


def test_distorted_images(images, monkeypatch):
    found = np.asarray(regularization.distort(jax.random.key(0), images, 255.0))
    assert found.dtype == np.float32
    assert (found.min(), found.max()) == (0, 255)
    same = np.full((50, 2, 2, 1), 100, np.uint8)
    each = np.asarray(regularization.distort(jax.random.key(0), same, 255.0))[
        :, 0, 0, 0
    ]
    assert len(set(each)) == 50  # each by itself
    assert 50 <= each.min() < 60 < 140 < each.max() <= 150

    def constant(key, shape, dtype, low, high):
        return jnp.full(shape, 0.8, dtype)

    monkeypatch.setattr(jax.random, "uniform", constant)
    x = 0.8 * images.astype(np.float64)
    x = 0.8 * x + 0.2 * x.mean((1, 2, 3), keepdims=True)
    x = 0.8 * x + 0.2 * x.mean(3, keepdims=True)
    key = jax.random.key(1)
    assert_close(regularization.distort(key, images, 255.0), x)
    assert_close(regularization.distort(key, images, 90.0), np.minimum(x, 90))


def test_augmentation(images):
    key = jax.random.key(0)
    found = {
        (data, kind): np.asarray(
            regularization.augment(changed(data=data, augmentation=kind), key, images)
        )
        for data in ("digits", "cifar10")
        for kind in ("none", "weak", "strong")
    }
    for data in ("digits", "cifar10"):
        np.testing.assert_array_equal(found[data, "none"], images)
        assert (found[data, "weak"] == 0).any()  # borders; no pixel was black
        assert found[data, "strong"].dtype == np.float32
    middle = found["digits", "weak"][:, 1:-1, 1:-1]
    assert (found["digits", "strong"].max(), middle.max()) == (1, 255)
    still = regularization.TASKS["cifar10"]._replace(padding=0)
    regularization.TASKS["still"] = still
    try:
        cell = changed(data="still", augmentation="weak")
        mirrored = np.asarray(regularization.augment(cell, key, images))
    finally:
        del regularization.TASKS["still"]
    same = (mirrored == images).all((1, 2, 3))
    other = (mirrored == images[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ other).all()
    assert 70 < same.sum() < 130


# ---- the network ----


def lrn(x, alpha):
    """By the definition, in float64."""
    x = np.asarray(x, np.float64)
    sums = [(x[..., max(0, i - 2) : i + 3] ** 2).sum(-1) for i in range(x.shape[-1])]
    return x / (2 + alpha * np.stack(sums, -1)) ** 0.75


@pytest.mark.parametrize("data", ["digits", "cifar10"])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_network(images, normalize, data):
    """LRN of pixels up to 255 after the first two convolutions; BN, or a bias."""
    cell = changed(widths=(4, 6, 8), strides=(1, 2, 1), normalize=normalize, data=data)
    net = regularization.Network(cell)
    variables = net.init(jax.random.key(0), images[:2], train=False)
    params = variables["params"]
    center, spread, alpha = {
        "digits": (0, 1, 1e-4 * 255**2),
        "cifar10": (120, 64, 1e-4 * 64**2),
    }[data]
    y = (jnp.asarray(images[:8], jnp.float32) - center) / spread
    for i, stride in enumerate((1, 2, 1)):
        conv = params[f"Conv_{i}"]
        assert set(conv) == ({"kernel"} if normalize else {"kernel", "bias"})
        y = lax.conv_general_dilated(
            jnp.asarray(y, jnp.float32),
            conv["kernel"],
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        y = np.maximum(y / np.sqrt(1 + 1e-5) if normalize else y, 0)
        y = lrn(y, alpha) if i < 2 else y
    expected = np.mean(y, (1, 2)) @ params["Dense_0"]["kernel"]
    assert_close(net.apply(variables, images[:8], train=False), expected, tol=2e-5)
    assert ("batch_stats" in variables) == normalize


def test_dropout_is_for_training(images):
    cell = changed(widths=(4,), strides=(1,), normalize=False, dropout=0.5)
    net = regularization.Network(cell)
    variables = net.init(jax.random.key(0), images[:2], train=False)

    def logits(key, train):
        rngs = {"dropout": jax.random.key(key)}
        return np.asarray(net.apply(variables, images[:1], train=train, rngs=rngs))

    np.testing.assert_array_equal(logits(0, False), logits(1, False))
    drawn = np.array([logits(key, True) for key in range(40)])
    assert drawn.std(0).max() > 0
    assert np.abs(drawn).max() > 1.5 * np.abs(logits(0, False)).max()


def test_decay_is_of_kernels():
    params = {
        "Conv_0": {"kernel": jnp.full((2, 3), 3.0), "bias": jnp.full(3, 3.0)},
        "BatchNorm_0": {"scale": jnp.full(3, 3.0), "bias": jnp.full(3, 3.0)},
    }
    zero = jax.tree.map(jnp.zeros_like, params)
    moved = {}
    for decay, rate in ((5e-4, 0.1), (1e-4, 0.1), (5e-4, 0.3), (0.0, 0.1)):
        optimizer = regularization.descent(10, rate, decay)
        state = optimizer.init(params)
        for _ in range(2):  # the rate begins at 0, and is at its height after a tenth
            change, state = optimizer.update(zero, state, params)
        assert not np.any(change["Conv_0"]["bias"])
        assert not any(np.any(v) for v in change["BatchNorm_0"].values())
        moved[decay, rate] = float(change["Conv_0"]["kernel"][0, 0])
    # Nesterov: the second velocity is 1.9 of the decay's, the step 1 + 0.9 * 1.9 of it.
    assert moved[5e-4, 0.1] == pytest.approx(-0.1 * 5e-4 * 3 * 2.71)
    assert moved[1e-4, 0.1] == pytest.approx(moved[5e-4, 0.1] / 5)
    assert moved[5e-4, 0.3] == pytest.approx(moved[5e-4, 0.1] * 3)
    assert moved[0.0, 0.1] == 0


def test_cells_that_differ_in_strengths_are_compiled_once():
    data = regularization.load("digits", None)
    small = changed(widths=(4,), strides=(4,), steps=12, batch_size=10, lrn=False)
    step, found = regularization.train_step, []
    before = step._cache_size()
    for others in (
        {},
        {"seed": 1},
        {"rate": 1.0},
        {"decay": 0.5},
        {"shuffling": "none"},
    ):
        cell = dataclasses.replace(small, images=90, **others)
        found.append(regularization.train_cell(cell, data)["error"])
    assert step._cache_size() == before + 1
    assert len(set(found)) > 1


def test_the_error_is_of_the_images_asked_for(monkeypatch):
    data = regularization.load("digits", None)
    counts = {"train": 1097, "validation": 300, "test": 400}
    assert {name: len(split.labels) for name, split in data.items()} == counts
    assert set(np.unique(data["train"].images)) == {0, 1}
    for measured in ("test", "validation"):
        monkeypatch.setattr(regularization, "evaluate", lambda *_: 3)
        short = changed(widths=(4,), strides=(4,), steps=1, measured=measured)
        error = regularization.train_cell(short, data)["error"]
        assert error == pytest.approx(1 - 3 / counts[measured])


def test_right_answers(images):
    cell = changed(widths=(4,), strides=(1,))
    net = regularization.Network(cell)
    variables = net.init(jax.random.key(0), images[:2], train=False)
    answers = net.apply(variables, images, train=False).argmax(-1)
    labels = np.where(np.arange(200) < 30, answers, answers + 1)
    assert regularization.evaluate(cell, variables, Split(images, labels)) == 30


# ---- the experiment ----


def test_what_is_removed():
    expected = {
        "dropout": {"dropout"},
        "four fifths of L2": {"decay"},
        "L2": {"decay"},
        "LRN": {"lrn"},
        "distortions": {"augmentation"},
        "augmentation": {"augmentation"},
        "shuffling across shards": {"shuffling"},
        "all shuffling": {"shuffling"},
        "as in the paper": {"dropout", "decay", "lrn", "augmentation"},
        "all but shuffling": {"dropout", "decay", "lrn", "augmentation"},
    }
    base = dataclasses.asdict(BASE)
    cells = {
        name: dataclasses.asdict(regularization.cell_of(CONFIG, True, name, 0))
        for name in regularization.REMOVED
    }
    differ = {
        name: {field for field in base if cell[field] != base[field]}
        for name, cell in cells.items()
    }
    assert differ == {regularization.NOTHING: set(), **expected}
    assert cells["four fifths of L2"]["decay"] == pytest.approx(1e-4)
    assert cells["as in the paper"]["augmentation"] == "weak"


@pytest.mark.parametrize(
    ("config", "count"),
    [(CONFIG, 44), (regularization.Config(tune=True, seeds=(0,)), 16)],
)
def test_committed_records_are_of_these_cells(config, count):
    found = study.load(regularization.STUDY, config, RESULTS)
    assert len(found) == len(regularization.cells(config)) == count
    measured = {cell.measured for cell in found}
    assert measured == {"validation" if config.tune else "test"}


def test_changes_are_taken_seed_by_seed():
    config = regularization.Config(removed=("L2",))
    every = regularization.cells(config)
    found = dict(zip(every, [{"error": e} for e in (0.10, 0.20, 0.13, 0.23, 0.5)]))
    _, table = regularization.report(config, found)
    columns = [list(column.cells) for column in table.columns]
    assert columns[1] == ["15.0 ± 7.1", "18.0 ± 7.1"]
    assert columns[2] == ["", "+3.0 ± 0.0"]
    assert columns[3] == ["nan ± nan", "nan ± nan"]  # not all seeds are trained yet


def test_smoke(tmp_path, monkeypatch):
    """Finished cells are not trained again, and draw the same picture."""
    config = regularization.Config(out=tmp_path, smoke=True)
    path = tmp_path / "regularization.jsonl"
    picture = tmp_path / "regularization_digits.png"
    assert study.main(regularization.STUDY, config) == 0
    first, *found, last = read(path)
    assert {"versions", "hardware", "commit", "time"} <= first.keys()
    assert (last["kind"], last["finished"]) == ("end", True)
    which = [(r["cell"]["normalize"], r["cell"]["shuffling"]) for r in found]
    assert which == [(n, o) for n in (True, False) for o in ("full", "none")]
    for record in found:
        assert 0 < record["result"]["error"] < 1
    records, drawn = path.read_bytes(), picture.read_bytes()
    assert len(drawn) > 20_000

    trained = []
    monkeypatch.setattr(
        regularization,
        "train_cell",
        lambda cell, data: trained.append(cell.shuffling) or {"error": 0.5},
    )
    assert study.main(regularization.STUDY, config) == 0
    assert (path.read_bytes(), picture.read_bytes()) == (records, drawn)
    assert not trained
    path.write_bytes(b"".join(records.splitlines(True)[:4])[:-30])  # cut off
    assert study.main(regularization.STUDY, config) == 0
    assert trained == ["full", "none"]


def test_refuses(tmp_path, capsys):
    config = regularization.Config(out=tmp_path, removed=("L2", "bias"))
    assert study.main(regularization.STUDY, config) == 1
    assert "received {'bias'} to be removed" in capsys.readouterr().out

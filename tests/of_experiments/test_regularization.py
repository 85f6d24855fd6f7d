"""Regularizers with and without batch normalization: each part, and the experiment."""

import dataclasses
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from jax import lax

from experiments import regularization
from experiments.common import study
from experiments.common.data import augment, batches
from experiments.common.models.lrn import local_response_norm
from experiments.common.models.regularized import RegularizedNet
from experiments.common.results import read
from experiments.common.studies import ablation, changes

pytestmark = pytest.mark.experiment

CONFIG = regularization.Config()
BASE = regularization.cell_of(CONFIG, True, regularization.NOTHING, 0)

# ---- the order of the examples ----


def epochs(shuffling, examples=57, size=5, count=4):
    whole = examples // size
    drawn = batches.draw(3, examples, count * whole, size, shuffling)
    assert drawn.shape == (count * whole, size)
    return drawn.reshape(count, -1)


@pytest.mark.parametrize("shuffling", ["full", "within shards", "none"])
def test_each_epoch_has_each_example_at_most_once(shuffling):
    for epoch in epochs(shuffling):
        assert len(set(epoch)) == 55
        assert set(epoch) <= set(range(57))


def test_orders():
    full, shards, none = map(epochs, ("full", "within shards", "none"))
    for orders in (full, shards, none):  # all begin alike
        np.testing.assert_array_equal(orders[0], none[0])
    assert (none == none[0]).all()
    for later in full[1:]:
        assert set(later[:11]) != set(full[0][:11])
    pieces = [np.array_split(epoch, batches.SHARDS) for epoch in shards]
    for epoch in pieces[1:]:
        for here, first in zip(epoch, pieces[0], strict=True):
            assert set(here) == set(first)
    assert all((a != b).any() for a, b in itertools.pairwise(shards))


def test_mixed_batches_are_those_of_before():
    random = np.random.default_rng(3)
    expected = [random.permutation(57)[:55] for _ in range(4)]
    np.testing.assert_array_equal(epochs("full"), expected)


# ---- augmentation ----


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(1, 256, (200, 6, 5, 3), np.uint8)


def test_moved_images(images):
    found = np.asarray(augment.move(jax.random.key(0), images, 1))
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


def test_mirrored_images(images):
    found = np.asarray(augment.mirror(jax.random.key(0), images))
    same = (found == images).all((1, 2, 3))
    other = (found == images[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ other).all()
    assert 70 < same.sum() < 130


def test_distorted_images(images, monkeypatch):
    found = np.asarray(augment.distort(jax.random.key(0), images, 255.0))
    assert found.dtype == np.float32
    assert (found.min(), found.max()) == (0, 255)
    monkeypatch.setattr(augment, "FACTORS", (0.8, 0.8))
    x = 0.8 * images.astype(np.float64)
    mean = x.mean((1, 2, 3), keepdims=True)
    x = 0.8 * x + 0.2 * mean
    x = 0.8 * x + 0.2 * x.mean(3, keepdims=True)
    key = jax.random.key(1)
    assert_close(augment.distort(key, images, 255.0), x)
    assert_close(augment.distort(key, images, 90.0), np.minimum(x, 90))
    grey = images[..., :1]
    x = 0.8 * grey.astype(np.float64)
    x = 0.8 * x + 0.2 * x.mean((1, 2, 3), keepdims=True)
    assert_close(augment.distort(key, grey, 255.0), x)


def test_each_image_is_distorted_by_itself():
    same = np.full((50, 2, 2, 1), 100, np.uint8)
    found = np.asarray(augment.distort(jax.random.key(0), same, 255.0))[:, 0, 0, 0]
    assert len(set(found)) == 50
    assert found.min() >= 50
    assert found.max() <= 150
    assert found.std() > 20


def test_strengths(images):
    key, nearly = jax.random.key(0), (images == images[:1]).all()
    assert not nearly
    none, weak, strong = (
        np.asarray(augment.make_augment(strength, 2, False, 255.0)(key, images))
        for strength in ("none", "weak", "strong")
    )
    np.testing.assert_array_equal(none, images)
    assert weak.dtype == np.uint8
    assert (weak == 0).any()  # borders; no pixel was black
    assert strong.dtype == np.float32
    mirrored = augment.make_augment("weak", 0, True, 255.0)(key, images)
    assert (np.asarray(mirrored) == images[:, :, ::-1]).all((1, 2, 3)).any()


# ---- the network ----


@pytest.mark.parametrize("normalize", [False, True])
def test_the_network(images, normalize):
    """LRN after the first two convolutions; a bias where there is no BN."""
    net = RegularizedNet((4, 6, 8), (1, 2, 1), normalize, lrn=0.3, center=9, spread=60)
    variables = net.init(jax.random.key(0), images[:2], train=False)
    params = variables["params"]
    y = (jnp.asarray(images[:8], jnp.float32) - 9) / 60
    for i, stride in enumerate((1, 2, 1)):
        conv = params[f"Conv_{i}"]
        assert set(conv) == ({"kernel"} if normalize else {"kernel", "bias"})
        names = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(
            y, conv["kernel"], (stride, stride), "SAME", dimension_numbers=names
        )
        y = jnp.maximum(y / np.sqrt(1 + 1e-5) if normalize else y, 0)
        y = local_response_norm(y, alpha=0.3) if i < 2 else y
    expected = y.mean((1, 2)) @ params["Dense_0"]["kernel"]
    assert_close(net.apply(variables, images[:8], train=False), expected, tol=1e-5)
    assert ("batch_stats" in variables) == normalize


def test_dropout_is_for_training(images):
    net = RegularizedNet((4,), (1,), False, dropout=0.5, spread=255)
    variables = net.init(jax.random.key(0), images[:2], train=False)

    def logits(key, train):
        rngs = {"dropout": jax.random.key(key)}
        return np.asarray(net.apply(variables, images[:1], train=train, rngs=rngs))

    np.testing.assert_array_equal(logits(0, False), logits(1, False))
    drawn = np.array([logits(key, True) for key in range(40)])
    assert drawn.std(0).max() > 0
    assert np.abs(drawn).max() > 1.5 * np.abs(logits(0, False)).max()


def test_lrn_is_that_of_pixels_up_to_255():
    for data, scale in (("digits", 255), ("cifar10", 64)):
        cell = dataclasses.replace(BASE, data=data)
        assert ablation.make_classifier(cell).model.lrn == pytest.approx(
            1e-4 * scale**2
        )
        without = dataclasses.replace(cell, lrn=False)
        assert ablation.make_classifier(without).model.lrn == 0


def test_decay_is_of_kernels():
    params = {
        "Conv_0": {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, 3.0)},
        "BatchNorm_0": {"scale": jnp.full(2, 3.0), "bias": jnp.full(2, 3.0)},
    }
    optimizer, zero = ablation.descent(10), jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(optimizer.update)
    moved = {}
    for decay, rate in ((5e-4, 0.1), (1e-4, 0.1), (5e-4, 0.3), (0.0, 0.1)):
        strengths = {"rate": jnp.float32(rate), "decay": jnp.float32(decay)}
        state = optimizer.init(params)._replace(hyperparams=strengths)
        for _ in range(2):  # the rate begins at 0, and is at its height after a tenth
            change, state = update(zero, state, params)
        assert not np.any(change["Conv_0"]["bias"])
        assert not any(np.any(v) for v in change["BatchNorm_0"].values())
        moved[decay, rate] = float(change["Conv_0"]["kernel"][0, 0])
    # Nesterov: the second velocity is 1.9 of the decay's, the step 1 + 0.9 * 1.9 of it.
    assert moved[5e-4, 0.1] == pytest.approx(-0.1 * 5e-4 * 3 * 2.71)
    assert moved[1e-4, 0.1] == pytest.approx(moved[5e-4, 0.1] / 5)
    assert moved[5e-4, 0.3] == pytest.approx(moved[5e-4, 0.1] * 3)
    assert moved[0.0, 0.1] == 0


def test_strengths_are_set_without_compiling_again():
    """Other seeds, rates and decays: one compiled step; no rate, no change."""
    digits = regularization.networks.load_images("digits", None)
    cell = dataclasses.replace(BASE, widths=(4,), strides=(4,), steps=10, lrn=False)
    classifier = ablation.make_classifier(cell)
    found, compiled = [], []
    for seed, rate, decay in ((0, 0.0, 0.0), (0, 0.5, 0.0), (0, 0.5, 0.5)):
        classifier.strengths = {"rate": rate, "decay": decay}
        order = ablation.draw(seed, 100, 4, 10)
        *_, (last, _) = classifier.train(seed, digits.train, order)
        found.append(np.asarray(last.variables["params"]["Conv_0"]["kernel"]))
        start = classifier.init(seed, jnp.asarray(digits.train.images[:2]))
        first = np.asarray(start.variables["params"]["Conv_0"]["kernel"])
        assert (found[-1] == first).all() == (rate == 0)
        compiled.append(ablation.Regularized._step._cache_size())  # of all classifiers
    assert np.linalg.norm(found[2]) < np.linalg.norm(found[1])
    assert compiled[0] == compiled[2] > 0


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
    assert len(regularization.cells(CONFIG)) == 2 * 11 * 2


def test_orders_and_seeds_are_compiled_once(monkeypatch):
    made, batched = [], []

    class Fake:
        def train(self, seed, data, batches):
            batched.append(batches)
            yield types.SimpleNamespace(variables={}), 0.0

        def accuracy(self, variables, data):
            return len(data.labels) / 10_000

    monkeypatch.setattr(ablation, "make_classifier", lambda c: made.append(c) or Fake())
    data = regularization.networks.load_images("digits", None)
    others = (
        {"seed": 1},
        {"shuffling": "none"},
        {"measured": "validation"},
        {"rate": 1.0},
    )
    for changed in ({}, *others):
        cell = dataclasses.replace(BASE, steps=40, **changed)
        errors = ablation.errors_of(cell, data)
        images = 300 if "measured" in changed else 400
        assert errors["error"] == pytest.approx(1 - images / 10_000)
    assert len(set(made)) == 1
    full, seed, none, again, _ = batched
    assert (full != seed).any()
    assert (full != none).any()
    np.testing.assert_array_equal(full, again)
    np.testing.assert_array_equal(none[:17], none[17:34])


def test_changes_are_taken_seed_by_seed():
    base, without = np.array([0.10, 0.20]), np.array([0.13, 0.23])
    errors = {"with BN": {"nothing": base, "L2": without}}
    np.testing.assert_allclose(changes.differences(errors["with BN"])["L2"], 0.03)
    rows = [list(column.cells) for column in changes.table(errors).columns]
    assert rows[1] == ["15.0 ± 7.1", "18.0 ± 7.1"]
    assert rows[2] == ["", "+3.0 ± 0.0"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("regularization")
    config = regularization.Config(out=out, smoke=True)
    assert study.main(regularization.STUDY, config) == 0
    jax.config.update("jax_disable_most_optimizations", False)
    return out


def test_smoke(smoke):
    first, *found, last = read(smoke / "regularization.jsonl")
    assert {"versions", "hardware", "commit", "time"} <= first.keys()
    assert (last["kind"], last["finished"]) == ("end", True)
    which = [(r["cell"]["normalize"], r["cell"]["shuffling"]) for r in found]
    assert which == [(n, o) for n in (True, False) for o in ("full", "none")]
    for record in found:
        assert 0 < record["result"]["error"] < 1
    assert (smoke / "regularization_digits.png").stat().st_size > 20_000


def test_what_is_there_is_not_trained_again(smoke, tmp_path, monkeypatch, capsys):
    lines = (smoke / "regularization.jsonl").read_bytes().splitlines(True)
    path, trained = tmp_path / "regularization.jsonl", []

    def errors_of(cell, data):
        trained.append((cell.normalize, cell.shuffling))
        return {"error": 0.5}

    monkeypatch.setattr(regularization, "errors_of", errors_of)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    config = regularization.Config(out=tmp_path, smoke=True)
    path.write_bytes(b"".join(lines))
    assert study.main(regularization.STUDY, config) == 0
    assert (trained, path.read_bytes()) == ([], b"".join(lines))
    picture = (tmp_path / "regularization_digits.png").read_bytes()
    assert picture == (smoke / "regularization_digits.png").read_bytes()

    path.write_bytes(b"".join([*lines[:3], lines[3][:50]]))  # cut off as it was written
    capsys.readouterr()
    assert study.main(regularization.STUDY, config) == 0
    assert trained == [(False, "full"), (False, "none")]
    assert "50.0" in capsys.readouterr().out


def test_tuning_measures_on_held_out_images(tmp_path, monkeypatch, capsys):
    asked = []

    def errors_of(cell, data):
        asked.append(cell)
        return {"error": cell.rate}

    monkeypatch.setattr(regularization, "errors_of", errors_of)
    config = regularization.Config(out=tmp_path, tune=True, seeds=(0, 1))
    assert study.main(regularization.STUDY, config) == 0
    assert {cell.measured for cell in asked} == {"validation"}
    assert len(asked) == 2 * 2 * 2 * len(regularization.RATES)
    assert "held-out" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("removed", [("L2",), ("nothing", "bias")])
def test_refuses(tmp_path, capsys, removed):
    config = regularization.Config(out=tmp_path, removed=removed)
    assert study.main(regularization.STUDY, config) == 1
    assert "expected 'nothing', and some of" in capsys.readouterr().out

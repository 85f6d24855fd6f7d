"""Section 4.2's networks, their switches, their training, and what is made of it."""

import dataclasses
import warnings
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from PIL import Image
from rich.console import Console

from experiments import inception
from experiments.common import images, results, study
from experiments.common.images import Split
from experiments.inception import CHANGES, MODELS, ORIGINAL, X5, Cell, Inception

pytestmark = pytest.mark.experiment

RESULTS = Path(inception.__file__).parent / "results" / "inception.jsonl"
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
    "learning_rate": 0.03,
}


def config(**changed) -> inception.Config:
    return inception.Config(**{**TINY, **changed})


# ---- the network ----


def shapes(cell: Cell, side: int, classes: int):
    """Of the variables and the output of each module; nothing is computed."""
    network = Inception(cell, classes)

    def both(images):
        variables = network.init(jax.random.key(0), images, train=False)
        kept = network.apply(
            variables,
            images,
            train=False,
            capture_intermediates=lambda m, _: isinstance(m, inception.Module),
            mutable=["intermediates"],
        )[1]["intermediates"]
        return variables, {name: v["__call__"][0] for name, v in kept.items()}

    return jax.eval_shape(both, jax.ShapeDtypeStruct((2, side, side, 3), np.uint8))


def test_full_network_is_figure_5s():
    cell = Cell(modules=tuple(FIGURE_5), divisor=1, recipe=X5)
    variables, outputs = shapes(cell, 224, 1000)
    expected = {name: (2, row[6], row[6], row[7]) for name, row in FIGURE_5.items()}
    assert {name: y.shape for name, y in outputs.items()} == expected

    kernels, features = 49 * 3 * 64 + 64 * 64 + 9 * 64 * 192, 64 + 64 + 192
    depth = 192
    for one, reduce, three, double_reduce, double, projection, *_ in FIGURE_5.values():
        kernels += depth * (one + reduce + double_reduce + projection)
        kernels += 9 * (reduce * three + double_reduce * double + double**2)
        features += one + reduce + three + double_reduce + 2 * double + projection
        depth = one + three + double + (projection or depth)
    found = {
        kind: sum(leaf.size for leaf in jax.tree.leaves(tree))
        for kind, tree in variables.items()
    }
    assert found["params"] == kernels + 2 * features + 1024 * 1000 + 1000 == 11_194_984
    assert found["batch_stats"] == 2 * features


def test_narrow_network_has_the_same_modules():
    cell = Cell(modules=tuple(FIGURE_5), divisor=8)
    variables, outputs = shapes(cell, 32, 10)
    expected = {
        name: (2, 4 * row[6] // 7, 4 * row[6] // 7, row[7] // 8)
        for name, row in FIGURE_5.items()
    }
    assert {name: y.shape for name, y in outputs.items()} == expected
    assert set(variables) == {"params"}  # without normalization, each with a bias
    shape = {k: v.shape for k, v in variables["params"]["3a"]["three"]["conv"].items()}
    assert shape == {"kernel": (3, 3, 8, 8), "bias": (8,)}


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("kind", ["mean", "max"])
def test_pool(kind, strides):
    reference = {"mean": nn.avg_pool, "max": nn.max_pool}[kind]
    for height, width in ((8, 7), (2, 1)):
        x = jax.random.normal(jax.random.key(0), (2, height, width, 3))

        def theirs(x):
            return reference(x, (3, 3), (strides, strides), "SAME")

        y, back = jax.vjp(lambda x: inception.pool(x, kind, strides), x)
        expected, expected_back = jax.vjp(theirs, x)
        assert_close(y, expected)
        g = jax.random.normal(jax.random.key(1), y.shape)
        assert_close(back(g)[0], expected_back(g)[0])


def test_lrn():
    x = 100 * np.random.default_rng(0).normal(size=(2, 3, 2, 7)).astype(np.float32)
    expected = np.array(x, np.float64)
    for i in range(7):
        sums = (x[..., max(0, i - 2) : i + 3].astype(np.float64) ** 2).sum(-1)
        expected[..., i] /= (2 + 1e-4 * sums) ** 0.75
    assert_close(inception.local_response_norm(x), expected)


def test_switches_reach_the_network():
    images = jnp.zeros((2, 8, 8, 1), np.uint8)

    def text(recipe, **changed):
        cell = Cell(modules=(), divisor=16, recipe=recipe, **changed)
        network = Inception(cell, 10)
        key = jax.random.key(0)
        init = lambda: network.init(key, images, train=False)  # noqa: E731
        training = lambda v: network.apply(  # noqa: E731
            v, images, train=True, mutable=["batch_stats"], rngs={"dropout": key}
        )
        return str(jax.make_jaxpr(training)(jax.eval_shape(init)))

    for model, recipe in MODELS.items():
        found = text(recipe)
        assert found.count("reduce_window") == (0 if recipe.no_lrn else 2), model
        assert ("random_bits" in found) == (not recipe.no_dropout), model
        assert ("logistic" in found) == (recipe.activation == "sigmoid"), model
    assert "random_bits" not in text(ORIGINAL, dropout=0.0)


def test_larger_first_weights():
    def deviation(weights):
        cell = Cell(recipe=dataclasses.replace(X5, weights=weights), divisor=1)
        layer = inception.Convolution(512, 3, 1, cell)
        params = layer.init(jax.random.key(0), jnp.zeros((1, 1, 1, 8)), False)
        return np.std(params["params"]["conv"]["kernel"])

    assert_close(deviation(1.0), (2 / 9 / 8) ** 0.5, tol=0.02)
    assert_close(deviation(1.5) / deviation(1.0), 1.5)


# ---- the recipes ----


def test_cells():
    def models(**changed):
        return [cell.model for cell in inception.cells(config(**changed))]

    assert models() == list(MODELS)
    assert models(models=("sigmoid",), seeds=(0, 1)) == ["sigmoid"] * 2
    with pytest.raises(ValueError, match="expected some of"):
        models(models=("x",))
    assert models(ablate=True) == ["inception", "bn_x5", *CHANGES]
    whole = dataclasses.asdict(X5)
    for cell in inception.cells(config(ablate=True))[2:]:
        changed = {k: v for k, v in vars(cell.recipe).items() if v != whole[k]}
        assert changed == {cell.model: getattr(ORIGINAL, cell.model)}
    (ensemble,) = inception.cells(config(ensemble=4))
    varied = {(m.dropout, m.recipe.weights) for m in ensemble.members}
    assert varied == {(0.05, 1.0), (0.1, 1.0), (0.05, 1.5), (0.1, 1.5)}
    assert [m.seed for m in ensemble.members] == [0, 1, 2, 3]
    assert not any(m.recipe.no_dropout for m in ensemble.members)
    tuned = inception.cells(config(tune=True))
    assert [cell.learning_rate for cell in tuned] == list(inception.RATES)
    assert all(cell.held_out for cell in tuned)


@pytest.mark.parametrize(
    ("recipe", "factor", "half_life", "l2"),
    [(ORIGINAL, 1, 100, 0.003), (MODELS["bn_x30"], 30, 100 / 6, 0.003 / 5)],
)
def test_rate_momentum_and_decay(recipe, factor, half_life, l2):
    """Kernels alone decay; the velocity is 0.9 of the last, and the gradient."""
    cell = Cell(learning_rate=0.02, l2=0.003, steps=100, recipe=recipe)
    optimizer = inception.optimizer(cell)
    params = {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.ones(3)}
    grads = jax.tree.map(jnp.ones_like, params)
    state, velocity = optimizer.init(params), 0.0
    for step in range(3):
        change, state = optimizer.update(grads, state, params)
        velocity = 0.9 * velocity + 1
        rate = factor * 0.02 * 0.5 ** (step / half_life)
        assert_close(change["bias"], np.full(3, -rate * velocity))
        expected = np.full((2, 3), -rate * velocity * (1 + 2 * l2))
        assert_close(change["kernel"], expected)


# ---- the data ----


@pytest.mark.parametrize("within", [False, True])
def test_epochs_shuffle_shards(within):
    """Which follow each other, and are shuffled inside if `within`."""
    dealt = np.random.default_rng((3, 0)).permutation(2500)
    shard_of = np.empty(2500, int)
    shard_of[dealt] = np.arange(2500) // 1024
    turns = set()
    for epoch in range(4):
        order = inception.epoch_order(3, 2500, within, epoch)
        assert sorted(order) == list(range(2500))
        shards = shard_of[order]
        assert np.count_nonzero(np.diff(shards)) == 2
        turns.add(tuple(dict.fromkeys(shards.tolist())))
        for shard in range(3):
            whole = dealt[shard * 1024 : (shard + 1) * 1024]
            assert (order[shards == shard] == whole).all() == (not within)
    assert len(turns) > 1


def test_changes_reach_the_data():
    data = inception.load(config())
    train, _ = images.load("digits")
    for recipe, amount in ((ORIGINAL, 0.5), (X5, 0.2)):
        cell = Cell(seed=5, batch_size=16, recipe=recipe)
        batch = inception.training_batches(data, cell)[5]
        order = inception.epoch_order(5, 1397, recipe.shuffle, 0)[80:96]
        np.testing.assert_array_equal(batch.labels, train.labels[order])
        again = list(
            zip(range(2), inception.read(inception.training_batches(data, cell), 4))
        )
        np.testing.assert_array_equal(again[1][1].images, batch.images)

        def brightest(amount):
            rng = np.random.default_rng(0)
            grey = Image.fromarray(np.full((4, 5), 100, np.uint8))
            changed = [
                np.asarray(inception.change_colours(grey, rng, amount)).max()
                for _ in range(200)
            ]
            return max(changed)

        assert 100 * (1 + 0.9 * amount) < brightest(amount) <= 100 * (1 + amount)


def test_small_images_are_moved_and_mirrored():
    random = np.random.default_rng(0)
    train = Split(random.integers(1, 256, (1, 6, 5, 3), np.uint8), np.array([7]))
    data = inception.in_memory(train, train, padding=1, flip=True)
    padded = np.pad(train.images[0], ((1, 1), (1, 1), (0, 0)))
    options = [padded[t : t + 6, s : s + 5] for t in range(3) for s in range(3)]
    options += [option[:, ::-1] for option in options]
    found = set()
    for _ in range(200):
        image, label = data.training(0, random, 0.0)
        assert label == 7
        (which,) = (i for i, option in enumerate(options) if (option == image).all())
        found.add(which)
    assert found == set(range(18))


def test_held_out_images_are_not_trained_on():
    train, _ = images.load("digits")
    data = inception.load(config(tune=True))
    assert data.counts == (1397 - 139, 139)
    for number in (0, 138):
        expected = 15 * train.images[1258 + number]
        np.testing.assert_array_equal(data.testing(number).images, expected)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """40 images in the layout of ImageNet, of three kinds; two are damaged."""
    folder, random = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for split, count in (("train", 30), ("val", 10)):
        for i in range(count):
            width, height = random.integers(30, 200, 2)
            pixels = random.integers(0, 256, (height, width, 3), np.uint8)
            image = Image.fromarray(pixels).convert("L" if i % 7 == 3 else "RGB")
            path = folder / split / f"n0144{i % 3}" / f"{split}_{i:08}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, "PNG" if i % 5 == 4 else "JPEG")
            if i == 9:
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return folder


def test_photographs(photographs):
    data = inception.photos(photographs, size=24)
    assert (data.counts, data.shape, data.classes) == ((30, 10), (24, 24, 3), 3)
    with pytest.warns(UserWarning, match=r"left out .*val_00000009.JPEG, which cannot"):
        tests = [data.testing(number) for number in range(10)]
    # By class: the first holds the images 0, 3, 6 and 9, of which the last is damaged.
    assert [int(label) for _, label in tests] == [0, 0, 0, -1, 1, 1, 1, 2, 2, 2]
    with warnings.catch_warnings(action="ignore"):
        cell = Cell(batch_size=8, recipe=X5)
        batch, again = (inception.training_batches(data, cell)[9] for _ in range(2))
    assert batch.images.shape == (8, 24, 24, 3)
    np.testing.assert_array_equal(batch.images, again.images)
    assert batch.labels.min() >= 0
    with pytest.warns(UserWarning, match="train_00000009"):
        image, _ = data.training(3, np.random.default_rng(0), 0.2)
    following, _ = data.training(4, np.random.default_rng(0), 0.2)
    np.testing.assert_array_equal(image, following)


def test_the_middle_of_a_photograph(tmp_path):
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[4:60, 36:92] = 255  # 7/8 of the height
    for place in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / place).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / place / "1.png")
    assert (inception.photos(tmp_path, 56).testing(0).images == 255).all()


def test_crops():
    random = np.random.default_rng(0)
    boxes = np.array([inception.crop(300, 200, random) for _ in range(500)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0
    assert (boxes[:, 2:] <= (300, 200)).all()
    assert 0.075 < (width * height / 60_000).min() < 0.1
    assert (width * height / 60_000).max() > 0.85
    assert 0.7 < (width / height).min() < 0.8 < 1.25 < (width / height).max() < 1.52
    left, top, right, bottom = inception.crop(1000, 3, random)
    assert (top, bottom) == (0, 3)
    assert 0 <= left < right <= 1000


def test_missing_photographs(tmp_path, capsys):
    for place in (None, tmp_path / "nowhere"):
        there = config(data="imagenet", data_dir=place, out=tmp_path)
        assert study.main(inception.STUDY, there) == 1
        assert "ImageNet cannot be read from" in capsys.readouterr().out


# ---- training ----


def trained(folder: Path, cell: Cell):
    """The record without how long it took, and the trained network."""
    record, predict = inception.train_cell(cell, inception.load(config()), folder)
    assert record.pop("seconds") > 0
    return record, predict


def cell(**changed) -> Cell:
    return inception.cells(config(models=("bn_baseline",), **changed))[0]


def test_a_stopped_training_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    whole, predict = trained(tmp_path / "whole", cell(dropout=0.3))
    assert whole["steps"] == [10, 20, 30]
    assert not whole["diverged"]
    logits, labels = predict()
    assert logits.shape == (400, 10)
    assert (logits.argmax(-1) == labels).mean() == whole["accuracy"][-1]

    class StopError(Exception):
        pass

    with monkeypatch.context() as patch:
        read, steps = inception.read, iter(range(26))

        def stop(batches, step=0):
            for batch in read(batches, step):
                if len(batch.labels) == 16 and next(steps, None) is None:
                    raise StopError
                yield batch

        patch.setattr(inception, "read", stop)
        with pytest.raises(StopError):
            trained(tmp_path / "stopped", cell(dropout=0.3))
    assert [p.name for p in (tmp_path / "stopped").iterdir()] == ["20"]
    again, predict = trained(tmp_path / "stopped", cell(dropout=0.3))
    assert again == whole
    np.testing.assert_array_equal(predict()[0], logits)


def test_dropout_differs_from_step_to_step():
    """At rate 0 nothing else changes between two steps on the same batch."""
    train, _ = images.load("digits")
    batch = Split(train.images[:16], train.labels[:16])

    def losses(dropout):
        still = dataclasses.replace(cell(dropout=dropout), learning_rate=0.0)
        model = Inception(still, 10)
        state, found = inception.init(model, batch.images[:1]), []
        for _ in range(2):
            state, loss = jax.jit(inception.train_step, static_argnums=0)(
                model, state, batch
            )
            found.append(float(loss))
        return found

    first, second = losses(0.5)
    assert first != second
    assert losses(0.5) == [first, second]
    first, second = losses(0.0)
    assert first == second


def test_divergence_is_a_result(tmp_path, capsys):
    """It ends a training, not the run; the next start does not repeat it."""
    wild = config(models=("inception",), learning_rate=1e30, out=tmp_path)
    assert study.main(inception.STUDY, wild) == 0
    (line,) = study.finished(tmp_path / "inception.jsonl").values()
    assert line["diverged"]
    assert max(line["steps"], default=0) < 30
    assert "Inception (diverged)" in capsys.readouterr().out
    assert list((tmp_path / "inception").iterdir()) == []


def test_votes_are_averaged(monkeypatch):
    """Each member is wrong once; by the mean, not by the majority, none is."""
    rows = iter([[[0.9, 0.1], [0.6, 0.4]], None, [[0.4, 0.6], [0.1, 0.9]]])

    def train_cell(cell, data, folder):
        row = next(rows)
        predict = row and (lambda: (np.log(row), np.array([0, 1])))
        return {"seconds": 2.0}, predict

    monkeypatch.setattr(inception, "train_cell", train_cell)
    (ensemble,) = inception.cells(config(ensemble=3))
    found = inception.vote(ensemble, inception.load(config()), Path("nowhere"))
    assert found == {
        "members": [0.5, 0.5],
        "diverged": 1,
        "together": 1.0,
        "gain": 0.5,
        "seconds": 6.0,
    }


# ---- the experiment ----


def result(steps, accuracy, diverged=False, seconds=60.0):
    named = {"steps": steps, "accuracy": accuracy, "diverged": diverged}
    return {**named, "seconds": seconds}


def test_table_by_hand():
    settings = config(models=("inception", "bn_x5", "sigmoid", "bn_x30"), seeds=(0, 1))
    found = dict(
        zip(
            inception.cells(settings),
            [
                result([10, 20, 30, 40], [0.1, 0.5, 0.73, 0.7]),
                result([10, 20, 30, 40], [0.6, 0.74, 0.73, 0.75], seconds=120.0),
                result([10, 20, 30, 40], [0.1, 0.1, 0.1, 0.1]),
                result([], [], diverged=True),
                result([10, 20, 30], [0.1, 0.5, 0.71], diverged=True),
                result([10, 20, 30, 40], [0.6, 0.74, 0.73, 0.75]),
                result([10, 20, 30, 40], [0.1, 0.1, 0.1, 0.1]),
                result([], [], diverged=True),
            ],
        )
    )
    console = Console(width=120)
    with console.capture() as capture:
        console.print(*inception.report(settings, found))
    lines = [" ".join(line.split()) for line in capture.get().splitlines()]
    assert "Inception (diverged) 30 1.00 72.00 1.0 31.0e6 1.00 72.2" in lines
    assert "BN-x5 20 0.67 75.00 1.5 2.1e6 0.07 73.0" in lines
    assert "Inception, sigmoid - - 10.00 1.0 - - 0.1" in lines
    assert "BN-x30 (diverged) - - - 1.0 2.7e6 0.09 74.8" in lines


@pytest.mark.parametrize(
    ("changed", "count"),
    [
        ({}, 7),
        ({"ablate": True}, 9),
        ({"ensemble": 4}, 1),
        ({"tune": True, "steps": 1500, "evaluate_every": 500}, 5),
    ],
)
def test_committed_records_are_of_these_cells(changed, count):
    settings = inception.Config(**changed)
    found = study.load(inception.STUDY, settings, RESULTS)
    assert len(found) == len(inception.cells(settings)) == count
    assert inception.report(settings, found)


def test_smoke(tmp_path, capsys):
    """Finished cells are not trained again, and draw the same picture."""
    settings = inception.Config(smoke=True, out=tmp_path)
    assert study.main(inception.STUDY, settings) == 0
    assert "BN-x5" in capsys.readouterr().out
    path, picture = tmp_path / "inception.jsonl", tmp_path / "inception_digits.png"
    first, cell, last = results.read(path)
    assert {"versions", "hardware", "commit", "time"} <= first.keys()
    assert (last["kind"], last["finished"]) == ("end", True)
    assert cell["result"]["steps"] == [20, 40, 60]
    assert cell["result"]["accuracy"][-1] > 0.3  # chance is 0.1
    assert not list((tmp_path / "inception").iterdir())
    records, drawn = path.read_bytes(), picture.read_bytes()
    assert len(drawn) > 20_000
    assert study.main(inception.STUDY, settings) == 0
    assert (path.read_bytes(), picture.read_bytes()) == (records, drawn)

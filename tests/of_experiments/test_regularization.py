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
from experiments.common import convnet, study
from experiments.common.images import Split
from experiments.common.results import read

pytestmark = pytest.mark.experiment

RESULTS = Path(regularization.__file__).parent / "results" / "regularization.jsonl"
CONFIG = regularization.Config()
BASE = regularization.cell_of(CONFIG, True, regularization.NOTHING, 0)


def changed(**others) -> regularization.Cell:
    return dataclasses.replace(BASE, **others)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(1, 256, (200, 6, 5, 3), np.uint8)


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
    cell = changed(
        widths=(4, 6, 8), strides=(1, 2, 1), normalize=normalize, data=data, lrn=True
    )
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
    data = convnet.load("digits")._asdict()
    small = changed(
        data="digits", widths=(4,), strides=(4,), steps=12, batch_size=10, images=90
    )
    step, found = regularization.train_step, []
    before = step._cache_size()
    for others in ({}, {"seed": 1}, {"rate": 1.0}, {"l2": 0.5}):
        cell = dataclasses.replace(small, **others)
        found.append(regularization.train_cell(cell, data)["training"])
    assert step._cache_size() == before + 1
    assert len(set(found)) > 1


def test_the_error_is_of_the_images_asked_for(monkeypatch):
    data = convnet.load("digits")._asdict()
    counts = {"train": 1097, "validation": 300, "test": 400}
    assert {name: len(split.labels) for name, split in data.items()} == counts
    right = {400: 3, 300: 5, 90: 7}  # by the number of images
    monkeypatch.setattr(
        regularization, "evaluate", lambda cell, variables, part: right[len(part[1])]
    )
    for measured in ("test", "validation"):
        short = changed(data="digits", widths=(4,), strides=(4,), steps=1, images=90)
        short = dataclasses.replace(short, measured=measured)
        found = regularization.train_cell(short, data)
        count = counts[measured]
        assert found["error"] == pytest.approx(1 - right[count] / count)
        assert found["training"] == pytest.approx(1 - 7 / 90)


def test_right_answers(images):
    cell = changed(widths=(4,), strides=(1,))
    net = regularization.Network(cell)
    variables = net.init(jax.random.key(0), images[:2], train=False)
    answers = net.apply(variables, images, train=False).argmax(-1)
    labels = np.where(np.arange(200) < 30, answers, answers + 1)
    assert regularization.evaluate(cell, variables, Split(images, labels)) == 30


# ---- the experiment ----


def test_what_is_changed():
    """Each cell differs from that of no change in what its name says."""
    cells = {
        name: regularization.cell_of(CONFIG, True, name, 0)
        for name in regularization.CHANGES
    }
    found = {name: (c.dropout, c.l2, c.lrn) for name, c in cells.items()}
    assert found == {
        "nothing": (0.4, 2e-3, False),
        "no dropout": (0.0, 2e-3, False),
        "a fifth of L2": (0.4, 4e-4, False),
        "no L2": (0.4, 0.0, False),
        "no dropout, a fifth of L2": (0.0, 4e-4, False),
        "no dropout, no L2": (0.0, 0.0, False),
        "LRN as well": (0.4, 2e-3, True),
    }
    others = {(c.data, c.seed, c.rate, c.images, c.steps) for c in cells.values()}
    assert others == {("cifar10", 0, 0.3, 10_000, 4_000)}


@pytest.mark.parametrize(
    ("config", "count"), [(CONFIG, 42), (regularization.Config(tune=True), 12)]
)
def test_committed_records_are_of_these_cells(config, count):
    found = study.load(regularization.STUDY, config, RESULTS)
    assert len(found) == len(regularization.cells(config)) == count
    measured = {cell.measured for cell in found}
    assert measured == {"validation" if config.tune else "test"}


def test_rates_are_those_that_tuning_chose():
    config = regularization.Config(tune=True)
    found = study.load(regularization.STUDY, config, RESULTS)
    for normalize, chosen in regularization.TASKS["cifar10"].rates.items():
        errors = {
            rate: sum(
                regularization.errors(config, found, normalize, change, rate)[0]
                for change in (regularization.NOTHING, regularization.EVERYTHING)
            )
            for rate in regularization.RATES
        }
        assert chosen == min(errors, key=errors.__getitem__)


def test_two_parts_share_the_kinds():
    """Of two parts, one trains the networks with batch normalization."""
    cells = regularization.cells(CONFIG)
    assert {c.normalize for c in cells[::2]} == {True}
    assert {c.normalize for c in cells[1::2]} == {False}


def made_up(config):
    """Errors of three seeds: with BN no dropout costs 1, 2 and 3 points, without 4."""
    found = {}
    for cell in regularization.cells(config):
        error = 0.3 + 0.05 * cell.seed
        if cell.dropout == 0:
            error += 0.01 * (cell.seed + 1) if cell.normalize else 0.04
        found[cell] = {"error": error, "training": 0.125}
    return found


def test_costs_are_taken_seed_by_seed():
    config = regularization.Config(changes=("no dropout",))
    found = made_up(config)
    (known,) = regularization.findings(config, found).values()
    half = 4.303 / np.sqrt(3)  # of a deviation of 1, by Student's t
    assert known.with_bn == pytest.approx((2, half), rel=1e-3)
    assert known.without_bn == pytest.approx((4, 0))
    assert known.less == pytest.approx((2, half), rel=1e-3)
    _, errors, _, costs = regularization.report(config, found)
    columns = [list(column.cells) for column in errors.columns]
    assert columns[1] == ["35.0 ± 5.0", "37.0 ± 6.0"]
    assert columns[2] == ["12.5 ± 0.0"] * 2
    assert columns[3] == ["35.0 ± 5.0", "39.0 ± 5.0"]
    row = [*itertools.chain(*(column.cells for column in costs.columns))]
    assert row == ["no dropout", "+2.0 ± 2.5", "+4.0 ± 0.0", "+2.0 ± 2.5"]
    found.popitem()  # not all seeds are trained yet
    assert np.isnan(regularization.findings(config, found)["no dropout"].less.mean)


def test_smoke(tmp_path, monkeypatch):
    """Finished cells are not trained again, and draw the same picture."""
    config = regularization.Config(out=tmp_path, smoke=True)
    path = tmp_path / "regularization.jsonl"
    picture = tmp_path / "regularization_digits.png"
    assert study.main(regularization.STUDY, config) == 0
    first, *found, last = read(path)
    assert {"versions", "hardware", "commit", "time"} <= first.keys()
    assert (last["kind"], last["finished"]) == ("end", True)
    which = [(r["cell"]["normalize"], r["cell"]["dropout"]) for r in found]
    assert which == [(n, d) for d in (0.4, 0.0) for n in (True, False)]
    for record in found:
        assert 0 < record["result"]["error"] < 1
        assert 0 < record["result"]["training"] < 1
    records, drawn = path.read_bytes(), picture.read_bytes()
    assert len(drawn) > 20_000

    trained = []
    monkeypatch.setattr(
        regularization,
        "train_cell",
        lambda cell, data: (
            trained.append(cell.normalize) or {"error": 0.5, "training": 0.5}
        ),
    )
    assert study.main(regularization.STUDY, config) == 0
    assert (path.read_bytes(), picture.read_bytes()) == (records, drawn)
    assert not trained
    path.write_bytes(b"".join(records.splitlines(True)[:4])[:-30])  # cut off
    assert study.main(regularization.STUDY, config) == 0
    assert trained == [True, False]


def test_refuses(tmp_path, capsys):
    config = regularization.Config(out=tmp_path, changes=("no L2", "bias"))
    assert study.main(regularization.STUDY, config) == 1
    assert "received the changes {'bias'}" in capsys.readouterr().out

"""Deep sigmoid and tanh networks: the worked example, the grid, and the heat maps."""

import dataclasses
import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_trees_close, plain_batch_norm

from experiments import saturation
from experiments.common import study
from experiments.common.images import Dataset, Split, draw_batches
from experiments.common.results import read
from experiments.saturation import Cell, Network

pytestmark = pytest.mark.experiment

KINDS = [(a, n) for a in ("sigmoid", "tanh") for n in (False, True)]


def test_the_worked_example():
    found = doctest.testmod(saturation)
    assert found.failed == 0
    assert found.attempted >= 15


# ---- one network ----


def activate(name, z):
    return 1 / (1 + np.exp(-z)) if name == "sigmoid" else np.tanh(z)


def layers_of(params):
    """The parameters of each hidden layer in turn."""
    depth = 1 + len(params["rest"]["kernel"])
    yield params["first"]
    for i in range(depth - 1):
        yield {name: value[i] for name, value in params["rest"].items()}


def forward(net, params, x, known=None):
    """Logits and statistics in float64 NumPy, layer by layer."""
    used = []
    for i, own in enumerate(layers_of(params)):
        z = x @ own["kernel"]
        if net.normalize:
            mean, var = (z.mean(0), z.var(0)) if known is None else known[i]
            used.append((mean, var))
            z = (z - mean) / np.sqrt(var + 1e-5) * own["scale"]
        x = activate(net.activation, z + own["bias"])
    return x @ params["last"]["kernel"] + params["last"]["bias"], used


def random_params(net, pixels=6):
    """From `init`, but no bias is 0 and no scale 1."""
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda v: np.asarray(v, np.float64) + 0.3 * random.normal(size=v.shape),
        net.init(jax.random.key(1), pixels, 2.0),
    )
    return params, random.normal(size=(9, pixels)), random.normal(size=(5, pixels))


@pytest.mark.parametrize(("activation", "normalize"), KINDS)
@pytest.mark.usefixtures("x64")
def test_a_network_against_numpy(activation, normalize):
    net = Network(4, 5, activation, normalize)
    params, train, test = random_params(net)
    logits, statistics = net.apply(params, train)
    expected, used = forward(net, params, train)
    assert_close(logits, expected)
    logits, again = net.apply(params, test, statistics)
    assert_close(logits, forward(net, params, test, used or None)[0])
    assert_trees_close(again, statistics)
    if normalize:
        means = [statistics["first"]["mean"], *statistics["rest"]["mean"]]
        assert_close(jnp.stack(means), np.stack([mean for mean, _ in used]))


def test_first_weights():
    pixels, width = 100, 50
    plain, wide = (
        Network(6, width, "tanh", n).init(jax.random.key(0), pixels, std)
        for n, std in ((False, 1.0), (True, 3.0))
    )
    for part, factor in (("first", 3), ("rest", 3), ("last", 1)):
        kernel = np.asarray(plain[part]["kernel"])
        assert_close(wide[part]["kernel"], factor * kernel)
        assert abs(np.sqrt(kernel.shape[-2]) * kernel.std() - 1) < 0.05
        assert not np.any(plain[part]["bias"])
    assert plain["rest"]["kernel"].shape == (5, width, width)
    assert "scale" not in plain["rest"]
    assert (np.asarray(wide["rest"]["scale"]) == 1).all()


# ---- data ----


def test_digits_are_binary_and_split():
    digits = saturation.load("digits")
    assert [len(split.labels) for split in digits] == [1097, 300, 400]
    for images, labels in digits:
        assert set(np.unique(images)) == {0, 1}
        assert images.shape == (len(labels), 64)
        assert set(labels) == set(range(10))


def test_batches_repeat_nothing_within_an_epoch():
    drawn = draw_batches(0, 50, 7, 12)
    assert drawn.shape == (7, 12)
    for epoch in drawn[:4], drawn[4:]:
        assert len(np.unique(epoch)) == epoch.size
    assert not np.array_equal(drawn[:3], drawn[4:])


# ---- the grid ----


@pytest.fixture(scope="module")
def images():
    """Ten patterns under noise, 60 + 20 + 30 of them."""
    random = np.random.default_rng(0)
    patterns = random.integers(0, 2, (10, 20))
    labels = np.arange(110, dtype=np.int32) % 10
    noise = random.random((110, 20)) < 0.05
    every = Split((patterns[labels] ^ noise).astype(np.uint8), labels)
    cut = ((0, 60), (60, 80), (80, 110))
    return Dataset(*(Split(*(part[a:b] for part in every)) for a, b in cut))


@pytest.mark.parametrize(("activation", "normalize"), KINDS[1:3])
@pytest.mark.usefixtures("x64")
def test_training_is_gradient_descent_on_each(images, activation, normalize):
    """Against one network at a time, its layers written out, BN left to autodiff."""
    net, key = Network(3, 7, activation, normalize), jax.random.key(2)
    rates, scales = np.array([0.1, 0.5, 0.5]), np.array([1.0, 1.0, 2.0])
    batches = np.random.default_rng(1).integers(0, 60, (3, 12))

    def loss(params, x, labels):
        for own in layers_of(params):
            z = x @ own["kernel"]
            if normalize:
                z, _ = plain_batch_norm(z, own["scale"], own["bias"], axes=(0,))
            else:
                z = z + own["bias"][None]
            x = jax.nn.sigmoid(z) if activation == "sigmoid" else jnp.tanh(z)
        logits = x @ params["last"]["kernel"] + params["last"]["bias"][None]
        rows = jnp.arange(len(labels))
        return -jax.nn.log_softmax(logits)[rows, labels].mean()

    gradient = jax.jit(jax.grad(loss))
    train = jax.tree.map(jnp.asarray, images.train)
    found = saturation.fit(net, key, rates, scales, train, batches)
    for i, (rate, scale) in enumerate(zip(rates, scales, strict=True)):
        params = net.init(key, 20, scale)
        for batch in batches:
            x, labels = images.train.images[batch], images.train.labels[batch]
            slope = gradient(params, x.astype(float), labels)
            params = jax.tree.map(lambda p, g, r=rate: p - r * g, params, slope)
        mine = jax.tree.map(lambda p, i=i: np.asarray(p[i]), found)
        # Images are float32 there; those of 0 and 1 are the same in float64.
        assert_trees_close(mine, jax.tree.map(np.asarray, params), tol=1e-9)


def test_each_place_of_the_grid_is_its_own_network(images):
    """Rate by rate, scale by scale; and validation and test are not exchanged."""
    wrong = images._replace(validation=Split(images.test.images, np.full(30, 11)))
    rates, scales = (0.0, 0.3, 1.0), (0.5, 5.0)
    cell = Cell("patterns", "tanh", 2, True, 3, rates, scales, 12, 15, 12)
    every = saturation.train_grid(cell, wrong)
    assert every["test"].shape == (3, 2)
    assert not every["validation"].any()
    for i, j in ((0, 0), (1, 0), (2, 1)):
        one = dataclasses.replace(
            cell, rates=rates[i : i + 1], scales=scales[j : j + 1]
        )
        alone = saturation.train_grid(one, wrong)["test"].item()
        assert abs(every["test"][i, j] - alone) < 0.06  # rounding: one image or so
    untrained, _, trained = every["test"]
    assert (trained > untrained + 0.2).all()


# ---- what is told of a map ----


def test_what_trains():
    test = np.full((2, 3, 2), 0.1)  # (seed, rate, scale)
    test[:, 0] = 0.9, 0.7
    test[0, 1, 0] = 0.95  # of one seed: 0.525 on average
    test[0, 2] = 0.8  # 0.45 on average
    validation = np.full((2, 3, 2), 0.3)
    validation[0, 1, 0], validation[1, 0, 1] = 0.6, 0.8
    rates, test[1, 0, 1] = (0.1, 1.0, 10.0), 0.75
    # 7 of 12 train; the best in validation is that of rate 0.1 and the second scale.
    told = saturation.summary(rates, validation, test)
    assert list(told.values()) == ["58", "72.5 ± 3.5", "1"]
    told = saturation.summary(rates, validation[:1], 0.1 * test[:1])
    assert list(told.values()) == ["0", "9.5", "none"]


def test_a_panel_has_rates_along_and_scales_up(tmp_path, monkeypatch):
    config = saturation.Config(depths=(3,), rates=(0.1, 1.0, 9.0), scales=(1.0, 5.0))
    test = np.zeros((3, 2))
    test[2, 1] = 1.0
    (cell, *_), kept = saturation.cells(config), []
    monkeypatch.setattr(
        saturation.panels, "save", lambda figure, _: kept.append(figure)
    )
    saturation.draw(config, {cell: {"test": test, "validation": test}}, tmp_path)
    (image,) = kept[0].axes[0].images
    assert image.get_array().shape == (2, 3)
    assert image.get_array()[1, 2] == 100
    assert image.origin == "lower"


# ---- the experiment ----


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("saturation")
    assert study.main(saturation.STUDY, saturation.Config(out=out, smoke=True)) == 0
    jax.config.update("jax_disable_most_optimizations", False)
    return out


def test_smoke_shows_the_claim(smoke):
    """Eight sigmoid layers: no rate or scale trains without BN, some with it."""
    first, plain, normalized, last = read(smoke / "saturation.jsonl")
    assert {"versions", "hardware", "commit", "time"} <= first.keys()
    assert (last["kind"], last["finished"]) == ("end", True)
    assert (plain["cell"]["normalize"], normalized["cell"]["normalize"]) == (0, 1)
    for record in (plain, normalized):
        assert np.shape(record["result"]["test"]) == (2, 2)
    assert np.max(plain["result"]["test"]) < 0.25
    assert np.max(normalized["result"]["test"]) > 0.6
    assert (smoke / "saturation_digits.png").stat().st_size > 20_000


def test_what_is_there_is_not_trained_again(smoke, tmp_path, monkeypatch, capsys):
    lines = (smoke / "saturation.jsonl").read_bytes().splitlines(True)
    path, trained = tmp_path / "saturation.jsonl", []

    def train_grid(cell, data):
        trained.append((cell.depth, cell.activation, cell.normalize))
        shares = np.full((len(cell.rates), len(cell.scales)), 0.75)
        return {"validation": shares, "test": shares}

    monkeypatch.setattr(saturation, "train_grid", train_grid)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    config = saturation.Config(out=tmp_path, smoke=True)
    path.write_bytes(b"".join(lines))
    assert study.main(saturation.STUDY, config) == 0
    assert (trained, path.read_bytes()) == ([], b"".join(lines))
    picture = (tmp_path / "saturation_digits.png").read_bytes()
    assert picture == (smoke / "saturation_digits.png").read_bytes()

    path.write_bytes(b"".join([*lines[:2], lines[2][:50]]))  # cut off as it was written
    assert study.main(saturation.STUDY, config) == 0
    assert trained == [(8, "sigmoid", True)]
    assert "sigmoid, with BN" in capsys.readouterr().out
    assert [record["kind"] for record in read(path)].count("cell") == 2

"""Jacobians, lengths and turns against float64 NumPy; and the experiment about them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from experiments import scale_invariance
from experiments.common import results, study
from experiments.common.images import Split
from experiments.saturation import Network, load
from experiments.scale_invariance import descend, hidden_layers

pytestmark = pytest.mark.experiment

PIXELS, WIDTH, DEPTH, EPSILON = 6, 5, 3, 1e-5
NAME, PICTURE = "scale_invariance.jsonl", "scale_invariance_digits.png"


@pytest.fixture(params=[True, False], ids=["bn", "plain"])
def net(request):
    return Network(DEPTH, WIDTH, "tanh", request.param)


def random_params(net):
    """No bias is 0, no scale 1."""
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda v: jnp.asarray(v + 0.3 * random.normal(size=v.shape)),
        net.init(jax.random.key(1), PIXELS, jnp.asarray(1.5)),
    )


def numbers(*shape):
    return np.random.default_rng(2).normal(size=shape)


# ---- Jacobians ----


@pytest.mark.usefixtures("x64")
def test_the_jacobians_of_layers_against_numpy(net):
    """diag(1/s) W' diag(scale (1 - tanh^2)), one layer after the other."""
    params, known, x = random_params(net), numbers(11, PIXELS), numbers(4, PIXELS)
    arrays = jnp.asarray(known), jnp.asarray(x)
    found = scale_invariance.layer_jacobians(net, params, *arrays)
    assert found.shape == (DEPTH - 1, 4, WIDTH, WIDTH)

    own = [jax.tree.map(np.asarray, layer) for layer in hidden_layers(params, DEPTH)]
    slope = None
    for i, layer in enumerate(own):
        all_z, z = known @ layer["kernel"], x @ layer["kernel"]
        scale, s = np.ones(WIDTH), np.ones(WIDTH)
        if net.normalize:
            mean, s = all_z.mean(0), np.sqrt(all_z.var(0) + EPSILON)
            scale = layer["scale"]
            all_z, z = ((v - mean) / s * scale for v in (all_z, z))
        known, x = (np.tanh(v + layer["bias"]) for v in (all_z, z))
        if slope is not None:
            of_layer = np.einsum("o,io,ni->noi", 1 / s, layer["kernel"], slope)
            assert_close(found[i - 1], of_layer)
        slope = scale * (1 - x**2)


def test_singular_values(monkeypatch):
    u, _ = np.linalg.qr(numbers(3, 3))
    v, _ = np.linalg.qr(numbers(3, 3).T)
    one = u @ np.diag([3.0, 2.0, 0.5]) @ v
    for jacobians, expected in (
        ([[one, 10 * one]], np.percentile([0.5, 2, 3, 5, 20, 30], [5, 25, 50, 75, 95])),
        (np.full((1, 1, 3, 3), np.inf), [np.nan] * 5),
    ):
        monkeypatch.setattr(
            scale_invariance, "layer_jacobians", lambda *_, found=jacobians: found
        )
        found = scale_invariance.singular_values(None, None, np.zeros((2, 3)))
        np.testing.assert_allclose(found, [expected], rtol=1e-5)


@pytest.mark.usefixtures("x64")
def test_deviations_are_those_of_epsilon_or_of_the_scale(net):
    factors = 1e-3, 0.1, 2.0, 100.0
    params, x = random_params(net), numbers(11, PIXELS)
    found = scale_invariance.deviations(net, params, jnp.asarray(x), factors)
    assert found.shape == (3, 4)
    if not net.normalize:  # of a W u + b - (W u + b): the bias is not scaled
        assert_close(found[1:], np.abs(np.array(factors) - 1) * np.ones((2, 1)))
        assert (found[0] > 0.2 * np.abs(np.array(factors) - 1)).all()
        return
    # The output of each layer is off by sqrt((v + e) / (v + e / a^2)) - 1 of that unit.
    u, worst = jnp.asarray(x), np.zeros(4)
    for own in hidden_layers(params, DEPTH):
        z = np.asarray(u @ own["kernel"])
        v, y = z.var(0), (z - z.mean(0)) * np.asarray(own["scale"])
        for i, a in enumerate(factors):
            one, other = (
                b * y / np.sqrt(b**2 * v + EPSILON) + np.asarray(own["bias"])
                for b in (1.0, a)
            )
            off = np.linalg.norm(other - one) / np.linalg.norm(one)
            worst[i] = max(worst[i], off)
        u, _ = net.layer(u, own)
    assert_close(found[0], worst, tol=1e-6)
    assert (found[:, 2:] < 1e-4).all()
    assert (found[:, 0] > 1e-2).all()


# ---- training ----


@pytest.fixture
def data():
    random = np.random.default_rng(3)
    images = random.integers(0, 2, (40, PIXELS)).astype("u1")
    return Split(images, random.integers(0, 10, 40).astype("i4"))


def batches(steps):
    return np.random.default_rng(4).integers(0, 40, (steps, 7))


@pytest.mark.usefixtures("x64")
def test_descent_and_what_is_measured(net, data):
    params, drawn = random_params(net), batches(3)
    last, steps = descend(net, params, data, drawn, 0.2, 0.7, 0.03)

    def loss(params, batch):
        logits, _ = net.apply(params, jnp.asarray(data.images[batch], float))
        own = jnp.take_along_axis(logits, jnp.asarray(data.labels[batch])[:, None], 1)
        return (jax.nn.logsumexp(logits, 1) - own[:, 0]).mean()

    for step, batch in enumerate(drawn):
        value, gradient = jax.value_and_grad(loss)(params, batch)
        assert_close(steps["loss"][step], np.asarray(value))
        new = {}
        for part, own in params.items():
            new[part] = {n: p - 0.2 * gradient[part][n] for n, p in own.items()}
            if part != "last":
                w = own["kernel"]
                new[part]["kernel"] = w - 0.7 * (gradient[part]["kernel"] + 0.03 * w)
        for layer in range(DEPTH):
            w, g, v = (
                np.asarray(hidden_layers(p, DEPTH)[layer]["kernel"])
                for p in (params, gradient, new)
            )
            assert_close(steps["length"][step, layer], np.sqrt((w**2).sum(0).mean()))
            assert_close(
                steps["gradient_norm"][step, layer], np.sqrt((g**2).sum(0).mean())
            )
            norms = [np.linalg.norm(x, axis=0) for x in (w, g, v)]
            turns = np.arccos((w * v).sum(0) / norms[0] / norms[2])
            assert_close(
                steps["turn"][step, layer], np.sqrt((turns**2).mean()), tol=1e-6
            )
            cosines = np.abs((w * g).sum(0) / norms[0] / norms[1])
            assert_close(steps["cosine"][step, layer], cosines.max(), tol=1e-6)
        params = new
    assert_close(last["rest"]["kernel"], np.asarray(params["rest"]["kernel"]))
    assert_close(last["last"]["bias"], np.asarray(params["last"]["bias"]))


@pytest.mark.usefixtures("x64")
def test_with_bn_weights_grow_as_pythagoras_has_it(net, data):
    start = random_params(net)
    end, steps = descend(net, start, data, batches(9), 0.1, 3.0, 0.0)
    length = scale_invariance.mean_lengths(end, DEPTH)
    error = np.abs(scale_invariance.predicted_length(steps, 3.0) / length - 1)
    assert (length > 1.05 * steps["length"][0]).all() or not net.normalize
    assert error.max() < 1e-3 if net.normalize else error.max() > 0.01
    assert (
        steps["cosine"].max() < 0.01 if net.normalize else steps["cosine"].max() > 0.1
    )


@pytest.mark.usefixtures("x64")
def test_larger_weights_at_the_square_of_the_rate_are_the_same_network(net, data):
    def losses(a, rate_factor):
        params = random_params(net)
        for part in ("first", "rest"):
            params[part]["kernel"] = a * params[part]["kernel"]
        hidden_rate = 0.2 * rate_factor
        _, steps = descend(net, params, data, batches(9), 0.2, hidden_rate, 0.0)
        return np.asarray(steps["loss"])

    one = losses(1.0, 1.0)
    off = np.abs(losses(4.0, 16.0) / one - 1).max()
    assert off < 1e-3 if net.normalize else off > 0.01
    assert np.abs(losses(4.0, 1.0) / one - 1).max() > 0.01


# ---- the experiment ----


def test_smoke_and_again(tmp_path, capsys):
    config = scale_invariance.Config(smoke=True, out=tmp_path)
    assert study.main(scale_invariance.STUDY, config) == 0
    printed = capsys.readouterr().out
    assert "weights" in printed
    assert "singular values, percentiles" in printed
    path = tmp_path / NAME
    picture = (tmp_path / PICTURE).read_bytes()
    assert len(picture) > 20_000
    records = results.read(path)
    cells = {r["cell"]["kind"]: r["result"] for r in records if r["kind"] == "cell"}
    assert list(cells) == ["bn", "bn large", "plain"]
    for kind, result in cells.items():
        assert np.shape(result["singular"]) == (3, 2, 5)
        assert np.shape(result["turn"]) == (2, 3)
        assert np.shape(result["length"]) == (3, 3)
        assert (result["cosine"] < 1e-3) == (kind != "plain")
    assert cells["bn"]["prediction_error"] < 1e-3
    assert cells["plain"]["prediction_error"] is None
    first = [cells[kind]["singular"][0] for kind in ("bn", "bn large", "plain")]
    np.testing.assert_allclose(first[0], first[1], rtol=2e-3)
    assert np.max(first[2]) < 0.8 * np.max(first[0])
    # The rate over |w|^2 is a sixteenth.
    assert cells["bn large"]["loss"][-1] > cells["bn"]["loss"][-1] + 0.1

    trained = []

    def train(config, cells):
        trained.extend(cell.kind for cell in cells)
        return scale_invariance.train(config, cells)

    lines = path.read_bytes().splitlines(True)
    again = scale_invariance.STUDY._replace(train=train)
    assert study.main(again, config) == 0
    assert (trained, path.read_bytes()) == ([], b"".join(lines))
    assert (tmp_path / PICTURE).read_bytes() == picture
    path.write_bytes(b"".join(lines[:3]) + lines[3][:99])
    assert study.main(again, config) == 0
    assert trained == ["plain"]
    found = [r["result"] for r in results.read(path) if r["kind"] == "cell"]
    assert found == list(cells.values())


def test_a_training_that_fails_is_recorded(tmp_path):
    smoke = dataclasses.replace(
        scale_invariance.Config(out=tmp_path), **scale_invariance.SMOKE
    )
    wild = dataclasses.replace(smoke, rate=3e38, kinds=("plain",))
    (cell,) = scale_invariance.cells(wild)
    result = scale_invariance.run(cell, load("digits"))
    assert result["singular"][-1] == [[None] * 5] * 2
    assert result["loss"][-1] is None


def test_settings_that_do_not_fit(tmp_path, capsys):
    config = scale_invariance.Config(steps=500, measure_every=200, out=tmp_path)
    assert study.main(scale_invariance.STUDY, config) == 1
    assert "received --steps 500 and --measure-every 200" in capsys.readouterr().out
    config = scale_invariance.Config(kinds=("bn", "sn"), out=tmp_path)
    assert study.main(scale_invariance.STUDY, config) == 1
    assert "received --kinds sn: expected bn, bn large," in capsys.readouterr().out


def test_what_is_tuned():
    config = scale_invariance.Config(tune=True, rates=(0.1, 1.0), seeds=(0,))
    found = [(cell.kind, cell.rate) for cell in scale_invariance.cells(config)]
    assert found == [("bn", 0.1), ("bn", 1.0), ("plain", 0.1), ("plain", 1.0)]

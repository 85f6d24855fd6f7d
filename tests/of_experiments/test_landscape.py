"""What is measured around the weights, by closed forms; and the step it is taken of."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, assert_trees_close

from experiments.common.data import splits
from experiments.common.models import layers
from experiments.common.studies import landscape
from experiments.common.training import classifier, descent

pytestmark = pytest.mark.experiment


@pytest.mark.usefixtures("x64")
def test_along_the_gradient_of_a_quadratic():
    """L = w'Aw/2 + b'w: its gradient changes by a |A g|, at every step size a."""
    rng = np.random.default_rng(0)
    root, b, w = rng.normal(size=(7, 7)), *rng.normal(size=(2, 7))
    a = root + root.T

    def loss(params):
        w = jnp.concatenate([params["one"].ravel(), params["two"]["three"]])
        return w @ a @ w / 2 + b @ w

    params = {"one": jnp.asarray(w[:6].reshape(2, 3)), "two": {"three": w[6:]}}
    steps = 0.5, 1.0, 4.0
    line = landscape.along_gradient(jax.value_and_grad(loss), params, steps)
    g, sizes = a @ w + b, np.array(steps)
    start = w @ a @ w / 2 + b @ w
    curved = start - sizes * (g @ g) + sizes**2 / 2 * (g @ a @ g)
    assert_close(line.start, start)
    assert_close(line.losses, curved)
    assert_close(line.changes, sizes * np.linalg.norm(a @ g))
    assert_close(line.distances, sizes * np.linalg.norm(g))
    assert_close(line.smoothness(), np.linalg.norm(a @ g) / np.linalg.norm(g))


@pytest.mark.usefixtures("x64")
def test_smoothness_is_the_worst_along_the_line():
    """L = w^4/4: from w = 1 the gradient, 1, changes most per distance near the end."""
    steps = 0.5, 2.5, 1.0
    find = jax.value_and_grad(lambda w: w**4 / 4)
    line = landscape.along_gradient(find, jnp.float64(1), steps)
    changes = [abs(1 - (1 - a) ** 3) for a in steps]
    assert_close(line.changes, changes)
    assert_close(line.smoothness(), max(c / a for c, a in zip(changes, steps)))


@pytest.mark.usefixtures("x64")
def test_covariate_shift_of_three_matrices():
    """L = |xABC - y|^2/2 by hand: G' has the layers below moved, those above not."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(9, 4)), rng.normal(size=(9, 3))
    shapes = {"a": (4, 5), "b": (5, 6), "c": (6, 3)}
    old, new = ({n: rng.normal(size=s) for n, s in shapes.items()} for _ in range(2))

    def loss(p):
        return ((x @ p["a"] @ p["b"] @ p["c"] - y) ** 2).sum() / 2

    def by_hand(a, b, c):
        e = x @ a @ b @ c - y
        return x.T @ e @ c.T @ b.T, (x @ a).T @ e @ c.T, (x @ a @ b).T @ e

    before = by_hand(old["a"], old["b"], old["c"])
    after = (
        before[0],
        by_hand(new["a"], old["b"], old["c"])[1],
        by_hand(new["a"], new["b"], old["c"])[2],
    )
    shift = landscape.covariate_shift(
        jax.jit(jax.value_and_grad(loss)), old, new, [["a"], ["b"], ["c"]]
    )
    norm = np.linalg.norm
    assert_close(shift.distance, [norm(g - h) for g, h in zip(before, after)])
    assert_close(shift.length, [norm(g) for g in before])
    cosines = [(g * h).sum() / norm(g) / norm(h) for g, h in zip(before, after)]
    assert_close(shift.cosine, cosines)
    assert shift.distance[0] == 0
    assert max(abs(shift.cosine[1:])) < 0.9  # or the angles are not tested

    both = landscape.covariate_shift(
        jax.value_and_grad(loss), old, new, [["a", "b"], ["c"]]
    )
    assert_close(both.distance, [0, norm(before[2] - after[2])])
    assert_close(both.length[0], np.hypot(norm(before[0]), norm(before[1])))


# ---- the layers ----


def noise(x, key, train=True):
    return layers.Noise().apply({}, x, train, rngs={"dropout": jax.random.key(key)})


def test_noise_shifts_and_scales_each_value_and_is_new_each_time():
    x = jnp.zeros((40, 50))
    m, again = np.asarray(noise(x, 0)), np.asarray(noise(x, 0))
    s = np.asarray(noise(x + 1, 0)) - m
    np.testing.assert_array_equal(m, again)
    assert np.ptp(m) == pytest.approx(0.2, abs=0.01)
    assert s.std() == pytest.approx(0.1, abs=0.01)
    shifts = [float(noise(x, key).mean()) for key in range(40)]
    scales = [float((noise(x + 1, key) - noise(x, key)).mean()) for key in range(40)]
    for found, (low, high) in zip((shifts, scales), layers.BOUNDS, strict=True):
        assert low - 0.01 < min(found) < max(found) < high + 0.01
        assert np.ptp(found) > 0.8 * (high - low)
    assert_close(noise(x + 2, 0, train=False), np.full(x.shape, 2.25, np.float32))


NORMALIZERS = ("batch", "whitening", "iternorm", "group", "layer", "weight", "none")


@pytest.fixture
def images():
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (13, 6, 5, 2)).astype(np.uint8)
    return splits.Split(pixels, random.integers(0, 3, 13).astype(np.int32))


def network(name):
    return layers.make_network(name, (4, 8), (2, 1), center=50, spread=9, whitened=4)


@pytest.mark.parametrize("name", NORMALIZERS)
def test_normalizers(images, name):
    """What each does to whom: the scale of weights, other images, and biases."""
    model, x = network(name), images.images
    variables = model.init(jax.random.key(0), x, train=False)

    def apply(params, x):
        changed = {**variables, "params": params}
        return model.apply(changed, x, train=True, mutable=["batch_stats"])[0]

    params = variables["params"]
    biased = name in ("weight", "none")
    for conv in ("Conv_0", "Conv_1"):
        assert ("bias" in params[conv]) == biased
    y = np.asarray(apply(params, x))
    larger = {**params, "Conv_0": {**params["Conv_0"]}}
    larger["Conv_0"]["kernel"] = 3 * params["Conv_0"]["kernel"]
    same = np.allclose(apply(larger, x), y, rtol=1e-3, atol=1e-3)
    assert same == (name != "none")
    alone = np.allclose(apply(params, x[:9]), y[:9], rtol=1e-4, atol=1e-4)
    assert alone == (name in ("group", "layer", "weight", "none"))


def test_weight_normalization_begins_with_the_length_of_hes_weights(images):
    found = {}
    for name in ("weight", "none"):
        variables = network(name).init(jax.random.key(0), images.images, train=False)
        _, state = network(name).apply(
            variables, images.images, train=True, capture_intermediates=True
        )
        found[name] = state["intermediates"]
    scale = variables["params"]["Conv_1"]["kernel"]
    assert float((scale**2).sum((0, 1, 2)).mean()) == pytest.approx(2, rel=0.3)
    key = "WeightNorm_0" if "WeightNorm_0" in found["weight"] else "Conv_0"
    first, plain = found["weight"][key]["__call__"][0], found["none"]["Conv_0"]
    assert float(first.std() / plain["__call__"][0].std()) == pytest.approx(1, abs=0.3)


def test_a_rate_that_is_an_argument_trains_alike(images):
    """As with the same rates inside of the optimizer, and the same noise."""
    name = "noisy batch"
    batches = np.random.default_rng(0).integers(0, 13, (4, 9))
    rates = np.array([0.0, 0.3, 0.1, 0.2], np.float32)
    inside = optax.sgd(lambda step: jnp.asarray(rates)[step], 0.9, nesterov=True)
    expected = list(
        classifier.Classifier(network(name), inside).train(5, images, batches)
    )[-1]
    outside = classifier.Classifier(network(name), optax.sgd(1.0, 0.9, nesterov=True))
    steps = descent.Descent(outside, images)
    state = steps.init(5)
    for batch, rate in zip(batches, rates, strict=True):
        before, (state, loss) = state, steps.step(state, batch, rate)
    assert_trees_close(state.variables, expected[0].variables, tol=1e-5)
    assert_close(loss, np.asarray(expected[1]), tol=1e-5)

    found, gradient = steps.at(before, batches[-1])(before.variables["params"])
    assert_close(found, np.asarray(loss))
    kernels = state.variables["params"]["Conv_1"], before.variables["params"]["Conv_1"]
    moved = np.asarray(kernels[0]["kernel"]) - np.asarray(kernels[1]["kernel"])
    assert (moved * np.asarray(gradient["Conv_1"]["kernel"])).sum() < 0

"""`why_it_works` runs, goes on where it was, and shows what it is about."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from experiments import why_it_works
from experiments.common import convnet, results, study

pytestmark = pytest.mark.experiment

NAME, PICTURE = "why_it_works.jsonl", "why_it_works_digits.png"


def test_smoke_and_again(tmp_path, capsys):
    config = why_it_works.Config(smoke=True, out=tmp_path)
    assert study.main(why_it_works.STUDY, config) == 0
    printed = capsys.readouterr().out
    assert "test accuracy (%) at rate" in printed
    assert "the best rate without BN, BN gains" in printed
    path, picture = tmp_path / NAME, (tmp_path / PICTURE).read_bytes()
    records = results.read(path)
    cells = {r["cell"]["net"]: r["result"] for r in records if r["kind"] == "cell"}
    assert set(cells) == {"plain", "bn"}
    for result in cells.values():
        assert np.isfinite(result["loss"] + result["smoothness"]).all()
        assert np.shape(result["losses"]) == np.shape(result["changes"]) == (2, 2)
        assert np.shape(result["cosine"]) == np.shape(result["shift"]) == (2, 4)
        assert [row[0] for row in result["shift"]] == [0, 0]
        low, high = np.transpose(result["losses"])
        assert (low < high).all()
    # At a large rate, the network with BN learns faster.
    assert cells["bn"]["loss"][-1] < cells["plain"]["loss"][-1] - 0.2

    trained = []

    def train(config, cells):
        trained.extend(cell.net for cell in cells)
        return why_it_works.train(config, cells)

    lines = path.read_bytes().splitlines(True)
    again = why_it_works.STUDY._replace(train=train)
    assert study.main(again, config) == 0
    assert (trained, path.read_bytes()) == ([], b"".join(lines))
    assert (tmp_path / PICTURE).read_bytes() == picture
    path.write_bytes(b"".join(lines[:2]) + lines[2][:99])
    assert study.main(again, config) == 0
    assert trained == ["bn"]
    found = [r["result"] for r in results.read(path) if r["kind"] == "cell"]
    assert found == [cells["plain"], cells["bn"]]


def test_a_training_that_fails_is_recorded_as_far_as_it_went():
    config = dataclasses.replace(
        why_it_works.Config(), **why_it_works.SMOKE | {"rates": (1e38,)}
    )
    cell = why_it_works.cells(config)[0]
    assert cell.net == "plain"
    result = why_it_works.run(cell, convnet.load("digits"))
    assert np.isfinite(result["first"]).all()
    assert result["smoothness"][-1] is None
    assert result["cosine"][-1] == [None] * 4
    assert np.shape(result["loss"]) == (2,)
    assert result["loss"][-1] is None


def made(test, validation, **other):
    """A record with numbers of its own at two measured steps and three layers."""
    return {
        "test": test,
        "validation": validation,
        "loss": [2.0, 1.0],
        "losses": [[1.0, 3.0], [1.0, 5.0]],
        "changes": [[0.0, 1.0], [0.0, 3.0]],
        "smoothness": [4.0, 6.0],
        "shift": [[0.0, 0.5, 0.5], [0.0, 0.7, 0.7]],
        "cosine": [[1.0, 0.2, 0.4], [1.0, 0.2, 0.4]],
        **other,
    }


CONFIG = why_it_works.Config(rates=(0.1, 1.0), seeds=(0, 1))


def found_of(records):
    """By cell, from the records of each network and rate, seed by seed."""
    return {
        cell: records[cell.net, cell.rate][cell.seed]
        for cell in why_it_works.cells(CONFIG)
        if cell.seed < len(records.get((cell.net, cell.rate), ()))
    }


@pytest.fixture
def records():
    """Two seeds of each network: best without BN is 0.1, with it 1."""
    failed = made(0.1, 0.1, smoothness=[4.0, None], losses=[[1.0, 2.0], [None, None]])
    smooth = {"smoothness": [0.5, 0.5], "changes": [[0.0, 0.1], [0.0, 0.3]]}
    smoother = {"smoothness": [1.0, 1.5], "losses": [[0.0, 0.1], [0.0, 0.2]]}
    return {
        ("plain", 0.1): [made(0.5, 0.6), made(0.7, 0.6)],
        ("plain", 1.0): [failed, failed],
        ("bn", 0.1): [made(0.61, 0.5, **smooth), made(0.63, 0.5, **smoother)],
        ("bn", 1.0): [made(0.8, 0.7), made(0.9, 0.9)],
        ("noisy plain", 0.1): [made(0.2, 0.1), made(0.3, 0.1)],
        ("noisy plain", 1.0): [made(0.4, 0.5), made(0.5, 0.5)],
    }


def test_what_is_concluded(records):
    known = why_it_works.by_rate(found_of(records))
    assert why_it_works.shared_rate(known) == 0.1
    table = why_it_works.medians(known)
    columns = [list(column.cells) for column in table.columns]
    assert columns[1] == ["0.1", "0.1", "1", "0.1", "1"]
    medians = [column[0] for column in columns[2:]]
    assert medians == ["3", "2", "5", "0.6", "0.3"]
    assert (
        np.isnan(known.of("plain", 1.0, "smoothness")).tolist() == [[False, True]] * 2
    )
    assert np.isnan(known.of("noise", 1.0, "test")).all()


def test_findings_compare_seed_by_seed(records):
    found = found_of(records)
    findings = why_it_works.findings(CONFIG, found)
    assert (findings.rate, findings.bn_rate) == (0.1, 1.0)
    assert_close(findings.plain, [50, 70])
    # Of two values the interval is 12.706 times half of their difference.
    assert findings.gain == pytest.approx((2, 9 * 12.706), rel=1e-3)  # 11 and -7
    assert findings.gain_at_best == pytest.approx((25, 5 * 12.706), rel=1e-3)
    assert findings.noise_alone == pytest.approx((-15, 5 * 12.706), rel=1e-3)
    # Medians of 3, 2 and 5 without BN; with it 3 and 0.15, 0.2 and 2, 0.5 and 1.25.
    expected = {"range of loss": (1, 20), "change of gradient": (10, 1)}
    for name, ratios in (expected | {"smoothness": (10, 4)}).items():
        mean_and_deviation = np.mean(ratios), np.std(ratios, ddof=1)
        assert findings.ratios[name] == pytest.approx(mean_and_deviation), name
    assert why_it_works.conclusion(findings) == (
        "At 0.1, the best rate without BN, BN gains +2.0 ± 114.4 points over 60.0 %; "
        "at 1, its own best, +25.0 ± 63.5. Without BN over with BN, at 0.1: "
        "range of loss 10.5 ± 13, change of gradient 5.5 ± 6.4, smoothness 7 ± 4.2. "
        "Noise alone at its best rate: -15.0 ± 63.5 points over no BN."
    )


def test_findings_of_what_there_is(records):
    """Only the seeds of which all is known; nothing without one of the networks."""
    records["bn", 0.1].pop()
    assert_close(why_it_works.findings(CONFIG, found_of(records)).plain, [50])
    for net in ("noisy plain", "bn"):
        for rate in CONFIG.rates:
            del records[net, rate]
        if net == "noisy plain":
            assert why_it_works.findings(CONFIG, found_of(records)).noise_alone is None
    assert why_it_works.findings(CONFIG, found_of(records)) is None
    assert why_it_works.conclusion(None) == ""


def test_two_parts_share_the_networks():
    """A part trains every other cell: all of two networks."""
    cells = why_it_works.cells(why_it_works.Config())
    assert len(cells) == len(set(cells)) == 4 * 3 * 3
    assert {cell.depth for cell in cells} == {13}
    parts = [{cell.net for cell in cells[first::2]} for first in (0, 1)]
    assert parts == [{"plain", "noisy bn"}, {"bn", "noisy plain"}]


# ---- around the weights ----


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
    line = why_it_works.along_gradient(jax.value_and_grad(loss), params, steps)
    g, sizes = a @ w + b, np.array(steps)
    start = w @ a @ w / 2 + b @ w
    curved = start - sizes * (g @ g) + sizes**2 / 2 * (g @ a @ g)
    assert_close(line.start, start)
    assert_close(line.losses, curved)
    assert_close(line.changes, sizes * np.linalg.norm(a @ g))
    assert_close(line.smoothness, np.linalg.norm(a @ g) / np.linalg.norm(g))


@pytest.mark.usefixtures("x64")
def test_smoothness_is_the_worst_along_the_line():
    """L = w^4/4: from w = 1 the gradient, 1, changes most per distance near the end."""
    steps = 0.5, 2.5, 1.0
    find = jax.value_and_grad(lambda w: w**4 / 4)
    line = why_it_works.along_gradient(find, jnp.float64(1), steps)
    changes = [abs(1 - (1 - a) ** 3) for a in steps]
    assert_close(line.changes, changes)
    assert_close(line.smoothness, max(c / a for c, a in zip(changes, steps)))


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
    gradient = jax.jit(jax.value_and_grad(loss))
    shift, cosine = why_it_works.covariate_shift(
        gradient, old, new, [["a"], ["b"], ["c"]]
    )
    norm = np.linalg.norm
    assert_close(shift, [norm(g - h) / norm(g) for g, h in zip(before, after)])
    cosines = [(g * h).sum() / norm(g) / norm(h) for g, h in zip(before, after)]
    assert_close(cosine, cosines)
    assert shift[0] == 0
    assert max(abs(cosine[1:])) < 0.9  # or the angles are not tested

    both, cosine = why_it_works.covariate_shift(gradient, old, new, [["a", "b"], ["c"]])
    assert_close(both, [0, norm(before[2] - after[2]) / norm(before[2])])
    assert_close(cosine, [1, cosines[2]])


# ---- the layers ----


BOUNDS = (-0.5, 0.5), (1.0, 1.25)


def noise(x, key, train=True):
    return why_it_works.Noise().apply(
        {}, x, train, rngs={"dropout": jax.random.key(key)}
    )


def test_noise_shifts_and_scales_each_value_and_is_new_each_time():
    x = jnp.zeros((40, 50))
    m, again = np.asarray(noise(x, 0)), np.asarray(noise(x, 0))
    s = np.asarray(noise(x + 1, 0)) - m
    np.testing.assert_array_equal(m, again)
    assert np.ptp(m) == pytest.approx(0.2, abs=0.01)
    assert s.std() == pytest.approx(0.1, abs=0.01)
    shifts = [float(noise(x, key).mean()) for key in range(40)]
    scales = [float((noise(x + 1, key) - noise(x, key)).mean()) for key in range(40)]
    for found, (low, high) in zip((shifts, scales), BOUNDS, strict=True):
        assert low - 0.01 < min(found) < max(found) < high + 0.01
        assert np.ptp(found) > 0.8 * (high - low)
    assert_close(noise(x + 2, 0, train=False), np.full(x.shape, 2.25, np.float32))


def test_what_is_measured_is_of_the_step_that_is_taken():
    """The gradient is that of its loss, with the same noise at each call."""
    model = why_it_works.make_model("digits", "noisy bn", 2)
    random = np.random.default_rng(0)
    images = random.integers(0, 2, (9, 8, 8, 1)).astype(np.uint8)
    labels = random.integers(0, 3, 9).astype(np.int32)
    variables, key = why_it_works.init(model, 3, images[:2])

    def at(noise, params):
        return why_it_works.loss_and_gradient(
            model, variables, images, labels, noise, params
        )

    params = variables["params"]
    loss, slope, updates = at(key, params)
    assert float(at(key, params)[0]) == float(loss)
    assert float(at(jax.random.split(key)[0], params)[0]) != float(loss)
    assert set(updates["batch_stats"]) == {"BatchNorm_0", "BatchNorm_1"}
    ahead, behind = (
        float(at(key, why_it_works.descend(params, slope, size))[0])
        for size in (1e-3, -1e-3)
    )
    squared = sum(float((g**2).sum()) for g in jax.tree.leaves(slope))
    assert (behind - ahead) / 2e-3 == pytest.approx(squared, rel=0.02)

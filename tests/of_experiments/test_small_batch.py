"""`small_batch`: the groups of a batch, what normalizes them, and what is kept."""

import dataclasses
import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import assert_close, assert_trees_close
from jax import lax
from rich.console import Console

from experiments import small_batch
from experiments.common import convnet, results, study
from experiments.common.images import Dataset, Split, draw_batches
from experiments.common.intervals import interval

pytestmark = pytest.mark.experiment

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "experiments" / "results" / "small_batch.jsonl"


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
    assert set(found[0]["result"]) == set(small_batch.EVALUATED)


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


def test_deeper_smoke(tmp_path, capsys):
    config = small_batch.Config(smoke=True, deeper=True, out=tmp_path)
    assert study.main(small_batch.STUDY, config) == 0
    assert "Points of error by pooled statistics" in capture(capsys)
    *_, found, _ = results.read(tmp_path / "small_batch.jsonl")
    assert found["cell"]["widths"] == [16, 16, 32, 32, 64, 64]
    assert found["cell"]["strides"] == [2, 1, 2, 1, 2, 1]
    kinds = small_batch.EVALUATED_DEEPER
    assert set(found["result"]) == {*kinds, *(f"{kind}, halfway" for kind in kinds)}
    assert (tmp_path / "small_batch_deeper_digits.png").stat().st_size > 20_000


def test_small_batches_refuse(tmp_path, capsys):
    config = small_batch.Config(out=tmp_path, sizes=(2, 3))
    assert study.main(small_batch.STUDY, config) == 1
    assert "sizes has [3]: expected divisors of batch_size, 128" in capture(capsys)
    config = small_batch.Config(out=tmp_path, tune=True, deeper=True)
    assert study.main(small_batch.STUDY, config) == 1
    assert "received --deeper and --tune: expected one" in capture(capsys)
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
    config = small_batch.Config(data="digits", batch_size=12, steps=9, momentum=0.75)
    cell = small_batch.make_cell(config, method, size, "mixed", seed=0)
    return dataclasses.replace(cell, **changes)


def fitted(cell, images, batches):
    network = small_batch.Network(cell)
    state = network.init(cell.seed, images.images[:2])
    return small_batch.fit(network, state, images, batches)


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


def test_running_averages(images):
    """Of all groups, of the first alone, and of all with momentum 0.99."""
    cell, batch = make_cell("batch_norm"), np.arange(12).reshape(1, 3, 4)
    cell = dataclasses.replace(cell, evaluated=("running", "slow", "one_group"))
    start = fitted(cell, images, batch[:0])
    state = fitted(cell, images, batch)
    after, slow, one = (
        stats["BatchNorm_0"]
        for stats in (state.batch_stats, *map(state.averages.get, cell.evaluated[1:]))
    )
    pixels = (images.images[:12].astype(np.float32) - 50) / 9
    y = lax.conv_general_dilated(
        *(pixels, start.params["Conv_0"]["kernel"], (2, 2), "SAME"),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    groups = np.asarray(y, np.float64).reshape(3, -1, 4)
    assert_close(after["mean"], np.float32(0.25 * groups.mean((0, 1))))
    assert_close(after["var"], np.float32(0.75 + 0.25 * groups.var(1).mean(0)))
    assert_close(one["mean"], np.float32(0.25 * groups[0].mean(0)))
    assert_close(one["var"], np.float32(0.75 + 0.25 * groups[0].var(0)))
    assert_close(slow["mean"], np.float32(0.01 * groups.mean((0, 1))), tol=1e-5)
    assert_close(slow["var"], np.float32(0.99 + 0.01 * groups.var(1).mean(0)))


def test_averages_beside_follow_every_step_and_change_no_training(images):
    """With the training's own momentum and all groups they are its statistics."""
    batches = np.arange(12).reshape(1, 3, 4).repeat(3, 0)
    cell = make_cell("batch_norm", rate=0.5)
    beside = {"slow": (cell.momentum, slice(None))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_batch, "AVERAGES", beside)
        with_slow = dataclasses.replace(cell, evaluated=("running", "slow"))
        found = fitted(with_slow, images, batches)
    assert_trees_close(found.averages["slow"], found.batch_stats)
    alone = fitted(dataclasses.replace(cell, evaluated=("running",)), images, batches)
    assert alone.averages == {}
    assert_trees_close(alone.variables, found.variables)


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
    cell = make_cell("batch_norm", steps=5, rate=0.5)
    network = small_batch.Network(cell)
    before = fitted(cell, images, batch.repeat(4, 0))
    after = small_batch.fit(network, before, images, batch, train=False)
    assert_trees_close(after.batch_stats, before.batch_stats)
    assert_trees_close(after.averages, before.averages)
    moved = after.params["Conv_0"]["kernel"] - before.params["Conv_0"]["kernel"]
    assert abs(moved).max() > 1e-3


@pytest.mark.parametrize("halfway", [False, True])
def test_what_is_trained_and_when_it_is_evaluated(images, monkeypatch, halfway):
    """Ten steps, two of which are repeated frozen; each state by its own statistics."""
    trained = []

    def fit(network, state, data, batches, train=True):
        trained.append((len(batches), train))
        return state.replace(step=state.step + len(batches), batch_stats=train)

    def errors_of(cell, network, state, data, drawn, groups):
        return {"running": int(state.step) / 100}

    def accuracy(model, variables, data):
        assert variables["batch_stats"] is False
        return 0.75

    monkeypatch.setattr(small_batch, "fit", fit)
    monkeypatch.setattr(small_batch, "errors_of", errors_of)
    monkeypatch.setattr(convnet, "accuracy", accuracy)
    cell = make_cell("batch_norm", steps=10, halfway=halfway)
    data = Dataset(images, images, images)
    found = small_batch.evaluate(cell, small_batch.Network(cell), data)
    assert trained == [(5, True), (3, True), (2, False), (2, True)]
    expected = {"frozen": 0.25, "running": 0.1}
    expected |= {"running, halfway": 0.05} if halfway else {}
    assert found == expected


def test_errors_by_pooled_statistics(images):
    """Those of one batch are what that batch was normalized with."""
    cell = make_cell("batch_norm", 12)
    network = small_batch.Network(cell)
    state = network.init(0, images.images[:2])
    data = Dataset(images, images, Split(images.images[:12], images.labels[:12]))
    batch = np.arange(12)[None]
    found = small_batch.errors_of(cell, network, state, data, batch, batch[:, None])
    assert set(found) == {*small_batch.EVALUATED} - {"frozen"}
    assert found["pooled"] == found["pooled_groups"] == found["batch"]
    assert found["running"] == found["one_group"]


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


@pytest.mark.parametrize(
    ("changed", "count"), [({}, 48), ({"deeper": True}, 30)], ids=["main", "deeper"]
)
def test_two_processes_share_the_cells(changed, count):
    """Each training once; equally many and no network in both parts."""
    every = small_batch.cells(small_batch.Config(**changed))
    assert len(every) == len(set(every)) == count
    parts = [small_batch.by_network(every[i::2]) for i in range(2)]
    first, second = (
        {(c.method, c.size, c.steps, c.widths) for cells in part for c in cells}
        for part in parts
    )
    assert not first & second
    assert [sum(map(len, part)) for part in parts] == [count / 2] * 2
    assert len(first) == len(second) == 5


def test_each_training_is_listed_once_per_seed():
    every = small_batch.cells(small_batch.Config(seeds=(7,)))
    of = {}
    for cell in every:
        of.setdefault(cell.method, []).append((cell.size, cell.order))
    small = [(s, o) for s in (2, 8, 32) for o in small_batch.ORDERS]
    assert {method: sorted(places) for method, places in of.items()} == {
        "batch_norm": sorted([*small, (128, "mixed")]),
        "renorm": sorted([*small, (128, "mixed")]),
        "cross_replica": [(2, "mixed")],
        "group_norm": [(128, "mixed")],
    }
    (network,) = small_batch.by_network(
        small_batch.make_cell(small_batch.Config(), "renorm", 2, order, seed)
        for order in small_batch.ORDERS
        for seed in (0, 1, 1)
    )
    assert len(network) == 4


BASE = np.array([0.30, 0.31, 0.32])  # of batch norm in 128, by seed
COSTS = {  # added in groups of 2, iid
    "running": np.array([0.10, 0.11, 0.12]),
    "one_group": np.array([0.20, 0.20, 0.23]),
    "pooled": np.array([0.05, 0.05, 0.05]),
}


def made_up(config):
    """Records of batch norm; groups by class cost nothing in the mean."""
    found = {}
    for cell in small_batch.cells(config):
        if cell.method == "batch_norm":
            noise = (-0.02, 0.0, 0.02)[cell.seed] * (cell.order == "by class")
            small = cell.size == 2 and cell.order == "mixed"
            found[cell] = {
                kind: BASE[cell.seed] + noise + small * cost[cell.seed]
                for kind, cost in COSTS.items()
            }
    return found


def test_findings():
    config = small_batch.Config(sizes=(2, 128))
    found = made_up(config)
    known = small_batch.findings(config, found)
    bn, pooled = "BN, running average", "BN, pooled, groups of 128"
    one = "BN, average of one group"
    assert {name for name, _, _ in known} == {bn, pooled, one}
    of_bn = known[bn, "mixed", 2]
    assert of_bn.cost == pytest.approx(interval(np.array([10, 11, 12])))
    assert of_bn.cost.half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert (of_bn.change.mean, of_bn.closed) == (0, 0)
    cost, change, closed = known[pooled, "mixed", 2]
    assert cost == pytest.approx((5, 0), abs=1e-9)
    assert change == pytest.approx(interval(np.array([-5, -6, -7])))
    assert closed == pytest.approx(6 / 11)
    against_one = small_batch.findings(config, found, one)[pooled, "mixed", 2]
    assert against_one.change == pytest.approx(interval(np.array([-15, -15, -18])))
    assert against_one.closed == pytest.approx(16 / 21)
    assert np.isnan(known[pooled, "by class", 2].closed)  # there is no gap to close
    assert known[bn, "by class", 128].cost == (0, 0)


def test_findings_are_of_all_seeds(capsys):
    config = small_batch.Config(sizes=(2, 128))
    found = made_up(config)
    console = Console(width=120)
    console.print(*small_batch.report(config, found))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "| BN, running average | 42.0 ± 2.0 | 31.0 ± 1.0 |" in lines
    assert "| BN, running average | +11.0 ± 2.5 | +0.0 ± 0.0 |" in lines
    lost = small_batch.make_cell(config, "batch_norm", 2, "mixed", 1)
    known = small_batch.findings(config, {c: e for c, e in found.items() if c != lost})
    bn = "BN, running average"
    assert (bn, "mixed", 2) not in known
    assert (bn, "by class", 2) in known
    without = dataclasses.replace(config, sizes=(2,))
    assert small_batch.findings(without, found) == {}


def test_findings_of_deeper_networks(tmp_path):
    networks = tuple(itertools.product((1, 2, 3), (400, 800)))
    config = small_batch.Config(deeper=True, deeper_sizes=(2,), networks=networks)
    found = {}
    for cell in small_batch.cells(config):
        if len(cell.widths) == 18 and cell.steps == 800 and cell.seed == 2:
            continue
        depth, late = len(cell.widths) / 100, cell.steps / 10_000
        end = {"pooled": 0.3, "running": 0.3 + depth + 0.01 * cell.seed}
        end |= {"slow": 0.3 - late, "one_group": 0.4, "pooled_groups": 0.3}
        halfway = {f"{kind}, halfway": 2 * error for kind, error in end.items()}
        found[cell] = end | halfway
    known = small_batch.findings_deeper(config, found)
    assert {(stop.convolutions, stop.steps) for stop in known} == {
        *((6, 400), (6, 800), (12, 400), (12, 800), (18, 400))
    }
    of_end, of_half = (known[12, 800, 2, when] for when in ("end", "halfway"))
    assert of_end["running"] == pytest.approx(interval(np.array([-12, -13, -14])))
    assert of_half["running"] == pytest.approx(interval(np.array([-24, -26, -28])))
    assert of_end["slow"] == pytest.approx((8, 0), abs=1e-9)
    assert of_end["pooled_groups"].mean == 0
    (path,) = small_batch.draw(config, found, tmp_path)
    assert path.name == "small_batch_deeper_cifar10.png"
    console = Console(width=120)
    with console.capture() as capture:
        console.print(*small_batch.report(config, found))
    lines = [" ".join(line.split()) for line in capture.get().splitlines()]
    expected = "| 12 | 800 | 2 | end | -13.0 ± 2.5 | +8.0 ± 0.0 | -10.0 ± 0.0 | "
    assert expected + "+0.0 ± 0.0 |" in lines


@pytest.mark.parametrize(
    ("changed", "count"), [({}, 48), ({"deeper": True}, 30)], ids=["main", "deeper"]
)
def test_committed_records_are_of_these_cells(changed, count):
    config = small_batch.Config(**changed)
    found = study.load(small_batch.STUDY, config, RESULTS)
    assert len(found) == len(small_batch.cells(config)) == count
    assert small_batch.report(config, found)

"""Every experiment imports and runs; its data are verified and its results last."""

import functools
import gzip
import hashlib
import http.server
import importlib
import os
import pkgutil
import struct
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import optax
import pooch
import pytest
from helpers import assert_close, assert_trees_close
from jax import lax

import experiments
from experiments import small_batch
from experiments.common import results, study
from experiments.common.data import batches, idx, splits
from experiments.common.models import norms
from experiments.common.training import virtual

pytestmark = pytest.mark.experiment

REPOSITORY = Path(__file__).parents[2]
MODULES = [
    module.name
    for module in pkgutil.walk_packages(experiments.__path__, "experiments.")
]


def png_size(path: Path) -> list[int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return list(struct.unpack(">II", header[16:]))


def idx_gz(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(header + array.tobytes())


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Twelve training and five test images of 4x3 pixels, as data set "mnist"."""
    random = np.random.default_rng(0)
    contents = []
    for count in (12, 5):
        contents.append(idx_gz(random.integers(0, 256, (count, 4, 3), np.uint8)))
        contents.append(idx_gz(random.integers(0, 10, count, np.uint8)))
    folder = tmp_path / "mnist"
    folder.mkdir()
    for file, content in zip(idx.FILES, contents, strict=True):
        (folder / file).write_bytes(content)
    checksums = tuple(hashlib.sha256(content).hexdigest() for content in contents)
    source = idx.Source("http://localhost:9/nothing/", checksums)
    monkeypatch.setitem(idx.SOURCES, "mnist", source)
    monkeypatch.delenv(idx.VARIABLE, raising=False)
    return folder


@pytest.mark.parametrize("name", MODULES)
def test_imports(name):
    assert importlib.import_module(name).__name__ == name


def test_all_modules_are_found():
    found = {name.replace(".", "/") + ".py" for name in MODULES}
    files = (REPOSITORY / "experiments").rglob("[!_]*.py")
    assert {str(path.relative_to(REPOSITORY)) for path in files} <= found


@pytest.mark.parametrize("given", [False, True])
def test_a_smoke_run_keeps_nothing_unless_told_where(tmp_path, given):
    seen = []

    def work(config):
        seen.append(config)
        assert config.out.is_dir()
        (config.out / "file").touch()
        return 7

    out = tmp_path if given else study.RUNS
    config = small_batch.Config(smoke=True, out=out, record=True)
    assert study.start(work, {"steps": 3}, config) == 7
    (used,) = seen
    assert (used.smoke, used.steps, used.record) == (False, 3, False)
    assert used.out.exists() == given
    study.start(seen.append, {"steps": 3}, small_batch.Config(steps=9))
    assert (seen[1].steps, seen[1].out) == (9, study.RUNS)


def test_records_survive_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"kind": "run"}\n{"kind": "measu')
    with results.Log(path) as log:
        log.add("run", value=float("nan"), array=np.array([1.5, np.inf]))
    first, second = results.read(path)
    assert first == {"kind": "run"}
    assert (second["value"], second["array"]) == (None, [1.5, None])
    assert second["run"] == log.run


def test_digits_are_binary_and_split():
    digits = splits.load("digits")
    assert [len(split.labels) for split in digits] == [1097, 300, 400]
    for images, labels in digits:
        assert set(np.unique(images)) == {0, 1}
        assert images.shape == (len(labels), 64)
        assert set(labels) == set(range(10))


@pytest.mark.parametrize("where", ["folder", "parent", "variable"])
def test_idx_files_become_splits(tiny, monkeypatch, where):
    if where == "variable":
        monkeypatch.setenv(idx.VARIABLE, str(tiny.parent))
    folder = {"folder": tiny, "parent": tiny.parent, "variable": None}[where]
    loaded = splits.load("mnist", folder)
    assert [split.images.shape for split in loaded] == [(10, 12), (2, 12), (5, 12)]
    images = idx.read(tiny / idx.FILES[0])
    labels = idx.read(tiny / idx.FILES[1])
    assert images.shape == (12, 4, 3)
    binary = images.reshape(12, 12) >= images.max() / 2
    np.testing.assert_array_equal(loaded.train.images, binary[:10])
    np.testing.assert_array_equal(loaded.validation.labels, labels[10:])


def test_missing_files(tiny):
    (tiny / idx.FILES[3]).unlink()
    with pytest.raises(idx.DataError, match=f"mnist lacks {idx.FILES[3]}: expected"):
        splits.load("mnist", tiny)
    with pytest.raises(idx.DataError, match=r"lacks .*leave out --data-dir"):
        splits.load("mnist", tiny / "nowhere")


def test_wrong_checksum(tiny):
    path = tiny / idx.FILES[0]
    path.write_bytes(idx_gz(np.zeros((12, 4, 3), np.uint8)))
    received = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(idx.DataError, match=f"sha256 {received}: expected ") as error:
        splits.load("mnist", tiny)
    assert "{" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"plain text", "cannot be read .*whole gzip file"),
        (
            idx_gz(np.zeros((9, 4, 3), np.uint8))[:-9],
            "cannot be read .*whole gzip file",
        ),
        (gzip.compress(b"\0\0\x08\x03\0\0"), "holds 6 bytes that begin with 00000803"),
        (gzip.compress(b""), "holds 0 bytes"),
        (gzip.compress(b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0"), "begin with 00000d01"),
        (gzip.compress(b"\0\0\x08\x01\0\0\0\x05\1\2\3"), "holds 11 bytes"),
    ],
    ids=["text", "cut gzip", "cut header", "empty", "another type", "cut values"],
)
def test_corrupt_idx(tmp_path, content, message):
    path = tmp_path / "file.gz"
    path.write_bytes(content)
    with pytest.raises(idx.DataError, match=message):
        idx.read(path)


@pytest.fixture
def server(tiny, monkeypatch, tmp_path):
    """Serves the tiny files, and gives the empty cache that they are fetched to."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tiny))

        def log_message(self, *arguments):
            pass

    cache = tmp_path / "cache"
    monkeypatch.setattr(pooch, "os_cache", lambda name: cache)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{httpd.server_port}/"
        source = idx.SOURCES["mnist"]._replace(url=url)
        monkeypatch.setitem(idx.SOURCES, "mnist", source)
        yield cache
        httpd.shutdown()


def test_download(server):
    assert splits.load("mnist").test.images.shape == (5, 12)
    assert sorted(p.name for p in (server / "mnist").iterdir()) == sorted(idx.FILES)


def test_download_of_something_else_leaves_nothing(server, tiny):
    (tiny / idx.FILES[0]).write_bytes(b"a page that says sorry")
    with pytest.raises(idx.DataError, match=r"could not be downloaded .*--data digits"):
        splits.load("mnist")
    assert [p for p in server.rglob("*") if p.is_file()] == []


def test_no_network(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / "cache")
    monkeypatch.setenv("NO_PROXY", "localhost")
    with pytest.raises(idx.DataError, match="mnist could not be downloaded"):
        splits.load("mnist")


# ---- small and non-iid batches ----


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
    for method in ("make_network", "load_images"):
        monkeypatch.setattr(small_batch, method, lambda *_: object())
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


def test_batches_split_by_class():
    labels = np.random.default_rng(0).integers(0, 3, 50)
    drawn = batches.draw(0, 50, 7, 12)
    assert drawn.shape == (7, 12)
    assert len(np.unique(drawn[:4])) == 48  # an epoch repeats none
    by_class = batches.split(drawn, labels, 4, "by class")
    mixed = batches.split(drawn, labels, 4, "mixed")
    np.testing.assert_array_equal(mixed.reshape(7, 12), drawn)
    for batch, group in zip(drawn, by_class, strict=True):
        assert sorted(group.ravel()) == sorted(batch)
        assert (np.diff(labels[group].ravel()) >= 0).all()
    every = batches.split(batches.cover(50, 12), labels, 4, "by class")
    assert every.shape == (5, 3, 4)
    assert sorted(every[every < 50]) == list(range(50))
    assert (np.diff(labels[every % 50].reshape(5, 12)) >= 0).all()


@pytest.fixture
def images():
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (13, 5, 4, 2)).astype(np.uint8)
    return splits.Split(pixels, random.integers(0, 3, 13).astype(np.int32))


def network(method: str, size: int) -> virtual.Network:
    model = norms.ConvNet((4, 8), (2, 1), norms.make_norm(method, size, 9, 0.75), 50, 9)
    return virtual.Network(model, optax.sgd(0.5))


def test_each_image_is_counted_once(images):
    net = network("group_norm", 4)
    variables = net.train(0, images, np.zeros((0, 1, 8), int))
    guess = net.model.apply(variables, images.images, train=False).argmax(-1)
    expected = (guess != images.labels).mean()
    for order in ("mixed", "by class"):
        every = batches.split(batches.cover(13, 8), images.labels, 4, order)
        assert net.error(variables, images, every, train=False) == expected


def test_running_statistics_are_averaged_over_the_groups(images):
    net, batch = network("batch_norm", 4), np.arange(12).reshape(1, 3, 4)
    start = net.train(0, images, batch[:0])
    after = net.train(0, images, batch)["batch_stats"]["BatchNorm_0"]
    kernel = start["params"]["Conv_0"]["kernel"]
    pixels = (images.images[:12].astype(np.float32) - 50) / 9
    y = lax.conv_general_dilated(
        pixels, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    groups = np.asarray(y, np.float64).reshape(3, -1, 4)
    assert_close(after["mean"], np.float32(0.25 * groups.mean((0, 1))))
    assert_close(after["var"], np.float32(0.75 + 0.25 * groups.var(1).mean(0)))


def test_cross_replica_groups_are_one(images):
    batch = np.arange(12).reshape(1, 3, 4)
    groups = network("cross_replica", 4).train(0, images, batch)
    whole = network("batch_norm", 12).train(0, images, batch.reshape(1, 1, 12))
    assert_trees_close(groups, whole, tol=1e-5)  # another order of sums


def test_frozen_steps_leave_the_statistics(images):
    net, batch = network("frozen", 4), np.arange(12).reshape(1, 3, 4)
    before = net.train(0, images, batch)
    after = net.train(0, images, np.repeat(batch, 3, 0), frozen=2)
    assert_trees_close(after["batch_stats"], before["batch_stats"])
    moved = after["params"]["Conv_0"]["kernel"] - before["params"]["Conv_0"]["kernel"]
    assert abs(moved).max() > 1e-3


@pytest.mark.parametrize("method", norms.METHODS)
def test_every_normalization_can_be_trained(images, method):
    net = network(method, 4)
    groups = (1, 12) if method in norms.ONE_CALL else (3, 4)
    batch = np.arange(12).reshape(1, *groups)
    variables = jax.eval_shape(functools.partial(net.train, 0, images, batch))
    assert variables["params"]["Conv_1"]["kernel"].shape == (3, 3, 4, 8)
    kinds = {"group_norm": "GroupNorm_1", "layer_norm": "GroupNorm_1"}
    kinds |= {"ghost": "GhostBatchNorm_1", "renorm": "BatchRenorm_1"}
    kinds["decorrelated"] = "DecorrelatedBatchNorm_1"
    layer = variables["params"][kinds.get(method, "BatchNorm_1")]
    assert layer["scale"].shape == (8,)

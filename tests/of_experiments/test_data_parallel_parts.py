"""The parts of data-parallel training, each alone: input, checkpoints, settings."""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pooch
import pytest
import tyro
from rich.console import Console

from experiments import data_parallel
from experiments.common import results
from experiments.common.data import cifar, idx, pipeline
from experiments.common.studies import curves
from experiments.common.training import commands, guard, replicas, report, roll
from experiments.common.training.checkpoints import CheckpointError, Checkpoints
from experiments.data_parallel import Config

pytestmark = pytest.mark.experiment

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def tiny():
    """Thirty images of 5x4 pixels and 3 colours, of which the first tells the label."""
    random = np.random.default_rng(0)
    images = random.integers(1, 256, (30, 5, 4, 3), np.uint8)
    batch = pipeline.Batch(images, np.arange(30, dtype=np.int32))
    return pipeline.ImageData(batch, batch, padding=2, flip=True)


def batches(data, processes, steps, seed=0, size=12):
    """The batches of all steps, each put together from the shares of all processes."""
    shares = [
        pipeline.training(data, seed, size, process, processes)
        for process in range(processes)
    ]
    return [
        jax.tree.map(lambda *x: np.concatenate(x), *(share[step] for share in shares))
        for step in steps
    ]


def assert_equal(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(one.labels, other.labels)
        np.testing.assert_array_equal(one.images, other.images)


@pytest.mark.parametrize("processes", [2, 3, 12])
def test_batches_do_not_depend_on_the_number_of_processes(tiny, processes):
    assert_equal(batches(tiny, processes, range(6)), batches(tiny, 1, range(6)))


def test_every_epoch_has_every_example_in_another_order(tiny):
    labels = np.concatenate([b.labels for b in batches(tiny, 2, range(10))])
    epochs = labels.reshape(4, 30)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(30))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_seeds_give_other_orders(tiny):
    first, second = (batches(tiny, 1, [0], seed)[0].labels for seed in (0, 1))
    assert first.tolist() != second.tolist()


def test_the_stream_begins_at_any_step(tiny):
    share = pipeline.training(tiny, 0, 12, 1, 3)
    stream = pipeline.from_step(share, 4)
    assert_equal([next(stream) for _ in range(3)], [share[k] for k in (4, 5, 6)])


def test_images_are_cropped_and_mirrored(tiny):
    """Each is a window of its padded original, or of the mirrored window."""
    windows, mirrored = set(), 0
    padded = np.pad(tiny.train.images, [(0, 0), (2, 2), (2, 2), (0, 0)])
    for batch in batches(tiny, 1, range(25)):
        for image, label in zip(batch.images, batch.labels, strict=True):
            found = [
                (top, left, flip)
                for top in range(5)
                for left in range(5)
                for flip in (False, True)
                if (
                    padded[label, top : top + 5, left : left + 4][:, :: 1 - 2 * flip]
                ).tobytes()
                == image.tobytes()
            ]
            assert found
            windows |= {f[:2] for f in found}
            mirrored += found[0][2]
    assert len(windows) == 25
    assert 100 < mirrored < 200


def test_test_batches_hold_each_image_once(tiny):
    labels = [b.labels for p in range(3) for b in pipeline.testing(tiny, 12, p, 3)]
    assert {len(part) for part in labels} == {4}
    found = np.concatenate(labels)
    np.testing.assert_array_equal(np.sort(found), [-1] * 6 + list(range(30)))


@pytest.fixture
def files(tmp_path, monkeypatch):
    """CIFAR-10 with four images a file."""
    folder = tmp_path / "data" / cifar.FOLDER
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in cifar.MD5:
        record = random.integers(0, 256, (4, 3073), np.uint8)
        record[:, 0] = random.permutation(10)[:4]
        (folder / name).write_bytes(record.tobytes())
        md5 = hashlib.md5((folder / name).read_bytes()).hexdigest()
        monkeypatch.setitem(cifar.MD5, name, md5)
    monkeypatch.delenv(idx.VARIABLE, raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / "cache")
    return folder


@pytest.mark.parametrize("where", ["folder", "parent", "variable", "archive"])
def test_cifar(files, monkeypatch, tmp_path, where):
    if where == "variable":
        monkeypatch.setenv(idx.VARIABLE, str(files.parent))
    if where == "archive":
        cache = tmp_path / "cache" / "cifar10"
        cache.mkdir(parents=True)
        path = cache / "archive.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            archive.add(files, cifar.FOLDER)
        monkeypatch.setattr(cifar, "ARCHIVE_MD5", pooch.file_hash(str(path), "md5"))
        monkeypatch.setattr(cifar, "URL", "http://localhost:9/archive.tar.gz")
        path.rename(cache / pooch.utils.unique_file_name(cifar.URL))
    folder = {"folder": files, "parent": files.parent}.get(where)
    images, labels, test_images, test_labels = cifar.load(folder)
    assert (images.shape, test_images.shape) == ((20, 32, 32, 3), (4, 32, 32, 3))
    content = (files / "data_batch_2.bin").read_bytes()
    record = content[3073 : 2 * 3073]
    assert labels[5] == record[0]
    for row, column, colour in ((0, 0, 0), (3, 7, 1), (31, 30, 2)):
        value = record[1 + colour * 1024 + row * 32 + column]
        assert images[5, row, column, colour] == value
    assert test_labels.tolist() == list((files / "test_batch.bin").read_bytes()[::3073])


def test_cifar_lacks_files(files):
    (files / "data_batch_3.bin").unlink()
    with pytest.raises(idx.DataError, match=r"lacks data_batch_3.bin: expected the"):
        cifar.load(files)


def test_cifar_is_altered(files):
    path = files / "test_batch.bin"
    path.write_bytes(bytes(path.stat().st_size))
    received = pooch.file_hash(str(path), "md5")
    with pytest.raises(idx.DataError, match=f"MD5 {received}: expected ") as error:
        cifar.load(files)
    assert "{" not in str(error.value)


def test_cifar_cannot_be_downloaded(files, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cifar, "URL", "http://localhost:9/cifar.tar.gz")
    monkeypatch.setenv("NO_PROXY", "localhost")
    assert data_parallel.main(Config(data="cifar10", out=tmp_path / "out")) == 1
    assert "could not be downloaded from http://localhost:9" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", [b"", bytes(3072), bytes(3074), b"\x0a" + bytes(3072)]
)
def test_cifar_is_something_else(content):
    with pytest.raises(idx.DataError, match=f"x.bin holds {len(content)} bytes: expec"):
        cifar.decode("x.bin", content)


@pytest.fixture
def state():
    return {
        "kernel": np.arange(3000, dtype="f4"),
        "bias": np.ones((3, 4), "f4"),
        "count": np.array(7),
    }


def opened(folder: Path, **settings: object) -> Checkpoints:
    def digest(state):
        leaves = map(np.asarray, jax.tree.leaves(state))
        return hashlib.sha256(b"".join(x.tobytes() for x in leaves)).hexdigest()

    return Checkpoints(folder, {"width": 4, "seed": 0, **settings}, digest, keep=2)


@pytest.fixture
def three(tmp_path, state):
    """A folder after checkpoints at steps 5, 10 and 15, of which two are kept."""
    saved = opened(tmp_path / "checkpoints")
    for step in (5, 10, 15):
        saved.save(step, {**state, "count": np.array(step)}, step * 60)
    saved.close()
    return tmp_path / "checkpoints"


def test_newest_checkpoint_is_restored(three, state):
    assert sorted(path.name for path in three.iterdir()) == ["10", "15"]
    restored, examples = opened(three).begin(state, resume=True)
    assert examples == 900
    assert restored["count"] == 15
    np.testing.assert_array_equal(restored["kernel"], state["kernel"])


def test_no_checkpoint_is_the_beginning(tmp_path, state):
    assert opened(tmp_path).begin(state, resume=True) == (state, 0)


def test_checkpoints_are_not_overwritten(three, state):
    with pytest.raises(CheckpointError, match=r"up to step 15: expected none\. Write"):
        opened(three).begin(state, resume=False)


def test_other_settings(three, state):
    message = r"other settings: seed: received 1, expected 0\. Give the same"
    with pytest.raises(CheckpointError, match=message):
        opened(three, seed=1).begin(state, resume=True)


def test_half_written_checkpoint_is_cleared_away(three, state):
    half = three / "20.orbax-checkpoint-tmp-17"
    shutil.copytree(three / "15", half)
    (half / "commit_success.txt").unlink()
    saved = opened(three)
    assert saved.newest() == 15
    assert saved.begin(state, resume=True)[1] == 900
    saved.save(20, state, 1200)
    saved.close()
    assert sorted(path.name for path in three.iterdir()) == ["15", "20"]


def data_file(folder: Path) -> Path:
    """The largest: it holds the values."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "removed": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "one bit": flip,
    "record": lambda path: flip(path.parents[3] / "about" / "metadata"),
    "everything": lambda path: shutil.rmtree(path.parents[2]),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint(three, state, damage):
    path = data_file(three / "15")
    assert path.parents[2] == three / "15" / "state"
    DAMAGE[damage](path)
    with pytest.raises(CheckpointError) as error:
        opened(three).begin(state, resume=True)
    assert f"the checkpoint {three / '15'} cannot be read (" in str(error.value)
    assert "Remove that folder, and the same command goes on from that of step 10" in (
        str(error.value)
    )
    shutil.rmtree(three / "15")
    assert opened(three).begin(state, resume=True)[0]["count"] == 10


def said(capsys, **settings: object) -> str:
    """What is printed for wrong settings."""
    assert data_parallel.main(Config(**settings)) == 1
    return " ".join(capsys.readouterr().out.split())


def test_folder_that_cannot_be_written_to(tmp_path, capsys):
    (tmp_path / "file").touch()
    text = said(capsys, out=tmp_path / "file" / "out")
    assert f"error: {tmp_path / 'file' / 'out'} cannot be written to (" in text
    assert "Name another by --out." in text


def test_settings_that_do_not_fit(tmp_path, capsys):
    text = said(capsys, out=tmp_path, batch_size=30)
    assert "received --batch-size 30: expected a multiple of the 8 devices." in text
    text = said(capsys, out=tmp_path, epochs=2)
    assert "received --warmup-epochs 2.0: expected less than the 2 of --epochs." in text
    text = said(capsys, out=tmp_path, num_processes=2)
    assert "received --coordinator None, --num-processes 2, --process-id None: " in text


def test_commands_give_the_settings_back(tmp_path):
    config = Config(
        out=tmp_path / "a folder", resume=True, width=8, timeout=2.5, dtype="bfloat16"
    )
    assert tyro.cli(Config, args=commands.command("m", config)[2:]) == config
    assert commands.command("m", Config()) == ["-m", "m"]


def test_advice_of_a_launched_process_is_the_launchers(tmp_path):
    config = Config(out=tmp_path, local_processes=2)
    worker = dataclasses.replace(
        config, coordinator="a:1", num_processes=2, process_id=1
    )
    launcher, same = (commands.advice("m", c, tmp_path) for c in (config, worker))
    assert launcher == same
    assert f"  python -m m --out {tmp_path} --resume --local-processes 2" in same


HANG = """
import time
from pathlib import Path
from experiments.common.training.guard import Guard
with Guard(Path("notes"), active=True, timeout={timeout}, advice="advice") as guard:
    guard.join(1, 2)
    guard.enter("a phase")
    {action}
"""


def guarded(folder: Path, action: str, timeout: float = 60):
    code = HANG.format(action=action, timeout=timeout)
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_guard_ends_what_hangs_in_python(tmp_path):
    done = guarded(tmp_path, "time.sleep(60)", timeout=0.5)
    assert done.returncode == guard.FAILED
    lines = done.stderr.splitlines()
    assert "error: process 1 of 2 gives up: no progress for 0.5 s in a phase" in lines
    assert lines[-1] == "advice"
    note = json.loads((tmp_path / "notes" / "1.json").read_text())
    assert note["ended"]


def test_guard_reports_errors(tmp_path):
    done = guarded(tmp_path, "raise OSError('no cake')")
    assert done.returncode == guard.FAILED
    assert "process 1 of 2 gives up: OSError in a phase: no cake\n" in done.stderr
    assert "Traceback" in done.stderr
    assert "  process 0 has not been heard of: it did not start" in done.stderr


def test_guard_is_silent_if_all_goes_well(tmp_path):
    done = guarded(tmp_path, "pass")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    """In the silent processes too: all decide alike."""
    for speaks in (True, False):
        path, console = tmp_path / f"{speaks}.jsonl", Console(quiet=True)
        with report.Report(path, 3, console, speaks=speaks) as told:
            told.step(1, {"loss": jnp.float32(1)}, record=True)
            with pytest.raises(report.Diverged, match="the loss is nan at step 2: exp"):
                told.step(2, {"loss": jnp.float32(np.nan)}, record=True)
    (record,) = results.read(tmp_path / "True.jsonl")
    assert (record["step"], record["loss"]) == (1, 1)
    assert not (tmp_path / "False.jsonl").exists()


def test_many_processes_write_and_read_little(tmp_path):
    assert [roll.Roll(tmp_path, 0, n).period for n in (2, 64, 128, 4096)] == [
        *(1, 1, 2, 10),
    ]
    (line,) = roll.Roll(tmp_path, 16, 4096).others()
    assert line == "processes 0 to 15 tell how the others are"


def test_steps_that_a_restart_repeats_are_superseded():
    def step(number, loss):
        return {"kind": "step", "step": number, "loss": loss}

    records = [
        {"kind": "run", "from_step": 0},
        *(step(n, 0) for n in (1, 2, 3, 4)),
        {"kind": "run", "from_step": 2},
        {"kind": "test", "step": 3},
        step(3, 1),
    ]
    curve = curves.by_step(records, "step")
    assert {n: record["loss"] for n, record in curve.items()} == {1: 0, 2: 0, 3: 1}


def test_records_hold_every_digit(tmp_path):
    value = float(np.float32(1) / 3)
    with results.Log(tmp_path / "exact", digits=None) as log:
        log.add("step", loss=value)
    assert results.read(tmp_path / "exact")[0]["loss"] == value
    with results.Log(tmp_path / "rounded") as log:
        log.add("step", loss=value)
    assert results.read(tmp_path / "rounded")[0]["loss"] == 0.333333


@pytest.fixture
def fewer_optimizations():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.usefixtures("fewer_optimizations")
def test_cifar_trains_in_bfloat16(files, tmp_path):
    config = Config(
        data="cifar10",
        data_dir=files,
        out=tmp_path / "out",
        width=4,
        dtype="bfloat16",
        batch_size=8,
        epochs=4,
        warmup_epochs=1,
        log_every=1,
    )
    assert data_parallel.main(config) == 0
    lines = (tmp_path / "out" / "data_parallel.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    curve = curves.by_step(records, "step")
    assert list(curve) == list(range(1, 11))
    rates = [record["learning_rate"] for record in curve.values()]
    peak = 0.1 * 8 / 128
    np.testing.assert_allclose(rates[:4], [0, peak / 2, peak, rates[3]], rtol=1e-6)
    assert max(rates) == rates[2]
    assert rates[-1] < peak / 10
    for sums in records[-1]["sha256"].values():
        assert len(sums) == 8


def test_replicas_that_differ_are_found():
    devices = jax.devices()
    arrays = [
        jax.device_put(np.full(3, float(i == 5)), d) for i, d in enumerate(devices)
    ]
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    copied = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    bad = jax.make_array_from_single_device_arrays((3,), copied, arrays)
    good = jax.device_put(np.zeros(3), copied)
    with pytest.raises(RuntimeError, match="batch_stats differ between devices"):
        replicas.compare(replicas.TrainState(good, bad, ()))

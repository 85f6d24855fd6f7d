"""Training in several processes: as in one, and it survives the loss of any of them."""

import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from bnjax.training import TrainState
from experiments import data_parallel
from experiments.data_parallel import Config

pytestmark = pytest.mark.experiment

REPOSITORY = Path(__file__).parents[2]
STEPS = 21
SETTINGS = {
    "width": 4,
    "batch_size": 48,
    "epochs": 0.72,
    "warmup_epochs": 0.4,
    "checkpoint_every": 5,
    "log_every": 1,
    "timeout": 16,
    "start_timeout": 120,
}
LONGEST = 240  # seconds for anything, on a busy machine
LATE = 5  # seconds beyond the configured time, on a busy machine
SILENT = r"Task 1 heartbeat timeout|unhealthy \(stopped sending heartbeats\):\n1"
HANGS = """
import sys, time, tyro
from experiments import data_parallel
augment = data_parallel.augment
def hangs(example, rng, config):
    time.sleep(1e9 if config.cluster[2] == 1 and hangs.count > 200 else 0)
    hangs.count += 1
    return augment(example, rng, config)
hangs.count = 0
data_parallel.augment = hangs
sys.exit(data_parallel.main(tyro.cli(data_parallel.Config)))
"""


class Run:
    """Processes that train together; they are killed at the end of the test."""

    def __init__(
        self,
        out: Path,
        count: int = 1,
        devices: int = 2,
        program: tuple[str, ...] = ("-m", "experiments.data_parallel"),
        start: tuple[int, ...] | None = None,
        **settings: object,
    ):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.out, self.count = out, count
        words = [sys.executable, *program]
        for name, value in {**SETTINGS, "out": out, **settings}.items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # few steps: compiling takes longer
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        self.processes, self.paths = [], []
        for i in range(count) if start is None else start:
            cluster = ["--cluster", address, str(count), str(i)] if count > 1 else []
            path = out.with_name(f"{out.name}-{time.monotonic_ns()}-{i}.txt")
            with path.open("w") as output:
                process = subprocess.Popen(
                    [*words, *cluster],
                    cwd=REPOSITORY,
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            self.processes.append(process)
            self.paths.append(path)
        EVERY.append(self)

    def until(self, step: int) -> None:
        """Waits until that step is recorded."""
        deadline = time.monotonic() + LONGEST
        while max(losses(self.out), default=0) < step:
            assert all(process.poll() is None for process in self.processes), self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.01)

    def wait(
        self, seconds: float = LONGEST, but: int | None = None
    ) -> list[int | None]:
        """The exit statuses; fails if not all, but one, end in that time."""
        deadline = time.monotonic() + seconds
        for i, process in enumerate(self.processes):
            if i != but:
                try:
                    process.wait(max(0.1, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    pytest.fail(f"{i} goes on after {seconds} s:\n{self.text}")
        return [process.poll() for process in self.processes]

    @property
    def text(self) -> str:
        return "\n".join(path.read_text() for path in self.paths)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


EVERY: list[Run] = []


@pytest.fixture(autouse=True)
def _end():
    yield
    while EVERY:
        EVERY.pop().end()


def records(out: Path) -> list[dict]:
    path = out / "data_parallel.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def losses(out: Path) -> dict[int, float]:
    """The loss by step; of steps that were repeated the last one."""
    return {r["step"]: r["loss"] for r in records(out) if r["kind"] == "loss"}


def starts(out: Path) -> list[int]:
    return [r["step"] for r in records(out) if r["kind"] == "start"]


def final(out: Path) -> dict[str, np.ndarray]:
    """All that the last checkpoint holds of the state."""
    folder = out / "checkpoints" / str(STEPS) / "state"
    checkpointer = ocp.PyTreeCheckpointer()
    stored = checkpointer.metadata(folder.absolute()).item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
    tree = checkpointer.restore(folder.absolute(), restore_args=as_numpy)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def equal(out: Path, other: Path) -> None:
    """The same bits in parameters, statistics and optimizer, and in each loss."""
    received, expected = final(out), final(other)
    assert received.keys() == expected.keys()
    assert {key.split("'")[1] for key in received} >= {"params", "batch_stats"}
    for key, value in expected.items():
        np.testing.assert_array_equal(received[key], value, err_msg=key)
    assert losses(out) == losses(other)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process that was left alone."""
    out = tmp_path_factory.mktemp("alone") / "out"
    run = Run(out)
    assert run.wait() == [0], run.text
    assert list(losses(out)) == list(range(1, STEPS + 1))
    return out


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """The same of three processes, of two devices each."""
    out = tmp_path_factory.mktemp("three") / "out"
    run = Run(out, 3)
    assert run.wait() == [0, 0, 0], run.text
    return out


def test_three_processes_train_as_one(alone, three):
    one, together = losses(alone), losses(three)
    assert len(set(one.values())) == STEPS
    # The same sums in another order: a rounding at first, which training then spreads.
    np.testing.assert_allclose(together[1], one[1], rtol=1e-6)
    np.testing.assert_allclose(list(together.values()), list(one.values()), rtol=1e-4)
    of_one, of_three = final(alone), final(three)
    for key, value in of_one.items():
        np.testing.assert_allclose(of_three[key], value, rtol=1e-3, atol=1e-5)
    assert records(three)[0]["processes"] == 3


def test_told_to_end_and_killed(alone, tmp_path):
    """SIGTERM saves, SIGKILL costs some steps; in the end no bit differs."""
    out, step = tmp_path / "out", random.randint(7, STEPS - 1)
    print(f"killed in step {step + 1}")
    run = Run(out, checkpoint_every=1000)
    run.until(3)
    run.processes[0].send_signal(signal.SIGTERM)
    assert run.wait() == [143]
    saved = max(losses(out))
    assert f"SIGTERM: saved step {saved}" in run.text
    run = Run(out)
    run.until(step)
    run.processes[0].kill()
    assert run.wait() == [-signal.SIGKILL]
    run = Run(out)
    assert run.wait() == [0], run.text
    first, second, third = starts(out)
    assert (first, second) == (0, saved)
    assert third in (saved, *range(5, STEPS, 5))
    equal(out, alone)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("seed", range(10))
def test_killed_anywhere(request, tmp_path, count, seed):
    chance = random.Random(seed)
    step, victim = chance.randint(1, STEPS - 1), chance.randrange(count)
    out = tmp_path / "out"
    run = Run(out, count)
    run.until(step)
    run.processes[victim].kill()
    begin = time.monotonic()
    statuses = run.wait(SETTINGS["timeout"] + LATE)
    print(
        f"| {victim} of {count} in step {step + 1} | {time.monotonic() - begin:.1f} s"
    )
    assert statuses[victim] == -signal.SIGKILL
    assert 0 not in statuses
    run = Run(out, count)
    assert run.wait() == [0] * count, run.text
    equal(out, request.getfixturevalue("alone" if count == 1 else "three"))


def lost(run: Run, victim: int | None, limit: float, begin: float) -> str:
    """What the survivors say, all of which have to end in time and in failure."""
    statuses = run.wait(limit + LATE, but=victim)
    seconds = time.monotonic() - begin
    left = [status for i, status in enumerate(statuses) if i != victim]
    print(f"| {seconds:.1f} s of {limit} s | {sorted({*left})}")
    assert not {0, None} & {*left}
    return run.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "number", "message"),
    [
        (1, signal.SIGKILL, SILENT),
        (0, signal.SIGKILL, "the leader task was preempted/died"),
        (1, signal.SIGSTOP, SILENT),
        (0, signal.SIGSTOP, "CoordinationService/Heartbeat"),
    ],
)
def test_one_is_lost(tmp_path, victim, number, message):
    run = Run(tmp_path / "out", 3)
    run.until(4)
    run.processes[victim].send_signal(number)
    text = lost(run, victim, SETTINGS["timeout"], time.monotonic())
    assert re.search(message, text)


@pytest.mark.slow
def test_one_hangs(tmp_path):
    """It is alive, and JAX waits for it for ever: this is what `watch` is for."""
    run = Run(tmp_path / "out", 3, program=("-c", HANGS))
    run.until(4)
    text = lost(run, None, 2 * SETTINGS["timeout"], time.monotonic())
    assert "Timeout (0:00:16)!" in text
    assert "in hangs" in text


@pytest.mark.slow
def test_one_never_starts(tmp_path):
    run = Run(tmp_path / "out", 3, start=(0, 1), start_timeout=20)
    while run.text.count("waiting up to 20 s for all processes to start") < 2:
        time.sleep(0.1)
    text = lost(run, None, 20, time.monotonic())
    assert "CoordinationService/RegisterTask" in text


@pytest.mark.slow
def test_three_are_told_to_end(three, tmp_path):
    """SIGTERM for one process, as before its machine is taken away."""
    out = tmp_path / "out"
    run = Run(out, 3, checkpoint_every=1000)
    run.until(3)
    run.processes[2].send_signal(signal.SIGTERM)
    assert run.wait() == [143] * 3
    saved = max(losses(out))
    run = Run(out, 3)
    assert run.wait() == [0] * 3, run.text
    assert starts(out) == [0, saved]
    equal(out, three)


@pytest.mark.slow
def test_other_number_of_processes(alone, tmp_path):
    out = tmp_path / "out"
    run = Run(out, 3)
    run.until(12)
    run.processes[1].kill()
    run.wait()
    run = Run(out, 1, devices=4)
    assert run.wait() == [0], run.text
    expected = list(losses(alone).values())
    np.testing.assert_allclose(list(losses(out).values()), expected, rtol=1e-4)


# In this process


@pytest.fixture
def main(monkeypatch):
    """`data_parallel.main`, without what it does to the process."""
    monkeypatch.setattr(data_parallel, "watch", lambda seconds: None)
    handler = signal.getsignal(signal.SIGTERM)
    yield lambda out, **settings: data_parallel.main(
        Config(out=out, **{**SETTINGS, **settings})
    )
    signal.signal(signal.SIGTERM, handler)


def test_folder_that_cannot_be_written_to(main, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(tmp_path / "file" / "out") == 2
    assert "--out cannot be written to: [Errno 20] Not a dir" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_truncated_checkpoint_and_other_settings(main, alone, tmp_path, capsys):
    out = tmp_path / "out"
    out.symlink_to(alone)
    assert main(out, width=8) == 2
    told = capsys.readouterr().err
    assert "is of a run with {'width': 4}: expected {'width': 8}" in told
    newest = alone / "checkpoints" / str(STEPS)
    (large,) = sorted(newest.glob("state/d/*"), key=lambda path: path.stat().st_size)[
        -1:
    ]
    content = large.read_bytes()
    large.write_bytes(content[: len(content) // 2])
    try:
        assert main(out) == 2
    finally:
        large.write_bytes(content)
    message = f"the checkpoint {out / 'checkpoints' / str(STEPS)} is damaged: remove it"
    assert message in capsys.readouterr().err
    assert main(out) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 7}, "--batch-size 7: expected a multiple of the 8 devices"),
        ({"data": "none", "data_dir": Path(__file__).parent}, "no data in /"),
        ({"learning_rate": 1e30}, "the loss is nan at step"),
    ],
)
def test_mistakes(main, tmp_path, capsys, settings, message):
    assert main(tmp_path / "out", **settings) == 2
    assert message in capsys.readouterr().err


RED = 200, 50, 10
KINDS = {
    "rgb.JPEG": ("RGB", RED, RED),
    "grey.JPEG": ("L", 77, (77,) * 3),
    "cmyk.JPEG": ("CMYK", (55, 205, 245, 0), RED),
    "palette.PNG": ("P", RED, RED),
}


@pytest.fixture
def photographs(tmp_path):
    """ImageNet's layout: three classes, four kinds of files, one of them cut off."""
    for split, count in (("train", 12), ("val", 8)):
        for i in range(count):
            name, (mode, colour, _) = list(KINDS.items())[i % 4]
            image = Image.new("RGB" if mode == "P" else mode, (70 + i, 90 - i), colour)
            path = tmp_path / "data" / split / f"n0{i % 3}" / f"{i:02}_{name}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = image.quantize() if mode == "P" else image
            image.save(path, **({} if mode == "P" else {"quality": 100}))
    damaged = tmp_path / "data" / "train" / "n00" / "00_rgb.JPEG"
    damaged.write_bytes(damaged.read_bytes()[:300])
    return tmp_path / "data"


def test_photographs(photographs):
    config = Config(
        data="imagenet", data_dir=photographs, image_size=32, mirror=True, batch_size=5
    )
    train, test, classes = data_parallel.load(config)
    assert (len(train), len(test), classes) == (12, 8, 3)
    with pytest.warns(UserWarning, match=r"left out .*00_rgb\.JPEG"):
        read_first = data_parallel.Examples(train)[0]
    assert read_first[1] == -1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        examples, tests = data_parallel.batches(config, train, test)
        seen = [examples[i] for i in range(12)]  # five epochs
    images, labels = map(np.concatenate, zip(*seen))
    assert (images.shape, images.dtype) == ((60, 32, 32, 3), np.uint8)
    assert np.bincount(labels + 1).tolist() == [5, 15, 20, 20]
    assert not images[labels < 0].any()
    colours = {tuple(colour) for _, _, colour in KINDS.values()}
    for image in images[labels >= 0]:
        distances = [abs(image - np.array(c)).max() for c in colours]
        assert min(distances) < 4
    images, labels = map(np.concatenate, zip(*(tests[i] for i in range(2))))
    assert sorted(labels.tolist()) == [-1, -1, 0, 0, 0, 1, 1, 1, 2, 2]
    assert labels[8:].tolist() == [-1, -1]


def test_augmentation_differs_by_position_alone():
    config = Config(batch_size=24, mirror=True)
    train, test, _ = data_parallel.load(config)
    one, _ = data_parallel.batches(config, train, test)
    again, _ = data_parallel.batches(config, train, test)
    np.testing.assert_array_equal(one[70][0], again[70][0])
    assert (one[0][0] != one[58][0]).any()
    moved = data_parallel.augment(
        (Image.fromarray(np.full((8, 8, 3), 9, np.uint8)), 1),
        np.random.default_rng(3),
        Config(),
    )[0]
    assert moved.size == (8, 8)
    assert set(np.unique(moved)) == {0, 9}


def test_what_is_left_out_counts_nowhere():
    """A step with an image of label -1 is the step without it."""
    model = data_parallel.ResNet(8, 4, 10, "float32")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 8, 9, 3), np.uint8)
    labels = np.array([3, 1, -1, 4, 1, 5], np.int32)
    variables = model.init(jax.random.key(0), images, None, train=False)
    state = TrainState.create(apply_fn=model.apply, tx=optax.sgd(0.1), **variables)
    step = jax.jit(data_parallel.train_step)
    kept = labels >= 0
    received, expected = (
        step(state, images, labels),
        step(state, images[kept], labels[kept]),
    )
    np.testing.assert_allclose(received[1], expected[1], rtol=1e-5)
    for name in ("params", "batch_stats"):
        trees = getattr(received[0], name), getattr(expected[0], name)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *trees
        )
    right, total = data_parallel.test_step(state, images, labels)
    assert total == 5
    assert 0 <= right <= 5


@pytest.mark.parametrize("depth", [18, 50])
def test_networks_of_imagenet(depth):
    model = data_parallel.ResNet(depth, 64, 1000, "bfloat16")
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), np.uint8)
    shapes = jax.eval_shape(
        lambda x: model.init(jax.random.key(0), x, None, train=False), images
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    assert count == {18: 11_689_512, 50: 25_557_032}[depth]  # as in torchvision


def test_decoding_is_reported_not_raised():
    content = io.BytesIO()
    Image.new("RGB", (9, 7), RED).save(content, "PNG")
    rows = [{"image": {"bytes": content.getvalue()[:40], "path": None}, "label": 2}]
    with pytest.warns(UserWarning, match="left out None"):
        assert data_parallel.Examples(rows, 3)[0][1] == -1
    assert len(data_parallel.Examples(rows, 3)) == 3

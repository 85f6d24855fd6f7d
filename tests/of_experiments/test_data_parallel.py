"""Training in several processes: as in one, and it survives the loss of any of them."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.common import results
from experiments.common.data import idx
from experiments.common.studies import curves
from experiments.common.training import guard, launcher

pytestmark = pytest.mark.experiment

REPOSITORY = Path(__file__).parents[2]
STEPS = 23  # of one epoch of 1,397 digits in batches of 60
SETTINGS = {
    "width": 4,
    "batch_size": 60,
    "epochs": 1,
    "warmup_epochs": 0.5,
    "log_every": 1,
    "checkpoint_every": 5,
    "timeout": 10,
    "start_timeout": 120,
}
AFTER = 20  # seconds, on a busy machine, from the bound to the end: 6 are waited
LONGEST = 240  # seconds for anything; nothing takes so long by far


def options(settings: dict[str, object]) -> list[str]:
    words = []
    for name, value in settings.items():
        words.append("--" + name.replace("_", "-"))
        words += [] if value is True else [str(value)]
    return words


class Processes:
    """Processes of `experiments.data_parallel`, killed at the end of the test."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.started: list[subprocess.Popen] = []

    def start(self, **settings: object) -> subprocess.Popen:
        """One process; settings as on the command line."""
        # So few steps take less time than their optimization.
        extra = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "COLUMNS": "200"}
        hidden = idx.VARIABLE, guard.LAUNCHER
        environment = {k: v for k, v in os.environ.items() if k not in hidden}
        command = [sys.executable, "-m", "experiments.data_parallel"]
        with self._path(len(self.started)).open("w") as output:
            process = subprocess.Popen(
                command + options({**SETTINGS, **settings}),
                cwd=REPOSITORY,
                env=environment | extra,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.started.append(process)
        return process

    def start_all(
        self, out: Path, *, number: int = 3, devices: int = 2, **settings: object
    ) -> list[subprocess.Popen]:
        """Processes that meet each other."""
        settings |= {"coordinator": f"127.0.0.1:{launcher.free_port()}"}
        settings |= {"num_processes": number, "devices_per_process": devices}
        return [self.start(out=out, process_id=i, **settings) for i in range(number)]

    def output(self, process: subprocess.Popen) -> str:
        """What a process and its helper, which may outlive it, have written."""
        path = self._path(self.started.index(process))
        deadline = time.monotonic() + AFTER
        while "--resume" not in path.read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        return path.read_text()

    def wait(self, processes: list[subprocess.Popen], seconds: float = LONGEST):
        """Their exit statuses; fails if not all have ended within that time."""
        deadline = time.monotonic() + seconds
        for process in processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                number = self.started.index(process)
                text = self._path(number).read_text()
                pytest.fail(f"{number} goes on after {seconds} s:\n{text}")
        return [process.returncode for process in processes]

    def succeed(self, processes: list[subprocess.Popen]) -> None:
        statuses = self.wait(processes)
        texts = [self._path(i).read_text() for i in range(len(self.started))]
        assert set(statuses) == {0}, "\n".join(texts)

    def until(self, condition) -> None:
        """Waits while all processes go on."""
        deadline = time.monotonic() + LONGEST
        while not condition():
            for process in self.started:
                assert not process.poll(), self.output(process)
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def until_step(self, out: Path, step: int) -> None:
        self.until(lambda: max(steps(out), default=0) >= step)

    def end(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()
        for note in self.folder.rglob("processes/*.json"):  # of those of a launcher
            if lives(pid := results.read(note)[0]["pid"]):
                os.kill(pid, signal.SIGKILL)

    def _path(self, number: int) -> Path:
        return self.folder / f"output{number}.txt"


@pytest.fixture
def run(tmp_path):
    processes = Processes(tmp_path)
    yield processes
    processes.end()


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """The folder of a run of three processes; made by one worker for all."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    out = root / "uninterrupted"
    try:
        out.mkdir()
    except FileExistsError:
        deadline = time.monotonic() + LONGEST
        while not records(out) or records(out)[-1]["kind"] != "end":
            assert time.monotonic() < deadline, "it failed in another worker"
            time.sleep(0.2)
        return out
    processes = Processes(tmp_path_factory.mktemp("processes"))
    try:
        processes.succeed(processes.start_all(out))
    finally:
        processes.end()
    return out


def records(out: Path) -> list[results.Record]:
    path = out / "data_parallel.jsonl"
    return results.read(path) if path.exists() else []


def steps(out: Path) -> dict[int, results.Record]:
    return curves.by_step(records(out), "step")


def losses(out: Path) -> list[float]:
    curve = steps(out)
    assert list(curve) == list(range(1, STEPS + 1))
    return [record["loss"] for record in curve.values()]


def sums(out: Path) -> dict[str, list[str]]:
    """SHA-256 of what each device ends with."""
    record = records(out)[-1]
    assert record["kind"] == "end"
    return record["sha256"]


def test_three_processes_train_as_one(run, uninterrupted, tmp_path):
    run.succeed([run.start(out=tmp_path, devices_per_process=6)])
    one, three = losses(tmp_path), losses(uninterrupted)
    assert len(set(one)) == STEPS
    # The same sums in another order: a rounding at first, which training then spreads.
    np.testing.assert_allclose(three[0], one[0], rtol=1e-6)
    np.testing.assert_allclose(three, one, rtol=1e-4)
    for name, each in sums(uninterrupted).items():
        assert len(each) == 6
        assert len(set(each)) == 1, name
    assert records(uninterrupted)[0]["processes"] == 3


def kill_and_resume(run, uninterrupted, out: Path, seed: int) -> None:
    chance = random.Random(seed)
    step, victim = chance.randint(1, STEPS - 1), chance.randrange(3)
    print(f"seed {seed}: process {victim} is killed in step {step + 1}")
    workers = run.start_all(out)
    run.until_step(out, step)
    workers[victim].kill()
    statuses = run.wait(workers, SETTINGS["timeout"] + AFTER)
    assert statuses[victim] == -signal.SIGKILL
    for worker in workers:
        text = run.output(worker)
        if worker is not workers[victim]:
            assert worker.returncode in (guard.FAILED, -signal.SIGABRT), text
            assert f"process {victim} is silent (killed, stopped or cut off)" in text
        assert f"--out {out} --resume" in text
    again = run.start_all(out, resume=True)
    run.succeed(again)
    starts = [r["from_step"] for r in records(out) if r["kind"] == "run"]
    assert starts[0] == 0
    assert step - 5 <= starts[1] <= step + 5
    assert starts[1] % 5 == 0
    assert losses(out) == losses(uninterrupted)
    assert sums(out) == sums(uninterrupted)


def test_killed_and_resumed(run, uninterrupted, tmp_path):
    kill_and_resume(run, uninterrupted, tmp_path / "out", seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_killed_and_resumed_anywhere(run, uninterrupted, tmp_path, seed):
    kill_and_resume(run, uninterrupted, tmp_path / "out", seed)


def test_stopped(run, tmp_path):
    """A process that hangs: nothing ever fails, but nothing goes on."""
    out = tmp_path / "out"
    workers = run.start_all(out, number=2, devices=1, timeout=6, epochs=20)
    run.until_step(out, 2)
    workers[1].send_signal(signal.SIGSTOP)
    assert run.wait(workers[:1], 6 + AFTER) == [guard.FAILED]
    text = run.output(workers[0])
    assert "process 0 of 2 gives up: no progress for 6 s in step" in text
    assert "process 1 is silent (killed, stopped or cut off)" in text
    assert workers[1].poll() is None


def test_coordinator_killed(run, tmp_path):
    """JAX aborts the others before any Python can run: their helpers report."""
    out = tmp_path / "out"
    workers = run.start_all(out, number=2, devices=1, epochs=20)
    run.until_step(out, 2)
    workers[0].kill()
    assert run.wait(workers, AFTER)[1] in (guard.FAILED, -signal.SIGABRT)
    text = run.output(workers[1])
    assert "error: process 1 of 2 gives up" in text
    assert "process 0 is silent (killed, stopped or cut off)" in text
    assert f"--out {out} --resume" in text


def test_process_that_never_starts(run, tmp_path):
    settings = {"coordinator": f"127.0.0.1:{launcher.free_port()}", "num_processes": 2}
    worker = run.start(out=tmp_path / "out", process_id=0, start_timeout=2, **settings)
    assert run.wait([worker], 2 + AFTER) == [guard.FAILED]
    text = run.output(worker)
    assert "no progress for 2 s in waiting for all processes to start" in text
    assert "process 1 has not been heard of: it did not start" in text


@pytest.mark.slow
def test_resumed_on_other_devices(run, uninterrupted, tmp_path):
    """The same global batches: only rounding differs."""
    out = tmp_path / "out"
    workers = run.start_all(out)
    run.until_step(out, 12)
    workers[1].kill()
    run.wait(workers)
    run.succeed([run.start(out=out, resume=True, devices_per_process=4)])
    np.testing.assert_allclose(losses(out), losses(uninterrupted), rtol=1e-4)
    assert len(sums(out)["params"]) == 4


@pytest.mark.slow
def test_damaged_checkpoint(run, uninterrupted, tmp_path):
    """It ends the run, in every process; without it, the one before is taken."""
    out = tmp_path / "out"
    shutil.copytree(uninterrupted, out)
    (out / "checkpoints" / str(STEPS) / "state" / "manifest.ocdbt").unlink()
    workers = run.start_all(out, resume=True)
    assert run.wait(workers)[0] == 1
    text = (tmp_path / "output0.txt").read_text()
    assert f"the checkpoint {out / 'checkpoints' / str(STEPS)} cannot be read" in text
    assert "goes on from that of step 20." in text
    shutil.rmtree(out / "checkpoints" / str(STEPS))
    run.succeed(run.start_all(out, resume=True))
    assert losses(out) == losses(uninterrupted)
    assert sums(out) == sums(uninterrupted)


@pytest.mark.slow
def test_told_to_end(run, uninterrupted, tmp_path):
    """SIGTERM for one process, as before a machine is taken away."""
    out = tmp_path / "out"
    workers = run.start_all(out, checkpoint_every=1000)
    run.until_step(out, 3)
    workers[2].send_signal(signal.SIGTERM)
    assert set(run.wait(workers)) == {guard.FAILED}
    assert "since this run was told to end" in run.output(workers[0])
    saved = max(steps(out))
    run.succeed(run.start_all(out, resume=True))
    assert [r["from_step"] for r in records(out) if r["kind"] == "run"] == [0, saved]
    assert losses(out) == losses(uninterrupted)
    assert sums(out) == sums(uninterrupted)


def restart(run, out: Path, **settings: object) -> str:
    """Kills one process of a launcher's, which starts all again; what it says."""
    start = run.start(out=out, max_restarts=1, **settings)
    run.until_step(out, 12)
    os.kill(worker_ids(out, 2)[1], signal.SIGKILL)
    run.succeed([start])
    return run.output(start)


@pytest.mark.slow
def test_launcher_restarts(run, tmp_path):
    text = restart(run, tmp_path / "out", local_processes=2)
    assert "process 1 of 2 was ended by SIGKILL" in text
    assert "process 0 of 2 ended with exit status 75" in text
    assert "restart 1 of 1" in text
    (command,) = {line for line in text.splitlines() if "-m experiments" in line}
    assert "--local-processes 2" in command
    assert "--process-id" not in command
    assert len(losses(tmp_path / "out")) == STEPS


@pytest.mark.slow
def test_launcher_restarts_exactly(run, uninterrupted, tmp_path):
    out = tmp_path / "out"
    restart(run, out, local_processes=3, devices_per_process=2)
    assert losses(out) == losses(uninterrupted)
    assert sums(out) == sums(uninterrupted)


def test_launcher_does_not_repeat_a_mistake(run, tmp_path):
    settings = {"local_processes": 2, "max_restarts": 3, "batch_size": 7}
    start = run.start(out=tmp_path / "out", **settings)
    assert run.wait([start]) == [1]
    text = (tmp_path / "output0.txt").read_text()
    assert "received --batch-size 7: expected a multiple of the 2 devices." in text
    assert "restart" not in text


@pytest.mark.parametrize(
    ("number", "status"),
    [
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        (9, -9),  # the hardest: nothing can be done on the way out
    ],
)
def test_launcher_leaves_no_orphan(run, tmp_path, number, status):
    out = tmp_path / "out"
    start = run.start(out=out, local_processes=2, epochs=20)
    run.until(lambda: len(worker_ids(out, 2)) == 2)
    workers = worker_ids(out, 2)
    start.send_signal(number)
    assert run.wait([start], AFTER) == [status]
    deadline = time.monotonic() + AFTER
    while any(map(lives, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def worker_ids(out: Path, number: int) -> list[int]:
    notes = (out / "processes" / f"{i}.json" for i in range(number))
    return [results.read(note)[0]["pid"] for note in notes if note.exists()]


def lives(pid: int) -> bool:
    """Whether this is a process of ours that has not ended."""
    try:
        return b"data_parallel" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def test_smoke(tmp_path):
    command = [sys.executable, "-m", "experiments.data_parallel", "--smoke"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "step 44: " in done.stdout
    first, about, *_, last = records(tmp_path)
    assert (first["kind"], first["from_step"]) == ("run", 0)
    assert about["settings"]["data"] == "digits"
    assert {"jax", "flax", "bnjax"} <= about["versions"].keys()
    assert (last["kind"], last["step"]) == ("end", 44)
    saved = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert saved == {"20", "40", "44"}

"""Data-parallel training that may be killed at any time: a ResNet, on any machines.

    python -m experiments.data_parallel                       # digits: half a minute
    python -m experiments.data_parallel --data uoft-cs/cifar10 --mirror --depth 20
    python -m experiments.data_parallel --data imagenet --data-dir /data/imagenet \
        --image-size 224 --mirror --depth 50 --width 64 --dtype bfloat16
    srun python -m experiments.data_parallel --distributed    # and Kubernetes, TPUs

The file stands alone, to be copied. To change the data, see `load` and `augment`; the
model, `ResNet`; the optimizer or schedule, `optimizer`.

Every process runs the same program. A mesh spans the devices of all processes; batches
are split over it, and everything else is replicated. Under `jax.jit` the statistics of
batch normalization are then those of the whole batch, without an axis name.

The same command begins a run and resumes it, from the newest checkpoint in --out, a
folder that all processes share. A checkpoint holds the parameters, the statistics, the
optimizer and the position of the input. After SIGTERM to any process, all save a
checkpoint of the same step and end. If a process is lost, JAX ends the others within
--timeout; if one hangs, `watch` ends it; if one does not start, the others end within
--start-timeout. The scheduler has to start all of them again.

Exit status: 0, training is finished; 2, a person has to correct settings, data or a
checkpoint; 143, SIGTERM; any other, a process failed or was lost.

Batch k holds the same images, augmented alike, however many processes there are: a run
can be resumed by another number of them, and differs by rounding. An image that cannot
be read is reported and left out of the loss and, by a mask, of the statistics.

Expected: a run that is killed anywhere and resumed ends with the parameters and the
statistics of one that was left alone, bit for bit.

Measured (jax 0.10.2, two cores of an AMD EPYC): killed at ten random steps, a single
process or one of three, no bit differs. Three processes against one: losses differ by
2e-7 at most in 21 steps. What ends how soon, and with what message, is in
experiments/README.md. The digits end at 98.3 % of the test images, CIFAR-10 with
`--mirror --epochs 12` and the small default network at 77.8 %. ImageNet was not trained
on; its layout was tried with 200 synthetic photographs.

References: He et al. 2016 (the network); Goyal et al. 2017 (the rate grows with the
batch, after a warm-up; kernels alone decay).
"""

import dataclasses
import faulthandler
import functools
import io
import json
import math
import signal
import sys
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any, Literal

import datasets
import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image, ImageOps

import bnjax
from bnjax.training import TrainState

STAGES = {8: (1, 1, 1), 20: (3, 3, 3), 18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}
"""Blocks of each stage, by the number of layers."""
READ = grain.ReadOptions(num_threads=8, prefetch_buffer_size=8)
"""Threads that decode images, and the batches in memory."""


@dataclasses.dataclass(frozen=True)
class Training:
    """Settings that a checkpoint stores; a run can be resumed only with the same."""

    data: str = "digits"
    """The digits of scikit-learn, or a name on the Hugging Face hub (see data_dir)."""
    image_size: int | None = None
    """The side of the crops of photographs; None: images have one size already."""
    mirror: bool = False
    """Mirror half of the training images."""
    depth: Literal[8, 20, 18, 50] = 8
    """Layers: 8, 20 are in 3 stages, as for CIFAR-10; 18, 50 in 4, as for ImageNet."""
    width: int = 16
    """Channels of the first stage."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The type of the computation; parameters and statistics are float32."""
    batch_size: int = 128
    """Images per step, on all devices together."""
    epochs: float = 20.0
    """How often each image is seen."""
    warmup_epochs: float = 2.0
    """Epochs, part of `epochs`, in which the learning rate rises from 0 to its peak."""
    learning_rate: float = 0.1
    """The peak for a batch of 128 images; multiplied by batch_size / 128."""
    weight_decay: float = 1e-4
    """L2 regularization of the kernels; not of biases, nor of normalization."""
    seed: int = 0
    """For the initial weights, the order of the images and their augmentation."""


@dataclasses.dataclass(frozen=True)
class Config(Training):
    """The settings of a run; each is an option of the command line."""

    data_dir: Path | None = None
    """A local copy, read in place of the hub: Parquet, or train/class and val/class."""
    out: Path = Path("runs/data_parallel")
    """The folder of the checkpoints and the records; one for each run."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    evaluate_every: int = 100
    """Steps between measurements on the test images."""
    log_every: int = 10
    """Steps between records of the loss."""
    distributed: bool = False
    """Find the other processes by means of Slurm, MPI, Kubernetes or a TPU pod."""
    cluster: tuple[str, int, int] | None = None
    """Without those: host:port of process 0, number of processes, index of this one."""
    timeout: int = 120
    """Seconds for a step or a checkpoint, half for a heartbeat; then all end."""
    start_timeout: int = 300
    """Seconds for all processes to start, and then to read the data and compile."""


class Mistake(Exception):
    """An error that a person has to correct: the same command would fail again."""


# Data


class Examples:
    """(image, label) by index; the label is -1 where no image can be read."""

    def __init__(self, rows: datasets.Dataset, multiple: int = 1):
        """
        Args:
            rows: with the columns "image", not decoded, and "label".
            multiple: the length is rounded up to a multiple of it.
        """
        self._rows = rows
        self._length = -(-len(rows) // multiple) * multiple

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index >= self._length:
            raise IndexError(index)
        if index < len(self._rows):
            row = self._rows[index]
            content, path = row["image"]["bytes"], row["image"]["path"]
            try:
                image = Image.open(io.BytesIO(content or Path(path).read_bytes()))
                return image.convert("RGB"), row["label"]
            except (OSError, SyntaxError) as error:  # what Pillow raises
                warnings.warn(f"left out {path}: {error}", stacklevel=1)
        return Image.new("RGB", (1, 1)), -1


def load(config: Config) -> tuple[datasets.Dataset, datasets.Dataset, int]:
    """The training rows, the test rows and the number of classes."""
    if config.data == "digits":
        from sklearn.datasets import load_digits  # slow to import

        digits: Any = load_digits()
        label = datasets.ClassLabel(num_classes=10)
        rows = datasets.Dataset.from_dict(
            {"x": list((digits.images * 15.9).astype(np.uint8)), "y": digits.target},
            features=datasets.Features(x=datasets.Image(), y=label),
        )
        found = rows.train_test_split(test_size=400, seed=0)
    else:
        source = config.data if config.data_dir is None else str(config.data_dir)
        datasets.disable_progress_bars()
        try:
            found = datasets.load_dataset(source)
        except Exception as error:  # of the network, of files, of Parquet
            raise Mistake(
                f"no data in {source} ({error}): expected the name of a data set on "
                "the Hugging Face hub, or --data-dir with a local copy."
            ) from error
    kinds = found["train"].features
    columns = {type(kind): name for name, kind in reversed(kinds.items())}
    image, label = columns.get(datasets.Image), columns.get(datasets.ClassLabel)
    evaluation = next((s for s in ("validation", "test") if s in found), None)
    if image is None or label is None or evaluation is None:
        raise Mistake(
            f"received the splits {[*found]} and the columns {kinds}: expected train "
            "and validation or test, with an Image and a ClassLabel."
        )
    found = found.select_columns([image, label])
    found = found.rename_columns({image: "image", label: "label"})
    found = found.cast_column("image", datasets.Image(decode=False))
    return found["train"], found[evaluation], kinds[label].num_classes


def augment(
    example: tuple[Image.Image, int], rng: np.random.Generator, config: Config
) -> tuple[Image.Image, int]:
    """A random part of a training image, perhaps mirrored, and the label."""
    image, label = example
    width, height = image.size
    if config.image_size:  # random resized crop: area, aspect ratio, place
        area, aspect = width * height * rng.uniform(0.08, 1), rng.uniform(3 / 4, 4 / 3)
        w = min(width, math.ceil(math.sqrt(area * aspect)))
        h = min(height, math.ceil(math.sqrt(area / aspect)))
        left, top = rng.integers((width - w + 1, height - h + 1))
        size, box = config.image_size, (left, top, left + w, top + h)
        image = image.resize((size, size), Image.Resampling.BILINEAR, box)
    else:  # moved by up to an eighth of its side, black outside
        left, top = rng.integers(-(width // 8), width // 8 + 1, 2)
        image = image.crop((left, top, left + width, top + height))
    if config.mirror and rng.random() < 0.5:
        image = ImageOps.mirror(image)
    return image, label


def batches(config: Config, train, test) -> tuple[grain.MapDataset, grain.MapDataset]:
    """This process's part of each batch: training repeats for ever, test is once."""
    side = config.image_size
    sizes = (image.size for image, label in Examples(train) if label >= 0)
    size = (side, side) if side else next(sizes, None)
    if size is None:
        raise Mistake("no training image can be read: expected JPEG or PNG files.")

    def finish(example: tuple[Image.Image, int]) -> tuple[np.ndarray, np.int32]:
        image, label = example
        if image.size != size:  # a test photograph, or an image that is left out
            image = ImageOps.fit(image, size, bleed=1 / 16)
        return np.asarray(image), np.int32(label)

    change = functools.partial(augment, config=config)
    examples = grain.MapDataset.source(Examples(train)).seed(config.seed)
    examples = examples.shuffle().repeat().random_map(change).map(finish)
    tests = grain.MapDataset.source(Examples(test, config.batch_size)).map(finish)
    # Of n processes, process i takes parts i, i + n, i + 2n, ...: one of each batch.
    process, processes = jax.process_index(), jax.process_count()
    examples, tests = (
        each.batch(config.batch_size // processes)[process::processes]
        for each in (examples, tests)
    )
    return examples, tests


# Model


class ResNet(nn.Module):
    """A residual network; each block's last normalization adds the shortcut."""

    depth: int
    width: int
    classes: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, *, train: bool):
        """The logits, float32.

        Args:
            x: images, (batch, height, width, 3), uint8.
            mask: (batch, 1, 1, 1), False where there is no image.
            train: whether to normalize by the batch, and update running statistics.
        """
        relu, zeros = nn.relu, nn.initializers.zeros
        he, dtype = nn.initializers.he_normal(), self.dtype
        conv = functools.partial(nn.Conv, use_bias=False, kernel_init=he, dtype=dtype)
        norm = functools.partial(
            bnjax.BatchNorm, use_running_average=not train, momentum=0.9, dtype=dtype
        )
        large, bottleneck = len(STAGES[self.depth]) == 4, self.depth == 50
        x = (x.astype(self.dtype) - 127.5) / 64
        x = conv(self.width, (7, 7) if large else (3, 3), 2 if large else 1)(x)
        x = norm(activation=relu)(x, mask=mask)
        if large:
            x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate(STAGES[self.depth]):
            for block in range(blocks):
                features = self.width * 2**stage
                stride = 2 if stage and not block else 1
                y = x
                if bottleneck:
                    y = norm(activation=relu)(conv(features, (1, 1))(y), mask=mask)
                y = conv(features, (3, 3), stride)(y)
                y = norm(activation=relu)(y, mask=mask)
                last = (4 * features, (1, 1)) if bottleneck else (features, (3, 3))
                y = conv(*last)(y)
                if x.shape != y.shape:
                    x = norm()(conv(y.shape[-1], (1, 1), stride)(x), mask=mask)
                x = norm(activation=relu, scale_init=zeros)(y, residual=x, mask=mask)
        return nn.Dense(self.classes)(x.mean((1, 2), dtype=jnp.float32))


# Training


def optimizer(config: Config, steps: int, warmup: int) -> optax.GradientTransformation:
    """Nesterov momentum; the rate rises linearly, then falls as a cosine to 0."""
    peak = config.learning_rate * config.batch_size / 128
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps)
    decay = bnjax.training.weight_decay_mask
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay, decay),
        optax.sgd(schedule, momentum=0.9, nesterov=True),
    )


def train_step(state: TrainState, images: jax.Array, labels: jax.Array):
    """The next state, and the loss before it."""
    valid = labels >= 0

    def loss_fn(params):
        mask = valid[:, None, None, None]
        logits, stats = state.apply(params, images, mask, train=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(where=valid), stats

    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=stats), loss


def test_step(state: TrainState, images: jax.Array, labels: jax.Array):
    """How many predictions are right, and how many images there are."""
    logits, _ = state.apply(state.params, images, None, train=False)
    return jnp.stack([(logits.argmax(-1) == labels).sum(), (labels >= 0).sum()])


def evaluate(config: Config, count, state: TrainState, tests) -> float:
    """The share of the test images whose class is predicted."""
    counts = np.zeros(2)
    for batch in tests:
        counts += np.asarray(count(state, *batch))
        watch(config.timeout)
    return counts[0] / counts[1]


def restore(manager, settings, state: TrainState, stream) -> tuple[TrainState, int]:
    """The newest checkpoint's state and step, or `state` and 0; sets `stream` to it."""
    step = manager.latest_step()
    if step is None:
        return state, 0
    try:
        about = ocp.args.Composite(about=ocp.args.JsonRestore())
        about = manager.restore(step, args=about)["about"]
        if about["settings"] == settings:
            shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            args = ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
            state = manager.restore(step, args=args)["state"]
    except Exception as error:  # whatever a damaged file leads to
        raise Mistake(
            f"the checkpoint {manager.directory / str(step)} is damaged: remove it, "
            f"and the same command goes on from the one before. {error!r:.300}"
        ) from error
    saved = about["settings"]
    changed = [n for n in saved | settings if saved.get(n) != settings.get(n)]
    if changed:
        was, now = ({n: each.get(n) for n in changed} for each in (saved, settings))
        raise Mistake(
            f"{manager.directory} is of a run with {was}: expected {now}. Give the "
            "settings to go on with it, or another folder by --out."
        )
    stream.set_state(about["input"])
    return state, step


def train(config: Config, terminated: threading.Event) -> int:
    """Trains to the end, or until SIGTERM; returns the exit status.

    Args:
        config: the settings.
        terminated: set by SIGTERM if this is the only process; among several, JAX
            catches it, and `reached_preemption` is true at the same step in all.
    """
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(Training)}
    train_rows, test_rows, classes = load(config)
    if config.batch_size % jax.device_count():
        raise Mistake(
            f"received --batch-size {config.batch_size}: expected a multiple of the "
            f"{jax.device_count()} devices."
        )
    examples, tests = batches(config, train_rows, test_rows)
    stream = iter(examples.to_iter_dataset(READ))
    epoch = len(train_rows) / config.batch_size
    steps, warmup = round(config.epochs * epoch), round(config.warmup_epochs * epoch)

    mesh = Mesh(np.array(jax.devices()), ("data",))
    split, replicated = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    jit = functools.partial(jax.jit, out_shardings=replicated)
    advance, count = jit(train_step, donate_argnums=0), jit(test_step)
    model = ResNet(config.depth, config.width, classes, config.dtype)
    first_batch: Any = tests[0]

    def place(batch) -> list[jax.Array]:
        return [jax.make_array_from_process_local_data(split, part) for part in batch]

    def init() -> TrainState:
        key, blank = jax.random.key(config.seed), jnp.zeros_like(first_batch[0][:1])
        variables = model.init(key, blank, None, train=False)
        tx = optimizer(config, steps, warmup)
        return TrainState.create(apply_fn=model.apply, tx=tx, **variables)

    folder = (config.out / "checkpoints").absolute()
    options = ocp.CheckpointManagerOptions(max_to_keep=3, cleanup_tmp_directories=True)
    manager = ocp.CheckpointManager(folder, options=options)
    state, first = restore(manager, settings, jit(init)(), stream)

    is_first, step = jax.process_index() == 0, first

    def record(kind: str, **fields: Any) -> None:  # with the loop's current `step`
        if is_first:
            with (config.out / "data_parallel.jsonl").open("a") as log:
                log.write(json.dumps({"kind": kind, "step": step, **fields}) + "\n")

    layout = {"processes": jax.process_count(), "devices": jax.device_count()}
    record("start", jax=jax.__version__, **layout, settings=settings)
    if is_first and first:
        print(f"goes on after step {first:,} of {steps:,}")
    for step in range(first + 1, steps + 1):
        state, loss = advance(state, *place(next(stream)))
        if step % config.log_every == 0:
            record("loss", loss=float(loss))
            if not math.isfinite(loss):
                raise Mistake(f"the loss is {loss} at step {step}: expected a number.")
            if is_first:
                text = f"step {step:,} of {steps:,}, loss {loss:.4f}"
                print(text, end="  \r", flush=True)
        stop = manager.reached_preemption(step) or terminated.is_set()
        last = step == steps
        if last or (step % config.evaluate_every == 0 and not stop):
            each = map(place, tests.to_iter_dataset(READ))
            accuracy = evaluate(config, count, state, each)
            record("test", accuracy=accuracy)
            if is_first:
                print(f"step {step:,}: {accuracy:.2%} of the test images are right")
        if last or stop or step % config.checkpoint_every == 0:
            about = {"settings": settings, "input": stream.get_state()}
            args = ocp.args.Composite(
                state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)
            )
            manager.save(step, args=args, force=True)
        if stop and not last:
            manager.close()
            print(f"SIGTERM: saved step {step}; the same command goes on from there")
            return 128 + signal.SIGTERM
        watch(config.timeout)
    manager.close()
    return 0


def watch(seconds: float) -> None:
    """Starts a timer anew; if it runs out, prints all stacks and ends the process."""
    faulthandler.dump_traceback_later(seconds, exit=True)


def connect(config: Config, terminated: threading.Event) -> None:
    """Checks that --out can be written to, and connects to the other processes."""
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=config.out).close()
    except OSError as error:
        raise Mistake(f"--out cannot be written to: {error}") from error
    if config.distributed or config.cluster:
        limit = f"up to {config.start_timeout} s"
        print(f"waiting {limit} for all processes to start", flush=True)
        jax.distributed.initialize(
            *(config.cluster or (None, None, None)),
            initialization_timeout=config.start_timeout - 5,  # JAX adds 5 s
            heartbeat_timeout_seconds=config.timeout // 2,  # before `watch`
            shutdown_timeout_seconds=config.timeout,
        )
    else:
        signal.signal(signal.SIGTERM, lambda *_: terminated.set())


def main(config: Config) -> int:
    """Trains, with the other processes if there are any; returns the exit status."""
    terminated = threading.Event()
    try:
        connect(config, terminated)
        watch(config.start_timeout)
        return train(config, terminated)
    except Mistake as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    finally:
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))

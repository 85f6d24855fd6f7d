"""The commands on checkpoints as users have them, on broken ones, and on full disks."""

import argparse
import errno
import functools
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import tempfile

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import rich.console
import safetensors.numpy
from flax import nnx
from helpers import assert_close, assert_trees_close, by_default, covering
from test_architectures import ResNet18

import bnjax
from bnjax import _checkpoints, _command_line, convert
from bnjax.convert import _entries

# Installed with [test] on Python 3.11; its wheels for others bring gigabytes of CUDA.
torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")


def run(*arguments):
    """The exit status of a command."""
    return _command_line.main([str(argument) for argument in arguments])


def failing(capsys, *arguments, status=1):
    """The message of a command that fails, which is all that it prints."""
    capsys.readouterr()  # of what ran before
    assert run(*arguments) == status
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    return printed.err


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder):
    """The files below a folder, and what is in them."""
    paths = sorted(pathlib.Path(folder).rglob("*"))
    return {str(p): p.read_bytes() if p.is_file() else None for p in paths}


# torchvision's ResNet-18, with its names.


class Block(torch.nn.Module):
    def __init__(self, inputs, features, stride):
        super().__init__()
        options = {"bias": False, "padding": 1}
        self.conv1 = torch.nn.Conv2d(inputs, features, 3, stride, **options)
        self.bn1 = torch.nn.BatchNorm2d(features)
        self.conv2 = torch.nn.Conv2d(features, features, 3, **options)
        self.bn2 = torch.nn.BatchNorm2d(features)
        self.downsample = None
        if stride > 1:
            self.downsample = torch.nn.Sequential(
                torch.nn.Conv2d(inputs, features, 1, stride, bias=False),
                torch.nn.BatchNorm2d(features),
            )

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        x = x if self.downsample is None else self.downsample(x)
        return torch.relu(self.bn2(self.conv2(y)) + x)


class TorchResNet18(torch.nn.Module):
    def __init__(self, classes=11):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(64)
        self.maxpool = torch.nn.MaxPool2d(3, 2, padding=1)
        inputs = 64
        for stage, features in enumerate((64, 128, 256, 512), 1):
            first = Block(inputs, features, 2 if stage > 1 else 1)
            blocks = torch.nn.Sequential(first, Block(features, features, 1))
            setattr(self, f"layer{stage}", blocks)
            inputs = features
        self.fc = torch.nn.Linear(512, classes)

    def forward(self, x):
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


def shaken(net):
    """The network with random scales, shifts and statistics, evaluated."""
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.2)
            torch.nn.init.normal_(module.running_mean, std=0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return net.eval()


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """(the network, a folder with resnet18.pth and names.json)."""
    torch.manual_seed(1)
    net, folder = shaken(TorchResNet18()), tmp_path_factory.mktemp("resnet")
    torch.save(net.state_dict(), folder / "resnet18.pth")
    modules = {name.rpartition(".")[0] for name in net.state_dict()}
    names = {module: module.replace(".", "_") for module in modules}
    (folder / "names.json").write_text(json.dumps(names))
    return net, folder


@pytest.mark.parametrize(
    "hub", [False, pytest.param(True, marks=pytest.mark.full)], ids=["", "safetensors"]
)
def test_resnet18_there_and_back(resnet, hub, folder, capsys):
    net, made = resnet
    source, names = made / "resnet18.pth", ("--names", made / "names.json")
    if hub:
        assert run("convert", source, "hub.st", "--to", "torch-safetensors") == 0
        source = folder / "hub.st"
    assert run("convert", source, "out", *names) == 0
    assert "Wrote 102 arrays, 44.8 MB, to out (orbax)." in capsys.readouterr().out
    with ocp.StandardCheckpointer() as checkpointer:
        variables = checkpointer.restore(folder / "out")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = net(images).numpy()
    x = images.permute(0, 2, 3, 1).numpy()
    assert_close(jax.jit(ResNet18().apply)(variables, x), expected, tol=1e-5)
    back = "back.safetensors" if hub else "back.pth"
    assert run("convert", "out", back, *names) == 0
    if hub:
        found = safetensors_torch.load_file(back)
    else:
        found = torch.load(back, weights_only=True)
    assert found.keys() == net.state_dict().keys()
    for name, tensor in net.state_dict().items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


# A small network with every kind of entry, in each format.


class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(5, (2, 3), use_bias=False, name="conv")(x)
        x = bnjax.BatchNorm(True, name="norm")(x)
        return nn.Dense(4, name="head")(x.mean((1, 2)))


def small(dtype=torch.float32):
    torch.manual_seed(2)
    net = torch.nn.ModuleDict(
        {
            "conv": torch.nn.Conv2d(3, 5, (2, 3), bias=False),
            "norm": torch.nn.BatchNorm2d(5),
            "head": torch.nn.Linear(5, 4),
        }
    )
    return shaken(net).to(dtype)


def variables():
    return convert.from_torch(small().state_dict())


def save_orbax(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(pathlib.Path(path).absolute(), tree)


WRITERS = {
    "in.pth": lambda path: torch.save(small().state_dict(), path),
    "in.safetensors": lambda path: convert.save_safetensors(small().state_dict(), path),
    "tree.safetensors": lambda path: convert.save_safetensors(variables(), path),
    "tree.msgpack": lambda path: pathlib.Path(path).write_bytes(
        flax.serialization.to_bytes(variables())
    ),
    "tree": lambda path: save_orbax(path, variables()),
}
FORMATS = {
    "out": "orbax",
    "out.msgpack": "msgpack",
    "out.st": "flax-safetensors",
    "out.bin": "torch",
    "out.hub": "torch-safetensors",
}


@covering(1, source=WRITERS, target=FORMATS)
def test_every_format_to_every_other(source, target, folder):
    WRITERS[source](source)
    assert run("convert", source, target, "--to", FORMATS[target]) == 0
    assert sorted(os.listdir()) == sorted({source, target})
    found = _checkpoints.read(pathlib.Path(target))
    assert found.format == FORMATS[target]
    if "torch" in found.format:
        state_dict = small().state_dict()
        assert found.tree.keys() == state_dict.keys()
        for name, tensor in state_dict.items():
            np.testing.assert_array_equal(found.tree[name], tensor.numpy())
            assert found.tree[name].dtype == tensor.numpy().dtype
    else:
        assert_trees_close(found.tree, variables(), tol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(dtype, folder):
    torch.save(small(getattr(torch, dtype)).state_dict(), "in.pth")
    for target in ("out", "out.msgpack", "out.safetensors"):
        assert run("convert", "in.pth", target) == 0
        assert run("convert", target, target + ".pth") == 0
        back = torch.load(target + ".pth", weights_only=True)
        for name, tensor in small(getattr(torch, dtype)).state_dict().items():
            assert back[name].dtype == tensor.dtype
            assert torch.equal(back[name], tensor), name


def test_a_cast(folder, capsys):
    torch.save(small(torch.float64).state_dict(), "in.pth")
    assert run("convert", "in.pth", "out") == 0
    assert "warning: 7 of 7 entries are float64" in capsys.readouterr().err
    assert run("convert", "in.pth", "cast", "--dtype", "bfloat16", "--dry-run") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    row = rows(printed.out)["conv.weight -> params/conv/kernel"]
    assert row[1:] == ["float64 -> bfloat16", "OIHW -> HWIO, cast"]
    assert run("convert", "in.pth", "cast", "--dtype", "bfloat16") == 0
    leaves = jax.tree.leaves(_checkpoints.read(folder / "cast").tree)
    assert {leaf.dtype.name for leaf in leaves} == {"bfloat16"}
    # integers stay
    assert run("convert", "in.pth", "cast.pth", "--dtype", "float16") == 0
    found = torch.load("cast.pth", weights_only=True)
    assert found["norm.num_batches_tracked"].dtype == torch.int64
    assert found["conv.weight"].dtype == torch.float16


# What it prints.


def rows(table):
    """The cells of a table by the first of them."""
    lines = [line.split("  ") for line in table.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    return {line[0]: line[1:] for line in cells if line}


def test_a_dry_run(folder, capsys):
    torch.save(small().state_dict(), "in.pth")
    before = contents(folder)
    assert run("convert", "in.pth", "out", "--dry-run") == 0
    assert contents(folder) == before
    printed = capsys.readouterr().out
    table = rows(printed)
    assert table["conv.weight -> params/conv/kernel"] == [
        "5x3x2x3 -> 2x3x3x5",
        "float32",
        "OIHW -> HWIO",
    ]
    assert table["head.weight -> params/head/kernel"][2] == "OI -> IO"
    assert table["norm.running_var -> batch_stats/norm/var"] == [
        "5",
        "float32",
        "renamed",
    ]
    assert table["norm.num_batches_tracked"] == [
        "()",
        "int64",
        "left out: Flax counts no batches",
    ]
    assert printed.endswith("Would write 7 arrays, 0.0 MB, to out (orbax).\n")
    WRITERS["tree"]("tree")
    capsys.readouterr()
    assert run("convert", "tree", "out.pth", "--dry-run") == 0
    table = rows(capsys.readouterr().out)
    assert table["params/conv/kernel -> conv.weight"][2] == "HWIO -> OIHW"
    assert table["norm.num_batches_tracked"] == ["()", "int64", "made: 0"]
    assert run("convert", "tree", "out.msgpack", "--dry-run") == 0
    assert rows(capsys.readouterr().out)["params/head/bias"][2] == "as it is"


@pytest.mark.parametrize("width", [80, 120])
def test_a_dry_run_on_a_terminal(width, resnet, folder, capsys, monkeypatch):
    """Every name whole, and no line longer than the terminal."""
    terminal = functools.partial(
        rich.console.Console, force_terminal=True, color_system=None, width=width
    )
    monkeypatch.setattr(_command_line, "Console", terminal)
    source = resnet[1] / "resnet18.pth"
    assert run("convert", source, "out", "--dry-run", "--dtype", "bfloat16") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    words = {word for line in lines for word in line.split()}
    assert {"layer4.0.downsample.1.running_mean", "bfloat16"} <= words
    assert "cast" in words


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("back", [False, True])
def test_the_axes_in_words_are_those_of_the_conversion(rank, back):
    """Each row that tells axes, redone by einsum."""
    window = (2, 4, 6)[:rank]
    net = torch.nn.ModuleDict(
        {
            "conv": getattr(torch.nn, f"Conv{rank}d")(3, 5, window),
            "up": getattr(torch.nn, f"ConvTranspose{rank}d")(5, 7, window),
            "head": torch.nn.Linear(7, 4),
        }
    )
    kinds = {name: type(module).__name__ for name, module in net.items()}
    source = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    converted = _entries.to_flax_variables("torch", source, None, kinds, None)
    if back:
        source = _entries._tree.flat(converted.tree)
        count = np.array(0)
        converted = _entries.to_state_dict(converted.tree, None, kinds, None, count)
    target = _entries._tree.flat(converted.tree)
    axes = [row for row in converted.rows if row.what]
    assert len(axes) == 3
    for row in axes:
        assert row.source in source
        assert row.before.shape == source[row.source].shape
        assert row.after.shape == target[row.target].shape
        array = np.asarray(source[row.source])
        assert ("~" in row.what) == ("up" in row.source)
        before, after = row.what.replace("~", "").split(" -> ")
        if "~" in row.what:
            mirrored = [i for i, axis in enumerate(before) if axis in "DHW"]
            array = np.flip(array, mirrored)
        redone = np.einsum(f"{before}->{after}", array)
        np.testing.assert_array_equal(redone, target[row.target])


def test_rows_of_split_layers():
    """Of one layer's many entries, the first stands for all rows."""
    entries = {
        f"norm.{aux}{name}": np.full(3, i, "f4")
        for i, aux in enumerate(("", "aux_bn.0."))
        for name in ("weight", "bias", "running_mean", "running_var")
    }
    options = None, {"norm": "SplitBatchNorm2d"}, None
    converted = _entries.to_flax_variables("torch", entries, *options)
    rows = {row.source: row for row in converted.rows}
    assert rows.keys() == entries.keys()
    assert rows["norm.weight"].after.shape == (2, 3)
    assert rows["norm.aux_bn.0.weight"].target == ""
    assert "row" in rows["norm.aux_bn.0.weight"].what


# What users' checkpoints look like.


def state_of(tree):
    return bnjax.training.TrainState.create(
        apply_fn=Small().apply,
        params=tree["params"],
        batch_stats=tree["batch_stats"],
        tx=optax.adam(1e-3),
    )


def save_steps(path, tree, item=None):
    """Two steps of a CheckpointManager; the newest holds the tree."""
    names = {} if item is None else {"item_names": (item, "config")}
    with ocp.CheckpointManager(pathlib.Path(path).absolute(), **names) as manager:
        for step, factor in ((9, 0), (10, 1)):
            scaled = jax.tree.map(lambda v, factor=factor: v * factor, tree)
            saved = ocp.args.StandardSave(scaled)
            if item is not None:
                other = ocp.args.JsonSave({"rate": 1})
                saved = ocp.args.Composite(**{item: saved, "config": other})
            manager.save(step, args=saved)
        manager.wait_until_finished()


def boxed(tree):
    return jax.tree.map(lambda v: nn.Partitioned(v, names=(None,) * v.ndim), tree)


class SmallNnx(nnx.Module):
    def __init__(self):
        self.rngs = rngs = nnx.Rngs(params=0, dropout=1)  # "params" is no collection
        self.conv = nnx.Conv(3, 5, (2, 3), use_bias=False, rngs=rngs)
        self.norm = bnjax.nnx.BatchNorm(5, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(5, 4, rngs=rngs)


def nnx_state(tree):
    model = SmallNnx()
    for layer, values in tree["params"].items():
        for name, value in (values | tree["batch_stats"].get(layer, {})).items():
            getattr(getattr(model, layer), name)[...] = value
    return nnx.state(model)


USERS = {
    "TrainState": lambda tree: save_orbax("in", state_of(tree)),
    "steps": lambda tree: save_steps("in", tree),
    "steps of a TrainState": lambda tree: save_steps("in", state_of(tree), "state"),
    "within": lambda tree: save_orbax("in", {"model": tree, "epoch": np.array(3)}),
    "params=variables": lambda tree: save_orbax(
        "in", state_of({"params": tree, "batch_stats": {}})
    ),
    "boxes": lambda tree: save_orbax("in", boxed(tree)),
    "NNX": lambda tree: save_orbax("in", nnx_state(tree)),
    "pure NNX": lambda tree: save_orbax("in", nnx.to_pure_dict(nnx_state(tree))),
    "TrainState in msgpack": lambda tree: pathlib.Path("in").write_bytes(
        flax.serialization.to_bytes(state_of(tree))
    ),
}


@by_default("TrainState", "steps", "NNX", "TrainState in msgpack", kind=[*USERS])
def test_the_model_in_a_checkpoint_of_flax(kind, folder, capsys):
    tree = variables()
    USERS[kind](tree)
    assert run("convert", "in", "out.pth") == 0
    found = torch.load("out.pth", weights_only=True)
    assert found.keys() == small().state_dict().keys()
    for name, tensor in small().state_dict().items():
        assert torch.equal(found[name], tensor), name
    printed = capsys.readouterr().out
    assert ("10/" in printed) == ("steps" in kind)
    assert run("convert", "in", "out.pth", "--dry-run", "--overwrite") == 0
    table = rows(capsys.readouterr().out)
    assert ("opt_state" in table) == ("TrainState" in kind)
    if "TrainState" in kind:
        assert "left out: 11 arrays, not of the model" in table["opt_state"]


def test_two_models(folder, capsys):
    pair = {
        name: jax.tree.map(lambda v, f=f: v * f, variables())
        for name, f in (("a", 1), ("b", 0))
    }
    save_orbax("in", pair)
    message = failing(capsys, "convert", "in", "out.pth")
    assert "holds several models: a, b. Expected one of them: write --at a." in message
    assert run("convert", "in", "out.pth", "--at", "a") == 0
    found = torch.load("out.pth", weights_only=True)
    assert torch.equal(found["head.bias"], small().state_dict()["head.bias"])
    message = failing(capsys, "report", "in", "--at", "c")
    assert "has no 'c' for --at c: it has ['a', 'b']" in message


def prefixed(prefix):
    return {prefix + name: tensor for name, tensor in small().state_dict().items()}


WRAPPED = {
    "state_dict": ({"state_dict": prefixed(""), "epoch": 3, "optimizer": {}}, "epoch"),
    "model": ({"model": prefixed(""), "model_ema": prefixed("")}, "model_ema"),
    "DataParallel": (prefixed("module."), "'module.' of DataParallel"),
    "compiled": (prefixed("_orig_mod."), "'_orig_mod.' of torch.compile"),
    "both": ({"net": prefixed("module._orig_mod.")}, "of torch.compile"),
    "only one": ({"generator": prefixed(""), "step": 1}, "Read generator"),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_what_is_around_a_state_dict(kind, folder, capsys):
    saved, note = WRAPPED[kind]
    torch.save(saved, "in.pt")
    assert run("convert", "in.pt", "out.msgpack") == 0
    assert note in capsys.readouterr().out
    assert_trees_close(_checkpoints.read(folder / "out.msgpack").tree, variables())


def test_two_networks_in_a_file(folder, capsys):
    torch.save({"g": prefixed(""), "d": {"weight": torch.ones(2, 3)}}, "in.pt")
    message = failing(capsys, "convert", "in.pt", "out")
    assert "holds several networks: g, d. Expected one of them: write --at g" in message
    assert run("convert", "in.pt", "out", "--at", "d") == 0
    assert _checkpoints.read(folder / "out").tree["params"]["kernel"].shape == (3, 2)


# Options.


def test_names_kinds_and_like(folder, capsys):
    WRITERS["in.pth"]("in.pth")
    names = ("--names", "conv=Conv_0", "norm=BatchNorm_0", "head=Dense_0")
    assert run("convert", "in.pth", "out", *names) == 0
    tree = _checkpoints.read(folder / "out").tree
    assert tree["params"].keys() == {"Conv_0", "BatchNorm_0", "Dense_0"}
    assert run("convert", "in.pth", "all.msgpack", "--names", "=encoder") == 0
    tree = _checkpoints.read(folder / "all.msgpack").tree
    assert tree["params"].keys() == {"encoder"}
    assert run("convert", "in.pth", "again.msgpack", *names, "--like", "out") == 0
    message = failing(capsys, "convert", "in.pth", "no", "--like", "out")
    assert "extra: conv.weight -> params/conv/kernel (2, 3, 3, 5)" in message
    assert "missing: params/Conv_0/kernel (2, 3, 3, 5)" in message
    assert "Here: --names conv1=Conv_0 or names.json" in message
    assert run("convert", "out", "back.pth", *names, "--like", "in.pth") == 0
    up = torch.nn.ConvTranspose2d(2, 3, (4, 5))
    torch.save({"up.weight": up.weight}, "up.pth")
    assert run("convert", "up.pth", "up", "--kinds", "up=ConvTranspose2d") == 0
    assert run("convert", "up", "up_back.pth", "--kinds", "up=ConvTranspose2d") == 0
    found = torch.load("up_back.pth", weights_only=True)
    assert torch.equal(found["up.weight"], up.weight)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--names", "nothing.json"], "--names nothing.json is no file, and no pair"),
        (["--names", "broken.json"], "broken.json is no JSON"),
        (["--names", "list.json"], "list.json holds a list: expected"),
        (
            ["--names", "numbers.json"],
            "numbers.json has the values {'b': 3, 'c': None}",
        ),
        (["--names", "conv=a", "conv=b"], "--names has ['conv'] twice"),
        (["--kinds", "nothing"], "Write --kinds up=ConvTranspose2d"),
        (["--names", "conv=a"], "head.bias: names has no key for the module 'head'"),
        (["--kinds", "conv=Linear"], "is not that of a layer of the kind 'linear'"),
        (["--like", "in.pth"], "--like in.pth is a checkpoint of the format torch"),
        (["--like", "nothing"], "nothing does not exist"),
        (["--to", "torch", "--names", "conv=a"], "--names: expected a conversion"),
        (["--at", "model"], "has no 'model' for --at model"),
    ],
)
def test_wrong_options(options, match, folder, capsys):
    WRITERS["in.pth"]("in.pth")
    (folder / "broken.json").write_text('{"conv": ')
    (folder / "list.json").write_text('["conv"]')
    (folder / "numbers.json").write_text('{"a": "x", "b": 3, "c": null}')
    before = contents(folder)
    assert match in failing(capsys, "convert", "in.pth", "out", *options)
    assert contents(folder) == before


def test_all_that_is_wrong_is_in_one_message(folder, capsys):
    WRITERS["tree"]("like")
    entries = dict(small().state_dict())
    del entries["head.bias"]
    entries |= {"extra.weight": torch.ones(2, 3), "conv.weight": torch.ones(5, 3, 1, 1)}
    torch.save(entries, "in.pth")
    message = failing(capsys, "convert", "in.pth", "out", "--like", "like", "--dry-run")
    for part in (
        "missing: params/head/bias (4,)",
        "extra: extra.weight -> params/extra/kernel (3, 2)",
        "shape: conv.weight -> params/conv/kernel (1, 1, 3, 5), not (2, 3, 3, 5)",
    ):
        assert part in message
    assert message.count("error:") == 1


def test_usage():
    for arguments in ([], ["convert"], ["report", "in", "--no-such-option"], ["what"]):
        with pytest.raises(SystemExit) as info:
            run(*arguments)
        assert info.value.code == 2


# What is no checkpoint.


def half(path):
    """Cuts a file off, or the largest file in a folder."""
    path = pathlib.Path(path)
    if path.is_dir():
        path = max((p for p in path.rglob("*") if p.is_file()), key=os.path.getsize)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without(pattern):
    """Removes the files of a folder that match."""

    def remove(path):
        removed = list(pathlib.Path(path).glob(pattern))
        assert removed
        for file in removed:
            shutil.rmtree(file) if file.is_dir() else file.unlink()

    return remove


BROKEN = {
    "half a zip": ("in.pth", half, "as a checkpoint of torch (PytorchStreamReader"),
    "half a file": ("in.safetensors", half, "is no whole file of safetensors"),
    "half a tree": ("tree.msgpack", half, "as a checkpoint of msgpack"),
    "half an array": ("tree", half, "as a checkpoint of orbax"),
    "no arrays": ("tree", without("d/*"), "as a checkpoint of orbax"),
    "no data": ("tree", without("ocdbt.process_0/d/*"), "as a checkpoint of orbax"),
    "no manifest": ("tree", without("manifest.ocdbt"), "manifest.ocdbt is missing"),
    "no names": ("tree", without("_METADATA"), "metadata is missing or broken"),
    "nothing": ("tree", without("*"), "is a folder of 0 entries, none an orbax tree"),
}


@covering(1, kind=BROKEN, command=["convert", "report"])
def test_broken_checkpoints(kind, command, folder, capfd):
    source, damage, match = BROKEN[kind]
    if kind == "no data":  # of arrays too large to lie beside their names
        tree = {"params": {"kernel": np.arange(60000.0)}}
        save_orbax(source, tree)
    else:
        WRITERS[source](source)
    damage(source)
    before = contents(folder)
    target = ["out"] if command == "convert" else []
    assert run(command, source, *target) == 1
    printed = capfd.readouterr()  # what libraries print by themselves too
    assert printed.out == ""
    assert match in printed.err
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "in.pth is empty: expected a checkpoint of orbax, msgpack"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), r"it begins with b'\x89PNG\r\n\x1a\n'"),
        (b"these are words", "in.pth is a file that begins with b'these are'"),
        (b"\x80\x02}q\x00X\x01", "cannot be read as a checkpoint of torch"),
        (b"\x83\xa1a", "cannot be read as a checkpoint of msgpack"),
    ],
)
def test_other_files(content, match, folder, capsys):
    (folder / "in.pth").write_bytes(content)
    assert match in failing(capsys, "convert", "in.pth", "out")
    assert os.listdir() == ["in.pth"]


def test_files_of_other_packages(folder, capsys):
    tree = {"params": {"kernel": np.ones((3, 4))}}
    with open("in.pkl", "wb") as file:
        pickle.dump(tree, file)
    np.savez("in.npz", **tree["params"])
    message = failing(capsys, "convert", "in.pkl", "out")
    assert "in.pkl is a pickle that torch did not write: expected a check" in message
    assert "write it again: bnjax.convert.save_safetensors(tree, path)" in message
    message = failing(capsys, "report", "in.npz")
    assert "in.npz is a zip file that torch did not write, such as NumPy's" in message


def test_other_things_in_a_file(folder, capsys):
    torch.save({"model": prefixed(""), "args": argparse.Namespace(lr=1)}, "in.pth")
    message = failing(capsys, "convert", "in.pth", "out")
    assert "holds an object of argparse.Namespace" in message
    assert "weights_only=False" in message
    torch.save([torch.ones(2)], "in.pth")
    message = failing(capsys, "convert", "in.pth", "out")
    assert "holds a list: expected the entries of a state_dict" in message
    torch.save({"epoch": "three", "weight": torch.ones(2)}, "in.pth")
    message = failing(
        capsys, "convert", "in.pth", "out.st", "--to", "torch-safetensors"
    )
    assert "these entries are no arrays:\n  epoch: a str" in message
    torch.save({"epoch": 3, "weight": torch.ones(2)}, "in.pth")
    for options in ([], ["--dtype", "bfloat16"]):
        message = failing(capsys, "convert", "in.pth", "out", *options)
        assert "in.pth: these entries are no arrays:\n  epoch: a int" in message
    save_orbax("counts", {"step": np.array(3)})
    message = failing(capsys, "convert", "counts", "out.pth")
    assert "holds no arrays of floats" in message
    assert sorted(os.listdir()) == ["counts", "in.pth"]


# Targets that cannot be written.


@pytest.mark.parametrize("target", ["out", "out.msgpack", "out.safetensors"])
def test_targets(target, folder, capsys):
    WRITERS["in.pth"]("in.pth")
    (folder / "file").touch()
    message = failing(capsys, "convert", "in.pth", f"nowhere/{target}")
    assert "lies in nowhere, which is no folder" in message
    message = failing(capsys, "convert", "in.pth", f"file/{target}")
    assert "lies in file, which is no folder" in message
    message = failing(capsys, "convert", "in.pth", "out.h5")
    assert "has the suffix .h5, of which no format is known" in message
    assert run("convert", "in.pth", target) == 0
    capsys.readouterr()
    before = contents(folder)
    message = failing(capsys, "convert", "in.pth", target)
    assert f"{target} exists: expected a new path. Write --overwrite" in message
    assert contents(folder) == before
    assert run("convert", "in.pth", target, "--names", "=new", "--overwrite") == 0
    assert sorted(os.listdir()) == ["file", "in.pth", target]
    tree = _checkpoints.read(folder / target).tree
    assert tree["params"].keys() == {"new"}


@pytest.mark.parametrize("target", ["steps", "mine", ".", "../{name}"])
def test_folders_of_other_things_are_not_replaced(target, folder, capsys):
    WRITERS["in.pth"]("in.pth")
    save_steps("steps", variables())
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis").touch()
    before = contents(folder)
    target = target.format(name=folder.name)
    message = failing(capsys, "convert", "in.pth", target, "--overwrite")
    assert "is a folder of other things, which --overwrite does not remove" in message
    assert contents(folder) == before


@pytest.mark.parametrize("is_link", [False, True])
def test_a_folder_takes_the_place_of_a_file(is_link, folder, capsys):
    WRITERS["in.pth"]("in.pth")
    (folder / "file").write_text("old")
    os.symlink("file", "link")
    target = "link" if is_link else "file"
    assert run("convert", "in.pth", target, "--overwrite") == 0
    assert (folder / target / "_METADATA").is_file()
    assert sorted(os.listdir()) == ["file", "in.pth", "link"]
    assert (folder / "file").is_file() == is_link  # a link's file stays
    assert run("convert", "in.pth", target, "--to", "msgpack", "--overwrite") == 0
    assert _checkpoints.read(folder / target).format == "msgpack"
    capsys.readouterr()


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupted(*_, **__):
    raise KeyboardInterrupt


WRITES = {
    "out": (ocp.StandardCheckpointer, "save"),
    "out.msgpack": (pathlib.Path, "write_bytes"),
    "out.safetensors": (safetensors.numpy, "save_file"),
    "out.pth": (torch, "save"),
}


@covering(
    target=WRITES,
    when=["written", "moved", "made"],
    stop=[full_disk, interrupted],
    exists=[False, True],
)
def test_stopped_while_it_writes(
    target, when, stop, exists, folder, capsys, monkeypatch
):
    source = "tree" if target == "out.pth" else "in.pth"
    WRITERS[source](source)
    options = ["--overwrite"] if exists else []
    if exists:
        assert run("convert", source, target) == 0
        capsys.readouterr()
    before = contents(folder)
    if when == "written":
        place, name = WRITES[target]
        own = getattr(place, name)

        def written(*arguments, **options):
            own(*arguments, **options)  # all but the end, so to say
            stop()

        monkeypatch.setattr(place, name, written)
    elif when == "moved":
        own_replace, stops = os.replace, [stop]

        def replace(new, path):
            if stops and path == pathlib.Path(target):
                stops.pop()()
            own_replace(new, path)

        monkeypatch.setattr(os, "replace", replace)
    else:
        monkeypatch.setattr(tempfile, "mkdtemp", stop)
    status = {full_disk: 1, interrupted: 130}[stop]
    message = failing(capsys, "convert", source, target, *options, status=status)
    assert message.count("\n") == 1
    if stop is full_disk:
        assert f"{target} cannot be written: No space left on device" in message
    monkeypatch.undo()
    assert contents(folder) == before


# Reports.


def norms(**changes):
    """The variables with statistics that are as they should be, but for the changes."""
    tree = variables()
    tree["batch_stats"]["norm"] |= {k: jnp.asarray(v) for k, v in changes.items()}
    return tree


REPORTS = {
    "TrainState": lambda tree: save_orbax("in", state_of(tree)),
    "steps": lambda tree: save_steps("in", state_of(tree), "state"),
    "NNX": lambda tree: save_orbax("in", nnx_state(tree)),
    "safetensors": lambda tree: convert.save_safetensors(tree, "in"),
    "torch": lambda tree: torch.save(
        {n: torch.tensor(v) for n, v in convert.to_torch(tree).items()}, "in"
    ),
    "hub": lambda tree: convert.save_safetensors(convert.to_torch(tree), "in"),
}


@by_default("NNX", "torch", kind=[*REPORTS])
def test_report(kind, folder, capsys):
    REPORTS[kind](norms())
    assert run("report", "in", "--fail") == 0
    assert "1 layers, 0 findings" in capsys.readouterr().out
    shutil.rmtree("in") if os.path.isdir("in") else os.remove("in")
    REPORTS[kind](norms(var=[0.0, 1, 2, 3, 4], mean=[0.0, 1, jnp.nan, 3, 4]))
    assert run("report", "in") == 0
    printed = capsys.readouterr().out
    assert "1 layers, 2 findings" in printed
    assert "norm: dead: 1 of 5 channels (0)" in printed
    assert "norm: exploded: 1 of 5 channels (2)" in printed
    assert run("report", "in", "--fail") == 1
    assert str(bnjax.diagnostics.report(norms(var=[0.0, 1, 2, 3, 4]))) not in printed


def test_report_is_that_of_the_library(folder, capsys):
    tree = norms(var=[0.0, 1e-4, 2, 3, 4])
    convert.save_safetensors(tree, "in")
    for epsilon in (1e-5, 1e-2):
        assert run("report", "in", "--epsilon", epsilon) == 0
        expected = bnjax.diagnostics.report(tree, epsilon=epsilon)
        assert capsys.readouterr().out == f"{expected}\n"


def test_a_checkpoint_without_statistics(folder, capsys):
    convert.save_safetensors({"params": variables()["params"]}, "in")
    assert "holds no running statistics" in failing(capsys, "report", "in")


# The process.


def python(*arguments, **environment):
    root = pathlib.Path(bnjax.__file__).parents[1]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_python_m_bnjax(folder):
    """On one device, of a checkpoint that eight have written."""
    mesh = jax.make_mesh((8,), ("x",))
    everywhere = jax.NamedSharding(mesh, jax.P())
    save_orbax("tree", jax.device_put(variables(), everywhere))
    done = python("-m", "bnjax", "convert", "tree", "out.safetensors")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Wrote 8 arrays, 0.0 MB, to out.safetensors")
    assert done.stderr == ""
    half("tree")
    done = python("-m", "bnjax", "report", "tree")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"error: {folder}/tree cannot be read as a checkpoint" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("missing", ["tyro", "rich"])
def test_without_tyro(missing, capsys, monkeypatch):
    from bnjax import __main__

    own = __main__.importlib.util.find_spec
    monkeypatch.setattr(
        __main__.importlib.util,
        "find_spec",
        lambda name: None if name == missing else own(name),
    )
    assert __main__.main() == 1
    message = f"error: the command line needs {missing}: run pip install 'bnjax[cli]'."
    assert capsys.readouterr().err.strip() == message


@pytest.mark.parametrize(
    ("package", "source", "target", "match"),
    [
        ("torch", "in.pth", "out", "checkpoints of torch need torch"),
        ("torch", "tree.msgpack", "out.pth", "checkpoints of torch need torch"),
        ("orbax.checkpoint", "tree", "out.pth", "pip install orbax-checkpoint"),
        ("orbax.checkpoint", "tree.msgpack", "out", "pip install orbax-checkpoint"),
        ("safetensors", "in.safetensors", "out", "pip install safetensors"),
    ],
)
def test_packages_that_are_missing(
    package, source, target, match, folder, capsys, monkeypatch
):
    WRITERS[source](source)
    monkeypatch.setitem(sys.modules, package, None)
    options = ["--to", "orbax"] if target == "out" else []
    if "pth" not in target and "tree" in source:
        options = ["--to", "orbax"]
    before = contents(folder)
    assert match in failing(capsys, "convert", source, target, *options)
    assert contents(folder) == before

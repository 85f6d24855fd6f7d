"""Checkpoints of orbax, msgpack, safetensors and torch as trees of NumPy arrays.

The command line reads and writes them. A file is known by its first bytes, so that its
name may be any; a target by its suffix.
"""

import contextlib
import logging
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np

from bnjax import _files, convert
from bnjax.convert import _safetensors, _tree

FORMATS = ("orbax", "msgpack", "flax-safetensors", "torch", "torch-safetensors")
_SUFFIXES = {
    ".msgpack": "msgpack",
    ".safetensors": "safetensors",
    ".pt": "torch",
    ".pth": "torch",
    ".bin": "torch",
}
_STEP = re.compile(r"(?:.*_)?(\d+)")  # 1000, checkpoint_1000
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
_PREFIXES = {"module.": "DataParallel", "_orig_mod.": "torch.compile"}
_EXPECTED = "expected a checkpoint of orbax, msgpack, safetensors or torch"
_NO_CHECKPOINT = "{path} is {what}: " + _EXPECTED + ". {write}"
_UNREADABLE = (
    "{path} cannot be read as a checkpoint of {format} ({error}): expected a whole "
    "one. Copy or download it again."
)
_REWRITE = (
    "Load it in Python, and write it again: bnjax.convert.save_safetensors(tree, path)."
)
_SEVERAL = (
    "{path} holds several {what}: {found}. Expected one of them: write --at {first}."
)


class Checkpoint(NamedTuple):
    """What was read.

    Attributes:
        format: one of FORMATS.
        tree: nested dicts and lists of arrays; tensors by name if torch wrote it.
        notes: what was done to find it, in sentences.
    """

    format: str
    tree: Any
    notes: tuple[str, ...]


def is_torch(format: str) -> bool:
    """Whether its names are torch's."""
    return format.startswith("torch")


def format_of(path: Path, given: str | None, source: str) -> str:
    """The format in which a target is written.

    Args:
        path: the target.
        given: the format that the user names, if any.
        source: the format that is read. A file of safetensors holds the other names.
    """
    if given is not None:
        return given
    suffix = path.suffix.lower()
    format = _SUFFIXES.get(suffix, "orbax" if not suffix else None)
    if format is None:
        raise ValueError(
            f"{path} has the suffix {suffix}, of which no format is known: expected "
            f"none, for a folder of orbax, or {', '.join(_SUFFIXES)}. Name the format: "
            f"--to {'|'.join(FORMATS)}."
        )
    if format == "safetensors":
        return "flax-safetensors" if is_torch(source) else "torch-safetensors"
    return format


def check_target(path: Path, overwrite: bool) -> None:
    """Raises if `path` is taken, or has no folder to be written to.

    Only checkpoints are replaced: a user's folder of many things is not.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{path} lies in {path.parent}, which is no folder: expected one. Make it "
            "before."
        )
    if (path.exists() or path.is_symlink()) and not overwrite:
        raise FileExistsError(
            f"{path} exists: expected a new path. Write --overwrite to replace it."
        )
    if path.is_dir() and not _is_orbax_tree(path) and any(path.iterdir()):
        raise FileExistsError(
            f"{path} is a folder of other things, which --overwrite does not remove: "
            f"expected a checkpoint of orbax, or a new path. Write {path / 'new'}."
        )


def read(path: Path, at: str = "") -> Checkpoint:
    """Reads a checkpoint of any of the formats.

    Args:
        path: a file or a folder. Of the folder of orbax's CheckpointManager the newest
            step is read.
        at: where in the tree to look, with / between its levels.

    Raises:
        OSError: there is nothing, or it must not be read.
        ValueError: it is another thing, or cut off.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: {_EXPECTED}.")
    if path.is_dir():
        folder, note = _orbax_folder(path)
        found = Checkpoint("orbax", _read_orbax(folder), note)
    else:
        found = _read_file(path)
    tree = found.tree
    for level in filter(None, at.split("/")):
        if isinstance(tree, list):
            tree = {str(i): value for i, value in enumerate(tree)}
        if not isinstance(tree, Mapping) or level not in tree:
            has = list(map(str, tree)) if isinstance(tree, Mapping) else "arrays"
            raise ValueError(f"{path} has no {level!r} for --at {at}: it has {has}.")
        tree = tree[level]
    if is_torch(found.format):
        tree, notes = _state_dict_in(path, tree)
        return found._replace(tree=tree, notes=found.notes + notes)
    return found._replace(tree=tree)


def write(path: Path, format: str, tree: Any) -> None:
    """Writes a tree, whole or not at all.

    Args:
        path: of the file or folder. What is there is replaced.
        format: one of FORMATS.
        tree: nested dicts of arrays; by names, if the format is torch's.
    """
    arrays = jax.tree.map(np.asarray, tree)
    try:
        if format in ("flax-safetensors", "torch-safetensors"):
            _safetensors.write(arrays, path)
            return
        with _files.replacing(path) as new:
            if format == "orbax":
                _write_orbax(new, arrays)
            elif format == "msgpack":
                new.write_bytes(flax.serialization.to_bytes(arrays))
            else:
                _write_torch(new, arrays)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error


# Files.


def _read_file(path: Path) -> Checkpoint:
    with path.open("rb") as file:
        head = file.read(9)
    if head.startswith(
        (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    ):
        return Checkpoint("torch", _read_torch(path), ())
    if head[8:9] == b"{":
        tree = convert.load_safetensors(path)
        is_nested = any(isinstance(value, Mapping) for value in tree.values())
        return Checkpoint(("torch", "flax")[is_nested] + "-safetensors", tree, ())
    if head[:1] and (0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF)):
        try:
            tree = flax.serialization.msgpack_restore(path.read_bytes())
        except Exception as cause:  # msgpack and NumPy raise many
            error = f"it begins with {head[:8]!r}; {cause}"
            message = _UNREADABLE.format(path=path, format="msgpack", error=error)
            raise ValueError(message) from cause
        return Checkpoint("msgpack", tree, ())
    what = f"a file that begins with {head!r}" if head else "empty"
    raise ValueError(
        _NO_CHECKPOINT.format(path=path, what=what, write="Look at what the file is.")
    )


def _read_torch(path: Path) -> Any:
    torch = _torch()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if not any(name.endswith("data.pkl") for name in names):
            what = "a zip file that torch did not write, such as NumPy's .npz"
            message = _NO_CHECKPOINT.format(path=path, what=what, write=_REWRITE)
            raise ValueError(message)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # its readers of zip files and pickles raise many
        text = str(error)
        if other := re.search(r"(?:GLOBAL|Unsupported class|global) ([\w.]+)", text):
            raise ValueError(
                f"{path} holds an object of {other[1]}, and such objects may run any "
                "code as they are read: expected tensors in dicts. If you trust the "
                "file, write in Python: torch.save(torch.load(path, "
                "weights_only=False)['model'], new_path)."
            ) from error
        if "Unsupported operand" in text:
            what = "a pickle that torch did not write"
            message = _NO_CHECKPOINT.format(path=path, what=what, write=_REWRITE)
            raise ValueError(message) from error
        first = re.split(r"\.\s|\n", text)[0] or type(error).__name__
        message = _UNREADABLE.format(path=path, format="torch", error=first)
        raise ValueError(message) from error


def _write_torch(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    torch = _torch()

    def tensor(array: np.ndarray) -> Any:
        name = array.dtype.name
        if name == "bfloat16" or name.startswith("float8"):  # not NumPy's own
            bits = array.view(f"uint{8 * array.dtype.itemsize}")
            return torch.from_numpy(bits.copy()).view(getattr(torch, name))
        return torch.from_numpy(array.copy())

    torch.save({name: tensor(array) for name, array in arrays.items()}, path)


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "checkpoints of torch need torch, which is not installed. Run pip install "
            "torch, or take a file of safetensors."
        ) from error
    return torch


def _state_dict_in(path: Path, tree: Any) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The entries by name, without what training scripts and wrappers put around."""
    notes = []
    if not isinstance(tree, Mapping):
        raise ValueError(
            f"{path} holds a {type(tree).__name__}: expected the entries of a "
            "state_dict by name. Save net.state_dict()."
        )
    inner = {key: value for key, value in tree.items() if _is_state_dict(value)}
    if inner:
        named = [key for key in _WRAPPERS if key in inner] or list(inner)
        if named[0] not in _WRAPPERS and len(inner) > 1:
            found, first = ", ".join(map(str, inner)), named[0]
            raise ValueError(
                _SEVERAL.format(path=path, what="networks", found=found, first=first)
            )
        others = ", ".join(str(key) for key in tree if key != named[0])
        notes.append(f"Read {named[0]}" + f", and not {others}" * bool(others))
        tree = inner[named[0]]
    for prefix, wrapper in _PREFIXES.items():
        if tree and all(str(name).startswith(prefix) for name in tree):
            notes.append(f"Took {prefix!r} of {wrapper} off all names")
            tree = {name.removeprefix(prefix): value for name, value in tree.items()}
    arrays = {
        k: _tree.to_numpy(v) if hasattr(v, "dtype") else v for k, v in tree.items()
    }
    return arrays, tuple(notes)


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(hasattr(tensor, "dtype") for tensor in value.values())
    )


# Folders of orbax.


def _orbax() -> Any:
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError(
            "folders are checkpoints of orbax, which is not installed. Run pip install "
            "orbax-checkpoint."
        ) from error
    return orbax.checkpoint


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Keeps orbax from logging what it misses and does not need."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _orbax_folder(path: Path) -> tuple[Path, tuple[str, ...]]:
    """The folder of a tree: `path`, or in it the newest step or the only item."""
    if _is_orbax_tree(path):
        return path, ()
    folders = sorted(p for p in path.iterdir() if p.is_dir())
    steps = {p: int(m[1]) for p in folders if (m := _STEP.fullmatch(p.name))}
    if steps:
        newest = max(steps, key=lambda p: steps[p])
        folder, _ = _orbax_folder(newest)
        return folder, (f"Read {folder}, the newest of {len(steps)} steps",)
    items = [p for p in folders if _is_orbax_tree(p)]
    if len(items) > 1:
        found = ", ".join(map(str, items))
        raise ValueError(
            f"{path} holds several checkpoints: {found}. Expected the path of one."
        )
    if not items:
        what = f"a folder of {len(list(path.iterdir()))} entries, none an orbax tree"
        if any(".orbax-checkpoint-tmp" in p.name for p in (path, *folders)):
            what += "; orbax was stopped as it wrote here"
        write = "Pass the folder that has the file _METADATA."
        raise ValueError(_NO_CHECKPOINT.format(path=path, what=what, write=write))
    return items[0], (f"Read {items[0]}",)


def _is_orbax_tree(path: Path) -> bool:
    return any((path / name).is_file() for name in ("_METADATA", "manifest.ocdbt"))


def _read_orbax(folder: Path) -> Any:
    ocp, folder = _orbax(), folder.absolute()
    try:
        _check_whole(folder)
        with _without_warnings(), ocp.PyTreeCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(folder).item_metadata
            if metadata is None:
                raise ValueError("its metadata is missing or broken")
            # Arrays would ask for the devices of the machine that wrote them.
            as_numpy = jax.tree.map(
                lambda leaf: ocp.RestoreArgs(
                    restore_type=None if leaf.dtype is None else np.ndarray
                ),
                metadata.tree,
            )
            return checkpointer.restore(folder, restore_args=as_numpy)
    except Exception as error:  # orbax and tensorstore raise many
        first = str(error).splitlines()[0]
        message = _UNREADABLE.format(path=folder, format="orbax", error=first)
        raise ValueError(message) from error


def _check_whole(folder: Path) -> None:
    """Raises if a part of a checkpoint is missing or broken.

    orbax reads all arrays at once, and prints an error for each that it cannot.
    """
    if not (folder / "ocdbt.process_0").exists():
        return  # a folder of files for each array
    if not (folder / "manifest.ocdbt").exists():
        raise ValueError("manifest.ocdbt is missing")
    import tensorstore

    spec = {"driver": "ocdbt", "base": f"file://{folder}/"}
    store = tensorstore.KvStore.open(spec).result()
    for key in store.list().result():
        store.read(key).result()


def _write_orbax(path: Path, arrays: Any) -> None:
    ocp = _orbax()
    with _without_warnings(), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), arrays)


# The variables of a model in what was saved.


class Found(NamedTuple):
    """The collections of a model in a checkpoint.

    Attributes:
        variables: {"params": ..., "batch_stats": ...}, and what else there is.
        left_out: the number of arrays by the path of what is none of them.
        at: where they were.
    """

    variables: dict[str, Any]
    left_out: dict[str, int]
    at: str


def variables_in(path: Path, tree: Any) -> Found:
    """The variables in a tree: those of `init`, a TrainState, or an NNX model's State.

    Args:
        path: of the checkpoint, for messages.
        tree: what was read.
    """
    tree = _without_boxes(tree)
    level = {"": tree}
    while level:
        found = {at: node for at, node in level.items() if _has_collections(node)}
        if len(found) > 1:
            message = _SEVERAL.format(
                path=path,
                what="models",
                found=", ".join(found),
                first=next(iter(found)),
            )
            raise ValueError(message)
        if found:
            (at, node), *_ = found.items()
            while _has_collections(node["params"] if "params" in node else None):
                at, node = _join(at, "params"), node["params"]  # params=variables
            return _of_collections(at, node)
        level = {
            _join(at, key): inner
            for at, node in level.items()
            for key, inner in _children(node)
        }
    return _of_nnx(path, tree)


def _children(node: Any) -> list[tuple[str, Any]]:
    if isinstance(node, (list, tuple)):
        return [(str(i), value) for i, value in enumerate(node)]
    return [(str(k), v) for k, v in node.items()] if isinstance(node, Mapping) else []


def _join(*parts: str) -> str:
    return "/".join(filter(None, parts))


def _without_boxes(node: Any) -> Any:
    """The tree without {"value": array}: Flax saves boxes and NNX's variables so."""
    if isinstance(node, (list, tuple)):
        return [_without_boxes(value) for value in node]
    if not isinstance(node, Mapping):
        return node
    if set(node) == {"value"} and not isinstance(node["value"], (Mapping, list)):
        return node["value"]
    return {key: _without_boxes(value) for key, value in node.items()}


def _has_collections(node: Any) -> bool:
    """Whether it has parameters, which counters of random numbers are not."""
    if not isinstance(node, Mapping):
        return False
    parts = [node[name] for name in ("params", "batch_stats") if name in node]
    return any(isinstance(part, Mapping) and _are_learned(part) for part in parts)


def _are_learned(tree: Any) -> bool:
    return any(map(_is_inexact, jax.tree.leaves(tree)))


def _is_inexact(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and bool(jnp.issubdtype(dtype, jnp.inexact))


def _of_collections(at: str, node: Mapping[str, Any]) -> Found:
    variables = {
        str(name): tree
        for name, tree in node.items()
        if isinstance(tree, Mapping) and tree and name != "opt_state"
    }
    others = {name: len(jax.tree.leaves(node[name])) for name in {*node} - {*variables}}
    return Found(variables, {name: n for name, n in others.items() if n}, at)


def _of_nnx(path: Path, tree: Any) -> Found:
    """Collections of a State, where the variables of a layer lie together.

    A mean and a var are running statistics. Integers are the counters and keys of
    random numbers.
    """
    leaves = {
        jax.tree_util.keystr(keys, simple=True, separator="/"): leaf
        for keys, leaf in jax.tree.flatten_with_path(tree)[0]
    }
    statistics, params, left_out = {}, {}, {}
    for name, leaf in leaves.items():
        layer, _, last = name.rpartition("/")
        pair = {_join(layer, "mean"), _join(layer, "var")}
        if not _is_inexact(leaf) or "opt_state" in name.split("/"):
            left_out[name] = 1
        elif last in ("mean", "var") and pair <= leaves.keys():
            statistics[name] = leaf
        else:
            params[name] = leaf
    if not params and not statistics:
        raise ValueError(
            f"{path} holds no arrays of floats: expected the variables of a model."
        )
    variables = {"params": params, "batch_stats": statistics}
    nested = {name: _tree.nested(flat) for name, flat in variables.items() if flat}
    return Found(nested, left_out, "")

"""Files of safetensors: flat, as torch's are, or trees, as Flax has them."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax import _files, _trees
from bnjax.convert import _tree

# The dtypes of the format. The package itself reads no float8 into NumPy.
_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "F8_E4M3FNUZ": jnp.float8_e4m3fnuz,
    "F8_E5M2FNUZ": jnp.float8_e5m2fnuz,
    "F8_E8M0": jnp.float8_e8m0fnu,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
    "C64": np.complex64,
}
_NOT_INSTALLED = (
    "files of safetensors need the package of that name, which is not installed. Run "
    "pip install safetensors."
)
_UNREADABLE = (
    "{path} is no whole file of safetensors ({error}): expected one as it was written. "
    "Copy or download it again."
)
_NO_FILE = (
    "{path} {problem}: expected the path of a file, in a folder that exists. Write "
    "{example}."
)
_UNFIT = (
    "the tree does not fit a file of safetensors, and {path} was not written:{lines}\n"
    "Expected arrays under names without a /, which stands between the levels of a "
    "tree. Rename these entries, cast them with value.astype('float32'), or take them "
    "out."
)


def load_safetensors(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The arrays in a file of safetensors, as torch or Flax name them.

    A / in a name is a level of a tree, except in files of torch, which say so in their
    metadata: {"format": "pt"}. So the files of model hubs give the state_dict that
    `from_torch` takes, and those of `save_safetensors` what it was given.

    Args:
        path: of the file. The package safetensors reads it.

    Returns:
        NumPy arrays by name: by dotted names, or in nested dicts. All dtypes of JAX
        that the format has, bfloat16 and float8 too.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the file is cut off or is another one.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/model.safetensors"
    >>> save_safetensors({"params": {"norm": {"scale": jnp.ones(3)}}}, path)
    >>> print(load_safetensors(path))
    {'params': {'norm': {'scale': array([1., 1., 1.], dtype=float32)}}}

    References: huggingface/safetensors: README.md, "Format".
    """
    package, path = _package(), Path(path)
    try:
        found = package.deserialize(path.read_bytes())
        with package.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
    except package.SafetensorError as error:
        raise ValueError(_UNREADABLE.format(path=path, error=error)) from error
    problems = [
        f"{name}: {v['dtype']}, which NumPy does not have"
        for name, v in found
        if v["dtype"] not in _DTYPES
    ]
    is_flat = metadata.get("format") == "pt"
    if not is_flat:
        problems += _in_others([name for name, _ in found])
    if problems:
        lines = "".join(f"\n  {line}" for line in problems)
        raise ValueError(f"{path} does not fit NumPy arrays in nested dicts:{lines}")
    arrays = {
        name: np.frombuffer(v["data"], _DTYPES[v["dtype"]]).reshape(v["shape"])
        for name, v in found
    }
    return arrays if is_flat else _tree.nested(arrays)


def save_safetensors(tree: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes arrays to a file of safetensors, a tree with / between its levels.

    A state_dict of `to_torch` gets the metadata {"format": "pt"}, without which some
    readers of torch's files refuse them, a tree of Flax {"format": "flax"}. The file is
    there once it is whole; one of the same name is replaced, not before.

    Args:
        tree: arrays or tensors by name, or nested dicts of them. Lists become dicts.
            Metadata boxes of Flax (`nn.Partitioned`) are left out.
        path: of the file.

    Returns:
        None.

    Raises:
        ImportError: safetensors is not installed.
        IsADirectoryError: `path` is a folder.
        FileNotFoundError: the folder of `path` does not exist.
        ValueError: names that would not come back as they are, and dtypes that the
            format lacks; lists all of them.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/model.safetensors"
    >>> save_safetensors({"conv.weight": jnp.zeros((5, 3, 2, 4), jnp.bfloat16)}, path)
    >>> print({name: v.dtype.name for name, v in load_safetensors(path).items()})
    {'conv.weight': 'bfloat16'}

    References: huggingface/safetensors: README.md, "Format".
    """
    path = Path(path)
    _check_file(path)
    write(tree, path)


def write(tree: Any, path: Path) -> None:
    """As `save_safetensors`, but for a folder at `path`, which is replaced too."""
    package = _package()
    if not isinstance(tree, Mapping):
        raise TypeError(
            f"tree is of type {type(tree).__name__}: expected arrays by name. Write "
            "{'params': params, 'batch_stats': batch_stats}, or net.state_dict()."
        )
    tree = _trees.unboxed(tree)
    is_flat = not any(isinstance(v, (Mapping, list, tuple)) for v in tree.values())
    leaves, problems = ([*tree.items()], []) if is_flat else _named(tree)
    arrays: dict[str, np.ndarray] = {}
    known = {np.dtype(dtype) for dtype in _DTYPES.values()}
    for name, value in leaves:
        try:
            arrays[name] = array = _tree.to_numpy(value)
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        if array.dtype.newbyteorder("=") not in known:
            problems.append(f"{name}: {array.dtype}, which the format does not have")
    if problems:
        lines = "".join(f"\n  {line}" for line in problems)
        raise ValueError(_UNFIT.format(path=path, lines=lines))
    from safetensors.numpy import save_file

    # Version 0.8 takes the memory as it lies for the array, whatever its strides.
    arrays = {name: np.asarray(v, order="C") for name, v in arrays.items()}
    with _files.replacing(path) as new:
        new.touch()
        mode = new.stat().st_mode
        try:
            save_file(arrays, new, {"format": "pt" if is_flat else "flax"})
            new.chmod(mode)  # version 0.8 lets nobody else read it
        except package.SafetensorError as error:
            raise ValueError(f"{path} cannot be written: {error}") from error


def _package() -> ModuleType:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(_NOT_INSTALLED) from error
    return safetensors


def _check_file(path: Path) -> None:
    """Raises unless a file can be at `path`: a folder is never replaced."""
    if path.is_dir():
        example = repr(str(path / "model.safetensors"))
        problem = "is a folder"
        raise IsADirectoryError(
            _NO_FILE.format(path=path, problem=problem, example=example)
        )
    if not path.parent.is_dir():
        example = f"os.makedirs({str(path.parent)!r})"
        problem = "lies in a folder that does not exist"
        raise FileNotFoundError(
            _NO_FILE.format(path=path, problem=problem, example=example)
        )


def _named(tree: Any) -> tuple[list[tuple[str, Any]], list[str]]:
    """The leaves of a tree by path; and lines on paths that say something else."""
    leaves, problems = [], []
    for keys, leaf in jax.tree.flatten_with_path(tree)[0]:
        levels = [jax.tree_util.keystr((key,), simple=True) for key in keys]
        name = "/".join(levels)
        problems += [
            f"{name}: {level!r} is one name of the tree"
            for level in levels
            if "/" in level
        ]
        leaves.append((name, leaf))
    return leaves, problems


def _in_others(names: list[str]) -> list[str]:
    """Lines on names that are a level of the tree in others."""
    levels: set[str] = set()
    for name in names:
        parts = name.split("/")
        levels |= {"/".join(parts[:depth]) for depth in range(1, len(parts))}
    return [f"{name}: other entries lie in it" for name in names if name in levels]

"""The commands of `python -m bnjax`: report and convert, for checkpoints.

Errors end with status 1 and one message, of everything that is wrong; wrong options
with status 2. What is written is written whole, or not at all.
"""

import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bnjax import _checkpoints, diagnostics
from bnjax._checks import BatchNormWarning
from bnjax.convert import _entries, _tree, from_torch

_ADVICE = (
    "Here: --names conv1=Conv_0 or names.json, --kinds up=ConvTranspose2d or "
    "kinds.json, --like CHECKPOINT, --dtype float32."
)
_EXPECTED = ImportError, OSError, TypeError, ValueError
_PLAIN: Any = {"highlight": False, "markup": False, "soft_wrap": True}

Dtype = Literal["float32", "float64", "bfloat16", "float16"]
Format = Literal["orbax", "msgpack", "flax-safetensors", "torch", "torch-safetensors"]
Pairs = Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE.json|KEY=VALUE")]


def report(
    checkpoint: Annotated[Path, tyro.conf.arg(metavar="CHECKPOINT")],
    /,
    *,
    at: str = "",
    epsilon: float = 1e-5,
    fail: bool = False,
) -> int:
    """What is wrong with the statistics of a model, how bad it is, and what cures it.

    Looks for statistics that were never updated, for exploded and dead channels and for
    scales near zero. Reads checkpoints of Flax and of torch: a folder of orbax, or of
    its CheckpointManager, of which it takes the newest step; or a file of msgpack,
    safetensors or torch.

    Args:
        checkpoint: the folder or file.
        at: where in it the model is, if it holds several: state, ema/params.
        epsilon: the epsilon of the layers.
        fail: end with status 1 if anything is found.
    """
    found = _checkpoints.read(checkpoint, at)
    variables, _, notes = _weights_in(checkpoint, found)
    if _checkpoints.is_torch(found.format):
        variables = from_torch(variables)
    if "batch_stats" not in variables:
        raise ValueError(
            f"{checkpoint} holds no running statistics: expected a mean and a var, in "
            "the collection batch_stats or in a layer of an NNX model."
        )
    result = diagnostics.report(variables, epsilon=epsilon)
    console = _console()
    _print_notes(console, notes)
    console.print(result if console.is_terminal else str(result), **_PLAIN)
    return int(fail and bool(result))


def convert(
    source: Annotated[Path, tyro.conf.arg(metavar="SOURCE")],
    target: Annotated[Path, tyro.conf.arg(metavar="TARGET")],
    /,
    *,
    names: Pairs = (),
    kinds: Pairs = (),
    like: Path | None = None,
    at: str = "",
    dtype: Dtype | None = None,
    to: Format | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
) -> int:
    """Converts a checkpoint of torch to one of Flax, or back, or to another format.

    Names and axes change as in bnjax.convert.from_torch and to_torch. A checkpoint of
    torch is a state_dict, one of Flax a tree with params and batch_stats. What is
    written follows from the suffix of TARGET: none, a folder of orbax; .msgpack;
    .safetensors; .pt, .pth or .bin, a file of torch. A file of safetensors gets torch's
    names if SOURCE is of Flax, and Flax's if it is of torch.

    The keys of --names are torch's modules, or prefixes of them, and have to cover all
    of them: layer1.0=Block_0; the empty prefix, =encoder, does. Without --names torch's
    names stay. Layers that look like others need --kinds: up=ConvTranspose2d. Both
    take pairs or a JSON file of them.

    Args:
        source: what to read, as in report.
        target: what to write.
        names: torch's modules and Flax's.
        kinds: torch's modules and their classes.
        like: a checkpoint that the result has to match in names, shapes, dtypes.
        at: where in SOURCE the model is, if it holds several.
        dtype: cast floats to it.
        to: the format of TARGET, if its suffix does not tell.
        dry_run: print what would happen to each entry, and write nothing.
        overwrite: replace TARGET if it exists.
    """
    _checkpoints.check_target(target, overwrite)
    tables = {"names": _pairs("names", names), "kinds": _pairs("kinds", kinds)}
    found = _checkpoints.read(source, at)
    format = _checkpoints.format_of(target, to, found.format)
    tree, left_out, notes = _weights_in(source, found)
    arrays = _tree.flat(tree)
    _check_arrays(source, arrays)
    if dtype is not None:
        tree = _cast(tree, dtype)
    if _checkpoints.is_torch(found.format) == _checkpoints.is_torch(format):
        _check_unused(source, found.format, format, names=names, kinds=kinds, like=like)
        converted = _copied(tree)
    else:
        example = None if like is None else _example(like, format)
        try:
            converted = _converted(tree, format, tables, example)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{error}\n{_ADVICE}") from error
    rows = [
        row._replace(before=_entries.shape_of(arrays[row.source]))
        if row.source in arrays
        else row
        for row in converted.rows
    ]
    if not dry_run:
        _checkpoints.write(target, format, converted.tree)
    console = _console()
    _print_notes(console, notes)
    if dry_run:
        console.print(_table(console, rows, left_out))
    console.print(_summary(converted, target, format, dry_run), **_PLAIN)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command, and returns the exit status.

    Args:
        arguments: what is written behind `python -m bnjax`; None for that of sys.argv.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", BatchNormWarning)
            warnings.showwarning = _print_warning
            return tyro.extras.subcommand_cli_from_dict(
                {"report": report, "convert": convert},
                prog="python -m bnjax",
                description="Batch normalization for JAX: tools for checkpoints.",
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    except _EXPECTED as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _weights_in(
    source: Path, found: _checkpoints.Checkpoint
) -> tuple[Any, dict[str, int], tuple[str, ...]]:
    """The weights of a model; the numbers of arrays of what else there is; notes."""
    if _checkpoints.is_torch(found.format):
        return found.tree, {}, found.notes
    model = _checkpoints.variables_in(source, found.tree)
    place = (f"Read the model at {model.at}",) if model.at else ()
    return model.variables, model.left_out, found.notes + place


def _example(like: Path, format: str) -> Any:
    """What a conversion to this format has to match."""
    found = _checkpoints.read(like)
    if _checkpoints.is_torch(found.format) != _checkpoints.is_torch(format):
        expected = "torch" if _checkpoints.is_torch(format) else "Flax"
        raise ValueError(
            f"--like {like} is a checkpoint of the format {found.format}: expected one "
            f"of the model that is converted to, in {expected}."
        )
    return _weights_in(like, found)[0]


def _converted(
    tree: Any, format: str, tables: Mapping[str, Mapping[str, str]], like: Any
) -> _entries.Converted:
    """The tree with the names, axes and statistics of the other package."""
    names, kinds = tables["names"] or None, tables["kinds"]
    if _checkpoints.is_torch(format):
        count = np.array(0, np.int64)
        return _entries.to_state_dict(tree, names, kinds, like, count)
    return _entries.to_flax_variables("torch", tree, names, kinds, like)


def _copied(tree: Any) -> _entries.Converted:
    """The tree as it is."""
    shapes = {k: _entries.shape_of(leaf) for k, leaf in _tree.flat(tree).items()}
    rows = (_entries.Row(path, s, path, s, "") for path, s in shapes.items())
    return _entries.Converted(tree, tuple(rows))


def _cast(node: Any, dtype: str) -> Any:
    """The tree with its floats in another dtype."""
    if isinstance(node, Mapping):  # in its own order
        return {name: _cast(value, dtype) for name, value in node.items()}
    if not hasattr(node, "dtype") or not jnp.issubdtype(node.dtype, jnp.floating):
        return node
    return node.astype(jnp.dtype(dtype))


def _check_arrays(source: Path, leaves: Mapping[str, Any]) -> None:
    """Raises on counters, words and the like, which have no shape and no dtype."""
    lines = "".join(
        f"\n  {path}: a {type(leaf).__name__}"
        for path, leaf in leaves.items()
        if not hasattr(leaf, "dtype")
    )
    if lines:
        raise ValueError(
            f"{source}: these entries are no arrays:{lines}\nExpected arrays "
            "alone. Take these entries out."
        )


# Options.


def _pairs(option: str, values: Sequence[str]) -> dict[str, str]:
    """The pairs of an option: KEY=VALUE, or a JSON file of many."""
    pairs: dict[str, str] = {}
    for value in values:
        key, equals, item = value.partition("=")
        new = {key: item} if equals else _read_pairs(option, Path(value))
        if twice := sorted(new.keys() & pairs.keys()):
            raise ValueError(f"--{option} has {twice} twice: expected each once.")
        pairs |= new
    return pairs


def _read_pairs(option: str, path: Path) -> dict[str, str]:
    example = {"names": "conv1=Conv_0", "kinds": "up=ConvTranspose2d"}[option]
    if not path.is_file():
        raise FileNotFoundError(
            f"--{option} {path} is no file, and no pair: expected a JSON file, or "
            f"pairs. Write --{option} {example}."
        )
    key, _, value = example.partition("=")
    expected = f'expected {{"{key}": "{value}", ...}}'
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): {expected}.") from error
    if not isinstance(pairs, dict):
        raise ValueError(f"{path} holds a {type(pairs).__name__}: {expected}.")
    wrong = {key: value for key, value in pairs.items() if not isinstance(value, str)}
    if wrong:
        raise ValueError(f"{path} has the values {wrong}: {expected}, with strings.")
    return pairs


def _check_unused(source: Path, read: str, written: str, **options: Any) -> None:
    """Raises on options of a conversion where nothing is converted."""
    given = ", ".join(f"--{name}" for name, value in options.items() if value)
    if given:
        raise ValueError(
            f"{given}: expected a conversion between torch and Flax, but {source} "
            f"({read}) and the target ({written}) have the same names. Leave "
            "them out, or name another format with --to."
        )


# What is printed.


def _console() -> Console:
    console = Console()
    if not console.is_terminal:
        console.width = 1000  # a line for each row, for other programs
    return console


def _print_notes(console: Console, notes: Sequence[str]) -> None:
    for note in notes:
        console.print(f"{note}.", **_PLAIN)


def _print_warning(message: Any, *_: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _table(
    console: Console, rows: Sequence[_entries.Row], left_out: Mapping[str, int]
) -> Table:
    """A row for each entry, and for what is no part of the model.

    What an entry becomes stands below it on a terminal, where long names have no room
    beside each other, and behind it for other programs.
    """
    becomes = "\n" if console.is_terminal else " -> "
    table = Table(box=box.SIMPLE_HEAD, row_styles=["", "dim"], padding=(0, 1, 0, 0))
    table.add_column("entry", overflow="fold", min_width=min(35, console.width // 2))
    for name in ("shape", "dtype", "what"):
        table.add_column(name, overflow="fold")
    for row in rows:
        states = [state for state in (row.before, row.after) if state is not None]
        cells = (
            filter(None, (row.source, row.target)),
            ("x".join(map(str, state.shape)) or "()" for state in states),
            (state.dtype.name for state in states),
            (_what(row),),
        )
        table.add_row(*(escape(becomes.join(dict.fromkeys(cell))) for cell in cells))
    for path, count in left_out.items():
        arrays = "array" if count == 1 else f"{count} arrays"
        table.add_row(escape(path), "", "", f"left out: {arrays}, not of the model")
    return table


def _what(row: _entries.Row) -> str:
    """What happens to an entry."""
    what = row.what
    if not what and row.before is not None and row.after is not None:
        is_moved = row.source != row.target
        what = "renamed" if is_moved else "as it is"
        what = what if row.before.shape == row.after.shape else "reshaped"
    if row.before is None or row.after is None or row.before.dtype == row.after.dtype:
        return what
    return f"{what}, cast"


def _summary(
    converted: _entries.Converted, target: Path, format: str, dry_run: bool
) -> str:
    """What was written, in one sentence."""
    leaves = jax.tree.leaves(converted.tree)
    size = sum(leaf.nbytes for leaf in leaves) / 1e6
    verb = "Would write" if dry_run else "Wrote"
    return f"{verb} {len(leaves)} arrays, {size:.1f} MB, to {target} ({format})."

"""Which libraries can be measured here, and their versions."""

import importlib.metadata
import importlib.util
from collections.abc import Iterable

import jax

DISTRIBUTIONS = {  # pip's names of the rivals, in the order of the table
    "flax": "flax",
    "haiku": "dm-haiku",
    "equinox": "equinox",
    "keras": "keras",
    "torch": "torch",
    "torch.compile": "torch",
}


def missing(names: Iterable[str]) -> dict[str, str]:
    """Which of these cannot be measured, and why."""
    reasons = {}
    for name in names:
        if importlib.util.find_spec(name.split(".")[0]) is None:
            reasons[name] = f"{DISTRIBUTIONS[name]} is not installed"
        elif name.startswith("torch") and jax.default_backend() != "cpu":
            reasons[name] = "compared on the CPU only"
        elif name == "torch.compile" and (error := _compile_error()):
            reasons[name] = error
    return reasons


def _compile_error() -> str | None:
    """Why torch.compile does not work: most often, there is no C++ compiler."""
    torch = importlib.import_module("torch")
    try:
        torch.compile(torch.sin)(torch.ones(2))
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    return None


def versions(names: Iterable[str]) -> dict[str, str]:
    """Of the libraries, by pip's names."""
    return {d: importlib.metadata.version(d) for d in {DISTRIBUTIONS[n] for n in names}}

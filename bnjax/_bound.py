"""Functions with fixed keyword arguments, as values."""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Bound:
    """A function of a module with fixed keyword arguments.

    Unlike a closure it can be pickled. Unlike a partial it equals another of the same
    function and settings, so that jit compiles once for it as a static argument.
    """

    function: Callable[..., Any]
    settings: tuple[tuple[str, Any], ...]

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.function(*args, **dict(self.settings), **options)


def bind(function: Callable[..., Any], **settings: Any) -> Bound:
    """`function` with these keyword arguments."""
    return Bound(function, tuple(settings.items()))

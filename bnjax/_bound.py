"""Functions with settings, as values."""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Bound:
    """A function of a module, and the keyword arguments that are set already.

    Unlike a closure it can be pickled, and unlike a partial it equals another of the
    same function and settings: as a static argument of jit it compiles once.
    """

    function: Callable[..., Any]
    settings: tuple[tuple[str, Any], ...]

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.function(*args, **dict(self.settings), **options)


def bind(function: Callable[..., Any], **settings: Any) -> Bound:
    """`function` with these keyword arguments."""
    return Bound(function, tuple(settings.items()))

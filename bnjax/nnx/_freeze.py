"""Layers that evaluate while the rest of the model trains."""

from typing import Any

from flax import nnx

from bnjax import _trees
from bnjax.nnx._batch_norm import Normalization

_FLAXS = (
    "{path} is a flax.nnx.BatchNorm, which has no setting that train() leaves alone: "
    "expected layers of bnjax.nnx. Build the model with bnjax.nnx.BatchNorm, which "
    "loads the same state, or name the others by other patterns."
)


def freeze(model: nnx.Module, *patterns: str, frozen: bool = True) -> tuple[str, ...]:
    """Freezes the normalization layers of a part of a model, until told otherwise.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias,   mean, var as they are

    Sets `frozen` of these layers, in place: their running statistics are used and not
    written, whatever `model.train()`, `set_attributes(use_running_average=False)` or
    the call say. Scale and bias are parameters still: keep them from the optimizer by
    `bnjax.training.freeze_mask`. For a while, `nnx.view(model, frozen=True)`.

    Args:
        model: with layers of `bnjax.nnx`, or such a layer.
        *patterns: of paths of layers such as "encoder/norm_1", as of a shell; * stands
            for any characters, / among them: "encoder/*". None for all layers.
        frozen: False to undo it.

    Returns:
        The paths of the layers that were set.

    Raises:
        TypeError: a pattern that matches a BatchNorm of Flax's.
        ValueError: a pattern that matches no layer.

    >>> from bnjax.nnx import BatchNorm
    >>> layers = [BatchNorm(3, rngs=nnx.Rngs(i)) for i in range(2)]
    >>> model = nnx.Sequential(*layers)
    >>> print(freeze(model, "layers/0"))
    ('layers/0',)
    >>> model.train()
    >>> print(model.layers[0].frozen, model.layers[1].frozen)
    True False

    References: Wu & Johnson 2021, section 4 (FrozenBN).
    """
    found: dict[str, Any] = {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, (Normalization, nnx.BatchNorm))
    }
    chosen = sorted(_trees.matching(patterns or ("*",), {*found}, "pattern"))
    for path in chosen:
        if not isinstance(found[path], Normalization):
            raise TypeError(_FLAXS.format(path=path or "the model"))
    for path in chosen:
        found[path].frozen = frozen
    return tuple(chosen)

"""The result of folding a model."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.errors
import jax

from bnjax.fold._graph import Pairs, Path, Program
from bnjax.fold._layers import Inputs


class Folded(NamedTuple):
    """A model whose batch normalization is in the layers before it.

    Attributes:
        apply: (params, *inputs) -> what the model returns. The keyword arguments that
            hold no array are those that it was folded with.
        params: a nested dictionary of arrays.
        folded: (linear layer, normalization) for each pair that has become one.
        kept: (normalization, reason) for each that has not.
    """

    apply: Callable[..., Any]
    params: Any
    folded: tuple[tuple[str, str], ...]
    kept: tuple[tuple[str, str], ...]


def finished(
    apply: Callable[..., Any],
    params: Any,
    inputs: Inputs,
    program: Program,
    pairs: Pairs,
    left: Mapping[Path, str],
) -> Folded:
    """The result, once `apply` is seen to return what the model does."""

    def run(params, arrays):
        arguments, keywords = inputs.fill(arrays)
        return apply(params, *arguments, **keywords)

    try:
        outputs = jax.eval_shape(run, params, inputs.arrays)
    except (flax.errors.FlaxError, AttributeError, KeyError) as error:
        raise ValueError(
            f"the folded model does not run ({error}): expected a model in which only "
            "a normalization itself reads its statistics and parameters. Keep what "
            "else the model reads in a variable of another layer."
        ) from error
    if _described(outputs) != _described(program.outputs):
        raise ValueError(
            f"the folded model returns {outputs}: expected {program.outputs}, what the "
            "model returns. Fold it without `mutable` and the like."
        )
    names = {path: "/".join(path) for path in program.recorder.norms}
    folded = [("/".join(pairs.folded[p].path), names[p]) for p in pairs.folded]
    reasons = {**pairs.kept, **left}
    kept = [("/".join(path), reason) for path, reason in reasons.items()]
    return Folded(apply, params, tuple(folded), tuple(kept))


def _described(outputs: Any) -> Any:
    leaves, tree = jax.tree.flatten(outputs)
    return [(leaf.shape, leaf.dtype) for leaf in leaves], tree

"""Other layers in the place of those of a model that somebody else has written."""

import contextlib
import dataclasses
import fnmatch
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax.core import Scope

from bnjax import _checks, _replacement, whiten
from bnjax._replacement import Replacement, class_name
from bnjax.linen._batch_norm import BatchNorm, Normalization, asks_for
from bnjax.moments import Moments, merge


@dataclasses.dataclass(frozen=True)
class _Rule:
    """What replaces which layers; equal rules trace equal programs."""

    layer: type[Normalization]
    where: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]

    def matches(self, path: str) -> bool:
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in self.where)


_FLAX_CALL = inspect.unwrap(nn.BatchNorm.__call__)

# The rules in force, the outermost first. A user context is part of the key of JAX's
# caches of traced and compiled programs, and each thread has its own.
_rules = jax.make_user_context(())

_LAYER = (
    "layer={layer!r}: expected a class of bnjax.linen such as BatchNorm, a subclass of "
    "one, or a functools.partial of it with keywords alone."
)
_HASHABLE = (
    "{option}={value!r} is not hashable: expected what can be a part of the key of "
    "jit's cache. Write a tuple for a list, and float(x) for an array."
)
_AMONG_STATS = (
    "replacing_batch_norm stored the Moments of {path} among its batch_stats, because "
    "a lifted transform around it does not name batch_moments. Where the transform "
    "carries or broadcasts batch_stats, or stacks them along another axis than the "
    "first, that is an error. Leave batch_moments out of mutable, or name it in the "
    "variable_axes of the transform: 'batch_moments': 0."
)
_NO_MATCH = (
    "where={pattern!r} has matched none of the layers that were called: {paths}. * "
    "stands for any characters, / among them."
)


@contextlib.contextmanager
def replacing_batch_norm(
    layer: Callable[..., Normalization] = BatchNorm,
    *,
    where: str | Sequence[str] = "*",
    **options: Any,
) -> Iterator[dict[str, Replacement]]:
    """Runs each `flax.linen.BatchNorm` of a model as a layer of bnjax.

    The source of the model stays as it is. `init` and `apply` inside of the context
    have the variables, names and arguments of the old layers (of `layer`, if it has
    others, as SplitBatchNorm). Layers are found wherever they are called: below
    `nn.remat`, `nn.scan` and `nn.vmap`, in a `functools.partial`, as classes in a
    field, and as `super().__call__` of a subclass.

        with replacing_batch_norm(axis_name="batch"):
            y, updates = model.apply(variables, x, mutable=["batch_stats"])

    It decorates a function, too, which then replaces whenever it is called:

        apply_fn = replacing_batch_norm()(model.apply)

    The rules are a part of the key of JAX's caches: a function that was compiled
    outside of the context is traced anew inside of it, and the other way round. They
    compare by equality: a lambda that is made anew for each entry is traced anew. They
    hold in the thread that has entered the context. Contexts can be nested; the
    innermost one whose `where` matches a layer replaces it. A program that was lowered
    (`jax.jit(f).lower(...)`) keeps the layers that it was lowered with.

    Args:
        layer: a class of `bnjax.linen`, or a `functools.partial` of one.
        where: shell patterns for the paths of layers, such as "encoder/*"; * matches
            any characters, also /.
        **options: arguments of `layer`, such as `virtual_batch_size=32`, that take
            precedence over those of the old layers. `axis_name="batch"` lets layers
            that were written for one device share statistics.

    Returns:
        A context manager. Its value has a Replacement for the path of each layer that
        was called, except by programs that were compiled before.

    Raises:
        TypeError: another `layer`, or one that does not take `options`; an option that
            is not hashable.
        ValueError: an option that would change variables, the feature axis or the mode.

    Warns:
        BatchNormWarning: a pattern that matched none of the layers that were called.

    >>> import jax.numpy as jnp
    >>> model = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=False)])
    >>> with replacing_batch_norm() as found:
    ...     variables = model.init(jax.random.key(0), jnp.zeros((5, 3)))
    >>> print(found["layers_1"].before, found["layers_1"].after)
    flax.linen.BatchNorm bnjax.linen.BatchNorm

    References: flax.linen.intercept_methods; PyTorch's
    `torch.nn.SyncBatchNorm.convert_sync_batchnorm`.
    """
    layer, options = _replacement.without_partial(layer, options)
    if not (isinstance(layer, type) and issubclass(layer, Normalization)):
        raise TypeError(_LAYER.format(layer=layer))
    _replacement.check_options(options, layer)
    for option, value in options.items():
        try:
            hash(value)
        except TypeError:
            raise TypeError(_HASHABLE.format(option=option, value=value)) from None
    patterns = (where,) if isinstance(where, str) else tuple(where)
    rule = _Rule(layer, patterns, tuple(sorted(options.items())))
    _like(nn.BatchNorm(parent=None), rule, parent=None)  # raises on wrong options
    outer, found = _rules.value, {}
    intercept = _interceptor(rule, len(outer), found)
    with _rules((*outer, rule)), nn.intercept_methods(intercept):
        yield found
    for pattern in patterns:
        if found and not any(fnmatch.fnmatchcase(path, pattern) for path in found):
            message = _NO_MATCH.format(pattern=pattern, paths=", ".join(found))
            warnings.warn(message, _checks.BatchNormWarning, stacklevel=3)


def _interceptor(rule: _Rule, depth: int, found: dict[str, Replacement]):
    """An interceptor for `nn.intercept_methods` that follows one rule.

    Args:
        rule: the rule.
        depth: its place among the rules in force.
        found: gets a Replacement for each layer that is called.
    """
    moments_wanted = False  # by a caller around this call
    among_stats = ""  # the path of a layer that stores its Moments there

    def intercept(run, args, kwargs, context):
        nonlocal moments_wanted, among_stats
        module = context.module
        if not moments_wanted and asks_for("batch_moments", module.scope):
            moments_wanted, among_stats = True, ""
            try:
                y = replace(run, args, kwargs, context)
            except Exception as error:
                if among_stats:
                    error.add_note(_AMONG_STATS.format(path=among_stats))
                raise
            finally:
                moments_wanted = False
            _move_moments(module.scope)
            return y
        return replace(run, args, kwargs, context)

    def replace(run, args, kwargs, context):
        nonlocal among_stats
        old = context.module
        method = getattr(context.orig_method, "func", None)
        if method is not _FLAX_CALL or old.scope is None:
            return run(*args, **kwargs)
        path = "/".join(old.path)
        if any(inner.matches(path) for inner in _rules.value[depth + 1 :]):
            new, reason = None, "an inner context replaces it"
        elif not rule.matches(path):
            new, reason = None, "where does not match it"
        else:
            new, reason = _like(old, rule, parent=old.scope), ""
        after = None if new is None else class_name(new)
        found[path] = Replacement(path, class_name(old), after, reason)
        if new is None:
            return run(*args, **kwargs)
        if moments_wanted and not asks_for("batch_moments", new.scope):
            among_stats = path
            object.__setattr__(new, "moments_collection", "batch_stats")
        return _call_instead(new, old, *args, **kwargs)

    return intercept


# A model that somebody else wrote does not name batch_moments in the variable_axes of
# its nn.vmap and nn.scan. Below these the Moments are stored among the batch_stats,
# which it does name, and are moved when the call of the whole model returns. (Not if
# the whole model is one nn.vmap: Flax does not let its call be intercepted.)


def _move_moments(scope: Scope) -> None:
    """Moves Moments from `batch_stats` to the same places in `batch_moments`."""
    if scope.is_mutable_collection("batch_stats"):
        # No public method of a scope removes a variable.
        stats = scope._mutable_collection("batch_stats")
        _unite(scope._mutable_collection("batch_moments"), _take_moments(stats))


def _take_moments(stats: dict[str, Any]) -> dict[str, Any]:
    """Removes all Moments from a tree of dictionaries; returns the tree of them."""
    taken = {}
    if isinstance(stats.get("moments"), Moments | whiten.CoMoments):
        taken["moments"] = stats.pop("moments")  # a name that authors use, too
    for name, child in stats.items():
        if isinstance(child, dict) and (below := _take_moments(child)):
            taken[name] = below
    return taken


def _unite(moments: dict[str, Any], others: Mapping[str, Any]) -> None:
    """Adds the Moments of another tree; those of several calls are merged."""
    for name, other in others.items():
        if isinstance(other, Mapping):
            _unite(moments.setdefault(name, {}), other)
        elif name in moments:
            united: Any = merge if isinstance(other, Moments) else whiten.merge
            moments[name] = united(moments[name], other)
        else:
            moments[name] = other


def _like(old: nn.BatchNorm, rule: _Rule, *, parent: Any) -> Normalization:
    """A layer by the rule with the arguments of `old`; `parent` holds its variables."""
    names = {field.name for field in dataclasses.fields(rule.layer)}
    names &= {field.name for field in dataclasses.fields(nn.BatchNorm)}
    arguments = {name: getattr(old, name) for name in names - {"parent", "name"}}
    return rule.layer(parent=parent, **(arguments | dict(rule.options)))


# Flax's summaries note each call, and there is no public way to call unnoted.
_unnoted = getattr(nn.module, "_tabulate_context", contextlib.nullcontext)


def _call_instead(new: Normalization, old: nn.BatchNorm, /, *args, **kwargs) -> Any:
    """Calls `new`, of the same scope, in a call of `old`.

    Here one call of a layer is two for Flax, which captures the result of each and
    notes each in summaries. Those of `new` are taken back.
    """
    place = "intermediates", "__call__"
    before = old.get_variable(*place, ())
    with _unnoted():
        y = new(*args, **kwargs)
    if old.get_variable(*place, ()) is not before:
        old.put_variable(*place, before)
    return y

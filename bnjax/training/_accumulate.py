"""Gradient accumulation with exact statistics."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bnjax import _dtypes, _trees
from bnjax.moments import Moments, merge, merged_rows
from bnjax.running import Rule, State

_RULE = (
    "rule={received!r} keeps its averages in {state}, which batch_stats cannot hold: "
    "expected a rule of mean and var alone. Write rule=bnjax.running.ema(momentum), "
    "with the momentum of the layers."
)


class Accumulated(NamedTuple):
    """What `accumulate` returns.

    Attributes:
        loss: the mean of the micro-batches' losses.
        grads: the mean of their gradients, of the structure of the parameters.
        batch_stats: the running statistics after one update.
        output: what the model has returned, of each micro-batch, along a leading axis;
            None if the loss function returned the Moments alone.
        pool: the Moments that the update was made from, by layer.
    """

    loss: jax.Array
    grads: Any
    batch_stats: Any
    output: Any
    pool: dict[str, Moments]


def accumulate(
    loss_fn: Callable[[Any, Any], tuple[jax.Array, Any]],
    variables: Mapping[str, Any],
    batches: Any,
    *,
    rule: Rule,
    keep: Sequence[str] = (),
    pool: Mapping[str, Moments] | None = None,
) -> Accumulated:
    """Gradients of micro-batches, and one running update from all of their statistics.

        loss = (1/K) sum_k loss_k,   grads = (1/K) sum_k grads_k,
        batch_stats <- rule.update(batch_stats, merge of the K Moments)

    Each micro-batch is normalized by its own statistics: the gradients are those of
    ghost batch normalization of the whole batch, in groups of a micro-batch. The
    running update is that of the whole batch, with the variance of the micro-batches'
    means. An update per micro-batch would leave that out, and decay K times.

    Args:
        loss_fn: (variables, micro-batch) -> (loss, result); result is what the model's
            `apply` returns with `mutable=["batch_stats", "batch_moments"]`, or the tree
            below `batch_moments`. The loss is a mean over the micro-batch.
        variables: {"params", "batch_stats"} and whatever else the model has.
        batches: a tree of arrays with the micro-batches along their leading axis,
            (K, batch / K, ...); keys of `jax.random.split(key, K)`, too. To split a
            batch that lies on several devices, so that each has its part of all
            micro-batches: `x.reshape(-1, K, *x.shape[1:]).swapaxes(0, 1)`.
        rule: the running update, `bnjax.running.ema(momentum)`, or with `ddof=1` for
            layers with `unbiased=True`. The momentum of a layer is not among its
            variables, so it is named here.
        keep: patterns of the paths of layers whose statistics are not updated.
        pool: `pool` of the calls before this one since the last step of the optimizer,
            which are counted in; see the example for `optax.MultiSteps` below.

    Returns:
        Accumulated(loss, grads, batch_stats, output, pool).

    Raises:
        TypeError: `loss_fn` returns no Moments.
        ValueError: a layer that left no Moments, or one of other shapes than
            `batch_stats` has; a rule that keeps more than mean and var.

    With `optax.MultiSteps`, one update per step of the optimizer, from the pool since:

        found = accumulate(loss_fn, state.variables, batches, rule=rule, pool=pool)
        new = state.apply_gradients(grads=found.grads)
        stepped = tx.has_updated(new.opt_state)
        keep_or = functools.partial(jax.tree.map, functools.partial(jnp.where, stepped))
        state = new.replace(batch_stats=keep_or(found.batch_stats, state.batch_stats))
        pool = keep_or(jax.tree.map(jnp.zeros_like, found.pool), found.pool)

    >>> import bnjax
    >>> layer = bnjax.BatchNorm(use_running_average=False, momentum=0.9)
    >>> x = jnp.array([[[1.0], [3.0]], [[5.0], [9.0]]])               # two of two
    >>> variables = layer.init(jax.random.key(0), x[0])
    >>> def loss_fn(variables, x):
    ...     result = layer.apply(variables, x, mutable=["batch_stats", "batch_moments"])
    ...     return (result[0] ** 2).mean(), result
    >>> rule = bnjax.running.ema(0.9)
    >>> found = accumulate(loss_fn, variables, x, rule=rule)
    >>> print(found.batch_stats["var"])                  # 0.9 + 0.1 * 8.75
    [1.775]

    References: Hoffer, Hubara & Soudry 2017, Algorithm 1 (ghost batches); Huang et al.
    2019 (GPipe), section 2.2 (statistics over the mini-batch).
    """
    _check_rule(rule)
    others = {name: value for name, value in variables.items() if name != "params"}
    leaves, structure = jax.tree.flatten(others)

    def loss(params, batch):
        fresh = jax.tree.unflatten(structure, leaves)  # NNX's belong to one trace
        value, result = loss_fn({"params": params, **fresh}, batch)
        output = result[0] if isinstance(result, tuple) and len(result) == 2 else None
        return value, (output, _trees.moments_of(result, "loss_fn"))

    def step(total, batch):
        (value, left), grads = jax.value_and_grad(loss, has_aux=True)(params, batch)
        return jax.tree.map(jnp.add, total, grads), (value, left)

    params = variables["params"]
    start = jax.tree.map(
        lambda p: jnp.zeros(p.shape, _dtypes.statistics(p.dtype)), params
    )
    total, (losses, (output, rows)) = lax.scan(step, start, batches)
    grads = jax.tree.map(lambda g, p: (g / len(losses)).astype(p.dtype), total, params)
    found = {path: _merged(each) for path, each in rows.items()}
    if pool is not None:
        found = {path: merge(pool[path], each) for path, each in found.items()}

    def update(path, mean, var):
        return rule.update(State(mean, var), found[path])

    stats = _trees.updated(variables["batch_stats"], found, update, keep)
    return Accumulated(losses.mean(), grads, stats, output, found)


def _merged(rows: Moments) -> Moments:
    """The merge of Moments along the leading axis."""
    return merged_rows(rows)


def _check_rule(rule: Rule) -> None:
    state = jax.eval_shape(lambda: rule.init((1,)))
    if not isinstance(state, State):
        raise ValueError(_RULE.format(received=rule, state=type(state).__name__))

"""Operations on all running statistics: merge, reset, and accumulation."""

import glob
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from bnjax import _checks, _dtypes, _trees
from bnjax.moments import Moments, merge, merge_rows
from bnjax.running import Rule, State, ema


def merge_batch_stats(
    batch_stats: Any,
    *,
    counts: ArrayLike | None = None,
    axis_name: str | Sequence[str] | None = None,
) -> Any:
    """Merges running statistics that each replica has kept for itself.

        mean = sum_r w_r mean_r,   var = sum_r w_r (var_r + |mean_r - mean|^2),
        w_r = count_r / sum count

    That is E[var] + Var[mean], the variance of all the replicas' values. The mean of
    the variances, which `lax.pmean(batch_stats)` gives, leaves Var[mean] out.

    Args:
        batch_stats: a tree of {mean, var}. Other leaves (the vectors of
            `nn.SpectralNorm`) stay as they are. Without `axis_name` the values of
            replicas lie along a leading axis, as in what `jax.pmap` or
            `multihost_utils.process_allgather` returns; stack others first.
        counts: how many values each replica has seen, (replica,); with `axis_name` a
            scalar, that of this replica. None: equally many. Replicas with count 0
            change nothing, whatever they hold; if all have, the result is mean 0,
            var 1.
        axis_name: the axis, or axes, of shard_map, pmap or vmap to merge over.

    Returns:
        `batch_stats` of the same structure and dtypes, each mean and var without the
        leading axis.

    Raises:
        ValueError: a layer that has one of mean and var (and a covariance), no leading
            axis, counts of another length, an axis name that is repeated or not bound.

    >>> apart = {"mean": jnp.array([[2.0], [7.0]]), "var": jnp.array([[1.0], [4.0]])}
    >>> merged = merge_batch_stats({"norm": apart})          # of {1, 3} and {5, 9}
    >>> print(merged["norm"]["var"])
    [8.75]

    References: Chan, Golub & LeVeque 1979, eq. 2.1.
    """
    axis_name = _checks.axis_name(axis_name)
    if counts is not None:  # NumPy's int64 would overflow as int32
        counts = jnp.asarray(counts, float)

    leaves, structure = _trees.flatten(batch_stats)
    for layer, fields in _layers(leaves).items():
        paths = [f"{layer}/{name}".removeprefix("/") for name in State._fields]
        if fields == {*State._fields}:
            stats = State(*(leaves[path] for path in paths))
            leaves |= zip(paths, _merge(stats, counts, axis_name, layer))
        elif fields:
            raise ValueError(_checks.NO_STATISTICS.format(path=layer))
    return jax.tree.unflatten(structure, leaves.values())


def reset_batch_stats(batch_stats: Any) -> Any:
    """Running statistics as `init` leaves them: mean 0, var 1.

    Before fine-tuning on other data, or to begin an average anew.

    Args:
        batch_stats: a tree of {mean, var}, of Linen or of NNX. Other leaves (the
            vectors of `nn.SpectralNorm`) stay as they are.

    Returns:
        `batch_stats` of the same structure, shapes and dtypes.

    Raises:
        ValueError: a layer that has a covariance in place of var.

    >>> stats = {"norm": {"mean": jnp.array([5.0]), "var": jnp.array([7.0])}}
    >>> print(reset_batch_stats(stats))
    {'norm': {'mean': Array([0.], dtype=float32), 'var': Array([1.], dtype=float32)}}

    References: Li et al. 2016 (AdaBN), section 3 (statistics of another domain).
    """
    start = ema().init
    layers = _layers(_trees.flatten(batch_stats)[0])

    def reset(path: str, value: Any) -> Any:
        layer, _, name = path.rpartition("/")
        if name in State._fields:
            return start(jnp.shape(value), jnp.asarray(value).dtype)._asdict()[name]
        if len(layers[layer]) == 1:  # the mean, and a covariance
            raise ValueError(_checks.NO_STATISTICS.format(path=layer or name))
        return value

    return _trees.map_paths(reset, batch_stats)


def _layers(leaves: Mapping[str, Any]) -> dict[str, set[str]]:
    """Which of mean and var each layer has, by its path."""
    layers: dict[str, set[str]] = {}
    for path in leaves:
        layer, _, name = path.rpartition("/")
        layers.setdefault(layer, set()).update({name} & {*State._fields})
    return layers


def _merge(stats: State, counts, axis_name, path: str) -> tuple[jax.Array, ...]:
    """The merged mean and var of one layer."""
    stored = [jnp.asarray(value) for value in stats]
    mean, var = (v.astype(_dtypes.statistics_dtype(v.dtype)) for v in stored)
    if axis_name is None:
        _checks.replicas(path, mean.shape, None if counts is None else counts.shape)
    lead = mean.shape[:1] if axis_name is None else ()
    count = jnp.ones(lead, var.dtype) if counts is None else counts.astype(var.dtype)
    seen = count.reshape(*lead, *(1 for _ in mean.shape[len(lead) :])) > 0
    mean, var = jnp.where(seen, mean, 0), jnp.where(seen, var, 0)
    m2 = var * count.reshape(seen.shape)
    local = Moments(count, mean, m2)
    if axis_name is not None:  # one row: the other replicas are on the named axis
        local = jax.tree.map(lambda value: value[None], local)
    merged = merge_rows(local, axis_name)
    new = merged.mean, jnp.where(merged.count > 0, merged.variance(), 1)
    return tuple(v.astype(old.dtype) for v, old in zip(new, stored))


_RULE = (
    "rule={received!r} keeps its averages in {state}, which batch_stats cannot hold: "
    "expected a rule of mean and var alone. Write rule=bnjax.running.ema(momentum), "
    "with the momentum of the layers."
)
_NOT_RETURNED = (
    "batch_stats/{paths} got no Moments, and loss_fn returned no batch_stats in which "
    "it could advance: expected all that model.apply(variables, x, "
    "mutable=['batch_stats', 'batch_moments']) returns. Write return loss, result, or "
    "name what shall stay as it is: keep={keep!r}."
)
_UNKNOWN = (
    "loss_fn left {path}, which is not in the variables: expected the variables that "
    "model.init returns. Add it to them, for it is passed on from one micro-batch to "
    "the next."
)


_STATISTICS = {*State._fields, "cov"}


class Accumulated(NamedTuple):
    """What `accumulate` returns.

    Attributes:
        loss: the mean of the micro-batches' losses.
        grads: the mean of their gradients, of the structure of the parameters.
        batch_stats: the running statistics after one update.
        output: the outputs of the model for all micro-batches, along a leading axis;
            None if the loss function returned the Moments alone.
        pool: the Moments that the update was made from, by layer.
        updates: the other collections that `loss_fn` returns, by name, after the last
            micro-batch: `{**variables, "batch_stats": batch_stats, **updates}`.
    """

    loss: jax.Array
    grads: Any
    batch_stats: Any
    output: Any
    pool: dict[str, Moments]
    updates: dict[str, Any]


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

    Each micro-batch is normalized with its own statistics: the gradients are those of
    ghost batch normalization of the whole batch, in groups of a micro-batch. The
    running update is that of the whole batch, with the variance of the micro-batches'
    means. An update per micro-batch would leave that out, and decay K times.

    Everything else that the model updates passes from one micro-batch to the next, as
    in K steps of a plain loop, and is returned: the vectors of `nn.SpectralNorm`,
    counters (a BatchRenorm counts K steps), and the statistics of Flax's BatchNorm,
    which leaves no Moments (K updates).

    Args:
        loss_fn: (variables, micro-batch) -> (loss, result); result is what the model's
            `apply` returns with `mutable=["batch_stats", "batch_moments"]` and further
            collections to advance; or only the collection `batch_moments` of it, if
            nothing else is updated. The loss is a mean over the micro-batch.
        variables: {"params", "batch_stats"} and the model's other collections.
        batches: a tree of arrays with the micro-batches along their leading axis,
            (K, batch / K, ...). Random keys, one for each micro-batch, come from
            `jax.random.split(key, K)`. To split a batch that lies on several devices,
            so that each has its part of all micro-batches:
            `x.reshape(-1, K, *x.shape[1:]).swapaxes(0, 1)`.
        rule: the running update, `bnjax.running.ema(momentum)`, or with `ddof=1` for
            layers with `unbiased=True`. The momentum of a layer is not among its
            variables, so it is named here.
        keep: patterns of the paths of layers whose `batch_stats` are not updated.
        pool: the `pool` of the previous call, if the optimizer has made no step since;
            its Moments count too. See the example for `optax.MultiSteps` below.

    Returns:
        Accumulated(loss, grads, batch_stats, output, pool, updates).

    Raises:
        TypeError: `loss_fn` returns no Moments.
        ValueError: a layer that left no Moments and was not updated, or one of other
            shapes than `batch_stats` has; a variable that `variables` lacks; a rule
            that keeps more than mean and var.

    With `optax.MultiSteps`, one update per step of the optimizer, from the pool since:

        accumulated = accumulate(
            loss_fn, state.variables, batches, rule=rule, pool=pool
        )
        new = state.apply_gradients(grads=accumulated.grads)
        stepped = tx.has_updated(new.opt_state)

        def if_stepped(value, other):
            return jax.tree.map(lambda v, o: jnp.where(stepped, v, o), value, other)

        stats = if_stepped(accumulated.batch_stats, state.batch_stats)
        state = new.replace(batch_stats=stats)
        empty = jax.tree.map(jnp.zeros_like, accumulated.pool)
        pool = if_stepped(empty, accumulated.pool)

    >>> import bnjax
    >>> layer = bnjax.BatchNorm(use_running_average=False, momentum=0.9)
    >>> x = jnp.array([[[1.0], [3.0]], [[5.0], [9.0]]])               # two of two
    >>> variables = layer.init(jax.random.key(0), x[0])
    >>> def loss_fn(variables, x):
    ...     result = layer.apply(variables, x, mutable=["batch_stats", "batch_moments"])
    ...     return (result[0] ** 2).mean(), result
    >>> rule = bnjax.running.ema(0.9)
    >>> accumulated = accumulate(loss_fn, variables, x, rule=rule)
    >>> print(accumulated.batch_stats["var"])                  # 0.9 + 0.1 * 8.75
    [1.775]

    References: Hoffer, Hubara & Soudry 2017, Algorithm 1 (ghost batches); Huang et al.
    2019 (GPipe), section 2.2 (statistics over the mini-batch).
    """
    _check_rule(rule)
    others = {name: value for name, value in variables.items() if name != "params"}
    state, structure = _trees.flatten(others)
    model_updates = _ModelUpdates(variables["batch_stats"], keep)

    def loss(params, state, batch):
        # NNX's variables belong to one trace: each gets new ones.
        fresh = jax.tree.unflatten(structure, state.values())
        value, result = loss_fn({"params": params, **fresh}, batch)
        output, _ = _output_and_collections(result)
        moments = _trees.moments_of(result, "loss_fn")
        return value, (output, moments, model_updates.applied(state, result))

    def step(carry, batch):
        total, state = carry
        grad = jax.value_and_grad(loss, has_aux=True)
        (value, (output, moments, state)), grads = grad(params, state, batch)
        return (jax.tree.map(jnp.add, total, grads), state), (value, output, moments)

    params = variables["params"]
    start = jax.tree.map(
        lambda p: jnp.zeros(p.shape, _dtypes.statistics_dtype(p.dtype)), params
    )
    state = jax.tree.map(jnp.asarray, state)
    carry, (losses, output, rows) = lax.scan(step, (start, state), batches)
    total, state = carry
    grads = jax.tree.map(lambda g, p: (g / len(losses)).astype(p.dtype), total, params)
    pooled = {path: merge_rows(moments) for path, moments in rows.items()}
    if pool is not None:
        pooled = {path: merge(pool[path], each) for path, each in pooled.items()}

    def update(path, mean, var):
        return rule.update(State(mean, var), pooled[path])

    new = jax.tree.unflatten(structure, state.values())
    kept = model_updates.layers_to_keep()
    stats = _trees.updated(new["batch_stats"], pooled, update, kept)
    updates = {name: new[name] for name in new if name in model_updates.collections}
    return Accumulated(losses.mean(), grads, stats, output, pooled, updates)


def _output_and_collections(result: Any) -> tuple[Any, Any]:
    """The two parts of what `apply` returns; no output if Moments are all there is."""
    if isinstance(result, tuple) and len(result) == 2:
        return result
    return None, result


class _ModelUpdates:
    """The variables that the model updates itself, known once a micro-batch is traced.

    Attributes:
        collections: those that `loss_fn` returns, except `batch_stats`.
    """

    def __init__(self, batch_stats: Any, keep: Sequence[str]):
        self.collections: set[str] = set()
        self._patterns = [keep] if isinstance(keep, str) else [*keep]
        self._layers: dict[str, set[str]] = {}
        for path in _trees.flatten(batch_stats)[0]:
            layer, _, name = path.rpartition("/")
            self._layers.setdefault(layer, set()).add(name)
        self._kept = _trees.matching(keep, {*self._layers}, "keep")
        self._with_moments: set[str] = set()  # the layers that leave Moments
        self._updated: set[str] = set()  # the layers that write `batch_stats` otherwise
        self._returns_statistics = False  # whether `batch_stats` is returned

    def applied(self, state: Mapping[str, Any], result: Any) -> dict[str, Any]:
        """The state after a micro-batch; layers that leave Moments keep theirs.

        Args:
            state: the leaves of all collections but the parameters, by path.
            result: the result of `loss_fn`.
        """
        _, returned = _output_and_collections(result)
        by_name = isinstance(returned, Mapping) and "batch_moments" in returned
        moments = returned["batch_moments"] if by_name else returned
        leaves = _trees.flatten(moments)[0]
        self._with_moments = {_trees.layer_of(path) for path in leaves}
        new = dict(state)
        if not by_name:
            return new
        known = {path.partition("/")[0] for path in state} - {"batch_moments"}
        for name in returned:
            if name not in known:
                continue  # transient: begins anew with each call
            if name == "batch_stats":
                self._returns_statistics = True
            else:
                self.collections.add(name)
            for path, value in _trees.flatten({name: returned[name]})[0].items():
                layer = _trees.layer_of(path.removeprefix("batch_stats/"))
                if name == "batch_stats" and self._is_kept(layer, path):
                    continue
                if path not in state:
                    raise ValueError(_UNKNOWN.format(path=path))
                is_unchanged = value is state[path] or isinstance(value, tuple)
                if is_unchanged:
                    continue
                if name == "batch_stats":
                    self._updated.add(layer)
                new[path] = _cast_like(value, state[path])
        return new

    def _is_kept(self, layer: str, path: str) -> bool:
        """Whether the model's update of these `batch_stats` is ignored."""
        is_statistic = path.rpartition("/")[2] in _STATISTICS  # and no counter
        return layer in self._kept or (is_statistic and layer in self._with_moments)

    def layers_to_keep(self) -> list[str]:
        """Patterns of the layers that no Moments update."""
        others = {*self._layers} - self._kept - self._with_moments
        if others and not self._returns_statistics:
            paths = ", batch_stats/".join(sorted(others))
            raise ValueError(_NOT_RETURNED.format(paths=paths, keep=sorted(others)))
        by_model = {
            layer
            for layer in others
            if layer in self._updated or not self._layers[layer] & {*State._fields}
        }
        return [*self._patterns, *map(glob.escape, sorted(by_model))]


def _cast_like(value: Any, old: Any) -> Any:
    """`value` in the dtype of `old`; a complex value in place of a real one stays."""
    if jnp.iscomplexobj(value) and not jnp.iscomplexobj(old):
        return value
    return value if value.dtype == old.dtype else value.astype(old.dtype)


def _check_rule(rule: Rule) -> None:
    state = jax.eval_shape(lambda: rule.init((1,)))
    if not isinstance(state, State):
        raise ValueError(_RULE.format(received=rule, state=type(state).__name__))

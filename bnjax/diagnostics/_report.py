"""The report on a model's layers, and the measures of layers that it reads."""

import dataclasses
from collections.abc import Iterator, Mapping
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnjax import _trees
from bnjax.moments import Moments, broadcast_count


class Drift(NamedTuple):
    """How far a batch lies from the running statistics, per feature.

    Attributes:
        mean: (batch mean - running mean) / running standard deviation.
        std: batch standard deviation / running standard deviation; 1 is no drift.
    """

    mean: jax.Array
    std: jax.Array


class Channels(NamedTuple):
    """Which features of a layer are in trouble: booleans, per feature.

    Attributes:
        dead: does not vary.
        exploded: not finite, or so large that half precision overflows.
        gamma_near_zero: scaled by almost nothing.
    """

    dead: jax.Array
    exploded: jax.Array
    gamma_near_zero: jax.Array


def drift(
    batch_stats: Any, batch_moments: Any, *, epsilon: float = 1e-5
) -> dict[str, Drift]:
    """How far each layer's batch lies from its running statistics.

        mean = (mean_B - mean) / sqrt(var + epsilon)
        std  = sqrt((var_B + epsilon) / (var + epsilon))

    Sampling alone moves the mean by about 1/sqrt(count).

    Args:
        batch_stats: a tree of {mean, var}, (feature,) or (domain, feature).
        batch_moments: the tree of Moments that the layers leave.
        epsilon: that of the layers: a variance below it makes no difference.

    Returns:
        Drift by layer path, for the layers in `batch_moments`, but those that whiten.
        (0, 1) for a feature without a value in the batch.

    Raises:
        ValueError: no moments, or those of a layer that `batch_stats` does not have, or
            has with another number of features.

    >>> stats = {"norm": {"mean": jnp.array([1.0]), "var": jnp.array([4.0])}}
    >>> batch = {"norm": {"moments": Moments(8.0, jnp.array([4.0]), jnp.array([32.0]))}}
    >>> drift(stats, batch, epsilon=0.0)["norm"].mean
    Array([1.5], dtype=float32)

    References: Ioffe & Szegedy 2015, section 4.1 (the drift of a layer's input).
    """
    running, batches = statistics_of(batch_stats), moments_of(batch_moments)
    if not batches:
        raise ValueError(
            "batch_moments holds no Moments: expected what the layers leave where the "
            "collection is mutable. Write model.apply(..., mutable=['batch_moments'])."
        )
    result = {}
    for path, batch in batches.items():
        shape = jnp.shape(batch.mean)
        if path not in running or jnp.shape(running[path]["mean"]) != shape:
            raise ValueError(
                f"batch_moments/{path} is of {shape} features: expected a layer of "
                f"batch_stats, which has {_shapes(running)}. Pass both collections of "
                "one model."
            )
        mean, var = running[path]["mean"], running[path]["var"]
        seen = (
            broadcast_count(jnp.asarray(batch.count), jnp.asarray(batch.mean)).real > 0
        )
        shift = (batch.mean - mean) / jnp.sqrt(var + epsilon)
        ratio = jnp.sqrt((batch.variance() + epsilon) / (var + epsilon))
        result[path] = Drift(jnp.where(seen, shift, 0), jnp.where(seen, ratio, 1))
    return result


def channels(
    variables: Mapping[str, Any],
    *,
    epsilon: float = 1e-5,
    largest: float = 1e4,
    smallest_gamma: float = 1e-3,
) -> dict[str, Channels]:
    """Dead channels, exploded ones, and those that the scale switches off.

        dead:             var < epsilon, so that epsilon decides
        exploded:         not finite, or |mean| or sqrt(var) > largest
        gamma near zero:  |scale| < smallest_gamma

    Args:
        variables: {"batch_stats": ..., "params": ...}; the params may be left out.
        epsilon: that of the layers.
        largest: of what does not count as exploded; float16 ends at 6.5e4.
        smallest_gamma: of what does not count as zero.

    Returns:
        Channels by layer path.

    Raises:
        ValueError: no `batch_stats` in `variables`.

    >>> stats = {"mean": jnp.zeros(3), "var": jnp.array([1.0, 0.0, jnp.inf])}
    >>> params = {"scale": jnp.array([0.0, 1.0, 1.0])}
    >>> variables = {"batch_stats": {"norm": stats}, "params": {"norm": params}}
    >>> for name, value in channels(variables)["norm"]._asdict().items():
    ...     print(name, value)
    dead [False  True False]
    exploded [False False  True]
    gamma_near_zero [ True False False]

    References: Mehta, Kim & Theobalt 2019 (scales near zero are prunable filters);
    Goyal et al. 2017, section 5.1 (scales that start at zero on purpose).
    """
    scales = _nodes(variables.get("params", {}), {"scale"})
    result = {}
    for path, stats in statistics_of(batch_stats_in(variables)).items():
        size, var = jnp.abs(stats["mean"]), jnp.asarray(stats["var"])
        fits = (size <= largest) & (var <= largest**2)  # not so for NaN
        gamma = scales[path]["scale"] if path in scales else jnp.ones_like(var)
        small = jnp.broadcast_to(jnp.abs(gamma) < smallest_gamma, var.shape)
        result[path] = Channels(var < epsilon, ~fits, small)
    return result


def never_updated(batch_stats: Any) -> dict[str, jax.Array]:
    """Which layers still hold the running statistics that they started with.

        mean = 0 and var = 1, in every feature

    Args:
        batch_stats: a tree of {mean, var}.

    Returns:
        Booleans by layer path: a scalar, or one for each row of statistics that have
        more than one axis, such as the domains of a SplitBatchNorm or the layers of
        `nn.scan`.

    >>> stats = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    >>> print(never_updated({"norm": stats})["norm"])
    True

    References: pytorch/pytorch#4741, google/flax#1489 (statistics thrown away).
    """
    result = {}
    for path, stats in statistics_of(batch_stats).items():
        mean, var = jnp.asarray(stats["mean"]), jnp.asarray(stats["var"])
        last = tuple(range(mean.ndim)[-1:])
        result[path] = jnp.all((mean == 0) & (var == 1), axis=last)
    return result


def batch_stats_in(variables: Mapping[str, Any]) -> Any:
    """The collection; raises where it is not there."""
    if "batch_stats" not in variables:
        raise ValueError(
            f"variables has the collections {list(variables)}: expected 'batch_stats', "
            "and 'params' for the scales. Write {'params': params, 'batch_stats': "
            "batch_stats}."
        )
    return variables["batch_stats"]


def statistics_of(batch_stats: Any) -> dict[str, Mapping[str, jax.Array]]:
    """The nodes with a mean and a var, by path."""
    return _nodes(batch_stats, {"mean", "var"})


def moments_of(batch_moments: Any) -> dict[str, Moments]:
    """The Moments that layers have left, by path; not what a covariance is made of."""
    nodes = _nodes(batch_moments, {"moments"})
    found = {path: node["moments"] for path, node in nodes.items()}
    return {path: batch for path, batch in found.items() if isinstance(batch, Moments)}


def _nodes(tree: Any, keys: set[str]) -> dict[str, Any]:
    """The dictionaries of a tree that hold these keys, by path."""

    def is_node(node: Any) -> bool:
        return isinstance(node, Mapping) and keys <= set(node)

    leaves = jax.tree.flatten_with_path(_trees.unboxed(tree), is_leaf=is_node)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): node
        for path, node in leaves
        if is_node(node)
    }


def _shapes(running: Mapping[str, Any]) -> str:
    shapes = (f"{p} {jnp.shape(stats['mean'])}" for p, stats in running.items())
    return ", ".join(shapes) or "none"


_CURES = {
    "statistics never updated": (
        "train with mutable=['batch_stats'] and keep the collection that apply "
        "returns; after a new start reload the checkpoint's batch_stats"
    ),
    "exploded": (
        "a smaller learning rate or warm-up; statistics with NaN never recover: reset "
        "them, and set skip_nonfinite_updates=True"
    ),
    "dead": (
        "a smaller learning rate, less weight decay on what feeds the layer; or prune "
        "these channels"
    ),
    "gamma near zero": (
        "keep weight decay off the scales; or prune these channels. Expected where "
        "the scale starts at zero"
    ),
    "mean drifted": (
        "train longer, take a smaller momentum, or estimate population statistics; "
        "check that inputs are prepared as in training"
    ),
}
_CURES["variance drifted"] = _CURES["mean drifted"]


class Finding(NamedTuple):
    """One thing that is wrong with one layer.

    Attributes:
        layer: its path.
        what: the kind of trouble.
        figure: how bad it is, in words.
        cure: what usually helps.
    """

    layer: str
    what: str
    figure: str
    cure: str


@dataclasses.dataclass(frozen=True)
class Report:
    """Findings, by layer; true where there are any. `rich.print` shows a table.

    Attributes:
        layers: how many layers were looked at.
        findings: what is wrong with them.
        others: the paths of those that were not, for they have no mean and var.
    """

    layers: int
    findings: tuple[Finding, ...]
    others: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __str__(self) -> str:
        lines = [f"{self.layers} layers, {len(self)} findings"]
        for layer, what, figure, cure in self:
            lines.append(f"  {layer or '.'}: {what}: {figure}\n    {cure}")
        return "\n".join(lines + [f"  {self._others}"] * bool(self.others))

    def __rich__(self) -> Any:
        from rich.markup import escape
        from rich.table import Table

        title, caption = str(self).splitlines()[0], escape(self._others)
        table = Table(*Finding._fields, title=title, caption=caption)
        for finding in self:
            table.add_row(*map(escape, finding))
        return table

    @property
    def _others(self) -> str:
        others = ", ".join(self.others)
        return f"not looked at, for want of a mean and a var: {others}" * bool(others)


def report(
    variables: Mapping[str, Any],
    *,
    batch_moments: Any = None,
    epsilon: float = 1e-5,
    largest_drift: float = 1.0,
) -> Report:
    """What is wrong with the layers of a model, how bad it is, and what cures it.

    Looks for statistics that were never updated, for exploded and dead channels, for
    scales near zero; and with `batch_moments` for batches that lie far from the
    running statistics. Channels are judged by the batch where there is one: running
    statistics take long to forget. Channels of a SplitBatchNorm are [domain, channel].

    Args:
        variables: {"params": ..., "batch_stats": ...}.
        batch_moments: the tree of Moments that the layers leave, of one batch or of
            many.
        epsilon: that of the layers.
        largest_drift: of what is not one, in running standard deviations of the mean,
            and of the ratio of standard deviations less 1, taken either way. Either
            must also be beyond chance: a batch of independent, normal values has such
            a drift anywhere in the model less than once in 1,000 reports.

    Returns:
        Report. Iterate over it, print it, or `rich.print` it. Empty, and false, where
        nothing was found.

    Raises:
        ValueError: no `batch_stats` in `variables`, or `batch_moments` of other layers.

    >>> stats = {"mean": jnp.zeros(3), "var": jnp.array([1.0, 0.5, 0.0])}
    >>> for finding in report({"batch_stats": {"norm": stats}}):
    ...     print(finding.layer, "|", finding.what, "|", finding.figure)
    norm | dead | 1 of 3 channels (2)

    References: Wu & Johnson 2021, section 3 (stale running statistics); Chernoff 1952
    (the bound on chance).
    """
    batch_stats = batch_stats_in(variables)
    running = statistics_of(batch_stats)
    others = {_trees.layer_of(p) for p in _trees.flatten(batch_stats)[0]} - {*running}
    batches, drifts = {}, {}
    if batch_moments is not None:
        batches = moments_of(batch_moments)
        if batches or not others:
            drifts = drift(running, batch_moments, epsilon=epsilon)
    fresh = {k: np.asarray(v) for k, v in never_updated(running).items()}
    over = {"params": variables.get("params", {})}
    stored = channels(over | {"batch_stats": running}, epsilon=epsilon)
    latest = running | {path: _seen(running[path], b) for path, b in batches.items()}
    now = channels(over | {"batch_stats": latest}, epsilon=epsilon)
    features = sum(np.size(each.mean) for each in drifts.values())
    findings = []
    for path in running:
        flags = now[path]._replace(exploded=now[path].exploded | stored[path].exploded)
        figures = _channels(flags)
        if fresh[path].any():
            where = ", ".join(map(str, np.flatnonzero(fresh[path])))
            where = f" in the rows {where}" if fresh[path].ndim else ""
            figures = {"statistics never updated": "mean 0, var 1" + where} | figures
        if path in drifts:
            m2 = jnp.asarray(batches[path].m2)
            count = np.asarray(broadcast_count(jnp.asarray(batches[path].count), m2))
            ignored = (
                flags.dead | flags.exploded | (count <= 1) | fresh[path][..., None]
            )
            chance = _beyond_chance(drifts[path], count, features)
            figures |= _drifts(drifts[path], largest_drift, chance, ~ignored)
        findings += [Finding(path, k, v, _CURES[k]) for k, v in figures.items()]
    return Report(len(running), tuple(findings), tuple(sorted(others)))


def _seen(running: Mapping[str, Any], batch: Moments) -> dict[str, Any]:
    """A batch's mean and var; the running ones of features without a variance in it."""
    seen = broadcast_count(jnp.asarray(batch.count), jnp.asarray(batch.m2)) > 1
    return {
        "mean": jnp.where(seen, batch.mean, running["mean"]),
        "var": jnp.where(seen, batch.variance(), running["var"]),
    }


def _channels(flags: Channels) -> dict[str, str]:
    """How many channels of each kind of trouble, and the first of them."""
    figures = {}
    for name, flag in flags._asdict().items():
        which = np.flatnonzero(flag)
        if which.size:
            first = ", ".join(_format_index(i, np.shape(flag)) for i in which[:5])
            first += ", ..." * (which.size > 5)
            what = name.replace("_", " ")
            figures[what] = f"{which.size} of {np.size(flag)} channels ({first})"
    return figures


# By chance, for n independent normal values and k = n - 1:
#     (mean_B - mean) sqrt(n) / sigma   is standard normal
#     r = m2_B / (k sigma^2)            is chi-squared over k, which is skewed, and
#     P(r beyond a on its side of 1) <= exp(-k/2 (a - 1 - log a))     (Chernoff)
# Each of the features has four ways to be off, so each way has a quarter of its share
# of _ALARMS (Bonferroni). The running variance may be sigma^2, or k/n of it where the
# variances of such batches were averaged; the limits hold for either.

_ALARMS = 1e-3


class _Beyond(NamedTuple):
    """Where the mean, and the standard deviation, drifts further than by chance."""

    mean: np.ndarray
    std: np.ndarray


def _beyond_chance(drift: Drift, count: Any, features: int) -> _Beyond:
    """Which features of a layer drift further than by chance.

    Args:
        drift: of a layer.
        count: the values of each feature.
        features: how many are judged, in all layers.
    """
    share = _ALARMS / (4 * max(features, 1))
    k = np.maximum(np.asarray(count, np.float64) - 1, 1)
    shift = np.abs(drift.mean) * np.sqrt(k)
    r = np.asarray(drift.std, np.float64) ** 2
    r = np.where(r < 1, np.minimum(r * (k + 1) / k, 1), r)
    with np.errstate(all="ignore"):  # not finite: reported as such
        improbable = k / 2 * (r - 1 - np.log(r)) > -np.log(share)
    return _Beyond(shift > -NormalDist().inv_cdf(share), improbable)


def _drifts(
    drift: Drift, largest: float, chance: _Beyond, judged: Any
) -> dict[str, str]:
    """The farthest drifts, where they are beyond the largest, and beyond chance."""
    shift = np.where(judged & chance.mean, np.abs(drift.mean), 0)
    ratio = np.where(judged & chance.std, drift.std, 1)
    either_way = np.maximum(ratio, 1 / ratio) - 1
    figures = {}
    if (shift > largest).any():
        i = np.argmax(shift)
        channel = _format_index(i, shift.shape)
        figures["mean drifted"] = (
            f"{shift.flat[i]:.2g} standard deviations (channel {channel})"
        )
    if (either_way > largest).any():
        i = np.argmax(either_way)
        channel = _format_index(i, ratio.shape)
        figures["variance drifted"] = (
            f"{ratio.flat[i]:.2g} running standard deviations (channel {channel})"
        )
    return figures


def _format_index(i: Any, shape: tuple[int, ...]) -> str:
    """Formats a flat index: '3'; for several axes, such as domains, '[1, 3]'."""
    index = [int(j) for j in np.unravel_index(i, shape)]
    return str(index if len(shape) > 1 else index[0])

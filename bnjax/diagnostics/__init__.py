"""What is wrong with a model's statistics, and what cures it.

`report` looks at variables, and at the Moments of a batch if it is given them. A model
stores these in the collection `batch_moments` if `mutable` names it:

    _, updates = model.apply(variables, x, train=True, mutable=["batch_moments", ...])
    print(report(variables, batch_moments=updates["batch_moments"]))

The measures behind it are pure functions of trees, by layer path, that run inside of
jit: `drift`, `channels`, `never_updated`. Others are measures of activations:
`percentiles`, `effective_rank`. `replicas_agree` and `report` run on the host.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from statistics import NormalDist
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from bnjax import _trees
from bnjax.diagnostics._measures import (
    Agreement,
    Channels,
    Difference,
    Drift,
    batch_stats_in,
    channels,
    drift,
    effective_rank,
    moments_of,
    never_updated,
    percentiles,
    replicas_agree,
    statistics_of,
)
from bnjax.moments import Moments, broadcast_count

__all__ = [
    "Agreement",
    "Channels",
    "Difference",
    "Drift",
    "Finding",
    "Report",
    "channels",
    "drift",
    "effective_rank",
    "never_updated",
    "percentiles",
    "replicas_agree",
    "report",
]

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
        layer: the path of the layer.
        what: the kind of trouble.
        figure: how bad it is, in words.
        cure: a remedy that usually helps.
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
        findings: the troubles that were found.
        others: the paths of layers that have no mean and var, and were not looked at.
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
        return f"not looked at, without a mean and a var: {others}" * bool(others)


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
    running statistics. If there is a batch, dead and exploded channels are looked for
    in its statistics, because the running ones take long to change. Channels of a
    SplitBatchNorm are [domain, channel].

    Args:
        variables: {"params": ..., "batch_stats": ...}.
        batch_moments: the collection `batch_moments` that `apply` returns: the Moments
            of one batch or of many.
        epsilon: the epsilon of the layers.
        largest_drift: the limit L. Reported are a mean that is more than L running
            standard deviations away from the running mean, and a standard deviation
            that is more than 1 + L times larger or smaller than the running one, but
            only if chance does not explain it: batches of independent, normal values
            give a report of drift less than once in 1,000.

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
    initial = {k: np.asarray(v) for k, v in never_updated(running).items()}
    params = {"params": variables.get("params", {})}
    stored = channels(params | {"batch_stats": running}, epsilon=epsilon)
    latest = running | {path: _latest(running[path], b) for path, b in batches.items()}
    now = channels(params | {"batch_stats": latest}, epsilon=epsilon)
    features = sum(np.size(each.mean) for each in drifts.values())
    findings = []
    for path in running:
        flags = now[path]._replace(exploded=now[path].exploded | stored[path].exploded)
        figures = _channel_figures(flags)
        if initial[path].any():
            figure = "mean 0, var 1"
            if initial[path].ndim:
                rows = ", ".join(map(str, np.flatnonzero(initial[path])))
                figure += f" in the rows {rows}"
            figures = {"statistics never updated": figure} | figures
        if path in drifts:
            m2 = jnp.asarray(batches[path].m2)
            count = np.asarray(broadcast_count(jnp.asarray(batches[path].count), m2))
            ignored = (
                flags.dead | flags.exploded | (count <= 1) | initial[path][..., None]
            )
            chance = _beyond_chance(drifts[path], count, features)
            figures |= _drift_figures(drifts[path], largest_drift, chance, ~ignored)
        findings += [Finding(path, k, v, _CURES[k]) for k, v in figures.items()]
    return Report(len(running), tuple(findings), tuple(sorted(others)))


def _latest(running: Mapping[str, Any], batch: Moments) -> dict[str, Any]:
    """A batch's mean and var; the running ones of features without a variance in it."""
    estimated = broadcast_count(jnp.asarray(batch.count), jnp.asarray(batch.m2)) > 1
    return {
        "mean": jnp.where(estimated, batch.mean, running["mean"]),
        "var": jnp.where(estimated, batch.variance(), running["var"]),
    }


def _channel_figures(flags: Channels) -> dict[str, str]:
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


class _BeyondChance(NamedTuple):
    """Where the mean, and the standard deviation, drifts further than by chance."""

    mean: np.ndarray
    std: np.ndarray


def _beyond_chance(drift: Drift, count: Any, features: int) -> _BeyondChance:
    """Which features of a layer drift further than by chance.

    Args:
        drift: the drift of a layer.
        count: the number of values of each feature.
        features: the number of features that are judged, in all layers.
    """
    share = _ALARMS / (4 * max(features, 1))
    k = np.maximum(np.asarray(count, np.float64) - 1, 1)
    shift = np.abs(drift.mean) * np.sqrt(k)
    r = np.asarray(drift.std, np.float64) ** 2
    r = np.where(r < 1, np.minimum(r * (k + 1) / k, 1), r)
    with np.errstate(all="ignore"):  # not finite: reported as such
        improbable = k / 2 * (r - 1 - np.log(r)) > -np.log(share)
    return _BeyondChance(shift > -NormalDist().inv_cdf(share), improbable)


def _drift_figures(
    drift: Drift, largest: float, chance: _BeyondChance, judged: Any
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

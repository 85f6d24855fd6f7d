"""What a report holds, and the forms in which it is shown."""

import dataclasses
import html
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bnjax.diagnostics._measures import Channels, Drift

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NO_MATPLOTLIB = (
    "report.figure() needs matplotlib: expected it to be installed. "
    "pip install 'bnjax[plot]'"
)


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


class Measures(NamedTuple):
    """What was measured of one layer: the values behind the findings.

    A layer whose statistics have several axes (the domains of a SplitBatchNorm, the
    layers of `nn.scan`) has one of these for each row. Arrays are NumPy's, (channel,).

    Attributes:
        layer: the path of the layer.
        row: the index of the row; () for statistics of one axis.
        never_updated: whether the statistics are those that the layer started with.
        channels: which are dead, exploded, or scaled by almost nothing.
        drift: of the batch; NaN for channels that are not judged, because they have
            fewer than two values, are dead or exploded, or were never updated. None
            without `batch_moments`.
        drifted: booleans, where the drift is a finding. None without `batch_moments`.
        momentum: the weight of the old mean in the new one; 1 where nothing was
            updated, NaN where the step does not tell. None without `updated`.
        difference: the largest difference between replicas of the whole layer,
            relative to the largest value; 0 where they agree. None without `replicas`.
    """

    layer: str
    row: tuple[int, ...]
    never_updated: bool
    channels: Channels
    drift: Drift | None = None
    drifted: Drift | None = None
    momentum: float | None = None
    difference: float | None = None

    @property
    def name(self) -> str:
        """The path of the layer, and the row if it has several: 'norm[1]'."""
        return (self.layer or ".") + str(list(self.row)) * bool(self.row)


@dataclasses.dataclass(frozen=True)
class Report:
    """Findings, by layer; true where there are any.

    `print` and `rich.print` show it; a notebook shows it as a table. Layers are in the
    natural order of their paths: `block_10` follows `block_9`. That is the order of
    depth as far as paths tell it.

    Attributes:
        layers: how many layers were looked at.
        findings: the troubles that were found.
        others: the paths of layers that have no mean and var, and were not looked at.
        measures: what was measured, by layer; reports are equal without regard to it.
        largest_drift: the limit of the drift.
    """

    layers: int
    findings: tuple[Finding, ...]
    others: tuple[str, ...] = ()
    measures: tuple[Measures, ...] = dataclasses.field(
        default=(), compare=False, repr=False
    )
    largest_drift: float = 1.0

    def __bool__(self) -> bool:
        return bool(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __str__(self) -> str:
        lines = [self._title]
        for layer, what, figure, cure in self:
            lines.append(f"  {layer or '.'}: {what}: {figure}\n    {cure}")
        return "\n".join(lines + [f"  {self._others}"] * bool(self.others))

    def __rich__(self) -> Any:
        from rich.markup import escape
        from rich.table import Table

        caption = escape(self._others)
        table = Table(*Finding._fields, title=self._title, caption=caption)
        for finding in self:
            table.add_row(*map(escape, finding))
        return table

    def _repr_html_(self) -> str:
        """A table, in the colours of the page."""
        cell = 'style="text-align: left; border-bottom: 1px solid #8886"'
        rows = [
            "".join(f"<td {cell}>{html.escape(text)}</td>" for text in finding)
            for finding in self
        ]
        head = "".join(f"<th {cell}>{name}</th>" for name in Finding._fields)
        lines = "".join(f"<tr>{row}</tr>" for row in [head, *rows] if self)
        return (
            f"<p><b>{self._title}</b></p><table>{lines}</table>"
            f"<p>{html.escape(self._others)}</p>"
        )

    def rows(self) -> list[dict[str, Any]]:
        """One flat dictionary per layer, for `pandas.DataFrame(report.rows())`.

        A layer whose statistics have several axes has one for each row of them, named
        `norm[1]`. Columns of what was not measured are left out. Values are plain
        Python and never NaN or infinite, so that JSON takes them: None stands where
        there is no finite number.

        Returns:
            Dictionaries of layer, channels (how many), never_updated (0 or 1);
            exploded, dead, gamma_near_zero (how many channels); mean_drift (the
            largest, in running standard deviations), std_ratio (the farthest from 1),
            momentum, replica_difference; findings (a text).

        >>> from bnjax.diagnostics import report
        >>> stats = {"mean": np.zeros(2), "var": np.array([2.0, 0.0])}
        >>> (row,) = report({"batch_stats": {"norm": stats}}).rows()
        >>> print(row["layer"], row["channels"], row["dead"], row["findings"])
        norm 2 1 dead
        """
        whats: dict[str, list[str]] = {}
        for finding in self:
            whats.setdefault(finding.layer, []).append(finding.what)
        rows = [
            {**_numbers(m), "findings": "; ".join(whats.get(m.layer, ()))}
            for m in self.measures
        ]
        empty = {k for k in rows[0] if all(r[k] is None for r in rows)} if rows else ()
        return [{k: v for k, v in row.items() if k not in empty} for row in rows]

    def to_dict(self) -> dict[str, float]:
        """Scalars by name, for TensorBoard and Weights & Biases.

            wandb.log(report.to_dict())
            for name, value in report.to_dict().items():
                writer.scalar(name, value, step)

        Returns:
            {"layers": ..., "findings": ..., "norm0/mean_drift": ..., ...}: the numbers
            of `rows`, by layer, without those that are None.

        >>> from bnjax.diagnostics import report
        >>> stats = {"mean": np.zeros(2), "var": np.array([2.0, 0.0])}
        >>> for item in report({"batch_stats": {"norm": stats}}).to_dict().items():
        ...     print(*item)
        layers 1
        findings 1
        norm/never_updated 0
        norm/exploded 0
        norm/dead 1
        norm/gamma_near_zero 0
        """
        scalars: dict[str, float] = {"layers": self.layers, "findings": len(self)}
        for row in self.rows():
            for name, value in row.items():
                if value is not None and name not in ("layer", "channels", "findings"):
                    scalars[f"{row['layer']}/{name}"] = value
        return scalars

    def figure(self) -> "Figure":
        """A picture of all layers: a panel for each kind of finding.

        In the colours of matplotlib's current style. Panels are left out whose values
        were not measured.

        Returns:
            A `matplotlib.figure.Figure`, which pyplot knows nothing of; a notebook
            shows it, `savefig` writes it.

        Raises:
            ImportError: no matplotlib.
        """
        try:
            from bnjax.diagnostics import _figure
        except ModuleNotFoundError as error:
            raise ImportError(_NO_MATPLOTLIB) from error
        return _figure.draw(self)

    @property
    def _title(self) -> str:
        return f"{self.layers} layers, {len(self)} findings"

    @property
    def _others(self) -> str:
        others = ", ".join(self.others)
        return f"not looked at, without a mean and a var: {others}" * bool(others)


def _numbers(of: Measures) -> dict[str, Any]:
    """The measures of a layer as plain numbers; None where none is finite."""
    shift = ratio = None
    if of.drift is not None:
        shift = _farthest(np.abs(of.drift.mean), from_=np.abs)
        ratio = _farthest(of.drift.std, from_=lambda r: np.maximum(r, 1 / r))
    return {
        "layer": of.name,
        "channels": of.channels.dead.size,
        "never_updated": int(of.never_updated),
        "exploded": int(of.channels.exploded.sum()),
        "dead": int(of.channels.dead.sum()),
        "gamma_near_zero": int(of.channels.gamma_near_zero.sum()),
        "mean_drift": shift,
        "std_ratio": ratio,
        "momentum": _finite(of.momentum),
        "replica_difference": _finite(of.difference),
    }


def _farthest(values: Any, from_: Callable[[Any], Any]) -> float | None:
    """The value that is the farthest from something; None if none is finite."""
    known = np.asarray(values, np.float64)
    known = known[np.isfinite(known)]
    return float(known[np.argmax(from_(known))]) if known.size else None


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and np.isfinite(value) else None

"""The site's tables of results, from the records in experiments/results alone.

A page names one in a comment, which `hooks.py` replaces by the table:

    <!-- table: mnist -->

The numbers are those of the experiments' own functions, which also print and draw them.
"""

# ruff: noqa: RUF001 (signs of typography)

import functools
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import experiments.inception
import experiments.mnist
import experiments.normalizers
import experiments.population
import experiments.regularization
import experiments.saturation
import experiments.scale_invariance
import experiments.small_batch
import experiments.weight_averaging
import experiments.why_it_works
from experiments.common import results, study
from experiments.common.rates import percent
from experiments.common.results import Record

FOLDER = results.HERE
NAN = math.nan


def markdown(head: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    """A table: the first column to the left, numbers to the right."""
    head = [str(name) for name in head]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    lines += [[str(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def of_readme(heading: str, *columns: str) -> str:
    """Columns of the table below a heading of experiments/README.md."""
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    section = text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in section.splitlines()
        if line.startswith("|") and not line.startswith("|---")
    ]
    chosen = [rows[0].index(column) for column in columns]
    lines = [[row[i].strip("| ") for i in chosen] for row in rows]
    lines.insert(1, ["---"] * len(chosen))
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return table.replace("../docs/pages/performance.md", "performance.md")


# Records


def file_of(name: str) -> Path:
    """The committed records of an experiment."""
    return FOLDER / "results" / f"{name}.jsonl"


@functools.cache
def read(name: str) -> list[Record]:
    """The records of an experiment."""
    return results.read(file_of(name))


def last_run(name: str) -> tuple[Record, list[Record]]:
    """The first record of the newest run, and its measurements."""
    for first in reversed([r for r in read(name) if "settings" in r]):
        rows = [r for r in read(name) if r["run"] == first["run"] and r is not first]
        rows = [row for row in rows if row["kind"] != "end"]
        if rows:
            return first, rows
    raise LookupError(f"{name}.jsonl has no run with measurements")


def trainings(module: ModuleType, **settings: Any) -> tuple[Any, dict[Any, Record]]:
    """The configuration of a study with these settings, and what is known of it."""
    config = module.Config(**settings)
    return config, study.load(module.STUDY, config, file_of(module.STUDY.name))


def or_dash(value: float, form: str) -> str:
    """A formatted number; a dash for NaN and infinity."""
    return format(value, form) if math.isfinite(value) else "–"


# The paper and its successors


def mnist() -> str:
    experiment = experiments.mnist
    settings, steps, measured = experiment.last_run(file_of("mnist"), "mnist")
    networks = "plain", "bn"

    def row_of(i: int, rate: float) -> list[str]:
        final = {name: measured[name]["test"][-1, :, i].mean() for name in networks}
        needed = (
            experiment.steps_to(steps, measured[name], i, final["plain"])
            for name in networks
        )
        reached = ("never" if n == math.inf else f"{n:,.0f}" for n in needed)
        return [f"{rate:g}", *(f"{final[name]:.2%}" for name in networks), *reached]

    return markdown(
        [
            "learning rate",
            "final accuracy without BN",
            "with BN",
            "steps to the final accuracy without BN: without BN",
            "with BN",
        ],
        (row_of(i, rate) for i, rate in enumerate(settings["learning_rates"])),
    )


def population() -> str:
    experiment = experiments.population
    _, rows = experiment.last_run(file_of("population"), "digits")
    shown = [step for step in rows if step in (20, 50, 100, 200, 500, max(rows))]

    def row_of(kind: str, name: str) -> list[str]:
        return [name, *(f"{100 * rows[step][kind].mean():.1f}" for step in shown)]

    return markdown(
        ["test accuracy, %, after steps", *(f"{step:,}" for step in shown)],
        (row_of(kind, name) for kind, name in experiment.NAMES.items()),
    )


def inception() -> str:
    experiment = experiments.inception
    curves = experiment.curves(trainings(experiment)[1])
    target = curves["inception"].best()

    def row_of(model: str) -> list[str]:
        name, paper_steps, paper_share, paper_best = experiment.PAPER[model]
        steps = curves[model].steps_to(target)
        share = steps / curves["inception"].steps_to(target)
        best = f"{100 * curves[model].best():.1f}"
        ours = [or_dash(steps, ",.0f"), or_dash(share, ".2f"), best]
        return [name, *ours, paper_steps, paper_share, paper_best]

    return markdown(
        [
            "",
            "steps to Inception's best",
            "share",
            "best test accuracy, %",
            "the paper: steps",
            "share",
            "best, %",
        ],
        (row_of(model) for model in experiment.PAPER),
    )


def inception_ablated() -> str:
    experiment = experiments.inception
    curves = experiment.curves(trainings(experiment, ablate=True)[1])
    best = {model: 100 * curve.best() for model, curve in curves.items()}
    rows = [["nothing (BN-x5)", f"{best['bn_x5']:.1f}"]]
    for model in sorted(experiment.CHANGES, key=best.__getitem__):
        rows.append([experiment.CHANGES[model], f"{best[model]:.1f}"])
    return markdown(["taken back", "best test accuracy, %"], rows)


def saturation() -> str:
    experiment = experiments.saturation
    config, found = trainings(experiment)
    kinds = experiment.by_kind(found)

    def row_of(activation: str, normalize: bool) -> list[str]:
        row = [f"{activation}, {experiment.WITH[normalize]}"]
        for depth in config.depths:
            shares = experiment.summary(
                config.rates, **kinds[activation, normalize, depth]
            )
            row.append(shares["networks that train (%)"])
        return row

    names = [(a, n) for a in config.activations for n in experiment.WITH]
    head = "networks that train, %, by hidden layers"
    return markdown([head, *config.depths], (row_of(*name) for name in names))


def scale_invariance() -> str:
    experiment = experiments.scale_invariance
    _, found = trainings(experiment)
    rows = []
    for kind, values, _ in experiment.series(found, "deviations", "bn", "plain"):
        for quantity, row in zip(experiment.QUANTITIES, values.max(0), strict=True):
            label = f"{experiment.KINDS[kind].label}: {quantity}"
            rows.append([label, *(f"{value:.0e}" for value in row)])
    head = "relative change when W becomes a·W, a ="
    return markdown([head, *(f"{a:g}" for a in experiment.FACTORS)], rows)


def regularization() -> str:
    experiment = experiments.regularization
    config, found = trainings(experiment)
    known = experiment.findings(config, found)

    def row_of(change: str) -> list[str]:
        costs = map(str, known.get(change, ("", "", "")))
        row = [change]
        for normalize, cost in zip(experiment.WITH, costs, strict=False):
            error = experiment.errors(config, found, normalize, change)
            row += [percent(error), cost]
        return [*row, str(known[change].less) if change in known else ""]

    head = [
        *("changed", "with BN: error, %", "costs", "without BN: error, %", "costs"),
        "less with BN by",
    ]
    return markdown(head, map(row_of, (experiment.NOTHING, *config.changes)))


def why_it_works() -> str:
    experiment = experiments.why_it_works
    config, found = trainings(experiment)
    known = experiment.by_rate(found)

    def row_of(net: str, name: str) -> list[str]:
        return [name, *(percent(known.of(net, r, "test")) for r in config.rates)]

    return markdown(
        ["test accuracy, %, at rate", *(f"{rate:g}" for rate in config.rates)],
        (row_of(*network) for network in experiment.NAMES.items()),
    )


def smoothness() -> str:
    experiment = experiments.why_it_works
    _, found = trainings(experiment)
    known = experiment.by_rate(found)
    rate = experiment.shared_rate(known)

    def row_of(net: str, name: str) -> list[str]:
        return [name, *(f"{m:.3g}" for m in experiment.medians_of(known, net, rate))]

    head = [
        f"medians over training, at rate {rate:g}",
        "range of the loss",
        "change of the gradient",
        "smoothness",
        "\\|G − G'\\| / \\|G\\|",
        "cosine of G and G'",
    ]
    return markdown(head, (row_of(*network) for network in experiment.NAMES.items()))


def normalizers() -> str:
    experiment = experiments.normalizers
    names = {
        "batch": "batch norm",
        "whitening_eigh": "whitening, eigenvalues",
        "whitening_newton": "whitening, Newton–Schulz",
        "group": "group norm",
        "layer": "layer norm",
        "weight": "weight norm",
        "none": "none",
    }
    config, found = trainings(experiment)
    known = experiment.findings(config, found)
    _, tuned = trainings(experiment, tune=True)
    by_rate = experiment.by_rate(tuned)

    def row_of(method: str, name: str) -> list[str]:
        of_method = known[method]
        return [
            name,
            f"{of_method.rate:g}",
            percent(of_method.errors / 100),
            str(of_method.difference or "–"),
            f"{experiment.largest_rate(by_rate, method):g}",
            f"{of_method.relative_time:.2f}",
        ]

    head = (
        "",
        "best rate",
        "test error, %",
        "minus batch norm's",
        "largest rate that trains",
        "time of a step over batch norm's",
    )
    return markdown(head, (row_of(*method) for method in names.items()))


def weight_averaging() -> str:
    experiment = experiments.weight_averaging
    config, found = trainings(experiment)
    known = experiment.findings(config, found)
    names = experiment.kinds(experiment.SCHEDULES[config.data])

    def row_of(kind: str, name: str) -> list[str]:
        errors = (known.final[weights].get(kind) for weights in experiment.WEIGHTS)
        return [name, *("–" if e is None else percent(e / 100) for e in errors)]

    head = ["test error, %, by statistics", *experiment.WEIGHTS.values()]
    return markdown(head, (row_of(*kind) for kind in names.items()))


def early_statistics() -> str:
    experiment = experiments.weight_averaging
    config, found = trainings(experiment)
    early = experiment.findings(config, found).early
    steps = experiment.SCHEDULES[config.data].early

    def row_of(kind: str, name: str) -> list[str]:
        return [name, *(percent(errors / 100) for errors in early[kind].T)]

    head = ["error, %, after steps", *steps]
    return markdown(head, (row_of(*kind) for kind in experiment.EARLY.items()))


def small_batch() -> str:
    experiment = experiments.small_batch
    names = {
        "BN, running average": "BN, running average",
        "BN, average of one group": "BN, average of one group",
        "BN, pooled, groups of 128": "BN, pooled statistics",
        "BN, by the test group": "BN, by the test group",
        "BN, frozen at the end": "BN, frozen for the last fifth",
        "batch renorm": "`BatchRenorm`",
        "cross-replica BN": "BN, cross-replica",
        "group norm": "group norm",
    }
    config, found = trainings(experiment)
    shown = {"iid": config.sizes, "by class": config.sizes[:-1]}
    mixed, by_class = experiment.curves(config, found).values()

    def row_of(row: str, name: str) -> list[str]:
        in_both = zip((mixed, by_class), shown.values(), strict=True)
        errors = (of for order, sizes in in_both for of in order[row].T[: len(sizes)])
        return [name, *map(percent, errors)]

    head = [f"{order}: {size}" for order, sizes in shown.items() for size in sizes]
    return markdown(
        ["test error, %, in groups of", *head],
        (row_of(*row) for row in names.items()),
    )


def small_batch_deeper() -> str:
    experiment = experiments.small_batch
    config, found = trainings(experiment, deeper=True)
    errors = experiment.errors_deeper(config, found)
    differences = experiment.findings_deeper(config, found)

    def row_of(stop: Any) -> list[str]:
        minus = (str(differences[stop][kind]) for kind in experiment.AGAINST)
        place = stop.convolutions, f"{stop.steps:,}", stop.size
        pooled = percent(errors[stop]["pooled"])
        return [*map(str, place), experiment.WHEN[stop.when], pooled, *minus]

    against = (f"minus {name}" for name, _ in experiment.AGAINST.values())
    head = ["convolutions", "steps", "in groups of", "", "pooled: error, %", *against]
    return markdown(head, map(row_of, errors))


# Benches


def bench_layer() -> str:
    first, rows = last_run("bench_layer")
    rivals = first["settings"]["rivals"]
    table = []

    def values(row: Record) -> list[float]:
        ratios = [row["ratio"].get(name, {}).get("both", NAN) for name in rivals]
        return [*ratios, row["floors"]["bnjax"]["both"]]

    for dtype in first["settings"]["dtypes"]:
        table.append([f"**{dtype}**", *[""] * (len(rivals) + 1)])
        own = [row for row in rows if row["dtype"] == dtype]
        for row in own:
            shape = f"({',&nbsp;'.join(map(str, row['shape']))})"
            table.append([shape, *(f"{value:.2f}" for value in values(row))])
        columns = zip(*map(values, own), strict=True)
        means = (statistics.geometric_mean(column) for column in columns)
        table.append(["geometric mean", *(f"{value:.2f}" for value in means)])
    return markdown(["shape", *rivals, "bnjax ÷ floor"], table)


VARIANTS = {
    "flax": "Flax",
    "flax remat": "Flax, `nn.remat` of the blocks",
    "bnjax": "bnjax, the class swapped",
    "bnjax fused": "with `activation=`, `residual=`",
    "bnjax remat": "and `remat_policy`",
}


def bench_step() -> str:
    first, rows = last_run("bench_step")
    dtypes = first["settings"]["dtypes"]
    of = {(row["dtype"], row["variant"]): row for row in rows}
    fields = {"time": "time", "planned": "temporary", "stored": "residuals"}
    head = [f"{d}: {name}" for d in dtypes for name in fields.values()]

    def ratios(variant: str) -> list[str]:
        return [
            f"{of[d, variant][field] / of[d, 'flax'][field]:.2f}"
            for d in dtypes
            for field in fields
        ]

    shown = {v: name for v, name in VARIANTS.items() if v != "flax"}
    return markdown(["", *head], ([name, *ratios(v)] for v, name in shown.items()))


def bench_compile() -> str:
    _, rows = last_run("bench_compile")
    of = {(row["input"], row["variant"]): row for row in rows}
    sizes = list(dict.fromkeys(row["input"] for row in rows))
    shown = ("bnjax", "bnjax fused")

    def row_of(size: str, phase: str) -> list[str]:
        flax = of[size, "flax"][phase]
        ratios = (of[size, variant][phase] / flax for variant in shown)
        return [f"{size} input: {phase}", *(f"{ratio:.2f}" for ratio in ratios)]

    phases = "trace", "lower", "compile", "total"
    return markdown(
        ["over Flax's", *(VARIANTS[variant] for variant in shown)],
        (row_of(size, phase) for size in sizes for phase in phases),
    )


def bench_whitening() -> str:
    _, rows = last_run("bench_whitening")
    methods = {"eigh": "eigh", "newton_schulz": "newton_schulz", "cholesky": "cholesky"}
    return markdown(
        ["features", "group_size", *(f"`{name}`" for name in methods)],
        (
            [
                row["features"],
                row["group_size"],
                *(f"{row['time'][m] / row['time']['batch_norm']:.1f}" for m in methods),
            ]
            for row in rows
        ),
    )


def bench_accelerators() -> str:
    """Passes forward, and forward + backward, of the newest record of each program."""
    newest: dict[tuple, Record] = {}
    for r in read("bench_accelerators"):
        if r["kind"] == "layer" and (r["chips"], r["mode"]) == (1, "jit"):
            program = r["layer"], r["variant"], r["target"], r["dtype"]
            newest[*program, tuple(r["shape"]), r["direction"]] = r
    columns = [("v5e", "bfloat16"), ("v5e", "float32"), ("h100", "bfloat16")]
    columns += [("h100", "float32"), ("b200", "bfloat16")]
    rows = {
        "Flax": ("flax", "plain"),
        "bnjax": ("bnjax", "plain"),
        "Flax, ReLU behind": ("flax", "relu"),
        "bnjax, ReLU behind": ("bnjax", "relu"),
        "bnjax, `activation=`": ("bnjax", "activation"),
        "Flax, sum and ReLU behind": ("flax", "residual"),
        "bnjax, `residual=`, `activation=`": ("bnjax", "residual"),
        "Flax, mask": ("flax", "mask"),
        "bnjax, mask": ("bnjax", "mask"),
    }

    def passes(layer: str, variant: str, target: str, dtype: str) -> str:
        program = layer, variant, target, dtype, (256, 56, 56, 256)
        found = (newest.get((*program, way)) for way in ("forward", "both"))
        return ", ".join(f"{r['moved']:.1f}" if r else "–" for r in found)

    shown = {"v5e": "v5e", "h100": "H100", "b200": "B200"}
    head = [f"{shown[target]}, {dtype}" for target, dtype in columns]
    return markdown(
        ["passes", *head],
        ([name, *(passes(*row, *c) for c in columns)] for name, row in rows.items()),
    )


def bench_accelerators_step() -> str:
    rows = [r for r in read("bench_accelerators_step") if r["kind"] == "step"]
    of = {(r["target"], r["variant"]): r for r in rows if r["blocks"] == 0}
    targets = {"v5e": "v5e", "v5p": "v5p", "h100": "H100"}

    def values(target: str, variant: str) -> list[str]:
        row, flax = of[target, variant], of[target, "flax"]
        if variant == "flax":
            gigabytes = row["moved"] / 1e9, row["temporary"] / 1e9
            return [f"{gigabytes[0]:.1f} GB", f"{gigabytes[1]:.2f} GB"]
        return [f"{row[key] / flax[key]:.2f} ×" for key in ("moved", "temporary")]

    head = [h for name in targets.values() for h in (f"{name}: moved", "temporary")]
    return markdown(
        ["", *head],
        (
            [name, *(v for target in targets for v in values(target, variant))]
            for variant, name in VARIANTS.items()
        ),
    )


def versions(name: str) -> str:
    """What the newest run of an experiment ran on."""
    first = [r for r in read(name) if "versions" in r][-1]
    hardware, known = first["hardware"], first["versions"]
    rest = (
        f"{n} {v}" for n, v in known.items() if n in ("jax", "flax", "torch", "keras")
    )
    where = f"{hardware['cores']} cores of {hardware['cpu']}"
    return f"*Records of {first['time'][:10]}: {where}; {', '.join(rest)}.*"


OF_CLAIMS = "claim", "from", "the paper", "measured", "data", "verdict"

TABLES: dict[str, Callable[[], str]] = {
    "paper": functools.partial(of_readme, "The paper, claim by claim", *OF_CLAIMS),
    "successors": functools.partial(of_readme, "Its successors", *OF_CLAIMS),
    "library": functools.partial(
        of_readme, "The library", "claim", "command", "measured"
    ),
    **{
        table.__name__: table
        for table in (
            *(mnist, population, inception, inception_ablated, saturation),
            *(scale_invariance, regularization, why_it_works, smoothness, normalizers),
            *(weight_averaging, early_statistics, small_batch, small_batch_deeper),
            *(bench_layer, bench_step, bench_compile),
            *(bench_whitening, bench_accelerators, bench_accelerators_step),
        )
    },
}

"""The site's tables of results, from the records in experiments/results alone.

A page names one in a comment, which `hooks.py` replaces by the table:

    <!-- table: mnist -->
"""

# ruff: noqa: RUF001 (signs of typography)

import ast
import functools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.common import results

ROOT = Path(__file__).parent.parent
EXPERIMENTS = ROOT / "experiments"
NAN = math.nan

Record = dict[str, Any]


def markdown(head: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    """A table: the first column to the left, numbers to the right."""
    head = [str(name) for name in head]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    lines += [[str(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def of_readme(heading: str, *columns: str) -> str:
    """Columns of the table below a heading of experiments/README.md."""
    text = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
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


@functools.cache
def read(name: str) -> list[Record]:
    """The records of an experiment."""
    return results.read(EXPERIMENTS / "results" / f"{name}.jsonl")


def last_run(name: str, **settings: Any) -> tuple[Record, list[Record]]:
    """The first record of the newest run with these settings, and its measurements."""
    for first in reversed([r for r in read(name) if "settings" in r]):
        rows = [r for r in read(name) if r["run"] == first["run"] and r is not first]
        rows = [row for row in rows if row["kind"] != "end"]
        if first["settings"].items() >= settings.items() and rows:
            return first, rows
    raise LookupError(f"{name}.jsonl has no run with {settings}")


def cells(name: str, **fields: Any) -> list[tuple[Record, Record]]:
    """The trainings with these fields, and what was measured: the newest of each."""
    found = {
        json.dumps(r["cell"], sort_keys=True): (r["cell"], r["result"])
        for r in read(name)
        if r["kind"] == "cell" and fields.items() <= flat(r["cell"]).items()
    }
    return list(found.values())


def flat(cell: Record) -> Record:
    return {k: v for k, v in cell.items() if isinstance(v, (str, int, float, bool))}


def constant(module: str, name: str) -> Any:
    """A constant of an experiment's source."""
    tree = ast.parse((EXPERIMENTS / f"{module}.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise LookupError(f"{module}.py has no constant {name}")


def numbers(value: Any) -> list[float]:
    """All numbers in nested lists but those that are not known."""
    if isinstance(value, list):
        return [number for each in value for number in numbers(each)]
    return [] if value is None else [value]


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return statistics.fmean(values) if values else NAN


def percent(shares: Sequence[float], sign: str = "") -> str:
    """The mean and the standard deviation over seeds, in percent."""
    values = [100 * share for share in shares]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.1f}{spread}" if values else "–"


# The paper and its successors


def mnist() -> str:
    first, rows = last_run("mnist", data="mnist")
    rates = first["settings"]["learning_rates"]
    curves: dict[str, list[tuple[int, list[float]]]] = {"plain": [], "bn": []}
    for row in rows:
        by_rate = [mean(seeds) for seeds in zip(*row["test"], strict=True)]
        curves[row["network"]].append((row["step"], by_rate))

    def needed(network: str, rate: int, accuracy: float) -> str:
        steps = (step for step, test in curves[network] if test[rate] >= accuracy)
        step = next(steps, None)
        return "never" if step is None else f"{step:,}"

    def row_of(i: int, rate: float) -> list[str]:
        final = {network: curve[-1][1][i] for network, curve in curves.items()}
        reached = [needed(network, i, final["plain"]) for network in curves]
        return [f"{rate:g}", f"{final['plain']:.2%}", f"{final['bn']:.2%}", *reached]

    return markdown(
        [
            "learning rate",
            "final accuracy without BN",
            "with BN",
            "steps to the final accuracy without BN: without BN",
            "with BN",
        ],
        (row_of(i, rate) for i, rate in enumerate(rates)),
    )


def population() -> str:
    _, rows = last_run("population", data="digits")
    steps = sorted({row["step"] for row in rows})
    shown = [step for step in steps if step in (20, 50, 100, 200, 500, steps[-1])]
    names = constant("population", "NAMES")

    def accuracy(kind: str, step: int) -> str:
        found = (row["accuracy"][kind] for row in rows if row["step"] == step)
        return f"{100 * mean(found):.1f}"

    return markdown(
        ["test accuracy, %, after steps", *(f"{step:,}" for step in shown)],
        ([n, *(accuracy(kind, step) for step in shown)] for kind, n in names.items()),
    )


def _inception(**fields: Any) -> dict[str, Record]:
    fields = {"learning_rate": 0.03, "steps": 6000, "held_out": False} | fields
    return {cell["model"]: result for cell, result in cells("inception", **fields)}


def inception() -> str:
    results, paper = _inception(), constant("inception", "PAPER")
    target = max(results["inception"]["accuracy"])

    def steps_to(model: str) -> float:
        curve = zip(results[model]["steps"], results[model]["accuracy"], strict=True)
        return next((step for step, accuracy in curve if accuracy >= target), NAN)

    def row_of(model: str) -> list[str]:
        name, paper_steps, paper_share, paper_best = paper[model]
        steps = steps_to(model)
        share = steps / steps_to("inception")
        found = ["–", "–"] if math.isnan(steps) else [f"{steps:,}", f"{share:.2f}"]
        best = 100 * max(results[model]["accuracy"])
        return [name, *found, f"{best:.1f}", paper_steps, paper_share, paper_best]

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
        (row_of(model) for model in paper),
    )


def inception_ablated() -> str:
    results, changes = _inception(), constant("inception", "CHANGES")
    best = {
        model: 100 * max(r["accuracy"], default=NAN) for model, r in results.items()
    }
    rows = [["nothing (BN-x5)", f"{best['bn_x5']:.1f}"]]
    for model in sorted(changes, key=best.__getitem__):
        rows.append([changes[model], f"{best[model]:.1f}"])
    return markdown(["taken back", "best test accuracy, %"], rows)


def saturation() -> str:
    every = cells("saturation", data="digits")
    depths = sorted({cell["depth"] for cell, _ in every})

    def row_of(activation: str, normalize: bool) -> list[str]:
        row = [f"{activation}, {'with' if normalize else 'without'} BN"]
        for depth in depths:
            of = {"activation": activation, "normalize": normalize, "depth": depth}
            test = [
                numbers(r["test"]) for c, r in every if of.items() <= flat(c).items()
            ]
            trained = [accuracy > 0.5 for accuracy in numbers(test)]
            row.append(f"{100 * mean(trained):.0f}")
        return row

    kinds = [(a, n) for a in ("sigmoid", "tanh") for n in (False, True)]
    head = "networks that train, %, by hidden layers"
    return markdown([head, *depths], (row_of(*kind) for kind in kinds))


def scale_invariance() -> str:
    factors = constant("scale_invariance", "FACTORS")
    quantities = constant("scale_invariance", "QUANTITIES")
    rows = []
    for kind, name in (("bn", "with BN"), ("plain", "without BN")):
        found = [r["deviations"] for _, r in cells("scale_invariance", kind=kind)]
        for i, quantity in enumerate(quantities):
            worst = (max(seed[i][j] for seed in found) for j in range(len(factors)))
            rows.append([f"{name}: {quantity}", *(f"{value:.0e}" for value in worst)])
    head = "relative change when W becomes a·W, a ="
    return markdown([head, *(f"{a:g}" for a in factors)], rows)


def regularization() -> str:
    on = {"dropout": 0.4, "decay": 5e-4, "lrn": True, "augmentation": "strong"}
    on |= {"shuffling": "full"}
    weaker = {"decay": 1e-4}, {"decay": 0.0}
    removed: dict[str, Record] = {
        "nothing": {},
        "dropout": {"dropout": 0.0},
        "four fifths of L2": weaker[0],
        "L2": weaker[1],
        "LRN": {"lrn": False},
        "distortions": {"augmentation": "weak"},
        "shuffling across shards": {"shuffling": "within shards"},
        "all shuffling": {"shuffling": "none"},
        "as in the paper": {"dropout": 0.0, "lrn": False, "augmentation": "weak"}
        | weaker[0],
    }

    def errors(normalize: bool, changed: Record) -> dict[int, float]:
        of = {"normalize": normalize, "measured": "test", **on, **changed}
        found = cells("regularization", data="digits", **of)
        return {cell["seed"]: result["error"] for cell, result in found}

    rows = []
    for name, changed in removed.items():
        row = [name]
        for normalize in (True, False):
            before, after = errors(normalize, {}), errors(normalize, changed)
            row.append(percent([*after.values()]))
            change = [after[seed] - before[seed] for seed in before]
            row.append(percent(change, "+") if changed else "")
        rows.append(row)
    head = ["removed", "with BN: error, %", "change", "without BN: error, %", "change"]
    return markdown(head, rows)


def _by_rate(name: str, model: str, field: str) -> dict[str, dict[float, list[Any]]]:
    """A field by the name of the network and the learning rate, for each seed."""
    found: dict[str, dict[float, list[Any]]] = {}
    for cell, result in cells(name, data="digits"):
        if field in result and "rate" in cell:
            rates = found.setdefault(cell[model], {})
            rates.setdefault(cell["rate"], []).append(result[field])
    return found


def why_it_works() -> str:
    names = constant("why_it_works", "NAMES")
    found = _by_rate("why_it_works", "net", "test")
    rates = sorted(found["bn"])
    return markdown(
        ["test accuracy, %, at rate", *(f"{rate:g}" for rate in rates)],
        (
            [name, *(percent(numbers(found[net].get(rate, []))) for rate in rates)]
            for net, name in names.items()
        ),
    )


def smoothness() -> str:
    names = constant("why_it_works", "NAMES")
    validation = _by_rate("why_it_works", "net", "validation")["plain"]
    shared = max(validation, key=lambda rate: mean(validation[rate]))
    fields: dict[str, Callable[[Record], list[float]]] = {
        "range of the loss": lambda r: [
            max(row) - min(row) for row in r["losses"] if None not in row
        ],
        "change of the gradient": lambda r: numbers([row[1] for row in r["changes"]]),
        "smoothness": lambda r: numbers(r["smoothness"]),
        "\\|G − G'\\| / \\|G\\|": lambda r: numbers([row[1:] for row in r["shift"]]),
        "cosine of G and G'": lambda r: numbers([row[1:] for row in r["cosine"]]),
    }

    def row_of(net: str, name: str) -> list[str]:
        of = cells("why_it_works", data="digits", net=net, rate=shared)
        each = ([v for _, r in of for v in field(r)] for field in fields.values())
        return [name, *(f"{statistics.median(values):.3g}" for values in each)]

    head = f"medians over training, at rate {shared:g}"
    return markdown([head, *fields], (row_of(*one) for one in names.items()))


def normalizers() -> str:
    names = {
        "batch": "batch norm",
        "whitening_eigh": "whitening, eigenvalues",
        "whitening_newton": "whitening, Newton–Schulz",
        "group": "group norm",
        "layer": "layer norm",
        "weight": "weight norm",
        "none": "none",
    }
    final = _by_rate("normalizers", "method", "final")
    validation = _by_rate("normalizers", "method", "validation")
    (seconds,) = (r["seconds"] for c, r in cells("normalizers") if "methods" in c)
    rows = []
    for method, name in names.items():
        tried = validation[method]
        best = max(sorted(tried), key=lambda rate: mean(tried[rate]))
        wrong = [[1 - a for a in final[method].get(r, [])] for r in (best, 1.0)]
        time = seconds[method] / seconds["batch"]
        rows.append([name, f"{best:g}", *map(percent, wrong), f"{time:.2f}"])
    head = (
        "",
        "best rate",
        "test error, %",
        "at rate 1",
        "time of a step over batch norm's",
    )
    return markdown(head, rows)


def _small_batch(data: str, **fields: Any) -> str:
    rows = {
        "BN, running average": ("batch_norm", "running"),
        "BN, pooled statistics": ("batch_norm", "pooled"),
        "BN, by the test group": ("batch_norm", "batch"),
        "`GhostBatchNorm`": ("ghost", "running"),
        "BN, frozen for the last fifth": ("frozen", "running"),
        "`BatchRenorm`": ("renorm", "running"),
        "`DecorrelatedBatchNorm`": ("decorrelated", "running"),
        "BN, cross-replica": ("cross_replica", "running"),
        "group norm": ("group_norm", "running"),
        "layer norm": ("layer_norm", "running"),
    }
    columns = [("mixed", size) for size in (2, 8, 32, 128)]
    columns += [("by class", size) for size in (2, 8, 32)]
    every = cells("small_batch", data=data, measured="test", **fields)
    orders = list(dict.fromkeys(cell["order"] for cell, _ in every))
    sorted_order = next(order for order in orders if order != "mixed")

    def cell_of(method: str, kind: str, order: str, size: int) -> str:
        order = order if order == "mixed" else sorted_order
        of = {"method": method, "order": order, "size": size}
        found: dict[int, float] = {}
        for cell, result in every:
            if of.items() <= flat(cell).items() and kind in result:
                found[cell["seed"]] = result[kind]
        if not found and size < 128:  # does not depend on the groups
            return cell_of(method, kind, "mixed", 128)
        return f"{100 * mean(found.values()):.1f}" if found else "–"

    head = [f"{'iid' if order == 'mixed' else order}: {n}" for order, n in columns]
    return markdown(
        ["test error, %, in groups of", *head],
        ([name, *(cell_of(*row, *c) for c in columns)] for name, row in rows.items()),
    )


def small_batch() -> str:
    return _small_batch("digits")


def small_batch_cifar10() -> str:
    return _small_batch("cifar10")


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


TABLES: dict[str, Callable[[], str]] = {
    "paper": functools.partial(
        of_readme, "The paper, claim by claim", "claim", "from", "the paper", "measured"
    ),
    "successors": functools.partial(
        of_readme, "Its successors", "claim", "from", "the paper", "measured"
    ),
    "library": functools.partial(
        of_readme, "The library", "claim", "command", "measured"
    ),
    **{
        table.__name__: table
        for table in (
            *(mnist, population, inception, inception_ablated, saturation),
            *(scale_invariance, regularization, why_it_works, smoothness, normalizers),
            *(small_batch, small_batch_cifar10, bench_layer, bench_step, bench_compile),
            *(bench_whitening, bench_accelerators, bench_accelerators_step),
        )
    },
}

"""Small faults of the library, each of which the default tests must catch.

    python tests/faults.py                  # all: a quarter of an hour on two cores
    python tests/faults.py --only shift     # those whose names contain a word
    python tests/faults.py --whole          # without the tests that know best: a night

Each fault is one replacement in a copy of the library. The tests that know the place
best are run first (`first`, a file and perhaps a -k expression); where they pass, the
whole default suite is run. A table says which test caught each fault, and the status is
1 if one was not caught. `tests/test_faults.py` checks that every fault can be applied.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Fault(NamedTuple):
    """One replacement.

    Attributes:
        name: what is wrong.
        file: of the library.
        old: the right text, once in the file.
        new: the wrong one.
        first: the tests to run first.
    """

    name: str
    file: str
    old: str
    new: str
    first: str


BATCH = "moments/_batch.py"
MASKS, MERGE, MOMENTS = "moments/_masks.py", "moments/_merge.py", "moments/_moments.py"
TRANSFORM = "normalize/_transform.py"

FAULTS = [
    # ---- moments ----
    Fault(
        "the mask is ignored by the sum",
        BATCH,
        "multiply_by_weights(deviation(*first, mask, spec), mask)",
        "multiply_by_weights(deviation(*first, None, spec), mask)",
        "tests/test_moments.py",
    ),
    Fault(
        "the mask is ignored by the sum of squares",
        BATCH,
        "    d = deviation(*again, mask, spec)",
        "    d = deviation(*again, None, spec)",
        "tests/test_moments.py",
    ),
    Fault(
        "the count ignores the mask",
        MASKS,
        "    if mask is None:\n        return jnp.full((), math.prod(",
        "    if True:\n        return jnp.full((), math.prod(",
        "tests/test_moments.py",
    ),
    Fault(
        "the count does not repeat a mask that is broadcast",
        MASKS,
        "    counts = counts * jnp.asarray(repeats, dtype)",
        "    counts = counts * jnp.asarray(1, dtype)",
        "tests/test_moments.py",
    ),
    Fault(
        "masked values are multiplied by 0, NaN included",
        MASKS,
        "_axes.where(mask.astype(bool), x, jnp.zeros((), x.dtype))",
        "x * jnp.broadcast_to(mask.astype(bool), x.shape)",
        "tests/test_moments.py",
    ),
    Fault(
        "the shift is forgotten in the mean",
        BATCH,
        "    mean, mean_error = fast_two_sum(centre, delta)",
        "    mean, mean_error = fast_two_sum(jnp.zeros_like(centre), delta)",
        "tests/test_moments.py",
    ),
    Fault(
        "m2 is not corrected by the mean deviation",
        BATCH,
        "    m2 = jnp.maximum(s2 - abs_product(s1, delta), 0)",
        "    m2 = jnp.maximum(s2, 0)",
        "tests/test_moments.py",
    ),
    Fault(
        "the variance may be negative",
        BATCH,
        "    m2 = jnp.maximum(s2 - abs_product(s1, delta), 0)",
        "    m2 = s2 - abs_product(s1, delta)",
        "tests/test_moments.py",
    ),
    Fault(
        "sums far from the shift are taken as they are",
        BATCH,
        "    return jnp.all(exact)",
        "    return jnp.all(exact) | True",
        "tests/test_moments.py",
    ),
    Fault(
        "one feature that is exact is enough",
        BATCH,
        "    return jnp.all(exact)",
        "    return jnp.any(exact)",
        "tests/test_moments.py",
    ),
    Fault(
        "a shift that is not finite is used",
        BATCH,
        "    return jnp.where(jnp.isfinite(shift), shift.astype(zero.dtype), zero)",
        "    return shift.astype(zero.dtype)",
        "tests/test_moments.py",
    ),
    Fault(
        "a shift that replicas may not share is used",
        BATCH,
        "    if shift is None or not _replicas.replicated(shift, axis_name):",
        "    if shift is None:",
        "tests/test_sharded.py",
    ),
    Fault(
        "a subsample's mean is one of the masked values, too",
        BATCH,
        "multiply_by_weights(zero_where_masked(x.astype(dtype), mask), mask)",
        "multiply_by_weights(x.astype(dtype), mask)",
        "tests/test_moments.py",
    ),
    Fault(
        "of the values that count, the least are the subsample",
        BATCH,
        "    chosen = blocks.argmax(axis + 1)",
        "    chosen = blocks.argmin(axis + 1)",
        "tests/test_moments.py",
    ),
    Fault(
        "the tangent of the mean is not summed over replicas",
        BATCH,
        "        sums = _replicas.all_sum(jnp.stack(sums), axis_name, groups)",
        "        sums = jnp.stack(sums)",
        "tests/test_sharded.py",
    ),
    Fault(
        "the tangent of m2 lacks its factor of 2",
        BATCH,
        "mean_from_sum(sums[0], result.count), 2 * sums[1].real",
        "mean_from_sum(sums[0], result.count), sums[1].real",
        "tests/test_gradients.py",
    ),
    Fault(
        "the tangent of the moments ignores the mask",
        BATCH,
        "    first = multiply_by_weights(zero_where_masked(dx, where), mask)",
        "    first = multiply_by_weights(dx, mask)",
        "tests/test_gradients.py",
    ),
    Fault(
        "the tangent of a merge has no weights",
        MERGE,
        "    first = half = broadcast_count(rows.count, dmean) * dmean",
        "    first = half = dmean",
        "tests/test_ghost.py",
    ),
    Fault(
        "weights have no derivative",
        BATCH,
        "    if is_weighted(mask) and not is_zero(dw):",
        "    if False:",
        "tests/test_weights.py",
    ),
    Fault(
        "the pool's derivative by the weights is that of the group",
        MERGE,
        "        about_pool[0] = first + apart * weight\n",
        "",
        "tests/test_weights.py",
    ),
    Fault(
        "weights count, and do not weigh",
        MASKS,
        "return x * mask.astype(x.dtype) if",
        "return x if",
        "tests/test_weights.py",
    ),
    Fault(
        "the merged mean is a mean of means",
        MOMENTS,
        "    mean = union.blend(_inexact(a.mean), _inexact(b.mean))",
        "    mean = (_inexact(a.mean) + _inexact(b.mean)) / 2",
        "tests/test_moments.py",
    ),
    Fault(
        "a merge leaves the variance of the means out",
        MOMENTS,
        "Moments(union.count, mean, union.total(a.m2, b.m2, between))",
        "Moments(union.count, mean, union.total(a.m2, b.m2, 0 * between))",
        "tests/test_moments.py",
    ),
    Fault(
        "n where n - 1 belongs",
        MOMENTS,
        "m2, count = jnp.asarray(m2), as_count(count) - ddof",
        "m2, count = jnp.asarray(m2), as_count(count)",
        "tests/test_moments.py",
    ),
    Fault(
        "counts of integers begin again",
        MOMENTS,
        "            count = jnp.where(count < a, largest, count)",
        "            pass",
        "tests/test_moments.py",
    ),
    # ---- replicas ----
    Fault(
        "groups are ignored",
        "_replicas.py",
        "_groups_of(rows.shape[0], groups) == np.arange(len(groups))[:, None]",
        "np.ones((len(groups), rows.shape[0]), bool)",
        "tests/test_sharded.py",
    ),
    Fault(
        "groups are ignored by the derivative",
        "_replicas.py",
        "    in_group = (group_of == group_index)",
        "    in_group = (group_of == group_of)",
        "tests/test_sharded.py",
    ),
    Fault(
        "every group is as large as the first",
        "_replicas.py",
        "[len(g) for g in groups]",
        "[len(groups[0]) for g in groups]",
        "tests/test_sharded.py",
    ),
    Fault(
        "two axes of replicas count as the first",
        "_replicas.py",
        "    return math.prod(lax.axis_size(name) for name in _names(axis_name))",
        "    return lax.axis_size(_names(axis_name)[0])",
        "tests/test_sharded.py",
    ),
    # ---- normalization ----
    Fault(
        "epsilon is forgotten",
        TRANSFORM,
        "    var_plus_epsilon = var + jnp.asarray(epsilon, var.dtype)",
        "    var_plus_epsilon = var + 0 * jnp.asarray(epsilon, var.dtype)",
        "tests/test_normalize.py",
    ),
    Fault(
        "bias before scale",
        TRANSFORM,
        "    return (x - mean) * a + bias",
        "    return ((x - mean) + bias) * a",
        "tests/test_normalize.py",
    ),
    Fault(
        "the derivative by the variance has another sign",
        TRANSFORM,
        "a * rstd * dvar.astype(a.dtype) / -2",
        "a * rstd * dvar.astype(a.dtype) / 2",
        "tests/test_gradients.py",
    ),
    Fault(
        "the derivative by the mean is missing",
        TRANSFORM,
        "    offset = _add_tangents(dbias, None if dmean is None else -a * dmean)",
        "    offset = dbias",
        "tests/test_gradients.py",
    ),
    Fault(
        "the derivative by the scale lacks 1 / std",
        TRANSFORM,
        "        dy = again(_add_tangents((x - mean) * rstd * slope, dy))",
        "        dy = again(_add_tangents((x - mean) * slope, dy))",
        "tests/test_gradients.py",
    ),
    Fault(
        "the residual comes after the activation",
        TRANSFORM,
        "        y = y + residual.astype(y.dtype)\n",
        "        y = activation(y) + residual.astype(y.dtype) if activation else y\n",
        "tests/test_normalize.py",
    ),
    Fault(
        "garbage under the mask reaches the output",
        TRANSFORM,
        "return x if mask is None else zero_where_masked(x, valid_or_bounded(x, mask))",
        "return x",
        "tests/test_normalize.py",
    ),
    Fault(
        "huge padding reaches the derivative",
        MASKS,
        "    return mask.astype(bool) | (jnp.abs(x) <= limit)",
        "    return mask.astype(bool) | jnp.isfinite(x)",
        "tests/test_gradients.py",
    ),
    Fault(
        "nothing valid does not fall back on the running mean",
        TRANSFORM,
        "        mean = _axes.where(batch.count > 0, mean, inputs.fallback_mean)",
        "        pass",
        "tests/test_contracts.py -k nothing",
    ),
    Fault(
        "the result is of the dtype of the arithmetic",
        TRANSFORM,
        "_backend.force_rounding(y.astype(spec.output), spec.implementation)",
        "_backend.force_rounding(y, spec.implementation)",
        "tests/test_normalize.py",
    ),
    Fault(
        "what the derivative needs is stored, not computed again",
        "normalize/_transform.py",
        "    jax.checkpoint, policy=_save_moments, prevent_cse=False",
        "functools.partial(functools.partial)",
        "tests/test_contracts.py -k stored",
    ),
    # ---- variants ----
    Fault(
        "r multiplies d, too",
        "renorm.py",
        "inputs.scale * r, inputs.bias + inputs.scale * d",
        "inputs.scale * r, inputs.bias + inputs.scale * r * d",
        "tests/test_renorm.py",
    ),
    Fault(
        "r and d have gradients",
        "renorm.py",
        "    r, d = lax.stop_gradient(_corrections(mean, var, inputs, r_max, d_max))",
        "    r, d = _corrections(mean, var, inputs, r_max, d_max)",
        "tests/test_renorm.py",
    ),
    Fault(
        "r is not bounded from below",
        "renorm.py",
        "    r = jnp.clip(jnp.sqrt(var + epsilon) / sigma, 1 / r_max, r_max)",
        "    r = jnp.clip(jnp.sqrt(var + epsilon) / sigma, 0, r_max)",
        "tests/test_renorm.py",
    ),
    Fault(
        "a domain sees the examples of all",
        "split.py",
        "        own = (domain == number).reshape(along)",
        "        own = (domain == domain).reshape(along)",
        "tests/test_split.py",
    ),
    Fault(
        "domains are numbered in the dtype that they are given in",
        "split.py",
        "    if jnp.iinfo(domain.dtype).bits < 32:",
        "    if False:",
        "tests/test_split.py",
    ),
    Fault(
        "a domain that has no statistics gets zeros",
        "split.py",
        "    each = jnp.where(own.any(1), each, jnp.full((), jnp.nan, rows.dtype))",
        "    pass",
        "tests/test_split.py",
    ),
    Fault(
        "groups take turns with the examples",
        "normalize/_groups.py",
        "        return value.reshape(\n",
        "        sizes = sizes[::-1]\n        return value.reshape(\n",
        "tests/test_ghost.py",
    ),
    Fault(
        "the covariance is not symmetric in its derivative",
        "whiten/_co_moments.py",
        "    dm2 = s2 + jnp.swapaxes(s2, -1, -2)",
        "    dm2 = 2 * s2",
        "tests/test_whiten.py",
    ),
    Fault(
        "Newton-Schulz does not divide by the trace",
        "whiten/_whiten.py",
        "    return p / jnp.sqrt(trace)",
        "    return p",
        "tests/test_whiten.py",
    ),
    # ---- running statistics and layers ----
    Fault(
        "the decay weighs the new value",
        "running.py",
        "State(*(decay * old + (1 - decay) * b for",
        "State(*(decay * b + (1 - decay) * old for",
        "tests/test_running.py",
    ),
    Fault(
        "the debiased average is not debiased",
        "running.py",
        "        jnp.where(seen, state.var / weight, 1),",
        "        jnp.where(seen, state.var, 1),",
        "tests/test_running.py",
    ),
    Fault(
        "the average over batches forgets",
        "running.py",
        "        state.var + (batch.variance(ddof) - state.var) / t,",
        "        state.var + (batch.variance(ddof) - state.var) / 2,",
        "tests/test_running.py",
    ),
    Fault(
        "a feature without values is updated",
        "running.py",
        "    usable = broadcast_count(jnp.asarray(batch.count), mean).real > ddof",
        "    usable = broadcast_count(jnp.asarray(batch.count), mean).real >= 0",
        "tests/test_running.py",
    ),
    Fault(
        "a batch with NaN is averaged in",
        "running.py",
        "    if skip_nonfinite:",
        "    if False:",
        "tests/test_running.py",
    ),
    Fault(
        "unbiased has no effect",
        "_layer.py",
        "ddof=int(unbiased)",
        "ddof=0",
        "tests/test_linen.py",
    ),
    Fault(
        "Linen writes statistics in evaluation",
        "linen/_batch_norm.py",
        "        update = not use_running if update_stats is None else update_stats",
        "        update = True if update_stats is None else update_stats",
        "tests/test_linen.py",
    ),
    Fault(
        "Linen shares statistics when it is initialized",
        "linen/_batch_norm.py",
        "        if self.is_initializing():\n            with",
        "        if False:\n            with",
        "tests/test_linen.py",
    ),
    Fault(
        "the recorded Moments replace those before",
        "linen/_batch_norm.py",
        "collected.value = ops.merge(collected.value, batch)",
        "collected.value = batch",
        "tests/test_contracts.py -k recorded",
    ),
    Fault(
        "the bias is created before the scale",
        "linen/_batch_norm.py",
        "        if self.use_scale:\n",
        "        if self.use_bias:\n"
        '            self.param("bias", self.bias_init, shape, self.param_dtype)\n'
        "        if self.use_scale:\n",
        "tests/test_linen.py",
    ),
    # ---- what surrounds the layers ----
    Fault(
        "jit does not see whether layers are replaced",
        "linen/_replace.py",
        "with _rules((*outer, rule)), nn.intercept_methods(intercept):",
        "with nn.intercept_methods(intercept):",
        "tests/test_replacing.py -k jit",
    ),
    Fault(
        "Moments stay below the author's nn.vmap",
        "linen/_replace.py",
        """            _move_moments(module.scope)
""",
        "",
        "tests/test_replacing.py -k tools",
    ),
    Fault(
        "a replaced layer of NNX gets variables without the old metadata",
        "nnx/_replace.py",
        "            setattr(new, name, variable)",
        """            if variable is not None:
                getattr(new, name)[...] = variable.get_value()""",
        "tests/test_replace.py -k what_the_author_set",
    ),
    Fault(
        "what an author calls moments is moved",
        "linen/_replace.py",
        'isinstance(stats.get("moments"), Moments | whiten.CoMoments)',
        '"moments" in stats',
        "tests/test_replacing.py -k author",
    ),
    Fault(
        "a subclass of NNX loses its own variables",
        "nnx/_replace.py",
        "if key not in known and isinstance",
        "if key in known and isinstance",
        "tests/test_replace.py",
    ),
    Fault(
        "save_safetensors replaces folders",
        "convert/_safetensors.py",
        "    _check_file(path)\n    write",
        "    write",
        "tests/test_safetensors.py",
    ),
    Fault(
        "safetensors gets arrays in another order",
        "convert/_safetensors.py",
        'np.asarray(v, order="C")',
        "np.asarray(v)",
        "tests/test_safetensors.py",
    ),
    Fault(
        "Algorithm 2 averages biased variances",
        "population.py",
        "np.where(count > 1, count - 1, 1)",
        "np.where(count > 1, count, 1)",
        "tests/test_population.py",
    ),
    Fault(
        "pooled statistics leave the variance between batches out",
        "population.py",
        "        var = var + np.abs(d) ** 2 * share * (1 - share)",
        "        pass",
        "tests/test_population.py",
    ),
    Fault(
        "batches weigh the same, whatever their size",
        "population.py",
        "        return _Average(count, mean,",
        "        return _Average(np.minimum(count, 2), mean,",
        "tests/test_population.py",
    ),
    Fault(
        "gradients of micro-batches are summed",
        "training/_batch_stats.py",
        "(g / len(losses)).astype(p.dtype)",
        "g.astype(p.dtype)",
        "tests/test_training.py",
    ),
    Fault(
        "accumulation forgets the pool of earlier calls",
        "training/_batch_stats.py",
        "    if pool is not None:",
        "    if False:",
        "tests/test_training.py",
    ),
    Fault(
        "merged running statistics are a mean of variances",
        "training/_batch_stats.py",
        "    mean, var = jnp.where(seen, mean, 0), jnp.where(seen, var, 0)",
        "    mean, var = jnp.where(seen, mean, 0), jnp.where(seen, var, 0)\n"
        "    mean = jnp.broadcast_to(mean.mean(0, keepdims=True), mean.shape)",
        "tests/test_training.py",
    ),
    Fault(
        "the scale decays",
        "training/__init__.py",
        '        return not (normalizes or name == "bias")',
        '        return name != "bias"',
        "tests/test_training.py",
    ),
    Fault(
        "a folded bias forgets the mean",
        "fold/_kernels.py",
        '    return multiplier, vectors["bias"] - mean * multiplier',
        '    return multiplier, vectors["bias"] + 0 * mean',
        "tests/test_fold.py",
    ),
    Fault(
        "the epsilon of Keras is that of Flax",
        "convert/_conventions.py",
        '*(0.99, "old", "biased", 1e-3, -1)',
        '*(0.99, "old", "biased", 1e-5, -1)',
        "tests/test_convert.py",
    ),
    Fault(
        "a dense kernel of PyTorch is not transposed",
        "convert/_conventions.py",
        '*("OI", "OI*", "IO~")',
        '*("IO", "OI*", "IO~")',
        "tests/test_convert.py",
    ),
    Fault(
        "many features alarm by chance",
        "diagnostics/_judge.py",
        "    share = _ALARMS / (4 * max(features, 1))",
        "    share = _ALARMS * 100",
        "tests/test_diagnostics.py",
    ),
    Fault(
        "a momentum of PyTorch is none of the findings",
        "diagnostics/_momentum.py",
        "SMALLEST = 0.4",
        "SMALLEST = 0.05",
        "tests/test_diagnostics.py",
    ),
    Fault(
        "a picture marks the channels that are not reported",
        "diagnostics/_figure.py",
        "((~reported, DOT, 0), (reported, REPORTED, 1))",
        "((reported, DOT, 0), (~reported, REPORTED, 1))",
        "tests/test_diagnostics.py",
    ),
    Fault(
        "replicas that differ agree",
        "diagnostics/_measures.py",
        "        if difference.relative > rtol:",
        "        if difference.relative > rtol + 1:",
        "tests/test_diagnostics.py",
    ),
    Fault(
        "the effective rank is that of values about 0",
        "diagnostics/_measures.py",
        "    rows = rows - rows.mean(0, keepdims=True)",
        "    pass",
        "tests/test_diagnostics.py",
    ),
]


def apply(fault: Fault, library: Path) -> None:
    """Puts the fault into the library of that folder."""
    path = library / fault.file
    text = path.read_text()
    found = text.count(fault.old)
    if found != 1:
        raise ValueError(
            f"{fault.name!r}: {fault.file} has {found} times\n{fault.old}\nexpected "
            "once. Rewrite the fault after the library."
        )
    path.write_text(text.replace(fault.old, fault.new))


def caught(fault: Fault, whole: bool) -> str | None:
    """The test that fails first with the fault, or None."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".git", "__pycache__", "runs")
        shutil.copytree(ROOT, copy, ignore=ignored)
        apply(fault, copy / "bnjax")
        first = [] if whole else [["-n0", *fault.first.split(maxsplit=2)]]
        for tests in [*first, []]:
            command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header"]
            command += ["-p", "no:cacheprovider", *tests]
            command += ["--ignore=tests/test_faults.py"]  # knows each line by heart
            result = subprocess.run(command, cwd=copy, capture_output=True, text=True)
            failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.M)
            if failed:
                return failed[0]
            if result.returncode not in (0, 5):
                return f"pytest ended with {result.returncode}: {result.stdout[-300:]}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a word of the names")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time")
    parser.add_argument("--whole", action="store_true", help="run the whole suite")
    options = parser.parse_args()
    faults = [f for f in FAULTS if options.only in f"{f.name} {f.file}"]

    def run(fault: Fault) -> bool:
        start = time.monotonic()
        test = caught(fault, options.whole)
        seconds = time.monotonic() - start
        print(f"{fault.name} | {test or 'NOT CAUGHT'} | {seconds:.0f} s", flush=True)
        return test is None

    with ThreadPoolExecutor(1 if options.whole else options.jobs) as pool:
        missed = sum(pool.map(run, faults))
    print(f"{len(faults) - missed} of {len(faults)} faults were caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

"""One comparison that fails on what it should, and the measures of the tests."""

import collections
import itertools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from experiments.bench.programs import Part, Program

# Relative to the largest expected magnitude. Looser ones need a reason on the line.
TOLERANCE = {
    "float16": 1e-3,
    "bfloat16": 1e-2,
    "float32": 1e-6,
    "float64": 1e-12,
    "complex64": 1e-6,
    "complex128": 1e-12,
}
GRADIENT_TOLERANCE = {"bfloat16": 2e-2, "float32": 2e-5, "float64": 1e-10}


def assert_close(actual, expected, *, tol=None, dtype=None, what=""):
    """Same shape, the dtype asked for, finite, and close at the scale of `expected`."""
    actual, expected = jnp.asarray(actual), np.asarray(expected)
    if dtype is not None:
        assert actual.dtype == jnp.dtype(dtype), f"{what} {actual.dtype} is not {dtype}"
    assert actual.shape == expected.shape, f"{what} {actual.shape} {expected.shape}"
    is_complex = np.iscomplexobj(actual) or np.iscomplexobj(expected)
    wide = np.complex128 if is_complex else np.float64
    got, want = np.asarray(actual).astype(wide), expected.astype(wide)
    assert np.isfinite(want).all(), f"{what} the expected value is not finite"
    assert np.isfinite(got).all(), f"{what} not finite: {got}"
    tol = TOLERANCE[actual.dtype.name] if tol is None else tol
    error = np.abs(got - want).max(initial=0)
    limit = tol * max(np.abs(want).max(initial=0), 1e-30)
    assert error <= limit, f"{what} error {error:.3g} > {limit:.3g}"


def covering(strength: int = 2, **factors) -> pytest.MarkDecorator:
    """`parametrize` by all combinations of the factors, most of them marked `full`.

    The others, which the default suite runs, hold each combination of the values of any
    `strength` factors at least once: each pair of values for 2, each value for 1. They
    are chosen greedily, and always the same.

    Args:
        strength: how many factors at a time.
        **factors: the values of each argument of the test; ids for a dict's.
    """
    names, values = [*factors], [[*v] for v in factors.values()]
    rows = [*itertools.product(*(range(len(v)) for v in values))]
    chosen = itertools.combinations(range(len(names)), min(strength, len(names)))
    columns = [*chosen]

    def held(row):
        return {(c, tuple(row[i] for i in c)) for c in columns}

    missing, kept = set().union(*map(held, rows)), set()
    while missing:
        row = max(rows, key=lambda row: len(held(row) & missing))
        kept.add(row)
        missing -= held(row)
    parameters = [
        pytest.param(
            *(v[i] for v, i in zip(values, row)),
            marks=[] if row in kept else pytest.mark.full,
            id="-".join(label(v[i]) for v, i in zip(values, row)),
        )
        for row in rows
    ]
    return pytest.mark.parametrize(names, parameters)


def label(value: Any) -> str:
    """`value` in the name of a test, from which it can be repeated."""
    if isinstance(value, (tuple, list)):
        return "(" + ",".join(map(label, value)) + ")"
    if isinstance(value, Mapping):
        return label([f"{k}={label(v)}" for k, v in value.items()])
    if isinstance(value, (str, bytes, int, float, complex, type(None), P)):
        return str(value)
    return getattr(value, "__name__", None) or getattr(value, "name", str(value))


def by_default(*kept, **factor) -> pytest.MarkDecorator:
    """`parametrize` by the values of one factor, those that are not `kept` in full.

    >>> by_default("typed", mode=["typed", "untyped"]).args[0]
    'mode'
    """
    ((name, values),) = factor.items()
    missing = [value for value in kept if value not in values]
    assert not missing, f"{missing} are not of {[*values]}"
    parameters = [
        pytest.param(v, marks=[] if v in kept else pytest.mark.full, id=label(v))
        for v in values
    ]
    return pytest.mark.parametrize(name, parameters)


def assert_trees_close(actual, expected, **kwargs):
    paths, tree = jax.tree.flatten_with_path(actual)
    leaves, expected_tree = jax.tree.flatten(expected)
    assert tree == expected_tree, f"{tree} is not {expected_tree}"
    for (path, a), e in zip(paths, leaves, strict=True):
        assert_close(a, e, what=jax.tree_util.keystr(path), **kwargs)


def poison(x, mask, value=np.nan):
    """`x` with `value` wherever the mask is False."""
    return np.where(mask, x, value).astype(np.asarray(x).dtype)


def residual_bytes(f, *args) -> int:
    """Bytes that reverse mode keeps between the forward and the backward pass."""
    kept = jax.eval_shape(lambda *args: jax.vjp(f, *args)[1], *args)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


def compiled_text(f, *args) -> str:
    return jax.jit(f).lower(*args).compile().as_text()


def collectives(f, *args) -> dict[str, int]:
    """How many of each collective the compiled program always runs."""
    return kinds(Program(compiled_text(f, *args)).always)


def kinds(part: Part) -> dict[str, int]:
    """How many of each collective a part of a program holds."""
    return dict(collections.Counter(sent.kind for sent in part.collectives))


def plain_batch_norm(x, scale, bias, *, axes, mask=None, epsilon=1e-5):
    """The formula in jnp, two passes, for JAX to differentiate by itself."""
    count = jnp.sum(jnp.ones(x.shape) if mask is None else mask + 0 * x.real, axes)
    n = jnp.maximum(count, 1)
    mean = jnp.sum(x, axes, where=mask) / n
    centred = x - jnp.expand_dims(mean, axes)
    m2 = jnp.sum((centred * jnp.conj(centred)).real, axes, where=mask)
    rstd = 1 / jnp.sqrt(m2 / n + epsilon)
    scale, bias, rstd = (jnp.expand_dims(v, axes) for v in (scale, bias, rstd))
    return centred * rstd * scale + bias, (mean, m2)


# Flax's metadata boxes, by name.


class Tagged(flax.struct.PyTreeNode, nn.meta.AxisMetadata):
    """A box of the user's, whose content has another name."""

    content: Any

    def unbox(self):
        return self.content

    def replace_boxed(self, val):
        return self.replace(content=val)

    def add_axis(self, index, params):
        return self

    def remove_axis(self, index, params):
        return self


BOXES = {
    "Partitioned": lambda leaf: nn.Partitioned(leaf, (None,)),
    "LogicallyPartitioned": lambda leaf: nn.LogicallyPartitioned(leaf, (None,)),
    "another": Tagged,
    "in one another": lambda leaf: Tagged(nn.Partitioned(leaf, (None,))),
}

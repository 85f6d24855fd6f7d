"""Every layer, and the formula that it obeys: adding a layer is adding an entry.

The formulas are written in jnp, two passes, for JAX to differentiate by itself. They
import nothing of bnjax.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

import bnjax

POSITIONS, FEATURES = 4, 3
EPSILON, MOMENTUM = 1e-5, 0.9


@dataclasses.dataclass(frozen=True)
class Entry:
    """A layer, how it is called, and what it obeys.

    Attributes:
        layer: its name in `bnjax.linen` and `bnjax.nnx`.
        fields: its own.
        formula: (params, batch_stats, x, weights, groups) -> (y, batch_stats); the
            weights have the shape of x, and are 0 where its mask is False.
        groups: (batch, replicas) -> the number of each example's group, within which
            examples are normalized together.
        batch: the number of examples.
        arguments: of the call, by batch; those of rank 1 have a value for each example.
        aligned: whether eight devices divide the groups.
        masks_features: whether a mask may vary by feature.
    """

    layer: str
    formula: Callable[..., Any]
    groups: Callable[[int, int], np.ndarray]
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    batch: int = 16
    arguments: Callable[[int], dict[str, Any]] = lambda batch: {}
    aligned: bool = True
    masks_features: bool = True

    def linen(self, **fields):
        cls = getattr(bnjax.linen, self.layer)
        return cls(**{"momentum": MOMENTUM, **self.fields, **fields})

    def nnx(self, **settings):
        cls = getattr(bnjax.nnx, self.layer)
        fields = {"momentum": MOMENTUM, **self.fields, **settings}
        return cls(FEATURES, rngs=nnx.Rngs(0), **fields)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.batch, POSITIONS, FEATURES

    def extra(self) -> dict[str, Any]:
        return self.arguments(self.batch)

    def x(self, seed=0, dtype=np.float32) -> np.ndarray:
        """Of groups, features and examples that differ in mean and variance."""
        rng = np.random.default_rng(seed)
        of_example = rng.normal(size=(self.batch, 1, 1))
        size = rng.uniform(0.5, 2, (self.batch, 1, FEATURES))
        return (rng.normal(size=self.shape) * size + of_example).astype(dtype)

    def variables(self, seed=1, dtype=np.float32) -> dict[str, Any]:
        """Parameters and statistics that are neither 0 nor 1."""
        rng = np.random.default_rng(seed)
        layer = self.linen(use_running_average=False)
        start = functools.partial(layer.init, **self.extra())
        shapes = jax.eval_shape(start, jax.random.key(0), self.x())

        def value(path, leaf):
            fill = FILL.get(path[-1].key, np.random.Generator.normal)
            return jnp.asarray(fill(rng, size=leaf.shape), dtype)

        return jax.tree_util.tree_map_with_path(value, shapes)

    def plain(self, variables, x, mask=None, replicas=1, weights=1.0):
        """The formula: y, and the running statistics after one update."""
        groups = self.groups(len(x), replicas)
        mask = np.broadcast_to(True if mask is None else mask, x.shape)
        weights = jnp.where(mask, weights, 0).astype(x.dtype)
        x = jnp.where((weights > 0) | jnp.isfinite(x), x, 0)
        return self.formula(
            variables.get("params", {}), variables["batch_stats"], x, weights, groups
        )


def covariance(rng, size):
    factor = rng.normal(size=size)
    return factor @ factor.mT + np.eye(size[-1])


FILL = {
    "var": functools.partial(np.random.Generator.uniform, low=0.5, high=2),
    "cov": covariance,
}


def statistics(x, weights, groups, number):
    """(count, mean, var), (group, feature); all two-pass."""
    member = (groups == np.arange(number)[:, None])[..., None, None]
    weights = member * weights[None]
    count = weights.sum((1, 2))
    n = jnp.where(count > 0, count, 1)
    mean = (weights * x[None]).sum((1, 2)) / n
    deviation = x[None] - mean[:, None, None]
    return count, mean, (weights * deviation**2).sum((1, 2)) / n


def normalized(x, mean, var, scale, bias):
    """By a row for each example."""
    mean, var, scale, bias = (v[:, None] for v in (mean, var, scale, bias))
    return (x - mean) / jnp.sqrt(var + EPSILON) * scale + bias


def moved(stats, count, mean, var):
    """The running statistics after a batch; untouched where nothing was seen."""

    def average(old, new):
        return jnp.where(count > 0, MOMENTUM * old + (1 - MOMENTUM) * new, old)

    return {"mean": average(stats["mean"], mean), "var": average(stats["var"], var)}


def by_groups(params, stats, x, weights, groups):
    """Each group by its own statistics; the running ones are of the whole batch."""
    count, mean, var = statistics(x, weights, groups, int(groups.max(initial=0)) + 1)
    mean = jnp.where(count > 0, mean, stats["mean"][None])[groups]
    var = jnp.where(count > 0, var, stats["var"][None])[groups]
    scale, bias = (
        jnp.broadcast_to(params[n], mean.shape[:1] + params[n].shape)
        for n in ("scale", "bias")
    )
    whole = (row[0] for row in statistics(x, weights, np.zeros_like(groups), 1))
    return normalized(x, mean, var, scale, bias), moved(stats, *whole)


def corrected(params, stats, x, weights, groups, r_max=3.0, d_max=5.0):
    """Batch renormalization, whose r and d are constants."""
    count, mean, var = (row[0] for row in statistics(x, weights, groups, 1))
    new = moved(stats, count, mean, var)
    mean = jnp.where(count > 0, mean, stats["mean"])
    var = jnp.where(count > 0, var, stats["var"])
    sigma_batch, sigma = (jnp.sqrt(v + EPSILON) for v in (var, stats["var"]))
    r = lax.stop_gradient(jnp.clip(sigma_batch / sigma, 1 / r_max, r_max))
    d = lax.stop_gradient(jnp.clip((mean - stats["mean"]) / sigma, -d_max, d_max))
    x_hat = (x - mean[None, None]) / sigma_batch[None, None]
    x_hat = x_hat * r[None, None] + d[None, None]
    return x_hat * params["scale"][None, None] + params["bias"][None, None], new


def by_domains(params, stats, x, weights, groups):
    """Each domain by its own statistics, scale and bias, and its own running ones."""
    count, mean, var = statistics(x, weights, groups, len(stats["mean"]))
    new = moved(stats, count, mean, var)
    mean = jnp.where(count > 0, mean, stats["mean"])
    var = jnp.where(count > 0, var, stats["var"])
    rows = (v[groups] for v in (mean, var, params["scale"], params["bias"]))
    return normalized(x, *rows), new


def whitened(params, stats, x, weights, groups, epsilon):
    """By the inverse root of the covariance, from its eigenvalues."""
    weights = weights[..., :1]
    count = weights.sum()
    n = jnp.where(count > 0, count, 1)
    mean = (weights * x).sum((0, 1)) / n
    deviation = x - mean[None, None]
    rows, weighed = (
        v.reshape(-1, x.shape[-1]) for v in (deviation, weights * deviation)
    )
    cov = (rows.T @ weighed / n)[None]
    mean = jnp.where(count > 0, mean, stats["mean"])
    cov = jnp.where(count > 0, cov, stats["cov"])
    new = {"mean": mean, "cov": cov}
    moved = {n: MOMENTUM * stats[n] + (1 - MOMENTUM) * v for n, v in new.items()}
    new = {n: jnp.where(count > 0, moved[n], stats[n]) for n in new}
    values, vectors = jnp.linalg.eigh(cov[0] + epsilon * jnp.eye(x.shape[-1]))
    root = vectors @ jnp.diag(values**-0.5) @ vectors.T
    y = (x - mean[None, None]) @ root
    return y * params["scale"][None, None] + params["bias"][None, None], new


def together(batch, replicas):
    return np.zeros(batch, int)


def in_turn(size, batch, replicas):
    """Groups of `size`, the last of each replica maybe smaller."""
    own = np.arange(batch // replicas) // size
    rows = [own + i * (own.max(initial=0) + 1) for i in range(replicas)]
    return np.concatenate(rows)


def halves(batch, replicas):
    return np.tile(np.repeat([0, 1], batch // replicas // 2), replicas)


def mixed(batch, replicas=1):
    """Two of three domains, in disorder; the replicas' shares differ."""
    return 2 * (np.random.default_rng(3).random(batch) < 0.4).astype(np.int32)


def second(batch, replicas):
    return np.ones(batch, int)


ENTRIES = {
    "batch norm": Entry("BatchNorm", by_groups, together),
    "ghost": Entry(
        "GhostBatchNorm",
        by_groups,
        functools.partial(in_turn, 2),
        {"virtual_batch_size": 2},
    ),
    "ghost, smaller rest": Entry(
        "GhostBatchNorm",
        by_groups,
        functools.partial(in_turn, 3),
        {"virtual_batch_size": 3, "remainder": "smaller"},
        batch=40,
        aligned=False,
    ),
    "renorm": Entry(
        "BatchRenorm",
        functools.partial(corrected, r_max=1.2, d_max=0.5),
        together,
        {"r_max": 1.2, "d_max": lambda step: step / 4},
        arguments=lambda batch: {"step": np.int32(2)},
    ),
    "split in halves": Entry("SplitBatchNorm", by_domains, halves, {"num_splits": 2}),
    "split by example": Entry(
        "SplitBatchNorm",
        by_domains,
        mixed,
        {"num_splits": 3},
        arguments=lambda batch: {"domain": mixed(batch)},
    ),
    "split, one domain": Entry(
        "SplitBatchNorm",
        by_domains,
        second,
        {"num_splits": 2},
        arguments=lambda batch: {"domain": np.int32(1)},
    ),
    "decorrelated": Entry(
        "DecorrelatedBatchNorm",
        functools.partial(whitened, epsilon=0.1),
        together,
        {"epsilon": 0.1},
        masks_features=False,
    ),
}

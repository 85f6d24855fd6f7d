"""A random search over layers, dtypes, masks and what lies under them.

Each case draws a batch, a mask, and junk for the values under False. Outputs at valid
positions, statistics and gradients are those of the float64 oracle, and the junk
changes nothing, bit for bit: a second call has 0 in its place.

Ten thousand cases, five minutes on one core, most of it compilation:

    pytest -m slow tests/test_random_search.py
    SEARCH_CASES=100000 pytest -m slow tests/test_random_search.py
    SEARCH_SEED=1234 pytest -m slow tests/test_random_search.py  # one case, alone

A case is its seed, and nothing else. Cases share few compiled programs, one for each
layer, dtype, shape and shape of a mask; the seed tells which, and then the values.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import by_default
from registry import ENTRIES, EPSILON, MOMENTUM

import bnjax
from bnjax import ghost, renorm, split, whiten

CASES = int(os.environ.get("SEARCH_CASES", "10000"))
SEED = os.environ.get("SEARCH_SEED")

MASKS = ("none", "batch", "position", "full", "feature", "batch and feature")
VALUES = ("random", "random", "random", "sparse", "all False", "one valid", "all True")
JUNK = {
    "NaN": np.nan,
    "inf": np.inf,
    "-inf": -np.inf,
    "max": "max",
    "-max": "min",
    "1e36": 1e36,
    "-1e36": -1e36,
    "denormal": "smallest_subnormal",
    "5e8": 5e8,  # below what is read as 0
}
SHAPES = {
    "image": ((12, 4, 5, 3), -1),
    "vector": ((18, 3), -1),
    "first": ((8, 3, 5), 1),
}
DTYPES = ("float32", "bfloat16", "float16", "float64", "complex64")
TOLERANCE = {"float64": 1e-9, "float32": 2e-5, "complex64": 2e-5}
HALF = {"float16": 2e-3, "bfloat16": 1.6e-2}  # of what is stored in them


@dataclasses.dataclass(frozen=True)
class Program:
    """What is compiled once.

    Attributes:
        layer: a key of `LAYERS`.
        dtype: of the input.
        place: a key of `SHAPES`.
        mask: how the mask varies; one of `MASKS`.
        narrow: whether scale and bias have a 16-bit dtype too, and so y.
    """

    layer: str
    dtype: str
    place: str
    mask: str
    narrow: bool

    def __str__(self) -> str:
        narrow = ", parameters too" if self.narrow else ""
        return f"{self.layer}, {self.dtype}{narrow}, {self.place}, mask: {self.mask}"

    @property
    def shape(self) -> tuple[int, ...]:
        return SHAPES[self.place][0]

    @property
    def axis(self) -> int:
        return SHAPES[self.place][1]

    @property
    def feature(self) -> int:
        return self.axis % len(self.shape)

    @property
    def axes(self) -> tuple[int, ...]:
        return tuple(a for a in range(len(self.shape)) if a != self.feature)

    @property
    def is_complex(self) -> bool:
        return self.dtype == "complex64"

    @property
    def wide(self) -> str:
        """The dtype of statistics, and of parameters unless these are narrow."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def domains(self) -> int:
        return LAYERS[self.layer].domains

    @property
    def mask_shape(self) -> tuple[int, ...]:
        along = {
            "batch": (0,),
            "position": self.axes,
            "full": range(len(self.shape)),
            "feature": (self.feature,),
            "batch and feature": (0, self.feature),
        }[self.mask]
        return tuple(n if a in along else 1 for a, n in enumerate(self.shape))


# The layers: (program, x, mask, scale, bias, mean, var) -> (y, mean, var), where mean
# and var are those of the batch, of functions, or the running ones after it, of layers.


def function(call, program, x, mask, scale, bias, mean, var):
    y, batch = call(program, x, mask, scale, bias, (mean, var))
    return y, batch.mean, batch.variance()


def batch_norm(program, x, mask, scale, bias, stored, **options):
    return bnjax.batch_norm(
        x, scale, bias, axis=program.axis, mask=mask, fallback=stored, **options
    )


def over_replicas(program, x, mask, scale, bias, stored):
    """Two replicas, each with half of the batch."""

    def halves(value):
        return jnp.stack(jnp.split(value, 2))

    split_mask = mask is not None and mask.shape[0] > 1
    y, batch = jax.vmap(
        lambda x, mask: batch_norm(
            program, x, mask, scale, bias, stored, axis_name="replica"
        ),
        (0, 0 if split_mask else None),
        axis_name="replica",
    )(halves(x), halves(mask) if split_mask else mask)
    return jnp.concatenate(list(y)), jax.tree.map(lambda v: v[1], batch)


def ghosts(program, x, mask, scale, bias, stored):
    return ghost.ghost_batch_norm(
        x,
        scale,
        bias,
        virtual_batch_size=2,
        axis=program.axis,
        mask=mask,
        fallback=stored,
    )


def renormed(program, x, mask, scale, bias, stored):
    limits = {"r_max": 1.2, "d_max": 0.5}
    return renorm.batch_renorm(
        x, *stored, scale, bias, axis=program.axis, mask=mask, **limits
    )


def splits(program, x, mask, scale, bias, stored, domain=None):
    return split.split_batch_norm(
        x,
        scale,
        bias,
        num_splits=program.domains,
        domain=None if domain is None else domain(program),
        axis=program.axis,
        mask=mask,
        fallback=stored,
    )


def only_moments(program, x, mask, scale, bias, mean, var):
    """A weighted sum of mean and variance, to be differentiated."""
    batch = bnjax.moments(x, axis=program.axis, mask=mask, shift=mean)
    return scale * batch.mean + bias * batch.variance(), batch.mean, batch.variance()


def whitened(program, x, mask, scale, bias, mean, var):
    y, batch = whiten.decorrelate(
        x,
        scale,
        bias,
        axis=program.axis,
        mask=mask,
        epsilon=0.1,
        fallback=(mean, jnp.eye(3, dtype=var.dtype)[None]),
    )
    return y, batch.mean, batch.covariance()


def normalized(program, x, mask, scale, bias, mean, var):
    return bnjax.normalize(x, mean, var, scale, bias, axis=program.axis), mean, var


def linen(entry, program, x, mask, scale, bias, mean, var, frozen=False):
    layer = ENTRIES[entry].linen(
        use_running_average=frozen, update_stats=True, axis=program.axis
    )
    names = ("mean", "cov" if entry == "decorrelated" else "var")
    stats = dict(zip(names, (mean, start_of(entry, var)), strict=True))
    variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
    arguments = ENTRIES[entry].arguments(len(x))
    y, new = layer.apply(variables, x, mask=mask, mutable=["batch_stats"], **arguments)
    return y, *(new["batch_stats"][name] for name in names)


def of_nnx(entry, program, x, mask, scale, bias, mean, var, frozen=False):
    layer = ENTRIES[entry].nnx(
        use_running_average=frozen, update_stats=True, axis=program.axis
    )
    second = "cov" if entry == "decorrelated" else "var"
    layer.scale.set_value(scale)
    layer.bias.set_value(bias)
    layer.mean.set_value(mean)
    getattr(layer, second).set_value(start_of(entry, var))
    y = layer(x, mask=mask, **ENTRIES[entry].arguments(len(x)))
    return y, layer.mean[...], getattr(layer, second)[...]


def start_of(entry: str, var):
    return jnp.eye(3, dtype=var.dtype)[None] if entry == "decorrelated" else var


# What each obeys: the numbers of the examples that are normalized together.


def together(program):
    return [np.arange(program.shape[0])]


def pairs(program):
    return np.split(np.arange(program.shape[0]), program.shape[0] // 2)


def halves(program):
    return np.split(np.arange(program.shape[0]), 2)


def mixed(program):
    """Domains in disorder, as the registry has them; the second has no example."""
    domain = ENTRIES["split by example"].arguments(program.shape[0])["domain"]
    return [np.flatnonzero(domain == d) for d in range(3)]


def domain_of(program):
    return ENTRIES["split by example"].arguments(program.shape[0])["domain"]


@dataclasses.dataclass(frozen=True)
class Layer:
    """How it is called, and what it obeys.

    Attributes:
        call: see above.
        groups: of the examples that are normalized together.
        formula: "groups", "renorm", "whiten", "moments" or "normalize".
        momentum: of the running statistics, 0 where they are those of the batch.
        domains: the rows of statistics and parameters.
    """

    call: Any
    groups: Any = together
    formula: str = "groups"
    momentum: float = 0.0
    domains: int = 1


def by(call, *args, **kwargs):
    return functools.partial(function, functools.partial(call, *args, **kwargs))


def both_frameworks():
    """The layers of Linen and of NNX."""
    kinds = {
        "batch norm": (together, "groups", 1),
        "ghost": (pairs, "groups", 1),
        "renorm": (together, "renorm", 1),
        "split in halves": (halves, "groups", 2),
        "split by example": (mixed, "groups", 3),
        "decorrelated": (together, "whiten", 1),
    }
    found = {}
    for framework, call in (("linen", linen), ("nnx", of_nnx)):
        for entry, (groups, formula, domains) in kinds.items():
            found[f"{framework} {entry}"] = Layer(
                functools.partial(call, entry), groups, formula, MOMENTUM, domains
            )
        found[f"{framework} frozen"] = Layer(
            functools.partial(call, "batch norm", frozen=True),
            formula="normalize",
            momentum=MOMENTUM,
        )
    return found


LAYERS = {
    "batch_norm": Layer(by(batch_norm)),
    "batch_norm, xla": Layer(by(batch_norm, implementation="xla")),
    "batch_norm, subsample": Layer(by(batch_norm, implementation="subsample")),
    "batch_norm, replicas": Layer(by(over_replicas)),
    "moments": Layer(only_moments, formula="moments"),
    "ghost_batch_norm": Layer(by(ghosts), pairs),
    "batch_renorm": Layer(by(renormed), formula="renorm"),
    "split_batch_norm": Layer(by(splits), halves, domains=2),
    "split_batch_norm, by example": Layer(
        by(splits, domain=domain_of), mixed, domains=3
    ),
    "decorrelate": Layer(whitened, formula="whiten"),
    "normalize": Layer(normalized, formula="normalize"),
    **both_frameworks(),
}


def possible(program: Program) -> bool:
    formula = LAYERS[program.layer].formula
    takes = {
        "whiten": ("none", "batch", "position"),
        "normalize": ("none",) if program.layer == "normalize" else MASKS,
    }
    return (
        program.mask in takes.get(formula, MASKS)
        and not (program.is_complex and formula in ("renorm", "whiten"))
        and not (program.narrow and program.dtype not in HALF)
    )


def programs(per: int = 3) -> list[Program]:
    """`per` for each layer and dtype, of which every mask and shape has its turn."""
    found = []
    for number, pair in enumerate(itertools.product(LAYERS, DTYPES)):
        every = [
            program
            for options in itertools.product(SHAPES, MASKS, (False, True))
            if possible(program := Program(*pair, *options))
        ]
        masks = sorted({program.mask for program in every}, key=MASKS.index)
        for i in range(per if every else 0):
            mask = masks[(number * per + i) % len(masks)]
            own = [program for program in every if program.mask == mask]
            found.append(own[(number + i) % len(own)])
    return list(dict.fromkeys(found))


PROGRAMS = programs()


@functools.cache
def compiled(program: Program):
    """(x, mask, scale, bias, mean, var, dy) -> the results, by name."""

    def run(x, mask, scale, bias, mean, var, dy):
        def loss(x, scale, bias):
            y, *stats = LAYERS[program.layer].call(
                program, x, mask, scale, bias, mean, var
            )
            return jnp.sum((jnp.conj(dy) * y).real), (y, *stats)

        def gradients(*args):
            return jax.grad(loss, (0, 1, 2), has_aux=True)(*args)

        given = x, scale, bias
        grads, values = gradients(*given)
        found = dict(zip((*STATISTICS, *GRADIENTS), (*values, *grads), strict=True))
        if program.layer in TWICE:
            along = dy.astype(x.dtype), scale, bias
            second = jax.jvp(lambda *args: gradients(*args)[0], given, along)[1]
            found |= dict(zip([f"{g} of {g}" for g in GRADIENTS], second, strict=True))
        return found

    return jax.jit(run)


STATISTICS, GRADIENTS = ("y", "mean", "var"), ("dx", "dscale", "dbias")
TWICE = {  # are differentiated twice, which has no oracle
    *("batch_norm", "ghost_batch_norm", "batch_renorm", "decorrelate"),
    *("split_batch_norm, by example", "linen frozen", "nnx split in halves"),
}


class Case:
    """The values of one case, all drawn from its seed."""

    def __init__(self, program: Program, seed: int):
        self.program, self.seed = program, seed
        rng = self.rng = np.random.default_rng(seed)
        layer, shape = LAYERS[program.layer], program.shape
        self.values = "none" if program.mask == "none" else rng.choice(VALUES)
        self.junk = str(rng.choice([*JUNK, "each"]))
        self.mask = None if program.mask == "none" else self._mask()
        self.valid = np.broadcast_to(True if self.mask is None else self.mask, shape)

        spread = 1.0 if layer.formula == "whiten" else rng.choice([0.01, 1, 30])
        far = rng.choice([0, 1, 3] if layer.formula == "whiten" else [0, 3, 100])
        features = (3,)
        centre = rng.normal(size=features) * far * spread
        deviation = spread * rng.uniform(0.5, 2, features)
        x = rng.normal(size=shape)
        x = x * self._expanded(deviation) + self._expanded(centre)
        if program.is_complex:
            x = x + 1j * spread * rng.normal(size=shape)
        self.x = x.astype(jnp.dtype(program.dtype))

        rows = (program.domains, 3) if program.domains > 1 else features
        parameters = jnp.dtype(program.dtype if program.narrow else program.wide)
        self.scale = rng.normal(size=rows).astype(parameters)
        self.bias = rng.normal(size=rows).astype(parameters)
        near = rng.choice([0, 1])
        mean = rng.normal(size=rows) + near * centre
        if program.is_complex:
            mean = mean + 1j * rng.normal(size=rows)
        self.mean = mean.astype("complex64" if program.is_complex else program.wide)
        self.var = rng.uniform(0.5, 2, rows) * np.array(spread**2)
        self.var = self.var.astype(program.wide)

        dy = rng.normal(size=features if layer.formula == "moments" else shape)
        if program.is_complex:
            dy = dy + 1j * rng.normal(size=dy.shape)
        if dy.shape == shape:
            dy = np.where(self.valid, dy, 0)
        narrow = program.dtype if program.narrow else program.wide
        dy = dy.astype("complex64" if program.is_complex else jnp.dtype(narrow))
        self.dy = dy

    def _expanded(self, vector):
        return np.expand_dims(vector, self.program.axes)

    def _mask(self) -> np.ndarray:
        shape = self.program.mask_shape
        share = {"all False": 0.0, "one valid": 0.0, "all True": 1.0, "sparse": 0.15}
        mask = self.rng.random(shape) < share.get(self.values, 0.6)
        if self.values == "one valid":
            mask.flat[self.rng.integers(mask.size)] = True
        return mask

    def dirty(self) -> np.ndarray:
        """x with junk wherever the mask is False."""

        def junk(name):
            value, info = JUNK[name], jnp.finfo(self.program.dtype)
            return float(getattr(info, value)) if isinstance(value, str) else value

        def drawn():
            if self.junk != "each":
                return junk(self.junk)
            choice = self.rng.choice([*JUNK], self.x.shape)
            return np.vectorize(junk, otypes=[float])(choice)

        with np.errstate(over="ignore", invalid="ignore"):
            value = drawn()
            if self.program.is_complex:  # in either part, or in both
                part = self.rng.integers(3)
                value = np.asarray(value) + 0j if part == 0 else _imaginary(drawn())
                value = value if part < 2 else value + np.asarray(drawn())
            return np.where(self.valid, self.x, value).astype(self.x.dtype)

    def clean(self) -> np.ndarray:
        return np.where(self.valid, self.x, 0).astype(self.x.dtype)

    def arguments(self, x: np.ndarray) -> tuple:
        return x, self.mask, self.scale, self.bias, self.mean, self.var, self.dy

    # The oracle.

    def expected(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """By name, the value, and the magnitude that its error is compared with."""
        layer = LAYERS[self.program.layer]
        found = getattr(self, f"_by_{layer.formula}")()
        found |= self._statistics(layer)
        if self.program.is_complex or layer.formula == "whiten":
            del found["dx"], found["dscale"], found["dbias"]
        return found

    def _rows(self, vector):
        """A row for each group of examples."""
        vector = oracle.wide(vector)
        if vector.ndim == 2:
            return list(vector)
        return [vector] * len(self._groups())

    def _groups(self):
        return LAYERS[self.program.layer].groups(self.program)

    def _by_groups(self):
        wide, axes = oracle.wide(self.x), self.program.axes
        y, dx = np.zeros_like(wide), np.zeros(wide.shape)
        y_size, dx_size = np.ones(wide.shape), np.ones(wide.shape)
        grads = []
        groups = self._groups()
        rows = zip(groups, self._rows(self.scale), self._rows(self.bias), strict=True)
        for own, scale, bias in rows:
            x, mask, dy = wide[own], self.valid[own], oracle.wide(self.dy)[own]
            count, mean, m2 = oracle.moments(x, axes, mask)
            loss = self._loss(mean, m2 / np.maximum(count, 1))
            rstd = 1 / np.sqrt(m2 / np.maximum(count, 1) + EPSILON)
            y[own] = oracle.batch_norm(x, scale, bias, axes, mask)
            x_hat = np.abs(x - self._expanded(mean)) * self._expanded(rstd)
            sizes = np.abs(self._expanded(scale)) * (x_hat + 1)
            y_size[own] = self._expanded(loss) * (
                sizes + np.abs(self._expanded(bias)) + self._expanded(np.abs(scale))
            )
            if self.program.is_complex:
                grads.append((np.zeros(3), np.zeros(3), 1.0, 1.0))
                continue
            dx[own], dscale, dbias = oracle.batch_norm_gradients(
                x, scale, dy, axes, mask
            )
            largest = np.abs(dy).max(axes, initial=0)
            x_hat = np.where(mask, x_hat, 0)
            dx_size[own] = self._expanded(
                loss * largest * np.abs(scale) * rstd * (1 + x_hat.max(axes, initial=0))
            )
            total = np.abs(dy).sum(axes)
            grads.append(
                (
                    dscale,
                    dbias,
                    loss * (np.abs(dy) * (x_hat + 1)).sum(axes) + loss * total,
                    total,
                )
            )
        return {"y": (y, y_size), "dx": (dx, dx_size)} | self._of_rows(grads)

    def _loss(self, mean, var):
        """What a mean far from 0 takes away from the precision."""
        return 1 + 0.05 * np.abs(mean) / np.sqrt(var + EPSILON)

    def _of_rows(self, grads):
        dscale, dbias, s_size, b_size = (
            np.stack([np.broadcast_to(part, 3) for part in parts])
            for parts in zip(*grads, strict=True)
        )
        if self.scale.ndim == 1:
            dscale, dbias, s_size, b_size = (
                v.sum(0) for v in (dscale, dbias, s_size, b_size)
            )
        return {"dscale": (dscale, s_size), "dbias": (dbias, b_size)}

    def _by_renorm(self):
        axes, x = self.program.axes, oracle.wide(self.x)
        given = self.mean, self.var, self.scale
        limits = {"limits": (1.2, 0.5), "axes": axes, "mask": self.valid}
        y = oracle.batch_renorm(x, *given, self.bias, **limits)
        dx, dscale, dbias = oracle.batch_renorm_gradients(
            x, *given, self.bias, self.dy, **limits
        )
        found = self._by_groups()
        distance = 2 * np.abs(oracle.wide(self.mean)) / np.sqrt(self.var + EPSILON)
        more = 1 + 0.05 * distance
        found["y"] = y, 3 * found["y"][1] * self._expanded(more)
        found["dx"] = dx, 3 * found["dx"][1] * self._expanded(more)
        found["dscale"] = dscale, 3 * found["dscale"][1] * more
        found["dbias"] = dbias, found["dbias"][1]
        return found

    def _by_whiten(self):
        x, axis = oracle.wide(self.x), self.program.feature
        count, mean, m2 = self._co_moments()
        covariance = m2 / max(count, 1)
        y = oracle.whiten(x, mean, covariance, self.scale, self.bias, axis, 0.1)
        size = np.abs(np.moveaxis(x, axis, -1) - mean).sum(-1, keepdims=True)
        size = 50 * (1 + size * np.abs(self.scale) * 3 + np.abs(self.bias))
        empty = (np.zeros(()), np.ones(()))
        found = {"y": (y, np.moveaxis(size, -1, axis))}
        return found | dict.fromkeys(("dx", "dscale", "dbias"), empty)

    def _co_moments(self):
        return oracle.co_moments(self.x, self.program.feature, 3, self.mask)

    def _by_moments(self):
        axes, x = self.program.axes, oracle.wide(self.x)
        count, mean, m2 = oracle.moments(x, axes, self.valid)
        n = np.maximum(count, 1)
        scale, bias, dy = map(oracle.wide, (self.scale, self.bias, self.dy))
        y, size = scale * mean + bias * m2 / n, np.abs(scale * mean) + np.abs(bias) * m2
        centred = x - self._expanded(mean)
        each = self._expanded(scale) + self._expanded(bias) * 2 * centred
        dx = self.valid * each * self._expanded(dy / n)
        largest = np.abs(dx).max(axes) + np.abs(dy * bias * mean) * 0.05
        return {
            "y": (y, size),
            "dx": (dx, np.broadcast_to(self._expanded(largest), dx.shape)),
            "dscale": (dy * mean, np.abs(dy) * (np.abs(mean) + np.sqrt(m2 / n))),
            "dbias": (dy * m2 / n, np.abs(dy * m2)),
        }

    def _by_normalize(self):
        axes, x = self.program.axes, oracle.wide(self.x)
        mean, var, scale, bias, dy = map(
            oracle.wide, (self.mean, self.var, self.scale, self.bias, self.dy)
        )
        y = oracle.normalize(x, mean, var, scale, bias, axes)
        rstd = self._expanded(1 / np.sqrt(var + EPSILON))
        x_hat = (x - self._expanded(mean)) * rstd
        size = np.abs(self._expanded(scale) * x_hat) + np.abs(self._expanded(bias))
        dx = dy * self._expanded(scale) * rstd
        total = (np.abs(dy) * (np.abs(x_hat) + 1)).sum(axes)
        return {
            "y": (y, size + 0.05 * np.abs(self._expanded(scale * mean) * rstd)),
            "dx": (dx, np.abs(dx)),
            "dscale": ((dy * x_hat).sum(axes), total * self._loss(mean, var)),
            "dbias": (dy.sum(axes), total),
        }

    def _statistics(self, layer: Layer):
        """Of the batch, or the running ones after it."""
        old_mean, old_var = oracle.wide(self.mean), oracle.wide(self.var)
        if self.program.layer == "normalize":
            return {"mean": (old_mean, np.abs(old_mean)), "var": (old_var, old_var)}
        count, mean, var = self._of_batch(layer)
        size = np.abs(mean) + np.sqrt(
            var.diagonal(axis1=-2, axis2=-1).reshape(-1)
            if layer.formula == "whiten"
            else var
        )
        if layer.formula == "whiten":
            old_var = np.eye(3)[None]
            var_size = np.full(var.shape, np.abs(var).max(initial=0))
            seen = var_seen = np.asarray(count > 0)
        else:
            var_size, seen = var, count > 0
            var_seen = seen
        if layer.momentum:
            m = layer.momentum
            new_mean = np.where(seen, m * old_mean + (1 - m) * mean, old_mean)
            new_var = np.where(var_seen, m * old_var + (1 - m) * var, old_var)
            return {
                "mean": (new_mean, size + np.abs(old_mean)),
                "var": (new_var, var_size + np.abs(old_var)),
            }
        return {"mean": (mean, size), "var": (var, var_size)}

    def _of_batch(self, layer: Layer):
        """(count, mean, variance), with a row for each domain."""
        if layer.formula == "whiten":
            count, mean, m2 = self._co_moments()
            return np.asarray(count), mean, m2 / max(count, 1)
        axes, wide = self.program.axes, oracle.wide(self.x)
        groups = self._groups() if layer.domains > 1 else together(self.program)
        rows = [oracle.moments(wide[own], axes, self.valid[own]) for own in groups]
        count, mean, m2 = (np.stack(part) for part in zip(*rows, strict=True))
        var = m2 / np.maximum(count, 1)
        if layer.domains == 1:
            count, mean, var = count[0], mean[0], var[0]
        return count, mean, var

    # By differences of the oracle's loss, where it has no derivative.

    def loss(self, x, scale, bias) -> float:
        moved = object.__new__(Case)
        moved.__dict__ |= self.__dict__ | {"x": x, "scale": scale, "bias": bias}
        y = getattr(moved, f"_by_{LAYERS[self.program.layer].formula}")()["y"][0]
        return float((np.conj(oracle.wide(self.dy)) * y).real.sum())

    def slopes(self, grads) -> tuple[float, float, float]:
        """Along one direction: by the gradients, by the oracle, and the magnitude."""
        given = [oracle.wide(v) for v in (self.x, self.scale, self.bias)]
        grads = [oracle.wide(g) for g in grads]
        steps = []
        for value, size in zip(given, (np.abs(given[0]).max() / 10, 1, 1)):
            step = self.rng.normal(size=value.shape)
            if np.iscomplexobj(value):
                step = step + 1j * self.rng.normal(size=value.shape)
            steps.append(step * min(size, 1.0))
        steps[0] = steps[0] * self.valid
        h = 1e-6
        up, down = (
            self.loss(*(v + sign * s for v, s in zip(given, steps))) for sign in (h, -h)
        )
        each = [(g * s).real for g, s in zip(grads, steps)]
        got = sum(part.sum() for part in each)
        return got, (up - down) / (2 * h), sum(np.abs(part).sum() for part in each)


def _imaginary(value):
    """i times it, without a NaN in the real part."""
    result = np.zeros(np.shape(value), np.complex128)
    result.imag = value
    return result


def faults(program: Program, seed: int) -> list[str]:
    """What is wrong with one case."""
    case = Case(program, seed)
    found: list[str] = []

    def check(what, holds):
        if not np.all(holds):
            found.append(what)

    run = compiled(program)
    got = jax.tree.map(np.asarray, run(*case.arguments(case.dirty())))
    clean = jax.tree.map(np.asarray, run(*case.arguments(case.clean())))
    full = got["y"].shape == case.valid.shape
    for name, value in got.items():
        same = value == clean[name]
        finite = np.isfinite(oracle.wide(value))
        if " of " in name and program.dtype == "float16":  # itself may overflow it
            overflows = ~np.isfinite(oracle.wide(clean[name]))
            same, finite = same | overflows, finite | overflows
        shown = case.valid if name == "y" and full else True
        check(f"{name} is not finite", finite)
        check(f"junk changes {name}", same | np.logical_not(shown))
    check("dx under the mask is not 0", (got["dx"] == 0) | case.valid)

    for name, (value, size) in case.expected().items():
        actual = oracle.wide(got[name])
        tol = TOLERANCE[program.dtype if program.dtype in TOLERANCE else "float32"]
        stored = got[name].dtype.name
        tol = max(tol, HALF.get(stored, 0)) + (tol if stored in HALF else 0)
        if name == "dx" and program.narrow:
            tol = 2 * tol
        least = 6e-8 if stored == "float16" else 1e-30  # the smallest subnormal
        limit = tol * np.broadcast_to(size, actual.shape) + least
        seen = case.valid if name == "y" and full else True
        error = np.where(seen, np.abs(actual - value), 0)
        worst = (error / limit).max(initial=0)
        check(f"{name} is off by {worst:.3g} times the tolerance", error <= limit)
    if (program.is_complex or LAYERS[program.layer].formula == "whiten") and (
        LAYERS[program.layer].formula != "moments"
    ):
        half = max(HALF.get(program.dtype, 0), 3e-4)
        slope, expected, size = case.slopes([got[name] for name in GRADIENTS])
        check(
            f"the slope is {slope:.6g}, not {expected:.6g}",
            abs(slope - expected) <= half * size + 1e-3 * abs(expected) + 1e-6,
        )
    return [
        f"SEARCH_SEED={seed}: {what} ({program}: {case.values}, junk: {case.junk})"
        for what in found
    ]


def search(number: int, seeds) -> None:
    program = PROGRAMS[number]
    wide = program.dtype == "float64"
    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        found = [fault for seed in seeds for fault in faults(program, seed)]
    assert not found, f"{len(found)} faults:\n" + "\n".join(found[:20])


SEEDS = range(CASES) if SEED is None else [int(SEED)]
FEW = [i for i, p in enumerate(PROGRAMS) if p.mask not in ("none", "feature")][7::45]


@pytest.mark.slow
@pytest.mark.parametrize("number", sorted({seed % len(PROGRAMS) for seed in SEEDS}))
def test_junk_under_a_mask(number):
    search(number, [seed for seed in SEEDS if seed % len(PROGRAMS) == number])


@by_default(FEW[1], number=FEW)
def test_some_junk_under_a_mask(number):
    search(number, range(number, 8 * len(PROGRAMS), len(PROGRAMS)))


def test_every_layer_dtype_mask_and_shape_has_its_turn():
    assert {p.layer for p in PROGRAMS} == {*LAYERS}
    for field, values in (("dtype", DTYPES), ("mask", MASKS), ("place", SHAPES)):
        for formula in ("groups", "moments"):
            own = [p for p in PROGRAMS if LAYERS[p.layer].formula == formula]
            assert {getattr(p, field) for p in own} == {*values}, (formula, field)

"""Layers and training steps, lowered for devices that are only described.

Everything that a user's program would be given is an argument: the input, parameters,
running statistics, and dy, so that nothing is known to the compiler beforehand.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
from experiments.bench import targets
from experiments.bench.step import NORMS
from experiments.common.models.imagenet import Bottleneck, ResNet
from experiments.common.training.steps import update

LINEN: dict[str, Any] = {
    "flax": nn.BatchNorm,
    "bnjax": bnjax.BatchNorm,
    "ghost": partial(bnjax.linen.GhostBatchNorm, virtual_batch_size=32),
    "renorm": bnjax.linen.BatchRenorm,
    "split": partial(bnjax.linen.SplitBatchNorm, num_splits=2),
}
NNX: dict[str, Any] = {"flax-nnx": nnx.BatchNorm, "bnjax-nnx": bnjax.nnx.BatchNorm}
LAYERS = (
    "flax",
    "flax-nnx",
    "formula",
    "bnjax",
    "bnjax-nnx",
    "ghost",
    "renorm",
    "split",
)
OTHERS = ("flax", "flax-nnx", "formula")  # those that know no activation and residual
VARIANTS = ("plain", "relu", "activation", "residual", "mask")
STAGES = (3, 4, 6, 3)  # of ResNet-50


class Layer(NamedTuple):
    """A layer of somebody's, and the shapes of its variables.

    Attributes:
        apply: (params, stats, x, **options) to (y, the next stats); the options are
            `mask`, `weights` if it is ours, and `residual` of a fused one.
        params: scale and bias.
        stats: the running statistics.
    """

    apply: Callable[..., tuple[jax.Array, Any]]
    params: Any
    stats: Any


class Cell(NamedTuple):
    """One program of one layer.

    Attributes:
        target: see `targets.TARGETS`.
        chips: that share the batch.
        mode: "jit" or "shard_map"; with one chip there is no difference.
        layer: one of `LAYERS`.
        variant: one of `VARIANTS`, or "weights": "relu" stands behind the layer,
            "activation" is the layer's own; "residual" is added and ReLU follows, by
            the layer if it can.
        dtype: of x and y.
        shape: of x on each chip.
        direction: "forward", or "both": one program with y, dx and all else.
    """

    target: str
    chips: int
    mode: str
    layer: str
    variant: str
    dtype: str
    shape: tuple[int, ...]
    direction: str


def layer(cell: Cell) -> jax.stages.Lowered:
    """One layer in training: y, the next statistics and, backward, each gradient."""
    mesh = Mesh(
        np.array(targets.devices(cell.target, cell.chips)),
        ("data",),
        axis_types=(AxisType.Auto,),
    )
    split = P("data") if cell.chips > 1 else P()
    shared = cell.mode == "shard_map" and cell.chips > 1
    x = _shape((cell.chips * cell.shape[0], *cell.shape[1:]), cell.dtype)
    built = build(cell, x, "data" if shared else None)
    arrays = {"x": x} | ({"residual": x} if cell.variant == "residual" else {})
    masks = {}
    if cell.variant in ("mask", "weights"):
        dtype = bool if cell.variant == "mask" else jnp.float32
        masks[cell.variant] = _shape((x.shape[0], *[1] * (x.ndim - 1)), dtype)

    def forward(params, stats, arrays, masks):
        arrays = dict(arrays)
        x, options = arrays.pop("x"), arrays | masks
        if cell.layer not in OTHERS:
            return built.apply(params, stats, x, **options)
        residual = options.pop("residual", None)
        y, stats = built.apply(params, stats, x, **options)
        return (y if residual is None else y + residual), stats

    def activated(*arguments):
        y, stats = forward(*arguments)
        own = cell.layer not in OTHERS and cell.variant in ("activation", "residual")
        alone = own or cell.variant in ("plain", "mask", "weights")
        return (y if alone else nn.relu(y)), stats

    def both(params, stats, arrays, masks, dy):
        y, vjp, stats = jax.vjp(
            lambda params, arrays: activated(params, stats, arrays, masks),
            params,
            arrays,
            has_aux=True,
        )
        return y, stats, *vjp(dy)

    arguments: tuple = built.params, built.stats, arrays, masks
    given, result, f = (P(), P(), split, split), (split, P()), activated
    if cell.direction == "both":
        arguments, given = (*arguments, x), (*given, split)
        result, f = (*result, P(), split), both
    if shared:
        f = jax.shard_map(f, mesh=mesh, in_specs=given, out_specs=result)
    return _lower(f, mesh, arguments, given, result)


def build(cell: Cell, x: jax.ShapeDtypeStruct, axis_name: str | None) -> Layer:
    """The layer of a cell for inputs like `x`."""
    options: dict[str, Any] = {"use_running_average": False, "dtype": x.dtype}
    if cell.layer not in OTHERS and cell.variant in ("activation", "residual"):
        options["activation"] = nn.relu
    if cell.layer == "formula":
        return _formula(x, axis_name)
    options["axis_name"] = axis_name
    if cell.layer in NNX:
        return _nnx(NNX[cell.layer], x, options)
    module = LINEN[cell.layer](**options)
    shapes: Any = dict(jax.eval_shape(module.init, jax.random.key(0), x))
    params = shapes.pop("params")

    def apply(params, stats, x, **options):
        variables = {"params": params, **stats}
        return module.apply(variables, x, mutable=list(shapes), **options)

    return Layer(apply, params, shapes)


def _nnx(kind: Any, x: jax.ShapeDtypeStruct, options: dict[str, Any]) -> Layer:
    module = nnx.eval_shape(lambda: kind(x.shape[-1], rngs=nnx.Rngs(0), **options))
    definition, params, stats = nnx.split(module, nnx.Param, ...)

    def apply(params, stats, x, **options):
        module = nnx.merge(definition, params, stats)
        y = module(x, **options)
        return y, nnx.pure(nnx.split(module, nnx.Param, ...)[2])

    return Layer(apply, nnx.pure(params), nnx.pure(stats))


def _formula(x: jax.ShapeDtypeStruct, axis_name: str | None) -> Layer:
    """What a textbook has: two lines in float32, the derivative by JAX."""

    def average(value):
        value = value.mean(tuple(range(x.ndim - 1)))
        return value if axis_name is None else jax.lax.pmean(value, axis_name)

    def apply(params, stats, x, mask=None):
        wide = x.astype(jnp.float32)
        weight = (
            1.0 if mask is None else mask / average(jnp.broadcast_to(mask, x.shape))
        )
        mean = average(weight * wide)
        var = average(weight * (wide - mean) ** 2)
        y = (wide - mean) * jax.lax.rsqrt(var + 1e-5) * params["scale"]
        new = {"mean": mean, "var": var}
        stats = jax.tree.map(lambda old, now: 0.99 * old + 0.01 * now, stats, new)
        return (y + params["bias"]).astype(x.dtype), stats

    vector = _shape(x.shape[-1:], jnp.float32)
    return Layer(
        apply, {"scale": vector, "bias": vector}, {"mean": vector, "var": vector}
    )


def step(
    target: str, chips: int, norm: str, blocks: int, images: int, side: int
) -> jax.stages.Lowered:
    """A training step of ResNet-50 in bfloat16, as `bench.step` has it.

    Args:
        target: see `targets.TARGETS`.
        chips: that share the batch, by jit.
        norm: one of `step.NORMS`.
        blocks: of the first stage, behind the stem; 0 for all of the network.
        images: on each chip.
        side: of an image.
    """
    mesh = Mesh(
        np.array(targets.devices(target, chips)), ("data",), axis_types=(AxisType.Auto,)
    )
    stages = (blocks,) if blocks else STAGES
    model = ResNet(Bottleneck, stages, NORMS[norm], dtype=jnp.bfloat16)
    data = _shape((chips * images, side, side, 3), jnp.bfloat16)
    labels = _shape((chips * images,), jnp.int32)
    variables: Any = jax.eval_shape(model.init, jax.random.key(0), data)
    optimizer = optax.sgd(0.1, momentum=0.9)
    state = jax.eval_shape(optimizer.init, variables["params"])
    split = P("data") if chips > 1 else P()
    return _lower(
        update(model, optimizer),
        mesh,
        (variables, state, data, labels),
        (P(), P(), split, split),
        P(),
    )


def _shape(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _lower(
    f: Callable[..., Any], mesh: Mesh, arguments: tuple, given: tuple, result: Any
) -> jax.stages.Lowered:
    """`f` for arguments and results that lie on the mesh as the specs say."""

    def on(spec: P, values: Any) -> Any:  # committed, as a loop's arrays are
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(lambda v: v.update(sharding=sharding), values)

    placed = jax.tree.map(
        on, given, arguments, is_leaf=lambda leaf: isinstance(leaf, P)
    )
    results = jax.tree.map(
        partial(NamedSharding, mesh), result, is_leaf=lambda leaf: isinstance(leaf, P)
    )
    return jax.jit(f, out_shardings=results).lower(*placed)

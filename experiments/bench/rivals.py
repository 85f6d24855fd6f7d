"""One batch-norm layer as each library has it.

A name and two arrays, channels last, make two calls: "forward" gives (y, ...), "both"
(y, dx, the gradients of scale and bias, ...). All are in training and update their
running statistics, which are float32 as the parameters are; y and dx have the dtype
of x. Libraries are imported by name, where needed: only Flax has to be installed.

Haiku and Equinox, given bfloat16, compute in it: dx is off by two units of its last
place or more, and takes longer. They are given float32(x), and their result is rounded,
within jit.
"""

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

import bnjax
from experiments.common import results

Calls = dict[str, Callable[[], tuple]]


class Model(NamedTuple):
    """A layer of JAX's: apply(params, state, x) is (y, the new state)."""

    apply: Callable[..., tuple[jax.Array, Any]]
    params: Any
    state: Any


def linen(layer: type[nn.Module], x: jax.Array) -> Model:
    """flax.linen.BatchNorm, or bnjax's."""
    norm = layer(use_running_average=False, dtype=x.dtype)
    variables = dict(norm.init(jax.random.key(0), x))

    def apply(params, state, x):
        return norm.apply({"params": params, **state}, x, mutable=["batch_stats"])

    return Model(apply, variables.pop("params"), variables)


def haiku(x: jax.Array) -> Model:
    hk = import_module("haiku")

    def layer(x):
        norm = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.99)
        return norm(x.astype(jnp.float32), is_training=True).astype(x.dtype)

    init, apply = hk.transform_with_state(layer)
    params, state = init(None, x)
    return Model(lambda p, s, x: apply(p, s, None, x), params, state)


def equinox(x: jax.Array) -> Model:
    """Its layer takes one example, channels first, within a vmap."""
    eqx = import_module("equinox")

    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        x.shape[1], axis_name="batch", mode="batch"
    )
    params, static = eqx.partition(norm, eqx.is_inexact_array)

    def apply(params, state, x):
        layer = eqx.combine(params, static)
        layer = jax.vmap(layer, (0, None), (0, None), axis_name="batch")
        y, state = layer(x.astype(jnp.float32), state)
        return y.astype(x.dtype), state

    return Model(apply, params, state)


def keras(x: jax.Array) -> Model:
    os.environ["KERAS_BACKEND"] = "jax"
    layers = import_module("keras.layers")
    dtype = "mixed_bfloat16" if x.dtype == jnp.bfloat16 else str(x.dtype)
    norm = layers.BatchNormalization(momentum=0.99, epsilon=1e-5, dtype=dtype)
    norm.build(x.shape)
    params, state = (
        [v.value for v in variables]
        for variables in (norm.trainable_variables, norm.non_trainable_variables)
    )
    return Model(
        lambda p, s, x: norm.stateless_call(p, s, x, training=True), params, state
    )


def stored(model: Model, x: jax.Array) -> float:
    """Bytes stored between the forward and the backward pass, over those of x."""
    apply, params, state = model
    _, vjp, _ = jax.vjp(lambda p, x: apply(p, state, x), params, x, has_aux=True)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(vjp)) / x.nbytes


def jitted(model: Model, x: jax.Array, dy: jax.Array) -> Calls:
    apply, params, state = model

    def both(params, state, x, dy):
        y, vjp, new = jax.vjp(lambda p, x: apply(p, state, x), params, x, has_aux=True)
        dparams, dx = vjp(dy)
        return y, dx, dparams, new

    forward, both = jax.jit(apply), jax.jit(both)
    return {
        "forward": lambda: forward(params, state, x),
        "both": lambda: both(params, state, x, dy),
    }


def pytorch(x: jax.Array, dy: jax.Array, compiled: bool = False) -> Calls:
    """PyTorch on the CPU, on the very same memory; channels_last if of 4 axes."""
    torch = import_module("torch")
    torch.set_num_threads(results.cores())
    torch.compiler.reset()  # else the ninth shape would silently not be compiled
    norm = torch.nn.BatchNorm1d if x.ndim == 2 else torch.nn.BatchNorm2d
    norm = norm(x.shape[-1], momentum=0.01)
    layer = torch.compile(norm, fullgraph=True, dynamic=False) if compiled else norm
    data, dy = (torch.from_dlpack(v).movedim(-1, 1) for v in (x, dy))
    leaf = data.detach().requires_grad_()

    def forward():
        with torch.no_grad():
            return (layer(data),)

    def both():
        y = layer(leaf)
        return y, *torch.autograd.grad(y, [leaf, norm.weight, norm.bias], dy)

    return {"forward": forward, "both": both}


MODELS = {
    "flax": lambda x: linen(nn.BatchNorm, x),
    "bnjax": lambda x: linen(bnjax.BatchNorm, x),
    "haiku": haiku,
    "equinox": equinox,
    "keras": keras,
}
CHANNELS_FIRST = ("equinox", "torch", "torch.compile")


def calls(name: str, x: jax.Array, dy: jax.Array) -> Calls:
    """The two calls of one library."""
    if name in MODELS:
        if name in CHANNELS_FIRST:
            x, dy = jnp.moveaxis(x, -1, 1), jnp.moveaxis(dy, -1, 1)
        return jitted(MODELS[name](x), x, dy)
    return pytorch(x, dy, compiled=name == "torch.compile")

"""The collectives of one layer, counted in the compiled program, against Flax's.

    python -m experiments.bench.collectives            # half a minute
    python -m experiments.bench.collectives --smoke    # one mode, five seconds

Claim: one collective forward and one backward, in every mode, of some numbers per
feature; and never of the batch. Control: flax.linen.BatchNorm, compiled the same way.
Nothing is timed: the devices are those that XLA makes of one CPU. Bytes are what each
device hands in, and what a ring then sends it: (R - 1) s of a gather of s bytes from
each of R devices, 2 (R - 1)/R s of a reduction.

Measured: see docs/pages/performance.md. Nothing is recorded.
"""

import sys
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import tyro
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

import bnjax
from experiments.bench.programs import Program

LAYERS = {"flax": nn.BatchNorm, "bnjax": bnjax.BatchNorm}
MODES = ("jit", "shard_map", "shard_map unchecked", "pmap")


@dataclass(frozen=True)
class Config:
    """What is compiled."""

    devices: int = 8
    """Virtual CPU devices; the batch is split over them."""
    features: int = 64
    """Channels of the layer's input, in float32."""
    examples: int = 4
    """Of each device."""
    image: tuple[int, int] = (6, 5)
    """Height and width of the input."""
    smoke: bool = False
    """Only jit."""


def compiled(config: Config, mode: str, name: str, masked: bool, backward: bool):
    """One layer in training, compiled, and its arguments: normal x, and the mask."""
    layer = LAYERS[name](
        use_running_average=False, axis_name=None if mode == "jit" else "data"
    )
    shape = (config.devices * config.examples, *config.image, config.features)
    x = jax.random.normal(jax.random.key(1), shape)
    mask = jnp.ones((shape[0], 1, 1, 1), bool) if masked else None
    variables = layer.init(jax.random.key(0), x)

    def forward(x, mask):
        return layer.apply(variables, x, mask=mask, mutable=["batch_stats"])

    def both(x, mask):
        y, vjp, updates = jax.vjp(lambda x: forward(x, mask), x, has_aux=True)
        return y, vjp(y), updates

    f = both if backward else forward
    mesh = jax.make_mesh(
        (config.devices,),
        ("data",),
        axis_types=(AxisType.Auto,),
        devices=jax.devices()[: config.devices],
    )
    if mode == "jit":
        x, mask = jax.device_put((x, mask), NamedSharding(mesh, P("data")))
        f = jax.jit(f)
    elif mode == "pmap":
        x, mask = jax.tree.map(
            lambda t: t.reshape(config.devices, -1, *t.shape[1:]), (x, mask)
        )
        f = jax.pmap(f, axis_name="data", in_axes=(0, 0 if masked else None))
    else:
        f = jax.shard_map(
            f,
            mesh=mesh,
            in_specs=(P("data"), P("data") if masked else None),
            out_specs=(P("data"), P("data"), P()) if backward else (P("data"), P()),
            check_vma=mode == "shard_map",
        )
        x, mask = jax.device_put((x, mask), NamedSharding(mesh, P("data")))
        f = jax.jit(f)
    return f.lower(x, mask).compile(), (x, mask)


def counted(program: jax.stages.Compiled) -> list[tuple[str, int]]:
    """Each collective outside of rare branches, and the bytes a device hands in."""
    found = Program(str(program.as_text())).always.collectives
    return [(each.kind, each.bytes) for each in found]


def ring(kind: str, size: int, devices: int) -> float:
    """Bytes that each device receives."""
    if kind == "all-gather":
        return (devices - 1) * size
    return 2 * (devices - 1) / devices * size


def main(config: Config) -> int:
    """Prints the table."""
    jax.config.update("jax_num_cpu_devices", config.devices)
    table = Table(title=f"One layer of {config.features} features")
    for name in ("", "mask", "", "forward", "sent", "fwd + bwd", "sent"):
        table.add_column(name, justify="right" if name == "sent" else "left")
    for mode in MODES[:1] if config.smoke else MODES:
        for masked in (False, True):
            for name in LAYERS:
                cells = []
                for backward in (False, True):
                    made, _ = compiled(config, mode, name, masked, backward)
                    found = counted(made)
                    sent = sum(ring(k, size, config.devices) for k, size in found)
                    kinds = ", ".join(f"{k} {size:,} B" for k, size in found)
                    cells += [f"{len(found)}: {kinds}", f"{sent:,.0f} B"]
                table.add_row(mode, "yes" if masked else "no", name, *cells)
    Console(width=150).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))

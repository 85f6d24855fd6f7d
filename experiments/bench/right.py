"""What is timed is right: y and dx of a layer against float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import rivals


def check(name: str, calls: rivals.Calls, x: jax.Array, dy: jax.Array) -> None:
    """Raises ValueError if y or dx is off by more than 1.5 units of x's last place.

    Right rounding is 0.5; torch.compile rounds dx twice, 1.05. On top of it, 256 units
    of float32's, in which all compute: PyTorch's sums over 1e5 values lose 30. Scale
    is 1 and bias 0, as they start.
    """
    tolerance = 1.5 * float(jnp.finfo(x.dtype).eps) + 256 * float(
        jnp.finfo(jnp.float32).eps
    )
    y, dx = reference(np.asarray(x, np.float64), np.asarray(dy, np.float64))
    found = (calls["forward"]()[0], *calls["both"]()[:2])
    for what, value, exact in zip(("y", "y", "dx"), found, (y, y, dx), strict=True):
        error = abs(channels_last(name, value) - exact)
        worst = (error / np.maximum(1, abs(exact))).max()
        if not worst <= tolerance:
            raise ValueError(
                f"{what} of {name} is off by {worst:.2g} for {x.dtype} {x.shape}, "
                f"expected at most {tolerance:.2g}; it is not timed."
            )


def channels_last(name: str, value: Any) -> np.ndarray:
    """What a call of one library returned, in float64."""
    if name.startswith("torch"):
        value = value.detach().double()
    value = np.asarray(value, np.float64)
    return np.moveaxis(value, 1, -1) if name in rivals.CHANNELS_FIRST else value


def reference(x: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(y, dx), from section 3 of Ioffe & Szegedy 2015."""
    axes = tuple(range(x.ndim - 1))
    rstd = 1 / np.sqrt(x.var(axes) + 1e-5)
    y = (x - x.mean(axes)) * rstd
    return y, rstd * (dy - dy.mean(axes) - y * (dy * y).mean(axes))

"""W (x - mean) * scale + bias, of given statistics or of those of the batch."""

import functools
from typing import NamedTuple

import jax
from jax import lax

from bnjax import _axes, _replicas
from bnjax.normalize import AffineSpec, Inputs, TransformSpec
from bnjax.whiten import _layout
from bnjax.whiten._layout import Layout
from bnjax.whiten._roots import root
from bnjax.whiten._statistics import CoReductionSpec, co_statistics
from bnjax.whiten._value import CoMoments


class Whitening(NamedTuple):
    """A transform of `normalize.train`; equal where its fields are, so static."""

    layout: Layout
    method: str
    iterations: int

    def __call__(
        self, given: Inputs, spec: TransformSpec, covariance: jax.Array
    ) -> tuple[jax.Array, CoMoments]:
        """The whitened x and its co-moments; `covariance` is that of an empty batch."""
        reduction = CoReductionSpec(spec.reduction, self.layout)
        batch = co_statistics(given.x, given.mask, given.shift, reduction)
        compute = spec.affine.compute
        mean, own = batch.mean.astype(compute), batch.covariance().astype(compute)
        if given.mask is not None or 0 in (
            given.x.shape[a] for a in spec.reduction.axes
        ):
            seen = batch.count > 0
            mean = _axes.where(seen, mean, given.mean)
            own = _axes.where(seen, own, covariance.astype(compute))
        vectors = mean, given.scale, given.bias
        x = given.finite_x()
        return normalize_with_stats(
            x, own, vectors, given.epsilon, self, spec.affine
        ), batch


@functools.partial(jax.jit, static_argnums=(4, 5))
def normalize_with_stats(
    x, covariance, vectors, epsilon, whitening: Whitening, spec: AffineSpec
):
    """(x - mean) M + b, as (x - c) M + (b - (mean - c) M) for a constant c = mean.

    The value is the same, and so is every derivative; but that by the mean is taken
    of a vector, and not of an array as large as `x`.
    """
    layout, *method = whitening
    mean, scale, bias = vectors
    groups = layout.groups, layout.size
    matrices = root(covariance.astype(spec.compute), epsilon, *method)
    matrices = scale.reshape(*groups, 1) * matrices
    centre = lax.stop_gradient(mean)
    offset = bias - _layout.whitened(matrices, mean - centre, Layout(0, *groups))
    centre, matrices, offset = _cast(x, centre, matrices, offset)
    x = x.astype(spec.compute)
    centre, offset = (_axes.expand(v, (layout.axis,), x.ndim) for v in (centre, offset))
    return _layout.whitened(matrices, x - centre, layout) + offset


def _cast(x: jax.Array, *values: jax.Array):
    """The values, cast together to vary over the replicas as `x`: one collective."""
    if not _replicas.varying(x):
        return values
    vector, unpack = _replicas.pack(values)
    return unpack(_replicas.cast_like(x, vector))

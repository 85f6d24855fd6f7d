"""Whitening by given co-moments, and its matrix: inverse square roots of covariances.

    y = W (x - mean) * scale + bias

All three roots W whiten: W C W^T = I. They differ by a rotation, by cost, and by
exactness.
"""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from bnjax import _axes, _checks, _dtypes, _replicas
from bnjax.moments import name_for_remat
from bnjax.normalize import AffineSpec, Inputs, TransformSpec
from bnjax.whiten._co_moments import (
    HIGHEST,
    CoMoments,
    CoReductionSpec,
    Layout,
    co_statistics,
    multiply_groups,
    require_real,
)

METHODS = ("eigh", "newton_schulz", "cholesky")


def inverse_sqrt(
    covariance: ArrayLike,
    *,
    epsilon: float = 1e-5,
    method: str = "eigh",
    iterations: int = 5,
) -> jax.Array:
    """W with W A W^T = I for each A = covariance + epsilon I.

        eigh           W = A^(-1/2) = V diag(lambda)^(-1/2) V^T: ZCA, the whitening
                       that changes its input least
        newton_schulz  P_0 = I,  P_k = (3 P_(k-1) - P_(k-1)^3 A / tr A) / 2,
                       W = P_T / sqrt(tr A) ~ A^(-1/2), T = iterations: products alone
        cholesky       W = L^(-1), A = L L^T: triangular. It whitens, but is not ZCA:
                       the result depends on the order of the features

    Each is finite for a singular covariance, its derivatives too: `eigh` clamps the
    eigenvalues, and `cholesky` raises epsilon, to the trace's unit of rounding.
    Repeated eigenvalues need no care.

    `newton_schulz` is within 1e-2 in a direction whose variance is a share s of the
    trace after about 1.2 ln(1/s) + 2 iterations; the five of the paper stop early.
    Where the variances of 8 features span a factor 1, 10, 100, 1000, W is off by
    7e-4, 6e-2, 0.4, 0.7 after 5 iterations, and by less than 1e-2 after 5, 7, 9, 11;
    with 64 features after 7, 9, 11, 13.

    Args:
        covariance: (..., n, n), real, symmetric, positive semidefinite.
        epsilon: added to the diagonal.
        method: "eigh", "newton_schulz" or "cholesky".
        iterations: the number of iterations of "newton_schulz"; the others ignore it.

    Returns:
        (..., n, n), at least float32.

    Raises:
        TypeError: integers or complex numbers; iterations that are no integer.
        ValueError: matrices that are not square, an unknown method, a negative epsilon,
            less than one iteration.

    >>> covariance = jnp.array([[4.0, 0.0], [0.0, 16.0]])
    >>> print(inverse_sqrt(covariance, epsilon=0.0))
    [[0.5  0.  ] [0.   0.25]]

    References: Kessy, Lewin & Strimmer 2018 (ZCA, Cholesky); Huang et al. 2018, section
    3.1; Huang et al. 2019, Algorithm 1 (Newton's iteration); Higham 2008, section 6.3.
    """
    covariance = require_real("covariance", covariance)
    if covariance.ndim < 2 or covariance.shape[-1] != covariance.shape[-2]:
        raise ValueError(
            f"covariance has shape {covariance.shape}: expected square matrices, "
            "(..., feature, feature). Write jnp.diag(var) for a vector of variances."
        )
    method, iterations = check_method(method, iterations)
    _checks.epsilon(epsilon)
    covariance = covariance.astype(_dtypes.statistics_dtype(covariance.dtype))
    return root(covariance, epsilon, method, iterations)


def check_method(method: str, iterations: int) -> tuple[str, int]:
    """The method and its iterations; raises on what does not exist."""
    if method not in METHODS:
        raise ValueError(
            f"method={method!r} is unknown: expected one of {list(METHODS)}. Write "
            "method='eigh' for the exact ZCA."
        )
    iterations = operator.index(iterations)
    if iterations < 1:
        raise ValueError(
            f"iterations={iterations} of Newton and Schulz: expected at least one. "
            "Write iterations=5."
        )
    return method, iterations


@functools.partial(jax.jit, static_argnums=(2, 3))
def root(covariance, epsilon, method: str, iterations: int) -> jax.Array:
    """`inverse_sqrt` of checked arguments."""
    a = (covariance + _transposed(covariance)) / 2
    trace = lax.stop_gradient(_safe_trace(a))
    floor = jnp.finfo(a.dtype).eps * trace
    epsilon = jnp.asarray(epsilon, a.dtype)
    if method == "cholesky":
        epsilon = jnp.maximum(epsilon, floor)
    a = a + epsilon * _eye(a)
    if method == "cholesky":
        return _triangular(a)
    if method == "newton_schulz":
        return _newton_schulz(a, iterations)
    return _symmetric(a, floor)[0]


def _safe_trace(a: jax.Array) -> jax.Array:
    """The trace as (..., 1, 1); 1 where it is 0, to divide by."""
    trace = jnp.trace(a, axis1=-2, axis2=-1)[..., None, None]
    return jnp.where(trace > 0, trace, jnp.ones_like(trace))


def _newton_schulz(a: jax.Array, iterations: int) -> jax.Array:
    """Approximates A^(-1/2) by Newton-Schulz steps (Huang et al. 2019, Algorithm 1).

    Updates Q_k = A P_k / tr A alongside the paper's P_k. In exact arithmetic P_k is the
    same. In floating point the pair is more stable: iterations beyond convergence do
    not amplify rounding errors.
    """
    trace = _safe_trace(a)
    p, q = _eye(a), a / trace
    for _ in range(iterations):
        step = (3 * _eye(a) - _dot(p, q)) / 2
        p, q = _dot(step, p), _dot(q, step)
    return p / jnp.sqrt(trace)


# W = L^(-1):  W A W^T = I gives dW W^-1 + W dA W^T + (dW W^-1)^T = 0, and dW W^-1 is
# lower triangular:  dW = -tril(W dA W^T) W, with half of the diagonal.


@jax.custom_jvp
def _triangular(a: jax.Array) -> jax.Array:
    lower = jnp.linalg.cholesky(a, symmetrize_input=False)
    return lax.linalg.triangular_solve(lower, _eye(a), left_side=True, lower=True)


@_triangular.defjvp
def _(primals, tangents):
    (a,), (da,) = primals, tangents
    w = name_for_remat(_triangular(a))
    inner = _dot(w, da, _transposed(w))
    return w, -_dot(jnp.tril(inner) - _eye(a) * inner / 2, w)


# S = A^(-1/2):  S A S = I gives, with A S = S A,
#     A (S dS + dS S) A = -dA
# This linear equation has one solution, whether eigenvalues repeat or not. It is solved
# in the basis of the eigenvectors V, with r the roots of the eigenvalues:
#     (V^T dS V)_ij = -(V^T dA V)_ij / (r_i r_j (r_i + r_j))
# V itself has no derivative where they repeat. For higher orders JAX differentiates the
# equation, and not its solution.


@jax.custom_jvp
def _symmetric(a: jax.Array, floor: jax.Array):
    """A^(-1/2), the roots of the eigenvalues, at least `floor`, and the eigenvectors.

    The last two are constants to JAX: only the solution below may use them.
    """
    vectors, values = lax.linalg.eigh(a, symmetrize_input=False)
    roots = jnp.sqrt(jnp.maximum(values, floor[..., 0]))
    return _dot(vectors / roots[..., None, :], _transposed(vectors)), roots, vectors


@_symmetric.defjvp
def _(primals, tangents):
    (a, floor), (da, _) = primals, tangents
    s, roots, vectors = map(name_for_remat, _symmetric(a, floor))

    def equation(ds):
        return _dot(a, _dot(s, ds) + _dot(ds, s), a)

    def solution(_, right):
        row, column = roots[..., None, :], roots[..., :, None]
        rotated = _dot(_transposed(vectors), right, vectors)
        rotated = rotated / (row * column * (row + column))
        return _dot(vectors, rotated, _transposed(vectors))

    ds = lax.custom_linear_solve(equation, -da, solution, symmetric=True)
    return (s, roots, vectors), (ds, jnp.zeros_like(roots), jnp.zeros_like(vectors))


def _eye(a: jax.Array) -> jax.Array:
    """The identities of the shape of `a`."""
    return jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)


def _transposed(a: jax.Array) -> jax.Array:
    return jnp.swapaxes(a, -1, -2)


def _dot(*factors: jax.Array) -> jax.Array:
    return functools.reduce(functools.partial(jnp.matmul, precision=HIGHEST), factors)


class Whitening(NamedTuple):
    """A training transform for `apply_training_transform`; static, equal by fields."""

    layout: Layout
    method: str
    iterations: int

    def __call__(
        self, inputs: Inputs, spec: TransformSpec, covariance: jax.Array
    ) -> tuple[jax.Array, CoMoments]:
        """The whitened x and its co-moments; `covariance` is for an empty batch."""
        reduction = CoReductionSpec(spec.reduction, self.layout)
        batch = co_statistics(inputs.x, inputs.mask, inputs.shift, reduction)
        compute = spec.affine.compute
        mean = batch.mean.astype(compute)
        batch_covariance = batch.covariance().astype(compute)
        if inputs.mask is not None or 0 in (
            inputs.x.shape[a] for a in spec.reduction.axes
        ):
            seen = batch.count > 0
            mean = _axes.where(seen, mean, inputs.fallback_mean)
            batch_covariance = _axes.where(
                seen, batch_covariance, covariance.astype(compute)
            )
        vectors = mean, inputs.scale, inputs.bias
        x = inputs.bounded_x()
        y = normalize_with_stats(
            x, batch_covariance, vectors, inputs.epsilon, self, spec.affine
        )
        return y, batch


@functools.partial(jax.jit, static_argnums=(4, 5))
def normalize_with_stats(
    x, covariance, vectors, epsilon, whitening: Whitening, spec: AffineSpec
):
    """(x - mean) M + b, as (x - c) M + (b - (mean - c) M) for a constant c = mean.

    The value and every derivative are the same. But the derivative by the mean is that
    of a vector, and not of an array as large as `x`.
    """
    layout, *method = whitening
    mean, scale, bias = vectors
    groups = layout.groups, layout.size
    matrices = root(covariance.astype(spec.compute), epsilon, *method)
    matrices = scale.reshape(*groups, 1) * matrices
    centre = lax.stop_gradient(mean)
    offset = bias - multiply_groups(matrices, mean - centre, Layout(0, *groups))
    centre, matrices, offset = _cast(x, centre, matrices, offset)
    x = x.astype(spec.compute)
    centre, offset = (_axes.expand(v, (layout.axis,), x.ndim) for v in (centre, offset))
    return multiply_groups(matrices, x - centre, layout) + offset


def _cast(x: jax.Array, *values: jax.Array):
    """The values, cast together to vary over the replicas as `x`: one collective."""
    if not _replicas.varying(x):
        return values
    vector, unpack = _replicas.pack(values)
    return unpack(_replicas.pvary_like(x, vector))

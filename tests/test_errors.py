"""Every message, rendered: what was received, what was expected, what to write."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from helpers import assert_close

import bnjax

X = np.ones((6, 4, 3), np.float32)
V3, V4 = np.ones(3, np.float32), np.ones(4, np.float32)
M3, CO3 = bnjax.Moments(2.0, V3, V3), bnjax.whiten.CoMoments(2.0, V3, np.eye(3)[None])


def batch_norm(**keywords):
    return lambda: bnjax.batch_norm(X, **keywords)


def layer(*, x=X, v=None, call=(False,), **fields):
    def run():
        norm = bnjax.BatchNorm(**fields)
        variables = v if v is not None else norm.init(jax.random.key(0), X, True)
        return norm.apply(variables, x, *call, mutable=["batch_stats"])

    return run


def in_vmap(*, op=bnjax.batch_norm, names="i", **keywords):
    """`op` of four replicas, along each of the axes of the names."""

    def run():
        f = functools.partial(op, **keywords)
        for name in names:
            f = jax.vmap(f, axis_name=name)
        return f(np.ones((4,) * len(names) + (6, 3), np.float32))

    return run


def in_shard_map(**keywords):
    """Untyped: where JAX itself takes a repeated name, and sums twice."""
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("i",), auto, devices=jax.devices()[:4])
    spec = jax.sharding.PartitionSpec("i")
    f = functools.partial(bnjax.moments, **keywords)
    return lambda: jax.shard_map(
        f,
        mesh=mesh,
        in_specs=spec,
        out_specs=jax.sharding.PartitionSpec(),
        check_vma=False,
    )(np.ones((8, 3), np.float32))


def layer_in_vmap(x, **keywords):
    norm = bnjax.BatchNorm(False, **keywords)
    variables = norm.init(jax.random.key(0), x)
    return norm.apply(variables, x, mutable=["batch_stats"])[0]


def merged_in_vmap(x, **keywords):
    stats = {"norm": {"mean": x, "var": x}}
    return bnjax.training.merge_batch_stats(stats, **keywords)


STORED_FOR_4 = {
    "params": {"scale": V4, "bias": V4},
    "batch_stats": {"mean": V4, "var": V4},
}
CASES = {
    "integers": (
        lambda: bnjax.batch_norm(np.ones((6, 3), np.int32)),
        TypeError,
        ["x has dtype int32", "expected a floating", "x.astype(jnp.float32)"],
    ),
    "integers, moments": (
        lambda: bnjax.moments(np.ones((6, 3), bool)),
        TypeError,
        ["x has dtype bool", "expected a floating"],
    ),
    "integers, normalize": (
        lambda: bnjax.normalize(np.ones((6, 3), np.int8), V3, V3),
        TypeError,
        ["x has dtype int8"],
    ),
    "integer residual": (
        batch_norm(residual=np.ones(X.shape, int)),
        TypeError,
        ["residual has dtype int32", "residual.astype(jnp.float32)"],
    ),
    "axis out of range": (
        batch_norm(axis=3),
        ValueError,
        ["axis=3 is out of range", "3 dimension(s)", "from -3 to 2", "axis=-1"],
    ),
    "axis out of range below": (
        batch_norm(axis=(-4, 0)),
        ValueError,
        ["axis=(-4, 0) is out of range", "got -4"],
    ),
    "axis repeated": (
        batch_norm(axis=(2, -1)),
        ValueError,
        ["axis=(2, -1) names an axis", "twice", "Name each feature axis once"],
    ),
    "mask of another shape": (
        batch_norm(mask=np.ones((6,), bool)),
        ValueError,
        ["mask has shape (6,)", "input's shape (6, 4, 3)", "mask[..., None, None]"],
    ),
    "mask of higher rank": (
        batch_norm(mask=np.ones((1, 6, 4, 3), bool)),
        ValueError,
        ["mask has shape (1, 6, 4, 3)", "does not broadcast"],
    ),
    "mask that would enlarge x": (
        lambda: bnjax.moments(np.ones((1, 3), np.float32), mask=np.ones((5, 1), bool)),
        ValueError,
        ["mask has shape (5, 1)", "input's shape (1, 3)"],
    ),
    "mask of floats": (
        batch_norm(mask=np.full((6, 4, 1), 0.5)),
        TypeError,
        [
            "mask has dtype float32",
            "0.5 would count as much as 1",
            "Write mask > 0",
            "weights=... for numbers",
        ],
    ),
    "weights of booleans": (
        batch_norm(weights=np.ones((6, 4, 1), bool)),
        TypeError,
        ["weights has dtype bool", "expected real floats >= 0", "Write mask=weights"],
    ),
    "weights of integers": (
        lambda: bnjax.moments(X, weights=np.ones((6, 4, 1), int)),
        TypeError,
        ["weights has dtype int32", "Write weights.astype(jnp.float32)."],
    ),
    "weights of complex numbers": (
        batch_norm(weights=X * 1j),
        TypeError,
        ["weights has dtype complex64", "Write weights.real."],
    ),
    "weights of eight bits": (
        batch_norm(weights=jnp.ones((6, 4, 1), jnp.float8_e4m3fn)),
        TypeError,
        ["weights has dtype float8_e4m3fn", "Write weights.astype(jnp.bfloat16)"],
    ),
    "negative weights": (
        batch_norm(weights=np.linspace(-0.5, 1, 6)[:, None, None]),
        ValueError,
        ["weights holds -0.5", "finite numbers >= 0", "Write jnp.maximum(weights, 0)."],
    ),
    "weights that are NaN, layer": (
        lambda: bnjax.BatchNorm(False).init(
            jax.random.key(0), X, weights=jnp.full((6, 1, 1), jnp.nan, jnp.bfloat16)
        ),
        ValueError,
        ["weights holds nan", "Write jnp.where(jnp.isfinite(weights), weights, 0)."],
    ),
    "infinite weights, known in jit": (
        lambda: jax.jit(lambda x: bnjax.moments(x, weights=np.full((6, 1, 1), np.inf)))(
            X
        ),
        ValueError,
        ["weights holds inf"],
    ),
    "weights of another shape": (
        batch_norm(weights=np.ones((6,))),
        ValueError,
        [
            "weights has shape (6,)",
            "For weights along axis 0",
            "weights[..., None, None]",
        ],
    ),
    "weights that fit no axis, ghost": (
        lambda: bnjax.ghost.ghost_batch_norm(
            X, virtual_batch_size=3, weights=np.ones(5)
        ),
        ValueError,
        ["weights has shape (5,)", "weights.reshape((-1,) + (1,) * (x.ndim - 1))"],
    ),
    "weights that vary by feature, whitening": (
        lambda: bnjax.whiten.decorrelate(X, weights=np.ones(3)),
        ValueError,
        ["weights has shape (3,)", "weights.min(axis=2, keepdims=True)"],
    ),
    "mask of floats, moments": (
        lambda: bnjax.moments(X, mask=jnp.ones((6, 4, 1), jnp.bfloat16)),
        TypeError,
        ["mask has dtype bfloat16", "mask > 0"],
    ),
    "mask of floats, layer": (
        lambda: bnjax.BatchNorm(False).init(jax.random.key(0), X, mask=X),
        TypeError,
        ["mask has dtype float32", "mask > 0"],
    ),
    "mask of floats, Scaler": (
        lambda: bnjax.whiten.min_max_scale().fit(X, X),
        TypeError,
        ["mask has dtype float32", "mask > 0"],
    ),
    "mask of complex numbers": (
        batch_norm(mask=X * 1j),
        TypeError,
        ["mask has dtype complex64", "mask > 0"],
    ),
    "scale of another size": (
        batch_norm(scale=V4),
        ValueError,
        ["scale has shape (4,)", "expected (3,)", "axis=-1"],
    ),
    "bias of another size": (
        batch_norm(bias=V4, axis=-1),
        ValueError,
        ["bias has shape (4,)", "expected (3,)"],
    ),
    "scale for two axes": (
        batch_norm(scale=np.ones((3, 4), np.float32), axis=(2, 1)),
        ValueError,
        ["scale has shape (3, 4)", "expected (4, 3)", "axis=(2, 1)"],
    ),
    "mean of another size": (
        lambda: bnjax.normalize(X, V4, V3),
        ValueError,
        ["mean has shape (4,)", "expected (3,)"],
    ),
    "fallback of another size": (
        batch_norm(fallback=(V3, V4)),
        ValueError,
        ["var has shape (4,)", "expected (3,)"],
    ),
    "stored statistics of another size": (
        layer(v=STORED_FOR_4),
        ValueError,
        ["batch_stats/mean has shape (4,)", "expected (3,)", "initialize it again"],
    ),
    "residual of another shape": (
        batch_norm(residual=V3),
        ValueError,
        ["residual has shape (3,)", "expected (6, 4, 3)", "jnp.broadcast_to"],
    ),
    "activation by name": (
        batch_norm(activation="relu"),
        TypeError,
        ["activation='relu' is not callable", "activation=jax.nn.relu"],
    ),
    "scalar scale": (
        batch_norm(scale=2.0),
        ValueError,
        ["scale has shape ()", "expected (3,)"],
    ),
    "scalar mean": (
        lambda: bnjax.normalize(X, 3.0, V3),
        ValueError,
        ["mean has shape ()", "expected (3,)"],
    ),
    "no axis": (
        lambda: bnjax.batch_norm(np.float32(1)),
        ValueError,
        ["the input has shape ()", "at least a feature axis"],
    ),
    "complex mean": (
        lambda: bnjax.normalize(X, V3 * 1j, V3),
        TypeError,
        ["mean has dtype complex64", "expected a real mean", "mean.real"],
    ),
    "complex residual": (
        batch_norm(residual=X * 1j),
        TypeError,
        ["residual has dtype complex64", "residual.real"],
    ),
    "activation that is no elementwise function": (
        batch_norm(activation=jnp.sum),
        ValueError,
        ["returned shape ()", "input of shape (6, 4, 3)", "elementwise"],
    ),
    "activation that returns several arrays": (
        batch_norm(activation=lambda y: (y, y)),
        TypeError,
        ["returned a value of type tuple", "expected one array", "(6, 4, 3)"],
    ),
    "activation that returns a list": (
        batch_norm(activation=lambda y: [y]),
        TypeError,
        ["returned a value of type list", "expected one array"],
    ),
    "activation that returns nothing": (
        lambda: bnjax.normalize(X, V3, V3, activation=lambda y: None),
        TypeError,
        ["returned None: expected one array"],
    ),
    "activation that returns a number": (
        layer(activation=lambda y: 1.0),
        TypeError,
        ["returned a value of type float"],
    ),
    "activation that returns a class": (
        batch_norm(activation=lambda y: nn.PReLU),
        TypeError,
        ["returned the class PReLU"],
    ),
    "activation that is a class": (
        batch_norm(activation=nn.PReLU),
        TypeError,
        ["PReLU'> is a class", "activation=PReLU()", "activation=jax.nn.relu"],
    ),
    "activation that is a class of numbers": (
        layer(activation=float),
        TypeError,
        ["activation=<class 'float'> is a class"],
    ),
    "activation that turns complex": (
        batch_norm(activation=lambda y: y * 1j),
        TypeError,
        ["returned dtype complex64", "real dtype float32", "dtype=jnp.complex64"],
    ),
    "activation that turns complex, for a bfloat16 output": (
        lambda: bnjax.normalize(X, V3, V3, activation=jnp.fft.fft, dtype="bfloat16"),
        TypeError,
        ["returned dtype complex64", "real dtype bfloat16"],
    ),
    "complex epsilon": (
        batch_norm(epsilon=1e-5j),
        TypeError,
        ["epsilon=1e-05j is added to the variance: expected a real number"],
    ),
    "complex epsilon, an array": (
        batch_norm(epsilon=jnp.complex64(1)),
        TypeError,
        ["expected a real number", "epsilon=1e-5"],
    ),
    "no epsilon": (
        batch_norm(epsilon=None),
        TypeError,
        ["epsilon=None is added to the variance", "Write epsilon=1e-5"],
    ),
    "no epsilon, layer": (layer(epsilon=None), TypeError, ["epsilon=None"]),
    "epsilon by name": (
        lambda: bnjax.normalize(X, V3, V3, epsilon="1e-5"),
        TypeError,
        ["epsilon='1e-5'", "expected a real number"],
    ),
    "negative JAX epsilon": (
        batch_norm(epsilon=jnp.float32(-1)),
        ValueError,
        ["expected a number >= 0"],
    ),
    "epsilon of which one is negative": (
        lambda: bnjax.normalize(X, V3, V3, epsilon=np.float32([1, -1, 1])),
        ValueError,
        ["expected a number >= 0"],
    ),
    "epsilon of the full shape": (
        batch_norm(epsilon=X),
        ValueError,
        ["epsilon has shape (6, 4, 3): expected a number, or shape (3,)", "=1e-5"],
    ),
    "epsilon of another size": (
        lambda: bnjax.normalize(X, V3, V3, epsilon=V4),
        ValueError,
        ["epsilon has shape (4,)", "or shape (3,), one per feature"],
    ),
    "epsilon of each feature, whitening": (
        lambda: bnjax.whiten.zca_whiten(epsilon=V3),
        ValueError,
        ["epsilon has shape (3,): expected a number."],
    ),
    "NumPy epsilon": (batch_norm(epsilon=np.float32(-1)), ValueError, ["epsilon="]),
    "NumPy momentum": (
        layer(momentum=np.float32(1.5)),
        ValueError,
        ["momentum="],
    ),
    "JAX momentum": (
        layer(momentum=jnp.float32(1.5)),
        ValueError,
        ["momentum=Array(1.5", "[0, 1]", "momentum=0.99"],
    ),
    "no momentum": (
        layer(momentum=None),
        TypeError,
        ["momentum=None is the weight of the old value: expected a real number"],
    ),
    "complex decay": (
        lambda: bnjax.running.ema(0.9j),
        TypeError,
        ["decay=0.9j", "expected a real number", "decay=0.99"],
    ),
    "decays of which one is too large": (
        lambda: bnjax.running.debiased_ema(np.array([0.9, 1.1])),
        ValueError,
        ["1.1", "[0, 1]"],
    ),
    "negative epsilon": (
        batch_norm(epsilon=-1e-5),
        ValueError,
        ["epsilon=-1e-05", "expected a number >= 0", "epsilon=1e-5"],
    ),
    "epsilon NaN": (batch_norm(epsilon=float("nan")), ValueError, ["epsilon=nan"]),
    "momentum": (
        layer(momentum=1.1),
        ValueError,
        ["momentum=1.1", "[0, 1]", "momentum=0.9"],
    ),
    "decay": (lambda: bnjax.running.ema(-0.1), ValueError, ["decay=-0.1", "[0, 1]"]),
    "decay, debiased": (
        lambda: bnjax.running.debiased_ema(2),
        ValueError,
        ["decay=2", "[0, 1]"],
    ),
    "integer dtype": (
        batch_norm(dtype=jnp.int32),
        ValueError,
        ["dtype=int32", "floating or complex", "dtype=None"],
    ),
    "float8 input": (
        lambda: bnjax.batch_norm(X.astype(jnp.float8_e4m3fn)),
        TypeError,
        ["x has dtype float8_e4m3fn", "16 bits", "x.astype(jnp.bfloat16)"],
    ),
    "float8 input, layer": (
        layer(x=X.astype(jnp.float8_e5m2)),
        TypeError,
        ["x has dtype float8_e5m2"],
    ),
    "float4 input, moments": (
        lambda: bnjax.moments(X.astype(jnp.float4_e2m1fn)),
        TypeError,
        ["x has dtype float4_e2m1fn"],
    ),
    "float8 scale": (
        batch_norm(scale=V3.astype(jnp.float8_e4m3fn)),
        TypeError,
        ["scale has dtype float8_e4m3fn", "scale.astype(jnp.bfloat16)"],
    ),
    "float8 residual": (
        batch_norm(residual=X.astype(jnp.float8_e4m3fn)),
        TypeError,
        ["residual has dtype float8_e4m3fn"],
    ),
    "float8 output": (
        batch_norm(dtype=jnp.float8_e4m3fn),
        TypeError,
        ["dtype=float8_e4m3fn", "16 bits", "dtype=jnp.bfloat16"],
    ),
    "no features to whiten": (
        lambda: bnjax.whiten.decorrelate(X[..., :0]),
        ValueError,
        ["the input has shape (6, 4, 0), with 0 features (axis=-1)", "at least one"],
    ),
    "no features to whiten, layer": (
        lambda: bnjax.linen.DecorrelatedBatchNorm(False).init(
            jax.random.key(0), X[..., :0]
        ),
        ValueError,
        ["with 0 features"],
    ),
    "no features to whiten, in groups": (
        lambda: bnjax.nnx.DecorrelatedBatchNorm(0, group_size=4, rngs=nnx.Rngs(0))(
            X[..., :0]
        ),
        ValueError,
        ["with 0 features"],
    ),
    "merge of arrays": (
        lambda: bnjax.merge(V3, V3),
        TypeError,
        ["argument 1 of merge is a value of type ndarray", "expected Moments", "count"],
    ),
    "merge of a tuple": (
        lambda: bnjax.merge(M3, tuple(M3)),
        TypeError,
        ["argument 2 of merge is a value of type tuple", "expected Moments"],
    ),
    "merge of a list": (
        lambda: bnjax.merge([M3, M3]),
        TypeError,
        ["argument 1 of merge is a value of type list", "merge(*each)"],
    ),
    "merge of nothing": (
        lambda: bnjax.merge(M3, None),
        TypeError,
        ["argument 2 of merge is None"],
    ),
    "merge of the class": (
        lambda: bnjax.merge(bnjax.Moments),
        TypeError,
        ["argument 1 of merge is the class Moments"],
    ),
    "merge of Moments and CoMoments": (
        lambda: bnjax.merge(M3, CO3),
        TypeError,
        ["a value of type CoMoments", "expected Moments"],
    ),
    "merge of CoMoments and Moments": (
        lambda: bnjax.whiten.merge(CO3, M3),
        TypeError,
        ["a value of type Moments", "expected CoMoments"],
    ),
    "merge of other features": (
        lambda: bnjax.merge(M3, M3, bnjax.Moments(2.0, V4, V4)),
        ValueError,
        ["argument 3 of merge has mean of shape (4,), the first of (3,)", "Reduce"],
    ),
    "merge of one feature with three": (
        lambda: bnjax.merge(M3, bnjax.Moments(2.0, V3[:1], V3[:1])),
        ValueError,
        ["argument 2 of merge has mean of shape (1,)", "jnp.broadcast_to"],
    ),
    "merge of other variances": (
        lambda: bnjax.merge(M3, M3._replace(m2=1.0)),
        ValueError,
        ["argument 2 of merge has m2 of shape (), the first of (3,)"],
    ),
    "merge of other groups": (
        lambda: bnjax.whiten.merge(CO3, bnjax.whiten.CoMoments.empty(3, 1)),
        ValueError,
        ["argument 2 of merge has m2 of shape (3, 1, 1), the first of (1, 3, 3)"],
    ),
    "shift of moments": (
        lambda: bnjax.moments(X, shift=V4),
        ValueError,
        ["shift has shape (4,): expected (3,)", "axis="],
    ),
    "shift of co_moments": (
        lambda: bnjax.whiten.co_moments(X, shift=V4),
        ValueError,
        ["shift has shape (4,): expected (3,)", "axis="],
    ),
    "shift of co_moments of another rank": (
        lambda: bnjax.whiten.co_moments(X, axis=1, shift=V3[None]),
        ValueError,
        ["shift has shape (1, 3): expected (", "axis=1"],
    ),
    "complex shift of co_moments": (
        lambda: bnjax.whiten.co_moments(X, shift=V3 + 1j),
        TypeError,
        ["shift has dtype complex64", "Write shift.real"],
    ),
    "implementation": (
        batch_norm(implementation="cudnn"),
        ValueError,
        ["implementation='cudnn' is unknown", "'xla'", "implementation=None"],
    ),
    "unbound axis_name": (
        batch_norm(axis_name="batch"),
        ValueError,
        ["axis_name='batch' is not bound", "jax.shard_map", "axis_name=None"],
    ),
    "one of two axis names unbound": (
        in_vmap(axis_name=("i", "batch")),
        NameError,
        ["axis_name=('i', 'batch') is not bound"],
    ),
    "unbound axis_name, layer": (
        layer(axis_name="batch"),
        NameError,
        ["axis_name='batch' is not bound"],
    ),
    "axis_name repeated": (
        in_vmap(axis_name=("i", "i")),
        ValueError,
        ["axis_name=('i', 'i') names 'i' twice", "once", "axis_name='i'"],
    ),
    "axis_name repeated in shard_map": (
        in_shard_map(axis_name=("i", "i")),
        ValueError,
        ["names 'i' twice"],
    ),
    "axis_name repeated, list": (
        in_vmap(axis_name=["i", "i"]),
        ValueError,
        ["axis_name=['i', 'i'] names 'i' twice"],
    ),
    "axis_name repeated, among others": (
        in_vmap(axis_name=("i", "j", "i"), names="ij"),
        ValueError,
        ["names 'i' twice", "axis_name=('i', 'j')"],
    ),
    "axis_name repeated, with groups": (
        in_vmap(axis_name=("i", "i"), axis_index_groups=[[0, 1], [2, 3]]),
        ValueError,
        ["names 'i' twice"],
    ),
    "axis_name repeated, layer": (
        in_vmap(axis_name=("i", "i"), op=layer_in_vmap),
        ValueError,
        ["names 'i' twice"],
    ),
    "axis_name repeated, co-moments": (
        in_vmap(axis_name=("i", "i"), op=bnjax.whiten.co_moments),
        ValueError,
        ["names 'i' twice"],
    ),
    "axis_name repeated, merge_batch_stats": (
        in_vmap(axis_name=("i", "i"), op=merged_in_vmap),
        ValueError,
        ["names 'i' twice"],
    ),
    "groups without a name": (
        batch_norm(axis_index_groups=[[0, 1]]),
        ValueError,
        ["axis_index_groups=[[0, 1]]", "without axis_name", "ghost batches"],
    ),
    "groups that leave one out": (
        in_vmap(axis_name="i", axis_index_groups=[[0, 1], [2]]),
        ValueError,
        ["[[0, 1], [2]] does not partition the 4 replicas", "axis_name='i'", "0 to 3"],
    ),
    "groups that overlap": (
        in_vmap(axis_name="i", axis_index_groups=[[0, 1, 2], [2, 3]]),
        ValueError,
        ["does not partition"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_message(name):
    call, error, fragments = CASES[name]
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message, message
    assert not set("{}") & set(message), "a stray brace"
    assert message[-1] in ".)", message


def test_the_layer_raises_before_it_writes():
    """A bad argument leaves the variables as they were."""
    norm = bnjax.BatchNorm(use_running_average=False)
    variables = norm.init(jax.random.key(0), X)
    before = jax.tree.map(np.array, variables)
    with pytest.raises(ValueError, match="mask has shape"):
        norm.apply(variables, X, mask=np.ones(6, bool), mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, variables, before)


@pytest.mark.parametrize("value", [1e-5, np.float64(1e-5), jnp.float32(1e-5), V3, 0, 2])
def test_epsilon_that_is_taken(value):
    """Numbers of any kind, and one for each feature."""
    x = np.random.default_rng(0).normal(size=(6, 4, 3)).astype(np.float32)
    y, _ = bnjax.batch_norm(x, epsilon=value)
    expected = oracle.batch_norm(x, V3, 0 * V3, (0, 1), epsilon=np.asarray(value))
    assert_close(y, expected, tol=2e-6)


# ---- masks of lower rank ----


@pytest.mark.parametrize(
    ("shape", "kept", "cure"),
    [
        ((6, 4), (0, 1), "mask[..., None]"),
        ((6,), (0,), "mask[..., None, None]"),
        ((4,), (1,), "mask[None, :, None]"),
        ((6, 3), (0, 2), "mask[:, None]"),
    ],
)
def test_the_cure_for_a_mask_that_does_not_broadcast(shape, kept, cure):
    """It is told by the sizes, and gives the statistics that are meant."""
    rng = np.random.default_rng(0)
    x, mask = rng.normal(size=(6, 4, 3)).astype(np.float32), rng.random(shape) < 0.6
    with pytest.raises(ValueError, match="does not broadcast") as caught:
        bnjax.moments(x, mask=mask)
    assert f"write {cure}." in str(caught.value)
    assert f"axis {str(kept)[1:-1].rstrip(',')} of" in str(caught.value)
    named = "".join("btc"[a] for a in kept)
    full = np.einsum(f"{named},btc->btc", mask, np.ones_like(x)) > 0
    count, mean, m2 = oracle.moments(x, (0, 1), full)
    found = bnjax.moments(x, mask=eval(cure, {"mask": mask}))
    np.testing.assert_array_equal(np.broadcast_to(found.count, 3), count)
    assert_close(found.mean, mean)
    assert_close(found.m2, m2)


# Of an input and its mask: how to write the one meaning and the other.
AMBIGUOUS = {
    "time and feature of one size": ((4, 4, 4), (4, 4), ("[None]", "[..., None]")),
    "as many examples as features": ((3, 3), (3,), ("[None]", "[..., None]")),
    "of an image": (
        (4, 6, 6, 4),
        (4,),
        ("[None, None, None]", "[..., None, None, None]"),
    ),
    "with a size of 1": ((5, 5, 4), (5, 1), ("[None]", "[..., None]")),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_a_mask_that_fits_both_ends(name):
    """Read as NumPy reads it, with a warning; either way of writing it is silent."""
    shape, small, (last, first) = AMBIGUOUS[name]
    rng = np.random.default_rng(0)
    x, mask = rng.normal(size=shape).astype(np.float32), rng.random(small) < 0.7
    with pytest.warns(bnjax.BatchNormWarning, match="as well as the last") as caught:
        warned = bnjax.moments(x, mask=mask)
    (warning,) = caught
    assert f"Write mask{last} if that is meant, or mask{first} for" in str(
        warning.message
    )
    assert warning.filename == __file__
    axes = tuple(range(len(shape) - 1))
    for index, found in ((last, warned), (last, None), (first, None)):
        rewritten = eval("mask" + index, {"mask": mask})
        if found is None:
            found = bnjax.moments(x, mask=rewritten)
        full = np.broadcast_to(rewritten, shape)
        count, mean, m2 = oracle.moments(x, axes, full)
        np.testing.assert_array_equal(np.broadcast_to(found.count, shape[-1:]), count)
        assert_close(found.mean, mean)
        assert_close(found.m2, m2, tol=2e-6)


@pytest.mark.parametrize("small", [(), (1,), (1, 1), (3,), (4, 3), (4, 1)])
def test_a_mask_that_fits_one_end_is_taken_in_silence(small):
    bnjax.moments(X, mask=np.ones(small, bool))
    bnjax.moments(X, mask=np.ones(small, int))

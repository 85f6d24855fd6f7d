"""Every message, rendered: what was received, what was expected, what to write."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax

X = np.ones((6, 4, 3), np.float32)
V3, V4 = np.ones(3, np.float32), np.ones(4, np.float32)


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
    "integers, layer": (layer(x=X.astype(int)), TypeError, ["x has dtype int32"]),
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
        ["mask has shape (6,)", "input's shape (6, 4, 3)", "mask[:, None]"],
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
    "NumPy epsilon": (batch_norm(epsilon=np.float32(-1)), ValueError, ["epsilon="]),
    "NumPy momentum": (
        layer(momentum=np.float32(1.5)),
        ValueError,
        ["momentum="],
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

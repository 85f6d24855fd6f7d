"""Folding: the pure functions against float64, whole models against themselves."""

import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from helpers import assert_close, assert_trees_close, covering
from jax import export, lax

import bnjax
from bnjax.fold import affine, fold_conv, fold_conv_transpose, fold_dense, fold_model
from experiments import serve

REPOSITORY = Path(__file__).parents[1]
X = (2, 7, 6, 4)  # batch, height, width, features


def draw(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(0.3, 1.0, shape), dtype)


def statistics(features, dtype=jnp.float32):
    """mean, var, scale and bias, none of which is trivial."""
    mean, scale, bias = (draw(s, features, dtype=dtype) for s in (1, 2, 3))
    return mean, jnp.exp(draw(4, features, dtype=dtype)), scale, bias


def plain(bias):
    return 0 if bias is None else np.asarray(bias)


def randomized(variables):
    """The same tree with values as after some training."""
    leaves, tree = jax.tree.flatten_with_path(variables)
    new = []
    for i, (path, old) in enumerate(leaves):
        value = draw(i + 10, *old.shape)
        value = jnp.exp(value) if "var" in jax.tree_util.keystr(path) else value
        new.append(value.astype(old.dtype))
    return jax.tree.unflatten(tree, new)


# The pure functions.


def test_affine():
    given = statistics(5)
    x = draw(0, 3, 5)
    multiplier, offset = affine(*given, epsilon=1e-3)
    expected = oracle.normalize(x, *given, (0,), 1e-3)
    assert_close(x * multiplier[None] + offset[None], expected)


def test_affine_without_scale_and_bias():
    mean, var, _, _ = statistics(5)
    multiplier, offset = affine(mean, var)
    expected = oracle.normalize(np.zeros((1, 5)), mean, var, np.ones(5), np.zeros(5), 0)
    assert_close(offset, expected[0])
    assert_close(multiplier, 1 / np.sqrt(np.float64(var) + 1e-5))


@pytest.mark.usefixtures("x64")
def test_affine_dtypes():
    narrow = statistics(5, jnp.bfloat16)
    assert [v.dtype for v in affine(*narrow)] == [jnp.float32] * 2
    assert_trees_close(
        affine(*narrow), affine(*(v.astype(jnp.float32) for v in narrow))
    )
    assert [v.dtype for v in affine(*statistics(5, jnp.float64))] == [jnp.float64] * 2


def conv(x, kernel, strides=1, dilation=1, groups=1):
    n = x.ndim - 2
    layout = "DHW"[3 - n :]
    return lax.conv_general_dilated(
        x,
        kernel,
        (strides,) * n,
        "SAME",
        rhs_dilation=(dilation,) * n,
        dimension_numbers=(f"N{layout}C", f"{layout}IO", f"N{layout}C"),
        feature_group_count=groups,
    )


@pytest.mark.parametrize(
    ("spatial", "options"),
    [
        ((9,), {}),
        ((7, 6), {}),
        ((7, 6), {"strides": 2}),
        ((7, 6), {"dilation": 2}),
        ((7, 6), {"groups": 2}),
        ((7, 6), {"groups": 4}),
        ((5, 4, 3), {"strides": 2, "groups": 2}),
    ],
    ids=str,
)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.usefixtures("x64")
def test_fold_conv(spatial, options, with_bias):
    wide = functools.partial(draw, dtype=jnp.float64)
    x = wide(0, 2, *spatial, 4)
    kernel = wide(5, *(3, 2, 2)[: len(spatial)], 4 // options.get("groups", 1), 8)
    bias = wide(6, 8) if with_bias else None
    given = statistics(8, jnp.float64)
    y = np.asarray(conv(x, kernel, **options)) + plain(bias)
    expected = oracle.normalize(y, *given, tuple(range(x.ndim - 1)))
    folded, offset = fold_conv(kernel, bias, *given)
    actual = np.asarray(conv(x, folded, **options)) + np.asarray(offset)
    assert_close(actual, expected, dtype=jnp.float64)


@pytest.mark.parametrize("spatial", [(9,), (7, 6), (5, 4, 3)], ids=len)
@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.usefixtures("x64")
def test_fold_conv_transpose(spatial, transpose_kernel, with_bias):
    wide = functools.partial(draw, dtype=jnp.float64)
    x = wide(0, 2, *spatial, 4)
    last = (8, 4) if transpose_kernel else (4, 8)
    kernel = wide(5, *(3, 2, 2)[: len(spatial)], *last)
    bias = wide(6, 8) if with_bias else None
    given = statistics(8, jnp.float64)

    def run(kernel):
        strides = (2,) * len(spatial)
        return np.asarray(
            lax.conv_transpose(
                x, kernel, strides, "SAME", transpose_kernel=transpose_kernel
            )
        )

    y = run(kernel) + plain(bias)
    expected = oracle.normalize(y, *given, tuple(range(x.ndim - 1)))
    folded, offset = fold_conv_transpose(
        kernel, bias, *given, transpose_kernel=transpose_kernel
    )
    assert_close(run(folded) + np.asarray(offset), expected, dtype=jnp.float64)


@pytest.mark.parametrize("with_bias", [False, True])
def test_fold_dense(with_bias):
    x, kernel = draw(0, 5, 4), draw(5, 4, 8)
    bias = draw(6, 8) if with_bias else None
    given = statistics(8)
    y = oracle.wide(x) @ oracle.wide(kernel) + plain(bias)
    folded, offset = fold_dense(kernel, bias, *given, epsilon=0.1)
    actual = oracle.wide(x) @ oracle.wide(folded) + oracle.wide(offset)
    expected = oracle.normalize(y, *given, (0,), 0.1)
    assert_close(jnp.asarray(actual, jnp.float32), expected)


def test_bfloat16_is_folded_in_float32():
    """The result is the float32 one, rounded once."""
    kernel, bias = draw(5, 3, 3, 4, 8, dtype=jnp.bfloat16), draw(6, 8)
    bias, given = bias.astype(jnp.bfloat16), statistics(8, jnp.bfloat16)
    actual = fold_conv(kernel, bias, *given)
    wide = [v.astype(jnp.float32) for v in (kernel, bias, *given)]
    expected = [v.astype(jnp.bfloat16) for v in fold_conv(*wide)]
    assert [v.dtype for v in actual] == [jnp.bfloat16] * 2
    for a, e in zip(actual, expected):
        assert (a == e).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: affine(jnp.ones(3), jnp.ones(2)), "var has shape (2,): expected (3,)"),
        (lambda: affine(jnp.ones(3), jnp.ones(3), jnp.ones(2)), "scale has shape (2,)"),
        (lambda: affine(jnp.ones(3), jnp.ones(3), epsilon=-1.0), "epsilon=-1.0"),
        (lambda: fold_conv(jnp.ones((3, 4)), None, *statistics(4)), "Write fold_dense"),
        (lambda: fold_dense(jnp.ones((3, 2, 4)), None, *statistics(4)), "fold_conv "),
        (
            lambda: fold_conv_transpose(jnp.ones((3, 4)), None, *statistics(4)),
            "(*window, in, out)",
        ),
        (
            lambda: fold_conv(jnp.ones((3, 2, 5)), None, *statistics(4)),
            "mean has shape (4,): expected (5,)",
        ),
        (
            lambda: fold_dense(jnp.ones((2, 4)), jnp.ones(3), *statistics(4)),
            "bias has shape (3,): expected (4,)",
        ),
    ],
)
def test_errors_of_the_pure_functions(call, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        call()


def test_integer_kernels():
    with pytest.raises(TypeError, match="kernel has dtype int32"):
        fold_dense(jnp.ones((2, 4), int), None, *statistics(4))


# Whole models.


class Net(nn.Module):
    """`body(net, x)` as a compact module."""

    body: Callable

    @nn.compact
    def __call__(self, x):
        return self.body(self, x)


def norm(**options):
    return bnjax.BatchNorm(True, **options)


def flax_norm(**options):
    return nn.BatchNorm(True, **options)


def fold(body, shape=X, dtype=jnp.float32, tol=1e-5):
    """What `fold_model` makes of Net(body), checked against it; and its program."""
    x, net = draw(0, *shape, dtype=dtype), Net(body)
    variables = randomized(jax.eval_shape(net.init, jax.random.key(0), x))
    before = jax.tree.map(np.array, variables)
    folded = fold_model(net, variables, x)
    assert_trees_close(variables, before, tol=0)
    expected = net.apply(variables, x)
    actual = jax.jit(folded.apply)(folded.params, x)
    assert_close(
        actual, np.asarray(expected, np.float64), tol=tol, dtype=expected.dtype
    )
    return folded, str(jax.make_jaxpr(folded.apply)(folded.params, x))


@pytest.mark.parametrize("norm", [norm, flax_norm])
@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv(8, (3, 3), name="linear"),
        lambda: nn.Conv(8, (3, 3), 2, use_bias=False, name="linear"),
        lambda: nn.Conv(8, (3, 3), feature_group_count=4, name="linear"),
        lambda: nn.Conv(
            8, (2, 3), kernel_dilation=2, padding="CIRCULAR", name="linear"
        ),
        lambda: nn.ConvTranspose(8, (3, 3), (2, 2), use_bias=False, name="linear"),
        lambda: nn.ConvTranspose(8, (3, 3), transpose_kernel=True, name="linear"),
        lambda: nn.Dense(8, use_bias=False, name="linear"),
    ],
)
def test_linear_then_norm(layer, norm):
    folded, text = fold(lambda _, x: nn.relu(norm(name="norm")(layer()(x))))
    assert (folded.folded, folded.kept) == ((("linear", "norm"),), ())
    assert folded.params.keys() == {"linear"}
    assert folded.params["linear"].keys() == {"kernel", "bias"}
    assert "rsqrt" not in text
    assert " sub " not in text


def test_three_layers_and_other_ranks():
    def body(_, x):
        for i in range(3):
            x = nn.Conv(5 + i, (3,), name=f"conv{i}")(x)
            x = nn.relu(norm(name=f"norm{i}")(x))
        x = norm(name="norm3")(nn.Dense(9, name="dense")(x.mean(1)))
        return nn.Dense(2)(x)

    folded, text = fold(body, (3, 8, 4))
    pairs = [(f"conv{i}", f"norm{i}") for i in range(3)]
    assert folded.folded == (*pairs, ("dense", "norm3"))
    assert folded.kept == ()
    assert "rsqrt" not in text


@pytest.mark.parametrize("options", [{"use_scale": False}, {"use_bias": False}])
@pytest.mark.parametrize("norm", [norm, flax_norm])
def test_without_scale_or_bias(norm, options):
    def body(_, x):
        x = norm(**options)(x)
        return norm(**options, epsilon=0.1)(nn.Conv(8, (3, 3))(x))

    folded, _ = fold(body)
    assert folded.folded == (("Conv_0", "BatchNorm_1"),)
    assert len(folded.kept) == 1


def reason(body, shape=X):
    """Why the layer "norm" is kept; the others are folded or kept as they may."""
    folded, text = fold(body, shape)
    assert "rsqrt" not in text
    assert "norm" not in dict(folded.folded).values()
    assert folded.params["norm"].keys() == {"mean", "multiplier", "bias"}
    return dict(folded.kept)["norm"]


def test_norm_first():
    why = reason(lambda _, x: nn.Conv(8, (3, 3))(norm(name="norm")(x)))
    assert why.startswith("its input comes from an input of the model, not straight")


def test_norm_after_activation():
    why = reason(lambda _, x: norm(name="norm")(nn.relu(nn.Conv(8, (3, 3))(x))))
    assert why.startswith("its input comes from `max`, not straight from a Conv")


def test_norm_after_cast_and_reshape():
    def cast(_, x):
        y = nn.Conv(8, (3, 3), dtype=jnp.float16)(x)
        return norm(name="norm")(y.astype(jnp.float32))

    assert "`convert_element_type`" in reason(cast)

    def flat(_, x):
        return norm(name="norm")(nn.Conv(8, (3, 3))(x).reshape(2, -1))

    assert "`reshape`" in reason(flat)


def test_output_also_read_by_a_skip():
    def body(_, x):
        y = nn.Conv(8, (3, 3), name="conv")(x)
        return norm(name="norm")(y) + nn.relu(y)

    expected = "the output of Conv 'conv', before it, is also read by `max`"
    assert reason(body) == expected


def test_output_also_returned_or_a_residual():
    def residual(_, x):
        y = nn.Conv(8, (3, 3), name="conv")(x)
        return norm(name="norm")(y, residual=y)

    assert "is also read by" in reason(residual)

    def returned(_, x):
        y = nn.Conv(8, (3, 3), name="conv")(x)
        return norm(name="norm")(y), y

    net, x = Net(returned), draw(0, *X)
    variables = randomized(net.init(jax.random.key(0), x))
    folded = fold_model(net, variables, x)
    assert folded.kept[0][1].endswith("is also read by the caller")
    actual = folded.apply(folded.params, x)
    assert_trees_close(actual, net.apply(variables, x), tol=1e-5)


def test_output_read_by_two_norms():
    def body(_, x):
        y = nn.Conv(8, (3, 3), name="conv")(x)
        return norm(name="norm")(y) * norm(name="other")(y)

    assert reason(body).endswith("is also read by BatchNorm 'other'")


def test_norm_called_twice():
    def body(_, x):
        layer = norm(name="norm")
        return layer(nn.relu(layer(nn.Conv(4, (3, 3))(x))))

    assert reason(body) == "it is called 2 times"


def test_conv_called_twice():
    def body(_, x):
        conv = nn.Conv(4, (3, 3), name="conv")
        return norm(name="norm")(conv(nn.relu(conv(x))))

    assert reason(body) == "Conv 'conv', before it, is called 2 times"


def test_kernel_also_read_elsewhere():
    def body(net, x):
        y = norm(name="norm")(nn.Dense(8, name="dense")(x))
        kernel = net.variables["params"]["dense"]["kernel"]
        return nn.relu(y) @ kernel.T

    assert "kernel of Dense 'dense', before it, is also read" in reason(body, (3, 5))


def test_other_feature_axis():
    """Here one of the same size."""

    def body(_, x):
        return norm(name="norm", axis=1)(nn.Conv(7, (3, 3))(x))

    assert reason(body) == "its feature axis is 1, not the last"

    def several(_, x):
        return norm(name="norm", axis=(1, -1))(nn.Conv(7, (3, 3))(x))

    assert reason(several) == "its feature axis is (1, -1), not the last"


def test_own_dot_general():
    def own(*args, **kwargs):
        return 2 * lax.dot_general(*args, **kwargs)

    def body(_, x):
        return norm(name="norm")(nn.Dense(8, dot_general=own)(x))

    assert reason(body).endswith("has a dot_general of its own")


def test_local_kernels():
    def body(_, x):
        return norm(name="norm")(nn.ConvLocal(8, (3, 3))(x))

    assert reason(body).endswith("has a kernel for each position")


def test_kept_affine_does_not_cancel():
    """At |mean| / sqrt(var) = 1e4, x * multiplier + offset would be off by 1e-3."""
    net = Net(lambda _, x: norm()(x))
    x = 1e4 + draw(0, 50, 4)
    stats = {"mean": x.mean(0), "var": x.var(0)}
    variables = {
        "params": {"BatchNorm_0": {"scale": jnp.ones(4), "bias": draw(1, 4)}},
        "batch_stats": {"BatchNorm_0": stats},
    }
    folded = fold_model(net, variables, x)
    assert_close(folded.apply(folded.params, x), net.apply(variables, x), tol=1e-6)


def test_residual_and_activation_of_our_layers():
    def body(_, x):
        y = norm(activation=nn.relu, name="norm0")(nn.Conv(4, (3, 3), name="conv0")(x))
        y = nn.Conv(4, (3, 3), name="conv1")(y)
        y = norm(activation=nn.tanh, name="norm1")(y, residual=x)
        return norm(activation=nn.sigmoid, name="norm2")(y, residual=-x)

    folded, text = fold(body)
    assert folded.folded == (("conv0", "norm0"), ("conv1", "norm1"))
    assert [path for path, _ in folded.kept] == ["norm2"]
    assert "rsqrt" not in text
    assert "tanh" in text


@pytest.mark.parametrize("norm", [norm, flax_norm])
def test_half_precision(norm):
    def body(_, x):
        x = nn.Conv(8, (3, 3), dtype=jnp.bfloat16)(x)
        x = nn.relu(norm(dtype=jnp.bfloat16)(x))
        x = nn.Conv(8, (3, 3), dtype=jnp.bfloat16)(x)
        return norm()(x)  # float32, as its parameters

    assert len(fold(body, tol=2e-2)[0].folded) == 2


@pytest.mark.parametrize("norm", [norm, flax_norm])
def test_bfloat16_parameters(norm):
    half = {"param_dtype": jnp.bfloat16}

    def body(_, x):
        x = norm(**half)(nn.Conv(8, (3, 3), use_bias=False, **half)(x))
        return norm(**half)(nn.relu(x))

    folded, _ = fold(body, dtype=jnp.bfloat16, tol=2e-2)
    assert folded.params["Conv_0"]["bias"].dtype == jnp.bfloat16
    assert len(folded.kept) == 1


def test_apply_refuses_another_dtype():
    net, x = Net(lambda _, x: norm(name="norm")(x)), draw(0, 3, 4)
    folded = fold_model(net, net.init(jax.random.key(0), x), x)
    with pytest.raises(ValueError, match="'norm' received bfloat16: expected float32"):
        folded.apply(folded.params, x.astype(jnp.bfloat16))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = nn.Conv(4, (3, 3), use_bias=False, name="conv")(x)
        return norm(activation=nn.relu, name="norm")(x)


class Carry(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return Block(name="block")(x), None


@pytest.mark.parametrize("lift", [nn.remat, nn.jit])
def test_under_remat_and_jit(lift):
    def body(_, x):
        return lift(Block)(name="b")(lift(Block)(name="a")(x))

    folded, text = fold(body)
    expected = (("a/conv", "a/norm"), ("b/conv", "b/norm"))
    if lift is nn.remat:
        assert folded.folded == expected
        assert "rsqrt" not in text
    else:  # the second block may share the first one's trace
        assert {*dict(folded.folded).values(), *dict(folded.kept)} == {
            norm for _, norm in expected
        }


def test_conv_and_norm_in_different_remats():
    def body(_, x):
        y = nn.remat(nn.Conv)(4, (3, 3), name="conv")(x)
        return nn.remat(bnjax.BatchNorm)(True, name="norm")(y)

    assert fold(body)[0].folded == (("conv", "norm"),)


def test_under_scan_and_vmap():
    split = {"params": True}
    axes = {"params": 0, "batch_stats": 0}

    def body(_, x):
        y, _ = nn.scan(Carry, axes, split_rngs=split, length=3)(name="scan")(x, None)
        return y + nn.vmap(Block, axes, split_rngs=split, axis_size=2)(name="vmap")(x)

    folded, _ = fold(body)
    assert folded.folded == ()
    assert [path for path, _ in folded.kept] == ["scan/block/norm", "vmap/norm"]
    for _, why in folded.kept:
        assert why.startswith("its mean does not reach it as it is stored")


def test_under_vmap_that_shares_its_variables():
    def body(_, x):
        shared = {"params": None, "batch_stats": None}
        return nn.vmap(Block, shared, split_rngs={"params": False})(name="block")(x)

    assert fold(body, (3, *X))[0].folded == (("block/conv", "block/norm"),)


def test_mapped_kernels():
    """The kernel of the call is not the one that is stored."""

    def body(_, x):
        return norm(name="norm")(nn.WeightNorm(nn.Dense(8, name="dense"))(x))

    ((_, why),) = fold(body)[0].kept
    assert "kernel does not reach it as it is stored" in why


def test_branches():
    def body(net, x):
        block = Block(name="block")
        if net.is_initializing():
            return block(x)
        return nn.cond(x.sum() > 0, lambda m, x: m(x), lambda m, x: x, block, x)

    ((path, why),) = fold(body)[0].kept
    assert path == "block/norm"
    assert "a branch" in why


class BatchNorm(nn.Module):
    """Has the variables of Flax's layer, and divides by the variance."""

    use_running_average: bool = True
    axis: int = -1
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x):
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape).value
        var = self.variable("batch_stats", "var", jnp.ones, shape).value
        mean, var = (lax.expand_dims(v, range(x.ndim - 1)) for v in (mean, var))
        return (x - mean) / (var + self.epsilon)


def test_layer_of_the_same_name():
    folded, _ = fold(lambda _, x: BatchNorm(name="norm")(nn.Conv(8, (3, 3))(x)))
    ((path, why),) = folded.kept
    assert path == "norm"
    assert "not one that fold_model knows" in why


def test_layers_of_other_classes():
    """A subclass with a call of its own is left alone, and listed."""

    class Doubling(nn.BatchNorm):
        @nn.compact
        def __call__(self, x):
            return 2 * super().__call__(x)

    class Other(nn.Module):
        @nn.compact
        def __call__(self, x):
            mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
            return x - lax.expand_dims(mean.value, range(x.ndim - 1))

    def body(_, x):
        x = Doubling(True, name="doubling")(nn.Conv(8, (3, 3), name="conv")(x))
        return Other(name="other")(x)

    folded, _ = fold(body)
    assert folded.folded == (("conv", "doubling"),)
    assert [path for path, _ in folded.kept] == ["other"]
    assert "not one that fold_model knows" in folded.kept[0][1]


def test_settings_are_remembered_and_arrays_are_inputs():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train, *, shift=None, power=1):
            x = nn.Conv(8, (3, 3), name="conv")(x)
            x = nn.BatchNorm(not train, name="norm")(x)
            return x**power if shift is None else x**power + shift

    x, shift = draw(0, *X), jnp.float32(3.0)
    variables = randomized(Model().init(jax.random.key(0), x, False))
    example = jax.ShapeDtypeStruct(x.shape, x.dtype)
    folded = fold_model(Model(), variables, example, train=False, power=3, shift=shift)
    expected = Model().apply(variables, x, False, power=3)
    assert_close(folded.apply(folded.params, x), expected, tol=1e-5)
    actual = folded.apply(folded.params, x, shift=jnp.float32(7.0))
    assert_close(actual, expected + 7, tol=1e-5)


@pytest.mark.parametrize("norm", [nn.BatchNorm, bnjax.BatchNorm])
def test_batch_statistics_are_refused(norm):
    net = Net(lambda _, x: norm(False, name="norm")(nn.Conv(8, (3, 3))(x)))
    variables = net.init(jax.random.key(0), draw(0, *X))
    with pytest.raises(ValueError, match="'norm' normalizes by the batch") as caught:
        fold_model(net, variables, draw(0, *X))
    assert "train=False" in str(caught.value)


def test_updates_are_refused():
    net = Net(lambda _, x: norm(update_stats=True, name="norm")(x))
    variables = net.init(jax.random.key(0), draw(0, *X))
    with pytest.raises(ValueError, match="'norm' updates its statistics"):
        fold_model(net, variables, draw(0, *X), mutable=["batch_stats"])


def test_readers_of_the_statistics_are_refused():
    def body(net, x):
        y = norm(name="norm")(x)
        return y + net.variables["batch_stats"]["norm"]["mean"][None]

    net, x = Net(body), draw(0, 3, 4)
    with pytest.raises(ValueError, match="the folded model does not run"):
        fold_model(net, net.init(jax.random.key(0), x), x)


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="received a function: expected a flax"):
        fold_model(lambda x: x, draw(0, 3))
    with pytest.raises(TypeError, match="received a Linen module alone"):
        fold_model(Net(lambda _, x: x))


# Serving.


@pytest.mark.full
def test_serving_in_a_fresh_process(tmp_path):
    """The example exports for three platforms, and compares what is served."""
    command = [sys.executable, "-m", "experiments.serve", "--smoke"]
    command += ["--out", tmp_path, "--file", tmp_path / "model.bin"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 of 6 batch normalizations folded" in done.stdout
    assert "for cpu, cuda, tpu and any batch size" in done.stdout
    records = [
        json.loads(line) for line in (tmp_path / "serve.jsonl").read_text().splitlines()
    ]
    assert records[1]["error"] < 1e-5
    assert [r["batch_size"] for r in records[2:]] == [1, 3]
    served = export.deserialize(bytearray((tmp_path / "model.bin").read_bytes()))
    assert served.platforms == ("cpu", "cuda", "tpu")
    assert str(served.in_avals[0].shape) == "(batch, 16, 16, 3)"
    assert "rsqrt" not in served.mlir_module()


def test_serving_without_flatbuffers(monkeypatch, capsys):
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    assert serve.main(serve.Config()) == 1
    assert "pip install 'bnjax[experiments]'" in capsys.readouterr().out


# NNX.


VALUES = nnx.Any(nnx.Param, nnx.BatchStat)


class Model(nnx.Module):
    """conv, norm, relu, dense, norm; then a norm that nothing can take in."""

    def __init__(self, rngs, *, use_bias=True, norm=nnx.BatchNorm, **options):
        self.layers = nnx.List(
            [
                nnx.Conv(4, 8, (3, 3), use_bias=use_bias, rngs=rngs, **options),
                norm(8, rngs=rngs),
            ]
        )
        self.up = nnx.ConvTranspose(8, 6, (3, 3), 2, use_bias=use_bias, rngs=rngs)
        self.norm1 = norm(6, use_scale=False, epsilon=0.1, rngs=rngs)
        self.dense = nnx.Linear(6, 5, use_bias=use_bias, rngs=rngs)
        self.norm2 = norm(5, use_bias=False, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = norm(5, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        x = nnx.relu(self.norm1(self.up(nnx.relu(x))))
        x = nnx.relu(self.norm2(self.dense(x)))
        return self.last(self.dropout(x))


def trained(model):
    """`model` with values as after some training, in evaluation mode."""
    nnx.update(model, randomized(nnx.state(model, VALUES)))
    model.eval()
    return model


def fold_nnx(model, shape=X, tol=1e-5):
    x = draw(0, *shape)
    before = nnx.to_flat_state(nnx.state(nnx.clone(model), VALUES))
    expected = model(x)
    folded = fold_model(model, x)
    after = nnx.to_flat_state(nnx.state(model, VALUES))
    for (path, old), (same, new) in zip(before, after, strict=True):
        assert path == same
        assert (old[...] == new[...]).all()
    assert_close(jax.jit(folded.apply)(folded.params, x), expected, tol=tol)
    return folded, str(jax.make_jaxpr(folded.apply)(folded.params, x))


@pytest.mark.parametrize("norm", [nnx.BatchNorm, bnjax.nnx.BatchNorm])
@pytest.mark.parametrize("use_bias", [False, True])
def test_nnx(use_bias, norm):
    folded, text = fold_nnx(trained(Model(nnx.Rngs(0), use_bias=use_bias, norm=norm)))
    assert sorted(folded.folded) == [
        ("dense", "norm2"),
        ("layers/0", "layers/1"),
        ("up", "norm1"),
    ]
    ((path, why),) = folded.kept
    assert (path, "`max`" in why) == ("last", True)
    assert folded.params.keys() == {"layers", "up", "dense", "last"}
    assert folded.params["layers"]["0"].keys() == {"kernel", "bias"}
    assert all(type(leaf) is not nnx.Param for leaf in jax.tree.leaves(folded.params))
    assert "rsqrt" not in text


class Shared(nnx.Module):
    """Two of everything, of which something is one."""

    def __init__(self, rngs, what):
        self.a, self.b = (nnx.Linear(4, 4, rngs=rngs) for _ in range(2))
        self.norm_a, self.norm_b = (nnx.BatchNorm(4, rngs=rngs) for _ in range(2))
        if what == "kernel":
            self.b.kernel = self.a.kernel
        elif what == "linear":
            self.b = self.a
        elif what == "norm":
            self.norm_b = self.norm_a
        elif what == "mean":
            self.norm_b.mean = self.norm_a.mean

    def __call__(self, x):
        return self.norm_b(self.b(nnx.relu(self.norm_a(self.a(x)))))


@pytest.mark.parametrize(
    ("what", "reasons"),
    [
        ("kernel", {"also read by `add`", "that of another layer too"}),
        ("linear", {"is called 2 times"}),
        ("norm", {"is called 2 times"}),
        ("mean", {"that of another layer too"}),
        ("nothing", set()),
    ],
)
def test_nnx_sharing(what, reasons):
    folded, _ = fold_nnx(trained(Shared(nnx.Rngs(0), what)), (3, 4))
    found = [why for _, why in folded.kept]
    assert len(folded.folded) == 2 - max(
        len(found), len(reasons) and 1 + (what == "norm")
    )
    for words in reasons:
        assert any(words in why for why in found)


class Counting(nnx.BatchNorm):
    """Inherits the call, but keeps more than the usual."""

    def __init__(self, features, *, rngs):
        super().__init__(features, rngs=rngs)
        self.count = nnx.BatchStat(jnp.zeros(()))


def test_nnx_layer_with_more_variables():
    model = trained(nnx.Sequential(nnx.Linear(4, 5, rngs=(rngs := nnx.Rngs(0)))))
    model.layers.append(Counting(5, rngs=rngs))
    model.eval()
    folded, _ = fold_nnx(model, (3, 4))
    assert folded.folded == ()
    assert [path for path, _ in folded.kept] == ["layers/1"]


def test_nnx_twice():
    """Nothing of the first folding is left for the second to see."""
    model = trained(Model(nnx.Rngs(0)))
    first, _ = fold_nnx(model)
    second, _ = fold_nnx(model)
    assert (first.folded, first.kept) == (second.folded, second.kept)
    assert_trees_close(first.params, second.params, tol=0)


def test_nnx_in_training_is_refused():
    model = trained(Shared(nnx.Rngs(0), "nothing"))
    model.train()
    with pytest.raises(ValueError, match=r"'norm_a' normalizes by the batch.*eval\(\)"):
        fold_model(model, draw(0, 3, 4))


def test_nnx_jit_inside():
    class Outer(nnx.Module):
        def __init__(self, rngs):
            self.inner = Shared(rngs, "nothing")

        def __call__(self, x):
            return nnx.jit(lambda model, x: model(x))(self.inner, x)

    folded, text = fold_nnx(trained(Outer(nnx.Rngs(0))), (3, 4))
    assert len(folded.folded) == 2
    assert "rsqrt" not in text


# A kernel or bias that is transformed before it is used. The functions take and return
# (kernel, bias); they stand for what users write in `promote_dtype` or `param`.


def of_kernel(f):
    return lambda kernel, bias: (f(kernel), bias)


def standardized(kernel):
    """Weight standardization (Qiao et al. 2019)."""
    axes = tuple(range(kernel.ndim - 1))
    mean, var = kernel.mean(axes, keepdims=True), kernel.var(axes, keepdims=True)
    return (kernel - mean) / jnp.sqrt(var + 1e-5)


def unit(kernel):
    """Weight normalization, and a spectral one of no iterations."""
    axes = tuple(range(kernel.ndim - 1))
    return kernel / jnp.sqrt((kernel**2).sum(axes, keepdims=True))


def fake_quantized(kernel):
    """With a straight-through estimator (Jacob et al. 2018)."""
    return kernel + lax.stop_gradient(jnp.round(kernel * 8) / 8 - kernel)


def through(dtype):
    return lambda kernel: (4 * kernel).astype(dtype).astype(kernel.dtype) / 4


def low_rank(kernel):
    """LoRA (Hu et al. 2021), A and B being constants."""
    one = (1,) * (kernel.ndim - 2)
    a, b = draw(8, *one, kernel.shape[-2], 1), draw(9, *one, 1, kernel.shape[-1])
    return kernel + a @ b


def masked(kernel):
    """Magnitude pruning, which a multiplier of another size changes."""
    return jnp.where(jnp.abs(kernel) > 0.5, kernel, 0)


def in_loop(kernel):
    return lax.fori_loop(0, 3, lambda _, k: k / jnp.abs(k).max(), kernel)


NOT_LINEAR = {
    "sign": (of_kernel(jnp.sign), "read by `sign`"),
    "standardized": (of_kernel(standardized), "kernel of"),
    "unit": (of_kernel(unit), "kernel of"),
    "tanh": (of_kernel(jnp.tanh), "read by `tanh`"),
    "fake-quantized": (
        of_kernel(fake_quantized),
        "read by `round`",
    ),
    "int8": (of_kernel(through(jnp.int8)), "read by `convert_element_type`"),
    "float8": (
        of_kernel(through(jnp.float8_e4m3fn)),
        "read by `convert_element_type`",
    ),
    "reduced precision": (
        of_kernel(lambda k: lax.reduce_precision(k, 8, 3)),
        "read by `reduce_precision`",
    ),
    "low rank": (of_kernel(low_rank), "read by `add`"),
    "pruned": (of_kernel(masked), "read by `abs`"),
    "transposed": (
        of_kernel(lambda k: jnp.swapaxes(k, -1, -2)),
        "read by",
    ),
    "reversed": (of_kernel(lambda k: jnp.flip(k, -1)), "read by `rev`"),
    "shuffled": (of_kernel(lambda k: jnp.roll(k, 1, -1)), "read by"),
    "loop": (of_kernel(in_loop), "read by"),
    "not read": (
        of_kernel(lambda k: jnp.full_like(k, 0.5)),
        "does not reach its output",
    ),
    "bias twice": (lambda k, b: (k, 2 * b), "read by `mul`"),
    "bias clipped": (lambda k, b: (k, jnp.clip(b, 0, 1)), "read by"),
    "bias in the kernel": (
        lambda k, b: (k * b.reshape(*(1,) * (k.ndim - 1), -1), b),
        "read by `mul`",
    ),
}
LINEAR = {
    "half": of_kernel(lambda k: 0.5 * k),
    "centred": of_kernel(lambda k: k - k.mean(tuple(range(k.ndim - 1)), keepdims=True)),
    "masked": of_kernel(lambda k: jnp.where(draw(8, *k.shape) > 0, k, 0) / 3),
    "gained": of_kernel(lambda k: -k * draw(8, *k.shape)),
    "halves joined": of_kernel(
        lambda k: jnp.concatenate(jnp.split(k, 2, axis=-2)[::-1], axis=-2)
    ),
    "there and back": lambda k, b: (
        jnp.moveaxis(k.reshape(-1, k.shape[-1]).T.T.reshape(k.shape), -1, 0)
        .T.T[None]
        .squeeze(0)
        .transpose(*range(1, k.ndim), 0),
        b[None].reshape(-1),
    ),
}


def promoting(f):
    """`promote_dtype` of Linen and of NNX, with the function in it."""

    def promote(*arrays, dtype=None):
        x, kernel, bias = arrays if len(arrays) == 3 else arrays[0]
        return x, *f(kernel, bias)

    return promote


def linen_promoting(f, kind):
    layer = functools.partial(nn.Conv, kernel_size=(2,)) if kind == "Conv" else nn.Dense
    make = functools.partial(layer, 4, promote_dtype=promoting(f), name="linear")
    return fold(lambda _, x: norm(name="norm")(make()(x)), (3, 5, 4))[0]


def linen_overriding(f, kind):
    """A subclass whose `param` returns what f makes of the parameter."""

    class Own(getattr(nn, kind)):
        def param(self, name, *args, **kwargs):
            value = super().param(name, *args, **kwargs)
            if name == "kernel":
                return f(value, jnp.ones(4))[0]
            if name == "bias":
                return f(jnp.ones((4, 4)), value)[1]
            return value

    options = {"kernel_size": (2,)} if kind == "Conv" else {}
    make = functools.partial(Own, 4, **options, name="linear")
    return fold(lambda _, x: norm(name="norm")(make()(x)), (3, 5, 4))[0]


class Pair(nnx.Module):
    def __init__(self, linear, rngs):
        self.linear, self.norm = linear, nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.linear(x))


def nnx_promoting(f, kind, **options):
    rngs = nnx.Rngs(0)
    layer = functools.partial(nnx.Conv, kernel_size=(2,)) if kind == "Conv" else None
    linear = (layer or nnx.Linear)(
        4, 4, promote_dtype=promoting(f), rngs=rngs, **options
    )
    return fold_nnx(trained(Pair(linear, rngs)), (3, 5, 4))[0]


SOME = ("sign", "standardized", "low rank", "bias twice")  # of them for each way


@pytest.mark.parametrize(
    ("how", "kind", "name"),
    [(linen_promoting, "Conv", name) for name in NOT_LINEAR]
    + [(linen_overriding, "Dense", name) for name in SOME]
    + [(nnx_promoting, "Conv", name) for name in SOME],
)
def test_transformed_before_use(name, how, kind):
    f, words = NOT_LINEAR[name]
    folded = how(f, kind)
    assert folded.folded == ()
    assert words in dict(folded.kept)["norm"]


@pytest.mark.parametrize(
    ("how", "kind"), [(linen_promoting, "Dense"), (nnx_promoting, "Conv")]
)
@pytest.mark.parametrize("name", LINEAR)
def test_scaled_before_use(name, how, kind):
    assert how(LINEAR[name], kind).folded == (("linear", "norm"),)


def test_nnx_new_bias_is_not_transformed():
    """The layer had none, for which its promote_dtype does what it likes."""

    def f(kernel, bias):
        return 3 * kernel, None if bias is None else 3 * bias

    for kind in ("Conv", "Linear"):
        folded = nnx_promoting(f, kind, use_bias=False)
        assert folded.folded == (("linear", "norm"),)
        assert folded.params["linear"].keys() == {"kernel", "bias"}


def test_masks_of_flax():
    def body(_, x):
        mask = (draw(8, 2, 4, 4) > 0).astype(jnp.float32)
        conv = nn.Conv(4, (2,), mask=mask, name="linear")
        return norm(name="norm")(conv(x))

    assert fold(body, (3, 5, 4))[0].folded == (("linear", "norm"),)


@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_circular_transposed_convolution(transpose_kernel):
    """The output is cut, wrapped and summed before the bias is added."""
    options = {"padding": "CIRCULAR", "transpose_kernel": transpose_kernel}

    def body(_, x):
        up = nn.ConvTranspose(5, (3,), (2,), **options, name="linear")
        return norm(name="norm")(up(x))

    assert fold(body, (2, 3, 6, 4))[0].folded == (("linear", "norm"),)


def test_kernel_under_another_name():
    class Own(nn.Dense):
        def param(self, name, *args, **kwargs):
            name = {"kernel": "v"}.get(name, name)
            return super().param(name, *args, **kwargs)

    folded, _ = fold(lambda _, x: norm(name="norm")(Own(4, name="linear")(x)), (3, 5))
    assert "has no kernel among its variables" in dict(folded.kept)["norm"]


def test_stored_low_rank_update():
    """The update is a parameter of the layer, beside its kernel and bias."""

    class Own(nn.Dense):
        def param(self, name, *args, **kwargs):
            value = super().param(name, *args, **kwargs)
            if name != "kernel":
                return value
            init = nn.initializers.normal()
            a = super().param("a", init, (value.shape[0], 1))
            return value + a @ super().param("b", init, (1, value.shape[1]))

    folded, _ = fold(lambda _, x: norm(name="norm")(Own(4, name="linear")(x)), (3, 5))
    assert "is read by `add`" in dict(folded.kept)["norm"]


class Spectral(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.SpectralNorm(nnx.Linear(4, 4, rngs=rngs), rngs=rngs)

    def __call__(self, x):
        return self.layer(x, update_stats=False)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_spectral_normalization(kind):
    if kind == "linen":

        def body(_, x):
            spectral = nn.SpectralNorm(nn.Dense(4, name="dense"), name="spectral")
            return norm(name="norm")(spectral(x, update_stats=False))

        folded, _ = fold(body, (3, 5))
        assert "does not reach it as it is stored" in dict(folded.kept)["norm"]
    else:
        rngs = nnx.Rngs(0)
        model, x = trained(Pair(Spectral(rngs), rngs)), draw(0, 3, 4)
        folded = fold_model(model, x)
        assert "does not reach it as it is stored" in dict(folded.kept)["norm"]
        expected = nnx.clone(model)(x)  # which overwrites the kernel
        assert_close(jax.jit(folded.apply)(folded.params, x), expected, tol=1e-5)


def test_kernel_returned_beside_the_output():
    """A penalty on the kernel that the layer computes with, cast."""

    class Own(nn.Dense):
        def promote(self, x, kernel, bias, dtype=None):
            kernel = kernel.astype(jnp.float16).astype(jnp.float32)
            self.sow("penalties", "l2", (kernel**2).sum())
            return x, kernel, bias

        @nn.compact
        def __call__(self, x):
            promote = self.promote
            object.__setattr__(self, "promote_dtype", promote)
            return super().__call__(x)

    net = Net(lambda _, x: norm(name="norm")(Own(4, name="linear")(x)))
    x = draw(0, 3, 5)
    variables = net.init(jax.random.key(0), x)  # which has penalties too, in a tuple
    folded = fold_model(net, variables, x, mutable=["penalties"])
    assert folded.folded == ()
    actual = folded.apply(folded.params, x)
    expected = net.apply(variables, x, mutable=["penalties"])
    assert_trees_close(actual, expected, tol=1e-5)


# The precision of what is folded.


@covering(
    stored=[jnp.bfloat16, jnp.float16], dtype=[None, jnp.float32], bias=[True, False]
)
def test_stored_narrower_than_it_computes(stored, dtype, bias):
    half = {"param_dtype": stored, "dtype": dtype, "use_bias": bias}

    def body(_, x):
        x = norm()(nn.Conv(5, (2,), **half)(x))
        x = flax_norm()(nn.ConvTranspose(6, (2,), **half)(nn.relu(x)))
        return norm()(nn.Dense(4, **half)(nn.relu(x)))

    folded, _ = fold(body, (3, 5, 4))
    assert len(folded.folded) == 3
    assert {leaf.dtype for leaf in jax.tree.leaves(folded.params)} == {
        jnp.dtype("float32")
    }
    rngs = nnx.Rngs(0)
    for linear in (
        nnx.Conv(4, 4, (2,), rngs=rngs, **half),
        nnx.Linear(4, 4, **half, rngs=rngs),
    ):
        folded, _ = fold_nnx(trained(Pair(linear, rngs)), (3, 5, 4))
        assert folded.folded == (("linear", "norm"),)


def converting(dtype):
    """`promote_dtype` that casts the variables to the dtype of the input."""

    def promote(x, *variables, dtype=None):
        return x, *(v if v is None else v.astype(x.dtype) for v in variables)

    return promote


@pytest.mark.parametrize(
    ("stored", "dtype", "expected"),
    [
        (jnp.float32, jnp.bfloat16, jnp.float32),  # as it was
        (jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
        (jnp.float8_e4m3fn, jnp.float32, jnp.float32),
        (jnp.int8, jnp.float32, jnp.float32),
        (jnp.float32, jnp.complex64, jnp.complex64),
    ],
)
def test_storage(stored, dtype, expected):
    promote = {"promote_dtype": converting(dtype), "param_dtype": jnp.float32}
    net = Net(lambda _, x: flax_norm(name="norm")(nn.Dense(4, **promote)(x)))
    x = draw(0, 30, 5).astype(dtype)
    variables = randomized(jax.eval_shape(net.init, jax.random.key(0), x))
    dense = variables["params"]["Dense_0"]
    dense["kernel"] = (3 * dense["kernel"]).astype(stored)
    dense["bias"] = dense["bias"].astype(stored)
    if dtype == jnp.complex64:
        x, stats = x * (1 + 2j), variables["batch_stats"]["norm"]
        stats["mean"] = stats["mean"] * (1 - 1j)
    folded = fold_model(net, variables, x)
    assert folded.folded == (("Dense_0", "norm"),)
    found = folded.params["Dense_0"]
    assert {leaf.dtype for leaf in found.values()} == {jnp.dtype(expected)}
    actual, exact = folded.apply(folded.params, x), net.apply(variables, x)
    tol = 3e-2 if dtype == jnp.bfloat16 else 1e-5
    assert np.abs(actual - exact).max() < tol * np.abs(exact).max()


@pytest.mark.usefixtures("x64")
def test_stored_as_float32_computed_in_float64():
    def body(_, x):
        return norm()(nn.Dense(4, param_dtype=jnp.float32)(x))

    folded, _ = fold(body, (3, 5), dtype=jnp.float64, tol=1e-12)
    assert folded.params["Dense_0"]["kernel"].dtype == jnp.float64


@pytest.mark.parametrize("kind", ["linen", "nnx"])
@pytest.mark.parametrize("bias", [True, False])
def test_large_offset_after_half_precision(kind, bias):
    """The offset is added in the dtype of the output, which the product has not."""
    half = {"dtype": jnp.bfloat16, "use_bias": bias}
    x = draw(0, 40, 4)
    if kind == "linen":
        net = Net(lambda _, x: norm(name="norm")(nn.Dense(4, **half, name="linear")(x)))
        variables = randomized(jax.eval_shape(net.init, jax.random.key(0), x))
        variables["params"]["norm"]["bias"] += 1000
        exact, folded = net.apply(variables, x), fold_model(net, variables, x)
    else:
        rngs = nnx.Rngs(0)
        model = trained(Pair(nnx.Linear(4, 4, **half, rngs=rngs), rngs))
        model.norm.bias[...] += 1000
        exact, folded = model(x), fold_model(model, x)
    assert folded.folded == (("linear", "norm"),)
    assert folded.params["norm"].keys() == {"bias"}
    assert ("bias" in folded.params["linear"]) == bias
    error = jnp.abs(folded.apply(folded.params, x) - exact).max()
    assert error < 0.05 * exact.std()  # 2 if the product's output had the offset


def test_product_wider_than_its_kernel():
    """bfloat16 with float32 sums: the kernel is exact, which the folded one is not."""
    half = {"dtype": jnp.bfloat16, "preferred_element_type": jnp.float32}

    def run(stored):
        rngs = nnx.Rngs(0)
        linear = nnx.Linear(4, 4, **half, param_dtype=stored, rngs=rngs)
        tol = 1e-5 if stored == jnp.bfloat16 else 2e-2
        return fold_nnx(trained(Pair(linear, rngs)), (3, 4), tol=tol)[0]

    assert "would be rounded" in dict(run(jnp.bfloat16).kept)["norm"]
    assert run(jnp.float32).kept == ()


def test_overflow_of_half_precision():
    """A channel that is dead at 500: offset -500 / sqrt(1e-5), below -65504."""
    half = {"dtype": jnp.float16, "use_bias": False}
    net = Net(lambda _, x: norm(**half, name="norm")(nn.Dense(4, **half)(x)))
    x = jnp.full((3, 4), 1.25, jnp.float16)
    variables = randomized(jax.eval_shape(net.init, jax.random.key(0), x))
    variables["params"]["Dense_0"]["kernel"] = jnp.full((4, 4), 100.0)
    variables["batch_stats"]["norm"] = {"mean": jnp.full(4, 500.0), "var": jnp.zeros(4)}
    folded = fold_model(net, variables, x)
    assert "would overflow float16" in dict(folded.kept)["norm"]
    assert_close(folded.apply(folded.params, x), net.apply(variables, x), tol=1e-3)


# NNX models with transforms inside, and variables of other kinds.


class Counted(nnx.Module):
    """A pair with a dropout's counter, one of its own, and an intermediate value."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(4, 4, (2,), use_bias=False, rngs=rngs)
        self.norm = bnjax.nnx.BatchNorm(4, activation=nnx.relu, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))
        self.settings = nnx.Variable(2)  # no array

    def __call__(self, x):
        self.calls[...] += 1
        return self.settings.get_value() * self.dropout(self.norm(self.conv(x)))


class Decorated(Counted):
    @nnx.jit
    @nnx.remat
    def __call__(self, x):
        return super().__call__(x)


def call(model, x):
    return model(x)


def scanned(model, x):
    def step(carry, _):
        model, x = carry
        return (model, model(x)), None

    axes = (nnx.Carry, 0)
    step = nnx.scan(step, in_axes=axes, out_axes=axes)
    return step((model, x), jnp.arange(2))[0][1]


def looped(model, x):
    def step(_, carry):
        return carry[0], carry[0](carry[1])

    return nnx.fori_loop(0, 2, step, (model, x))[1]


def repeated(model, x):
    def more(carry):
        return carry[0] < 2

    def body(carry):
        i, model, x = carry
        return i + 1, model, model(x)

    return nnx.while_loop(more, body, (jnp.int32(0), model, x))[2]


INSIDE = {
    "nothing": (call, True),
    "remat": (nnx.remat(call), True),
    "jit": (nnx.jit(call), True),
    "remat in jit": (nnx.jit(nnx.remat(call)), True),
    "vmap": (nnx.vmap(call, in_axes=(None, 0)), True),
    "cond": (lambda m, x: nnx.cond(x.sum() > 0, call, lambda m, x: x, m, x), False),
    "switch": (lambda m, x: nnx.switch(x.ndim % 2, [call, call], m, x), False),
    "scan": (scanned, False),
    "fori_loop": (looped, False),
    "while_loop": (repeated, False),
}


class Outer(nnx.Module):
    def __init__(self, inner, f):
        self.inner, self.f = inner, f

    def __call__(self, x):
        return self.f(self.inner, x)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(Counted, name) for name in INSIDE]
    + [(Decorated, name) for name in ("nothing", "vmap", "scan")],
)
def test_nnx_transforms_inside(name, kind):
    f, folds = INSIDE[name]
    model = trained(Outer(kind(nnx.Rngs(0)), f))
    x = draw(0, 2, 3, 5, 4)
    folded = fold_model(model, x)
    if folds:
        assert folded.folded == (("inner/conv", "inner/norm"),)
    else:
        ((path, why),) = folded.kept
        assert path == "inner/norm"
        assert "a loop, a branch" in why
    expected = nnx.clone(model)(x)
    for apply in (folded.apply, jax.jit(folded.apply)):
        assert_close(apply(folded.params, x), expected, tol=1e-5)


def test_nnx_stacked_by_vmap_and_scanned():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return Counted(rngs)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def layers(model, x):
        return model(x)

    model = trained(Outer(make(nnx.Rngs(0)), layers))
    x = draw(0, 2, 5, 4)
    folded = fold_model(model, x)
    ((path, why),) = folded.kept
    assert path == "inner/norm"
    assert "a loop, a branch" in why
    expected = nnx.clone(model)(x)
    assert_close(jax.jit(folded.apply)(folded.params, x), expected, tol=1e-5)

"""The layers in code that other people wrote for Flax's: a class swap, and no more."""

import dataclasses
import inspect
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from helpers import assert_close

import bnjax

SHAPE = (6, 5, 3)
AXES = (0, 1)

# The layers that have the variables of Flax's and infer as it does; and the others.
LIKE_FLAXS = {
    "BatchNorm": {},
    "GhostBatchNorm": {"virtual_batch_size": 2},
    "BatchRenorm": {},
}
OTHERS = {"SplitBatchNorm": {"num_splits": 2}, "DecorrelatedBatchNorm": {}}
every_layer = pytest.mark.parametrize("name", [*LIKE_FLAXS, *OTHERS])
like_flaxs = pytest.mark.parametrize("name", LIKE_FLAXS)


def data(seed=0, shape=SHAPE):
    return jnp.asarray(np.random.default_rng(seed).normal(2, 3, shape), jnp.float32)


def linen(layer, *args, **fields):
    own = {**LIKE_FLAXS, **OTHERS}[layer]
    return getattr(bnjax.linen, layer)(*args, **own, **fields)


def of_nnx(layer, **settings):
    own = {**LIKE_FLAXS, **OTHERS}[layer]
    return getattr(bnjax.nnx, layer)(3, **own, **settings, rngs=nnx.Rngs(0))


def statistics(model):
    return jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))


# ---- code that asks for the class ----


@like_flaxs
def test_are_flaxs_classes(name):
    assert isinstance(linen(name), nn.BatchNorm)
    assert issubclass(getattr(bnjax.linen, name), nn.BatchNorm)
    assert isinstance(of_nnx(name), nnx.BatchNorm)
    assert issubclass(getattr(bnjax.nnx, name), nnx.BatchNorm)


@pytest.mark.parametrize("name", OTHERS)
def test_layers_of_other_variables_are_not(name):
    """What goes by the class may fold mean and var of one row into a kernel."""
    assert not isinstance(linen(name), nn.BatchNorm)
    assert not isinstance(of_nnx(name), nnx.BatchNorm)


@like_flaxs
def test_no_method_is_flaxs(name):
    """What is inherited is overridden, also what a later Flax adds."""
    for base, layer in (
        (nn.BatchNorm, getattr(bnjax.linen, name)),
        (nnx.BatchNorm, getattr(bnjax.nnx, name)),
    ):
        fields = getattr(base, "__dataclass_fields__", {})
        methods = {n for n, v in vars(base).items() if inspect.isfunction(v)}
        public = {n for n in methods if n[0] != "_"} - {*fields}
        for method in {"__init__", "__call__"} | public:
            assert getattr(layer, method) is not getattr(base, method), method
        assert layer.__call__.__module__.startswith("bnjax.")


@pytest.mark.parametrize("train", [False, True])
@like_flaxs
def test_dispatch_by_class(name, train):
    """As models do that hold layers of any kind in a list."""

    def apply(norm, x, train):
        if isinstance(norm, nnx.BatchNorm):
            return norm(x, use_running_average=not train)
        return norm(x)

    x, layer, direct = data(), of_nnx(name), of_nnx(name)
    layer.mean[...] = direct.mean[...] = jnp.array([1.0, 2.0, 3.0])
    before = statistics(layer)
    y = apply(layer, x, train)
    np.testing.assert_array_equal(y, direct(x, use_running_average=not train))
    written = not np.array_equal(statistics(layer)["mean"], before["mean"])
    assert written == train
    if not train:
        rows = np.array([1.0, 2, 3]), np.ones(3), np.ones(3), np.zeros(3)
        assert_close(y, oracle.normalize(x, *rows, AXES), tol=2e-6)


@like_flaxs
def test_interception_by_class(name):
    """Filters of nn.intercept_methods, as of tools that freeze or watch the layers."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = linen(name, name="norm")(nn.Dense(4)(x), not train)
            return nn.Dense(2)(x)

    seen = []

    def frozen(run, args, kwargs, context):
        if isinstance(context.module, nn.BatchNorm):
            seen.append(context.module.name)
            return run(args[0], use_running_average=True)
        return run(*args, **kwargs)

    x, net = data(), Net()
    variables = net.init(jax.random.key(0), x, False)
    with nn.intercept_methods(frozen):
        y = net.apply(variables, x, True)  # nothing is mutable
    assert seen == ["norm"]
    np.testing.assert_array_equal(y, net.apply(variables, x, False))


class Mixed(nnx.Module):
    def __init__(self, name):
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=nnx.Rngs(0)), of_nnx(name)])
        self.last = nnx.BatchNorm(3, rngs=nnx.Rngs(1))
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(2))


@like_flaxs
def test_set_attributes_by_class(name):
    model = Mixed(name)
    model.set_attributes(nnx.BatchNorm, use_running_average=True, momentum=0.5)
    assert model.layers[1].use_running_average
    assert model.layers[1].momentum == 0.5
    model.set_attributes(getattr(bnjax.nnx, name), momentum=0.75)
    assert (model.layers[1].momentum, model.last.momentum) == (0.75, 0.5)


@like_flaxs
def test_modules_by_class(name):
    model = Mixed(name)
    modules = list(nnx.iter_modules(model))
    found = [path for path, m in modules if isinstance(m, nnx.BatchNorm)]
    assert sorted(map(str, found)) == sorted(map(str, [("layers", 1), ("last",)]))
    ours = [path for path, m in modules if isinstance(m, getattr(bnjax.nnx, name))]
    assert ours == [("layers", 1)]


@like_flaxs
def test_fields_are_flaxs_then_ours(name):
    theirs = [field.name for field in dataclasses.fields(nn.BatchNorm)]
    theirs = [n for n in theirs if n not in ("parent", "name")]
    ours = [field.name for field in dataclasses.fields(getattr(bnjax.linen, name))]
    assert ours[: len(theirs)] == theirs
    layer = linen(name, momentum=0.9)
    changed = dataclasses.replace(layer, momentum=0.5, use_fast_variance=False)
    assert (layer.momentum, changed.momentum) == (0.9, 0.5)
    assert layer.clone(epsilon=1e-3).epsilon == 1e-3
    kwargs = {f.name: getattr(layer, f.name) for f in dataclasses.fields(nn.BatchNorm)}
    assert nn.BatchNorm(**kwargs).momentum == 0.9  # the way back


@like_flaxs
def test_every_attribute_of_flaxs_is_there(name):
    theirs = vars(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    ours = of_nnx(name)
    for attribute in (n for n in theirs if n[0] != "_"):
        assert hasattr(ours, attribute), attribute
    assert of_nnx(name, use_fast_variance=False).use_fast_variance is False


@every_layer
def test_pickling(name):
    layer = linen(name, momentum=0.9)
    copy = pickle.loads(pickle.dumps(layer))
    assert copy == layer
    assert type(copy) is type(layer)
    model = of_nnx(name, momentum=0.9)
    x = data()
    model(x)
    other = pickle.loads(pickle.dumps(model))
    assert type(other) is type(model)
    np.testing.assert_array_equal(other(x, True), model(x, True))


@like_flaxs
def test_subclasses_of_users(name):
    """Theirs override what they like, and are Flax's too."""

    class Mine(getattr(bnjax.linen, name)):
        momentum: float = 0.5

    layer = Mine(**LIKE_FLAXS[name], use_running_average=False)
    assert isinstance(layer, nn.BatchNorm)
    x = data()
    variables = layer.init(jax.random.key(0), x)
    _, updates = layer.apply(variables, x, mutable=["batch_stats"])
    mean = oracle.moments(x, AXES)[1]
    assert_close(updates["batch_stats"]["mean"], mean / 2)


# ---- tools that tell the classes apart ----


@pytest.mark.parametrize("norm", [nn.BatchNorm, bnjax.BatchNorm])
def test_folding_tells_flaxs_from_ours(norm):
    """By the class that defines the call: Flax's has no activation."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            own = {} if norm is nn.BatchNorm else {"activation": jnp.tanh}
            return norm(not train, **own, name="norm")(nn.Dense(4)(x))

    net, x = Net(), data()
    variables = net.init(jax.random.key(0), x, True)
    folded = bnjax.fold.fold_model(net, variables, x, train=False)
    assert folded.folded == (("Dense_0", "norm"),)
    y = net.apply(variables, x, False)
    assert_close(folded.apply(folded.params, x), np.asarray(y), tol=2e-6)


@like_flaxs
def test_folding_of_nnx(name):
    model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), of_nnx(name))
    x = data(shape=(6, 5, 4))
    model(x)
    model.eval()
    folded = bnjax.fold.fold_model(model, x)
    assert len(folded.folded) == 1
    assert_close(folded.apply(folded.params, x), np.asarray(model(x)), tol=2e-6)


def test_folding_leaves_a_subclass_with_a_call_of_its_own():
    class Doubled(bnjax.BatchNorm):
        def __call__(self, x, use_running_average=None):
            return 2 * x

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return bnjax.BatchNorm(True, name="norm")(Doubled(True)(nn.Dense(4)(x)))

    net, x = Net(), data()
    variables = net.init(jax.random.key(0), x)
    folded = bnjax.fold.fold_model(net, variables, x)
    expected = net.apply(variables, x)
    assert_close(folded.apply(folded.params, x), np.asarray(expected), tol=2e-6)

"""The layers in code that other people wrote for Flax's: a class swap, and no more."""

import dataclasses
import functools
import inspect
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from helpers import assert_close, by_default, covering

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


# ---- integers and booleans ----

INTEGERS = ["uint8", "int8", "uint16", "int32", "bool"]


def integers(dtype, shape=(8, 5, 4, 3), seed=0):
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return rng.random(shape) < 0.3
    info = np.iinfo(dtype)
    low, high = max(info.min, -1000), min(info.max, 1000)
    return rng.integers(low, high, shape, endpoint=True).astype(dtype)


@pytest.mark.parametrize("dtype", ["uint8", "bool"])
@every_layer
def test_integers_are_their_values(name, dtype):
    """What the layer makes of them in float32, in training and evaluation."""
    x = integers(dtype)
    wide = jnp.asarray(x, jnp.float32)
    layer = linen(name, momentum=0.5)
    variables = layer.init(jax.random.key(0), wide, False)
    model, other = of_nnx(name, momentum=0.5), of_nnx(name, momentum=0.5)
    for running in (False, True):
        y, updates = layer.apply(variables, x, running, mutable=["batch_stats"])
        expected = layer.apply(variables, wide, running, mutable=["batch_stats"])
        jax.tree.map(np.testing.assert_array_equal, (y, updates), expected)
        assert y.dtype == jnp.float32
        np.testing.assert_array_equal(model(x, running), other(wide, running))
        np.testing.assert_array_equal(
            y, layer.apply(variables, wide, running, mutable=["batch_stats"])[0]
        )
        np.testing.assert_array_equal(
            statistics(model)["mean"], statistics(other)["mean"]
        )


@pytest.mark.parametrize("dtype", INTEGERS)
def test_statistics_of_integers(dtype):
    """Those of float64, also of a white image; sums of bytes would begin again."""
    x = integers(dtype)
    x[..., 0] = True if dtype == "bool" else min(np.iinfo(dtype).max, 255)
    count, mean, m2 = oracle.moments(x.astype(np.float64), (0, 1, 2))
    layer = bnjax.BatchNorm(use_running_average=False, momentum=0.0)
    variables = layer.init(jax.random.key(0), x)
    y, updates = layer.apply(variables, x, mutable=["batch_stats"])
    stats = updates["batch_stats"]
    assert_close(stats["mean"], mean, dtype="float32")
    assert_close(stats["var"], m2 / count, tol=2e-6, dtype="float32")
    assert (stats["mean"][0], stats["var"][0]) == (mean[0], 0)
    ones = np.ones(3), np.zeros(3)
    assert_close(y, oracle.batch_norm(x.astype(np.float64), *ones, (0, 1, 2)), tol=5e-6)


OUTPUTS = [
    {},
    {"dtype": jnp.bfloat16},
    {"param_dtype": jnp.bfloat16},
    {"param_dtype": jnp.float16, "use_bias": False},
    {"param_dtype": jnp.bfloat16, "use_scale": False, "use_bias": False},
]


@covering(running=[False, True], fields=OUTPUTS, dtype=INTEGERS)
def test_dtypes_of_results_of_integers_are_flaxs(dtype, fields, running):
    x = integers(dtype)
    results = []
    for layer in (nn.BatchNorm(**fields), bnjax.BatchNorm(**fields)):

        def run(x, layer=layer):
            variables = layer.init(jax.random.key(0), x, running)
            return layer.apply(variables, x, running, mutable=["batch_stats"])

        found = jax.eval_shape(run, x)
        results.append(jax.tree.map(lambda v: v.dtype, found))
    assert results[0] == results[1]
    y = [
        jax.eval_shape(
            lambda x, n=norm: n(3, rngs=nnx.Rngs(0), **fields)(x, running), x
        )
        for norm in (nnx.BatchNorm, bnjax.nnx.BatchNorm)
    ]
    assert y[0].dtype == y[1].dtype


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", ["int64", "uint64", "int32"])
def test_wide_integers_are_flaxs(dtype):
    x = integers("int32").astype(dtype)
    y = [norm(False).init_with_output(jax.random.key(0), x)[0] for norm in NORMS]
    assert y[0].dtype == y[1].dtype
    assert_close(y[1], np.asarray(y[0]), tol=1e-5)


NORMS = nn.BatchNorm, bnjax.BatchNorm


def test_a_mask_and_moments_of_integers():
    x = integers("uint8")
    mask = np.random.default_rng(1).random((8, 1, 1, 1)) < 0.7
    layer = bnjax.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), x)
    _, left = layer.apply(
        variables, x, mask=mask, mutable=["batch_moments"], update_stats=False
    )
    count, mean, m2 = oracle.moments(x.astype(float), (0, 1, 2), mask)
    found = left["batch_moments"]["moments"]
    assert found.count == count[0]
    assert_close(found.mean, mean)
    assert_close(found.m2, m2)


def test_folding_with_integer_inputs():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = bnjax.BatchNorm(not train, name="input")(x)
            x = nn.Conv(4, (3, 3), name="conv")(x)
            return bnjax.BatchNorm(not train, name="norm")(x)

    net, x = Net(), integers("uint8")
    variables = net.init(jax.random.key(0), x, True)
    folded = bnjax.fold.fold_model(net, variables, x, train=False)
    assert folded.folded == (("conv", "norm"),)
    y = net.apply(variables, x, False)
    assert_close(folded.apply(folded.params, x), np.asarray(y), tol=5e-6)


class QNetwork(nn.Module):
    """As purejaxql has it: without normalized inputs a dummy layer makes the tree."""

    norm: type[nn.Module]
    norm_input: bool

    @nn.compact
    def __call__(self, x, train):
        x = jnp.transpose(x, (0, 2, 3, 1))
        if self.norm_input:
            x = self.norm(use_running_average=not train)(x)
        else:
            self.norm(use_running_average=not train)(x)  # dummy
            x = x / 255.0
        x = nn.Conv(4, (3, 3), strides=2, kernel_init=nn.initializers.he_normal())(x)
        x = nn.relu(self.norm(use_running_average=not train)(x))
        x = nn.Dense(8)(x.reshape(x.shape[0], -1))
        x = nn.relu(self.norm(use_running_average=not train)(x))
        return nn.Dense(5)(x)


@by_default((False, "uint8"), of=[(False, "uint8"), (False, "bool"), (True, "uint8")])
def test_a_dummy_layer_on_raw_observations(of):
    """Initialized with floats; the error came at the first real step."""
    norm_input, dtype = of
    observations = integers(dtype, (7, 2, 9, 8))
    found = []
    for norm in NORMS:
        net = QNetwork(norm, norm_input)
        init = jax.jit(net.init, static_argnums=2)
        variables = init(jax.random.key(0), jnp.zeros((1, 2, 9, 8)), False)

        @jax.jit
        def step(params, stats, x, net=net):
            def loss(params):
                q, updates = net.apply(
                    {"params": params, "batch_stats": stats},
                    x,
                    train=True,
                    mutable=["batch_stats"],
                )
                return (q**2).mean(), updates["batch_stats"]

            grads, stats = jax.grad(loss, has_aux=True)(params)
            return jax.tree.map(lambda p, g: p - 0.01 * g, params, grads), stats

        state = variables["params"], variables["batch_stats"]
        for _ in range(2):
            state = step(*state, observations)
        acted = net.apply(
            {"params": state[0], "batch_stats": state[1]}, observations, False
        )
        found.append((acted, state[1]))
    renamed = jax.tree.leaves(found[0]), jax.tree.leaves(found[1])
    for theirs, ours in zip(*renamed, strict=True):
        # The gradient to a bias before normalization is 0 but for rounding, which moves
        # the small mean behind it.
        assert_close(ours, np.asarray(theirs), tol=1e-3)


class Critic(nn.Module):
    """As SBX has CrossQ's: normalized inputs and layers, no target network."""

    norm: type[nn.Module]

    @nn.compact
    def __call__(self, x, action, train=False):
        x = jnp.concatenate([x, action], -1)
        x = self.norm(use_running_average=not train, momentum=0.9)(x)
        for features in (8, 6):
            x = nn.relu(nn.Dense(features)(x))
            x = self.norm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(1)(x)


class Critics(nn.Module):
    norm: type[nn.Module]

    @nn.compact
    def __call__(self, *args):
        critics = nn.vmap(
            Critic,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True, "batch_stats": True},
            in_axes=None,
            out_axes=0,
            axis_size=2,
        )
        return critics(self.norm)(*args)


@by_default(2, warmup_steps=[None, 2])
def test_a_critic_of_crossq(warmup_steps):
    """Joint batches, in a jitted loop over updates; the state holds the counter."""
    if warmup_steps is None:
        norm = bnjax.linen.BatchRenorm
    else:
        norm = functools.partial(bnjax.linen.BatchRenorm, warmup_steps=warmup_steps)
    critic, rng = Critics(norm), np.random.default_rng(0)
    now, then = (jnp.asarray(rng.normal(size=(7, 3)), jnp.float32) for _ in range(2))
    acted = jnp.asarray(rng.normal(size=(14, 2)), jnp.float32)
    observed = jnp.concatenate([now, then])
    init = jax.jit(critic.init, static_argnums=3)
    variables = init(jax.random.key(0), now[:1], acted[:1], False)

    def update(state, _):
        params, stats = state

        def loss(params):
            q, updates = critic.apply(
                {"params": params, "batch_stats": stats},
                observed,
                acted,
                True,
                mutable=["batch_stats"],
            )
            current, following = jnp.split(q, 2, axis=1)
            target = jax.lax.stop_gradient(0.5 + 0.9 * following.min(0))[None]
            return ((current - target) ** 2).mean(), updates["batch_stats"]

        grads, stats = jax.grad(loss, has_aux=True)(params)
        return (jax.tree.map(lambda p, g: p - 0.01 * g, params, grads), stats), None

    state = variables["params"], variables["batch_stats"]
    run = jax.jit(lambda state: jax.lax.scan(update, state, None, length=4)[0])
    params, stats = run(state)
    q = critic.apply({"params": params, "batch_stats": stats}, now, acted[:7], False)
    assert q.shape == (2, 7, 1)
    assert np.isfinite(q).all()
    flat = jax.tree.leaves_with_path(stats)
    steps = [v for path, v in flat if path[-1].key == "steps"]
    assert len(steps) == (0 if warmup_steps is None else 3)
    for counter in steps:
        np.testing.assert_array_equal(counter, [4, 4])

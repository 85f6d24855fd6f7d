"""The NNX layer: a drop-in for flax.nnx.BatchNorm, and the Linen layer to the bit."""

import inspect
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from helpers import (
    assert_close,
    assert_trees_close,
    by_default,
    covering,
    poison,
    residual_bytes,
)
from jax.nn import initializers

import bnjax
from bnjax.nnx import BatchMoments, BatchNorm

SHAPE = (6, 4, 5, 3)
AXES = (0, 1, 2)


def data(seed=0, shape=SHAPE, dtype="float32"):
    x = np.random.default_rng(seed).normal(size=shape) * 2 + 1
    return jnp.asarray(x, dtype)


def layer_of(norm=BatchNorm, seed=1, features=3, **options):
    """A layer whose parameters and statistics are neither 0 nor 1."""
    layer = norm(features, rngs=nnx.Rngs(0), **options)
    rng = np.random.default_rng(seed)
    for name in ("scale", "bias", "mean"):
        fill(getattr(layer, name), rng.normal(size=features))
    fill(layer.var, rng.uniform(0.5, 2, features))
    return layer


def fill(variable, value):
    if variable is not None:
        variable.set_value(jnp.asarray(value, variable.dtype))


def arrays(node, *filters):
    """The state as NumPy arrays by path."""
    flat = nnx.to_flat_state(nnx.state(node, *filters))
    return {path: np.asarray(variable.get_value()) for path, variable in flat}


def assert_same_bits(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    dtypes = [[v.dtype for v in jax.tree.leaves(t)] for t in (actual, expected)]
    assert dtypes[0] == dtypes[1]


def statistics(layer):
    return {"mean": layer.mean.get_value(), "var": layer.var.get_value()}


# ---- the same as Flax ----


def test_arguments_are_flaxs_then_ours():
    def arguments(f):
        parameters = inspect.signature(f).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters]

    theirs, ours = arguments(nnx.BatchNorm.__init__), arguments(BatchNorm.__init__)
    assert ours[: len(theirs)] == theirs
    assert [name for name, _, _ in ours[len(theirs) :]] == [
        "unbiased",
        "update_stats",
        "skip_nonfinite_updates",
        "activation",
        "frozen",
    ]
    theirs, ours = arguments(nnx.BatchNorm.__call__), arguments(BatchNorm.__call__)
    assert ours[: len(theirs)] == theirs
    linens = arguments(bnjax.linen.BatchNorm.__call__)
    assert [name for name, _, _ in ours] == [name for name, _, _ in linens]
    assert BatchNorm.__name__ == "BatchNorm"
    assert bnjax.nnx.BatchNorm is BatchNorm


def test_attributes_are_flaxs():
    theirs, ours = (
        {n: v for n, v in vars(norm(3, rngs=nnx.Rngs(0))).items() if n[0] != "_"}
        for norm in (nnx.BatchNorm, BatchNorm)
    )
    assert set(theirs) <= set(ours)
    for name in set(theirs) - {"scale", "bias", "mean", "var"}:
        assert ours[name] == theirs[name], name


@pytest.mark.parametrize("use_scale", [False, True])
@pytest.mark.parametrize("use_bias", [False, True])
def test_state_and_keys_are_flaxs(use_scale, use_bias):
    """Paths, types, metadata and values; and the key that the next layer draws."""
    options = {
        "use_scale": use_scale,
        "use_bias": use_bias,
        "param_dtype": jnp.bfloat16,
        "scale_init": initializers.normal(1.0),
        "bias_init": initializers.uniform(1.0),
        "scale_metadata": {"role": "gamma"},
        "bias_metadata": {"role": "beta"},
    }
    found = []
    for norm in (nnx.BatchNorm, BatchNorm):
        rngs = nnx.Rngs(7)
        layer = norm(3, rngs=rngs, **options)
        metadata = {
            path: (type(v), v.get_metadata())
            for path, v in nnx.to_flat_state(nnx.state(layer))
        }
        following = jax.random.key_data(rngs.params())
        found.append((metadata, nnx.to_pure_dict(nnx.state(layer)), following))
    assert found[1][0] == found[0][0]
    assert_same_bits(found[1][1:], found[0][1:])
    names = ["bias"] * use_bias + ["mean"] + ["scale"] * use_scale + ["var"]
    assert sorted(found[1][0]) == [(name,) for name in names]


def test_state_is_that_of_flax_in_a_model_and_loads_both_ways():
    theirs, ours = Net(nnx.BatchNorm), Net(BatchNorm)
    theirs(data())
    nnx.update(ours, nnx.state(theirs))
    assert_same_bits(nnx.state(ours), nnx.state(theirs))
    ours.eval(), theirs.eval()
    assert_close(ours(data()), np.asarray(theirs(data())), tol=1e-5)
    ours.train()
    ours(data(2))
    nnx.update(theirs, nnx.state(ours))
    assert_close(theirs(data()), np.asarray((ours.eval(), ours(data()))[1]), tol=1e-5)


def test_layers_that_differ_in_initializers_have_one_graph():
    plain, other = (
        BatchNorm(3, scale_init=init, rngs=nnx.Rngs(0))
        for init in (initializers.ones, initializers.zeros)
    )
    assert nnx.graphdef(plain) == nnx.graphdef(other)


CONFIGURATIONS = [
    {},
    {"momentum": 0.9, "epsilon": 1e-3},
    {"use_bias": False},
    {"use_scale": False},
    {"use_scale": False, "use_bias": False},
    {"axis": 1},
    {"dtype": jnp.bfloat16},
    {"dtype": jnp.float16},
    {"dtype": jnp.float32},
    {"param_dtype": jnp.bfloat16},
    {"use_fast_variance": False},
    {"promote_dtype": lambda values, **_: values, "param_dtype": jnp.bfloat16},
]


@covering(
    strength=1, number=range(len(CONFIGURATIONS)), x_dtype=["float32", "bfloat16"]
)
def test_equals_flax(number, x_dtype):
    """Training output and statistics, twice, and the evaluation output."""
    options, masked = CONFIGURATIONS[number], (number + (x_dtype == "float32")) % 2
    x = data(dtype=x_dtype)
    mask = np.random.default_rng(3).random((6, 4, 5, 1)) < 0.7 if masked else None
    options = {"features": 4 if "axis" in options else 3, **options}
    theirs, ours = layer_of(nnx.BatchNorm, **options), layer_of(**options)
    half = jnp.bfloat16 in (options.get("dtype"), options.get("param_dtype"))
    tol = 2e-2 if half or "float16" in str(options.get("dtype")) else 1e-5
    for _ in range(2):
        expected = theirs(x, mask=mask)
        rounded = 2e-2 if expected.dtype.itemsize == 2 else tol
        assert_close(ours(x, mask=mask), expected, dtype=expected.dtype, tol=rounded)
        # Flax rounds the input to `dtype` first.
        stats = statistics(theirs)
        assert_trees_close(statistics(ours), stats, dtype="float32", tol=tol)
    theirs.eval(), ours.eval()
    expected = theirs(x)
    assert_close(ours(x), expected, dtype=expected.dtype, tol=max(rounded, tol))


@covering(
    dtype=[None, "bfloat16", "float64", "complex64"],
    x_dtype=["float32", "bfloat16", "float64", "complex64"],
    param_dtype=["float32", "bfloat16", "float64"],
)
@pytest.mark.filterwarnings("ignore:scatter inputs:FutureWarning")  # Flax's own
@pytest.mark.filterwarnings("ignore:Casting complex")
def test_dtypes_are_flaxs(dtype, x_dtype, param_dtype):
    """Of the output and of the statistics, which Flax keeps float32 in storage."""
    if x_dtype == "complex64" and dtype != "complex64":
        return  # Flax drops the imaginary part; bnjax raises
    with jax.enable_x64(True):

        def run(norm):
            layer = norm(3, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=param_dtype)
            return layer(data(dtype=x_dtype)), layer.mean[...], layer.var[...]

        theirs, ours = (jax.eval_shape(lambda n=n: run(n)) for n in FLAX_AND_OURS)
        assert ours[0].dtype == theirs[0].dtype
        assert ours[2].dtype == jnp.float32
        is_complex = dtype == "complex64"  # what the constructor knows
        assert ours[1].dtype == (jnp.complex64 if is_complex else jnp.float32)


FLAX_AND_OURS = (nnx.BatchNorm, BatchNorm)


COMPLEX = [
    {"dtype": jnp.complex64},
    {"dtype": "complex64", "use_scale": False, "use_bias": False},
    {"param_dtype": jnp.complex64},
    {"param_dtype": jnp.complex128, "use_bias": False},
    {"param_dtype": "complex64", "use_scale": False, "use_bias": False},
]


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype:UserWarning")
@pytest.mark.parametrize("settings", COMPLEX)
def test_complex_values(settings):
    """Flax drops the imaginary part of the running mean here."""
    x = data(dtype="complex64") + 1j * data(5)
    layer = BatchNorm(3, momentum=0.0, rngs=nnx.Rngs(0), **settings)
    assert layer.mean.get_value().dtype == jnp.complex64
    y = layer(x)
    count, mean, m2 = oracle.moments(x, AXES)
    assert_close(layer.mean.get_value(), mean, dtype="complex64")
    assert_close(layer.var.get_value(), m2 / count, dtype="float32")
    assert_close(layer(x, use_running_average=True), np.asarray(y), tol=1e-5)


@covering(
    strength=1,
    is_complex=[True, False],
    name=["BatchNorm", "GhostBatchNorm", "SplitBatchNorm"],
    settings=[{"dtype": jnp.complex64}, {"param_dtype": jnp.complex64}, {}],
)
def test_running_statistics_keep_their_dtype(settings, name, is_complex):
    """A scan over training steps, also of real values in a complex layer."""
    x = data() + 1j * data(5) if is_complex else data()
    own = {"GhostBatchNorm": {"virtual_batch_size": 2}}
    own["SplitBatchNorm"] = {"num_splits": 2}
    cls = getattr(bnjax.nnx, name)
    layer = cls(3, rngs=nnx.Rngs(0), **own.get(name, {}), **settings)
    if is_complex and not {"dtype", "param_dtype"} & {*settings}:
        message = "x has dtype complex64, but the running mean of this layer has dtype "
        with pytest.raises(TypeError, match=message + f"float32.*Write {name}"):
            layer(x)
        assert layer(x, True).dtype == layer(x, update_stats=False).dtype == x.dtype
        return
    graph, state = nnx.split(layer)

    def step(state, _):
        layer = nnx.merge(graph, state)
        layer(x)
        return nnx.state(layer), None

    state, _ = jax.lax.scan(step, state, None, length=300)
    parts = np.split(np.asarray(x), 2) if name == "SplitBatchNorm" else [x]
    moments = [oracle.moments(part, AXES) for part in parts]
    keep = 1 - 0.99**300
    mean = np.stack([mean * keep for _, mean, _ in moments])
    var = np.stack([m2 / count * keep + 1 - keep for count, _, m2 in moments])
    shape = state["mean"][...].shape
    assert_close(state["mean"][...], mean.reshape(shape), tol=1e-5)
    assert_close(state["var"][...], var.reshape(shape), tol=1e-5, dtype="float32")


def test_a_complex_layer_measures_real_values():
    layer = layer_of(param_dtype=jnp.complex64, momentum=0.0)
    layer(data(), True, update_stats=True)
    mean = oracle.moments(data(), AXES)[1]
    assert_close(layer.mean.get_value(), mean, dtype="complex64")


class Net(nnx.Module):
    def __init__(self, norm, **options):
        rngs = nnx.Rngs(3)
        self.first = nnx.Linear(3, 5, use_bias=False, rngs=rngs)
        self.norm = norm(5, momentum=0.9, rngs=rngs, **options)
        self.second = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.norm(self.first(x))))


def test_training_follows_flax():
    """Ten steps of gradient descent: the same losses and running statistics."""
    x, target = data(), data(4, (6, 4, 5, 2))

    def train(model):
        def loss(model):
            return jnp.mean((model(x) - target) ** 2)

        @nnx.jit
        def step(model):
            value, grads = nnx.value_and_grad(loss)(model)
            params = nnx.state(model, nnx.Param)
            nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))
            return value

        losses = np.array([step(model) for _ in range(10)])
        return losses, arrays(model)

    ours, theirs = train(Net(BatchNorm)), train(Net(nnx.BatchNorm))
    assert_trees_close(ours, theirs, tol=1e-3)  # ten steps amplify rounding


def test_what_is_written_has_no_gradient_as_in_flax():
    def loss(layer, x):
        layer(x)
        written = nnx.state(layer, nnx.Any(nnx.BatchStat, BatchMoments))
        return sum(jnp.sum(value) for value in jax.tree.leaves(written))

    ours = layer_of()
    ours.set_attributes(record_moments=True)
    for layer in (layer_of(nnx.BatchNorm), ours):
        dx = nnx.grad(loss, argnums=1)(layer, data())
        np.testing.assert_array_equal(dx, 0)


# ---- bfloat16 ----


@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16"])
def test_bfloat16_evaluation(x_dtype):
    """Mean 100.3 and variance 0.01: Flax subtracts bfloat16 from bfloat16."""
    x = jnp.asarray([[100.3], [100.4], [100.2], [99.5]], x_dtype)
    outputs = []
    for norm in FLAX_AND_OURS:
        layer = norm(1, dtype=jnp.bfloat16, use_running_average=True, rngs=nnx.Rngs(0))
        fill(layer.mean, [100.3])
        fill(layer.var, [0.01])
        outputs.append(np.asarray(layer(x), np.float64))
    one, zero = np.ones(1), np.zeros(1)
    expected = oracle.normalize(x, layer.mean[...], layer.var[...], one, zero, (0,))
    assert_close(outputs[1], expected, tol=1e-2)
    assert np.abs(outputs[0] - expected).max() > 1  # Flax's


# ---- Linen and NNX to the bit ----


LINEN = [
    ("float32", {}),
    ("float32", {"dtype": jnp.bfloat16}),
    ("bfloat16", {"dtype": jnp.float16, "use_scale": False}),
    ("bfloat16", {"param_dtype": jnp.bfloat16, "use_bias": False}),
    ("float32", {"axis": 1, "momentum": 0.7, "epsilon": 1e-3, "unbiased": True}),
    ("bfloat16", {"skip_nonfinite_updates": True, "activation": nn.silu}),
]


@by_default(*LINEN[2:5:2], LINEN[5], of=LINEN)
def test_linen_equals_nnx_to_the_bit(of):
    """Output, statistics and gradients in training, and the output in evaluation."""
    x_dtype, options = of
    x, r = data(dtype=x_dtype), data(2, dtype=x_dtype)
    mask = np.random.default_rng(3).random((6, 4, 5, 1)) < 0.7
    layer = layer_of(
        features=4 if "axis" in options else 3,
        promote_dtype=lambda values, **_: values,  # Linen knows of no other
        **options,
    )
    linen = bnjax.linen.BatchNorm(use_running_average=False, **options)
    state = nnx.to_pure_dict(nnx.state(layer))
    params = {k: state[k] for k in ("scale", "bias") if k in state}
    v = {"params": params, "batch_stats": statistics(layer)}

    def of_linen(params, x):
        y, u = linen.apply(
            {**v, "params": params},
            x,
            mask=mask,
            residual=r,
            mutable=["batch_stats", "batch_moments"],
        )
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), (y, u)

    recording = nnx.view(layer, record_moments=True)

    def of_nnx(layer, x):
        y = layer(x, mask=mask, residual=r)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    g, (y, u) = jax.grad(of_linen, (0, 1), has_aux=True)(params, x)
    g_nnx, y_nnx = nnx.grad(of_nnx, argnums=(0, 1), has_aux=True)(recording, x)
    assert_same_bits(y_nnx, y)
    assert_same_bits((nnx.to_pure_dict(g_nnx[0]), g_nnx[1]), g)
    assert_same_bits(statistics(layer), u["batch_stats"])
    assert_same_bits(recording.moments.get_value(), u["batch_moments"]["moments"])
    v = {"params": params, **u}
    layer.eval()
    y = bnjax.linen.BatchNorm(use_running_average=True, **options).apply(v, x)
    y_nnx = layer(x)
    assert_same_bits(y_nnx, y)


# ---- the switches ----


def test_train_eval_view_and_call():
    x = data()
    model = Net(BatchNorm)
    assert model.norm.use_running_average is False
    model.eval()
    assert model.norm.use_running_average is True
    before = arrays(model)
    view = nnx.view(model, use_running_average=False, update_stats=False)
    assert (view.norm.use_running_average, model.norm.use_running_average) == (0, 1)
    assert view.norm.mean is model.norm.mean
    evaluated, trained = model(x), view(x)
    assert_same_bits(arrays(model), before)
    model.train()
    assert_same_bits(model(x), trained)
    assert not np.array_equal(arrays(model)["norm", "mean"], before["norm", "mean"])
    nnx.update(model, nnx.state(model))
    assert not np.allclose(evaluated, trained)


@pytest.mark.parametrize("attribute", [None, False, True])
@pytest.mark.parametrize("call", [None, False, True])
def test_the_call_takes_precedence(attribute, call):
    x = data()
    layer = layer_of(use_running_average=attribute)
    use_running = attribute if call is None else call
    if use_running is None:
        for norm in FLAX_AND_OURS:
            with pytest.raises(ValueError, match="No `use_running_average` argument"):
                layer_of(norm, use_running_average=None)(x)
        return
    given = (layer.mean[...], layer.var[...]) if use_running else None
    y = layer(x, call)
    affine = (layer.scale[...], layer.bias[...])
    expected = (
        oracle.normalize(x, *given, *affine, AXES)
        if use_running
        else oracle.batch_norm(x, *affine, AXES)
    )
    assert_close(y, expected)


@pytest.mark.parametrize("as_attribute", [False, True])
@pytest.mark.parametrize("use_running", [False, True])
@pytest.mark.parametrize("update", [None, False, True])
def test_two_switches(use_running, update, as_attribute):
    """Where statistics come from, and whether they are written: all six."""
    x = data()
    options, call = {"update_stats": not update}, {"update_stats": update}
    if update is None or as_attribute:
        options, call = {"update_stats": update}, {}
    layer = layer_of(use_running_average=use_running, momentum=0.8, **options)
    before = statistics(layer)
    layer(x, **call)
    writes = (not use_running) if update is None else update
    if not writes:
        assert_same_bits(statistics(layer), before)
        return
    count, mean, m2 = oracle.moments(x, AXES)
    expected = {
        name: 0.8 * np.asarray(before[name]) + 0.2 * new
        for name, new in (("mean", mean), ("var", m2 / count))
    }
    assert_trees_close(statistics(layer), expected)


def test_frozen_by_a_view_or_an_attribute():
    model = Net(BatchNorm)
    for frozen in (nnx.view(model, update_stats=False), model):
        frozen.set_attributes(update_stats=False)
        before = arrays(model)
        frozen(data())
        assert_same_bits(arrays(model), before)


@pytest.mark.parametrize("mask_shape", [(6, 1, 1, 1), (3,)])
def test_an_empty_mask_uses_and_keeps_the_running_statistics(mask_shape):
    x, layer = data(), layer_of(momentum=0.0)
    mask = np.zeros(mask_shape, bool)
    if mask_shape == (3,):
        mask[0] = True
    stats = statistics(layer)
    affine = (layer.scale[...], layer.bias[...])
    y = layer(x, mask=mask)
    has = mask if mask_shape == (3,) else np.zeros(3, bool)
    stored = oracle.normalize(x, stats["mean"], stats["var"], *affine, AXES)
    assert_close(y, np.where(has, oracle.batch_norm(x, *affine, AXES), stored))
    count, mean, m2 = oracle.moments(x, AXES)
    assert_close(layer.mean.get_value(), np.where(has, mean, stats["mean"]))
    assert_close(layer.var.get_value(), np.where(has, m2 / count, stats["var"]))


def test_a_poisoned_mask():
    x, layer = data(), layer_of(momentum=0.0)
    mask = np.random.default_rng(3).random((6, 4, 5, 1)) < 0.7
    y = layer(poison(x, mask), mask=mask)
    assert np.isfinite(y).all()
    count, mean, m2 = oracle.moments(x, AXES, mask)
    assert_close(layer.mean.get_value(), mean)
    assert_close(layer.var.get_value(), m2 / count)


@pytest.mark.parametrize("use_running", [False, True])
def test_activation_and_residual(use_running):
    x, r = data(), data(2)
    options = {"use_running_average": use_running, "update_stats": False}
    y = layer_of(activation=nnx.relu, **options)(x, residual=r)
    assert_close(y, nnx.relu(layer_of(**options)(x) + r))


def test_activation_costs_no_memory():
    layer = BatchNorm(64, dtype=jnp.bfloat16, activation=nnx.relu, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(layer)
    x = jnp.ones((64, 16, 16, 64), jnp.bfloat16)

    def f(state, x):
        layer = nnx.merge(graphdef, state)
        return layer(x), nnx.state(layer)

    assert residual_bytes(f, state, x) <= 1.01 * x.nbytes


# ---- recorded moments ----


@pytest.mark.parametrize("train", [False, True])
def test_recorded_moments_pool_all_calls(train):
    a, b = data(0), data(1) + 3
    model = Net(BatchNorm)
    before = nnx.graphdef(model)
    model.set_attributes(record_moments=True, use_running_average=not train)
    (path, empty) = nnx.to_flat_state(nnx.state(model, BatchMoments))[0]
    assert path == ("norm", "moments")
    assert isinstance(empty.get_value(), bnjax.Moments)
    assert_same_bits(empty.get_value(), bnjax.Moments.empty((5,)))

    @nnx.jit
    def step(model, x):
        model(x)

    graph = nnx.graphdef(model)
    step(model, a), step(model, b)
    assert nnx.graphdef(model) == graph
    both = np.asarray(model.first(jnp.concatenate([a, b])))
    popped = nnx.pop(model, BatchMoments)
    assert_trees_close(popped["norm"]["moments"].get_value(), pooled(both))
    assert model.norm.record_moments is False
    model.set_attributes(use_running_average=False)
    assert nnx.graphdef(model) == before
    model(a)  # and nothing is recorded
    assert not nnx.to_flat_state(nnx.state(model, BatchMoments))


def pooled(values):
    count, mean, m2 = oracle.moments(values, tuple(range(values.ndim - 1)))
    return bnjax.Moments(count.max(), mean, m2)


def test_recording_starts_empty_and_stops():
    model = Net(BatchNorm, update_stats=False)
    for _ in range(2):
        model.set_attributes(record_moments=True)
        model(data())
        assert model.norm.moments.get_value().count == 120
    model.set_attributes(record_moments=False)
    assert {path[-1] for path in arrays(model)} == {
        *("scale", "bias", "mean", "var", "kernel")
    }
    assert nnx.graphdef(model) == nnx.graphdef(Net(BatchNorm, update_stats=False))


@pytest.mark.parametrize("graph", [False, True])
def test_recording_in_a_view_leaves_the_model_alone(graph):
    model = Net(BatchNorm)
    view = nnx.view(model, record_moments=True, graph=graph)
    view(data())
    assert view.norm.moments.get_value().count == 120
    assert not nnx.to_flat_state(nnx.state(model, BatchMoments))
    again = nnx.view(view, record_moments=True, graph=graph)
    assert again.norm.moments.get_value().count == 0
    assert view.norm.moments.get_value().count == 120
    assert view.norm.mean is model.norm.mean


# ---- transforms ----


def test_jit_traces_once():
    traces = []

    @nnx.jit
    def step(layer, x):
        traces.append(1)
        return layer(x)

    layer, eager = layer_of(), layer_of()
    for seed in range(3):
        y, expected = step(layer, data(seed)), eager(data(seed))
        assert_close(y, np.asarray(expected))
    assert len(traces) == 1
    assert_trees_close(statistics(layer), statistics(eager))


def test_split_merge_and_plain_jit():
    layer, expected = layer_of(), layer_of()
    graphdef, params, stats = nnx.split(layer, nnx.Param, nnx.BatchStat)

    @jax.jit
    def step(params, stats, x):
        layer = nnx.merge(graphdef, params, stats)
        y = layer(x)
        return y, nnx.state(layer, nnx.BatchStat)

    with jax.checking_leaks():
        y, stats = step(params, stats, data())
    assert_close(y, np.asarray(expected(data())))
    nnx.update(layer, stats)
    assert_trees_close(statistics(layer), statistics(expected))


class Block(nnx.Module):
    def __init__(self, norm, rngs):
        self.linear = nnx.Linear(3, 3, use_bias=False, rngs=rngs)
        self.norm = norm(3, rngs=rngs)

    def __call__(self, x):
        return nnx.tanh(self.norm(self.linear(x)))


def stacked(norm, layers=4):
    make = nnx.vmap(lambda rngs: Block(norm, rngs), in_axes=0, out_axes=0)
    return make(nnx.Rngs(0).split(layers))


def test_vmap_over_layers():
    """Each layer its own batch, as one by one."""
    xs = data(shape=(4, 6, 5, 3))
    layers = stacked(BatchNorm)
    layers.set_attributes(record_moments=True)
    graphdef = nnx.graphdef(layers)

    def one(i):
        return jax.tree.map(lambda v: v[i], nnx.state(layers))

    one_by_one = [nnx.merge(graphdef, one(i)) for i in range(4)]
    ys = nnx.vmap(lambda layer, x: layer(x), in_axes=0)(layers, xs)
    for i, layer in enumerate(one_by_one):
        assert_close(ys[i], np.asarray(layer(xs[i])))
        expected = jax.tree.map(np.asarray, nnx.state(layer))
        assert_trees_close(one(i), expected)


def scan_layers(layers, x):
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def forward(layer, x):
        return layer(x)

    return forward(layers, x)


def test_scan_over_layers():
    x = data()
    ours, theirs = stacked(BatchNorm), stacked(nnx.BatchNorm)
    ours.set_attributes(record_moments=True)
    assert_close(scan_layers(ours, x), np.asarray(scan_layers(theirs, x)), tol=1e-4)
    moments = nnx.pop(ours, BatchMoments)["norm"]["moments"].get_value()
    assert_same_bits(moments.count, jnp.full(4, 120.0))
    expected = 0.01 * moments.mean  # from 0
    assert_close(ours.norm.mean.get_value(), expected)
    assert_trees_close(arrays(ours), arrays(theirs), tol=1e-4)  # four layers


def test_scan_over_steps():
    """The layer in the carry: its state keeps its structure and dtypes."""
    xs = data(shape=(5, 6, 4, 3))
    layer, expected = layer_of(), layer_of()
    for each in (layer, expected):
        each.set_attributes(record_moments=True)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def steps(layer, x):
        return layer, layer(x)

    _, ys = steps(layer, xs)
    assert_close(ys, np.stack([expected(x) for x in xs]))
    assert_trees_close(statistics(layer), statistics(expected))
    assert_trees_close(layer.moments.get_value(), pooled(xs), tol=2e-6)  # five merges


def test_remat_updates_once():
    def loss(model, x):
        return jnp.sum(jnp.sin(model(x)))

    def checkpointed(model, x):
        return jnp.sum(jnp.sin(nnx.remat(lambda model, x: model(x))(model, x)))

    plain, remat = Net(BatchNorm), Net(BatchNorm)
    g0 = nnx.jit(nnx.grad(loss, argnums=(0, 1)))(plain, data())
    g1 = nnx.jit(nnx.grad(checkpointed, argnums=(0, 1)))(remat, data())
    assert_trees_close(
        (nnx.to_pure_dict(g1[0]), g1[1]),
        jax.tree.map(np.asarray, (nnx.to_pure_dict(g0[0]), g0[1])),
        tol=1e-5,
    )
    assert_trees_close(arrays(remat), arrays(plain))


def test_remat_policy():
    """Less is stored than without it, and no matrix product runs twice."""
    options = {"use_running_average": False, "update_stats": False}
    graph, params, rest = nnx.split(Net(BatchNorm, **options), nnx.Param, ...)

    def measured(call):
        def loss(params, x):
            model = nnx.merge(graph, params, jax.tree.map(jnp.asarray, rest))
            return jnp.sum(jnp.sin(call(model, x)))

        jaxpr = jax.make_jaxpr(jax.grad(loss))(params, data())
        vjp = jax.vjp(loss, params, data())[1]
        stored = sum(leaf.nbytes for leaf in jax.tree.leaves(vjp))
        return str(jaxpr).count("dot_general"), stored

    products, stored = measured(lambda model, x: model(x))
    saving = nnx.remat(lambda model, x: model(x), policy=bnjax.remat_policy)
    products_saving, stored_saving = measured(saving)
    assert products_saving == products
    assert stored_saving < stored
    assert measured(nnx.remat(lambda model, x: model(x)))[0] > products


def test_gradients():
    x, dy = data(), data(9)
    layer = layer_of(update_stats=False)

    def loss(layer, x):
        return jnp.sum(layer(x) * dy)

    g, dx = nnx.grad(loss, argnums=(0, 1))(layer, x)
    assert {path for path, _ in nnx.to_flat_state(g)} == {("scale",), ("bias",)}
    expected = oracle.batch_norm_gradients(x, layer.scale[...], dy, AXES)
    actual = (dx, g["scale"].get_value(), g["bias"].get_value())
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, tol=2e-5)


MASK = np.ones((16, 1, 1, 1), bool)
MASK[[1, 4, 5, 9]] = False  # uneven, and one replica without any


def concatenated():
    """The layer after the whole batch on one device, and its output."""
    layer = layer_of()
    layer.set_attributes(record_moments=True)
    y = layer(data(shape=(16, 4, 5, 3)), mask=MASK)
    return layer, np.asarray(y)


def assert_is_concatenated(layer, y):
    expected, expected_y = concatenated()
    assert_close(y.reshape(expected_y.shape), expected_y, tol=5e-6)
    assert_trees_close(statistics(layer), statistics(expected), tol=5e-6)
    recorded, moments = (e.moments.get_value() for e in (layer, expected))
    assert_trees_close(recorded, jax.tree.map(np.asarray, moments), tol=5e-6)


def test_shard_map():
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    layer = layer_of(axis_name="data")
    layer.set_attributes(record_moments=True)
    spec = jax.P("data")

    @nnx.jit
    @nnx.shard_map(mesh=mesh, in_specs=(jax.P(), spec, spec), out_specs=spec)
    def step(layer, x, mask):
        return layer(x, mask=mask)

    y = step(layer, data(shape=(16, 4, 5, 3)), jnp.asarray(MASK))
    assert_is_concatenated(layer, y)


@pytest.mark.filterwarnings("ignore:jax.pmap:DeprecationWarning")
def test_pmap():
    layer = layer_of(axis_name="data")
    layer.set_attributes(record_moments=True)

    @nnx.pmap(in_axes=(None, 0, 0), out_axes=0, axis_name="data")
    def step(layer, x, mask):
        return layer(x, mask=mask)

    x = data(shape=(16, 4, 5, 3)).reshape(8, 2, 4, 5, 3)
    y = step(layer, x, jnp.asarray(MASK).reshape(8, 2, 1, 1, 1))
    assert_is_concatenated(layer, y)


def test_vmap_with_axis_name():
    layer = layer_of(axis_name="data")
    layer.set_attributes(record_moments=True)

    @nnx.vmap(in_axes=(None, 0, 0), out_axes=0, axis_name="data")
    def step(layer, x, mask):
        return layer(x, mask=mask)

    x = data(shape=(16, 4, 5, 3)).reshape(8, 2, 4, 5, 3)
    y = step(layer, x, jnp.asarray(MASK).reshape(8, 2, 1, 1, 1))
    assert_is_concatenated(layer, y)


def test_sharded_batch_under_jit():
    """Nothing to configure."""
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.P("data"))
    layer = layer_of()
    layer.set_attributes(record_moments=True)
    whole = data(shape=(16, 4, 5, 3)), jnp.asarray(MASK)
    x, mask = jax.device_put(whole, sharding)
    y = nnx.jit(lambda layer, x, mask: layer(x, mask=mask))(layer, x, mask)
    assert_is_concatenated(layer, y)


def test_groups_may_differ_in_size():
    groups = [[0, 3, 4], [1, 2, 5, 6, 7]]
    layer = layer_of(axis_name="data", axis_index_groups=groups, update_stats=False)
    step = nnx.vmap(lambda m, x: m(x), in_axes=(None, 0), axis_name="data")
    xs = data(shape=(8, 2, 4, 5, 3))
    ys = step(layer, xs)
    for group in map(np.array, groups):
        affine = (layer.scale[...], layer.bias[...])
        expected = oracle.batch_norm(np.concatenate(xs[group]), *affine, AXES)
        assert_close(np.concatenate(ys[group]), expected, tol=5e-6)


def test_eval_shape():
    abstract = nnx.eval_shape(lambda: Net(BatchNorm))
    assert abstract.norm.mean.shape == (5,)
    shape = nnx.eval_shape(lambda model, x: model(x), abstract, data())
    assert (shape.shape, shape.dtype) == ((6, 4, 5, 2), jnp.float32)


# ---- the bridge ----


def test_to_linen():
    """As a Linen module it is Flax's, in collections and after a step."""
    x = data()
    found = []
    for norm in FLAX_AND_OURS:
        module = nnx.bridge.to_linen(norm, 3)
        v = module.init(jax.random.key(0), x)
        y, u = module.apply(v, x, mutable=["batch_stats"])
        found.append((v, y, u))
    assert_trees_close(found[1], jax.tree.map(np.asarray, found[0]), tol=1e-5)
    assert set(found[1][0]) == {"params", "batch_stats"}
    assert_same_bits(found[1][0]["batch_stats"]["mean"], jnp.zeros(3))


def test_to_nnx():
    """The Linen layer as an NNX module, with the variables of the NNX layer."""
    x, layer = data(), BatchNorm(3, rngs=nnx.Rngs(0))
    layer.set_attributes(record_moments=True)
    bridged = nnx.bridge.ToNNX(
        bnjax.linen.BatchNorm(use_running_average=False), rngs=nnx.Rngs(0)
    ).lazy_init(x)
    y = bridged(x, mutable=["batch_stats", "batch_moments"])
    assert_same_bits(y, layer(x))
    theirs = nnx.state(bridged, nnx.Any(nnx.Param, nnx.BatchStat, BatchMoments))
    ours = nnx.state(layer)
    assert_same_bits(nnx.to_pure_dict(theirs), nnx.to_pure_dict(ours))
    types = [{p: type(v) for p, v in nnx.to_flat_state(s)} for s in (theirs, ours)]
    assert types[0] == types[1]


def test_tabulate_and_repr():
    assert "BatchNorm" in nnx.tabulate(
        Net(BatchNorm), data(), console_kwargs={"width": 200}
    )
    assert "BatchStat" in repr(Net(BatchNorm))
    info = nnx.view_info(Net(BatchNorm))
    assert "record_moments: bool | None = None" in info


# ---- errors ----


def test_errors():
    layer = BatchNorm(3, rngs=nnx.Rngs(0))
    before = arrays(layer)
    with pytest.raises(ValueError, match=r"mean has shape \(3,\): expected \(5,\)"):
        layer(data(shape=(4, 5)))
    with pytest.raises(ValueError, match="mask has shape"):
        layer(data(), mask=np.ones((6, 4), bool))
    with pytest.raises(ValueError, match=r"axis=7 is out of range"):
        BatchNorm(3, axis=7, rngs=nnx.Rngs(0))(data())
    with pytest.raises(ValueError, match=r"momentum=1\.5"):
        BatchNorm(3, momentum=1.5, rngs=nnx.Rngs(0))(data())
    with pytest.raises(NameError, match="axis_name='nowhere' is not bound"):
        BatchNorm(3, axis_name="nowhere", rngs=nnx.Rngs(0))(data())
    with pytest.raises(ValueError, match="Could not find"):
        layer.set_attributes(record_moment=True)
    BatchNorm(3, axis_name="nowhere", rngs=nnx.Rngs(0))(data(), True)
    assert_same_bits(arrays(layer), before)
    with pytest.raises(jax.errors.TracerBoolConversionError):
        nnx.jit(lambda layer, flag: layer(data(), flag))(layer, True)


def test_one_value_warns_in_training_only():
    layer = BatchNorm(3, rngs=nnx.Rngs(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(jnp.ones((1, 3)), use_running_average=True)
    with pytest.warns(bnjax.BatchNormWarning, match="one value per feature"):
        layer(jnp.ones((1, 3)))


@pytest.mark.parametrize("skip", [False, True])
def test_nonfinite_updates(skip):
    layer = layer_of(skip_nonfinite_updates=skip)
    before = statistics(layer)
    layer(data().at[0, 0, 0, 1].set(jnp.inf))
    if skip:
        assert_same_bits(statistics(layer), before)
    else:
        assert not np.isfinite(layer.mean[...]).all()


def test_unbiased_running_variance():
    layer = layer_of(momentum=0.0, unbiased=True)
    layer(data())
    count, _, m2 = oracle.moments(data(), AXES)
    assert_close(layer.var.get_value(), m2 / (count - 1))

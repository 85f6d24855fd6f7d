"""The Linen layer: a drop-in for flax.linen.BatchNorm, and what it adds."""

import functools
import inspect
import warnings

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import orbax.checkpoint as ocp
import pytest
from helpers import assert_close, assert_trees_close, covering, poison, residual_bytes

import bnjax

SHAPE = (6, 4, 5, 3)


def data(seed=0, shape=SHAPE, dtype="float32"):
    x = np.random.default_rng(seed).normal(size=shape) * 2 + 1
    return jnp.asarray(x, dtype)


def variables(seed=1, shape=(3,)):
    rng = np.random.default_rng(seed)
    positive = rng.uniform(0.5, 2, shape)
    return {
        "params": {
            "scale": _f32(rng.normal(size=shape)),
            "bias": _f32(rng.normal(size=shape)),
        },
        "batch_stats": {"mean": _f32(rng.normal(size=shape)), "var": _f32(positive)},
    }


def _f32(x):
    return jnp.asarray(x, jnp.float32)


# ---- the same as Flax ----


def test_arguments_are_flaxs_then_ours():
    """Flax's by position too; ours by keyword."""

    def arguments(cls):
        parameters = inspect.signature(cls).parameters.values()
        return [(p.name, p.default, p.kind.name) for p in parameters]

    theirs, ours = arguments(nn.BatchNorm), arguments(bnjax.BatchNorm)
    assert ours[: len(theirs)] == theirs
    assert ours[len(theirs) :] == [
        ("unbiased", False, "KEYWORD_ONLY"),
        ("update_stats", None, "KEYWORD_ONLY"),
        ("skip_nonfinite_updates", False, "KEYWORD_ONLY"),
        ("activation", None, "KEYWORD_ONLY"),
        ("frozen", False, "KEYWORD_ONLY"),
    ]
    assert bnjax.BatchNorm.__name__ == nn.BatchNorm.__name__
    assert bnjax.BatchNorm is bnjax.linen.BatchNorm


CONFIGURATIONS = [
    {},
    {"momentum": 0.9, "epsilon": 1e-3},
    {"use_bias": False},
    {"use_scale": False},
    {"use_scale": False, "use_bias": False},
    {"axis": 1},
    {"axis": (3, 1)},
    {"dtype": jnp.bfloat16},
    {"dtype": jnp.float16},
    {"param_dtype": jnp.bfloat16},
    {"use_fast_variance": False},
    {"force_float32_reductions": False},
    {"scale_init": nn.initializers.normal(), "bias_init": nn.initializers.normal()},
]


@covering(
    strength=1,
    number=range(len(CONFIGURATIONS)),
    x_dtype=["float32", "bfloat16", "complex64"],
)
def test_equals_flax(number, x_dtype):
    """Variables, init output, training output and update, evaluation output."""
    options = CONFIGURATIONS[number]
    masked = (number + ["float32", "bfloat16", "complex64"].index(x_dtype)) % 2
    if x_dtype == "complex64" and options.get("dtype") is not None:
        options = {**options, "dtype": jnp.complex64}
    x = data(dtype=x_dtype)
    if x_dtype == "complex64":
        x = x + 1j * data(5)
    mask = np.random.default_rng(3).random((6, 4, 5, 1)) < 0.7 if masked else None
    run = {"axis": -1, **options}
    theirs, ours = nn.BatchNorm(**run), bnjax.BatchNorm(**run)
    y0, start = theirs.init_with_output(jax.random.key(0), x, False, mask=mask)
    y1, v = ours.init_with_output(jax.random.key(0), x, False, mask=mask)
    jax.tree.map(np.testing.assert_array_equal, v, start)
    assert jax.tree.structure(v) == jax.tree.structure(start)
    assert list(v.get("params", {})) == list(start.get("params", {}))
    # Flax computes half-precision statistics when asked to; bnjax does not.
    half = x_dtype == "bfloat16" and "force_float32_reductions" in options
    tol = (
        2e-2 if half else {"float32": 1e-5, "complex64": 1e-5}.get(y0.dtype.name, 1e-2)
    )
    assert_close(y1, y0, dtype=y0.dtype, tol=tol)
    for _ in range(2):
        y0, u0 = theirs.apply(start, x, False, mask=mask, mutable=["batch_stats"])
        y1, u1 = ours.apply(v, x, False, mask=mask, mutable=["batch_stats"])
        assert_close(y1, y0, dtype=y0.dtype, tol=tol)
        assert_trees_close(u1, u0, tol=2e-2 if half else 1e-5)
        assert jax.tree.map(lambda a: a.dtype, u1) == jax.tree.map(
            lambda a: a.dtype, u0
        )
        start, v = {**start, **u0}, {**v, **u1}
    if x_dtype == "complex64" and "force_float32_reductions" in options:
        return  # Flax drops the imaginary part of the running mean here
    y0, y1 = theirs.apply(start, x, True), ours.apply(v, x, True)
    assert_close(y1, y0, dtype=y0.dtype, tol=tol)


def test_tree_is_flaxs_and_nothing_else():
    v = bnjax.BatchNorm(use_running_average=False).init(jax.random.key(0), data())
    assert jax.tree.map(lambda a: (a.shape, a.dtype.name), v) == {
        "params": {"scale": ((3,), "float32"), "bias": ((3,), "float32")},
        "batch_stats": {"mean": ((3,), "float32"), "var": ((3,), "float32")},
    }
    assert list(v["params"]) == ["scale", "bias"]


class Net(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x, train):
        for features in (8, 5):
            x = nn.Conv(features, (3, 3), use_bias=False)(x)
            x = nn.relu(self.norm_class()(use_running_average=not train)(x))
        return nn.Dense(2)(x.mean((1, 2)))

    def norm_class(self):
        return self.norm


def test_checkpoints_load_both_ways(tmp_path):
    """With orbax and with flax.serialization; auto-names come from the class name."""
    x = data()
    theirs, ours = Net(nn.BatchNorm), Net(bnjax.BatchNorm)
    init = jax.jit(nn.Module.init, static_argnums=(0, 3))
    saved = init(theirs, jax.random.key(0), x, True)
    saved = {**saved, **theirs.apply(saved, x, True, mutable=["batch_stats"])[1]}
    fresh = init(ours, jax.random.key(7), x, True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "flax", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "flax", fresh)
        assert_close(
            ours.apply(restored, x, False), theirs.apply(saved, x, False), tol=1e-5
        )
        mine = {**restored, **ours.apply(restored, x, True, mutable=["batch_stats"])[1]}
        checkpointer.save(tmp_path / "bnjax", mine)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "bnjax", saved)
    assert_close(theirs.apply(back, x, False), ours.apply(mine, x, False), tol=1e-5)
    again = flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(saved))
    assert_close(ours.apply(again, x, False), theirs.apply(saved, x, False), tol=1e-5)


def test_training_follows_flax():
    """Ten steps of gradient descent: the same losses and running statistics."""
    x, target = data(), data(4, (6, 2))

    def train(norm):
        net = Net(norm)
        v = Net(nn.BatchNorm).init(jax.random.key(0), x, True)

        def loss(params, stats):
            y, updates = net.apply(
                {"params": params, "batch_stats": stats},
                x,
                True,
                mutable=["batch_stats"],
            )
            return jnp.mean((y - target) ** 2), updates["batch_stats"]

        def step(carry, _):
            params, stats = carry
            (value, stats), g = jax.value_and_grad(loss, has_aux=True)(params, stats)
            params = jax.tree.map(lambda p, g: p - 0.1 * g, params, g)
            return (params, stats), value

        return jax.lax.scan(step, (v["params"], v["batch_stats"]), length=10)

    (_, stats), losses = jax.jit(train, static_argnums=0)(bnjax.BatchNorm)
    (_, flax_stats), flax_losses = jax.jit(train, static_argnums=0)(nn.BatchNorm)
    assert_close(losses, flax_losses, tol=1e-3)  # ten steps amplify rounding
    assert_trees_close(stats, flax_stats, tol=1e-3)


# ---- the switches ----


def test_immutable_statistics_raise_as_in_flax():
    layer = bnjax.BatchNorm(use_running_average=False)
    with pytest.raises(flax.errors.ModifyScopeVariableError):
        layer.apply(variables(), data())


def test_missing_statistics_raise_in_evaluation_as_in_flax():
    layer = bnjax.BatchNorm(use_running_average=True)
    with pytest.raises(flax.errors.ScopeCollectionNotFound):
        layer.apply({"params": variables()["params"]}, data())


def test_missing_statistics_are_recreated_in_training_as_in_flax():
    params = {"params": variables()["params"]}
    for norm in (nn.BatchNorm, bnjax.BatchNorm):
        _, u = norm(use_running_average=False).apply(
            params, data(), mutable=["batch_stats"]
        )
        mean = np.asarray(data()).mean((0, 1, 2))
        assert_close(u["batch_stats"]["mean"], 0.01 * mean, tol=1e-5)


@pytest.mark.parametrize("given", [(None, None), (True, False)])
def test_use_running_average_exactly_once(given):
    field, call = given
    with pytest.raises(ValueError, match="use_running_average"):
        bnjax.BatchNorm(use_running_average=field).apply(variables(), data(), call)


def test_use_running_average_may_not_be_traced():
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.jit(lambda flag: bnjax.BatchNorm().apply(variables(), data(), flag))(True)


@pytest.mark.parametrize("as_field", [False, True])
@pytest.mark.parametrize("use_running", [False, True])
@pytest.mark.parametrize("update", [None, False, True])
def test_two_switches(use_running, update, as_field):
    """Where statistics come from, and whether they are written: all six."""
    v, x = variables(), data()
    field, call = (
        ({"update_stats": update}, {}) if as_field else ({}, {"update_stats": update})
    )
    layer = bnjax.BatchNorm(use_running_average=use_running, momentum=0.8, **field)
    writes = (not use_running) if update is None else update
    if not writes:
        y = layer.apply(v, x, **call)  # without mutable
        _, same = layer.apply(v, x, **call, mutable=["batch_stats"])
        jax.tree.map(
            np.testing.assert_array_equal, same["batch_stats"], v["batch_stats"]
        )
    else:
        y, updates = layer.apply(v, x, **call, mutable=["batch_stats"])
        count, mean, m2 = oracle.moments(x, (0, 1, 2))
        expected = {"mean": mean, "var": m2 / count}
        expected = jax.tree.map(
            lambda old, new: 0.8 * np.asarray(old) + 0.2 * new,
            v["batch_stats"],
            expected,
        )
        assert_trees_close(updates["batch_stats"], expected)
    if use_running:
        source = (v["batch_stats"]["mean"], v["batch_stats"]["var"])
        expected = oracle.normalize(x, *source, *_affine(v), (0, 1, 2))
    else:
        expected = oracle.batch_norm(x, *_affine(v), (0, 1, 2))
    assert_close(y, expected)


LAYERS = {
    "batch": bnjax.BatchNorm,
    "ghost": functools.partial(bnjax.linen.GhostBatchNorm, virtual_batch_size=3),
    "split": functools.partial(bnjax.linen.SplitBatchNorm, num_splits=2),
    "whiten": bnjax.linen.DecorrelatedBatchNorm,
    "remat": nn.remat(bnjax.BatchNorm),
}


@covering(strength=1, name=LAYERS, masked=[True, False])
def test_a_layer_without_running_statistics(name, masked):
    """Neither read nor written, they are not asked for; `init` declares them."""
    layer, x = LAYERS[name](False, update_stats=False), data()
    mask = np.arange(6).reshape(6, 1, 1, 1) % 3 > 0 if masked else None
    v = layer.init(jax.random.key(0), x)
    assert len(v["batch_stats"]) == 2
    v = {**v, "params": variables(shape=v["params"]["scale"].shape)["params"]}
    params = {"params": v["params"]}
    expected = np.asarray(layer.apply(v, x, mask=mask))
    assert_close(layer.apply(params, x, mask=mask), expected, tol=0)
    y, left = layer.apply(params, x, mask=mask, mutable=["batch_stats"])
    assert_close(y, expected, tol=0)
    assert left == {}
    other = {**params, "batch_stats": {}}
    assert_close(layer.apply(other, x, mask=mask), expected, tol=0)
    if name == "batch":
        valid = np.broadcast_to(True if mask is None else mask, x.shape)
        exact = oracle.wide(x)[valid].reshape(-1, 3)
        y = (oracle.wide(x) - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
        scale, bias = map(oracle.wide, _affine(v))
        assert_close(expected[valid], (y * scale + bias)[valid], tol=1e-5)
    if name != "remat":  # which traces its arguments
        at_call = LAYERS[name](False).apply(params, x, mask=mask, update_stats=False)
        assert_close(at_call, expected, tol=0)
        _, left = layer.apply(params, x, mask=mask, mutable=["batch_moments"])
        _, whole = layer.apply(v, x, mask=mask, mutable=["batch_moments"])
        assert_trees_close(left, jax.tree.map(np.asarray, whole), tol=0)


def test_one_layer_of_a_model_without_running_statistics():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = bnjax.BatchNorm(True, name="with")(x)
            return bnjax.BatchNorm(False, update_stats=False, name="without")(x)

    v, x = Two().init(jax.random.key(0), data()), data()
    stats = {"with": v["batch_stats"]["with"]}
    y = Two().apply({**v, "batch_stats": stats}, x)
    assert_close(y, Two().apply(v, x), tol=0)


@pytest.mark.parametrize(
    "layer",
    [
        bnjax.BatchNorm(True, update_stats=False),
        bnjax.BatchNorm(False),
        bnjax.BatchNorm(False, update_stats=True),
        bnjax.linen.BatchRenorm(False, update_stats=False),
    ],
)
def test_statistics_that_are_used_or_written_are_asked_for(layer):
    """Batch renormalization trains by them, also where it does not write them."""
    with pytest.raises(flax.errors.ScopeCollectionNotFound):
        layer.apply({"params": variables()["params"]}, data())


def _affine(v):
    return v["params"]["scale"], v["params"]["bias"]


def test_unbiased_running_variance():
    layer = bnjax.BatchNorm(use_running_average=False, momentum=0.0, unbiased=True)
    y, u = layer.apply(variables(), data(), mutable=["batch_stats"])
    count, _, m2 = oracle.moments(data(), (0, 1, 2))
    assert_close(u["batch_stats"]["var"], m2 / (count - 1))
    assert_close(y, oracle.batch_norm(data(), *_affine(variables()), (0, 1, 2)))


@pytest.mark.parametrize("skip", [False, True])
def test_nonfinite_updates(skip):
    layer = bnjax.BatchNorm(use_running_average=False, skip_nonfinite_updates=skip)
    v, x = variables(), data().at[0, 0, 0, 1].set(jnp.inf)
    stats = layer.apply(v, x, mutable=["batch_stats"])[1]["batch_stats"]
    if skip:
        jax.tree.map(np.testing.assert_array_equal, stats, v["batch_stats"])
    else:
        assert not np.isfinite(stats["mean"]).all()
    finite = layer.apply(v, data(), mutable=["batch_stats"])[1]["batch_stats"]
    assert not np.array_equal(finite["mean"], v["batch_stats"]["mean"])


def test_activation_and_residual_cost_no_memory():
    x = jnp.ones((64, 32, 32, 64), jnp.bfloat16)
    layer = bnjax.BatchNorm(
        use_running_average=False, dtype=jnp.bfloat16, activation=nn.relu
    )
    v = layer.init(jax.random.key(0), x)

    def f(params, x, r):
        y, u = layer.apply(
            {**v, "params": params}, x, residual=r, mutable=["batch_stats"]
        )
        return y, u

    assert residual_bytes(f, v["params"], x, x) <= 2.001 * x.nbytes


@pytest.mark.parametrize("use_running", [False, True])
def test_activation_and_residual(use_running):
    v, x, r = variables(), data(), data(2)
    layer = bnjax.BatchNorm(use_running_average=use_running, activation=nn.relu)
    y = layer.apply(v, x, residual=r, update_stats=False)
    plain = bnjax.BatchNorm(use_running_average=use_running)
    assert_close(y, nn.relu(plain.apply(v, x, update_stats=False) + r))


# ---- empty batches, masks, one value ----


@pytest.mark.parametrize("mask_shape", [(6, 1, 1, 1), (3,)])
def test_an_empty_mask_uses_and_keeps_the_running_statistics(mask_shape):
    v, x = variables(), data()
    mask = np.zeros(mask_shape, bool)
    if mask_shape == (3,):
        mask[0] = True
    layer = bnjax.BatchNorm(use_running_average=False, momentum=0.0)
    y, u = layer.apply(v, poison(x, mask), mask=mask, mutable=["batch_stats"])
    assert np.isfinite(y).all()
    y, u = layer.apply(v, x, mask=mask, mutable=["batch_stats"])
    stats = v["batch_stats"]
    stored = oracle.normalize(x, stats["mean"], stats["var"], *_affine(v), (0, 1, 2))
    batch = oracle.batch_norm(x, *_affine(v), (0, 1, 2))
    has = np.broadcast_to(mask, (3,) if mask_shape == (3,) else SHAPE)[..., :3]
    assert_close(y, np.where(has, batch, stored))
    count, mean, m2 = oracle.moments(x, (0, 1, 2))
    has = mask if mask_shape == (3,) else np.zeros(3, bool)
    assert_close(u["batch_stats"]["mean"], np.where(has, mean, stats["mean"]))
    assert_close(u["batch_stats"]["var"], np.where(has, m2 / count, stats["var"]))


def test_one_value_warns_in_training_only():
    x = jnp.ones((1, 3))
    layer = bnjax.BatchNorm()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        v = layer.init(jax.random.key(0), x, False)
        layer.apply(v, x, True)
    with pytest.warns(bnjax.BatchNormWarning, match="one value per feature"):
        layer.apply(v, x, False, mutable=["batch_stats"])


# ---- batch_moments ----


def test_batch_moments_when_mutable_and_only_then():
    x = data()
    v = Net(bnjax.BatchNorm).init(jax.random.key(0), x, True)
    assert set(v) == {"params", "batch_stats"}
    for train in (False, True):
        _, u = Net(bnjax.BatchNorm).apply(
            v, x, train, mutable=["batch_stats", "batch_moments"]
        )
        assert set(u["batch_moments"]) == {"BatchNorm_0", "BatchNorm_1"}
        conv = nn.Conv(8, (3, 3), use_bias=False).apply(
            {"params": v["params"]["Conv_0"]}, x
        )
        m = u["batch_moments"]["BatchNorm_0"]["moments"]
        assert isinstance(m, bnjax.Moments)
        _, mean, m2 = oracle.moments(conv, (0, 1, 2))
        assert_close(m.mean, mean)
        assert_close(m.m2, m2)
    for mutable in (["batch_stats"], True, flax.core.DenyList("params")):
        _, u = Net(bnjax.BatchNorm).apply(v, x, True, mutable=mutable)
        assert "batch_moments" not in u


def test_batch_moments_below_remat():
    layer = nn.remat(bnjax.BatchNorm)(use_running_average=False)
    _, u = layer.apply(variables(), data(), mutable=["batch_stats", "batch_moments"])
    assert_close(u["batch_moments"]["moments"].mean, np.asarray(data()).mean((0, 1, 2)))


class Twice(nn.Module):
    @nn.compact
    def __call__(self, a, b):
        norm = bnjax.BatchNorm(use_running_average=False, momentum=0.5)
        return norm(a), norm(b)


def test_a_layer_called_twice_pools_its_moments_and_updates_twice():
    a, b = data(0), data(1) + 3
    v = Twice().init(jax.random.key(0), a, b)
    _, u = Twice().apply(v, a, b, mutable=["batch_stats", "batch_moments"])
    both = np.concatenate([a, b])
    _, mean, m2 = oracle.moments(both, (0, 1, 2))
    m = u["batch_moments"]["BatchNorm_0"]["moments"]
    assert_close(m.count, np.array(240.0))
    assert_close(m.mean, mean)
    assert_close(m.m2, m2)
    means = [np.asarray(t, np.float64).mean((0, 1, 2)) for t in (a, b)]
    expected = 0.5 * (0.5 * means[0]) + 0.5 * means[1]
    assert_close(u["batch_stats"]["BatchNorm_0"]["mean"], expected)


def test_double_precision():
    with jax.enable_x64(True):
        x = data(dtype="float64")
        layer = bnjax.BatchNorm(use_running_average=False, param_dtype=jnp.float64)
        v = layer.init(jax.random.key(0), x)
        y, u = layer.apply(v, x, mutable=["batch_stats"])
        assert_close(y, oracle.batch_norm(x, np.ones(3), np.zeros(3), (0, 1, 2)))
        theirs = nn.BatchNorm(use_running_average=False, param_dtype=jnp.float64)
        _, e = theirs.apply(v, x, mutable=["batch_stats"])
        assert jax.tree.map(lambda a: a.dtype, u) == jax.tree.map(lambda a: a.dtype, e)


def test_half_precision_running_statistics_when_asked():
    layer = bnjax.BatchNorm(
        use_running_average=False,
        param_dtype=jnp.bfloat16,
        force_float32_reductions=False,
    )
    v = layer.init(jax.random.key(0), data())
    _, u = layer.apply(v, data(), mutable=["batch_stats"])
    for tree in (v, u):
        assert {a.dtype.name for a in jax.tree.leaves(tree["batch_stats"])} == {
            "bfloat16"
        }


# ---- Flax's transforms ----


def apply_train(layer):
    return lambda v, x: layer.apply(v, x, mutable=["batch_stats"])


def test_remat_updates_once():
    plain = bnjax.BatchNorm(use_running_average=False, momentum=0.5)
    remat = nn.remat(bnjax.BatchNorm)(use_running_average=False, momentum=0.5)

    def run(layer):
        def loss(v, x):
            y, u = apply_train(layer)(v, x)
            return jnp.sum(jnp.sin(y)), u

        (_, u), g = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
            variables(), data()
        )
        return u, g

    (u, g), (expected_u, expected_g) = run(remat), run(plain)
    assert_trees_close(u, jax.tree.map(np.asarray, expected_u))
    assert_trees_close(g, jax.tree.map(np.asarray, expected_g), tol=1e-5)


class Block(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x, _):
        x = nn.Dense(3, use_bias=False)(x)
        norm = bnjax.BatchNorm if self.norm is bnjax.BatchNorm else nn.BatchNorm
        return nn.tanh(norm(use_running_average=False)(x)), None


def scan_over_layers(norm):
    return nn.scan(
        Block,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        length=4,
    )(norm)


def test_scan_over_layers():
    x = data()
    v = scan_over_layers(nn.BatchNorm).init(jax.random.key(0), x, None)
    ours, theirs = (
        scan_over_layers(norm).apply(v, x, None, mutable=["batch_stats"])
        for norm in (bnjax.BatchNorm, nn.BatchNorm)
    )
    expected = jax.tree.map(np.asarray, theirs)
    assert_trees_close(ours, expected, tol=1e-4)  # four layers


def test_vmap_with_axis_name():
    """As in Flax's own test: shared variables need synchronized statistics."""

    def build(norm):
        return nn.vmap(
            norm,
            in_axes=0,
            variable_axes={"params": None, "batch_stats": None},
            split_rngs={"params": False},
            axis_name="batch",
        )(use_running_average=False, axis_name="batch")

    x = data()
    v = build(nn.BatchNorm).init(jax.random.key(0), x)
    ours, theirs = (
        build(norm).apply(v, x, mutable=["batch_stats"])
        for norm in (bnjax.BatchNorm, nn.BatchNorm)
    )
    assert_trees_close(ours, jax.tree.map(np.asarray, theirs), tol=1e-5)


def test_axis_name_is_ignored_in_init_and_evaluation():
    layer = bnjax.BatchNorm(axis_name="nowhere")
    v = layer.init(jax.random.key(0), data(), False)
    layer.apply(v, data(), True)
    with pytest.raises(NameError, match="axis_name='nowhere' is not bound"):
        layer.apply(v, data(), False, mutable=["batch_stats"])


def test_data_parallel_step_equals_one_device():
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    x = data(shape=(16, 4, 5, 3))
    mask = np.ones((16, 1, 1, 1), bool)
    mask[[1, 4, 5, 9]] = False  # uneven, and one replica without any

    def step(layer, v, x, mask):
        return layer.apply(v, x, mask=mask, mutable=["batch_stats"])

    one = step(bnjax.BatchNorm(use_running_average=False), variables(), x, mask)
    spec = jax.P("data")
    sharded = jax.shard_map(
        functools.partial(
            step, bnjax.BatchNorm(use_running_average=False, axis_name="data")
        ),
        mesh=mesh,
        in_specs=(jax.P(), spec, spec),
        out_specs=(spec, jax.P()),
    )
    many = jax.jit(sharded)(variables(), x, mask)
    assert_trees_close(many, jax.tree.map(np.asarray, one), tol=5e-6)


def test_does_not_trace_again():
    layer, traces = bnjax.BatchNorm(use_running_average=False), []

    @jax.jit
    def step(v, x):
        traces.append(1)
        _, u = layer.apply(v, x, mutable=["batch_stats"])
        return {**v, **u}

    v = variables()
    for seed in range(3):
        v = step(v, data(seed))
    assert len(traces) == 1


def test_tabulate_and_shapes():
    table = Net(bnjax.BatchNorm).tabulate(
        jax.random.key(0), data(), True, console_kwargs={"width": 200}
    )
    assert "BatchNorm_1" in table
    layer = bnjax.BatchNorm(use_running_average=False)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), data())
    assert shapes["batch_stats"]["mean"].shape == (3,)
    with jax.checking_leaks():
        jax.jit(apply_train(layer))(variables(), data())


@covering(
    fields=[
        {},
        {"param_dtype": jnp.complex64},
        {"param_dtype": jnp.complex64, "force_float32_reductions": False},
        {"force_float32_reductions": False},
    ],
    dtype=[None, jnp.complex64],
    is_complex=[True, False],
)
def test_running_statistics_keep_their_dtype(is_complex, fields, dtype):
    """A loop over training steps, and a checkpoint restored into fresh variables."""
    x = data() + 1j * data(5) if is_complex else data()
    layer = bnjax.BatchNorm(use_running_average=False, dtype=dtype, **fields)
    variables = layer.init(jax.random.key(0), x)
    stats = variables["batch_stats"]
    assert stats["var"].dtype == jnp.float32
    assert jnp.iscomplexobj(stats["mean"]) == is_complex

    def step(stats, _):
        _, updates = layer.apply(
            {**variables, "batch_stats": stats}, x, mutable=["batch_stats"]
        )
        return updates["batch_stats"], None

    stats, _ = jax.lax.scan(step, stats, None, length=400)
    _, mean, m2 = oracle.moments(x, (0, 1, 2))
    keep = 1 - 0.99**400
    assert_close(stats["mean"], mean * keep, tol=1e-5)
    assert_close(stats["var"], m2 / 120 * keep + 1 - keep, tol=1e-5)


@pytest.mark.parametrize(
    ("x_dtype", "fields"),
    [
        ("float32", {"param_dtype": jnp.float64}),
        ("float64", {"dtype": jnp.float32}),
        ("float64", {"dtype": jnp.bfloat16}),
        ("float64", {}),
        ("float32", {"dtype": jnp.float64}),
        ("bfloat16", {"param_dtype": jnp.float64}),
        ("float32", {"param_dtype": jnp.complex64}),
    ],
)
def test_dtypes_of_the_running_statistics_are_flaxs(x_dtype, fields):
    """Else a scan over training steps changes the type of its carry."""
    with jax.enable_x64(True):
        x = data(dtype=x_dtype)
        dtypes = []
        for norm in (nn.BatchNorm, bnjax.BatchNorm):
            layer = norm(use_running_average=False, **fields)

            @jax.jit
            def run(x, layer=layer):
                v = layer.init(jax.random.key(0), x)
                return layer.apply(v, x, mutable=["batch_stats"])

            dtypes.append(jax.tree.map(lambda a: a.dtype, run(x)))
        assert dtypes[0] == dtypes[1]

"""Layers of bnjax in the place of Flax's, in NNX models that somebody else wrote."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import assert_close, assert_trees_close, residual_bytes

import bnjax.nnx

KINDS = {
    "batch": bnjax.nnx.BatchNorm,
    "ghost": functools.partial(bnjax.nnx.GhostBatchNorm, virtual_batch_size=4),
    "renorm": functools.partial(bnjax.nnx.BatchRenorm, warmup_steps=2),
}


class Named(nnx.BatchNorm):
    """A class of the model's author that changes no call."""


class Scaled(nnx.BatchNorm):
    """With a variable that an optimizer may know."""

    def __init__(self, num_features, *, rngs):
        super().__init__(num_features, rngs=rngs)
        self.gain = nnx.Param(jnp.ones(2))


class OurLouder(bnjax.nnx.BatchNorm):
    def __call__(self, x, *args, **kwargs):
        return 2 * super().__call__(x, *args, **kwargs)


class Louder(nnx.BatchNorm):
    def __call__(self, x, *args, **kwargs):
        return 2 * super().__call__(x, *args, **kwargs)


class Stem(nnx.Module):
    def __init__(self, norm, *, rngs):
        self.conv = nnx.Conv(3, 6, (3, 3), use_bias=False, rngs=rngs)
        self.norm = norm(6, momentum=0.8, epsilon=1e-3, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.conv(x)))


class Model(nnx.Module):
    """Layers in an attribute, a Sequential, a list, a dict; shared, and stacked."""

    def __init__(self, norm=nnx.BatchNorm, *, rngs):
        self.stem = Stem(norm, rngs=rngs)
        self.body = nnx.Sequential(
            nnx.Conv(6, 6, (3, 3), rngs=rngs), norm(6, use_bias=False, rngs=rngs)
        )
        self.list = nnx.List([norm(6, use_scale=False, rngs=rngs)])
        self.dict = nnx.Dict(first=norm(6, dtype=jnp.float32, rngs=rngs))
        self.again = self.dict["first"]
        self.stacked = make_stack(functools.partial(norm, 6), rngs)

    def __call__(self, x):
        x = self.list[0](self.body(self.stem(x)))
        x = self.dict["first"](x) + self.again(2 * x)
        return run_stack(self.stacked, x)


def make_stack(norm, rngs):
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def stack(rngs):
        return norm(rngs=rngs)

    return stack(rngs)


def run_stack(layers, x):
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x, layer):
        return layer(x) + 1

    return run(x, layers)


def images(seed=0):
    return jax.random.normal(jax.random.key(seed), (8, 5, 7, 3)) + 0.5


def step(model):
    """Loss, gradients and what is stored afterwards."""

    def loss(model):
        return jnp.mean(jnp.sin(model(images())) ** 2)

    value, gradients = nnx.value_and_grad(loss)(model)
    return value, nnx.to_pure_dict(gradients), stats(model)


def stats(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


@pytest.mark.parametrize(
    "kind",
    [
        "batch",
        *(pytest.param(k, marks=pytest.mark.full) for k in KINDS if k != "batch"),
    ],
)
def test_as_if_the_source_had_been_changed(kind):
    swapped = Model(KINDS[kind], rngs=nnx.Rngs(0))
    replaced, found = bnjax.nnx.replace_batch_norm(Model(rngs=nnx.Rngs(0)), KINDS[kind])
    name = {"batch": "BatchNorm", "ghost": "GhostBatchNorm", "renorm": "BatchRenorm"}
    assert {each.after for each in found} == {f"bnjax.nnx.{name[kind]}"}
    assert len(found) == 5
    for _ in range(2):
        assert_trees_close(step(replaced), step(swapped), tol=1e-6)
    x = images(1)
    for model in (replaced, swapped):
        model.eval()
    assert_close(replaced(x), np.asarray(swapped(x)), tol=1e-6)


def test_what_the_author_set_stays():
    model = Model(rngs=nnx.Rngs(0))
    model.eval()
    old = model.stem.norm
    old.scale = nnx.Param(
        jnp.arange(6.0), out_sharding=("model",), eager_sharding=False, tag="mine"
    )
    replaced, _ = bnjax.nnx.replace_batch_norm(model, unbiased=True)
    new = replaced.stem.norm
    assert replaced is model
    assert new.scale is old.scale
    assert new.mean is old.mean
    assert new.scale.get_metadata()["tag"] == "mine"
    assert new.scale.get_metadata()["out_sharding"] == ("model",)
    assert (new.momentum, new.epsilon, new.use_running_average) == (0.8, 1e-3, True)
    assert new.unbiased
    assert replaced.list[0].scale is None
    assert replaced.body.layers[1].bias is None
    assert replaced.again is replaced.dict["first"]
    assert replaced.stacked.mean.shape == (3, 6)


def test_an_optimizer_that_was_made_before_fits():
    results = []
    for replace in (False, True):
        model = Model(
            bnjax.nnx.BatchNorm if not replace else nnx.BatchNorm, rngs=nnx.Rngs(0)
        )
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
        if replace:
            model, _ = bnjax.nnx.replace_batch_norm(model)

        def loss(model):
            return jnp.mean(jnp.sin(model(images())) ** 2)

        for _ in range(2):
            optimizer.update(model, nnx.grad(loss)(model))
        results.append(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    assert_trees_close(results[1], jax.tree.map(np.asarray, results[0]), tol=1e-5)


def test_where_and_what_is_left():
    model = Model(rngs=nnx.Rngs(0))
    model.list.append(Louder(6, rngs=nnx.Rngs(1)))
    model.list.append(Named(6, rngs=nnx.Rngs(2)))
    model.list.append(Scaled(6, rngs=nnx.Rngs(3)))
    _, found = bnjax.nnx.replace_batch_norm(model, where=["list/*", "stem/*"])
    reasons = {each.path: (each.after, each.reason) for each in found}
    ours = "bnjax.nnx.BatchNorm", ""
    assert reasons["stem/norm"] == ours
    assert reasons["list/0"] == ours
    assert reasons["list/1"] == (None, "Louder overrides __call__")
    assert reasons["list/2"] == ours
    assert reasons["list/3"] == (None, "Scaled has variables of its own: gain")
    assert type(model.list[3]) is Scaled
    assert reasons["stacked"] == (None, "where does not match it")
    assert type(model.list[1]) is Louder
    _, again = bnjax.nnx.replace_batch_norm(model)
    assert {e.path: e.reason for e in again}["stem/norm"] == "is a layer of bnjax"
    assert {e.path: e.after for e in again}["stacked"] == "bnjax.nnx.BatchNorm"


def test_a_row_for_each_domain():
    model, _ = bnjax.nnx.replace_batch_norm(
        Model(rngs=nnx.Rngs(0)), bnjax.nnx.SplitBatchNorm, num_splits=2
    )
    assert model.stem.norm.mean.shape == (2, 6)
    assert model.stacked.scale.shape == (3, 2, 6)
    assert np.isfinite(model(images())).all()
    shared, _ = bnjax.nnx.replace_batch_norm(
        nnx.BatchNorm(6, rngs=nnx.Rngs(0)),
        bnjax.nnx.SplitBatchNorm,
        num_splits=2,
        shared_affine=True,
    )
    assert (shared.scale.shape, shared.var.shape) == ((6,), (2, 6))
    layer = nnx.BatchNorm(
        6,
        rngs=nnx.Rngs(0),
        scale_metadata={"out_sharding": ("m",), "eager_sharding": False},
    )
    _, found = bnjax.nnx.replace_batch_norm(
        layer, bnjax.nnx.SplitBatchNorm, num_splits=2
    )
    assert found[0].reason == "the sharding of scale is that of one row"


def test_restored_is_as_before():
    model, untouched = Model(rngs=nnx.Rngs(0)), Model(rngs=nnx.Rngs(0))
    bnjax.nnx.replace_batch_norm(model)
    _, found = bnjax.nnx.restore_batch_norm(model)
    assert {each.after for each in found} == {"flax.nnx.BatchNorm"}
    assert type(model.stem.norm) is nnx.BatchNorm
    assert nnx.graphdef(model) == nnx.graphdef(untouched)
    assert_trees_close(step(model), jax.tree.map(np.asarray, step(untouched)), tol=1e-6)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (
            bnjax.nnx.BatchNorm(3, activation=nnx.relu, rngs=nnx.Rngs(0)),
            "no activation",
        ),
        (bnjax.nnx.BatchNorm(3, frozen=True, rngs=nnx.Rngs(0)), "Flax has no frozen"),
        (
            bnjax.nnx.SplitBatchNorm(3, num_splits=2, rngs=nnx.Rngs(0)),
            "other variables",
        ),
        (nnx.BatchNorm(3, rngs=nnx.Rngs(0)), "is a layer of Flax"),
        (OurLouder(3, rngs=nnx.Rngs(0)), "OurLouder overrides __call__"),
    ],
)
def test_what_cannot_be_restored(layer, reason):
    same, found = bnjax.nnx.restore_batch_norm(layer)
    assert same is layer
    assert reason in found[0].reason


def test_what_is_lost():
    layer = bnjax.nnx.BatchRenorm(3, warmup_steps=5, rngs=nnx.Rngs(0))
    _, found = bnjax.nnx.restore_batch_norm(layer)
    assert found[0].reason == "lost: steps"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"layer": bnjax.nnx.DecorrelatedBatchNorm},
            TypeError,
            "expected BatchNorm, Gh",
        ),
        ({"layer": bnjax.BatchNorm}, TypeError, "expected BatchNorm, .* of bnjax.nnx"),
        ({"layer": "BatchNorm"}, TypeError, "layer='BatchNorm' does not have the var"),
        (
            {"layer": functools.partial(bnjax.nnx.BatchNorm, axis=0)},
            ValueError,
            "axis=0 is given, but a layer that is replaced keeps",
        ),
        (
            {"use_bias": False},
            ValueError,
            "use_bias=False is given, but a layer that is replaced keeps",
        ),
        ({"where": "nowhere/*"}, ValueError, "nowhere"),
        ({"virtual_batch_size": 4}, TypeError, "virtual_batch_size"),
    ],
)
def test_refused_and_untouched(arguments, error, message):
    model = Model(rngs=nnx.Rngs(0))
    before = nnx.graphdef(model)
    with pytest.raises(error, match=message):
        bnjax.nnx.replace_batch_norm(model, **arguments)
    assert nnx.graphdef(model) == before


def test_a_layer_in_a_tuple_is_left():
    class Odd(nnx.Module):
        def __init__(self):
            self.pair = nnx.data((nnx.BatchNorm(3, rngs=nnx.Rngs(0)), 1))

    model = Odd()
    _, found = bnjax.nnx.replace_batch_norm(model)
    assert found[0].reason == "is held by a tuple or an unknown container"
    assert type(model.pair[0]) is nnx.BatchNorm


def zoo(library):
    """A ResNet as model zoos of NNX write it; `library` has the BatchNorm it uses."""

    class Block(nnx.Module):
        def __init__(self, features_in, features, stride, *, rngs):
            conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
            self.conv1 = conv(features_in, features, (3, 3), stride, padding=1)
            self.bn1 = library.BatchNorm(features, momentum=0.9, rngs=rngs)
            self.conv2 = conv(features, features, (3, 3), padding=1)
            self.bn2 = library.BatchNorm(features, momentum=0.9, rngs=rngs)
            if stride > 1 or features_in != features:
                self.downsample = nnx.Sequential(
                    conv(features_in, features, (1, 1), stride),
                    library.BatchNorm(features, momentum=0.9, rngs=rngs),
                )
            else:
                self.downsample = None

        def __call__(self, x):
            y = nnx.relu(self.bn1(self.conv1(x)))
            y = self.bn2(self.conv2(y))
            x = x if self.downsample is None else self.downsample(x)
            return nnx.relu(x + y)

    class ResNet(nnx.Module):
        def __init__(self, *, rngs):
            self.stem = nnx.Sequential(
                nnx.Conv(3, 4, (3, 3), padding=1, use_bias=False, rngs=rngs),
                library.BatchNorm(4, momentum=0.9, rngs=rngs),
                nnx.relu,
            )
            self.layers = nnx.List(
                [
                    nnx.Sequential(Block(4, 4, 1, rngs=rngs)),
                    nnx.Sequential(Block(4, 6, 2, rngs=rngs)),
                ]
            )
            self.fc = nnx.Linear(6, 10, rngs=rngs)

        def __call__(self, x):
            x = self.stem(x)
            for layer in self.layers:
                x = layer(x)
            return self.fc(x.mean((1, 2)))

    return ResNet(rngs=nnx.Rngs(0))


def kept(model):
    """Bytes that reverse mode keeps of a step."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def f(params, rest):
        return nnx.merge(graphdef, params, rest)(images())

    return residual_bytes(f, params, rest)


def test_a_zoo_resnet():
    model, swapped = zoo(nnx), zoo(bnjax.nnx)
    kept_by_flax = kept(model)
    model, found = bnjax.nnx.replace_batch_norm(model)
    assert len(found) == 6
    assert {each.after for each in found} == {"bnjax.nnx.BatchNorm"}
    assert kept(model) == kept(swapped) < 0.8 * kept_by_flax
    for _ in range(2):
        assert_trees_close(step(model), step(swapped), tol=1e-6)
    model.eval()
    swapped.eval()
    assert_close(model(images(1)), np.asarray(swapped(images(1))), tol=1e-6)


def test_a_replaced_layer_keeps_its_input_and_no_more():
    layer = nnx.BatchNorm(6, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(512, 6)), jnp.bfloat16)

    def bytes_of(layer):
        graphdef, state = nnx.split(layer)
        f = lambda state, x: nnx.merge(graphdef, state)(x)  # noqa: E731
        return residual_bytes(f, state, x)

    assert bytes_of(layer) >= 2 * x.nbytes
    assert bytes_of(bnjax.nnx.replace_batch_norm(layer)[0]) <= 1.03 * x.nbytes


@pytest.mark.full
def test_the_tools_for_a_zoo_resnet():
    def tools(model):
        parts = nnx.split(
            nnx.view(model, record_moments=True), nnx.Param, nnx.BatchStat, ...
        )
        graphdef, states = (
            parts[0],
            dict(zip(("params", "batch_stats", "rest"), parts[1:])),
        )

        def loss_fn(variables, x):
            model = nnx.merge(graphdef, *(variables[name] for name in states))
            return jnp.sin(model(x)).mean(), nnx.state(model, bnjax.nnx.BatchMoments)

        def collect(variables, x):
            return loss_fn(variables, x)[1]

        batches = jnp.stack([images(), 3 * images(1)])
        pooled = bnjax.population.pooled(collect, states, batches)
        accumulate = functools.partial(
            bnjax.training.accumulate, loss_fn, rule=bnjax.running.ema(0.9)
        )
        accumulated = jax.jit(accumulate)(states, batches)
        moments = jax.jit(collect)(states, batches[1])
        variables = {name: nnx.to_pure_dict(states[name]) for name in states}
        report = bnjax.diagnostics.report(variables, batch_moments=moments)
        nnx.update(model, accumulated.batch_stats)
        model.eval()
        folded = bnjax.fold.fold_model(model, images())
        y = jax.jit(folded.apply)(folded.params, images())
        assert_close(y, np.asarray(model(images())), tol=1e-5)
        assert len(folded.folded) == 6
        trees = pooled, accumulated.grads, accumulated.batch_stats
        return (*map(nnx.to_pure_dict, trees), y), (str(report), folded.folded)

    replaced, words = tools(bnjax.nnx.replace_batch_norm(zoo(nnx))[0])
    expected, expected_words = tools(zoo(bnjax.nnx))
    assert words == expected_words
    assert_trees_close(replaced, expected, tol=1e-5)


def test_options_take_precedence():
    """An axis for a model that was written for one device."""
    model = Model(rngs=nnx.Rngs(0))
    model, _ = bnjax.nnx.replace_batch_norm(model, axis_name="batch", momentum=0.5)
    norm = model.stem.norm
    assert (norm.axis_name, norm.momentum, norm.epsilon) == ("batch", 0.5, 1e-3)
    part = functools.partial(bnjax.nnx.BatchNorm, momentum=0.5, axis_name="batch")
    model, _ = bnjax.nnx.replace_batch_norm(
        Model(rngs=nnx.Rngs(0)), part, axis_name="replicas"
    )
    norm = model.stem.norm
    assert (norm.axis_name, norm.momentum, norm.epsilon) == ("replicas", 0.5, 1e-3)

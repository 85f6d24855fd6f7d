"""Layers of bnjax in the place of Flax's, in Linen models that somebody else wrote."""

import functools
import operator
import threading
import types

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_trees_close, by_default, residual_bytes
from jax.sharding import AxisType, PartitionSpec

import bnjax
from bnjax.linen import replacing_batch_norm

COLLECTIONS = ["batch_stats", "batch_moments"]


def models(library, collections=("params", "batch_stats")):
    """Models as their authors write them.

    Args:
        library: has the BatchNorm that they use.
        collections: what their nn.vmap and nn.scan lift.
    """
    axes = dict.fromkeys(collections, 0)

    class BottleneckBlock(nn.Module):
        """With fields for the classes, as in Flax's example of ImageNet."""

        filters: int
        conv: type
        norm: type
        act: type
        strides: tuple[int, int] = (1, 1)

        @nn.compact
        def __call__(self, x):
            y = self.act(self.norm()(self.conv(self.filters, (1, 1))(x)))
            y = self.norm()(self.conv(self.filters, (3, 3), self.strides)(y))
            y = self.conv(self.filters * 4, (1, 1))(self.act(y))
            y = self.norm(scale_init=nn.initializers.zeros_init())(y)
            if x.shape != y.shape:
                x = self.conv(self.filters * 4, (1, 1), self.strides, name="conv_proj")(
                    x
                )
                x = self.norm(name="norm_proj")(x)
            return self.act(x + y)

    class ResNet(nn.Module):
        stages: tuple[int, ...] = (1,)  # one block, instead of sixteen
        filters: int = 4
        dtype: type = jnp.float32

        @nn.compact
        def __call__(self, x, train=True):
            conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
            norm = functools.partial(
                library.BatchNorm,
                use_running_average=not train,
                momentum=0.9,
                epsilon=1e-5,
                dtype=self.dtype,
                axis_name="batch",
            )
            x = conv(self.filters, (3, 3), (2, 2), name="conv_init")(x)
            x = nn.relu(norm(name="bn_init")(x))
            for i, blocks in enumerate(self.stages):
                for j in range(blocks):
                    strides = (2, 2) if i > 0 and j == 0 else (1, 1)
                    x = BottleneckBlock(
                        self.filters * 2**i, conv, norm, nn.relu, strides
                    )(x)
            return nn.Dense(10, dtype=self.dtype)(x.mean((1, 2)))

    class Critic(nn.Module):
        """CrossQ's in SBX: normalized inputs and layers."""

        width: int = 8

        @nn.compact
        def __call__(self, x, action, train):
            x = jnp.concatenate([x, action], -1)
            x = library.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            for _ in range(1):  # instead of two layers
                x = nn.relu(nn.Dense(self.width)(x))
                x = library.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            return nn.Dense(1)(x)

    class VectorCritic(nn.Module):
        critics: int = 2

        @nn.compact
        def __call__(self, x, action, train=True):
            vmapped = nn.vmap(
                Critic,
                variable_axes=axes,
                split_rngs={"params": True},
                in_axes=None,
                out_axes=0,
                axis_size=self.critics,
            )
            return vmapped()(x, action, train)

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, train=True):
            x = nn.Dense(x.shape[-1])(x)
            return nn.relu(library.BatchNorm(use_running_average=not train)(x)), None

    class Lifted(nn.Module):
        """Below remat, scan and jit; in a list of `setup`; shared."""

        def setup(self):
            self.layers = [nn.Dense(5), library.BatchNorm(use_scale=False)]
            self.again = nn.remat(library.BatchNorm, static_argnums=(2,))()
            self.block = nn.remat(Layer, static_argnums=(2,))()
            self.stack = nn.scan(
                Layer,
                variable_axes=axes,
                split_rngs={"params": True},
                length=3,
                in_axes=nn.broadcast,
            )()
            self.compiled = nn.jit(Layer, static_argnums=(2,))()

        def __call__(self, x, train=True):
            x = self.layers[0](x)
            for norm in (self.layers[1], self.again, self.again):
                x = norm(x + 1, not train)
            for block in (self.block, self.stack, self.compiled):
                x, _ = block(x, train)
            return x

    return types.SimpleNamespace(
        resnet=ResNet, critic=VectorCritic, lifted=Lifted, layer=Layer
    )


THEIRS, SWAPPED = models(nn), models(bnjax, ("params", *COLLECTIONS))
LAYERS = {"resnet": 5, "critic": 2, "lifted": 5}
NAMES = by_default("resnet", name=[*LAYERS])


@pytest.fixture
def arrays():
    """By model, the inputs of a call."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(2 * rng.normal(size=shape) + 1, jnp.float32)

    return {
        "resnet": (normal(8, 12, 14, 3),),
        "critic": (normal(14, 3), normal(14, 2)),
        "lifted": (normal(9, 4),),
    }


def pair(name):
    """The model as it is, and with the class swapped in its source."""
    return getattr(THEIRS, name)(), getattr(SWAPPED, name)()


def init(model, arrays):
    variables = jax.jit(model.init)(jax.random.key(0), *arrays)

    def shaken(path, value):  # scales that begin at 0
        own = path[-1].key in ("scale", "bias")
        key = jax.random.key(len(path) + value.size)
        return value + own * 0.3 * jax.random.normal(key, value.shape)

    return {**variables, "params": jax.tree.map_with_path(shaken, variables["params"])}


def step(model, variables, *arrays, mutable=("batch_stats",)):
    """Loss, gradients and what was updated, on one device of an axis `batch`."""

    def loss(params):
        y, updates = model.apply(
            {**variables, "params": params}, *arrays, mutable=mutable
        )
        return jnp.mean(jnp.sin(y) ** 2), (y, updates)

    f = on_an_axis(jax.value_and_grad(loss, has_aux=True))
    return jax.jit(f)(variables["params"])


def evaluate(model):
    return jax.jit(functools.partial(model.apply, train=False))


def on_an_axis(f):
    """The function with an axis `batch` of one device in its scope."""

    def run(*args):
        return jax.vmap(
            lambda _: f(*args), axis_name="batch", axis_size=1, out_axes=None
        )(jnp.zeros(1))

    return run


@NAMES
def test_as_if_the_source_had_been_changed(name, arrays):
    model, swapped = pair(name)
    variables = init(model, arrays[name])
    with replacing_batch_norm() as found:
        assert_trees_close(init(model, arrays[name]), variables, tol=0)
        replaced = step(model, variables, *arrays[name])
        evaluated = evaluate(model)(variables, *arrays[name])
    assert len(found) == LAYERS[name]
    assert {each.after for each in found.values()} == {"bnjax.linen.BatchNorm"}
    assert {each.before for each in found.values()} == {"flax.linen.BatchNorm"}
    expected = step(swapped, variables, *arrays[name])
    assert_trees_close(replaced, expected, tol=1e-6)
    expected = evaluate(swapped)(variables, *arrays[name])
    assert_close(evaluated, np.asarray(expected), tol=1e-6)


@NAMES
def test_what_is_kept_for_the_backward_pass(name, arrays):
    """As many bytes as with the swapped source, and fewer than with Flax's layers."""
    model, swapped = pair(name)
    variables = init(model, arrays[name])

    def kept(model):
        def f(params):
            return model.apply(
                {**variables, "params": params}, *arrays[name], mutable=["batch_stats"]
            )[0]

        return residual_bytes(on_an_axis(f), variables["params"])

    with replacing_batch_norm():
        replaced = kept(model)
    assert replaced == kept(swapped)
    if name == "resnet":  # whose layers are large against its vectors
        assert replaced < 0.8 * kept(model)


def test_a_layer_keeps_its_input_and_no_more():
    layer = nn.BatchNorm(use_running_average=False)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(512, 6)), jnp.bfloat16)
    variables = layer.init(jax.random.key(0), x)

    def f(params, x):
        variables_of_step = {**variables, "params": params}
        return layer.apply(variables_of_step, x, mutable=["batch_stats"])[0]

    assert residual_bytes(f, variables["params"], x) >= 2 * x.nbytes
    with replacing_batch_norm():
        assert residual_bytes(f, variables["params"], x) <= 1.03 * x.nbytes


@by_default("critic", name=[*LAYERS])
def test_the_tools_for_their_models(name, arrays):
    """Also below an nn.vmap or nn.scan that does not name batch_moments."""
    model, swapped = pair(name)
    variables = init(model, arrays[name])
    batches = [arrays[name], jax.tree.map(lambda x: 3 * x + 1, arrays[name])]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)

    def tools(model):
        @on_an_axis
        def collect(variables, arrays):
            return model.apply(variables, *arrays, mutable=COLLECTIONS)

        def loss_fn(variables, arrays):
            y, updates = collect(variables, arrays)
            return jnp.mean(jnp.sin(y) ** 2), (y, updates)

        stats = bnjax.population.pooled(collect, variables, batches)
        accumulate = functools.partial(
            bnjax.training.accumulate, loss_fn, rule=bnjax.running.ema(0.9)
        )
        accumulated = jax.jit(accumulate)(variables, stacked)
        moments = collect(variables, batches[1])[1]["batch_moments"]
        report = bnjax.diagnostics.report(variables, batch_moments=moments)
        trained = {**variables, "batch_stats": accumulated.batch_stats}
        apply, params, folded, kept = bnjax.fold.fold_model(
            model, trained, *arrays[name], train=False
        )
        evaluated = jax.jit(apply)(params, *arrays[name])
        expected = evaluate(model)(trained, *arrays[name])
        assert_close(evaluated, np.asarray(expected), tol=1e-5)
        return (
            (stats, accumulated.grads, accumulated.batch_stats, moments, evaluated),
            (str(report), folded, dict(kept)),
        )

    with replacing_batch_norm():
        replaced, words = tools(model)
    expected, expected_words = tools(swapped)
    assert words == expected_words
    assert_trees_close(replaced, expected, tol=1e-5)


def test_statistics_that_a_loop_carries(arrays):
    """Their Moments fit nowhere, and the error says so."""
    (x,) = arrays["lifted"]

    class Loop(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = THEIRS.layer()
            if self.is_initializing():
                return layer(x)[0]
            scan = nn.scan(
                lambda layer, x, _: layer(x),
                variable_broadcast="params",
                variable_carry="batch_stats",
                split_rngs={"params": False},
                length=3,
            )
            return scan(layer, x, None)[0]

    variables = Loop().init(jax.random.key(0), x)
    expected = Loop().apply(variables, x, mutable=["batch_stats"])
    with replacing_batch_norm():
        updates = Loop().apply(variables, x, mutable=["batch_stats"])
        with pytest.raises(TypeError) as error:
            Loop().apply(variables, x, mutable=COLLECTIONS)
        with pytest.raises(flax.errors.ScopeParamShapeError) as other:
            Loop().apply(variables, x[:, :3], mutable=COLLECTIONS)  # before the layer
    assert_trees_close(updates, jax.tree.map(np.asarray, expected), tol=1e-5)
    notes = " ".join(error.value.__notes__)
    assert "stored the Moments of Layer_0/BatchNorm_0 among its batch_stats" in notes
    assert "Leave batch_moments out of mutable" in notes
    assert not any("Moments" in n for n in getattr(other.value, "__notes__", ()))


def test_what_the_author_calls_moments_stays(arrays):
    class Author(nn.Module):
        @nn.compact
        def __call__(self, x):
            own = self.variable("batch_stats", "own", lambda: {"moments": jnp.ones(2)})
            own.value = {"moments": own.value["moments"] + 1}
            return nn.BatchNorm(use_running_average=False, name="moments")(x)

    (x,) = arrays["lifted"]
    variables = Author().init(jax.random.key(0), x)
    _, expected = Author().apply(variables, x, mutable=["batch_stats"])
    with replacing_batch_norm():
        _, updates = Author().apply(variables, x, mutable=COLLECTIONS)
    expected = jax.tree.map(np.asarray, expected["batch_stats"])
    assert_trees_close(updates["batch_stats"], expected, tol=1e-6)
    assert updates["batch_moments"].keys() == {"moments"}
    assert updates["batch_moments"]["moments"]["moments"].count == 9


def test_jit_serves_each_its_own_program(arrays):
    """One jitted function, inside and outside of contexts: traced once for each."""
    model, (x,) = THEIRS.layer(), arrays["lifted"]
    variables, traced = init(model, (x,)), []

    @jax.jit
    def f(variables, x):
        traced.append(None)
        return model.apply(variables, x, True, mutable=COLLECTIONS)[1]

    def has_moments():
        return bool(f(variables, x).get("batch_moments"))

    for _ in range(2):
        assert not has_moments()
        with replacing_batch_norm():
            assert has_moments()
        with replacing_batch_norm(momentum=0.5):
            assert has_moments()
        ghost = functools.partial(bnjax.linen.GhostBatchNorm, virtual_batch_size=3)
        with replacing_batch_norm(ghost):  # made anew, but equal
            assert has_moments()
    assert len(traced) == 4


@pytest.mark.parametrize("transform", [jax.checkpoint, jax.jit, nn.jit])
def test_caches_inside_of_a_program(transform, arrays):
    """What JAX and Flax keep of a function that was traced before."""
    (x,) = arrays["lifted"]
    if transform is nn.jit:
        model = nn.jit(THEIRS.layer, static_argnums=(2,))()
    else:
        model = THEIRS.layer()
    variables = init(model, (x,))

    def f(variables, x):
        return model.apply(variables, x, True, mutable=["batch_stats"])[0]

    g = f if transform is nn.jit else transform(f)
    outside = str(jax.make_jaxpr(g)(variables, x))
    with replacing_batch_norm():
        inside = str(jax.make_jaxpr(g)(variables, x))
    assert inside != outside
    assert str(jax.make_jaxpr(g)(variables, x)) == outside


def paths(found):
    return {path for path, each in found.items() if each.after}


def test_where_and_nested(arrays):
    model, (x,) = THEIRS.resnet(), arrays["resnet"]
    variables = init(model, (x,))

    def call():  # traced anew
        f = functools.partial(model.apply, mutable=["batch_stats"])
        jax.eval_shape(on_an_axis(f), variables, x)

    with replacing_batch_norm(where=["bn_init", "*_0/BatchNorm_1"]) as outer:
        call()
        assert paths(outer) == {"bn_init", "BottleneckBlock_0/BatchNorm_1"}
        assert len(outer) == LAYERS["resnet"]
        assert outer["BottleneckBlock_0/norm_proj"].reason == "where does not match it"
        ghost = functools.partial(bnjax.linen.GhostBatchNorm, virtual_batch_size=4)
        with replacing_batch_norm(ghost, where="bn_*") as inner:
            call()
        assert inner["bn_init"].after == "bnjax.linen.GhostBatchNorm"
        assert outer["bn_init"].reason == "an inner context replaces it"
        assert paths(outer) == {"BottleneckBlock_0/BatchNorm_1"}
        call()
        assert "bn_init" in paths(outer)
    with pytest.warns(
        bnjax.BatchNormWarning, match=r"where='nowhere' has matched none"
    ):
        with replacing_batch_norm(where=["bn_init", "nowhere"]):
            call()


def test_it_ends_with_an_error(arrays):
    (x,) = arrays["lifted"]
    layer = nn.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), x)

    def has_moments():
        return "batch_moments" in layer.apply(variables, x, mutable=COLLECTIONS)[1]

    def fail():
        with replacing_batch_norm():
            assert has_moments()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not has_moments()
    with replacing_batch_norm():  # an error in the model, below a wish for Moments
        with pytest.raises(ValueError, match="use_running_average"):
            layer.apply(variables, x, True, mutable=COLLECTIONS)
        assert has_moments()


@pytest.mark.full
def test_moments_of_several_calls(arrays):
    """Of a function that calls a model twice, which has an nn.vmap."""
    model, both = THEIRS.critic(), [arrays["critic"]]
    both.append(jax.tree.map(lambda x: 3 * x, both[0]))
    variables = init(model, both[0])

    def twice(model, both):
        return [model(*arrays, train=True) for arrays in both]

    with replacing_batch_norm():
        _, updates = nn.apply(twice, model, mutable=COLLECTIONS)(variables, both)
    inputs = jnp.concatenate([jnp.concatenate(arrays, -1) for arrays in both])
    expected = jax.tree.map(np.asarray, bnjax.moments(inputs))
    layer = updates["batch_moments"]["VmapCritic_0"]["BatchNorm_0"]["moments"]
    for i in range(2):
        found = jax.tree.map(operator.itemgetter(i), layer)
        assert_trees_close(found, expected, tol=1e-5)


def test_threads(arrays):
    """A context holds in the thread that has entered it, and nowhere else."""
    (x,) = arrays["lifted"]
    layer = nn.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), x)
    f = jax.jit(lambda v, x: layer.apply(v, x, mutable=COLLECTIONS)[1])
    both, found = threading.Barrier(2, timeout=60), {}

    def run(replaces):
        for i in range(4):
            both.wait()
            if replaces:
                with replacing_batch_norm():
                    both.wait()
                    updates = f(variables, x)
            else:
                both.wait()
                updates = f(variables, x)
            found[replaces, i] = bool(updates.get("batch_moments"))

    threads = [threading.Thread(target=run, args=(r,)) for r in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {(r, i): r for r in (True, False) for i in range(4)}


def test_a_function_that_always_replaces(arrays):
    (x,) = arrays["lifted"]
    layer = nn.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), x)
    apply_fn = replacing_batch_norm(activation=nn.relu)(layer.apply)
    for f in (apply_fn, jax.jit(apply_fn, static_argnames="mutable")):
        y, _ = f(variables, x, mutable=("batch_stats",))
        assert y.min() == 0
        assert layer.apply(variables, x, mutable=["batch_stats"])[0].min() < 0


def test_an_axis_for_a_model_of_one_device(arrays):
    """Eight devices that share statistics agree with one that has the whole batch."""
    model, arrays = THEIRS.critic(), arrays["critic"]
    arrays = jax.tree.map(lambda x: jnp.concatenate([x, 2 * x, x - 1, x + 3]), arrays)
    variables = init(model, arrays)
    expected = SWAPPED.critic().apply(variables, *arrays, mutable=["batch_stats"])

    @replacing_batch_norm(axis_name="devices")
    def replica(variables, *arrays):
        return model.apply(variables, *arrays, mutable=["batch_stats"])

    mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("devices")
    assert jax.device_count() == 8
    found = jax.jit(
        jax.shard_map(
            replica,
            mesh=mesh,
            in_specs=(PartitionSpec(), rows, rows),
            out_specs=(PartitionSpec(None, "devices"), PartitionSpec()),
        )
    )(variables, *arrays)
    assert_trees_close(found, expected, tol=1e-5)


class Louder(nn.BatchNorm):
    """A class of the model's author that calls the layer below."""

    gain: float = 2.0

    @nn.compact
    def __call__(self, x, use_running_average=None):
        return self.gain * super().__call__(x, use_running_average)


class Own(nn.BatchNorm):
    """A class of the model's author that does all by itself."""

    @nn.compact
    def __call__(self, x, use_running_average=None):
        return x - x.mean()


def test_subclasses(arrays):
    (x,) = arrays["lifted"]
    louder = Louder(use_running_average=False, momentum=0.7)
    variables = louder.init(jax.random.key(0), x)
    expected = louder.apply(variables, x, mutable=["batch_stats"])
    with replacing_batch_norm() as found:
        y, updates = louder.apply(variables, x, mutable=COLLECTIONS)
        assert "batch_moments" in updates
        own = Own()
        own.apply(own.init(jax.random.key(0), x), x)
    assert (*found,) == ("",)
    assert found[""].after == "bnjax.linen.BatchNorm"
    assert found[""].before.endswith(".Louder")
    assert_trees_close(
        (y, updates["batch_stats"]), (expected[0], expected[1]["batch_stats"]), tol=1e-5
    )


VARIANTS = {
    "renorm": functools.partial(bnjax.linen.BatchRenorm, warmup_steps=3),
    "split": functools.partial(bnjax.linen.SplitBatchNorm, num_splits=2),
    "decorrelated": bnjax.linen.DecorrelatedBatchNorm,
}


@pytest.mark.full
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_have_their_own_variables(variant, arrays):
    model, arrays = THEIRS.critic(), arrays["critic"]
    with replacing_batch_norm(VARIANTS[variant]) as found:
        variables = init(model, arrays)
        q, updates = model.apply(variables, *arrays, mutable=["batch_stats"])
        jax.tree.map(
            lambda a, b: None, updates["batch_stats"], variables["batch_stats"]
        )
    stats = variables["batch_stats"]["VmapCritic_0"]["BatchNorm_0"]
    names = {"renorm": "mean var steps", "decorrelated": "mean cov"}
    assert {*stats} == {*names.get(variant, "mean var").split()}
    assert len(paths(found)) == LAYERS["critic"]
    assert np.isfinite(q).all()


@pytest.mark.full
def test_summaries_and_captured_results(arrays):
    """One call of a layer is seen once, as with Flax's."""
    model, (x,) = THEIRS.lifted(), arrays["lifted"]
    key = jax.random.key(0)
    variables = model.init(key, x)

    def summary():
        return model.tabulate(key, x, show_repeated=True, console_kwargs={"width": 200})

    def captured():
        _, updates = model.apply(
            variables, x, mutable=["batch_stats"], capture_intermediates=True
        )
        return jax.tree.map(jnp.shape, updates["intermediates"])

    expected = captured(), summary()
    with replacing_batch_norm():
        found = captured(), summary()
    assert found == expected


def test_other_interceptors_see_the_new_layer(arrays):
    (x,) = arrays["lifted"]
    model, seen = THEIRS.layer(), []

    def watch(run, args, kwargs, context):
        seen.append((type(context.module), context.method_name))
        return run(*args, **kwargs)

    variables = model.init(jax.random.key(0), x, True)
    with replacing_batch_norm(), nn.intercept_methods(watch):
        model.apply(variables, x, False)
    assert (bnjax.BatchNorm, "__call__") in seen


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layer": nn.Dense}, TypeError, "layer=.*: expected a class of bnjax.linen"),
        ({"layer": bnjax.nnx.BatchNorm}, TypeError, "expected a class of bnjax.linen"),
        (
            {"layer": functools.partial(bnjax.BatchNorm, True)},
            TypeError,
            "functools.partial\\(",
        ),
        (
            {"use_scale": False},
            ValueError,
            "use_scale=False is given, but a layer that",
        ),
        ({"use_running_average": True}, ValueError, "keeps its variables"),
        ({"virtual_batch_size": 3}, TypeError, "virtual_batch_size"),
        ({"axis_index_groups": [[0, 1]]}, TypeError, "not hashable.*Write a tuple"),
        ({"momentum": np.array(0.5)}, TypeError, r"not hashable.*float\(x\) for"),
    ],
)
def test_refused(arguments, error, message):
    with pytest.raises(error, match=message), replacing_batch_norm(**arguments):
        raise AssertionError("entered")

"""`bnjax.remat_policy`: what is kept, what is computed again, and what never is."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from helpers import assert_trees_close, by_default, collectives, residual_bytes
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import bnjax

BLOCKS, FEATURES = 3, 24


class Block(nn.Module):
    """Normalization, activation, convolution: the region starts at what is kept."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, z):
        norm = bnjax.BatchNorm(
            use_running_average=False, activation=nn.gelu, axis_name=self.axis_name
        )
        return nn.Conv(FEATURES, (3, 3), use_bias=False)(norm(z))


def network(block, axis_name=None):
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            z = nn.Conv(FEATURES, (3, 3), use_bias=False)(x)
            for i in range(BLOCKS):
                z = block(axis_name, name=f"block{i}")(z)
            return z

    return Network()


PLAIN = Block
KEPT = nn.remat(Block, policy=bnjax.remat_policy)


def images(batch=4):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(0.3, 2, (batch, 10, 9, 5)), jnp.float32)


def loss_of(net, variables):
    def loss(params, x):
        y, updates = net.apply(
            {**variables, "params": params}, x, mutable=["batch_stats"]
        )
        return jnp.sum(y * jnp.sin(jnp.arange(y.size).reshape(y.shape))), updates

    return loss


def equations(jaxpr, counts=None) -> dict[str, int]:
    """How many of each primitive, inner ones included."""
    counts = {} if counts is None else counts
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        counts[name] = counts.get(name, 0) + 1
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                equations(inner, counts)
    return counts


def gradient_of(block, region=lambda loss: loss):
    """The gradient of a network by its parameters and its input, and these."""
    net, x = network(block), images()
    variables = jax.jit(net.init)(jax.random.key(0), x)
    gradient = jax.grad(region(loss_of(net, variables)), has_aux=True)
    return gradient, variables["params"], x


def test_same_gradients_and_statistics():
    (plain, *args), (kept, *_) = gradient_of(PLAIN), gradient_of(KEPT)
    assert_trees_close(jax.jit(kept)(*args), jax.jit(plain)(*args), tol=2e-5)


def test_nothing_dear_runs_twice():
    def count(*case):
        jax.clear_caches()  # a trace that another test has left may have other sums
        gradient, *args = gradient_of(*case)
        return equations(jax.make_jaxpr(gradient)(*args).jaxpr)

    whole = functools.partial(jax.checkpoint, policy=bnjax.remat_policy)
    plain, twice = count(PLAIN), count(PLAIN, jax.checkpoint)
    for kept in (count(KEPT), count(PLAIN, whole)):
        for name in ("reduce_sum", "conv_general_dilated"):
            assert kept[name] == plain[name]
            assert twice[name] > plain[name]  # the count can tell


def test_one_array_per_convolution_is_kept():
    """Also where the blocks are not the regions, but all of them together are."""
    net, x = network(KEPT), images()
    variables = net.init(jax.random.key(0), x)
    features = 4 * 10 * 9 * FEATURES * 4
    kernels = sum(v.nbytes for v in jax.tree.leaves(variables["params"]))
    vectors = 64 * FEATURES * 4
    most = BLOCKS * features + x.nbytes + kernels + vectors
    loss = loss_of(net, variables)

    def of(loss):
        return residual_bytes(lambda p, x: loss(p, x)[0], variables["params"], x)

    weights = features  # of the loss
    assert of(loss) <= most + weights
    plain = loss_of(network(PLAIN), variables)
    assert of(plain) > 1.5 * most
    whole = jax.checkpoint(plain, policy=bnjax.remat_policy)
    assert of(whole) <= most + weights


@by_default(True, check_vma=[True, False])
def test_no_collective_runs_twice(check_vma):
    x = images(16)
    variables = network(PLAIN).init(jax.random.key(0), x)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def counts(block):
        loss = loss_of(network(block, "data"), variables)

        def local(params, x):
            def mean(params, x):
                value, updates = loss(params, x)
                return lax.pmean(value, "data"), updates

            return jax.grad(mean, argnums=1, has_aux=True)(params, x)

        f = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=(P("data"), P()),
            check_vma=check_vma,
        )
        return collectives(f, variables["params"], x)

    plain, kept = counts(PLAIN), counts(KEPT)
    assert plain["all-reduce"] >= BLOCKS  # forward; the backward ones may be joined
    assert kept == plain


def scanned(norm, dtype, policy):
    """16 blocks of convolution, normalization, ReLU, and the arguments of its loss.

    With a policy the body starts where a convolution ends, and is a checkpoint.
    """
    blocks, width = 16, 16
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(0.3, 2, (8, 20, 18, width)), dtype)
    layer = norm(use_running_average=False, dtype=dtype)
    stack = functools.partial(jax.tree.map, lambda v: jnp.stack([v] * blocks))
    variables = stack(layer.init(jax.random.key(0), x))
    kernels = jnp.asarray(rng.normal(0, 0.1, (blocks, 3, 3, width, width)), dtype)

    def conv(x, kernel):
        dims = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=dims
        )

    def normalized(z, variables):
        y, updates = layer.apply(variables, z, mutable=["batch_stats"])
        return nn.relu(y), updates

    def from_convolution(x, block):
        kernel, variables = block
        return normalized(conv(x, kernel), variables)

    def to_convolution(z, block):
        kernel, variables = block
        y, updates = normalized(z, variables)
        return conv(y, kernel), updates

    def loss(kernels, params, x):
        values = {**variables, "params": params}
        if policy is None:
            y, updates = lax.scan(from_convolution, x, (kernels, values))
        else:
            body = jax.checkpoint(to_convolution, policy=policy, prevent_cse=False)
            first = jax.tree.map(lambda v: v[:-1], values)
            last = jax.tree.map(lambda v: v[-1], values)
            z, updates = lax.scan(body, conv(x, kernels[0]), (kernels[1:], first))
            y, end = normalized(z, last)
            updates = jax.tree.map(
                lambda v, w: jnp.concatenate([v, w[None]]), updates, end
            )
        return jnp.sum(y.astype(jnp.float32) ** 2), updates

    return loss, (kernels, variables["params"], x)


@by_default("bfloat16", dtype=["bfloat16", "float32"])
def test_half_of_the_memory_in_a_scan(dtype):
    """The peak of temporary memory, of 16 blocks, against Flax's."""

    def peak(*how):
        loss, arguments = scanned(*how)
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        compiled = gradient.lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    flax = peak(nn.BatchNorm, dtype, None)
    ours = peak(bnjax.BatchNorm, dtype, bnjax.remat_policy)
    assert ours <= 0.5 * flax
    assert peak(bnjax.BatchNorm, dtype, None) <= 0.75 * flax


def test_the_scan_computes_the_same():
    results = []
    for how in ((nn.BatchNorm, None), (bnjax.BatchNorm, bnjax.remat_policy)):
        loss, arguments = scanned(how[0], "float32", how[1])
        results.append(loss(*arguments))
    assert_trees_close(results[1], results[0], tol=1e-4)  # sixteen layers on

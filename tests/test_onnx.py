"""Evaluated models as ONNX: pip install jax2onnx onnxruntime."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx
from helpers import assert_close

import bnjax

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of those packages' own
]


def images():
    return np.random.default_rng(0).normal(size=(2, 8, 6, 3)).astype(np.float32)


class Net(nn.Module):
    fused: bool

    @nn.compact
    def __call__(self, x, train=False):
        norm = bnjax.BatchNorm(not train, activation=nn.relu if self.fused else None)
        x = nn.Conv(5, (3, 3), use_bias=False)(x)
        x = norm(x, residual=x if self.fused else None)
        x = x if self.fused else nn.relu(x)
        x = bnjax.linen.GhostBatchNorm(not train, virtual_batch_size=2)(x)
        return nn.Dense(4)(x.mean((1, 2)))


def linen(fused):
    """With statistics that are neither 0 nor 1."""
    net, x = Net(fused), images()
    variables = net.init(jax.random.key(0), x)
    for _ in range(5):
        _, new = net.apply(variables, 3 * x + 1, True, mutable=["batch_stats"])
        variables = {**variables, **new}
    return lambda x: net.apply(variables, x)


def of_nnx(fused):
    rngs, x = nnx.Rngs(0), images()
    norm = bnjax.nnx.BatchNorm(5, activation=nnx.relu if fused else None, rngs=rngs)
    conv = nnx.Conv(3, 5, (3, 3), use_bias=False, rngs=rngs)
    net = nnx.Sequential(conv, norm, nnx.Linear(5, 4, rngs=rngs))
    for _ in range(5):
        net(3 * x + 1)
    net.eval()
    return net


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("model", [linen, of_nnx])
def test_an_evaluated_model(model, fused):
    jax2onnx = pytest.importorskip("jax2onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    f, x = model(fused), images()
    program = jax2onnx.to_onnx(f, [x.shape]).SerializeToString()
    session = onnxruntime.InferenceSession(program)
    (y,) = session.run(None, {session.get_inputs()[0].name: x})
    assert_close(y, np.asarray(f(x)), tol=1e-5)

"""Conversion against the real packages: outputs, a further step, and bad input."""

import functools
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from helpers import BOXES, assert_close, assert_trees_close
from jax.sharding import Mesh, PartitionSpec

import bnjax
from bnjax import convert

# Installed with [test] on Python 3.11; its wheels for others bring gigabytes of CUDA.
torch = pytest.importorskip("torch")

NAMES = {
    "stem": "Conv_0",
    "norms.0": "BatchNorm_0",
    "grouped": "Conv_1",
    "norms.1": "BatchNorm_1",
    "shortcut": "Conv_2",
    "up": "ConvTranspose_0",
    "norms.2": "BatchNorm_2",
    "head.0": "Dense_0",
    "head.1": "BatchNorm_3",
    "head.3": "Dense_1",
}


class TorchNet(torch.nn.Module):
    """Each kind of layer, none with as many inputs as outputs but the grouped one."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, (3, 5), 2, padding=(1, 2), bias=False)
        self.norms = torch.nn.ModuleList(torch.nn.BatchNorm2d(c) for c in (8, 12, 6))
        self.grouped = torch.nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.shortcut = torch.nn.Conv2d(8, 12, 1, bias=False)
        self.up = torch.nn.ConvTranspose2d(
            12, 6, (4, 3), 2, padding=1, output_padding=1, dilation=(1, 2)
        )
        self.head = torch.nn.Sequential(
            torch.nn.Linear(6, 10, bias=False),
            torch.nn.BatchNorm1d(10, momentum=0.3, eps=1e-3),
            torch.nn.ReLU(),
            torch.nn.Linear(10, 5),
        )

    def forward(self, x):
        x = torch.relu(self.norms[0](self.stem(x)))
        x = torch.relu(self.norms[1](self.grouped(x)) + self.shortcut(x))
        x = torch.relu(self.norms[2](self.up(x)))
        return self.head(x.mean((2, 3)))


class FlaxNet(nn.Module):
    """The same in bnjax."""

    @nn.compact
    def __call__(self, x, train=False):
        def norm(momentum=0.1, epsilon=1e-5):
            momentum = convert.momentum_from_torch(momentum)
            return bnjax.BatchNorm(
                not train, momentum=momentum, epsilon=epsilon, unbiased=True
            )

        x = nn.Conv(8, (3, 5), 2, padding=(1, 2), use_bias=False)(x)
        x = nn.relu(norm()(x))
        y = norm()(nn.Conv(12, (3, 3), padding=1, feature_group_count=4)(x))
        x = nn.relu(y + nn.Conv(12, (1, 1), use_bias=False)(x))
        low = (3 - 1, 2 * 2 - 1)
        padding = [(p, p + 1) for p in low]
        x = nn.ConvTranspose(6, (4, 3), (2, 2), padding, kernel_dilation=(1, 2))(x)
        x = nn.relu(norm()(x)).mean((1, 2))
        x = nn.Dense(10, use_bias=False)(x)
        x = nn.relu(norm(0.3, epsilon=1e-3)(x))
        return nn.Dense(5)(x)


def kinds_of(net):
    return {name: type(module).__name__ for name, module in net.named_modules()}


def images(seed, n=6):
    x = np.random.default_rng(seed).normal(2, 3, size=(n, 9, 11, 3))
    return x.astype(np.float32), np.arange(n) % 5


def to_nchw(x):
    return torch.tensor(np.moveaxis(x, -1, 1))


def train_torch(net, optimizer, seed):
    x, labels = images(seed)
    loss = torch.nn.functional.cross_entropy(net(to_nchw(x)), torch.tensor(labels))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@pytest.fixture(scope="module")
def nets():
    """(the torch net after four steps, its optimizer, the Flax net's shapes)."""
    torch.manual_seed(0)
    net = TorchNet().train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for seed in range(4):
        train_torch(net, optimizer, seed)
    x, _ = images(0)
    like = jax.eval_shape(FlaxNet().init, jax.random.key(0), x)
    return net, optimizer, like


@pytest.fixture
def converted(nets):
    net, _, like = nets
    return convert.from_torch(
        net.state_dict(), names=NAMES, kinds=kinds_of(net), like=like
    )


def test_outputs_of_a_trained_net(nets, converted):
    net = nets[0].eval()
    x, _ = images(10)
    with torch.no_grad():
        expected = net(to_nchw(x)).numpy()
    net.train()
    assert_close(jax.jit(FlaxNet().apply)(converted, x), expected, tol=1e-4)


def test_folded_and_exported(nets, converted):
    """All the way to a program without batch normalization, for any batch size."""
    net = nets[0].eval()
    x, _ = images(12, n=7)
    with torch.no_grad():
        expected = net(to_nchw(x)).numpy()
    net.train()
    folded = bnjax.fold.fold_model(FlaxNet(), converted, x)
    assert sorted(folded.folded) == [
        ("ConvTranspose_0", "BatchNorm_2"),
        ("Conv_0", "BatchNorm_0"),
        ("Conv_1", "BatchNorm_1"),
        ("Dense_0", "BatchNorm_3"),
    ]
    assert folded.kept == ()
    (n,) = jax.export.symbolic_shape("n")
    shape = jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype)
    predict = jax.jit(functools.partial(folded.apply, folded.params))
    program = jax.export.export(predict, platforms=["cpu", "cuda", "tpu"])(shape)
    assert "rsqrt" not in program.mlir_module()
    loaded = jax.export.deserialize(program.serialize())
    assert_close(loaded.call(x), expected, tol=1e-4)


def test_a_further_step(nets, converted):
    """Running statistics, n - 1 and all; and the parameters, by the same gradients."""
    net, optimizer, like = nets
    x, labels = images(11)

    def loss(params):
        logits, updates = FlaxNet().apply(
            converted | {"params": params}, x, train=True, mutable=["batch_stats"]
        )
        log_p = jax.nn.log_softmax(logits)
        return -log_p[jnp.arange(len(x)), labels].mean(), updates["batch_stats"]

    gradients, stats = jax.jit(jax.grad(loss, has_aux=True))(converted["params"])
    stepped = jax.tree.map(lambda p, g: p - 0.05 * g, converted["params"], gradients)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    train_torch(net, optimizer, 11)
    expected = convert.from_torch(
        net.state_dict(), names=NAMES, kinds=kinds_of(net), like=like
    )
    net.load_state_dict(before)
    assert_trees_close(stats, expected["batch_stats"], tol=1e-5)
    assert_trees_close(stepped, expected["params"], tol=1e-4)  # of two convolutions


@pytest.mark.parametrize("with_like", [True, False])
def test_round_trip_is_exact(nets, converted, with_like):
    net = nets[0]
    state_dict = convert.to_torch(
        converted,
        names=NAMES,
        kinds=kinds_of(net),
        like=net.state_dict() if with_like else None,
        num_batches_tracked=4,
    )
    assert state_dict.keys() == net.state_dict().keys()
    for name, expected in net.state_dict().items():
        np.testing.assert_array_equal(state_dict[name], expected.numpy(), name)
        assert state_dict[name].dtype == expected.numpy().dtype
    fresh = TorchNet()
    fresh.load_state_dict({k: torch.as_tensor(v) for k, v in state_dict.items()})


def test_names_may_be_a_function_or_prefixes_or_torchs(nets, converted):
    net, _, like = nets
    state_dict, kinds = net.state_dict(), kinds_of(net)
    by_function = convert.from_torch(
        state_dict, names=NAMES.__getitem__, kinds=kinds, like=like
    )
    assert_trees_close(by_function, converted, tol=0)
    back = convert.to_torch(by_function, names=NAMES.get, kinds=kinds, like=state_dict)
    np.testing.assert_array_equal(back["up.weight"], state_dict["up.weight"])
    with pytest.raises(ValueError, match=r"pass like=net\.state_dict"):
        convert.to_torch(by_function, names=NAMES.get, kinds=kinds)
    own = convert.from_torch(state_dict, kinds=kinds)
    assert_trees_close(own["params"]["norms"]["2"], converted["params"]["BatchNorm_2"])
    by_prefix = convert.from_torch(
        state_dict, names={"norms": "a/b", "norms.1": "c", "": "rest"}, kinds=kinds
    )
    stats = own["batch_stats"]
    assert_trees_close(by_prefix["batch_stats"]["a"]["b"]["2"], stats["norms"]["2"])
    assert_trees_close(by_prefix["batch_stats"]["c"], stats["norms"]["1"])
    assert_trees_close(by_prefix["params"]["rest"]["head"], own["params"]["head"])


def test_prefixes_are_whole_names():
    entries = {f"{m}.weight": np.zeros((2, 3), "f4") for m in ("layer1.a", "layer10.a")}
    names = {"layer1": "first", "": "rest"}
    assert _paths(convert.from_torch(entries, names=names)) == {
        "params/first/a/kernel",
        "params/rest/layer10/a/kernel",
    }


def _paths(tree):
    leaves = jax.tree.flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in leaves}


def test_a_layer_by_itself():
    layer = torch.nn.BatchNorm1d(3, momentum=0.2).train()
    layer(
        torch.tensor(np.random.default_rng(0).normal(1, 2, (7, 3)), dtype=torch.float32)
    )
    variables = convert.from_torch(layer.state_dict())
    x = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)
    y = bnjax.BatchNorm(use_running_average=True).apply(variables, x)
    assert_close(y, layer.eval()(torch.tensor(x)).detach().numpy())
    back = convert.to_torch(variables, num_batches_tracked=1)
    assert back.keys() == layer.state_dict().keys()
    assert back["num_batches_tracked"] == 1
    placed = convert.from_torch(layer.state_dict(), names={"": "BatchNorm_0"})
    assert_trees_close(placed["params"]["BatchNorm_0"], variables["params"], tol=0)
    for like in (None, layer.state_dict()):
        again = convert.to_torch(placed, names={"": "BatchNorm_0"}, like=like)
        assert again.keys() == back.keys()
    assert back["num_batches_tracked"].dtype == np.int64


@pytest.mark.parametrize("affine", [True, False])
def test_a_layer_without_running_statistics(affine):
    """torch's uses those of the batch in evaluation too; ours runs on what it has."""
    layer = torch.nn.BatchNorm2d(3, affine=affine, track_running_stats=False).eval()
    if affine:
        torch.nn.init.normal_(layer.weight)
    x, _ = images(0)
    variables = convert.from_torch(layer.state_dict())
    ours = bnjax.BatchNorm(False, update_stats=False, use_scale=affine, use_bias=affine)
    expected = np.moveaxis(layer(to_nchw(x)).detach().numpy(), 1, -1)
    assert_close(ours.apply(variables, x), expected, tol=1e-5)
    like = jax.eval_shape(ours.init, jax.random.key(0), x)
    if affine:
        like = {"params": like["params"]}
        assert_trees_close(
            convert.from_torch(layer.state_dict(), like=like), variables, tol=0
        )


def test_results_are_copies():
    """torch's optimizers write in place, and JAX may share NumPy's memory."""
    layer = torch.nn.Linear(3, 2)
    variables = convert.from_torch(layer.state_dict())
    before = layer.weight.detach().numpy().T.copy()
    arrays = {k: v.numpy() for k, v in layer.state_dict().items()}
    bias = convert.from_torch(arrays)["params"]["bias"]
    with torch.no_grad():
        layer.weight.add_(1)
        layer.bias.fill_(7)
    assert_close(variables["params"]["kernel"], before, tol=0)
    assert (bias != 7).all()
    written = convert.to_torch(variables)
    written["bias"][:] = 0  # writable


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes_are_kept_and_widened_to_like(dtype):
    layer = torch.nn.Linear(3, 2).to(getattr(torch, dtype))
    kernel = layer.weight.detach().float().numpy().T
    variables = convert.from_torch(layer.state_dict())
    assert_close(variables["params"]["kernel"], kernel, tol=0, dtype=dtype)
    like = {"params": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}
    wide = convert.from_torch(layer.state_dict(), like=like)
    assert_close(wide["params"]["kernel"], kernel, tol=0, dtype="float32")
    back = convert.to_torch(variables, like=torch.nn.Linear(3, 2).state_dict())
    assert_close(back["weight"], kernel.T, tol=0, dtype="float32")
    with pytest.raises(ValueError, match=r"dtype: bias .* float64, not float32"):
        convert.from_torch(layer.double().state_dict(), like=like)
    layer.to(getattr(torch, dtype))
    narrow = jax.tree.map(lambda v: v.astype(jnp.bfloat16), like)
    if dtype != "bfloat16":
        with pytest.raises(ValueError, match=f"dtype: bias .* {dtype}, not bfloat16"):
            convert.from_torch(layer.state_dict(), like=narrow)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_windows_of_every_rank(rank):
    """Convolutions and transposed ones, with the window's sizes all different."""
    window, strides, n = (2, 3, 4)[:rank], (2, 1, 3)[:rank], rank
    x = np.random.default_rng(rank).normal(size=(2, *(5, 6, 7)[:rank], 3))
    x = x.astype(np.float32)
    conv = getattr(torch.nn, f"Conv{n}d")(3, 4, window, strides, padding=1)
    y = conv(to_nchw(x)).detach().numpy()
    ours = nn.Conv(4, window, strides, padding=1)
    variables = convert.from_torch(conv.state_dict())
    assert_close(ours.apply(variables, x), np.moveaxis(y, 1, -1), tol=1e-5)
    up = getattr(torch.nn, f"ConvTranspose{n}d")(3, 4, window, strides, padding=1)
    y = up(to_nchw(x)).detach().numpy()
    ours = nn.ConvTranspose(4, window, strides, [(k - 2, k - 2) for k in window])
    kinds = {"": f"ConvTranspose{n}d"}
    variables = convert.from_torch(up.state_dict(), kinds=kinds)
    assert_close(ours.apply(variables, x), np.moveaxis(y, 1, -1), tol=1e-5)
    back = convert.to_torch(variables, kinds=kinds)
    np.testing.assert_array_equal(back["weight"], up.weight.detach().numpy())


def test_a_dense_layer_after_a_flattened_image():
    """Flattened as torch does, channels first."""
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(24, 5))
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 2)).astype(np.float32)
    variables = convert.from_torch(net[1].state_dict())
    y = nn.Dense(5).apply(variables, x.transpose(0, 3, 1, 2).reshape(2, -1))
    assert_close(y, net(to_nchw(x)).detach().numpy(), tol=1e-5)


def test_other_norms_and_embeddings():
    net = torch.nn.ModuleDict(
        {
            "table": torch.nn.Embedding(7, 4),
            "layer": torch.nn.LayerNorm(4),
            "two": torch.nn.LayerNorm((3, 4)),
            "plain": torch.nn.BatchNorm1d(4, affine=False),
        }
    )
    kinds = kinds_of(net)
    variables = convert.from_torch(net.state_dict(), kinds=kinds)
    assert set(variables["params"]["table"]) == {"embedding"}
    assert variables["params"]["table"]["embedding"].shape == (7, 4)
    assert set(variables["params"]["layer"]) == {"scale", "bias"}
    assert variables["params"]["two"]["scale"].shape == (3, 4)
    assert "plain" not in variables["params"]
    back = convert.to_torch(variables, kinds=kinds, like=net.state_dict())
    for name, expected in net.state_dict().items():
        np.testing.assert_array_equal(back[name], expected.numpy(), name)


def test_sync_batch_norm(nets, converted):
    """torch's SyncBatchNorm: the state_dict of BatchNorm, and its statistics."""
    net, _, like = nets
    torch.manual_seed(0)
    sync = torch.nn.SyncBatchNorm.convert_sync_batchnorm(TorchNet())
    sync.load_state_dict(net.state_dict())
    kinds = kinds_of(sync)
    assert "SyncBatchNorm" in kinds.values()
    variables = convert.from_torch(
        sync.state_dict(), names=NAMES, kinds=kinds, like=like
    )
    assert_trees_close(variables, converted, tol=0)


def test_sync_batch_norms_statistics_over_eight_shards():
    """n - 1 of the total n, as torch has it on the concatenated batch."""
    layer = torch.nn.BatchNorm2d(5, momentum=0.3).train()
    x = np.random.default_rng(0).normal(3, 2, size=(16, 3, 2, 5)).astype(np.float32)
    x += np.arange(16, dtype=np.float32).reshape(16, 1, 1, 1)  # replicas differ
    start = convert.from_torch(layer.state_dict())
    expected = layer(to_nchw(x)).detach().numpy()
    ours = bnjax.BatchNorm(
        use_running_average=False, momentum=0.7, unbiased=True, axis_name="data"
    )

    def step(x):
        y, updates = ours.apply(start, x, mutable=["batch_stats"])
        return y, updates["batch_stats"]

    data = PartitionSpec("data")
    mesh = Mesh(np.array(jax.devices()), ("data",))
    over_shards = jax.shard_map(
        step, mesh=mesh, in_specs=data, out_specs=(data, PartitionSpec())
    )
    y, stats = jax.jit(over_shards)(x)
    assert_close(y, np.moveaxis(expected, 1, -1), tol=1e-5)
    after = convert.from_torch(layer.state_dict())
    assert_trees_close(stats, after["batch_stats"], tol=1e-5)


def test_momentum_from_torch():
    assert convert.momentum_from_torch(0.0) == 1
    assert convert.momentum_from_torch(0.25) == 0.75
    with pytest.raises(ValueError, match=r"bnjax\.running\.cumulative"):
        convert.momentum_from_torch(None)
    with pytest.raises(ValueError, match=r"momentum=1\.5"):
        convert.momentum_from_torch(1.5)


def test_torchs_cumulative_average_is_ours():
    """What the error of momentum=None promises."""
    layer = torch.nn.BatchNorm1d(3, momentum=None).train()
    rule = bnjax.running.cumulative(ddof=1)
    state = rule.init((3,))
    for seed in range(3):
        x = np.random.default_rng(seed).normal(seed, 2, (6, 3)).astype(np.float32)
        layer(torch.tensor(x))
        state = rule.update(state, bnjax.moments(x))
    stats = convert.from_torch(layer.state_dict())["batch_stats"]
    assert_trees_close(rule.read(state)._asdict(), stats, tol=1e-5)


# ---- classes that are not known, and weights that no layer of Flax has ----


class SyncBatchNormAct(torch.nn.SyncBatchNorm):
    pass


class FrozenBatchNormAct2d(torch.nn.Module):
    """timm's: buffers alone."""

    def __init__(self, features):
        super().__init__()
        for name, value in zip(
            ("weight", "bias", "running_mean", "running_var"), (1, 0, 0, 1)
        ):
            self.register_buffer(name, torch.full((features,), float(value)))


class Conv2dSame(torch.nn.Conv2d):
    pass


class StdConv2d(torch.nn.Conv2d):
    pass


class ScaledStdConv2d(torch.nn.Conv2d):
    """timm's: with a gain of its own for each output."""

    def __init__(self, *args):
        super().__init__(*args)
        self.gain = torch.nn.Parameter(torch.rand(self.out_channels, 1, 1, 1))


class DepthwiseConv2d(torch.nn.Conv2d):
    """A name that Keras gives to another layout."""


class LowRankLinear(torch.nn.Linear):
    pass


UNKNOWN = {
    "SyncBatchNormAct": lambda: SyncBatchNormAct(5),
    "FrozenBatchNormAct2d": lambda: FrozenBatchNormAct2d(5),
    "Conv2dSame": lambda: Conv2dSame(3, 5, (2, 4)),
    "StdConv2d": lambda: StdConv2d(3, 5, (2, 4)),
    "ScaledStdConv2d": lambda: ScaledStdConv2d(3, 5, (2, 4)),
    "DepthwiseConv2d": lambda: DepthwiseConv2d(6, 6, (2, 4), 1, 0, 1, 6),
    "LowRankLinear": lambda: LowRankLinear(3, 5),
    "RMSNorm": lambda: torch.nn.RMSNorm(5),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_class_that_is_not_known_is_read_by_names_and_shapes(name):
    torch.manual_seed(0)
    net = torch.nn.ModuleDict({"layer": UNKNOWN[name]()})
    entries, kinds = net.state_dict(), kinds_of(net)
    assert kinds["layer"] == name
    found = convert.from_torch(entries, kinds=kinds)
    assert_trees_close(found, convert.from_torch(entries), tol=0)
    like = jax.eval_shape(lambda: found)
    assert_trees_close(convert.from_torch(entries, kinds=kinds, like=like), found)
    layer = found["params"]["layer"]
    weight = entries["layer.weight"].numpy()
    if weight.ndim == 4:
        assert_close(layer["kernel"], weight.transpose(2, 3, 1, 0), tol=0)
    else:
        assert_close(layer["kernel" if weight.ndim == 2 else "scale"], weight.T, tol=0)
    back = convert.to_torch(found, kinds=kinds, like=entries)
    for entry, value in entries.items():
        np.testing.assert_array_equal(back[entry], value.numpy(), entry)


@pytest.mark.parametrize(
    ("kind", "shape", "cure"),
    [
        ("MyConvTranspose2d", (3, 5, 2, 4), "ConvTranspose2d"),
        ("Deconv1d", (3, 5, 2), "ConvTranspose1d"),
        ("PositionEmbedding", (7, 4), "Embedding"),
    ],
)
def test_a_class_whose_name_contradicts_what_its_shape_says(kind, shape, cure):
    """Where names and shapes cannot tell: no guess."""
    entries = {"up.weight": np.zeros(shape, np.float32)}
    with pytest.raises(ValueError, match=f"its kind '{kind}' is not known") as info:
        convert.from_torch(entries, kinds={"up": kind})
    assert f"kinds={{'up': '{cure}'}}" in str(info.value)
    convert.from_torch(entries, kinds={"up": cure})


def test_like_tells_what_shapes_do_not():
    """A kernel, an embedding or a slope, by the names in `like`."""
    net = torch.nn.ModuleDict(
        {
            "table": torch.nn.Embedding(7, 4),
            "dense": torch.nn.Linear(4, 7, bias=False),
            "slope": torch.nn.PReLU(),
        }
    )
    known = convert.from_torch(net.state_dict(), kinds=kinds_of(net))
    assert set(known["params"]["table"]) == {"embedding"}
    assert known["params"]["slope"]["negative_slope"].shape == ()
    like = jax.eval_shape(lambda: known)
    for kinds in (None, {"table": "TokenEmbedding", "slope": "Slope"}):
        found = convert.from_torch(net.state_dict(), kinds=kinds, like=like)
        assert_trees_close(found, known, tol=0)


class LayerScale(torch.nn.Module):
    def __init__(self, features):
        super().__init__()
        self.gamma = torch.nn.Parameter(torch.rand(features))


class Attention(torch.nn.Module):
    """A bias for each relative position, as Swin's and BEiT's: table and index."""

    def __init__(self, features):
        super().__init__()
        self.qkv = torch.nn.Linear(features, 3 * features)
        self.relative_position_bias_table = torch.nn.Parameter(torch.rand(9, 2))
        self.register_buffer("relative_position_index", torch.arange(16).reshape(4, 4))
        self.scale = torch.nn.Parameter(torch.tensor(0.5))


class Vit(torch.nn.Module):
    """Parameters directly on modules, as image models have them."""

    def __init__(self):
        super().__init__()
        self.cls_token = torch.nn.Parameter(torch.rand(1, 1, 6))
        self.pos_embed = torch.nn.Parameter(torch.rand(1, 5, 6))
        self.patch_embed = torch.nn.Conv2d(3, 6, 2)
        self.attn = Attention(6)
        self.torchs = torch.nn.MultiheadAttention(6, 2)
        self.ls1 = LayerScale(6)
        self.tokens = torch.nn.ParameterList([torch.rand(2, 6), torch.rand(3)])
        self.norm = torch.nn.BatchNorm1d(6)
        self.act = torch.nn.PReLU(6)


def averaged():
    net = torch.optim.swa_utils.AveragedModel(TorchNet())
    net.update_parameters(TorchNet())
    return net


OWN = {
    "parameters on modules": Vit,
    "parameters of the top": lambda: LayerScale(3),
    "MultiheadAttention": lambda: torch.nn.MultiheadAttention(6, 2, kdim=4, vdim=5),
    "LSTM": lambda: torch.nn.LSTM(3, 4),
    "PReLU": lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.PReLU()),
    "AveragedModel": averaged,
    "weight norm": lambda: torch.nn.Sequential(
        torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 4))
    ),
}


@pytest.mark.parametrize("with_kinds", [True, False])
@pytest.mark.parametrize("name", OWN)
def test_what_no_layer_of_flax_has_passes_as_it_is(name, with_kinds):
    """Without `like` and with, and back, exact; what is learned is differentiable."""
    torch.manual_seed(0)
    net = OWN[name]()
    entries = net.state_dict()
    kinds = kinds_of(net) if with_kinds or name == "AveragedModel" else None
    found = convert.from_torch(entries, kinds=kinds)
    values = {v.shape for v in jax.tree.leaves(found)}
    assert len(jax.tree.leaves(found)) == sum("tracked" not in e for e in entries)
    for leaf in jax.tree.leaves(found["params"]):
        assert jnp.issubdtype(leaf.dtype, jnp.floating)
    like = jax.eval_shape(lambda: found)
    again = convert.from_torch(entries, kinds=kinds, like=like)
    assert_trees_close(again, found, tol=0)
    without = {c: like[c] for c in like if c != "buffers"}
    if name == "AveragedModel":  # a count, of which Flax's model knows nothing
        own = convert.from_torch(entries, kinds=kinds, like=without)
        assert_trees_close(own, {c: found[c] for c in without}, tol=0)
        back = convert.to_torch(own, kinds=kinds, like=entries)
        assert back["n_averaged"] == entries["n_averaged"] == 1
    back = convert.to_torch(found, kinds=kinds, like=entries)
    assert back.keys() == entries.keys()
    for entry, value in entries.items():
        np.testing.assert_array_equal(back[entry], value.numpy(), entry)
        assert back[entry].dtype == value.numpy().dtype
    assert values


def test_parameters_directly_on_a_module_where_they_lie():
    torch.manual_seed(0)
    net = Vit()
    found = convert.from_torch(net.state_dict(), names={"": "", "attn": "Attention_0"})
    params, entries = found["params"], net.state_dict()
    assert_close(params["cls_token"], entries["cls_token"].numpy(), tol=0)
    assert_close(params["ls1"]["gamma"], entries["ls1.gamma"].numpy(), tol=0)
    assert params["Attention_0"]["scale"] == 0.5
    assert params["torchs"]["in_proj_weight"].shape == (18, 6)
    index = found["buffers"]["Attention_0"]["relative_position_index"]
    assert_close(index, np.arange(16).reshape(4, 4), tol=0, dtype="int32")
    like = jax.eval_shape(lambda: found)
    like["params"]["ls1"]["gamma"] = jax.ShapeDtypeStruct((7,), jnp.float32)
    del like["params"]["cls_token"], like["params"]["torchs"]["in_proj_bias"]
    with pytest.raises(ValueError, match="and nothing was converted") as info:
        convert.from_torch(entries, names={"": "", "attn": "Attention_0"}, like=like)
    for part in (
        "shape: ls1.gamma -> params/ls1/gamma (6,), not (7,)",
        "cls_token: its name is not known: expected one of",
        "or that `like` has params/torchs/in_proj_bias",
    ):
        assert part in str(info.value), part


@pytest.mark.parametrize("features", [1, 4])
def test_slopes(features):
    torch.manual_seed(0)
    layer = torch.nn.PReLU(features, init=0.3)
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    variables = convert.from_torch(layer.state_dict(), kinds={"": "PReLU"})
    slope = variables["params"]["negative_slope"]
    assert slope.shape == (() if features == 1 else (4,))
    expected = layer(torch.tensor(x)).detach().numpy()
    if features == 1:
        assert_close(nn.PReLU().apply(variables, x), expected)
    back = convert.to_torch(variables)
    np.testing.assert_array_equal(back["weight"], layer.weight.detach().numpy())


def test_defaults_are_those_of_the_packages():
    """The momentum and epsilon of layers made without arguments, and their axis."""
    layers = {
        "torch": torch.nn.BatchNorm1d(3),
        "keras": keras.layers.BatchNormalization(),
        "flax": nn.BatchNorm(),
    }
    for package, layer in layers.items():
        convention = convert.CONVENTIONS[package]
        epsilon = layer.eps if package == "torch" else layer.epsilon
        axis = 1 if package == "torch" else layer.axis
        expected = layer.momentum, epsilon, axis
        found = convention.momentum, convention.epsilon, convention.feature_axis
        assert found == expected, package


@pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning:keras")
class TestKeras:
    @pytest.fixture(autouse=True)
    def _promotes_ranks(self):
        with jax.numpy_rank_promotion("allow"):
            yield

    def test_batch_normalization(self):
        """Output and a step: epsilon 1e-3, biased variance, weight of the old value."""
        layer = keras.layers.BatchNormalization()
        x, new = np.random.default_rng(0).normal(2, 3, (2, 7, 3)).astype(np.float32)
        layer(x, training=True)
        ours = bnjax.BatchNorm(momentum=0.99, epsilon=1e-3)
        variables = convert.from_keras(layer.get_weights())
        assert_close(ours.apply(variables, new, True), np.asarray(layer(new)), tol=1e-5)
        _, updates = ours.apply(variables, new, False, mutable=["batch_stats"])
        layer(new, training=True)
        after = convert.from_keras({w.name: w for w in layer.weights})
        assert_trees_close(updates["batch_stats"], after["batch_stats"], tol=1e-6)

    def test_without_scale(self):
        layer = keras.layers.BatchNormalization(scale=False)
        layer(np.ones((2, 3), np.float32))
        with pytest.raises(
            ValueError, match=r"list of 3: .* pass {w\.name: w for w in"
        ):
            convert.from_keras(layer.get_weights())
        variables = convert.from_keras({w.name: w for w in layer.weights})
        assert set(variables["params"]) == {"bias"}

    def test_a_model(self):
        model = keras.Sequential(
            [
                keras.Input((6, 7, 3)),
                keras.layers.Conv2D(8, (3, 2), padding="same", groups=1, name="stem"),
                keras.layers.BatchNormalization(name="norm"),
                keras.layers.DepthwiseConv2D((2, 3), depth_multiplier=2, name="deep"),
                keras.layers.Conv2DTranspose(5, (3, 4), 2, name="up"),
                keras.layers.GlobalMaxPooling2D(),
                keras.layers.Dense(4, name="dense"),
            ],
            name="net",
        )
        rng = np.random.default_rng(0)
        for w in model.weights:
            w.assign(rng.uniform(0.2, 1.5, w.shape))

        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.Conv(8, (3, 2), name="stem")(x)
                x = bnjax.BatchNorm(True, epsilon=1e-3, name="norm")(x)
                deep = nn.Conv(
                    16, (2, 3), padding="VALID", feature_group_count=8, name="deep"
                )
                x = deep(x)
                x = nn.ConvTranspose(5, (3, 4), (2, 2), "VALID", name="up")(x)
                return nn.Dense(4, name="dense")(x.max((1, 2)))

        x, _ = images(0)
        x = x[:, :6, :7]
        like = jax.eval_shape(Net().init, jax.random.key(0), x)
        variables = convert.from_keras(
            {w.path: w for w in model.weights},
            names={"net": ""},
            kinds={layer.path: type(layer).__name__ for layer in model.layers},
            like=like,
        )
        expected = jax.jit(model)(x)
        assert_close(jax.jit(Net().apply)(variables, x), expected, tol=1e-5)

    @pytest.mark.parametrize("rank", [1, 2])
    def test_a_separable_convolution_is_two(self, rank):
        """By `like`, by `names`, or with neither as it is."""
        window = (3, 2)[:rank]
        x = np.random.default_rng(0).normal(size=(2, *(6, 7)[:rank], 3))
        x = x.astype(np.float32)
        layer = getattr(keras.layers, f"SeparableConv{rank}D")
        layer = layer(8, window, depth_multiplier=2, name="sep")
        expected = np.asarray(layer(x))
        layer.bias.assign(np.arange(8.0))
        weights = {w.path: w for w in layer.weights}

        class Separable(nn.Module):
            @nn.compact
            def __call__(self, x):
                groups = {"feature_group_count": 3, "use_bias": False}
                depthwise = nn.Conv(
                    6, window, padding="VALID", name="depthwise", **groups
                )
                return nn.Conv(8, (1,) * rank, name="pointwise")(depthwise(x))

        like = jax.eval_shape(Separable().init, jax.random.key(0), x)
        found = convert.from_keras(
            weights,
            names={"sep": ""},
            kinds={"sep": f"SeparableConv{rank}D"},
            like=like,
        )
        y = Separable().apply(found, x)
        assert_close(y, expected + np.arange(8.0, dtype=np.float32), tol=1e-5)
        parts = {"sep/depthwise": "depthwise", "sep/pointwise": "pointwise"}
        for given in (like, None):
            named = convert.from_keras(weights, names=parts, like=given)
            assert_trees_close(named, found, tol=0)
        own = convert.from_keras(weights)["params"]["sep"]
        assert {name: value.shape for name, value in own.items()} == {
            "depthwise_kernel": (*window, 3, 2),
            "pointwise_kernel": (*(1,) * rank, 6, 8),
            "bias": (8,),
        }
        like = jax.eval_shape(lambda: {"params": {"sep": own}})
        again = convert.from_keras(weights, like=like)
        assert_trees_close(again["params"]["sep"], own, tol=0)

    def test_normalization_is_an_evaluated_layer(self):
        """Its statistics; its count is a buffer, which `like` may lack."""
        layer = keras.layers.Normalization(name="normalize")
        x = np.random.default_rng(0).normal(3, 2, (20, 3)).astype(np.float32)
        layer.adapt(x)
        ours = bnjax.BatchNorm(True, epsilon=0.0, use_scale=False, use_bias=False)
        like = jax.eval_shape(ours.init, jax.random.key(0), x)
        weights = {w.path: w for w in layer.weights}
        found = convert.from_keras(weights)
        assert found["buffers"]["normalize"]["count"].shape == ()
        assert set(found) == {"batch_stats", "buffers"}
        found = convert.from_keras(weights, names={"normalize": ""}, like=like)
        assert_close(ours.apply(found, x), np.asarray(layer(x)), tol=1e-5)
        assert set(found) == {"batch_stats"}

    def test_batch_renormalization(self):
        """Inference by what BatchRenorm has too; what it lacks are buffers."""
        layer = keras.layers.BatchNormalization(renorm=True, name="norm")
        x, new = np.random.default_rng(0).normal(2, 3, (2, 7, 3)).astype(np.float32)
        layer(x, training=True)
        ours = bnjax.linen.BatchRenorm(True, epsilon=1e-3)
        like = jax.eval_shape(ours.init, jax.random.key(0), x)
        kinds = {"": "BatchNormalization"}
        weights = {w.name: w for w in layer.weights}
        found = convert.from_keras(weights, kinds=kinds, like=like)
        assert_close(ours.apply(found, new), np.asarray(layer(new)), tol=1e-5)
        own = convert.from_keras(weights, kinds=kinds)
        assert_trees_close({c: own[c] for c in found}, found, tol=0)
        assert set(own["buffers"]) == {"moving_stddev", "renorm_mean", "renorm_stddev"}
        by_path = convert.from_keras({w.path: w for w in layer.weights})
        assert_trees_close(by_path["buffers"]["norm"], own["buffers"], tol=0)

    @pytest.mark.parametrize(
        "layer",
        [
            lambda: keras.layers.PReLU(shared_axes=[1]),
            lambda: keras.layers.GRU(3),
            lambda: keras.layers.RMSNormalization(),
            lambda: keras.layers.MultiHeadAttention(2, 4),
            lambda: keras.layers.LayerNormalization(axis=(1, 2)),
            lambda: keras.layers.EinsumDense(
                "abc,cde->abde", (None, 2, 5), bias_axes="d"
            ),
        ],
    )
    @pytest.mark.parametrize("with_kinds", [False, True])
    def test_weights_that_no_layer_of_flax_has(self, layer, with_kinds):
        layer = layer()
        x = np.ones((2, 4, 6), np.float32)
        layer(x, x) if "Attention" in type(layer).__name__ else layer(x)
        weights = {w.path: w for w in layer.weights}
        kinds = {layer.path: type(layer).__name__} if with_kinds else None
        found = convert.from_keras(weights, kinds=kinds)
        values = jax.tree.leaves(found["params"])
        assert sorted(v.size for v in values) == sorted(
            np.size(w) for w in weights.values()
        )
        again = convert.from_keras(
            weights, kinds=kinds, like=jax.eval_shape(lambda: found)
        )
        assert_trees_close(again, found, tol=0)

    def test_slopes(self):
        layer = keras.layers.PReLU(shared_axes=[1, 2], alpha_initializer="ones")
        layer(np.ones((2, 4, 1), np.float32))
        like = {"params": {"negative_slope": jnp.zeros(())}}
        weights = {w.name: w for w in layer.weights}
        for options in ({"like": like}, {"kinds": {"": "PReLU"}}):
            found = convert.from_keras(weights, **options)
            assert found["params"]["negative_slope"] == 1
        assert set(convert.from_keras(weights)["params"]) == {"alpha"}


# What stands in place of a state_dict, of momentum and of dtypes.


@pytest.mark.parametrize(
    "momentum",
    [1.5, -0.1, np.nan, np.inf, np.float32(1.5), jnp.float32(2.0), "0.1"],
)
def test_momentum_that_is_none_of_torchs(momentum):
    with pytest.raises(ValueError, match="is the weight of the new value") as info:
        convert.momentum_from_torch(momentum)
    assert "Write momentum_from_torch(0.1)" in str(info.value)
    assert repr(momentum) in str(info.value)


def net_of(dtype):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).to(dtype)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (torch.float64, "float32"),
        (torch.float32, "bfloat16"),
        (torch.bfloat16, "float16"),
    ],
)
def test_dtypes_that_do_not_fit_advise_a_cast(given, wanted):
    net = net_of(given)
    found = convert.from_torch(net_of(torch.float32).state_dict())
    like = jax.tree.map(lambda v: v.astype(wanted), found)
    with pytest.raises(ValueError, match=f"dtype: .*, not {wanted}") as info:
        convert.from_torch(net.state_dict(), like=like)
    assert f"Cast before, net.to(torch.{wanted}).state_dict()" in str(info.value)
    assert "names=" not in str(info.value)
    del like["params"]["0"]["bias"]
    with pytest.raises(ValueError, match=r"names=.*Cast before"):
        convert.from_torch(net.state_dict(), like=like)
    narrow = net_of(torch.bfloat16).state_dict()
    with pytest.raises(
        ValueError, match=r"Cast .*lambda v: v\.astype\(jnp\.bf"
    ) as info:
        convert.to_torch(found, like=narrow)
    assert "names=" not in str(info.value)


@pytest.mark.parametrize("package", ["torch", "keras"])
def test_float64_is_not_narrowed_in_silence(package):
    if package == "torch":
        weights, read = net_of(torch.float64).state_dict(), convert.from_torch
    else:
        weights, read = {"d/kernel": np.ones((3, 2)), "d/n": 3}, convert.from_keras
    with pytest.warns(bnjax.BatchNormWarning, match="float64, .* become float32") as w:
        found = read(weights)
    assert w[0].filename == __file__
    assert "Cast before" in str(w[0].message)
    assert {v.dtype.name for v in jax.tree.leaves(found["params"])} == {"float32"}
    with jax.enable_x64(True):
        wide = read(weights)
    assert {v.dtype.name for v in jax.tree.leaves(wide["params"])} == {"float64"}


def test_integers_that_do_not_fit():
    hashes = {"hashes": np.array([2**40, 1])}
    with pytest.raises(ValueError, match="hashes int64 holds integers beyond int32"):
        convert.from_torch(hashes)
    hashes["hashes"][0] = 2**30
    assert convert.from_torch(hashes)["buffers"]["hashes"][0] == 2**30


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda net: convert.from_torch(net),
            r"Sequential.* Write net\.state_dict\(\)",
        ),
        (lambda net: convert.from_torch("a.pt"), r"is a str: .* Write torch\.load"),
        (lambda net: convert.from_torch([*net.parameters()]), "is a list: expected"),
        (lambda net: convert.from_torch(net[0].weight), "is a Parameter: expected"),
        (lambda net: convert.from_torch(None), "is a NoneType: expected the entries"),
        (lambda net: convert.from_torch({0: np.zeros(3)}), "keys are no strings"),
        (lambda net: convert.from_keras(net), r"Write {w\.path: w for w in model"),
        (lambda net: convert.from_keras(keras.layers.Dense(3)), "weights is a Dense"),
        (lambda net: convert.to_torch(net), r"Sequential: .* Write {'params': params"),
        (
            lambda net: convert.to_torch({"params": {}}, like=net),
            "like is a Sequential",
        ),
        (
            lambda net: convert.from_torch(net.state_dict(), like=net),
            r"variables are of type Sequential",
        ),
        (
            lambda net: convert.from_torch(
                net.state_dict(), kinds={n: type(m) for n, m in net.named_modules()}
            ),
            r"names of classes by .* type\(module\)\.__name__",
        ),
        (
            lambda net: convert.from_torch(net.state_dict(), names=["a"]),
            r"names=\['a'\]: expected a dict",
        ),
    ],
)
def test_other_things_in_place_of_weights(call, match):
    with pytest.raises(TypeError, match=match):
        call(net_of(torch.float32))


# Bad input: one error with all of it, and nothing returned.


def broken(nets, **changes):
    """The error of a state_dict with entries changed, or without them (None)."""
    net, _, like = nets
    entries = dict(net.state_dict()) | changes.pop("entries", {})
    entries = {k: v for k, v in entries.items() if v is not None}
    options = {"names": NAMES, "kinds": kinds_of(net), "like": like} | changes
    with pytest.raises(ValueError, match="and nothing was converted") as info:
        convert.from_torch(entries, **options)
    return str(info.value)


def test_everything_that_does_not_fit_is_in_one_error(nets):
    message = broken(
        nets,
        entries={
            "stem.weight": None,
            "norms.1.running_var": None,
            "extra.weight": torch.zeros(3, 4),
            "head.3.bias": torch.zeros(6),
            "head.0.in_proj_weight": torch.zeros(2),
            "epoch": 3,
            "model": {"stem.weight": torch.zeros(1)},
        },
    )
    for part in (
        "missing: params/Conv_0/kernel (3, 5, 3, 8)",
        "missing: BatchNorm_1 has one of mean and var",
        "missing: batch_stats/BatchNorm_1/var (12,)",
        "extra.weight: names has no key for the module 'extra'",
        "shape: head.3.bias -> params/Dense_1/bias (6,), not (5,)",
        "features: Dense_1 has kernel 5, bias 6",
        "head.0.in_proj_weight: its name is not known: expected one of",
        "model: a dict, which is no array: pass the state_dict itself",
    ):
        assert part in message, part


def test_an_extra_layer_that_names_cover(nets):
    extra = {"extra.weight": torch.zeros(3, 4)}
    message = broken(nets, entries=extra, names=NAMES | {"extra": "Dense_9"})
    assert "extra: extra.weight -> params/Dense_9/kernel (4, 3)" in message


def test_a_missing_layer_without_like(nets):
    gone = {"head.3.weight": None, "head.3.bias": None}
    message = broken(nets, entries=gone, like=None)
    assert "missing: names has 'head.3'" in message
    assert "missing: kinds has 'head.3', a Linear" in message


def test_two_layers_with_one_name(nets):
    message = broken(nets, names=NAMES | {"head.3": "Dense_0"})
    assert "params/Dense_0/kernel comes from head.0.weight already" in message


def test_kinds(nets):
    kinds = kinds_of(nets[0])
    message = broken(nets, kinds=kinds | {"up": "MyConvTranspose2d"})
    assert "up.weight: its kind 'MyConvTranspose2d' is not known" in message
    message = broken(nets, kinds=kinds | {"up": "Linear"})
    assert "shape (12, 6, 4, 3) is not that of a layer of the kind 'linear'" in message
    message = broken(nets, kinds=None)  # taken for a convolution
    assert "shape: up.weight -> params/ConvTranspose_0/kernel (4, 3, 6, 12)" in message
    message = broken(nets, kinds=kinds | {"upp": "ConvTranspose2d"})
    assert "missing: kinds has 'upp', a ConvTranspose2d" in message


def test_names_that_are_no_strings(nets):
    message = broken(nets, names={"stem": "Conv_0"}.get)
    assert "head.3.bias: names('head.3') is None: expected a path" in message
    assert "stem.weight:" not in message


def test_grouped_transposed_convolution():
    layer = torch.nn.ConvTranspose2d(8, 6, 3, groups=2)
    with pytest.raises(ValueError, match="grouped transposed convolutions are not in"):
        convert.from_torch(layer.state_dict(), kinds={"": "ConvTranspose2d"})


def test_back_to_torch_all_in_one_error(nets, converted):
    net = nets[0]
    params = dict(converted["params"])
    params["Dense_9"] = {"kernel": jnp.zeros((3, 4))}
    del params["Conv_0"]
    wide = converted["params"]["Dense_1"]["bias"]
    params["Dense_1"] = {**params["Dense_1"], "bias": jnp.zeros(wide.size + 1)}
    params["Dense_1"]["slope"] = jnp.zeros(())
    with pytest.raises(ValueError, match="and nothing was converted") as info:
        convert.to_torch(
            {"params": params, "batch_stats": converted["batch_stats"]},
            names=NAMES,
            kinds=kinds_of(net),
            like=net.state_dict(),
        )
    for part in (
        "missing: stem.weight (8, 3, 3, 5)",
        "params/Dense_9/kernel: names leads no module of `like` to 'Dense_9'",
        "params/Dense_1/slope: its name is not known",
        "shape: params/Dense_1/bias -> head.3.bias (6,), not (5,)",
    ):
        assert part in str(info.value), part


def test_back_to_torch_without_like():
    kernel = {"kernel": jnp.zeros((3, 4))}
    with pytest.raises(ValueError, match="names has no key for the module 'b'"):
        convert.to_torch({"params": {"b": kernel}}, names={"fc": "a"})
    shadowed = {"fc": "a", "fc.0": "b"}  # a/0 would come from fc.0, which is b
    with pytest.raises(ValueError, match=r"names leads 'fc\.0' elsewhere, to 'b'"):
        convert.to_torch({"params": {"a": {"0": kernel}}}, names=shadowed)
    with pytest.raises(ValueError, match=r"\['kernel'\]: expected 'params'"):
        convert.to_torch(kernel)
    moments = {"batch_moments": {"b": jnp.zeros(3)}}  # transient: left out
    assert set(convert.to_torch({"params": kernel} | moments)) == {"weight"}


# Flax's metadata boxes.


@pytest.mark.parametrize("shapes", [False, True])
@pytest.mark.parametrize("box", BOXES)
def test_boxes(box, shapes):
    """Off on the way out, and on again where `like` has them."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    state_dict = net.state_dict()
    plain = convert.from_torch(state_dict)
    kernel = plain["params"]["0"]["kernel"]
    like = jax.tree.map(BOXES[box], plain)
    like["params"]["0"]["kernel"] = kernel  # a tree of both kinds
    if shapes:
        like = jax.eval_shape(lambda: like)
    new = convert.from_torch(state_dict, like=like)
    assert jax.tree.structure(new) == jax.tree.structure(like)
    assert_trees_close(jax.tree.leaves(new), jax.tree.leaves(plain), tol=0)
    back = convert.to_torch(new, like=state_dict)
    for name, value in convert.to_torch(plain, like=state_dict).items():
        assert (back[name] == value).all()
    weights = [np.full(4, value, np.float32) for value in range(4)]
    norm = {c: tree["1"] for c, tree in like.items()}
    new = convert.from_keras(weights, like=norm)
    assert jax.tree.structure(new) == jax.tree.structure(norm)


@pytest.mark.parametrize("box", BOXES)
def test_names_of_boxes_in_messages(box):
    variables = convert.from_torch(torch.nn.BatchNorm1d(4).state_dict())
    boxed = jax.tree.map(BOXES[box], variables)
    with pytest.raises(ValueError, match=r"weight -> params/scale \(3,\), not \(4,\)"):
        convert.from_torch(torch.nn.BatchNorm1d(3).state_dict(), like=boxed)


@pytest.mark.parametrize("source", ["float8_e4m3fn", "float8_e5m2", "float16"])
@pytest.mark.parametrize("target", ["bfloat16", "float16", "float32", "float8_e4m3fn"])
def test_floats_that_like_holds(source, target):
    """By every value of the narrower dtype, without JAX's promotion."""
    bits = np.arange(256, dtype=np.uint8 if "8" in source else np.uint16) * (
        1 if "8" in source else 257
    )
    values = bits.view(getattr(jnp, source))
    values = values[np.isfinite(values.astype(np.float32))]
    like = {"params": {"a": {"scale": np.zeros(values.size, getattr(jnp, target))}}}
    cast = values.astype(getattr(jnp, target)).astype(np.float32)
    if (cast == values.astype(np.float32)).all():
        found = bnjax.convert.from_torch({"a.weight": values}, like=like)
        np.testing.assert_array_equal(found["params"]["a"]["scale"], cast)
    else:
        with pytest.raises(ValueError, match=f"dtype: .* {source}, not {target}"):
            bnjax.convert.from_torch({"a.weight": values}, like=like)

"""Whole models of timm and torchvision, converted and converted back.

No weights are downloaded: initial ones, and statistics of a few random batches. Slow,
and other packages: pip install torch torchvision timm, for versions that fit.
"""

import functools
import importlib

import flax.linen as nn
import jax
import numpy as np
import pytest
from helpers import assert_close, assert_trees_close

import bnjax
from bnjax import convert

pytestmark = pytest.mark.slow

TIMM = (
    *("resnet18", "resnet50d", "resnext50_32x4d", "seresnet50", "skresnet18"),
    *("res2net50_26w_4s", "efficientnet_b0", "tf_efficientnetv2_b0", "mixnet_s"),
    *("mobilenetv3_small_100", "regnety_004", "densenet121", "dpn68", "xception41"),
    *("hrnet_w18_small", "repvgg_a0", "convmixer_768_32", "levit_128s", "fastvit_t8"),
)
TORCHVISION = (
    *("resnet18", "vgg11_bn", "densenet121", "googlenet", "mobilenet_v2"),
    *("shufflenet_v2_x0_5", "efficientnet_b0", "regnet_y_400mf"),
)
MODELS = [("timm", name) for name in TIMM] + [("torchvision", n) for n in TORCHVISION]
SIZES = {"levit_128s": 224, "fastvit_t8": 256, "vgg11_bn": 32}  # others: 64


@functools.cache
def trained(package: str, name: str):
    """The model after two batches in training, and images for it."""
    torch = pytest.importorskip("torch")
    module = {"timm": "timm", "torchvision": "torchvision.models"}[package]
    create = pytest.importorskip(module)
    torch.manual_seed(0)
    if package == "timm":
        net = create.create_model(name, pretrained=False, num_classes=11)
    else:
        own = {"init_weights": True} if name == "googlenet" else {}
        net = create.get_model(name, weights=None, num_classes=11, **own)
    size = SIZES.get(name, 64)
    images = torch.randn(6, 3, size, size) * torch.rand(6, 1, 1, 1) + 0.5
    for module in net.modules():
        if hasattr(module, "running_var"):
            module.momentum = 0.9  # or two batches would leave most of the start
    with torch.no_grad():
        net.train()(images)
        net(2 * images)
    return net.eval(), images


def arrays(net) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in net.state_dict().items()}


def assert_same(actual, expected) -> None:
    """Bit for bit, dtypes too."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


@pytest.mark.parametrize("told", ["shapes alone", "kinds"])
@pytest.mark.parametrize("with_like", [False, True], ids=["", "like"])
@pytest.mark.parametrize(("package", "name"), MODELS)
def test_there_and_back(package, name, with_like, told):
    net, _ = trained(package, name)
    state_dict = arrays(net)
    kinds = {path: type(module).__name__ for path, module in net.named_modules()}
    options = {"kinds": kinds} if told == "kinds" else {}
    variables = convert.from_torch(state_dict, **options)
    assert variables["batch_stats"]
    if with_like:  # of the Flax model whose tree this is
        like = jax.eval_shape(lambda: variables)
        imported = convert.from_torch(state_dict, like=like, **options)
        assert_trees_close(imported, variables, tol=0)
    back = convert.to_torch(
        variables,
        num_batches_tracked=2,
        **options,
        **({"like": state_dict} if with_like else {}),
    )
    assert_same(back, state_dict)


# Models of Flax, as small as they can be. Modules are called as torch's, but with _.


def conv(name, features, kernel=3, strides=1, **options):
    return nn.Conv(
        features, (kernel, kernel), strides, kernel // 2, name=name, **options
    )


def norm(name, activation=None):
    return bnjax.BatchNorm(True, activation=activation, name=name)


class ResNet18(nn.Module):
    """References: He et al. 2016."""

    @nn.compact
    def __call__(self, x):
        unbiased = functools.partial(conv, use_bias=False)
        x = norm("bn1", nn.relu)(unbiased("conv1", 64, 7, 2)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, features in enumerate((64, 128, 256, 512), 1):
            for block in (0, 1):
                at = f"layer{stage}_{block}_"
                strides = 2 if stage > 1 and not block else 1
                y = unbiased(at + "conv1", features, 3, strides)(x)
                y = unbiased(at + "conv2", features)(norm(at + "bn1", nn.relu)(y))
                if strides > 1:
                    x = unbiased(at + "downsample_0", features, 1, strides)(x)
                    x = norm(at + "downsample_1")(x)
                x = norm(at + "bn2", nn.relu)(y, residual=x)
        return nn.Dense(11, name="fc")(x.mean((1, 2)))


class Vgg11(nn.Module):
    """References: Simonyan & Zisserman 2015, configuration A."""

    @nn.compact
    def __call__(self, x):
        at = 0
        for features in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):
            if features:
                x = conv(f"features_{at}", features)(x)
                x = norm(f"features_{at + 1}", nn.relu)(x)
            else:
                x = nn.max_pool(x, (2, 2), (2, 2))
            at += 3 if features else 1
        x = x.repeat(7, 1).repeat(7, 2)  # torch's pooling to 7x7, of one position
        x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)  # (c, h, w)
        x = nn.relu(nn.Dense(4096, name="classifier_0")(x))
        x = nn.relu(nn.Dense(4096, name="classifier_3")(x))
        return nn.Dense(11, name="classifier_6")(x)


class MobileNetV2(nn.Module):
    """References: Sandler et al. 2018, table 2."""

    @nn.compact
    def __call__(self, x):
        def unit(at, x, features, kernel=1, strides=1, groups=1):
            of_groups = {"feature_group_count": groups, "use_bias": False}
            x = conv(f"{at}_0", features, kernel, strides, **of_groups)(x)
            return norm(f"{at}_1", nn.relu6)(x)

        x = unit("features_0", x, 32, 3, 2)
        stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2))
        stages += ((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
        number = 0
        for factor, features, blocks, first in stages:
            for block in range(blocks):
                number += 1
                at, y, wide = f"features_{number}_conv", x, x.shape[-1] * factor
                strides = first if block == 0 else 1
                place = 0
                if factor > 1:
                    y, place = unit(f"{at}_0", y, wide), 1
                y = unit(f"{at}_{place}", y, wide, 3, strides, wide)
                y = conv(f"{at}_{place + 1}", features, 1, use_bias=False)(y)
                residual = x if block else None
                x = norm(f"{at}_{place + 2}")(y, residual=residual)
        x = unit("features_18", x, 1280)
        return nn.Dense(11, name="classifier_1")(x.mean((1, 2)))


TWINS = {
    ("torchvision", "resnet18"): ResNet18,
    ("timm", "resnet18"): ResNet18,
    ("torchvision", "vgg11_bn"): Vgg11,
    ("torchvision", "mobilenet_v2"): MobileNetV2,
}


@pytest.mark.parametrize(("package", "name"), TWINS)
def test_outputs_of_a_twin(package, name):
    torch = pytest.importorskip("torch")
    net, images = trained(package, name)
    twin, x = TWINS[package, name](), images.permute(0, 2, 3, 1).numpy()
    like = jax.eval_shape(twin.init, jax.random.key(0), x)
    options = {"names": lambda path: path.replace(".", "_"), "like": like}
    variables = convert.from_torch(arrays(net), **options)
    with torch.no_grad():
        expected = net(images).numpy()
    actual = np.asarray(jax.jit(twin.apply)(variables, x))
    assert_close(actual, expected, tol=1e-4)
    # and not by what all images have in common
    assert_close(actual - actual.mean(0), expected - expected.mean(0), tol=2e-2)


def test_the_packages_have_the_models():
    """A model that is renamed there would be skipped by nobody."""
    timm = pytest.importorskip("timm")
    models = pytest.importorskip("torchvision.models")
    assert {*TIMM} <= {*timm.list_models()}
    assert {*TORCHVISION} <= {*models.list_models()}
    assert len(MODELS) == 27
    importlib.import_module("torch")

"""The variants of batch normalization, from PyTorch's modules and to them."""

import jax
import numpy as np
import pytest
from helpers import assert_close
from test_acceptance import C, K, Net, X

from bnjax import convert

torch = pytest.importorskip("torch")


class TorchNet(torch.nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.dense, self.norm = torch.nn.Linear(K, C), norm
        self.head = torch.nn.Linear(C, 3)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.dense(x))))


class SplitBatchNorm2d(torch.nn.BatchNorm1d):
    """timm's: the main domain itself, and a module for each further one."""

    def __init__(self, features, num_splits):
        super().__init__(features, eps=1e-2)
        self.aux_bn = torch.nn.ModuleList(
            [torch.nn.BatchNorm1d(features, eps=1e-2) for _ in range(num_splits - 1)]
        )

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        parts = x.split(len(x) // (1 + len(self.aux_bn)))
        norms = [super().forward, *self.aux_bn]
        return torch.cat([norm(part) for norm, part in zip(norms, parts)])


def trained_torch(norm):
    torch.manual_seed(0)
    net = TorchNet(norm)
    for _ in range(3):
        net(torch.as_tensor(X))
    return net.eval()


@pytest.mark.parametrize("name", ["ghost", "renorm"])
def test_variants_have_the_state_dict_of_batch_norm(name):
    net = trained_torch(torch.nn.BatchNorm1d(C, eps=1e-2))
    like = Net(name).init(jax.random.key(0), X)
    variables = convert.from_torch(net.state_dict(), like=like)
    expected = net(torch.as_tensor(X)).detach().numpy()
    assert_close(Net(name).apply(variables, X), expected, tol=1e-5)
    back = convert.to_torch(variables, like=net.state_dict())
    assert set(back) == set(net.state_dict())
    np.testing.assert_array_equal(
        back["norm.running_var"], net.norm.running_var.numpy()
    )


def test_split_layers_have_the_state_dict_of_timm():
    net = trained_torch(SplitBatchNorm2d(C, 2))
    like = Net("split").init(jax.random.key(0), X)
    kinds = {"norm": "SplitBatchNorm2d", "norm.aux_bn.0": "BatchNorm2d"}
    variables = convert.from_torch(net.state_dict(), kinds=kinds, like=like)
    expected = net(torch.as_tensor(X)).detach().numpy()
    assert_close(Net("split").apply(variables, X), expected, tol=1e-5)
    assert_close(
        variables["batch_stats"]["norm"]["mean"][1],
        net.norm.aux_bn[0].running_mean.numpy(),
    )
    net.train()
    expected = net(torch.as_tensor(X)).detach().numpy()
    trains, _ = Net("split").apply(variables, X, True, mutable=["batch_stats"])
    assert_close(trains, expected, tol=1e-5)

    net = trained_torch(SplitBatchNorm2d(C, 2))
    for options in ({"like": net.state_dict()}, {}):
        back = convert.to_torch(variables, kinds=kinds, **options)
        assert set(back) == set(net.state_dict())
        for entry, value in net.state_dict().items():
            if "tracked" not in entry:
                np.testing.assert_array_equal(back[entry], value.numpy(), entry)


def test_split_layers_by_another_name():
    """Modules by `names`; three domains; a layer by itself."""
    norm = SplitBatchNorm2d(C, 3)
    norm(torch.as_tensor(np.tile(X, (1, 2))[:, :C]))
    kinds, names = {"": "SplitBatchNorm2d"}, {"": "block/norm"}
    variables = convert.from_torch(norm.state_dict(), kinds=kinds, names=names)
    mean = variables["batch_stats"]["block"]["norm"]["mean"]
    assert mean.shape == (3, C)
    assert_close(mean[2], norm.aux_bn[1].running_mean.numpy())
    back = convert.to_torch(variables, kinds=kinds, names=names)
    assert set(back) == set(norm.state_dict())


def test_split_layers_that_nobody_named():
    net = trained_torch(SplitBatchNorm2d(C, 2))
    like = Net("split").init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"norm.running_mean.*\(7,\), not \(2, 7\)"):
        convert.from_torch(net.state_dict(), like=like)
    with pytest.raises(ValueError, match=r"norm/mean: its shape \(2, 7\)"):
        convert.to_torch(like)
    shared = Net("shared").init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"norm/scale: its shape \(7,\)"):
        convert.to_torch(shared, kinds={"norm": "SplitBatchNorm2d"})

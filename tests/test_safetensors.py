"""Files of safetensors: every dtype and layout, trees, and files that are none."""

import json
import os
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers import assert_trees_close

from bnjax import convert
from bnjax.convert._safetensors import _DTYPES

TREE = {
    "params": {
        "norm": {"scale": np.arange(3.0, dtype="f4")},
        "0": {"bias": np.ones(2)},
    },
    "batch_stats": {"norm": {"mean": np.zeros((), "f4")}},
}


def assert_same(actual, expected):
    """Bit for bit, dtypes and shapes too."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert actual[name].shape == value.shape, name
        assert actual[name].tobytes() == np.asarray(value).tobytes(), name


def matrix(dtype):
    return np.array([[0, 1, 0, 1], [1, 1, 0, 0], [1, 0, 1, 1]]).astype(dtype)


LAYOUTS = {
    "matrix": matrix,
    "scalar": lambda dtype: matrix(dtype)[0, 1:2].reshape(()),
    "empty": lambda dtype: matrix(dtype)[:0],
    "transposed": lambda dtype: matrix(dtype).T,
    "strided": lambda dtype: matrix(dtype)[::2, ::-3],
    "read-only": lambda dtype: np.broadcast_to(matrix(dtype)[0], (2, 4)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_dtype_comes_back(layout, tmp_path):
    path = tmp_path / "model.safetensors"
    arrays = {name: LAYOUTS[layout](dtype) for name, dtype in _DTYPES.items()}
    convert.save_safetensors(arrays, path)
    found = convert.load_safetensors(path)
    assert_same(found, arrays)
    assert len({v.dtype for v in found.values()}) == len(_DTYPES) == 19
    found["F32"][...] = 3  # writable


def test_the_other_byte_order(tmp_path):
    path = tmp_path / "model.safetensors"
    array = np.arange(6, dtype="f4").reshape(2, 3)
    convert.save_safetensors({"a": array.astype(">f4")}, path)
    assert_same(convert.load_safetensors(path), {"a": array})


def test_a_tree_comes_back(tmp_path):
    path = tmp_path / "model.safetensors"
    convert.save_safetensors(jax.tree.map(jnp.asarray, TREE), path)
    found = convert.load_safetensors(path)
    assert jax.tree.structure(found) == jax.tree.structure(TREE)
    assert_trees_close(found, jax.tree.map(lambda v: v.astype("f4"), TREE), tol=0)
    names = safetensors.numpy.load_file(path)
    assert set(names) == {
        "params/norm/scale",
        "params/0/bias",
        "batch_stats/norm/mean",
    }


def test_lists_and_boxes(tmp_path):
    """Lists have numbers for names; boxes of metadata are no level."""
    path = tmp_path / "model.safetensors"
    boxed = nn.Partitioned(np.ones(3, "f4"), names=("model",))
    convert.save_safetensors({"blocks": [{"scale": boxed}, {"bias": np.ones(2)}]}, path)
    found = convert.load_safetensors(path)
    assert found.keys() == {"blocks"}
    assert found["blocks"]["0"].keys() == {"scale"}
    assert found["blocks"]["1"]["bias"].shape == (2,)
    convert.save_safetensors({"scale": boxed}, path)
    assert convert.load_safetensors(path)["scale"].shape == (3,)


@pytest.mark.parametrize(
    ("tree", "format"), [({"a.b": np.ones(2)}, "pt"), (TREE, "flax")]
)
def test_metadata(tree, format, tmp_path):
    path = tmp_path / "model.safetensors"
    convert.save_safetensors(tree, path)
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata() == {"format": format}


def test_names_of_torch_stay_flat(tmp_path):
    path = tmp_path / "model.safetensors"
    arrays = {"a/b": np.ones(2), "a": np.zeros(3)}
    convert.save_safetensors(arrays, path)
    assert_same(convert.load_safetensors(path), arrays)
    safetensors.numpy.save_file(arrays, path)  # by others, who do not say that
    with pytest.raises(ValueError, match="nested dicts:\n  a: other entries lie in it"):
        convert.load_safetensors(path)


def test_torch_reads_it_and_writes_it(tmp_path):
    torch = pytest.importorskip("torch")
    import safetensors.torch

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, (2, 5)), torch.nn.BatchNorm2d(4))
    path = tmp_path / "model.safetensors"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        state_dict = net.to(dtype).state_dict()
        safetensors.torch.save_file(state_dict, path, {"format": "pt"})
        variables = convert.from_torch(convert.load_safetensors(path))
        convert.save_safetensors(convert.to_torch(variables), path)
        found = safetensors.torch.load_file(path)
        assert found.keys() == state_dict.keys()
        for name, tensor in state_dict.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), name
    float8 = torch.ones(3).to(torch.float8_e4m3fn)
    convert.save_safetensors({"a": float8}, path)
    assert safetensors.torch.load_file(path)["a"].dtype == torch.float8_e4m3fn


def test_all_that_does_not_fit_is_in_one_error(tmp_path):
    path = tmp_path / "model.safetensors"
    tree = {
        "params": {"a/b": np.ones(2), "c": np.ones(2, "c16"), "d": "text"},
        "other": {"e": object(), "f": np.ones(2)},
    }
    with pytest.raises(ValueError, match="was not written") as info:
        convert.save_safetensors(tree, path)
    for part in (
        "params/a/b: 'a/b' is one name of the tree",
        "params/c: complex128, which the format does not have",
        "params/d: <U4, which the format does not have",
        "other/e: a object, which is no array",
        str(path),
    ):
        assert part in str(info.value)
    assert "other/f" not in str(info.value)
    assert os.listdir(tmp_path) == []
    with pytest.raises(
        TypeError, match="tree is of type list: expected arrays by name"
    ):
        convert.save_safetensors([np.ones(2)], path)


def test_dtypes_that_numpy_lacks(tmp_path):
    path = tmp_path / "model.safetensors"
    header = {"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0")
    with pytest.raises(ValueError, match="a: F4, which NumPy does not have"):
        convert.load_safetensors(path)


def cut(raw, *_):
    return [raw[:n] for n in (0, 4, 8, 9, 60, len(raw) // 2, len(raw) - 1)]


def hostile(raw):
    length = int.from_bytes(raw[:8], "little")
    header, data = raw[8 : 8 + length], raw[8 + length :]

    def framed(header):
        return len(header).to_bytes(8, "little") + header + data

    return [
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b"hello, this is no model",
        (2**63).to_bytes(8, "little") + raw[8:],
        raw + b"more",
        framed(b"[" * 100_000),
        framed(header.replace(b"[2,3]", b"[2,4]")),
        framed(header.replace(b"[0,24]", b"[8,32]")),
        framed(header.replace(b"[2,3]", b"[99999999999,99999999999]")),
        framed(header.replace(b"F32", b"F33")),
        framed(header.replace(b"F32", b"\xff\xff\xff")),
    ]


@pytest.mark.parametrize("broken", [cut, hostile])
def test_files_that_are_none(broken, tmp_path):
    path = tmp_path / "model.safetensors"
    convert.save_safetensors({"a": np.ones((2, 3), "f4")}, path)
    raw = path.read_bytes()
    for bad in broken(raw):
        assert bad != raw
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="is no whole file of safetensors") as info:
            convert.load_safetensors(path)
        assert str(path) in str(info.value)
        assert len(str(info.value)) < 1000
    with pytest.raises(FileNotFoundError):
        convert.load_safetensors(tmp_path / "nothing")


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_nothing_is_half_written(error, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    convert.save_safetensors({"a": np.ones(3)}, path)
    before = path.read_bytes()

    def stopped(arrays, filename, metadata):
        filename.write_bytes(before[:50])
        raise error

    monkeypatch.setattr(safetensors.numpy, "save_file", stopped)
    with pytest.raises(type(error)):
        convert.save_safetensors({"a": np.zeros(5)}, path)
    assert os.listdir(tmp_path) == [path.name]
    assert path.read_bytes() == before


def test_a_folder_is_never_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("all of it")
    with pytest.raises(IsADirectoryError, match=r"mine is a folder: expected the path"):
        convert.save_safetensors({"a": np.ones(3)}, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis").read_text() == "all of it"
    with pytest.raises(FileNotFoundError, match="lies in a folder that does not exist"):
        convert.save_safetensors({"a": np.ones(3)}, tmp_path / "none" / "model")
    assert os.listdir(tmp_path) == ["mine"]


def test_others_may_read_the_file(tmp_path):
    """As the umask has it, and not as that of a temporary file."""
    plain, path = tmp_path / "plain", tmp_path / "model.safetensors"
    plain.touch()
    convert.save_safetensors({"a": np.ones(3)}, path)
    assert path.stat().st_mode == plain.stat().st_mode


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    calls = (
        lambda: convert.load_safetensors(tmp_path / "a"),
        lambda: convert.save_safetensors({}, tmp_path / "a"),
    )
    for call in calls:
        with pytest.raises(ImportError, match="pip install safetensors"):
            call()

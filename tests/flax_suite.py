"""Flax's own unit tests, with both of its BatchNorms, Linen and NNX, replaced by ours.

    python tests/flax_suite.py            # fetches the sources of the installed Flax
    python tests/flax_suite.py FOLDER     # an unpacked source distribution of Flax
    python tests/flax_suite.py -k norm    # options of pytest
    python tests/flax_suite.py --context  # Linen by bnjax.linen.replacing_batch_norm

Runs every test file that names `BatchNorm`. Flax turns warnings into errors and trains
with one value per feature, so BatchNormWarning is ignored. Both layers are replaced
because some tests compare Linen with NNX to the bit. No test is left out. With
`--context` Linen's class stays Flax's, and each test runs in the context manager.
"""

import importlib.metadata
import pathlib
import subprocess
import sys
import tarfile
import tempfile
from typing import Any

PLUGIN = """
import flax.linen
import flax.linen.normalization
import flax.nnx
import flax.nnx.nn.normalization
import pytest

import bnjax

flax.nnx.BatchNorm = flax.nnx.nn.normalization.BatchNorm = bnjax.nnx.BatchNorm


def pytest_addoption(parser):
    parser.addoption("--context", action="store_true")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    if not item.config.getoption("--context"):
        return (yield)
    with bnjax.linen.replacing_batch_norm():
        return (yield)


def pytest_configure(config):
    if not config.getoption("--context"):
        flax.linen.BatchNorm = flax.linen.normalization.BatchNorm = bnjax.BatchNorm
    config.addinivalue_line("filterwarnings", "ignore::bnjax.BatchNormWarning")
    config.addinivalue_line("filterwarnings", "ignore:jax.pmap:DeprecationWarning")
"""


def fetch(folder: pathlib.Path) -> pathlib.Path:
    """The sources of the installed version of Flax, from the package index."""
    version = importlib.metadata.version("flax")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", "flax", "--dest", str(folder), f"flax=={version}"]
    subprocess.run(command, check=True)
    with tarfile.open(next(folder.glob("flax-*.tar.gz"))) as archive:
        # Python 3.11 has filters from 3.11.4 on.
        safely: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(folder, **safely)
    return folder / f"flax-{version}"


def test_files(flax: pathlib.Path) -> list[str]:
    found = [
        path.relative_to(flax)
        for path in sorted((flax / "tests").rglob("*_test.py"))
        if "BatchNorm" in path.read_text()
    ]
    if not found:
        raise SystemExit(f"no tests of BatchNorm below {flax}")
    return [str(path) for path in found]


def run(flax: pathlib.Path, *arguments: str) -> int:
    """pytest's exit status, and its report on the standard output."""
    flax = flax.resolve()
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "swap_batch_norm.py").write_text(PLUGIN)
        code = f"import sys; sys.path.insert(0, {folder!r}); import pytest; "
        code += "sys.exit(pytest.main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, "-p", "swap_batch_norm", "-q"]
        command += ["-n", "auto", "-p", "no:cacheprovider", *arguments]
        command += test_files(flax)
        return subprocess.run(command, cwd=flax).returncode


def main() -> int:
    arguments = sys.argv[1:]
    if arguments and pathlib.Path(arguments[0]).is_dir():
        return run(pathlib.Path(arguments[0]), *arguments[1:])
    with tempfile.TemporaryDirectory() as folder:
        return run(fetch(pathlib.Path(folder)), *arguments)


if __name__ == "__main__":
    sys.exit(main())

"""Levels, imports, sizes and interfaces, as the design has them."""

import ast
import inspect
import pathlib

import pytest

import bnjax

ROOT = pathlib.Path(bnjax.__file__).parent
LEVELS = {
    0: ["_axes", "_backend", "_bound", "_checks", "_dtypes", "_files", "_replicas"],
    1: ["moments"],
    2: ["_trees", "normalize", "running"],
    3: [
        "ghost",
        "renorm",
        "split",
        "whiten",
        "population",
        "diagnostics",
        "convert",
    ],
    4: ["_layer", "_replacement"],
    5: ["fold", "linen", "nnx", "training", "_checkpoints"],
    6: ["_command_line"],
    7: ["__main__"],
}
LEVEL = {room: level for level, rooms in LEVELS.items() for room in rooms}
FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def room_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    assert room_of(path) in LEVEL, "give the new room a level"
    level = LEVEL[room_of(path)]
    for name in imported(ast.parse(path.read_text())):
        assert "jax._src" not in name
        assert name.split(".")[0] not in ("tests", "experiments")
        if name.startswith("bnjax.") and name.split(".")[1] in LEVEL:
            other = name.split(".")[1]
            assert LEVEL[other] < level or other == room_of(path), (
                f"{path.name}: {name}"
            )
        if name.split(".")[0] in ("flax", "optax"):
            assert level == 5, f"{path.name}: {name}"


PUBLIC = {
    name: value
    for name in bnjax.__all__
    if inspect.isfunction(value := getattr(bnjax, name)) or inspect.isclass(value)
}
for room in (
    bnjax.convert,
    bnjax.diagnostics,
    bnjax.fold,
    bnjax.ghost,
    bnjax.linen,
    bnjax.nnx,
    bnjax.population,
    bnjax.renorm,
    bnjax.running,
    bnjax.split,
    bnjax.training,
    bnjax.whiten,
):
    name = room.__name__.removeprefix("bnjax.")
    values = {n: getattr(room, n) for n in room.__all__}
    PUBLIC |= {f"{name}.{n}": v for n, v in values.items() if callable(v)}


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings(name):
    doc = inspect.getdoc(PUBLIC[name])
    assert doc
    assert doc.splitlines()[0].endswith(".")
    if inspect.isfunction(PUBLIC[name]):
        for section in ("Args:", "Returns:", ">>>", "References:"):
            assert section in doc, f"{name}: {section}"


@pytest.mark.parametrize("name", [n for n in PUBLIC if inspect.isfunction(PUBLIC[n])])
def test_options_are_keyword_only(name):
    """Arrays first; what has a default that is no missing array needs its name."""
    optional_arrays = {"scale", "bias", "bn_bias"}
    for parameter in inspect.signature(PUBLIC[name]).parameters.values():
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
            is_array = parameter.default is inspect.Parameter.empty
            assert is_array or parameter.name in optional_arrays | {"decay", "layer"}


def test_public_names():
    assert bnjax.__all__ == sorted(set(bnjax.__all__))
    for name in bnjax.__all__:
        assert hasattr(bnjax, name)
    for file in ("pyproject.toml", "CHANGELOG.md", "CITATION.cff"):
        assert bnjax.__version__ in (ROOT.parent / file).read_text(), file


def test_signatures_of_the_design():
    """Users' code depends on these."""
    signature = {
        n: list(inspect.signature(v).parameters)
        for n, v in PUBLIC.items()
        if not issubclass(type(v), type) or not issubclass(v, BaseException)
    }
    assert signature["moments"][:5] == "x axis mask axis_name axis_index_groups".split()
    assert signature["merge"] == ["first", "rest"]
    assert signature["Moments"] == ["count", "mean", "m2"]
    normalize = "x mean var scale bias axis epsilon dtype".split()
    assert [p for p in signature["normalize"] if p in normalize] == normalize
    batch_norm = (
        "x scale bias axis epsilon mask axis_name axis_index_groups residual "
        "activation dtype implementation"
    ).split()
    assert signature["batch_norm"][: len(batch_norm)] == batch_norm


def test_an_experiment_is_one_file():
    """It imports what at least three share, which is flat, and few of each other."""
    folder = ROOT.parent / "experiments"
    common = folder / "common"
    assert list(common.glob("*/*.py")) == []
    for path in common.glob("*.py"):
        assert {name for name in experiments_of(path) if name != "common"} == set()
    others = {"population": {"mnist"}, "scale_invariance": {"saturation"}}
    others["serve"] = {"bench"}  # its timing
    for path in folder.glob("*.py"):
        if path.stem != "figures":
            used = experiments_of(path) - {"common"}
            assert used <= others.get(path.stem, set()), path


def experiments_of(path: pathlib.Path) -> set[str]:
    """What of experiments/ a file imports, by the first name below."""
    names = imported(ast.parse(path.read_text()))
    return {n.split(".")[1] for n in names if n.startswith("experiments.")}

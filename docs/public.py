"""The public interface for Griffe, which reads source without running it.

- `bnjax.moments` and `bnjax.normalize` are functions; modules have the same names.
- Linen modules and NamedTuples are dataclasses: their fields are their signature.
- Examples (`>>>`) become code blocks, and public names in backticks become links.
"""

import functools
import re
from collections.abc import Iterator

from griffe import (
    Alias,
    Attribute,
    Class,
    Decorator,
    ExprName,
    Extension,
    GriffeLoader,
    Module,
    Object,
)

FUNCTIONS = ("moments", "normalize")  # that hide modules
OF_FLAX = ("use_fast_variance", "force_float32_reductions")  # inherited fields
EXAMPLE = re.compile(r"^( *)>>> .*\n?(?:^ *\S.*\n?)*", re.MULTILINE)
QUOTED = re.compile(r"(?<![\[`])`([A-Za-z_][\w.]*)`(?![\]`])")


class Public(Extension):
    def on_class_members(self, *, cls: Class, **_) -> None:
        bases = {str(getattr(base, "canonical_path", base)) for base in cls.bases}
        if cls.path.startswith("bnjax.linen.") or "typing.NamedTuple" in bases:
            value = ExprName("dataclasses.dataclass")
            cls.decorators.append(Decorator(value, lineno=None, endlineno=None))
        if "flax.linen.BatchNorm" in bases:
            own = {**cls.members}
            cls.members.clear()
            for name in OF_FLAX:
                cls.set_member(name, Attribute(name, value="True", annotation="bool"))
            cls.members.update(own)

    def on_package(self, *, pkg: Module, loader: GriffeLoader, **_) -> None:
        loader.resolve_aliases(external=False)
        rooms = {"": pkg} | {n: pkg[n] for n in pkg.exports if pkg[n].is_module}
        rooms = {n: room for n, room in rooms.items() if n not in FUNCTIONS}
        links = {
            name: {each: f"{room.path}.{each}" for each in room.exports}
            for name, room in rooms.items()
        }
        paths = {p: p for room in links.values() for p in room.values()}
        for thing in documented(pkg):
            room = thing.path.split(".")[1:2]
            near = paths | (links.get(*room, links[""]) if room else links[""])
            near.pop(thing.name, None)  # itself
            text = EXAMPLE.sub(as_code, thing.docstring.value)
            text = re.sub(r"^( *)References:", r"\1**References:**", text, flags=re.M)
            link = functools.partial(linked, paths=near)
            thing.docstring.value = QUOTED.sub(link, text)
            thing.labels.discard("dataclass")
        for name in FUNCTIONS:
            pkg.members[name] = Alias(name, pkg[name][name], parent=pkg)


def documented(thing: Object) -> Iterator[Object]:
    if thing.docstring:
        yield thing
    for member in thing.members.values():
        if not member.is_alias:
            yield from documented(member)


def as_code(found: re.Match) -> str:
    indent, text = found[1], found[0].rstrip("\n")
    return f"{indent}```pycon\n{text}\n{indent}```\n"


def linked(found: re.Match, paths: dict[str, str]) -> str:
    path = paths.get(found[1])
    return f"[{found[0]}][{path}]" if path else found[0]

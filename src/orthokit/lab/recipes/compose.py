"""TOML files, what they extend and the settings of a command line, laid over each other; a recipe is what they say together."""

import functools
import hashlib
import itertools
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from orthokit.checks import did_you_mean
from orthokit.lab.own import Code
from orthokit.lab.recipes.recipe import Recipe, flattened
from orthokit.lab.recipes.sections import DEEPEST, Keys, S, Section, problems_of, valid

__all__ = [
    "KINDS",
    "NAMED",
    "Part",
    "inline",
    "joined",
    "label",
    "load",
    "merged",
    "name_of",
    "overview",
    "parsed",
    "parts",
    "read_section",
    "read_toml",
]

NAMED = ("name", "kind")
"""A table that gives another name than the one it is merged into replaces it, as their options have nothing in common."""
KINDS = {"budget": ("train.epochs",), "network": ("network.kind",), "data": ("data.name", "data.kind"), "penalty": ()}
"""Folders of parts in the order in which they are laid over each other, and the keys of which a recipe needs one."""
USE = {
    "budget": "how long to train, on how many images; a part that names a network brings it",
    "network": "in place of a budget's own; not needed with nano and quick",
    "data": "the images",
    "penalty": "what acts on the filters; nothing without one",
}
BYTES = 2**18
"""Of a file; the largest study has 4,000."""
_TEXT = re.compile(r'"[^"\n]*"|\'[^\'\n]*\'|#[^\n]*')
"""Texts and comments of TOML, on one line."""
PIECES = 16
"""Parts and files that one reference joins."""


@dataclass(frozen=True)
class Part:
    """A file of this folder: a budget, a network, a data set or a penalty."""

    kind: str
    path: Path

    @property
    def summary(self) -> str:
        """What it is, in a line: the first of its file."""
        with self.path.open(encoding="utf-8") as file:
            return file.readline().strip("# \n")


@functools.cache
def parts() -> dict[str, Part]:
    """The parts that recipes are composed of, by name, in the order in which their kinds are laid over each other."""
    here = Path(__file__).parent
    return {path.stem: Part(kind, path) for kind in KINDS for path in sorted((here / kind).glob("*.toml"), key=_by_numbers)}


def _by_numbers(path: Path) -> list[str]:
    return [word.zfill(4) if word.isdigit() else word for word in re.split(r"(\d+)", path.stem)]


def overview() -> str:
    """All parts, by kind, with a line on each."""
    lines = ["A recipe is one part of each kind, joined by + in any order, such as nano+digits+strict."]
    for kind, use in USE.items():
        lines += ["", f"{kind}: {use}"]
        lines += [f"  {name:<13}{part.summary}" for name, part in parts().items() if part.kind == kind]
    own = "--set section.key=value changes a key. A TOML file of your own may go in their place or after them."
    return "\n".join([*lines, "", own])


def load(reference: str | Path, settings: Sequence[str] = (), code: Sequence[Path] = ()) -> Recipe:
    """The recipe that the user named, with what it extends and the ``settings`` of the command line merged in.

    The recipe of a run's folder is data: it is read with :func:`read_toml` and :meth:`Recipe.of`.

    Args:
        reference: parts such as ``"nano+cifar10+strict"``, in any order; a TOML file; or parts and files. Files come last, in
            the order in which they stand.
        settings: such as ``"train.epochs=10"``, as if they stood in the file; the value is read as TOML, or else is a string.
        code: folders of the modules that the recipe calls ``module:function``; by default those of the files.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such part, or two of one kind; a file is no TOML or extends itself; all together are no recipe.

    >>> from orthokit.lab.recipes.compose import load
    >>> recipe = load("strict+nano+cifar10", ["train.epochs=5"])
    >>> recipe.network.kind, recipe.data.name, recipe.train.epochs
    ('resnet', 'cifar10', 5)
    """
    reader, reference = _Reader(), str(reference)
    files = _files(reference, Path())
    raw, by = reader.composed(reference, Path(), "recipe"), Path(reference) if _is_part(files[-1]) else files[-1]
    for setting in settings:
        raw = merged(raw, reader.extended(parsed(setting), by, (by.resolve(),)))
    if all(map(_is_part, files)):
        _check_kinds(reference, raw)
    recipe = valid(Recipe, raw, " + ".join([reference, *settings]), reader.giver)
    return recipe.named(Code(tuple(folder.absolute() for folder in code)) if code else reader.code())


def name_of(reference: str) -> str:
    """What a recipe is called: its parts, and its files without folder and suffix, as they were written.

    >>> from orthokit.lab.recipes.compose import name_of
    >>> name_of("nano+cifar10+strict"), name_of("mine/wide.toml")
    ('nano+cifar10+strict', 'wide')

    Raises:
        ValueError: a file's name cannot name a folder.
    """
    name = "+".join(path.stem for path in _pieces(reference, Path()))
    if name in ("", ".", ".."):
        raise ValueError(f"runs are kept in a folder of their recipe's name; {reference!r} has none; rename the file")
    return name


def _pieces(reference: str, folder: Path, by: Path | None = None) -> list[Path]:
    """The files that a reference, which ``by`` has, joins by ``+``, in its order; names of files may have a ``+``, too."""
    words, found = reference.split("+"), list[Path]()
    if len(words) > PIECES:
        raise ValueError(f"a recipe is composed of at most {PIECES} parts and files; got {len(words)}")
    while words:
        count = next((k for k in range(len(words), 1, -1) if (folder / "+".join(words[:k])).is_file()), 1)
        name, words = "+".join(words[:count]), words[count:]
        part, path = parts().get(name), folder / name
        if part is None and not path.suffix and "/" not in name and not path.is_file():
            raise ValueError(
                f"{by or reference}: no part of a recipe is called {name!r}{did_you_mean(name, parts())}; orthokit list recipes "
                "shows all of them, and the name of a file of your own ends in .toml"
            )
        found.append(path if part is None else part.path)
    return found


def _files(reference: str, folder: Path, by: Path | None = None) -> list[Path]:
    """The same in the order in which they are laid over each other: parts by their kind, then files."""
    pieces = _pieces(reference, folder, by)
    for one, other in itertools.combinations([path for path in pieces if _is_part(path)], 2):
        if one.parent == other.parent:
            raise ValueError(
                f"{reference} names two parts of one kind ({one.parent.name}), {one.stem} and {other.stem}; leave one of them out"
            )
    return sorted(pieces, key=lambda path: [*KINDS].index(path.parent.name) if _is_part(path) else len(KINDS))


def _is_part(path: Path) -> bool:
    part = parts().get(path.stem)
    return part is not None and part.path == path


def _check_kinds(reference: str, raw: Mapping[str, Any]) -> None:
    """Say which kinds of parts are missing, where no file of the user's could bring what they would."""
    present, missing = flattened(raw), list[str]()
    for kind, keys in KINDS.items():
        if keys and not any(key in present for key in keys):
            missing.append(f"no {kind} ({', '.join(name for name, part in parts().items() if part.kind == kind)})")
    if missing:
        raise ValueError(f"{reference} names {' and '.join(missing)}; add one with a +, as in nano+cifar10+strict")


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``over`` laid over it, table by table; see :data:`NAMED`.

    >>> from orthokit.lab.recipes.compose import merged
    >>> merged({"a": {"x": 1, "y": 2}}, {"a": {"x": 3}})
    {'a': {'x': 3, 'y': 2}}
    >>> merged({"penalty": {"name": "srip", "steps": 2}}, {"penalty": {"name": "so"}})
    {'penalty': {'name': 'so'}}
    """
    result = dict(base)
    for key, value in over.items():
        present = result.get(key)
        if isinstance(present, Mapping) and isinstance(value, Mapping):
            value = _laid(key, present, value)
        result[key] = value
    return result


def _laid(key: str, present: Mapping[str, Any], value: Mapping[str, Any]) -> dict[str, Any]:
    """A table of this key over another."""
    # The options of [data] mean the same for every set; an arm of a study may be called "name".
    named = [name for name in NAMED if key != "data" and isinstance(value.get(name), str)]
    return dict(value) if any(value[name] != present.get(name) for name in named) else merged(present, value)


def parsed(setting: str) -> dict[str, Any]:
    """``"train.epochs=10"`` as the nested dictionary ``{"train": {"epochs": 10}}``."""
    key, equals, text = setting.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ValueError(f"a setting is section.key=value, such as train.epochs=10; got {setting!r}")
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = {"True": True, "False": False}.get(text.strip(), text.strip())  # as Python writes them
    for name in reversed(names):
        value = {name: value}
    return dict(value)


def inline(value: Any) -> str:
    """A value as TOML on one line.

    >>> from orthokit.lab.recipes.compose import inline
    >>> inline({"name": "share", "q": 0.1})
    '{"name" = "share", "q" = 0.1}'
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(inline, value)) + "]"
    return json.dumps(value) if isinstance(value, (str, bool)) else repr(value)


def label(settings: Sequence[str]) -> str:
    """What ``settings`` add to the name of a run's folder.

    >>> from orthokit.lab.recipes.compose import label
    >>> label(["train.epochs=10", "data.size = 16"])
    '+train.epochs=10+data.size=16'
    """
    text = "".join("+" + re.sub(r"\s*=\s*", "=", setting.strip(), count=1) for setting in settings)
    plain = re.sub(r"[^\w.=+-]+", "_", text)
    # Settings that differ only in what a folder's name cannot hold must not share it.
    return text if text == plain and len(text) <= 120 else f"{plain[:100]}~{hashlib.sha256(text.encode()).hexdigest()[:8]}"


DEPTH, FILES = 32, 1000
"""Files that extend each other, in a row and in all; one that is extended twice counts twice."""


class _Reader:
    """Reads parts and TOML files with what they extend, and remembers which file gave what."""

    def __init__(self, section: type[Section] = Section) -> None:
        self.section = section
        """Of the file that is read; see ``FILES`` and ``PARTIAL`` there."""
        self.opened: list[Path] = []
        self.given: dict[Keys, Path | None] = {}
        """By its place, which of the extended files gave a value last; none, where the one that was asked for did."""

    def composed(
        self, reference: str, folder: Path, what: str = "file", above: tuple[Path, ...] = (), place: Keys = ()
    ) -> dict[str, Any]:
        """What parts and files, joined by ``+``, say together of the table at ``place``."""
        files, raw = _files(reference, folder, above[-1] if above else None), dict[str, Any]()
        if not above and len(files) > 1:
            above = (Path(reference),)
        for path in files:
            raw = _laid(place[-1] if place else "", raw, self.read(path, what, above, place))
        return raw

    def read(self, path: Path, what: str = "file", above: tuple[Path, ...] = (), place: Keys = ()) -> dict[str, Any]:
        """What a file says of the table at ``place``; those ``above`` extend it."""
        if not path.is_file():
            named = f"{path}, which {above[-1]} extends," if above else f"{path}"
            raise FileNotFoundError(f"{named} is a folder, no {what}" if path.is_dir() else f"no {what} {named} is there")
        if path.resolve() in above:
            raise ValueError(f"{path} extends itself, through {', '.join(map(str, above))}")
        if len(above) > DEPTH or len(self.opened) >= FILES:
            raise ValueError(
                f"{path}: over {DEPTH} files extend each other in a row, or {FILES} in all; put what they say in fewer files"
            )
        self.opened.append(path)
        own = read_toml(path)
        if not place:
            own |= {name: _beside(path, own[name]) for name in self.section.FILES if name in own}
            own |= {name: _partial(own[name]) for name in self.section.PARTIAL if name in own}
        return self.extended(own, path, (*above, path.resolve()), place)

    def extended(self, own: Mapping[str, Any], path: Path, above: tuple[Path, ...], place: Keys = ()) -> dict[str, Any]:
        """A table that stands in a file, and each inside it, laid over the parts and files that its ``extends`` names."""
        bases = own.get("extends", [])
        bases = [bases] if isinstance(bases, str) else bases
        if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
            raise ValueError(
                f"{path}: extends must be a file or parts, such as mine.toml or nano+cifar10, or a list of these; got {bases!r}"
            )
        key, raw = place[-1] if place else "", dict[str, Any]()
        for base in bases:
            raw = _laid(key, raw, self.composed(base, path.parent, above=above, place=place))
        self.given |= dict.fromkeys(((*place, name) for name in own), path if len(above) > 1 else None)
        inside = {
            name: self.extended(value, path, above, (*place, name)) if isinstance(value, Mapping) else value
            for name, value in own.items()
            if name != "extends"
        }
        return _laid(key, raw, inside)

    def code(self, *more: Path) -> Code:
        """The permission to import from the folders of what was read and of ``more``; parts name no modules."""
        return Code.beside(*(path for path in self.opened if not _is_part(path)), *more)

    def giver(self, place: Keys) -> Path | None:
        """The extended file that alone gives what is there, if one does."""
        while place and place not in self.given:
            place = place[:-1]
        found = {file for keys, file in self.given.items() if keys[: len(place)] == place}
        return found.pop() if len(found) == 1 else None


def _beside(path: Path, names: Any) -> Any:
    """References that stand in ``path``, their files relative to it, with the files as paths."""
    if isinstance(names, list):
        return [_beside(path, name) for name in names]
    if not isinstance(names, str):
        return names
    pieces = _pieces(names, path.parent, path)
    return "+".join(piece.stem if _is_part(piece) else str(piece) for piece in pieces)


def _partial(table: Any) -> Any:
    """A table of parts of recipes, in which a text is what such a part extends."""
    if not isinstance(table, Mapping):
        return table
    return {name: {"extends": value} if isinstance(value, str) else value for name, value in table.items()}


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file.

    Raises:
        ValueError: it is none.
    """
    if (size := path.stat().st_size) > BYTES:
        raise ValueError(f"{path} is not a recipe, sweep or study: it has {size:,} bytes, of at most {BYTES:,}")
    try:
        text = path.read_text("utf-8-sig")  # editors may begin a file with a byte order mark
        if _is_deep(text):
            raise ValueError(f"more than {DEEPEST} tables, lists or keys inside each other")
        return tomllib.loads(text)
    except ValueError as error:  # TOML's, an encoding's, or that of an integer with thousands of digits
        raise ValueError(f"{path} is not TOML that can be read: {error}") from None


def _is_deep(text: str) -> bool:
    """Whether brackets or dotted keys go deeper than any recipe; what reads TOML takes seconds for each thousand levels."""
    depth = 0
    for line in _TEXT.sub("", text).splitlines():
        for bracket in re.findall(r"[\[\]{}]", line):
            depth += 1 if bracket in "[{" else -1
            if depth > DEEPEST:
                return True
        if any(word.count(".") > DEEPEST for word in re.split(r"[\s=,\[\]{}]", re.sub(r"\s*\.\s*", ".", line))):
            return True
    return False


def read_section(cls: type[S], path: Path) -> S:
    """The section that a TOML file is, with what it extends.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no TOML, extends itself, or is not what the section asks for; all of it in one message.
    """
    reader = _Reader(cls)
    return valid(cls, reader.read(path, cls.__name__.lower()), f"{path}", reader.giver)


def joined(files: str | Sequence[str], by: Path) -> tuple[dict[str, Any], Code]:
    """What recipes say together, merged in order, for the file that names them and may have to add to them; and its code.

    Raises:
        FileNotFoundError: no such file.
        ValueError: one of them is no TOML, extends itself, or has unknown keys or values of the wrong type.
    """
    reader = _Reader()
    raw = reader.extended({"extends": files if isinstance(files, str) else [*files]}, Path(), (by,))
    try:
        Recipe.model_validate(raw)
    except ValidationError as error:
        if lasting := [problem for problem in error.errors() if problem["type"] not in ("missing", "value_error")]:
            raise ValueError(f"{by}: {problems_of(Recipe, lasting, reader.giver)}") from None
    return raw, reader.code(by)

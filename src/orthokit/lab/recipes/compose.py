"""TOML files, what they extend and the settings of a command line, laid over each other; a recipe is what they say together."""

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from orthokit.lab.own import Code
from orthokit.lab.recipes.recipe import Recipe
from orthokit.lab.recipes.sections import Keys, S, problems_of, valid

NAMED = ("name", "kind")
"""A table that gives another name than the one it is merged into replaces it, as their options have nothing in common."""


def load(path: Path, settings: Sequence[str] = (), code: Sequence[Path] = ()) -> Recipe:
    """The recipe of a TOML file that the user named, with what it extends and the ``settings`` of the command line merged in.

    The recipe of a run's folder is data: it is read with :func:`read_toml` and :meth:`Recipe.of`.

    Args:
        path: the file.
        settings: such as ``"train.epochs=10"``, as if they stood in the file; the value is read as TOML, or else is a string.
        code: folders of the modules that the recipe calls ``module:function``; by default those of the files.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no TOML, extends itself, or is no recipe.
    """
    reader = _Reader()
    raw = reader.read(path, "recipe")
    for setting in settings:
        raw = merged(raw, reader.extended(parsed(setting), path, (path.resolve(),)))
    recipe = valid(Recipe, raw, " + ".join([str(path), *settings]), reader.giver)
    return recipe.named(Code(tuple(folder.absolute() for folder in code)) if code else Code.beside(*reader.opened))


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
    """Reads a TOML file with what it extends, and remembers which file gave what."""

    def __init__(self, files: Sequence[str] = ()) -> None:
        self.files = files
        """Keys of file names, relative to the file that gives them."""
        self.opened: list[Path] = []
        self.given: dict[Keys, Path | None] = {}
        """By its place, which of the extended files gave a value last; none, where the one that was asked for did."""

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
        own |= {name: _beside(path, own[name]) for name in self.files if not place and name in own}
        return self.extended(own, path, (*above, path.resolve()), place)

    def extended(self, own: Mapping[str, Any], path: Path, above: tuple[Path, ...], place: Keys = ()) -> dict[str, Any]:
        """A table that stands in a file, and each inside it, laid over the files that its ``extends`` names."""
        bases = own.get("extends", [])
        bases = [bases] if isinstance(bases, str) else bases
        if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
            raise ValueError(f"{path}: extends must be a file or a list of files, relative to it; got {bases!r}")
        key, raw = place[-1] if place else "", dict[str, Any]()
        for base in bases:
            raw = _laid(key, raw, self.read(path.parent / base, above=above, place=place))
        self.given |= dict.fromkeys(((*place, name) for name in own), path if len(above) > 1 else None)
        inside = {
            name: self.extended(value, path, above, (*place, name)) if isinstance(value, Mapping) else value
            for name, value in own.items()
            if name != "extends"
        }
        return _laid(key, raw, inside)

    def giver(self, place: Keys) -> Path | None:
        """The extended file that alone gives what is there, if one does."""
        while place and place not in self.given:
            place = place[:-1]
        found = {file for keys, file in self.given.items() if keys[: len(place)] == place}
        return found.pop() if len(found) == 1 else None


def _beside(path: Path, names: Any) -> Any:
    """File names that stand in ``path``, relative to it, as paths."""
    if isinstance(names, list):
        return [_beside(path, name) for name in names]
    return str(path.parent / names) if isinstance(names, str) else names


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file.

    Raises:
        ValueError: it is none.
    """
    try:
        return tomllib.loads(path.read_text("utf-8-sig"))  # editors may begin a file with a byte order mark
    except RecursionError:
        raise ValueError(f"{path} is no TOML that can be read: its values lie too deep inside each other") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML: {error}") from None


def read_section(cls: type[S], path: Path) -> S:
    """The section that a TOML file is, with what it extends.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no TOML, extends itself, or is not what the section asks for; all of it in one message.
    """
    reader = _Reader(cls.FILES)
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
    return raw, Code.beside(*reader.opened, by)

"""Recipes composed of TOML files, the files that these extend, and settings of a command line, laid over each other."""

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
from orthokit.lab.recipes.recipe import Recipe, flatten
from orthokit.lab.recipes.sections import DEEPEST, Keys, S, Section, problems_of, valid

__all__ = [
    "KINDS",
    "NAMED",
    "Part",
    "inline",
    "join",
    "label",
    "load",
    "merge",
    "name_of",
    "overview",
    "parse_setting",
    "parts",
    "read_section",
    "read_toml",
]

NAMED = ("name", "kind")
"""A table with another ``name`` or ``kind`` replaces the one below it instead of merging, because their options differ."""
KINDS = {"budget": ("train.epochs",), "network": ("network.kind",), "data": ("data.name", "data.kind"), "penalty": ()}
"""Folders of parts in the order in which they are laid over each other, and the keys of which a recipe needs one."""
USE = {
    "budget": "how long to train, on how many images; a part that names a network brings it",
    "network": "in place of a budget's own; not needed with nano and quick",
    "data": "the images",
    "penalty": "what acts on the filters; nothing without one",
}
BYTES = 2**18
"""Most bytes of a file; the largest study has 4,000."""
_TEXT = re.compile(r'"[^"\n]*"|\'[^\'\n]*\'|#[^\n]*')
"""Texts and comments of TOML, on one line."""
PIECES = 16
"""Most parts and files that one reference joins."""


@dataclass(frozen=True)
class Part:
    """A file of this folder: a budget, a network, a data set or a penalty."""

    kind: str
    path: Path

    @property
    def summary(self) -> str:
        """The first line of the file, which says what the part is."""
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
    """A text with all parts, by kind, and a line on each."""
    lines = ["A recipe is one part of each kind, joined by + in any order, such as nano+digits+strict."]
    for kind, use in USE.items():
        lines += ["", f"{kind}: {use}"]
        lines += [f"  {name:<13}{part.summary}" for name, part in parts().items() if part.kind == kind]
    ending = "--set section.key=value changes a key. A TOML file of your own may go in their place or after them."
    return "\n".join([*lines, "", ending])


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
        ValueError: no such part, or two of one kind; a file is not TOML or extends itself; all together are not a recipe.

    >>> from orthokit.lab.recipes.compose import load
    >>> recipe = load("strict+nano+cifar10", ["train.epochs=5"])
    >>> recipe.network.kind, recipe.data.name, recipe.train.epochs
    ('resnet', 'cifar10', 5)
    """
    reader, reference = _Reader(), str(reference)
    files = _files(reference, Path())
    raw, by = reader.compose(reference, Path(), "recipe"), Path(reference) if _is_part(files[-1]) else files[-1]
    for setting in settings:
        raw = merge(raw, reader.extend_table(parse_setting(setting), by, (by.resolve(),)))
    if all(map(_is_part, files)):
        _check_kinds(reference, raw)
    recipe = valid(Recipe, raw, " + ".join([reference, *settings]), reader.giver)
    return recipe.with_code(Code(tuple(folder.absolute() for folder in code)) if code else reader.code())


def name_of(reference: str) -> str:
    """The name of a recipe: its parts, and its files without folder and suffix, as they were written.

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
    """The files that a reference in the file ``by`` joins by ``+``, in its order; names of files may have a ``+``, too."""
    words, paths = reference.split("+"), list[Path]()
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
        paths.append(path if part is None else part.path)
    return paths


def _files(reference: str, folder: Path, by: Path | None = None) -> list[Path]:
    """The files of a reference in the order in which they are laid over each other: parts by their kind, then files."""
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
    """Raise ``ValueError`` where a kind of part is missing and no file of the user's could take its place."""
    present, missing = flatten(raw), list[str]()
    for kind, keys in KINDS.items():
        if keys and not any(key in present for key in keys):
            missing.append(f"no {kind} ({', '.join(name for name, part in parts().items() if part.kind == kind)})")
    if missing:
        raise ValueError(f"{reference} names {' and '.join(missing)}; add one with a +, as in nano+cifar10+strict")


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``over`` laid over it, table by table; see :data:`NAMED`.

    >>> from orthokit.lab.recipes.compose import merge
    >>> merge({"a": {"x": 1, "y": 2}}, {"a": {"x": 3}})
    {'a': {'x': 3, 'y': 2}}
    >>> merge({"penalty": {"name": "srip", "steps": 2}}, {"penalty": {"name": "so"}})
    {'penalty': {'name': 'so'}}
    """
    result = dict(base)
    for key, value in over.items():
        present = result.get(key)
        if isinstance(present, Mapping) and isinstance(value, Mapping):
            value = _lay_over(key, present, value)
        result[key] = value
    return result


def _lay_over(key: str, present: Mapping[str, Any], value: Mapping[str, Any]) -> dict[str, Any]:
    """A table of this key laid over another."""
    # The options of [data] mean the same for every set; an arm of a study may be called "name".
    names = [name for name in NAMED if key != "data" and isinstance(value.get(name), str)]
    return dict(value) if any(value[name] != present.get(name) for name in names) else merge(present, value)


def parse_setting(setting: str) -> dict[str, Any]:
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
    """The text that ``settings`` add to the name of a run's folder.

    >>> from orthokit.lab.recipes.compose import label
    >>> label(["train.epochs=10", "data.size = 16"])
    '+train.epochs=10+data.size=16'
    """
    text = "".join("+" + re.sub(r"\s*=\s*", "=", setting.strip(), count=1) for setting in settings)
    plain = re.sub(r"[^\w.=+-]+", "_", text)
    # Settings that differ only in characters that a folder's name cannot hold must not share a folder.
    return text if text == plain and len(text) <= 120 else f"{plain[:100]}~{hashlib.sha256(text.encode()).hexdigest()[:8]}"


DEPTH, FILES = 32, 1000
"""Most files that extend each other, in a row and in all; one that is extended twice counts twice."""


class _Reader:
    """Reads parts and TOML files with what they extend, and remembers which file gave what."""

    def __init__(self, section: type[Section] = Section) -> None:
        self.section = section
        """The kind of the file that is read; see its ``FILES`` and ``PARTIAL``."""
        self.paths: list[Path] = []
        self.givers: dict[Keys, Path | None] = {}
        """The extended file that gave the value at some keys last; None where the file that was asked for did."""

    def compose(
        self, reference: str, folder: Path, kind: str = "file", above: tuple[Path, ...] = (), keys: Keys = ()
    ) -> dict[str, Any]:
        """The table at ``keys`` of parts and files, joined by ``+``."""
        files, raw = _files(reference, folder, above[-1] if above else None), dict[str, Any]()
        if not above and len(files) > 1:
            above = (Path(reference),)
        for path in files:
            raw = _lay_over(keys[-1] if keys else "", raw, self.read(path, kind, above, keys))
        return raw

    def read(self, path: Path, kind: str = "file", above: tuple[Path, ...] = (), keys: Keys = ()) -> dict[str, Any]:
        """A file's table at ``keys``; the files ``above`` extend this one."""
        if not path.is_file():
            subject = f"{path}, which {above[-1]} extends," if above else f"{path}"
            raise FileNotFoundError(f"{subject} is a folder, not a {kind}" if path.is_dir() else f"no {kind} {subject} is there")
        if path.resolve() in above:
            raise ValueError(f"{path} extends itself, through {', '.join(map(str, above))}")
        if len(above) > DEPTH or len(self.paths) >= FILES:
            raise ValueError(
                f"{path}: over {DEPTH} files extend each other in a row, or {FILES} in all; put what they say in fewer files"
            )
        self.paths.append(path)
        table = read_toml(path)
        if not keys:
            table |= {name: _beside(path, table[name]) for name in self.section.FILES if name in table}
            table |= {name: _partial(table[name]) for name in self.section.PARTIAL if name in table}
        return self.extend_table(table, path, (*above, path.resolve()), keys)

    def extend_table(self, table: Mapping[str, Any], path: Path, above: tuple[Path, ...], keys: Keys = ()) -> dict[str, Any]:
        """A table that stands in a file, and each inside it, laid over the parts and files that its ``extends`` names."""
        bases = table.get("extends", [])
        bases = [bases] if isinstance(bases, str) else bases
        if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
            raise ValueError(
                f"{path}: extends must be a file or parts, such as mine.toml or nano+cifar10, or a list of these; got {bases!r}"
            )
        key, raw = keys[-1] if keys else "", dict[str, Any]()
        for base in bases:
            raw = _lay_over(key, raw, self.compose(base, path.parent, above=above, keys=keys))
        self.givers |= dict.fromkeys(((*keys, name) for name in table), path if len(above) > 1 else None)
        inside = {
            name: self.extend_table(value, path, above, (*keys, name)) if isinstance(value, Mapping) else value
            for name, value in table.items()
            if name != "extends"
        }
        return _lay_over(key, raw, inside)

    def code(self, *more: Path) -> Code:
        """The permission to import from the folders of the files that were read and of ``more``; parts name no modules."""
        return Code.beside(*(path for path in self.paths if not _is_part(path)), *more)

    def giver(self, keys: Keys) -> Path | None:
        """The extended file that alone gives the values at ``keys``; None if several do."""
        while keys and keys not in self.givers:
            keys = keys[:-1]
        files = {file for given_keys, file in self.givers.items() if given_keys[: len(keys)] == keys}
        return files.pop() if len(files) == 1 else None


def _beside(path: Path, names: Any) -> Any:
    """References in the file ``path``, with files as paths from here instead of from there."""
    if isinstance(names, list):
        return [_beside(path, name) for name in names]
    if not isinstance(names, str):
        return names
    pieces = _pieces(names, path.parent, path)
    return "+".join(piece.stem if _is_part(piece) else str(piece) for piece in pieces)


def _partial(table: Any) -> Any:
    """A table of parts of recipes, with ``{"extends": text}`` in place of each text."""
    if not isinstance(table, Mapping):
        return table
    return {name: {"extends": value} if isinstance(value, str) else value for name, value in table.items()}


def read_toml(path: Path) -> dict[str, Any]:
    """The table in a TOML file.

    Raises:
        ValueError: the file is not TOML.
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
    """Whether brackets or dotted keys go deeper than any recipe: tomllib takes seconds for each thousand levels."""
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
    """The section in a TOML file, with the files that it extends.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not TOML, extends itself, or does not fit the section; all problems in one message.
    """
    reader = _Reader(cls)
    return valid(cls, reader.read(path, cls.__name__.lower()), f"{path}", reader.giver)


def join(files: str | Sequence[str], by: Path) -> tuple[dict[str, Any], Code]:
    """The table of several recipes merged in order, for the file ``by`` that names them and may complete them; and its code.

    Raises:
        FileNotFoundError: no such file.
        ValueError: one of the files is not TOML, extends itself, or has unknown keys or values of the wrong type.
    """
    reader = _Reader()
    raw = reader.extend_table({"extends": files if isinstance(files, str) else [*files]}, Path(), (by,))
    try:
        Recipe.model_validate(raw)
    except ValidationError as error:
        if lasting := [problem for problem in error.errors() if problem["type"] not in ("missing", "value_error")]:
            raise ValueError(f"{by}: {problems_of(Recipe, lasting, reader.giver)}") from None
    return raw, reader.code(by)

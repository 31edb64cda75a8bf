"""The tables ``[data]`` and ``[network]`` of a recipe: which network is trained on which images."""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import nn

from orthokit.checks import did_you_mean, printable
from orthokit.lab.data import images as image_sets
from orthokit.lab.data.augment import Augment
from orthokit.lab.data.images import SETS, ImageSet
from orthokit.lab.data.own import FOLDER, folder_of, of_folder, of_function
from orthokit.lab.networks import registry as models
from orthokit.lab.own import Code, function, is_own

__all__ = ["DEEPEST", "DataSection", "Keys", "NetworkSection", "S", "Section", "check_plain", "problems_of", "valid"]

Keys = tuple[str, ...]
"""The keys that lead from the top of a file to a value in it."""
DEEPEST, MOST, LONGEST, LARGEST = 32, 5_000, 10_000, 1e30
"""Limits of a document: tables inside each other, values, characters of a text, and the size of a number."""
SHOWN = 10
"""Most problems that one message tells."""
_UNION = re.compile(r"(float|int|str|bool|dict|list|Interval)(\[.*)?")
"""Members of a union, which pydantic names among the keys that lead to an error."""


class Section(BaseModel):
    """A table of a recipe; unknown keys and values of the wrong type are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    FILES: ClassVar[tuple[str, ...]] = ()
    """Keys that name parts of recipes, or files relative to the one they stand in."""
    PARTIAL: ClassVar[tuple[str, ...]] = ()
    """Tables of parts of recipes by name: ``strict = "strict"`` is short for ``strict = { extends = "strict" }``."""


S = TypeVar("S", bound=Section)


class DataSection(Section):
    """``[data]``: the images."""

    kind: str | None = None
    """``"module:function"`` of your own, which returns an ``ImageSet`` or tensors."""
    name: str
    """One of ``orthokit.lab.data.images.SETS``; ``"folder"`` for files; with ``kind`` any name, by default the
    function's."""
    options: dict[str, Any] | None = None
    """Arguments of ``kind``."""
    path: str | None = None
    """With ``name = "folder"``: the folder of ``train/CLASS/*.png``, relative to the recipe's file or to ``--root``."""
    train: int | None = Field(None, ge=1)
    """Number of training images, of every class alike; by default all that the validation part leaves."""
    validation: int = Field(5000, ge=0)
    """Training images held out, of every class alike, the same for every seed; 0 for none, where all are to be trained on."""
    size: int | None = Field(None, ge=1, le=2048)
    """Side in pixels, by averaging areas; the images' own by default."""
    noise: float = Field(0.0, ge=0, le=1)
    """Share of the training images whose label is replaced by a random class, the same for every seed; 1 for random labels."""
    pad: int = Field(4, ge=0, le=512)
    """Black pixels around an image, from which a window is cut at random; 0 for no random crop."""
    flip: bool = True
    """Mirror every other image."""
    cutout: int = Field(0, ge=0, le=2048)
    """Side of a square set to the mean colour; 0 for none."""

    @model_validator(mode="before")
    @classmethod
    def _name_by_kind(cls, raw: Any) -> Any:
        kind = raw.get("kind") if isinstance(raw, dict) else None
        return {"name": kind} | raw if isinstance(kind, str) else raw

    @field_validator("kind")
    @classmethod
    def _check_kind(cls, kind: str | None) -> str | None:
        if kind is not None and not is_own(kind):
            raise ValueError(f"a data set of your own is module:function, as in my_package.mine:images; got {kind!r}")
        return kind

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str, info: Any) -> str:
        if info.data.get("kind") is None and name not in (names := (*SETS, FOLDER)):
            raise ValueError(f"no data set {name!r}{did_you_mean(name, names)}")
        return name

    @model_validator(mode="after")
    def _consistent(self) -> "DataSection":
        if self.kind is None and self.options is not None:
            raise ValueError('options are those of kind = "module:function"')
        if (self.name == FOLDER and self.kind is None) != (self.path is not None):
            raise ValueError(f'name = "{FOLDER}" and path = "..." go together')
        return self

    def images(self, root: Path, *, download: bool = False, code: Code | None = None) -> ImageSet:
        """The set, split, resized and relabelled; see :func:`orthokit.lab.data.images.load`. ``code`` is the recipe's."""
        options: dict[str, Any] = {"train": self.train, "validation": self.validation, "noise": self.noise}
        if self.kind is None and self.path is None:
            return image_sets.load(self.name, root=root, download=download, size=self.size, **options)
        if self.kind is not None:
            source = of_function(self.kind, function(self.kind, code, "data set"), root, self.options or {})
            return image_sets.arrange(self.name, source, size=self.size, **options)
        assert self.path is not None
        return image_sets.arrange(self.name, of_folder(folder_of(self.path, root, code), self.size), **options)

    @property
    def augment(self) -> Augment:
        """The augmentation."""
        return Augment(self.pad, self.flip, self.cutout)


class NetworkSection(Section):
    """``[network]``: ``kind``, one of ``orthokit.lab.networks.registry.NETWORKS`` or ``"module:function"``,
    and that network's options.
    """

    model_config = ConfigDict(extra="allow")

    kind: str
    """The network; every other key but ``arguments`` is an option of it."""
    arguments: dict[str, str] | None = None
    """Names that a function of your own has for ``channels`` and ``classes``; one that is left out is not passed."""

    @field_validator("arguments")
    @classmethod
    def _check_arguments(cls, arguments: dict[str, str] | None) -> dict[str, str] | None:
        if unknown := [key for key in arguments or {} if key not in models.ARGUMENTS]:
            raise ValueError(f'arguments rename channels and classes, as in {{ classes = "num_classes" }}; got {unknown[0]!r}')
        return arguments

    def build(self, channels: int, classes: int, code: Code | None = None) -> nn.Module:
        """The network, freshly initialised from the global generator; ``code`` is the recipe's."""
        make = function(self.kind, code) if is_own(self.kind) else None
        try:
            return models.build(self.kind, make, self.arguments, channels=channels, classes=classes, **(self.model_extra or {}))
        except TypeError as error:
            raise ValueError(f"network: {error}") from error


def valid(cls: type[S], raw: Mapping[str, Any], source: str, giver: Callable[[Keys], Path | None] = lambda _: None) -> S:
    """The section that ``raw``, from ``source``, describes; ``giver`` tells which other file gave a wrong value."""
    check_plain(raw, source)
    try:
        return cls.model_validate(raw)
    except ValidationError as error:
        raise ValueError(f"{source}: {problems_of(cls, error.errors(), giver)}") from None


def check_plain(raw: Mapping[str, Any], source: str) -> None:
    """Raise ``ValueError`` unless ``raw`` is bounded plain data, such as TOML can hold."""
    level, count = [("", raw)], 0
    for _ in range(DEEPEST):
        level = [item for key, value in level for item in _inside(key, value, source)]
        count += len(level)
        if count > MOST:
            raise ValueError(f"{source}: more than {MOST:,} values; no recipe, sweep or study needs so many")
        if not level:
            return
    raise ValueError(f"{source}: more than {DEEPEST} tables or lists inside each other, below {printable(level[0][0], 60)}")


def _inside(key: str, value: Any, source: str) -> list[tuple[str, Any]]:
    """The items of a table or list, by dotted keys; none of a valid value."""
    if isinstance(value, Mapping):
        return [(f"{key}.{name}".removeprefix(".")[:LONGEST], item) for name, item in itertools.islice(value.items(), MOST + 1)]
    if isinstance(value, list):
        return [(key, item) for item in value[: MOST + 1]]
    if isinstance(value, str):
        problem = f"a text of {len(value):,} characters, of at most {LONGEST:,}" if len(value) > LONGEST else ""
    elif isinstance(value, bool):
        problem = ""
    elif isinstance(value, int | float):
        fine = abs(value) <= LARGEST  # False for NaN, and for an integer too large for a float
        problem = "" if fine else f"should be a finite number, at most {LARGEST:g}; got {printable(repr(value), 60)}"
    else:
        problem = f"a text, number, boolean, list or table is wanted; got {type(value).__name__}"
    if problem:
        raise ValueError(f"{source}: {printable(key, 100)}: {problem}")
    return []


def problems_of(cls: type[BaseModel], problems: Sequence[Any], giver: Callable[[Keys], Path | None]) -> str:
    sentences = []
    for problem in problems[: 10 * SHOWN]:
        keys = tuple(part for part in map(str, problem["loc"]) if not _UNION.fullmatch(part))
        file = None if problem["type"] == "missing" else giver(keys)
        sentences.append((f"in {file}, " if file else "") + _problem(cls, problem, keys))
    different = list(dict.fromkeys(sentences))
    more = f"; and {len(different) - SHOWN:,} more" if len(different) > SHOWN else ""
    return "; ".join(different[:SHOWN]) + more


def _problem(cls: type[BaseModel], problem: Any, keys: Keys) -> str:
    *sections, last = keys or ("",)
    key = ".".join(keys)
    match problem["type"]:
        case "extra_forbidden":
            for section in sections:
                cls = next(iter(_sections(cls.model_fields[section].annotation)), cls) if section in cls.model_fields else cls
            return f"unknown key {key}{did_you_mean(last, cls.model_fields)}"
        case "missing":
            return f"{key} is missing"
        case "value_error":
            return f"{key}: {problem['ctx']['error']}".removeprefix(": ")
    expectation = problem["msg"].removeprefix("Input ").partition(" or instance of")[0]
    return f"{key}: {expectation[0].lower()}{expectation[1:]}; got {printable(repr(problem['input']), 100)}"


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections among the members of a field's type."""
    members = getattr(annotation, "__args__", (annotation,))
    return [member for member in members if isinstance(member, type) and issubclass(member, Section)]

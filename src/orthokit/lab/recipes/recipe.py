"""Recipes: what is trained on what, and how, in a TOML file that fully determines a run but for its seed.

.. code-block:: toml

    extends = ["parts/standard-200.toml"]   # merged in order, this file last; tables can extend files too

    [data]
    name = "cifar10"

    [network]
    kind = "resnet"
    depth = 20

    [regularizer]
    strength = 0.1
    penalty = { name = "disentangled" }

Keys are checked strictly. Where data and runs lie, devices and processes are no part of it: they belong to the command line.
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tomli_w
import torch
from pydantic import BaseModel, Field, PrivateAttr, ValidationError, field_validator, model_validator
from torch import nn

from orthokit.checks import did_you_mean
from orthokit.lab.data.images import ImageSet
from orthokit.lab.networks.init import orthogonal_
from orthokit.lab.own import Code, check_outputs, is_own
from orthokit.lab.recipes.sections import DataSection, NetworkSection, Section
from orthokit.regularizer import Regularizer, sqrt_filters
from orthokit.spec import config_of, penalty_of, schedule_of, where_of

_Keys = tuple[str, ...]
_UNION = re.compile(r"(float|int|str|bool|dict|list|Interval)(\[.*)?")
"""Members of a union, which pydantic names among the keys that lead to an error."""
SCALES = {"sqrt_filters": sqrt_filters}
NAMED = ("name", "kind")
"""A table that gives another name than the one it is merged into replaces it, as their options have nothing in common."""


S = TypeVar("S", bound=Section)


class TrainSection(Section):
    """``[train]``: SGD with momentum, and all that surrounds it."""

    epochs: int = Field(ge=1)
    """Passes over the training images."""
    batch: int = Field(128, ge=1)
    """Images in a step, over all processes together; what does not fill a batch waits for the next epoch."""
    lr: float = Field(0.1, gt=0)
    """Largest learning rate."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of SGD."""
    nesterov: bool = True
    """Nesterov's form of it."""
    weight_decay: float = Field(5e-4, ge=0)
    """On every parameter; see ``decay`` of ``[regularizer]``."""
    schedule: Literal["cosine", "step"] = "cosine"
    """Of the learning rate: half a cosine to 0, or a factor ``gamma`` at each of ``milestones``."""
    milestones: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(default_factory=list)]
    """Parts of the training after which ``schedule = "step"`` drops: 0.5 is half of the epochs."""
    gamma: float = Field(0.2, gt=0, le=1)
    """Factor of each drop."""
    warmup: float = Field(0.0, ge=0)
    """Epochs over which the learning rate rises from 0."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Of the cross-entropy in training; what is evaluated is not smoothed."""
    ema: float = Field(0.0, ge=0, lt=1)
    """Decay of an exponential moving average of the weights, which is then what is evaluated and saved; 0 for none."""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """``auto`` is bf16-mixed where the hardware multiplies bfloat16 fast, else 32-true. The penalty is in float32 either way."""
    channels_last: bool = True
    """Memory layout of images and weights."""
    compile: bool = False
    """Whether ``torch.compile`` the network."""
    init: Literal["default", "orthogonal"] = "default"
    """``orthogonal``: every convolution starts with orthonormal filters (tall ones with orthonormal columns)."""

    @model_validator(mode="after")
    def _consistent(self) -> "TrainSection":
        if (self.schedule == "step") != bool(self.milestones):
            raise ValueError('schedule = "step" and milestones = [...] go together')
        if self.milestones != sorted(set(self.milestones)):
            raise ValueError(f"milestones must increase; got {self.milestones}")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov = true needs a momentum above 0")
        if self.warmup >= self.epochs:
            raise ValueError(f"warmup = {self.warmup:g} leaves nothing of {self.epochs} epochs")
        return self


class RegularizerSection(Section):
    """``[regularizer]``: the penalty and the layers it acts on."""

    strength: float | dict[str, Any]
    """A number, or a schedule over epochs such as ``{ name = "piecewise", pieces = { 0 = 0.1, 20 = 0.01 } }``."""
    penalty: str | dict[str, Any]
    """A name such as ``"so"``, or a table with options such as ``{ name = "srip", steps = 3 }``."""
    where: str = "convs"
    """Which layers, for example ``"convs & ~stem"``."""
    scale: Literal["sqrt_filters"] | None = None
    """Multiplies an unsquared penalty of each layer."""
    decay: bool = True
    """Whether weight decay acts on the regularized kernels too, as it does where there is no penalty."""
    every: int = Field(1, ge=1)
    """Steps from one gradient of the penalty to the next."""

    @field_validator("penalty", "strength", "where")
    @classmethod
    def _canonical(cls, value: Any, info: Any) -> Any:
        if info.field_name == "where":
            return repr(where_of(value))
        return config_of((penalty_of if info.field_name == "penalty" else schedule_of)(value))

    def build(self, model: nn.Module) -> Regularizer:
        """The regularizer of a model; its step is an epoch."""
        return Regularizer(
            model,
            penalty_of(self.penalty),
            strength=schedule_of(self.strength),
            where=where_of(self.where),
            scale=None if self.scale is None else SCALES[self.scale],
            every=self.every,
        )


class Recipe(Section):
    """A whole recipe; equal ones with equal seeds make the same run."""

    data: DataSection
    network: NetworkSection
    train: TrainSection
    regularizer: RegularizerSection | None = None

    _code: Code | None = PrivateAttr(None)

    @property
    def code(self) -> Code | None:
        """Of a recipe that the user named: the permission to import its ``module:function``. None if it came with data."""
        return self._code

    @property
    def own(self) -> list[str]:
        """What it calls ``module:function``."""
        return [name for name in (self.network.kind, self.data.kind) if name is not None and is_own(name)]

    @property
    def local(self) -> bool:
        """Whether it names modules or images that may lie beside its file."""
        return bool(self.own) or self.data.path is not None

    def named(self, code: Code | None) -> "Recipe":
        """The same recipe, as one that the user named."""
        copy = self.model_copy()
        copy._code = code
        return copy

    def __eq__(self, other: object) -> bool:
        """Whether both say the same, wherever they came from."""
        return isinstance(other, Recipe) and self.to_dict() == other.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with every default written out."""
        return self.model_dump(mode="json", exclude_none=True)

    def to_toml(self) -> str:
        """As a TOML file that extends no other."""
        return tomli_w.dumps(self.to_dict())

    def build(self, data: ImageSet) -> nn.Module:
        """The network for the images of a set, initialised from the global generator as the recipe says."""
        model = self.network.build(data.train.pixels.shape[1], data.classes, self.code)
        if self.train.init == "orthogonal":
            for name, module in model.named_modules():
                if isinstance(module, nn.modules.conv._ConvNd):
                    orthogonal_(module, name)
        return model

    def check(self, data: ImageSet, *, training: bool = True) -> None:
        """Build the network, call one of the user's own on two images, and throw it away: whether all fits, before any training.

        Raises:
            ValueError: it does not; the message says how.
        """
        with torch.random.fork_rng(devices=()):
            model = self.build(data)
            if training and self.regularizer is not None:
                self.regularizer.build(model)
            if is_own(self.network.kind):
                modes = (True, False) if training else (False,)
                check_outputs(model, data.normalise(data.test.pixels[:2]), data.classes, self.network.kind, modes)

    def images(self, root: Path, *, download: bool = False) -> ImageSet:
        """The images, split, resized and relabelled; ``root`` is their folder if they need one."""
        return self.data.images(root, download=download, code=self.code)

    @classmethod
    def of(cls, raw: Mapping[str, Any], source: str = "recipe") -> "Recipe":
        """The recipe of a nested dictionary, which is data: it has no :attr:`code`.

        Raises:
            ValueError: unknown keys, missing ones, values of the wrong type or out of range; all of them in one message.
        """
        return _valid(cls, raw, source)


def check_all(recipes: Iterable[Recipe], root: Path, *, download: bool = False) -> None:
    """:meth:`Recipe.check` of every recipe, on images that are loaded, and decoded, once for all.

    Raises:
        FileNotFoundError: there are no images.
        ValueError: a recipe's network does not fit its images.
    """
    same: dict[tuple[str, Code | None], dict[str, Recipe]] = {}
    for recipe in recipes:
        same.setdefault((recipe.data.model_dump_json(), recipe.code), {})[recipe.to_toml()] = recipe
    for each in same.values():
        data = next(iter(each.values())).images(root, download=download)
        for recipe in each.values():
            recipe.check(data)


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
    recipe = _valid(Recipe, raw, " + ".join([str(path), *settings]), reader.giver)
    return recipe.named(Code(tuple(folder.absolute() for folder in code)) if code else Code.beside(*reader.opened))


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``over`` laid over it, table by table; see :data:`NAMED`.

    >>> from orthokit.lab.recipes.recipe import merged
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

    >>> from orthokit.lab.recipes.recipe import inline
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

    >>> from orthokit.lab.recipes.recipe import label
    >>> label(["train.epochs=10", "data.size = 16"])
    '+train.epochs=10+data.size=16'
    """
    text = "".join("+" + re.sub(r"\s*=\s*", "=", setting.strip(), count=1) for setting in settings)
    plain = re.sub(r"[^\w.=+-]+", "_", text)
    # Settings that differ only in what a folder's name cannot hold must not share it.
    return text if text == plain and len(text) <= 120 else f"{plain[:100]}~{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def flattened(raw: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted keys and their values as JSON, to show in what two recipes differ."""
    found: dict[str, str] = {}
    for key, value in raw.items():
        found |= flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": json.dumps(value)}
    return found


def differences(one: Recipe, other: Recipe) -> str:
    """``train.epochs: 20 -> 10, ...``"""
    a, b = flattened(one.to_dict()), flattened(other.to_dict())
    keys = [key for key in a | b if a.get(key) != b.get(key)]
    return ", ".join(f"{key}: {a.get(key, 'absent')} -> {b.get(key, 'absent')}" for key in keys)


DEPTH, FILES = 32, 1000
"""Files that extend each other, in a row and in all; one that is extended twice counts twice."""


class _Reader:
    """Reads a TOML file with what it extends, and remembers which file gave what."""

    def __init__(self, files: Sequence[str] = ()) -> None:
        self.files = files
        """Keys of file names, relative to the file that gives them."""
        self.opened: list[Path] = []
        self.given: dict[_Keys, Path | None] = {}
        """By its place, which of the extended files gave a value last; none, where the one that was asked for did."""

    def read(self, path: Path, what: str = "file", above: tuple[Path, ...] = (), place: _Keys = ()) -> dict[str, Any]:
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

    def extended(self, own: Mapping[str, Any], path: Path, above: tuple[Path, ...], place: _Keys = ()) -> dict[str, Any]:
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

    def giver(self, place: _Keys) -> Path | None:
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
    return _valid(cls, reader.read(path, cls.__name__.lower()), f"{path}", reader.giver)


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
            raise ValueError(f"{by}: {_told(Recipe, lasting, reader.giver)}") from None
    return raw, Code.beside(*reader.opened, by)


def _valid(cls: type[S], raw: Mapping[str, Any], source: str, giver: Callable[[_Keys], Path | None] = lambda _: None) -> S:
    """The section that data of a source are; ``giver`` tells which other file gave what is wrong."""
    try:
        return cls.model_validate(raw)
    except ValidationError as error:
        raise ValueError(f"{source}: {_told(cls, error.errors(), giver)}") from None


def _told(cls: type[BaseModel], problems: Sequence[Any], giver: Callable[[_Keys], Path | None]) -> str:
    told = []
    for problem in problems:
        place = tuple(part for part in map(str, problem["loc"]) if not _UNION.fullmatch(part))
        file = None if problem["type"] == "missing" else giver(place)
        told.append((f"in {file}, " if file else "") + _problem(cls, problem, place))
    return "; ".join(dict.fromkeys(told))


def _problem(cls: type[BaseModel], problem: Any, place: _Keys) -> str:
    *sections, last = place or ("",)
    key = ".".join(place)
    match problem["type"]:
        case "extra_forbidden":
            for section in sections:
                cls = next(iter(_sections(cls.model_fields[section].annotation)), cls) if section in cls.model_fields else cls
            return f"unknown key {key}{did_you_mean(last, cls.model_fields)}"
        case "missing":
            return f"{key} is missing"
        case "value_error":
            return f"{key}: {problem['ctx']['error']}".removeprefix(": ")
    wanted = problem["msg"].removeprefix("Input ").partition(" or instance of")[0]
    return f"{key}: {wanted[0].lower()}{wanted[1:]}; got {problem['input']!r}"


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections among the members of a field's type."""
    members = getattr(annotation, "__args__", (annotation,))
    return [member for member in members if isinstance(member, type) and issubclass(member, Section)]

"""Recipes: which network is trained on which images, and how. A recipe and a seed determine a run.

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

Keys are checked strictly. Folders, devices and processes are not part of a recipe: they belong to the command line.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
import torch
from pydantic import Field, PrivateAttr, field_validator, model_validator
from torch import nn

from orthokit.lab.data.images import ImageSet
from orthokit.lab.networks.init import Init, initialise_
from orthokit.lab.own import Code, check_outputs, is_own
from orthokit.lab.recipes.sections import DataSection, NetworkSection, Section, valid
from orthokit.regularizer import Regularizer, sqrt_filters
from orthokit.spec import config_of, penalty_of, schedule_of, where_of

__all__ = ["Recipe", "RegularizerSection", "TrainSection", "check_all", "differences", "flatten"]

SCALES = {"sqrt_filters": sqrt_filters}


class TrainSection(Section):
    """``[train]``: SGD with momentum, and all that surrounds it."""

    epochs: int = Field(ge=1, le=10**6)
    """Passes over the training images."""
    batch: int = Field(128, ge=1, le=10**6)
    """Images in a step, over all processes together; what does not fill a batch waits for the next epoch."""
    lr: float = Field(0.1, gt=0, le=1e30)
    """Largest learning rate."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD."""
    nesterov: bool = True
    """Whether the momentum is Nesterov's."""
    weight_decay: float = Field(5e-4, ge=0, le=1e30)
    """Weight decay of every parameter; see ``decay`` of ``[regularizer]``."""
    schedule: Literal["cosine", "step"] = "cosine"
    """Schedule of the learning rate: half a cosine to 0, or a factor ``gamma`` at each of ``milestones``."""
    milestones: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(default_factory=list)]
    """Parts of the training after which ``schedule = "step"`` drops: 0.5 is half of the epochs."""
    gamma: float = Field(0.2, gt=0, le=1)
    """Factor of each drop."""
    warmup: float = Field(0.0, ge=0)
    """Epochs over which the learning rate rises from 0."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Label smoothing of the cross-entropy in training; evaluations use none."""
    ema: float = Field(0.0, ge=0, lt=1)
    """Decay of an exponential moving average of the weights, which is then evaluated and saved; 0 for none."""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """``auto`` is bf16-mixed where the hardware multiplies bfloat16 fast, else 32-true. The penalty is in float32 either way."""
    channels_last: bool = True
    """Memory layout of images and weights."""
    compile: bool = False
    """Whether ``torch.compile`` the network."""
    init: Literal["default"] | Init = "default"
    """Initialisation of the convolutions: the network's own; ``orthogonal``, orthonormal filters (tall ones with orthonormal
    columns); or ``he``, normal with variance 2 over the fan-out."""

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
    """The layers, for example ``"convs & ~stem"``."""
    scale: Literal["sqrt_filters"] | None = None
    """Multiplies an unsquared penalty of each layer."""
    decay: bool = True
    """Whether weight decay acts on the regularized kernels too, as it does where there is no penalty."""
    every: int = Field(1, ge=1, le=10**9)
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
        """The permission to import the ``module:function`` of a recipe that the user named; None if the recipe came with data."""
        return self._code

    @property
    def own_functions(self) -> list[str]:
        """The names ``module:function`` in the recipe."""
        return [name for name in (self.network.kind, self.data.kind) if name is not None and is_own(name)]

    @property
    def local(self) -> bool:
        """Whether the recipe names modules or images that may lie beside its file."""
        return bool(self.own_functions) or self.data.path is not None

    def with_code(self, code: Code | None) -> "Recipe":
        """The same recipe with the permission ``code``, as one that the user named."""
        copy = self.model_copy()
        copy._code = code
        return copy

    def __eq__(self, other: object) -> bool:
        """Whether both say the same, wherever they came from."""
        return isinstance(other, Recipe) and self.to_dict() == other.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with every default written out."""
        return self.model_dump(mode="json", exclude_none=True)

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that two recipes share if they are equal, however they were composed.

        Keys at their default count for nothing: a key that a later version adds leaves the digests of today's recipes alone.
        """
        own = self.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]

    def to_toml(self) -> str:
        """The recipe as a TOML file that extends no other."""
        return tomli_w.dumps(self.to_dict())

    def build(self, data: ImageSet) -> nn.Module:
        """The network for the images of a set, initialised from the global generator as the recipe says."""
        model = self.network.build(data.train.pixels.shape[1], data.classes, self.code)
        if self.train.init != "default":
            for name, module in model.named_modules():
                if isinstance(module, nn.modules.conv._ConvNd):
                    initialise_(module, self.train.init, name)
        return model

    def check(self, data: ImageSet, *, training: bool = True) -> None:
        """Raise unless network and images fit: build the network, call one of the user's own on two images, throw it away.

        Raises:
            ValueError: they do not fit; the message says how.
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
            ValueError: unknown or missing keys, values of the wrong type or out of range; all problems in one message.
        """
        return valid(cls, raw, source)


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


def flatten(raw: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted keys and their values as JSON, to show how two recipes differ."""
    values: dict[str, str] = {}
    for key, value in raw.items():
        values |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": json.dumps(value)}
    return values


def differences(one: Recipe, other: Recipe) -> str:
    """The keys in which two recipes differ: ``train.epochs: 20 -> 10, ...``"""
    a, b = flatten(one.to_dict()), flatten(other.to_dict())
    keys = [key for key in a | b if a.get(key) != b.get(key)]
    return ", ".join(f"{key}: {a.get(key, 'absent')} -> {b.get(key, 'absent')}" for key in keys)

"""Functions of the user's own, which a recipe names ``module:function``: who may import them, and from where.

Importing a module runs it. A name is therefore imported only for a recipe that the user named, as a file or an option of the
command line. The readers of such files give their recipes a :class:`Code`; recipes inside weights, summaries, checkpoints and
results are data and have none, and without one :func:`function` refuses.
"""

import importlib
import inspect
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from orthokit.checks import did_you_mean

__all__ = ["ANNOUNCED", "Code", "arguments_of", "check_options", "check_outputs", "function", "is_own", "refusal"]

_IMPORTED: dict[str, str | None] = {}
"""Top-level modules that were imported here, and the files they are from."""
ANNOUNCED: set[tuple[str, tuple[Path, ...]]] = set()
"""Names whose import standard error has heard of in this command."""


@dataclass(frozen=True)
class Code:
    """The permission to import what a recipe calls ``module:function``; made by readers of what the user named.

    Args:
        folders: where modules are looked for first: the folders of the recipe and of the files that it extends.
    """

    folders: tuple[Path, ...] = ()

    @classmethod
    def beside(cls, *files: Path) -> "Code":
        """The permission for recipes in these files."""
        return cls(tuple(dict.fromkeys(file.absolute().parent for file in files)))


def is_own(name: str | None) -> bool:
    """Whether ``name`` is of the form ``module:function``."""
    return name is not None and ":" in name


def refusal(name: str) -> str:
    """The error for a name that came with data and is not imported, with what to do."""
    return (
        f"{name} is code, and this recipe came with data, from which nothing is imported; if you trust {name}, name it yourself: "
        f"--recipe FILE, or --model {name} for a network"
    )


def function(name: str, code: Code | None, product: str = "network") -> Callable[..., Any]:
    """The function that ``"module:function"`` names. The module is imported; standard error says so first.

    The module is looked for in the folders of ``code``, then on Python's path, then in the working directory.

    Args:
        name: ``"package.module:function"``.
        code: the permission of the recipe that names the function.
        product: what the function makes, for messages.

    Raises:
        ValueError: no permission; no such module or function; a module that fails while it is imported.
        ModuleNotFoundError: the module imports another one, which is missing.
        TypeError: not a function.
    """
    path, _, last = name.partition(":")
    if not all(part.isidentifier() for part in [*path.split("."), last]):
        raise ValueError(f"a {product} of your own is named module:function, as in my_package.mine:small; got {name!r}")
    if code is None:
        raise ValueError(refusal(name))
    _tell(name, code, product)
    module = _module(path, name, code, product)
    make = getattr(module, last, None)
    if make is None:
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(
            f"module {path!r} ({getattr(module, '__file__', 'built in')}) has no {last!r}{did_you_mean(last, public)}"
        )
    if not callable(make):
        raise TypeError(f"{name} must be a function that makes a {product}; got {type(make).__name__}")
    return make  # type: ignore[no-any-return]


def _tell(name: str, code: Code, product: str) -> None:
    first = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"
    if first and multiprocessing.current_process().name == "MainProcess" and (name, code.folders) not in ANNOUNCED:
        ANNOUNCED.add((name, code.folders))
        search = f", looked for in {', '.join(map(str, code.folders))} first" if code.folders else ""
        print(f"orthokit: importing {name} for the {product} of your recipe{search}", file=sys.stderr, flush=True)


def _module(path: str, name: str, code: Code, product: str) -> ModuleType:
    """The module, with the folders of ``code`` first on the import path."""
    folders = list(map(str, code.folders))
    sys.path[:] = [*folders, *(entry for entry in sys.path if entry not in folders)]
    if (here := str(Path.cwd())) not in sys.path and "" not in sys.path:
        sys.path.append(here)
    importlib.invalidate_caches()
    top = path.partition(".")[0]
    _drop_other(top, folders)
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise  # the module is there, something that it imports is not
        folders_text = " or ".join([*folders, "on Python's path"])
        raise ValueError(
            f"no module {error.name!r} for the {product} {name!r} in {folders_text}; move it there, or install it"
        ) from None
    except (Exception, SystemExit) as error:  # of anybody's code
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"importing {path} for the {product} {name!r} fails: {type(error).__name__}: {reason}") from error
    _IMPORTED[top] = _origin(sys.modules[top])
    return module


def _origin(module: ModuleType) -> str | None:
    return getattr(module.__spec__, "origin", None)


def _drop_other(top: str, folders: list[str]) -> None:
    """Forget a module of this name that an earlier recipe brought from another folder."""
    spec, present = PathFinder.find_spec(top, folders), sys.modules.get(top)
    if spec is None or spec.origin is None or present is None or _origin(present) == spec.origin:
        return
    if _IMPORTED.get(top) != _origin(present):
        raise ValueError(
            f"{spec.origin} has the name of a module that is imported already, {_origin(present) or top}; rename yours"
        )
    for name in [each for each in sys.modules if each == top or each.startswith(f"{top}.")]:
        del sys.modules[name]


def arguments_of(make: Callable[..., Any]) -> tuple[list[str], bool]:
    """The names of a function's arguments, and whether it takes others too."""
    parameters = inspect.signature(make).parameters
    return list(parameters), any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def check_options(name: str, options: Mapping[str, Any], names: list[str]) -> None:
    """Raise ``ValueError`` where an option is not among ``names``."""
    for option in options:
        if option not in names:
            raise ValueError(f"{name} has no option {option!r}{did_you_mean(option, names)}")


def check_outputs(model: nn.Module, images: Tensor, classes: int, kind: str, modes: Iterable[bool] = (True, False)) -> None:
    """Call a network in training mode, in evaluation mode, or in both: it must return logits.

    Args:
        model: anybody's network; its statistics of batches change.
        images: ``(n, channels, h, w)``.
        classes: outputs.
        kind: the network's name, for messages.
        modes: True for training.

    Raises:
        ValueError: the network fails, or returns something else than ``(n, classes)`` numbers.
    """
    n, channels, height, width = images.shape
    inputs = f"{n} images of {channels} channels, {height}x{width}"
    for mode in modes:
        model.train(mode)
        subject = f"network: {kind}, called in {'training' if mode else 'evaluation'} mode with {inputs},"
        try:
            with torch.no_grad():
                output = model(images)
        except Exception as error:  # of anybody's network
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise ValueError(f"{subject} fails with {reason}") from error
        if not isinstance(output, Tensor):
            names = ", ".join(map(str, output)) if isinstance(output, Mapping) else ""
            description = type(output).__name__ + f" with {names}" * bool(names)
            raise ValueError(
                f"{subject} must return a tensor of logits; got {description}: wrap it in a module that returns these alone"
            )
        if output.shape != (n, classes) or not output.is_floating_point():
            description = f"{str(output.dtype).removeprefix('torch.')} {tuple(output.shape)}"
            raise ValueError(f"{subject} must return logits ({n}, {classes}), one for each class; got {description}")

"""The networks that recipes name, and networks of your own."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from orthokit.checks import did_you_mean
from orthokit.lab.networks.resnet import ImageNetResNet, ResNet
from orthokit.lab.networks.wide_resnet import WideResNet
from orthokit.lab.own import arguments_of, check_options

__all__ = ["ARGUMENTS", "NETWORKS", "build"]

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet": ResNet,
    "imagenet_resnet": ImageNetResNet,
    "wide_resnet": WideResNet,
}


ARGUMENTS = {
    "channels": ("channels", "in_chans", "in_channels", "num_channels"),
    "classes": ("classes", "num_classes", "n_classes", "num_labels"),
}
"""Names that functions have for these arguments; the first that a signature has is used."""
PACKAGES = {"timm": {"channels": "in_chans", "classes": "num_classes"}, "torchvision": {"classes": "num_classes"}}
"""Names in packages whose signatures do not show them; torchvision's networks read three channels."""


def build(
    kind: str,
    function: Callable[..., Any] | None = None,
    arguments: Mapping[str, str] | None = None,
    /,
    *,
    channels: int,
    classes: int,
    **options: Any,
) -> nn.Module:
    """The network that a recipe names.

    >>> from orthokit.lab.networks.registry import build
    >>> sum(p.numel() for p in build("resnet", channels=3, classes=10, depth=20, shortcut="identity").parameters())
    269722

    Args:
        kind: a key of ``NETWORKS``; or any name for ``function``, used in messages.
        function: a function of the caller's, called with ``channels``, ``classes`` and the options by name. Nothing is imported
            here: see ``orthokit.lab.own``.
        arguments: the names that ``function`` has for channels and classes; by default those of its signature, see ``ARGUMENTS``.
        channels: channels of the images.
        classes: outputs.
        **options: the network's other arguments.

    Raises:
        ValueError: no such network; an option it does not have, or a value out of range.
        TypeError: an option of the wrong type, or something that makes no ``nn.Module``.
    """
    make = function or NETWORKS.get(kind)
    if make is None:
        raise ValueError(f"no network {kind!r}{did_you_mean(kind, NETWORKS)} (module:function names one of your own)")
    if function is None and arguments is not None:
        raise ValueError(f"arguments are those of a function of your own; {kind} has channels and classes")
    names, more = arguments_of(make)
    names_by_role = _arguments(kind, names, more) if arguments is None else dict(arguments)
    if not more:
        option_names = [name for name in names if name not in names_by_role.values()]
        check_options(kind, options, option_names)
        if unknown := [name for name in names_by_role.values() if name not in names]:
            raise ValueError(f"{kind} has no argument {unknown[0]!r}{did_you_mean(unknown[0], names)}")
    sizes = {"channels": channels, "classes": classes}
    values = {name: sizes[role] for role, name in names_by_role.items()}
    try:
        network = make(**values, **options)
    except Exception as error:  # of anybody's function
        if function is None:
            raise
        call = ", ".join(f"{name}={value!r}" for name, value in (values | options).items())
        raise ValueError(f"{kind}({call}) fails with {' '.join(f'{type(error).__name__}: {error}'.split())[:300]}") from error
    if not isinstance(network, nn.Module):
        raise TypeError(f"{kind} must return a torch.nn.Module; got {type(network).__name__}")
    return network


def _arguments(kind: str, names: list[str], more: bool) -> dict[str, str]:
    """The names that a function has for channels and classes: by its signature, by its package, or else just these."""
    names_by_role = {role: next((name for name in candidates if name in names), None) for role, candidates in ARGUMENTS.items()}
    by_package = PACKAGES.get(kind.partition(":")[0].partition(".")[0])
    if by_package is not None:
        names_by_role = {role: name or by_package.get(role) for role, name in names_by_role.items()}
    elif more:
        names_by_role = {role: name or role for role, name in names_by_role.items()}
    elif missing := [role for role, name in names_by_role.items() if name is None]:
        raise ValueError(
            f"{kind} must take channels and classes; it takes no {' and no '.join(missing)}. Say what it calls them: "
            'arguments = { channels = "...", classes = "..." }, without what it does not take'
        )
    return {role: name for role, name in names_by_role.items() if name is not None}

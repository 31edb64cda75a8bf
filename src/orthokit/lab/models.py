"""Networks for small images: residual networks, wide residual networks, and anybody's own by name."""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from orthokit.checks import check_choice, check_count, check_number, did_you_mean
from orthokit.kernel import evaluating
from orthokit.lab.own import accepted, check_options
from orthokit.report import report
from orthokit.select import convs, layers
from orthokit.statedict import bare, pick
from orthokit.tables import Row

Norm = Literal["batch", "group", "none"]
Shortcut = Literal["projection", "identity"]
Block = Literal["basic", "bottleneck"]
NORMS: tuple[Norm, ...] = ("batch", "group", "none")
SHORTCUTS: tuple[Shortcut, ...] = ("projection", "identity")
BLOCKS: tuple[Block, ...] = ("basic", "bottleneck")


def _norm(norm: Norm, width: int) -> nn.Module:
    """The normalisation of ``width`` channels."""
    if norm == "batch":
        return nn.BatchNorm2d(width)
    if norm == "none":
        return nn.Identity()
    groups = min(32, max(1, width // 8))
    if width % groups:
        raise ValueError(f"norm='group' needs layers whose filters {groups} groups divide; got {width} filters: change the width")
    return nn.GroupNorm(groups, width)


def _conv(norm: Norm, width_in: int, width: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps height and width up to its stride; with a bias where no normalisation has one."""
    return nn.Conv2d(width_in, width, size, stride, padding=size // 2, bias=norm == "none")


class PadShortcut(nn.Module):
    """Every ``stride``-th pixel of the input, and ``extra`` channels of zeros after its own: no parameters."""

    def __init__(self, stride: int, extra: int) -> None:
        super().__init__()
        self.stride, self.extra = stride, extra

    def forward(self, x: Tensor) -> Tensor:
        """``(n, c, h, w) -> (n, c + extra, h / stride, w / stride)``."""
        return F.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, extra={self.extra}"


def _shortcut(shortcut: Shortcut, norm: Norm, width_in: int, width: int, stride: int) -> nn.Module:
    """The way around a block; empty where the shape stays."""
    if stride == 1 and width_in == width:
        return nn.Sequential()
    if shortcut == "identity":
        return PadShortcut(stride, width - width_in)
    return nn.Sequential(_conv(norm, width_in, width, 1, stride), _norm(norm, width))


class BasicBlock(nn.Module):
    """Two normalised 3x3 convolutions around a shortcut."""

    def __init__(
        self, width_in: int, width: int, stride: int, *, norm: Norm = "batch", shortcut: Shortcut = "projection"
    ) -> None:
        super().__init__()
        self.conv1 = _conv(norm, width_in, width, 3, stride)
        self.bn1 = _norm(norm, width)
        self.conv2 = _conv(norm, width, width)
        self.bn2 = _norm(norm, width)
        self.shortcut = _shortcut(shortcut, norm, width_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, width_in, h, w) -> (n, width, h / stride, w / stride)``."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1 to a quarter of the width, 3x3 with the stride, 1x1 back, around a projected shortcut."""

    def __init__(self, width_in: int, width: int, stride: int, *, norm: Norm = "batch") -> None:
        super().__init__()
        inner = width // 4
        self.conv1 = _conv(norm, width_in, inner, 1)
        self.bn1 = _norm(norm, inner)
        self.conv2 = _conv(norm, inner, inner, 3, stride)
        self.bn2 = _norm(norm, inner)
        self.conv3 = _conv(norm, inner, width, 1)
        self.bn3 = _norm(norm, width)
        self.shortcut = _shortcut("projection", norm, width_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, width_in, h, w) -> (n, width, h / stride, w / stride)``."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class WideBlock(nn.Module):
    """Normalise, rectify, convolve, twice, with dropout before the second convolution; nothing after the sum.

    A projection reads the normalised input, as in the authors' code.
    """

    def __init__(self, width_in: int, width: int, stride: int, *, norm: Norm = "batch", dropout: float = 0.0) -> None:
        super().__init__()
        self.bn1 = _norm(norm, width_in)
        self.conv1 = _conv(norm, width_in, width, 3, stride)
        self.bn2 = _norm(norm, width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _conv(norm, width, width)
        self.shortcut = None if stride == 1 and width_in == width else _conv(norm, width_in, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, width_in, h, w) -> (n, width, h / stride, w / stride)``."""
        y = F.relu(self.bn1(x))
        around = x if self.shortcut is None else self.shortcut(y)
        inside: Tensor = self.conv2(self.dropout(F.relu(self.bn2(self.conv1(y)))))
        return inside + around


def _stages(
    block: Callable[[int, int, int], nn.Module], width_in: int, widths: Iterable[int], counts: Iterable[int]
) -> nn.Sequential:
    """``counts[s]`` blocks of ``widths[s]`` filters; the first of each stage but the first halves height and width."""
    blocks = []
    for stage, (width, count) in enumerate(zip(widths, counts, strict=True)):
        for index in range(count):
            blocks.append(block(width_in, width, 2 if stage > 0 and index == 0 else 1))
            width_in = width
    return nn.Sequential(*blocks)


def _he(network: nn.Module) -> None:
    """Convolutions of He et al. (2015, https://arxiv.org/abs/1502.01852), scaled to the fan-out; biases zero."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def _check(channels: int, classes: int, norm: Norm) -> None:
    check_count("channels", channels)
    check_count("classes", classes)
    check_choice("norm", norm, NORMS)


def unwrapped(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict in a checkpoint, without the prefixes of DistributedDataParallel and ``torch.compile``."""
    return bare(pick(checkpoint)[0])


class ResNet(nn.Module):
    """The CIFAR residual network of He et al. (2015, https://arxiv.org/abs/1512.03385).

    Three stages of 16, 32 and 64 filters; PyTorch's initialisation. The 1x1 projections, 32x16 and 64x32, have more filters
    than weights per filter: they are tall. So is the first convolution, 16x9, of images with one channel. With bottlenecks the
    blocks put out four times as many filters, and the last convolution of each, with four filters for each weight, is tall too:
    12 of the 31 convolutions of 29 layers.

    Args:
        depth: ``6 b + 2`` layers for ``b`` basic blocks a stage (8, 14, ...), ``9 b + 2`` for ``b`` bottlenecks (11, 20, ...).
        channels: of the images.
        classes: outputs.
        shortcut: where the shape changes, ``"projection"`` by a 1x1 convolution (the paper's option B) or ``"identity"``, the
            strided input with zeros for the new channels (its option A, the one it reports for CIFAR).
        block: ``"basic"``, two 3x3 convolutions, or ``"bottleneck"``, a 3x3 between two 1x1, with projected shortcuts.
        norm: ``"batch"``; ``"group"``, groups of 8 channels, at most 32 groups; ``"none"``, convolutions then have a bias.
    """

    def __init__(
        self,
        depth: int = 8,
        channels: int = 3,
        classes: int = 10,
        *,
        shortcut: Shortcut = "projection",
        norm: Norm = "batch",
        block: Block = "basic",
    ) -> None:
        super().__init__()
        check_choice("block", block, BLOCKS)
        per_block = 6 if block == "basic" else 9
        check_count("depth", depth, per_block + 2)
        if depth % per_block != 2:
            known = ", ".join(str(per_block * blocks + 2) for blocks in (1, 2, 3))
            raise ValueError(f"depth must be {per_block} b + 2 for b {block} blocks a stage ({known}, ...); got {depth}")
        _check(channels, classes, norm)
        check_choice("shortcut", shortcut, SHORTCUTS)
        if block == "bottleneck" and shortcut == "identity":
            raise ValueError('block="bottleneck" has projected shortcuts; leave shortcut="identity" out')
        self.conv = _conv(norm, channels, 16)
        self.bn = _norm(norm, 16)
        factor, make = (1, partial(BasicBlock, shortcut=shortcut)) if block == "basic" else (4, Bottleneck)
        widths = [factor * width for width in (16, 32, 64)]
        self.blocks = _stages(partial(make, norm=norm), 16, widths, [depth // per_block] * 3)
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(n, channels, h, w)`` to logits ``(n, classes)``."""
        features = self.blocks(F.relu(self.bn(self.conv(x))))
        logits: Tensor = self.fc(features.mean((-2, -1)))
        return logits

    @classmethod
    def from_checkpoint(cls, checkpoint: Mapping[str, Any]) -> "ResNet":
        """The network whose state dict is in ``checkpoint``; its arguments are read off the names and shapes.

        Raises:
            ValueError: the weights are not those of this network.
        """
        state = unwrapped(checkpoint)
        blocks = {match[1] for key in state if (match := re.match(r"blocks\.(\d+)\.", key))}
        shortcut: Shortcut = "projection" if any(".shortcut." in key for key in state) else "identity"
        norm: Norm = "batch" if "bn.running_mean" in state else "group" if "bn.weight" in state else "none"
        block: Block = "bottleneck" if "blocks.0.conv3.weight" in state else "basic"
        try:
            channels, classes = state["conv.weight"].shape[1], state["fc.weight"].shape[0]
            depth = (2 if block == "basic" else 3) * len(blocks) + 2
            network = cls(depth, channels, classes, shortcut=shortcut, norm=norm, block=block)
            network.load_state_dict(state)
        except (KeyError, IndexError, AttributeError, ValueError, RuntimeError, TypeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            raise ValueError(
                "these are not the weights of orthokit.lab.models.ResNet, the only network that can be rebuilt from a checkpoint "
                f"({reason[:200]}); for another call orthokit.estimate(model, loader)"
            ) from None
        return network


class ImageNetResNet(nn.Module):
    """ResNet-18, 34, 50 or 101 of He et al. (2015, https://arxiv.org/abs/1512.03385) as widely used on 32x32 images.

    The paper's four stages for ImageNet, with a 3x3 convolution of stride 1 in place of the 7x7 and the max pooling. Basic
    blocks of 64, 128, 256 and 512 filters up to depth 34, from 50 bottlenecks of four times that many, with their stride on
    the 3x3 convolution. He's initialisation (normal, fan-out), biases zero.

    Over-determined, with more filters than weights per filter: the first convolution, 64x27 for three channels; every 1x1
    projection; the last 1x1 convolution of every bottleneck, four filters for each weight.

    Args:
        depth: 18, 34, 50 or 101.
        channels: of the images.
        classes: outputs.
        norm: ``"batch"``; ``"group"``, groups of 8 channels, at most 32 groups; ``"none"``, convolutions then have a bias (and
            the signal grows with each block: the first logits of ResNet-101 are in the thousands).
    """

    def __init__(self, depth: int = 18, channels: int = 3, classes: int = 10, *, norm: Norm = "batch") -> None:
        super().__init__()
        counts = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
        check_choice("depth", depth, counts)
        _check(channels, classes, norm)
        block, factor = (BasicBlock, 1) if depth < 50 else (Bottleneck, 4)
        self.conv = _conv(norm, channels, 64)
        self.bn = _norm(norm, 64)
        self.blocks = _stages(partial(block, norm=norm), 64, [factor * width for width in (64, 128, 256, 512)], counts[depth])
        self.fc = nn.Linear(512 * factor, classes)
        _he(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(n, channels, h, w)`` to logits ``(n, classes)``."""
        features = self.blocks(F.relu(self.bn(self.conv(x))))
        logits: Tensor = self.fc(features.mean((-2, -1)))
        return logits


class WideResNet(nn.Module):
    """WRN-``depth``-``width`` of Zagoruyko & Komodakis (2016, https://arxiv.org/abs/1605.07146), with pre-activation blocks.

    Three stages of 16, 32 and 64 times ``width`` filters. He's initialisation (normal, fan-out), biases zero.

    Over-determined, with more filters than weights per filter: every 1x1 projection; with ``width`` above 9 the first 3x3
    convolution of the first block, ``16 width x 144``; the first convolution, 16x9, of images with one channel.

    Args:
        depth: ``6 b + 4`` layers for ``b`` blocks a stage: 10, 16, 22, 28, ...
        width: how many times the filters of the thin network.
        channels: of the images.
        classes: outputs.
        dropout: probability, between the two convolutions of a block; the paper uses 0.3 on CIFAR, or none.
        norm: ``"batch"``; ``"group"``, groups of 8 channels, at most 32 groups; ``"none"``, convolutions then have a bias (and
            the signal grows with each block).
    """

    def __init__(
        self,
        depth: int = 28,
        width: int = 10,
        channels: int = 3,
        classes: int = 10,
        *,
        dropout: float = 0.0,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        check_count("depth", depth, 10)
        if depth % 6 != 4:
            raise ValueError(f"depth must be 6 b + 4 for b blocks a stage (10, 16, 22, 28, ...); got {depth}")
        check_count("width", width)
        _check(channels, classes, norm)
        check_number("dropout", dropout, 0, 1)
        widths = [16 * width, 32 * width, 64 * width]
        self.conv = _conv(norm, channels, 16)
        self.blocks = _stages(partial(WideBlock, norm=norm, dropout=dropout), 16, widths, [depth // 6] * 3)
        self.bn = _norm(norm, widths[-1])
        self.fc = nn.Linear(widths[-1], classes)
        _he(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(n, channels, h, w)`` to logits ``(n, classes)``."""
        features = F.relu(self.bn(self.blocks(self.conv(x))))
        logits: Tensor = self.fc(features.mean((-2, -1)))
        return logits


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet": ResNet,
    "imagenet_resnet": ImageNetResNet,
    "wide_resnet": WideResNet,
}


ARGUMENTS = {
    "channels": ("channels", "in_chans", "in_channels", "num_channels"),
    "classes": ("classes", "num_classes", "n_classes", "num_labels"),
}
"""What functions call these arguments; the first that a signature has is used."""
PACKAGES = {"timm": {"channels": "in_chans", "classes": "num_classes"}, "torchvision": {"classes": "num_classes"}}
"""The same of packages whose signatures do not say it; torchvision's networks read three channels."""


def build(
    kind: str,
    own: Callable[..., Any] | None = None,
    arguments: Mapping[str, str] | None = None,
    /,
    *,
    channels: int,
    classes: int,
    **options: Any,
) -> nn.Module:
    """The network that a recipe names.

    >>> from orthokit.lab.models import build
    >>> sum(p.numel() for p in build("resnet", channels=3, classes=10, depth=20, shortcut="identity").parameters())
    269722

    Args:
        kind: a key of ``NETWORKS``; or any name for ``own``, used in messages.
        own: a function of the caller's, called with ``channels``, ``classes`` and the options by name. Nothing is imported here:
            see ``orthokit.lab.own``.
        arguments: what ``own`` calls channels and classes; by default as its signature says, see ``ARGUMENTS``.
        channels: of the images.
        classes: outputs.
        **options: the network's other arguments.

    Raises:
        ValueError: no such network; an option it does not have, or a value out of range.
        TypeError: an option of the wrong type, or something that makes no ``nn.Module``.
    """
    make = own or NETWORKS.get(kind)
    if make is None:
        raise ValueError(f"no network {kind!r}{did_you_mean(kind, NETWORKS)} (module:function names one of your own)")
    if own is None and arguments is not None:
        raise ValueError(f"arguments are those of a function of your own; {kind} has channels and classes")
    names, more = accepted(make)
    mapped = _arguments(kind, names, more) if arguments is None else dict(arguments)
    if not more:
        known = [name for name in names if name not in mapped.values()]
        check_options(kind, options, known)
        if unknown := [name for name in mapped.values() if name not in names]:
            raise ValueError(f"{kind} has no argument {unknown[0]!r}{did_you_mean(unknown[0], names)}")
    sizes = {"channels": channels, "classes": classes}
    given = {name: sizes[what] for what, name in mapped.items()}
    try:
        network = make(**given, **options)
    except Exception as error:  # of anybody's function
        if own is None:
            raise
        called = ", ".join(f"{name}={value!r}" for name, value in (given | options).items())
        raise ValueError(f"{kind}({called}) fails with {' '.join(f'{type(error).__name__}: {error}'.split())[:300]}") from error
    if not isinstance(network, nn.Module):
        raise TypeError(f"{kind} must return a torch.nn.Module; got {type(network).__name__}")
    return network


def _arguments(kind: str, names: list[str], more: bool) -> dict[str, str]:
    """What a function calls channels and classes: as its signature says, or its package, or else just so."""
    found = {what: next((name for name in known if name in names), None) for what, known in ARGUMENTS.items()}
    by_package = PACKAGES.get(kind.partition(":")[0].partition(".")[0])
    if by_package is not None:
        found = {what: name or by_package.get(what) for what, name in found.items()}
    elif more:
        found = {what: name or what for what, name in found.items()}
    elif missing := [what for what, name in found.items() if name is None]:
        raise ValueError(
            f"{kind} must take channels and classes; it takes no {' and no '.join(missing)}. Say what it calls them: "
            'arguments = { channels = "...", classes = "..." }, without what it does not take'
        )
    return {what: name for what, name in found.items() if name is not None}


def flops(model: nn.Module, input_shape: Iterable[int]) -> int:
    """Multiply-adds of one forward pass of one input: what papers on small networks call FLOPs.

    Half of what PyTorch's ``FlopCounterMode`` counts, which takes a multiply-add for two. Convolutions, matrix products and
    attention; no normalisation, activation, pooling or bias. The pass runs in evaluation mode, on zeros, and leaves the model
    as it was; on the meta device it costs nothing.

    >>> from orthokit.lab.models import ResNet, flops
    >>> with torch.device("meta"):
    ...     flops(ResNet(20), (3, 32, 32))
    40813184

    Args:
        model: on any device.
        input_shape: of one input, without the batch dimension: ``(channels, height, width)``.
    """
    like = next(model.parameters(), torch.empty(0))
    with evaluating(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(like.new_zeros((1, *input_shape)))
    return int(counter.get_total_flops()) // 2


KEPT = (
    *("filters", "pairs", "mean_length_error", "max_length_error", "sigma_min", "sigma_max"),
    *("mean_cos", "max_cos", "copies", "residual", "tightness"),
)
"""What records of runs hold of the totals of a report."""


def orthogonality(model: nn.Module, *, spectrum: bool = True) -> dict[str, Row]:
    """Totals of :func:`orthokit.report` over wide layers (``under``), tall ones (``over``), and ``all`` if there are both.

    Of the convolutions; of every layer with a kernel where there are none; empty where there is none either.
    """
    modules = list(model.named_modules())
    where = next((where for where in (convs, layers) if any(where(*module) for module in modules)), None)
    totals = {} if where is None else report(model, where=where, spectrum=spectrum).totals
    named = {"wide": "under", "tall": "over", "all": "all"}  # in the records of runs
    return {
        named[part]: {key: value for key, value in total.items() if key in KEPT}
        for part, total in totals.items()
        if part in named
    }

"""Every layer of a network as a linear operator: singular values, condition, and a bound of the Lipschitz constant."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from orthokit.architecture import Network, open_network
from orthokit.checks import check_count
from orthokit.diagnostics import operator_singular_values
from orthokit.kernel import evaluating
from orthokit.layers import Layer, Where, layers, select
from orthokit.tables import Column, Row, Table

__all__ = ["operators"]

COLUMNS = (
    Column("layer", "layer", "s"),
    Column("size", "input size", "s"),
    Column("sigma_max", "σ max", ".4g"),
    Column("sigma_min", "σ min", ".4g"),
    Column("condition", "σ max/min", ".3g"),
    Column("count", "values", ",d"),
)


@torch.no_grad()
def operators(
    model: Network, size: int | Sequence[int], *, where: Where = layers, like: nn.Module | None = None, key: str | None = None
) -> Table:
    """Largest and smallest singular value of each layer as an operator with circular padding, exactly.

    The total's ``sigma_max`` is the product of the layers' largest: an upper bound of the Lipschitz constant of these layers one
    after another. It says nothing of what is between them (normalisation, activations, sums of a shortcut).

    Args:
        model: a module: each convolution gets the size that reaches it when an image of ``size`` enters the network; or a state
            dict or file, which without ``like`` does not tell: each gets ``size``.
        size: of the image, one number or one for each spatial dimension. A layer's size is rounded up to a multiple of its
            stride.
        where: which layers.
        like: a model of the architecture of a state dict or file; on the meta device it will do.
        key: which of several networks in a state dict or file.

    Raises:
        ValueError: no layer is selected, or the network does not take an image of this size.

    >>> print(orthokit.operators(nn.Sequential(nn.Conv2d(1, 1, 1, bias=False)), 4).columns[2].header)
    σ max
    """
    network, reading = open_network(model, like, key)
    runs = model if isinstance(model, nn.Module) else like
    chosen = select(network, where)
    size = _checked(size, chosen)
    reached = _sizes(runs, chosen, size) if runs is not None else {}
    rows: list[Row] = []
    for layer in chosen:
        kernel = layer.kernel
        dimensions = len(kernel.stride)
        own = reached.get(layer.name, _extents(size, dimensions))
        own = tuple(-(-extent // step) * step for extent, step in zip(own, kernel.stride, strict=True))
        row: Row = {"layer": layer.name, "size": "x".join(map(str, own)) or "–"} | dict.fromkeys(
            ("sigma_max", "sigma_min", "condition", "count")
        )
        if kernel.weight.isfinite().all():
            sigma = operator_singular_values(kernel, own)
            high, low = sigma[0].item(), sigma[-1].item()
            row |= {"sigma_max": high, "sigma_min": low, "count": len(sigma), "condition": high / low if low > 0 else math.inf}
        rows.append(row)
    largest = [row["sigma_max"] for row in rows if row["sigma_max"] is not None]
    bound = {"label": "product: a Lipschitz bound", "sigma_max": math.prod(largest)}
    bounded = len(largest) == len(rows)
    notes = ["circular padding; the bound is of these layers alone, one after another"]
    if runs is None:
        notes.append("sizes are not known: every layer is taken at this size, with stride 1 where no model tells another")
    if not bounded:
        notes.append("no bound: a layer has NaN or infinite weights")
    return Table("layers as operators", COLUMNS, tuple(rows), {"product": bound} if bounded else {}, (*notes, *reading))


def _checked(size: int | Sequence[int], chosen: Sequence[Layer]) -> int | tuple[int, ...]:
    if isinstance(size, str | bytes) or not isinstance(size, Sequence):
        check_count("size", size)
        return int(size)
    for extent in size:
        check_count("size", extent)
    if wrong := [layer for layer in chosen if len(layer.kernel.stride) not in (0, len(size))]:
        wanted = len(wrong[0].kernel.stride)
        raise ValueError(f"size must be one number, or {wanted} as {wrong[0].name!r} has; got {tuple(size)}")
    return tuple(size)


def _extents(size: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    return (size,) * dimensions if isinstance(size, int) else tuple(size)[:dimensions]  # of a linear layer: none


def _sizes(model: nn.Module, chosen: Sequence[Layer], size: int | Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Spatial size of what reaches each convolution; of a transposed one the size of its output."""
    modules = dict(model.named_modules())  # of a state dict's model, whose layers are copies, those that run
    convolutions = {layer.name: modules.get(layer.name, layer.module) for layer in chosen if isinstance(layer.module, _ConvNd)}
    if not convolutions:
        return {}
    sizes: dict[str, tuple[int, ...]] = {}
    handles = []
    for name, convolution in convolutions.items():

        def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            dimensions = len(module.kernel_size)  # type: ignore[arg-type]
            passed = output if module.transposed else inputs[0]
            sizes.setdefault(name, tuple(passed.shape[-dimensions:]))

        handles.append(convolution.register_forward_hook(note))
    try:
        with evaluating(model):
            _run(model, size, sizes)
    finally:
        for handle in handles:
            handle.remove()
    return sizes


def _run(model: nn.Module, size: int | Sequence[int], sizes: dict[str, tuple[int, ...]]) -> None:
    """Send an image through the network, with as many channels as its first convolution reads, or else a later one."""
    entries = [layer for layer in model.modules() if isinstance(layer, _ConvNd)]
    images = {(int(each.in_channels), *_extents(size, len(each.kernel_size))): each for each in reversed(entries)}
    refusals: list[str] = []
    for image, entry in reversed(images.items()):
        sizes.clear()
        try:
            model(next(entry.parameters()).new_zeros((1, *image)))
        except Exception as error:  # of anybody's forward pass
            reason = str(error).partition("\n")[0]
            refusals.append(
                f"an image of shape {image} does not go through the network ({reason}); pass another size, "
                "or the state dict alone, every layer of which is taken at the size given"
            )
        else:
            return
    raise ValueError(refusals[0])

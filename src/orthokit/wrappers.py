"""Wrappers that others put around a model: data-parallel ones, ``torch.compile``, averaged models, sharding."""

import sys
from collections.abc import Iterator
from typing import cast

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

__all__ = ["named_modules", "reshard", "unwrap"]

SHELLS = "_orig_mod", "_forward_module", "_original_module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"
"""Names under which ``torch.compile``, Fabric and torch's wrappers for checkpointing and sharding hold the module in them."""


def _inner(module: nn.Module) -> nn.Module | None:
    """The module in a wrapper; None if this is not one."""
    if isinstance(module, (DataParallel, DistributedDataParallel, AveragedModel)):
        return cast(nn.Module, module.module)
    parts = _parts(module)
    return next(iter(parts.values())) if parts and all(name in SHELLS for name in parts) else None


def _parts(module: nn.Module) -> dict[str, nn.Module]:
    """The submodules by name; TorchScript's table of them is not a dictionary."""
    return {name: part for name, part in module._modules.items() if part is not None}


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside any nesting of wrappers: data-parallel ones, ``torch.compile``, averaged models, Fabric."""
    while (inner := _inner(model)) is not None:
        model = inner
    return model


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the bare model, each once, by the names that they have without any wrapper."""
    bare = unwrap(model)
    while list(parts := _parts(bare)) == ["module"] and not bare._parameters:  # wrappers of other libraries
        bare = unwrap(parts["module"])
    waiting, seen = [("", bare)], set[nn.Module]()
    while waiting:
        path, module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        if (inner := _inner(module)) is not None:
            waiting.append((path, inner))
            continue
        yield path, module
        waiting += reversed([(f"{path}.{name}" if path else name, part) for name, part in _parts(module).items()])


def reshard(model: nn.Module) -> None:
    """Have FSDP2 (``fully_shard``) put its shards back where a forward pass has left gathered weights in the model.

    The gathered ones may be of lower precision, and a gradient that reached them would be averaged, or lost.

    Raises:
        TypeError: the model is in the first FSDP, ``FullyShardedDataParallel``.
    """
    # If FSDP was never imported, the model cannot be sharded.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for module in model.modules():
        if isinstance(module, fsdp.FullyShardedDataParallel):
            raise TypeError("FullyShardedDataParallel flattens the weights; use torch.distributed.fsdp.fully_shard")
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()

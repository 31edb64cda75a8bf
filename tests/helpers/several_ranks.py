"""Trains one small network on 1, 2 and 3 ranks in every supported way: ``python several_ranks.py DIRECTORY``.

Each rank writes what it found to a file, which test_distributed.py compares with the same in one process.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch._dynamo  # optimizers import it: once, before the processes are forked
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import orthokit as ok

PENALTIES = {"strict": ok.Disentangled(), "welch": ok.Disentangled(relax=ok.share(0.1), form="welch"), "SO": ok.SO()}
RANKS = (1, 2, 3)
WAYS = ("loss", "add_grad_", "attach", "shard")
STEPS, BATCH, ACCUMULATED = 2, 12, 2


def model():
    """Rows that ranks share unevenly, or get none of; a stack, a tied, a grouped, a frozen and a parametrized layer."""
    torch.manual_seed(0)
    m = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 2, 2, stride=2),
        nn.Conv2d(2, 10, 1),
        nn.Conv2d(10, 10, 1),
        nn.Conv2d(10, 10, 1),
        nn.Conv2d(10, 10, 1),
        nn.Conv2d(10, 10, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(10, 5),
    )
    m[9].weight = m[8].weight
    nn.utils.parametrizations.weight_norm(m[7])
    m[10].requires_grad_(False)
    return m


def batches():
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(BATCH, 3, 6, 6, generator=g), torch.randint(5, (BATCH,), generator=g)) for _ in range(STEPS)]


def fsdp(m):
    """One layer released after the forward pass, one kept, and the rest in the root, which is kept."""
    fully_shard(m[0])
    fully_shard(m[3], reshard_after_forward=False)
    return fully_shard(m)


WRAPS = {"DDP": DistributedDataParallel, "FSDP2": fsdp}


def unsynchronised(net):
    """As the two frameworks spell an accumulating backward pass."""
    if isinstance(net, DistributedDataParallel):
        return net.no_sync()
    if hasattr(net, "set_requires_gradient_sync"):
        net.set_requires_gradient_sync(False)
    return nullcontext()


def train(way, penalty, wrap=None, accumulated=1, rank=0, ranks=1):
    """The weights after a few steps on this rank's part of each batch."""
    m = model()
    net = m if wrap is None else WRAPS[wrap](m)
    ortho = ok.Regularizer(net, PENALTIES[penalty], strength=0.05, where=ok.layers, shard=way == "shard")
    optimizer = torch.optim.SGD(ortho.param_groups(net, weight_decay=1e-3), lr=0.1, momentum=0.9)
    if way == "attach":
        ok.attach(ortho, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        parts = list(zip(x.chunk(accumulated), y.chunk(accumulated), strict=True))
        for place, (images, labels) in enumerate(parts):
            last = place == len(parts) - 1
            with nullcontext() if last else unsynchronised(net):
                if last and hasattr(net, "set_requires_gradient_sync"):
                    net.set_requires_gradient_sync(True)
                loss = F.cross_entropy(net(images.chunk(ranks)[rank]), labels.chunk(ranks)[rank])
                if way in ("loss", "shard"):
                    loss = loss + ortho()
                (loss / accumulated).backward()
        if way == "add_grad_":
            ortho.add_grad_()
        for parameter in net.parameters():
            if isinstance(parameter, DTensor) and parameter.requires_grad:
                assert parameter.grad.placements == parameter.placements
        optimizer.step()
    return weights(m)


class Branches(nn.Module):
    """A layer that no forward pass uses, as DistributedDataParallel wants to be told."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.used(x).mean((2, 3)))


def train_a_part(way, rank=0, ranks=1):
    """The weights of a network of which a part is unused, after a few steps; the error, where there is one."""
    m = Branches()
    net = DistributedDataParallel(m, find_unused_parameters=True) if dist.is_initialized() else m
    ortho = ok.Regularizer(net, PENALTIES["strict"], strength=0.05)
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)
    if way == "attach":
        ok.attach(ortho, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x.chunk(ranks)[rank]), y.chunk(ranks)[rank])
        try:
            (loss + ortho() if way == "loss" else loss).backward()
        except RuntimeError as error:
            return str(error)
        if way == "add_grad_":
            ortho.add_grad_()
        optimizer.step()
    return weights(m)


def weights(m):
    parameters = (p.detach() for p in m.parameters())
    return torch.cat([(p.full_tensor() if isinstance(p, DTensor) else p).flatten() for p in parameters])


def gradient(m):
    actual = (p.grad for p in m.parameters() if p.grad is not None)
    return torch.cat([(g.full_tensor() if isinstance(g, DTensor) else g).flatten() for g in actual])


def figures(net):
    """What report says of each layer, as numbers."""
    rows = ok.report(net).rows
    return torch.tensor([[row[key] for key in ("mean_cos", "max_length_error", "sigma_min", "sigma_max")] for row in rows])


def reading(wrap=None, half=False):
    """What the measures read from an untrained network, each of them as a tensor."""
    m = model()
    if half:
        net = fully_shard(m, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16))
    else:
        net = m if wrap is None else WRAPS[wrap](m)
    ortho = ok.Regularizer(net, PENALTIES["strict"], strength=0.05, where=ok.layers)
    actual = {"report": figures(net), "per_layer": torch.tensor(list(ortho.per_layer().values()))}
    with torch.inference_mode():
        actual["in inference mode"] = ortho()
    # After a forward pass FSDP2 leaves the weights of its root gathered, in bfloat16 if so asked.
    loss = 0 * net(batches()[0][0]).float().sum()
    actual["report after forward"] = figures(net)
    value = ortho()
    actual["after forward"] = value.detach()
    (loss + value).backward()
    actual["gradient"] = gradient(m)
    for parameter in m.parameters():
        parameter.grad = None
    with torch.no_grad():
        net(batches()[0][0])
    ortho.add_grad_(2.0)
    actual["gradient after validation"] = gradient(m)
    return actual


def whole():
    """What is gathered: how often in one call, what is said on each rank when one holds a NaN, and from a sharded state dict."""
    m = fsdp(model())
    ortho = ok.Regularizer(m, PENALTIES["strict"], strength=0.05, where=ok.layers)
    gather, count = DTensor.full_tensor, 0

    def counting(self, **options):
        nonlocal count
        count += 1
        return gather(self, **options)

    DTensor.full_tensor = counting
    ortho.add_grad_()
    DTensor.full_tensor = gather
    if dist.get_rank() == 0:
        with torch.no_grad():
            m[3].weight.to_local()[0, 0, 0, 0] = float("nan")
    try:
        ortho()
        message = "none"
    except FloatingPointError as error:
        message = str(error)
    return {"gathers": count, "message": message, "rows": [row["layer"] for row in ok.report(m.state_dict()).rows]}


def combinations():
    """Of wrapper, way, penalty and number of accumulated parts."""
    for wrap in WRAPS:
        for way in WAYS if wrap == "DDP" else WAYS[:-1]:
            yield wrap, way, "strict", 1
            yield wrap, way, "welch", ACCUMULATED
        yield wrap, "loss", "SO", 1


def work(rank, ranks, directory):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(directory / f"store of {ranks}"), ranks), rank=rank, world_size=ranks
    )
    actual = {
        (wrap, way, penalty, accumulated): train(way, penalty, wrap, accumulated, rank, ranks)
        for wrap, way, penalty, accumulated in combinations()
    }
    read = {wrap: reading(wrap) for wrap in WRAPS} | {"FSDP2 in bfloat16": reading(half=True)}
    parts = {way: train_a_part(way, rank, ranks) for way in WAYS[:-1]}
    torch.save({"trained": actual, "read": read, "whole": whole(), "parts": parts}, directory / f"{rank} of {ranks}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    for ranks in RANKS:
        torch.multiprocessing.start_processes(work, (ranks, Path(sys.argv[1])), nprocs=ranks, start_method="fork")

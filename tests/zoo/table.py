"""Write docs/zoo.md, what is read of each network; where the frameworks are: ``PYTHONPATH=src:tests python -m zoo.table``."""

import copy
import importlib
import warnings
from pathlib import Path

import torch

import orthokit as ok
from orthokit.architecture import open_network
from orthokit.audit import unread_parameters
from orthokit.in_use import is_overridden
from orthokit.kernel import plain_view
from zoo.networks import NEEDED, NETWORKS, Network

PAGE = Path(__file__).parents[2] / "docs" / "zoo.md"
TEXT = """# Networks that were tried

What orthokit reads of networks as they are published, with random weights. This page is written by `tests/zoo/table.py`. The
suite beside it, `tests/zoo/`, checks for each network: the size of every layer and the figures of the smaller ones against NumPy,
the rows of its state dict, one step of training, and the plan of a copy on the meta device.

* **layers**: rows of `ok.report(model)`.
* **read**: the numbers in their weights, out of those in all weights (parameters of at least two dimensions), in millions.
* **in forward**: layers whose forward pass computes the weight (weight standardisation); they are read as they are used.
* **state dict**: whether `ok.report(model.state_dict())`, which knows names and sizes only, gives rows of the same
  names and sizes. What it had to guess is in its notes; `like=model` gives the same rows for every network here.
* **not read**: weights that are not a layer's matrix, or that no kernel view knows. Embeddings are read with
  `where=ok.embeddings`, anything else with [a view of your own](reference/own.md).

Versions: {versions}.

| network | layers | read | share | in forward | state dict | not read |
|---|---:|---:|---:|---:|---|---|
{rows}
"""


def row(network: Network) -> str:
    torch.manual_seed(0)
    model = network.build()
    layers = ok.select(model, ok.layers)
    unread = unread_parameters(model, layers)
    read = unread.total - unread.numbers
    computed = sum(is_overridden(layer.module) and plain_view(layer.module, layer.weight) is None for layer in layers)
    alone, _ = open_network(copy.copy(model.state_dict()))
    expected, actual = ({(layer.name, layer.size) for layer in chosen} for chosen in (layers, ok.select(alone, ok.layers)))
    agreement = "same" if expected == actual else f"{len(expected - actual)} differ, {len(actual - expected)} more, noted"
    kinds = ", ".join(f"{count} {kind}" for kind, count in unread.kinds.items()) or "–"
    digits = 1 if unread.total >= 1e6 else 3
    numbers = f"{read / 1e6:.{digits}f} of {unread.total / 1e6:.{digits}f}"
    share = "all" if read == unread.total else f"{min(99, round(100 * read / unread.total))}%"
    name = f"{network.family} `{network.name}`"
    return f"| {name} | {len(layers)} | {numbers} | {share} | {computed or '–'} | {agreement} | {kinds} |"


def main() -> None:
    warnings.simplefilter("ignore")
    versions = ", ".join(f"{name} {importlib.import_module(name).__version__}" for name in ("torch", *NEEDED))
    rows = []
    for network in NETWORKS:
        rows.append(row(network))
        print(rows[-1], flush=True)
    PAGE.write_text(TEXT.format(versions=versions, rows="\n".join(rows)), encoding="utf-8")


if __name__ == "__main__":
    main()

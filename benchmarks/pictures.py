"""Draw Gram matrices ``|K Kᵀ|`` of trained layers: the README's first picture, and one for the card of each penalty.

The network, images and loop are those of ``examples/base.py``: a wide layer of 32 filters with 144 weights, a tall one of 16
filters with 9, trained on handwritten digits from the same initial weights and on the same batches. All maps share one colour
scale, from 0 (the page shows through) to 1, so that they read on a light and on a dark page.

    python benchmarks/pictures.py                     # all of them, into docs/images; about two minutes
    python benchmarks/pictures.py --only gram so      # some
"""

import sys
from functools import cache
from pathlib import Path

import matplotlib
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

import orthokit as ok
from orthokit.palette import MIDDLE
from orthokit.plots import see_through

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from base import digits, network  # noqa: E402

WIDE, TALL = "2", "0"
LAYERS = {WIDE: "wide: 32 filters of 144", TALL: "tall: 16 filters of 9"}
Arm = tuple[object, float]
"""A penalty and its strength."""
STRICT: Arm = (ok.Disentangled(), 0.1)
NONE: Arm = (None, 0.0)
CARDS: dict[str, dict[str, Arm]] = {  # as in the cards' snippets, but for OffDiagonal
    "so": {"SO": (ok.SO(squared=False), 0.1), "SO²": (ok.SO(), 0.03)},
    "dso": {"DSO": (ok.DSO(), 0.01)},
    "mc": {"MC": (ok.MC(), 0.03)},
    "coherence": {"Coherence": (ok.Coherence(), 0.03)},
    "srip": {"SRIP": (ok.SRIP(squared=False), 0.1)},
    "offdiagonal": {"OffDiagonal": (ok.OffDiagonal(), 0.01)},
    "disentangled": {"strict": STRICT, "pairs": (ok.Disentangled(relax=ok.share(0.1)), 0.1)},
    "convorth": {"OCNN": (ok.ConvOrth(squared=False), 0.01)},
    "lorth": {"Lorth": (ok.Lorth(), 0.01)},
    "eadk": {"EADK": (ok.EADK(), 0.01)},
    "eadc": {"EADC": (ok.EADC(), 0.01)},
    "gor": {"GOR": (ok.GOR(groups=4), 0.01)},
}


@cache
def trained(penalty: object, strength: float, epochs: int) -> nn.Module:
    """The network after training with a penalty, or with None."""
    (images, labels), _ = digits()
    model = network()
    ortho = None if penalty is None else ok.Regularizer(model, penalty, strength=strength)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(labels) // 50)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(50):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            if ortho is not None:
                loss = loss + ortho()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model


def heat(axis: Axes, model: nn.Module, layer: str, title: str) -> None:
    """The map of one layer, and its mean cosine below."""
    report = ok.report(model, where=ok.matching(layer))
    matrix = report.kernel(layer).matrix[0].detach()
    axis.imshow((matrix @ matrix.T).abs().numpy(), vmin=0, vmax=1, cmap=see_through(), interpolation="nearest")
    axis.set_title(title, color=MIDDLE, fontsize=18, fontweight="bold", pad=10)
    axis.set_xlabel(f"mean |cos| {report.rows[0]['mean_cos']:.2g}", color=MIDDLE, fontsize=17, labelpad=8)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_color(MIDDLE)


def first(path: Path, epochs: int) -> None:
    """The README's picture: one layer, without and with a penalty."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    heat(left, trained(*NONE, epochs), WIDE, "no penalty")
    heat(right, trained(*STRICT, epochs), WIDE, f"strict, strength {STRICT[1]:g}")
    save(figure, path)


def card(arms: dict[str, Arm], path: Path, epochs: int) -> None:
    """A row for each arm: what becomes of a wide layer, and of a tall one."""
    figure = Figure(figsize=(8, 5.2 * len(arms)), layout="constrained")
    rows = figure.subplots(len(arms), 2, squeeze=False)
    for (name, (penalty, strength)), row in zip(arms.items(), rows, strict=True):
        for axis, (layer, shape) in zip(row, LAYERS.items(), strict=True):
            heat(axis, trained(penalty, strength, epochs), layer, f"{name}, {strength:g}\n{shape}")
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, transparent=True, metadata={"Software": None})


def main(out: Path = ROOT / "docs/images", only: tuple[str, ...] = (), epochs: int = 10) -> None:
    """Draw what ``only`` names ("gram", or the file name of a card), or everything."""
    torch.set_num_threads(1)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        if not only or "gram" in only:
            first(out / "gram.png", epochs)
        for name, arms in CARDS.items():
            if not only or name in only:
                card(arms, out / "penalties" / f"{name}.png", epochs)


if __name__ == "__main__":
    tyro.cli(main)

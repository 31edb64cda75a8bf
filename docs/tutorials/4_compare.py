"""
Compare fairly with your own network and data
=============================================

You have a network, images, and a question: does a penalty help here? At the end you have an answer with an interval, *resolved*
or *not resolved*, and know how many more seeds an answer would take.

You write two small files, a module and a study. The lab (extra ``lab``) trains every arm on the same images, in the same order,
from the same initial weights, and refuses to compare what differs besides the penalty.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

from orthokit.lab import study
from orthokit.lab.comparison.inference import pooled_sd, seeds_needed
from orthokit.lab.training.loop import train

EPOCHS = 10
folder = Path(tempfile.mkdtemp())

# %%
# Your network and your images
# ----------------------------
# One function makes the network. It is called with ``channels`` and ``classes``, and returns logits. One function gives the
# images: ``uint8`` pixels and labels to train on, then those to test on. Here they are the digits that come with scikit-learn.

(folder / "mine.py").write_text("""
import torch
from sklearn.datasets import load_digits
from torch import nn


def build(channels, classes, width=16):
    layers = nn.Conv2d(channels, width, 3), nn.ReLU(), nn.Conv2d(width, 2 * width, 3), nn.ReLU()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * width, classes))  # 8x8 images end at 4x4


def images():
    pixels, labels = map(torch.tensor, load_digits(return_X_y=True))
    pixels = (pixels * 15).to(torch.uint8).reshape(-1, 1, 8, 8)
    return pixels[:300], labels[:300], pixels[300:], labels[300:]
""")

# %%
# The study
# ---------
# A :term:`panel` is your network on your images; an :term:`arm` is one way to train it. Arms differ in ``[regularizer]`` alone,
# and the first one is the :term:`baseline`. Begin with three :term:`seeds <seed>`.

(folder / "mine.toml").write_text(f"""
[data]
kind = "mine:images"
validation = 60       # to choose a strength on; test images are looked at once, at the end
flip = false          # a mirrored digit is another sign
pad = 1

[network]
kind = "mine:build"
width = 16

[train]
epochs = {EPOCHS}
batch = 24
lr = 0.05
""")
(folder / "study.toml").write_text("""
title = "A penalty on my network"
recipe = "mine.toml"
seeds = [0, 1, 2]

[arms]
none = {}
strict = "strict"
so = "so"

[evaluate]
parts = []            # accuracy is measured anyway
""")

# %%
# ``strict`` and ``so`` are parts that ship with orthokit, at :term:`strength` .1.
#
# Run it
# ------
# In a shell: ``orthokit study study.toml``. In Python, with a function that trains here, as this network needs less time than a
# process needs to start:


def here(runs, test):
    for run in runs:
        train(run)
    return 0


outcome = study.run(
    folder / "study.toml",
    out=folder / "runs",
    results=folder / "results",
    train=here,
    on_event=lambda event: print(event.text),
)

# %%
# The answer
# ----------
# Of each arm the mean over seeds; of each penalty the difference from none, its 95% interval, and the verdict. The verdict goes
# by :term:`Welch's t`, adjusted after :term:`Holm` as there are two questions.

comparison = outcome.comparison
(cells,) = comparison.cells(comparison.primary).values()
for arm, cell in cells.items():
    print(f"{arm:7} {cell.sample.mean:6.2f} ± {cell.sample.sd:.2f}  (n = {cell.sample.n})", end="")
    if cell.difference is not None:
        low, high = cell.difference.interval
        print(f"   difference {cell.difference.mean:+.2f} [{low:+.2f}, {high:+.2f}]  {cell.verdict}", end="")
    print()

# %%
# Each dot is a seed, each line a mean. Look at how far the dots of one arm lie apart before you look at the lines.

figure, axis = plt.subplots(figsize=(4.8, 2.6), layout="constrained")
for place, (arm, cell) in enumerate(cells.items()):
    colour = "#8a8a8a" if arm == comparison.baseline else "#2166ac"
    axis.plot(cell.sample.values, [place] * cell.sample.n, "o", color=colour, markersize=9, alpha=0.6)
    axis.vlines(cell.sample.mean, place - 0.3, place + 0.3, color=colour, linewidth=3)
axis.set_yticks(range(len(cells)), list(cells))
axis.invert_yaxis()
axis.set(xlabel="test accuracy, %", title="Test accuracy of each seed")
plt.show()

# %%
# How many seeds?
# ---------------
# *Not resolved* is not "no difference". These seeds have a :term:`power`, and it says how small a gain they could have shown.

(resolution,) = comparison.resolutions()
sd = pooled_sd([cell.sample for cell in cells.values()])
print(f"{resolution.seeds} seeds an arm detect a gain above {resolution.least:.2f} points, 4 times in 5")
for gain in (2.0, 1.0, 0.5):
    print(f"a gain of {gain} points takes {seeds_needed(gain, sd, comparisons=2)} seeds an arm")

# %%
# The three values of an arm also give a rough estimate of the spread only. Take the numbers as an order of magnitude, and look
# again when more seeds are there. Write more ``seeds`` into the study and run it again: what is trained is not trained again.
#
# For more on one page: ``orthokit study study.toml --html page.html`` writes figures and all metrics; ``orthokit power`` plans
# without runs.

print("kept:", *sorted(path.name for path in (folder / "results/ledger").iterdir()))

# %%
# Decide
# ------
# ================================================  =================================================================
# the verdict                                       do
# ================================================  =================================================================
# better                                            use the penalty, on networks and images like these
# worse                                             leave it out, or choose a strength (``[tune]``) and compare anew
# not resolved, and a few more seeds would do       run them: more ``seeds`` in the study, the same command
# not resolved, and it would take hundreds          decide by other things: cost, or how orthogonal filters should be
# ================================================  =================================================================
#
# Never choose an arm or a strength by these test accuracies: the study has ``[tune]`` for it, with seeds of its own. What a
# study may say: :doc:`../studies`; how verdicts are made: :doc:`../compare`; all names: :doc:`../reference/study`.

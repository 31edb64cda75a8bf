"""
Look at a checkpoint and decide
===============================

You have a trained network in a file. At the end you know whether a penalty would change its filters, on which layers, and at
which strength to begin.

Three checkpoints show what you may meet: a plain one, one that was widened and pruned, and one trained with a penalty.
"""

import contextlib
import shlex
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import orthokit as ok
from orthokit.cli import main

STEPS = 300
folder = Path(tempfile.mkdtemp())
pixels, classes = load_digits(return_X_y=True)
x, y = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1, torch.tensor(classes)
train, test = (x[:1500], y[:1500]), (x[1500:], y[1500:])


def network(width=32):
    torch.manual_seed(0)
    first = nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, width, 3), nn.ReLU(), nn.Conv2d(width, 32, 3), nn.ReLU()
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(32 * 2 * 2, 10))


def trained(model, strength=0.0):
    ortho = ok.Regularizer(model, ok.Disentangled(), strength=strength)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for batch in torch.randint(1500, (STEPS, 50), generator=torch.Generator().manual_seed(0)):
        loss = F.cross_entropy(model(train[0][batch]), train[1][batch]) + ortho()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def command(line):
    """What a shell would print."""
    print("$ orthokit", line)
    with contextlib.chdir(folder):
        return main(shlex.split(line))


torch.save(trained(network()).state_dict(), folder / "plain.pt")
torch.save(trained(network(), strength=0.1).state_dict(), folder / "strict.pt")

# Layer "2" twice as wide as it was trained, by copies, which changes no output; then eight filters of layer "4" are pruned.
state = trained(network(width=16)).state_dict()
for name in ("2.weight", "2.bias"):
    state[name] = torch.cat([state[name], state[name]])
state["4.weight"] = torch.cat([state["4.weight"], state["4.weight"]], 1) / 2
state["4.weight"][:8] = state["4.bias"][:8] = 0
torch.save(state, folder / "widened.pt")

# %%
# The plain one
# -------------
# In a shell you would type the line after the dollar sign. Nothing in the file is executed, and no class is needed.

command("report plain.pt")

# %%
# Read three columns. *o* and *n* tell :term:`wide <wide layer>` from :term:`tall <tall layer>` layers: with more :term:`filters
# <filter>` than weights per filter, layer 0 cannot be orthogonal. *×random* is the mean \|cosine\| of two filters over that of
# random filters; an untrained layer has about 1. *Reads as* puts it into a word (:doc:`../report` has the rules).
#
# In Python a report is an object. Its picture has a bar for each layer; the dotted line is what random filters have.

plain = ok.report(folder / "plain.pt")
print(plain.summary)
plain.plot()

# %%
# *Correlated* and *like random* mean that a penalty has room to act. They do not mean that the network is bad. The line that
# would act on these layers is ``plain.action``, and its strength is where to begin:

print(plain.action)

# %%
# Our studies regularize convolutions only, so we leave the classifier out and write ``where=ok.convs``, the default.
#
# Which strength, and why lengths matter: this penalty pulls each layer by about 2.5 times the strength, whatever its size. That
# suits filters of length about 1. Longer ones come from pretraining, and need :doc:`another treatment <5_fine_tune>`.

for row in plain.rows:
    print(f"layer {row['layer']}  {row['word']:12}  mean length {row['mean_length']:.2f}")

# %%
# The widened one
# ---------------
# The same command finds :term:`copies`: pairs of filters that compute the same thing. It lists the worst layer first.

command("report widened.pt --sort word --no-spectrum")
widened = ok.report(folder / "widened.pt")
directions = F.normalize(widened.kernel("2").matrix[0])
figure, axis = plt.subplots(figsize=(4.8, 3.8), layout="constrained")
image = axis.imshow((directions @ directions.T).abs(), vmin=0, vmax=1, cmap="Blues")
axis.set(title="Filters of layer 2", xlabel="filter", ylabel="filter")
figure.colorbar(image, label="|cosine|")
plt.show()

# %%
# The picture shows a line beside the diagonal: filter 0 equals filter 16, and so on; ``widened.plot("2")`` shows more. **A
# penalty cannot part exact copies**: it pulls both alike, and so does the task where both are read alike. Merge them instead.
# The output stays the same.

model = network()
model[2], model[4] = nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 3)
model.load_state_dict(torch.load(folder / "widened.pt"))
smaller, _, following, merged = ok.merge_copies(model[2], model[4])
before = model(test[0])
model[2], model[4] = smaller, following
print(f"{len(merged)} filters merged: {smaller}")
print(f"largest change of an output: {(model(test[0]) - before).abs().max():.1e}")

# %%
# Filters of zeros have no direction, so no word speaks of them. The effective rank shows them: how many directions a layer
# uses.

for row in widened.rows:
    norms = state[f"{row['layer']}.weight"].flatten(1).norm(dim=1)
    print(f"layer {row['layer']}  {row['o']} filters, {(norms == 0).sum()} of zeros, effective rank {row['effective_rank']:.1f}")

# %%
# No penalty moves a filter of zeros, as its gradient is 0 there: what was pruned stays pruned. :term:`Retraction <retraction>`
# would revive it.
#
# The one trained with a penalty
# ------------------------------
# Side by side, by layer: there is nothing left to do on its convolutions.

figure, axis = plt.subplots(figsize=(4.8, 2.8), layout="constrained")
for offset, (name, colour) in enumerate({"plain.pt": "#8a8a8a", "strict.pt": "#2166ac"}.items()):
    rows = ok.report(folder / name, where=ok.convs).rows
    axis.barh([i + 0.38 * offset for i in range(len(rows))], [row["x_random"] for row in rows], 0.36, color=colour, label=name)
axis.set_yticks([i + 0.19 for i in range(len(rows))], [f"layer {row['layer']}" for row in rows])
axis.invert_yaxis()
axis.axvline(1, color="black", linestyle=":")
axis.set(xlabel="mean |cosine|, 1 = random filters", title="Convolutions without and with a penalty")
axis.legend(frameon=False)
plt.show()

# %%
# Layer 0 is tall, and its bar cannot reach 0. Its filters cover all directions equally, so the report calls it orthogonal, too
# (:doc:`6_tall`).
#
# A gate
# ------
# What you decided once can be checked for every new checkpoint. The exit status is 1 where a layer meets the condition.

status = command('report widened.pt --fail-if "copies > 0" --layers 2 --no-spectrum')
print("exit status", status)

# %%
# Decide
# ------
# ===========================================  ===================================================================================
# the report says                              do
# ===========================================  ===================================================================================
# orthogonal, near-orthogonal                  nothing
# like random, correlated; lengths about 1     train again with ``ok.Disentangled()``, strength .1, on all convolutions
# the same; lengths above 3                    leave lengths alone: ``weights=(0, 1)``, see :doc:`5_fine_tune`
# copies                                       ``ok.merge_copies``, then look again
# filters of zeros that were pruned            nothing; do not retract that layer
# a tall layer                                 nothing special: :doc:`6_tall`
# ===========================================  ===================================================================================
#
# What a report cannot say is whether accuracy gains: :doc:`4_compare`. All columns: :doc:`../reference/report`.

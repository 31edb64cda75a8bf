"""
Fine-tune a pretrained network
==============================

You have pretrained weights and few new images. At the end you can choose between no penalty, one on new layers only, and a
gentle one everywhere; and you recognise, before the first step, a penalty that destroys what was learned.

The network is pretrained on the digits 0 to 4, and fine-tuned on ten images each of 5 to 9. Nothing is downloaded.
"""

import copy
import statistics
import warnings

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import orthokit as ok
from orthokit.lab.comparison.inference import Sample, differences, holm

PRETRAINING = 400
STEPS = 60
SEEDS = 3
warnings.filterwarnings("ignore", message=r"SO\(\) is squared")  # orthokit warns of what is shown here

pixels, classes = load_digits(return_X_y=True)
x, y = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1, torch.tensor(classes)
old = x[y < 5], y[y < 5]
new = [(y == digit).nonzero().flatten() for digit in range(5, 10)]
few = torch.cat([where[:10] for where in new])
rest = torch.cat([where[10:] for where in new])
train, test = (x[few], y[few] - 5), (x[rest], y[rest] - 5)


def accuracy(model, images, labels):
    with torch.no_grad():
        return 100 * (model.eval()(images).argmax(1) == labels).float().mean().item()


def block(inputs, outputs, **options):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, bias=False, **options), nn.BatchNorm2d(outputs), nn.ReLU())


def fit(model, images, labels, steps, ortho=None, rate=0.05, after=lambda: None):
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    model.train()
    for _ in range(steps):
        batch = torch.randperm(len(images))[:50]
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        if ortho is not None:
            loss = loss + ortho()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after()


# %%
# Pretrained weights are long
# ---------------------------
# Filters of published networks are often 5 to 20 times longer than 1. Normalisation hides this: it divides the length out
# again. To have such weights here, we multiply each convolution by 10 and the statistics after it, which changes no output.

torch.manual_seed(0)
body = nn.Sequential(block(1, 16), block(16, 32), block(32, 32))
pretrained = nn.Sequential(body, nn.Flatten(), nn.Linear(32 * 2 * 2, 5))
fit(pretrained, *old, PRETRAINING)
with torch.no_grad():
    for convolution, norm, _ in body:
        convolution.weight *= 10
        norm.running_mean *= 10
        norm.running_var *= 100

report = ok.report(body, where=ok.convs)
for row in report.rows:
    print(f"layer {row['layer']}  mean length {row['mean_length']:.1f}, mean |cosine| {row['x_random']:.2f} times random")
print(report.action)

# %%
# The report's line leaves lengths alone, with ``weights=(0, 1)``, where they are above 3. Here is why. Before the first step,
# look at what each penalty would do to the longest layer in one step:

weight = body[2][0].weight
for name, penalty in {
    "Disentangled(weights=(0, 1))": ok.Disentangled(weights=(0, 1)),
    "Disentangled()": ok.Disentangled(),
    "SO(squared=False)": ok.SO(squared=False),
    "SO()": ok.SO(),
}.items():
    ortho = ok.Regularizer(body, penalty, strength=0.01)
    body.zero_grad()
    value = ortho()
    value.backward()
    share = 0.05 * weight.grad.norm() / weight.norm()
    print(f"{name:29} adds {value.item():10.2f} to the loss, and moves a layer by {share.item():.1e} of its length a step")

# %%
# Unsquared penalties add much to the loss and move little. ``SO()`` is squared: its pull grows with the cube of the length, so
# that a single step moves the layer by a good part of its length. orthokit warns of it when such a ``Regularizer`` is made.
#
# :term:`Retraction <retraction>` has no gradient, and a rate instead. At rate 1 all filters get length 1 at once, and what
# comes after the layer no longer fits:

for rate in (0.002, 1.0):
    model = copy.deepcopy(pretrained)
    ok.Regularizer(model, ok.Disentangled(), strength=0.0).retract_(rate)
    print(f"digits 0 to 4, accuracy {accuracy(pretrained, *old):.1f} -> {accuracy(model, *old):.1f} after retract_({rate})")

# %%
# Six ways
# --------
# The new part is a block and a classifier. Every way starts from the same pretrained weights. A :term:`seed` sets the new
# layers and the order of images.


def start(seed):
    torch.manual_seed(seed)
    return nn.Sequential(copy.deepcopy(body), block(32, 32, padding=1), nn.Flatten(), nn.Linear(32 * 2 * 2, 5))


def no_penalty(model):
    fit(model, *train, STEPS)


def new_layers_only(model):
    fit(model, *train, STEPS, ok.Regularizer(model, ok.Disentangled(), strength=0.1, where=ok.matching("1.*")))


def directions(model):
    fit(model, *train, STEPS, ok.Regularizer(model, ok.Disentangled(weights=(0, 1)), strength=0.1))


def gentle_retraction(model):
    ortho = ok.Regularizer(model, ok.Disentangled(), strength=0.0, where=ok.matching("0.*"))
    fit(model, *train, STEPS, after=lambda: ortho.retract_(0.002))


def squared(model):
    fit(model, *train, STEPS, ok.Regularizer(model, ok.SO(), strength=0.01))


def full_retraction(model):
    ortho = ok.Regularizer(model, ok.Disentangled(), strength=0.0, where=ok.matching("0.*"))
    fit(model, *train, STEPS, after=ortho.retract_)


def measured(way, seed):
    model = start(seed)
    way(model)
    rows = ok.report(model[0], where=ok.convs & ~ok.tall).rows
    return accuracy(model, *test), *(statistics.fmean(row[key] for row in rows) for key in ("mean_cos", "mean_length"))


ways = (no_penalty, new_layers_only, directions, gentle_retraction, full_retraction, squared)
results = {way.__name__.replace("_", " "): [measured(way, seed) for seed in range(SEEDS)] for way in ways}
print(f"{'':18} accuracy, %   mean |cosine|   mean length  (wide pretrained layers)")
for name, values in results.items():
    accuracies, cosines, lengths = zip(*values, strict=True)
    spread = f"{statistics.fmean(accuracies):5.1f} ± {statistics.stdev(accuracies):4.1f}"
    print(f"{name:18} {spread}    {statistics.fmean(cosines):8.3f}      {statistics.fmean(lengths):8.2f}")

figure, axis = plt.subplots(figsize=(4.8, 3.4), layout="constrained")
for place, values in enumerate(results.values()):
    colour = "#8a8a8a" if place == 0 else "#2166ac"
    axis.plot([value[0] for value in values], [place] * len(values), "o", color=colour, markersize=9, alpha=0.6)
axis.axvline(20, color="black", linestyle=":")
axis.set_yticks(range(len(results)), list(results))
axis.invert_yaxis()
axis.set(xlabel="test accuracy, % (dotted: guessing)", xlim=(0, 100), title="Each dot is a seed")
plt.show()

# %%
# Which of these differences are :term:`not resolved`? Welch's t against no penalty, adjusted for five comparisons:

samples = {name: Sample(tuple(value[0] for value in values)) for name, values in results.items()}
against = differences(samples, "no penalty")
for (name, each), p in zip(against.items(), holm([each.welch for each in against.values()]), strict=True):
    low, high = each.interval
    print(f"{name:18} {each.mean:+6.1f} [{low:+.1f}, {high:+.1f}]  {'resolved' if p < 0.05 else 'not resolved'}")

# %%
# Two things stand out in every seed: the squared penalty is far below all others, and the gentle ways leave the pretrained
# filters nearly where they were. Full retraction makes them orthonormal and does no harm *here*, since the classifier is new
# and the normalisation learns its statistics anew. Where both are kept it does: see the accuracies on digits 0 to 4 above, and
# :doc:`../fine-tuning`.
#
# All this is one small network. Run your own, with your seeds: :doc:`4_compare`.
#
# Decide
# ------
# =======================================================  ==================================================================
# you want                                                 do
# =======================================================  ==================================================================
# accuracy on the new task, nothing else                   leave it alone: no gain is shown for pretrained layers
# orthogonal new layers                                    strict, strength .1, ``where=ok.matching(...)`` of the new layers
# to turn pretrained filters apart                         ``Disentangled(weights=(0, 1))``, strength .1; more if cosines stay
# orthonormal pretrained filters                           ``retract_(0.002)`` after each step, in a long fine-tuning
# ``SO()`` or another squared penalty                      not on long filters: take ``squared=False``
# =======================================================  ==================================================================
#
# Before the first step print ``ortho.per_layer()`` and the report. More on each: :doc:`../fine-tuning`;
# :class:`orthokit.Regularizer` has ``retract_``.

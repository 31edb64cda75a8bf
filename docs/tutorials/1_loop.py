"""
Add it to your loop
===================

You have a training loop. At the end you know which of four ways puts a penalty into it, and with which strength to begin.

The network learns the handwritten digits that come with scikit-learn; each training below takes a few seconds.
"""

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import orthokit as ok
from orthokit.lab.networks.resnet import ResNet

STEPS = 200
pixels, classes = load_digits(return_X_y=True)
x, y = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1, torch.tensor(classes)
train, test = (x[:1500], y[:1500]), (x[1500:], y[1500:])


def network():
    torch.manual_seed(0)
    convolutions = nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU()
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(32 * 2 * 2, 10))


def batches(steps=STEPS):
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randint(len(train[0]), (50,), generator=generator)
        yield train[0][batch], train[1][batch]


def show(name, model):
    residual = max(row["residual"] for row in ok.report(model, where=ok.convs & ~ok.tall).rows)
    with torch.no_grad():
        accuracy = (model(test[0]).argmax(1) == test[1]).float().mean()
    print(f"{name:13} largest residual {residual:.3f}, test accuracy {accuracy:.3f}")


# %%
# Without a penalty
# -----------------
# This is the loop that you have.

plain = network()
optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
for images, labels in batches():
    loss = F.cross_entropy(plain(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# %%
# Way 1: add it to the loss
# -------------------------
# Two lines are new. ``Regularizer`` selects every convolution, ``param_groups`` leaves weight decay off the regularized
# kernels. Without a schedule, :term:`strength` .1 is a good beginning for an unsquared penalty such as ``Disentangled()``.

model = network()
ortho = ok.Regularizer(model, ok.Disentangled(), strength=0.1)
optimizer = torch.optim.SGD(ortho.param_groups(model, weight_decay=5e-4), lr=0.05, momentum=0.9)
for images, labels in batches():
    loss = F.cross_entropy(model(images), labels) + ortho()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

for name, trained in {"untrained": network(), "without": plain, "with": model}.items():
    show(name, trained)

# %%
# The :term:`residual` is 0 where filters are orthonormal. These are the :term:`Gram matrices <Gram matrix>` of the last
# convolution, ``|K Kᵀ|``: its diagonal holds squared lengths, the rest is overlap.

figure, axes = plt.subplots(1, 2, figsize=(4.8, 2.9), layout="constrained")
for axis, (name, trained) in zip(axes, {"without": plain, "with": model}.items(), strict=True):
    matrix = ok.kernel_of(trained[4]).matrix[0].detach()
    image = axis.imshow((matrix @ matrix.T).abs(), vmin=0, vmax=1, cmap="Blues")
    axis.set(title=f"{name} penalty", xlabel="filter", yticks=[])
figure.colorbar(image, ax=axes, label="|K Kᵀ|", shrink=0.7)
plt.show()

# %%
# Why ``ortho()`` is 31 beside a loss of 2.3
# ------------------------------------------
# The value is a sum over all layers, so deep networks begin with a large one. What moves the weights is the *gradient*. The
# gradient of an unsquared penalty has one size in every layer, about 2.6 times the strength, whatever the value says.

loss = F.cross_entropy(network()(train[0]), train[1])
print(f"loss of a new network        {loss:5.1f}")
for depth in (8, 20, 56):
    resnet = ResNet(depth)
    penalty = ok.Regularizer(resnet, ok.Disentangled(), strength=0.1)
    value = penalty()
    value.backward()
    norms = [layer.module.weight.grad.norm().item() for layer in penalty.layers]
    print(f"ortho() of a new ResNet-{depth:<3} {value:6.1f}, gradient norm of a layer {min(norms):.2f} to {max(norms):.2f}")

# %%
# So watch the loss without the penalty, and compare accuracies. Do not tune the strength until the two values look alike.
# A squared penalty such as ``SO()`` is another matter: its gradient grows with the cube of the filters' length
# (:doc:`../fine-tuning`).

# %%
# Way 2: add the gradient after clipping
# --------------------------------------
# Clipping the sum of loss and penalty lets one shrink the other. ``add_grad_()`` adds the penalty's gradient after clipping, so
# that only the task is clipped. The same place serves mixed precision with a ``GradScaler``: after ``unscale_``. For this penalty
# it also builds no graph, so it is the fastest way. The average of weights (EMA) needs no line: it averages what the optimizer
# made.

model = network()
averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
ortho = ok.Regularizer(model, ok.Disentangled(), strength=0.1)
optimizer = torch.optim.SGD(ortho.param_groups(model, weight_decay=5e-4), lr=0.05, momentum=0.9)
scaler = torch.amp.GradScaler("cpu")
for images, labels in batches():
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(images), labels)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    ortho.add_grad_()  # in float32, unscaled, not clipped
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    averaged.update_parameters(model)
show("AMP, clipped", model)
show("its average", averaged.module)

# %%
# Way 3: attach it to an optimizer that somebody else steps
# ---------------------------------------------------------
# Where the loop belongs to a framework, attach once. The penalty then acts in every ``optimizer.step()``, however many batches
# were accumulated before it.

model = network()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
ok.attach(ok.Regularizer(model, ok.Disentangled(), strength=0.1), optimizer)
for index, (images, labels) in enumerate(batches(2 * STEPS), 1):
    (F.cross_entropy(model(images), labels) / 2).backward()
    if index % 2 == 0:
        optimizer.step()
        optimizer.zero_grad()
show("attached", model)

# %%
# Way 4: stay on the minimum
# --------------------------
# ``retract_()`` after the step moves the filters to the nearest orthonormal ones. Strength plays no part.

model = network()
ortho = ok.Regularizer(model, ok.Disentangled(), strength=0.0)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
for images, labels in batches():
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    optimizer.zero_grad()
    ortho.retract_()
show("retracted", model)

# %%
# On several devices
# ------------------
# With DistributedDataParallel every process has the same weights, hence the same penalty: nothing changes in your loop. Here is
# one process, as ``torchrun`` would start several. ``shard=True`` divides the layers among them.

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = nn.parallel.DistributedDataParallel(network())
ortho = ok.Regularizer(model, ok.Disentangled(), strength=0.1, shard=True)
optimizer = torch.optim.SGD(ortho.param_groups(model, weight_decay=5e-4), lr=0.05, momentum=0.9)
for images, labels in batches():
    loss = F.cross_entropy(model(images), labels) + ortho()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
show("DDP", model.module)
dist.destroy_process_group()

# %%
# Decide
# ------
# ============================================  =====================================
# your loop                                     way
# ============================================  =====================================
# plain, or DistributedDataParallel             ``loss + ortho()``
# clips gradients, or uses a ``GradScaler``     ``ortho.add_grad_()`` just before the step
# FSDP2                                         ``ortho.add_grad_()`` just before the step
# belongs to a framework                        ``ok.attach(ortho, optimizer)``
# filters must be orthonormal at every step     ``ortho.retract_()`` after the step
# ============================================  =====================================
#
# Begin with ``Disentangled()`` or ``SO(squared=False)`` at strength .1. Whether accuracy gains from it is a question to seeds:
# :doc:`4_compare`. Callbacks for Lightning and transformers: :doc:`2_frameworks`. More on each way: :doc:`../guide`.

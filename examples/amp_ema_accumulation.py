"""The base example plus: mixed precision with a GradScaler, accumulated batches, clipping, an averaged model, torch.compile.

The penalty's gradient goes in by itself, after clipping, once per step. ``--compile`` compiles the network, which needs a C++
compiler.
"""

import sys

import torch
from base import digits, network, show
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import orthokit as ok

ACCUMULATE = 2

if __name__ == "__main__":
    train, test = digits()
    model = network()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    fast = torch.compile(model) if "--compile" in sys.argv else model
    ortho = ok.Regularizer(fast, ok.Disentangled(), strength=ok.schedules.linear(0.1, 0.0, steps=5))
    optimizer = torch.optim.SGD(ortho.param_groups(model, weight_decay=5e-4), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(5):
        for index, batch in enumerate(torch.randperm(1500).split(50)):
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(fast(train[0][batch]), train[1][batch])
            scaler.scale(loss / ACCUMULATE).backward()
            if (index + 1) % ACCUMULATE == 0:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                ortho.add_grad_()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                averaged.update_parameters(model)
        ortho.step()
    show(averaged.module, test)

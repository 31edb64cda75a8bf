"""The smallest complete use: a convolutional network learns handwritten digits, its filters kept nearly orthogonal."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import orthokit as ok


def digits():
    """1,500 images ``(n, 1, 8, 8)`` with their classes to train on, and 297 to test on."""
    pixels, classes = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1, torch.tensor(classes)
    return (x[:1500], y[:1500]), (x[1500:], y[1500:])


def network():
    torch.manual_seed(0)
    convolutions = nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU()
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(32 * 4 * 4, 10))


def show(model, test):
    model.eval()
    with torch.no_grad():
        right = (model(test[0]).argmax(1) == test[1]).float().mean().item()
    print(f"{right:.1%} of the test images right")
    print(ok.report(model, where=ok.convs))


if __name__ == "__main__":
    train, test = digits()
    model = network()
    ortho = ok.Regularizer(model, ok.Disentangled(), strength=ok.schedules.linear(0.1, 0.0, steps=5))
    optimizer = torch.optim.SGD(ortho.param_groups(model, weight_decay=5e-4), lr=0.05, momentum=0.9)
    for _ in range(5):
        for batch in torch.randperm(1500).split(50):
            loss = F.cross_entropy(model(train[0][batch]), train[1][batch]) + ortho()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ortho.step()
    show(model, test)

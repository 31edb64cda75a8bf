"""Slow twins of the penalties: loops over filters in numpy, written from the formulas alone."""

import math

import numpy as np
import torch


def gram_entries(k):
    o = len(k)
    return [[sum(k[i][t] * k[j][t] for t in range(len(k[0]))) for j in range(o)] for i in range(o)]


def residual_squares(k):
    g = gram_entries(k)
    return sum((g[i][j] - (i == j)) ** 2 for i in range(len(g)) for j in range(len(g)))


def side_of(k, side):
    transpose = side == "cols" or (side == "smaller" and k.shape[0] > k.shape[1])
    return k.T if transpose else k


def so(k, side="rows", squared=True):
    value = residual_squares(side_of(k, side))
    return value if squared else math.sqrt(value)


def dso(k):
    return residual_squares(k) + residual_squares(k.T)


def mc(k, norm="max"):
    g = gram_entries(k)
    sizes = [[abs(g[i][j] - (i == j)) for j in range(len(g))] for i in range(len(g))]
    return max(map(max, sizes)) if norm == "max" else max(map(sum, sizes))


def pairs(k):
    """The cosine of every pair i > j in row-major order."""
    length = [math.sqrt(sum(x * x for x in row)) for row in k]
    g = gram_entries(k)
    return [g[i][j] / (length[i] * length[j]) for i in range(len(k)) for j in range(i)]


def coherence(k):
    return max(map(abs, pairs(k)), default=0.0)


def srip(k, steps=2, squared=False, side="smaller", start=None):
    k = side_of(k, side)
    a = np.array(gram_entries(k)) - np.eye(len(k))
    v = torch.randn(len(k), generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy() if start is None else start
    for _ in range(steps):
        v = a @ (v / math.sqrt(sum(v * v)))
    value = math.sqrt(sum(v * v))
    return value**2 if squared else value


def off_diagonal(k):
    g = gram_entries(k)
    return sum(g[i][j] ** 2 for i in range(len(g)) for j in range(len(g)) if i != j) / 2


def free_pairs(o, r, count):
    if count == "expected":
        m = o - r
        return math.floor(m + m * (m - 1) / (2 * r) + 0.5)
    bins = [len(range(b, o, r)) for b in range(r)]  # filters dealt to r directions in turn
    return sum(size * (size - 1) // 2 for size in bins)


def norm(values):
    return math.sqrt(sum(v * v for v in values))


def disentangled(k, r=None, form="pairs", count="expected", squared=False, weights=(1.0, 1.0), ceiling=None):
    o = len(k)
    r = o if r is None else r
    d = norm([sum(x * x for x in row) - 1 for row in k])
    c = pairs(k)
    if form == "pairs":
        by_size = sorted(range(len(c)), key=lambda p: -abs(c[p]))
        direction = norm([c[p] for p in by_size[free_pairs(o, r, count) :]])
    elif form == "welch":
        allowed = math.sqrt((o - r) / (r * (o - 1))) if o > 1 else 0.0
        direction = norm([max(0.0, abs(x) - allowed) for x in c])
    else:
        direction = max(0.0, norm(c) - math.sqrt(o * (o - r) / (2 * r)))
    terms = [weights[0], d], [weights[1], direction]
    if ceiling is not None:
        terms = *terms, [weights[1], norm([max(0.0, abs(x) - ceiling) for x in c])]
    return sum(w * (t * t if squared else t) for w, t in terms)


def welch(o, n):
    if o <= n:
        return 0.0
    return 1 / math.sqrt(n) if o > n * (n + 1) / 2 else math.sqrt((o - n) / (n * (o - 1)))

"""Slow twins of the penalties: loops over filters in numpy, written from the formulas alone."""

import itertools
import math

import numpy as np


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


def weighing_length(square):
    """The length that a cosine is divided by: a filter shorter than 0.1 counts in proportion to its length."""
    return max(0.1, math.sqrt(square))


def pairs(k):
    """The cosine of every pair i > j in row-major order, weighed where filters are short."""
    length = [weighing_length(sum(x * x for x in row)) for row in k]
    g = gram_entries(k)
    return [g[i][j] / (length[i] * length[j]) for i in range(len(k)) for j in range(i)]


def coherence(k):
    return max(map(abs, pairs(k)), default=0.0)


def srip(k, steps=2, squared=False, side="smaller", start=None):
    k = side_of(k, side)
    a = np.array(gram_entries(k)) - np.eye(len(k))
    v = np.sin(12.9898 * np.arange(1, len(k) + 1)) * 43758.5453 % 1 - 0.5 if start is None else start
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


def overlaps(kernel):
    """Inner products of all filters with all filters at every shift: {shift: (o, o)}, from filters laid out on the grid."""
    w = kernel.weight[0].numpy()
    if kernel.transposed:
        w = w.swapaxes(0, 1)
    stride, dilation = kernel.stride, kernel.dilation or (1,) * len(kernel.stride)
    o, i, *size = w.shape
    taps = list(itertools.product(*map(range, size)))
    filters = [{} for _ in range(o)]
    for f, c, tap in itertools.product(range(o), range(i), taps):
        filters[f][(c, *(d * t for d, t in zip(dilation, tap, strict=True)))] = w[(f, c, *tap)]
    reach = [range(-(d * (k - 1) // s), d * (k - 1) // s + 1) for d, k, s in zip(dilation, size, stride, strict=True)]

    def product(f, g, shift):
        return sum(x * g.get((at[0], *(a + b for a, b in zip(at[1:], shift, strict=True))), 0.0) for at, x in f.items())

    shifts = {steps: [s * p for s, p in zip(stride, steps, strict=True)] for steps in itertools.product(*reach)}
    return {steps: np.array([[product(f, g, by) for g in filters] for f in filters]) for steps, by in shifts.items()}


def conv_orth(kernel, squared=True):
    value = sum(((g - (np.eye(len(g)) if not any(shift) else 0)) ** 2).sum() for shift, g in overlaps(kernel).items())
    return value if squared else math.sqrt(value)


def lorth(kernel):
    w = kernel.weight[0].numpy()
    o, i, *size = w.swapaxes(0, 1).shape if kernel.transposed else w.shape
    dilation = kernel.dilation or (1,) * len(size)
    # Of each residue of the input grid modulo the stride: is it ever read?
    read = [len({d * t % s for t in range(k)}) for d, k, s in zip(dilation, size, kernel.stride, strict=True)]
    return conv_orth(kernel) - max(0, o - i * math.prod(read))


def hinge(cosine, theta):
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    return max(0.0, theta - min(angle, math.pi - angle))


def eadk(k, theta=math.pi / 2, weight=0.1, double=False, target=1.0):
    value = sum((target - sum(x * x for x in row)) ** 2 for row in k) + 2 * weight * sum(hinge(c, theta) ** 2 for c in pairs(k))
    return value + eadk(k.T, theta, weight, target=len(k) / len(k.T)) if double else value


def eadc(kernel, theta=math.pi / 2, weight=0.1):
    actual = overlaps(kernel)
    squares = np.diag(next(g for shift, g in actual.items() if not any(shift)))
    value = sum((1 - s) ** 2 for s in squares)
    for shift, g in actual.items():
        for i, j in np.ndindex(*g.shape):
            if i != j or any(shift):
                value += weight * hinge(g[i, j] / (weighing_length(squares[i]) * weighing_length(squares[j])), theta) ** 2
    return value


def gor(k, kind="inter", groups=None):
    o = len(k)
    groups = groups or max(g for g in range(1, max(1, min(32, o // 4)) + 1) if o % g == 0)
    if kind == "inter":
        parts = [k[g * (o // groups) : (g + 1) * (o // groups)] for g in range(groups)]
    else:
        parts = [k[i :: o // groups] for i in range(o // groups)]
    return sum(residual_squares(side_of(part, "smaller")) for part in parts)

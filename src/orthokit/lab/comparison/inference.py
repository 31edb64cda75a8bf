"""Statistics of a comparison: tests and intervals for a few seeds, and how many seeds would tell more.

Welch's t (unequal variances), Dunnett's test against the baseline (equal variances, simultaneous) and Student's intervals are
SciPy's. A verdict goes by Welch's p, adjusted over all comparisons of one metric after S. Holm, "A simple sequentially rejective
multiple test procedure" (1979). Where a study says so beforehand, it goes by the p of a test with seeds as blocks.
"""

import contextlib
import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from orthokit.checks import check_count, check_number

__all__ = [
    "ALPHA",
    "POWER",
    "Blocked",
    "Contrast",
    "Difference",
    "Sample",
    "blocked_differences",
    "contrast",
    "detectable",
    "differences",
    "holm",
    "intraclass",
    "paired_contrast",
    "per_doubling",
    "pooled_sd",
    "power",
    "seeds_needed",
]

ALPHA = 0.05
"""Risk of a wrong verdict among all comparisons of a metric; intervals have a level of ``1 - ALPHA``."""
POWER = 0.8
"""Chance with which a real difference should be resolved."""
MOST = 100_000
"""More seeds than anybody would run."""
FAMILY = 10_000
"""More comparisons than anybody would make at once."""
FAR = 100.0
"""Standard errors between two means beyond which SciPy's noncentral t is slow."""
SHARES = 200
"""Points at which the distribution of two variances' shares is evaluated."""


@dataclass(frozen=True)
class Sample:
    """Values of independent runs, one a seed."""

    values: tuple[float, ...]

    @property
    def n(self) -> int:
        """The number of values."""
        return len(self.values)

    @cached_property
    def mean(self) -> float:
        """The mean of the values."""
        return statistics.fmean(self.values)

    @cached_property
    def sd(self) -> float | None:
        """Standard deviation with ``n - 1``; None of a single value."""
        return statistics.stdev(self.values) if self.n > 1 else None

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """Student's interval of the mean; None of a single value."""
        if self.sd is None:
            return None
        half = float(stats.t.ppf(1 - ALPHA / 2, self.n - 1)) * self.sd / math.sqrt(self.n)
        return self.mean - half, self.mean + half


@dataclass(frozen=True)
class Blocked:
    """A difference between arms with seeds as blocks: only what differs within a seed counts as error."""

    mean: float
    error: float
    """Standard error of the mean."""
    freedom: float
    seeds: tuple[int, ...]
    """The number of seeds that both arms have, in each panel."""

    @property
    def interval(self) -> tuple[float, float]:
        """Student's interval of the mean."""
        half = float(stats.t.ppf(1 - ALPHA / 2, self.freedom)) * self.error
        return self.mean - half, self.mean + half

    @property
    def p(self) -> float:
        """The p of Student's t, two-sided."""
        return float(2 * stats.t.sf(abs(self.mean) / self.error, self.freedom))

    def detectable(self, comparisons: int = 1) -> float:
        """The least difference that these seeds resolve with probability ``POWER``, were the error this one."""
        critical = float(stats.t.isf(ALPHA / comparisons / 2, self.freedom))

        def lacking(shift: float) -> float:
            chance = float(stats.nct.sf(critical, self.freedom, shift))
            return (chance if math.isfinite(chance) else float(shift > critical)) - POWER

        return self.error * float(optimize.brentq(lacking, 0.0, 2 * critical + 10))


@dataclass(frozen=True)
class Difference:
    """An arm less the baseline: mean, Welch's interval and p, Dunnett's p; None of single runs, and where no value differs."""

    mean: float
    interval: tuple[float, float] | None
    welch: float | None
    simultaneous: Callable[[], float | None] = field(default=lambda: None, repr=False, compare=False)
    """Dunnett's test, which takes as long as all others together and is made where its p is asked for."""
    holm: float | None = None
    """The p that verdicts go by, adjusted over all comparisons of the metric."""
    blocked: Blocked | None = None
    """The difference with seeds as blocks; None with fewer than two seeds that both arms have."""

    @property
    def dunnett(self) -> float | None:
        """Dunnett's p."""
        return self.simultaneous()

    @property
    def resolved(self) -> bool:
        """Whether the seeds suffice to tell that there is a difference."""
        return self.holm is not None and self.holm < ALPHA


def differences(arms: Mapping[str, Sample], baseline: str) -> dict[str, Difference]:
    """The difference of each other arm from the baseline, not yet adjusted.

    >>> from orthokit.lab.comparison.inference import Sample, differences
    >>> effect = differences({"none": Sample((90.0, 90.2, 90.4)), "strict": Sample((91.0, 91.2, 91.4))}, "none")["strict"]
    >>> round(effect.mean, 3), [round(x, 3) for x in effect.interval], round(effect.welch, 4)
    (1.0, [0.547, 1.453], 0.0036)
    """
    control = arms[baseline]
    others = {name: sample for name, sample in arms.items() if name != baseline}
    names = [name for name, sample in others.items() if min(sample.n, control.n) > 1]
    family = _Family({name: others[name] for name in names}, control)
    result = {}
    for name, sample in others.items():
        mean = sample.mean - control.mean
        if name in names:
            result[name] = Difference(mean, *_welch(sample, control), partial(family.dunnett, name))
        else:
            result[name] = Difference(mean, None, None)
    return result


@dataclass(frozen=True)
class Contrast:
    """A weighted sum of differences; no interval and p where one is of single runs, or where no value differs."""

    mean: float
    interval: tuple[float, float] | None
    raw: float | None
    holm: float | None = None
    """The p that verdicts go by, adjusted over the arms."""
    blocked: Blocked | None = None
    """The contrast with seeds as blocks; None where a panel has fewer than two seeds that both arms have."""

    @property
    def resolved(self) -> bool:
        """Whether the seeds suffice to tell that there is a difference."""
        return self.holm is not None and self.holm < ALPHA


def contrast(weights: Sequence[float], arm: Sequence[Sample], control: Sequence[Sample]) -> Contrast:
    """``sum_k w_k (arm_k - control_k)`` of means, panel by panel, and whether it is 0.

    The error comes from the seeds of each mean alone, however the means lie; the degrees of freedom are Satterthwaite's. With
    weights of ``1/k`` the contrast is the mean difference over ``k`` panels.

    >>> from orthokit.lab.comparison.inference import Sample, contrast
    >>> none = [Sample((90.0, 90.2, 90.4)), Sample((80.0, 80.2, 80.4))]
    >>> arm = [Sample((90.4, 90.6, 90.8)), Sample((80.2, 80.4, 80.6))]
    >>> effect = contrast([0.5, 0.5], arm, none)
    >>> round(effect.mean, 3), [round(x, 3) for x in effect.interval], round(effect.raw, 4)
    (0.3, [0.034, 0.566], 0.0317)
    """
    pairs = list(zip(weights, arm, control, strict=True))
    mean = sum(weight * (one.mean - other.mean) for weight, one, other in pairs)
    samples = [(weight, each) for weight, *both in pairs for each in both]
    parts = [(weight**2 * each.sd**2 / each.n, each.n) for weight, each in samples if each.sd is not None]
    if len(parts) < len(samples) or not any(part for part, _ in parts):
        return Contrast(mean, None, None)
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / (n - 1) for part, n in parts if part)
    error = math.sqrt(variance)
    half = float(stats.t.ppf(1 - ALPHA / 2, freedom)) * error
    return Contrast(mean, (mean - half, mean + half), float(2 * stats.t.sf(abs(mean) / error, freedom)))


def paired_contrast(weights: Sequence[float], pairs: Sequence[Mapping[int, float]]) -> Blocked | None:
    """``sum_k w_k mean(d_k)`` of differences within seeds, panel by panel: :func:`contrast` with seeds as blocks.

    A seed is one block in all panels that have it, however its results there hang together. Where all panels have the same
    seeds the test is Student's t of ``sum_k w_k d_ks`` over the seeds ``s``; where they share none it is Satterthwaite's.

    >>> from orthokit.lab.comparison.inference import paired_contrast
    >>> effect = paired_contrast([0.5, 0.5], [{0: 0.4, 1: 0.5, 2: 0.6}, {0: 0.1, 1: 0.3, 2: 0.2}])
    >>> round(effect.mean, 3), [round(x, 3) for x in effect.interval], round(effect.p, 4)
    (0.35, [0.135, 0.565], 0.0198)

    Args:
        weights: one for each panel.
        pairs: the differences of each panel, by seed.

    Returns:
        None where a panel has fewer than two seeds, or no difference varies.
    """
    sizes = [len(each) for each in pairs]
    if min(sizes, default=0) < 2:
        return None
    samples = [Sample(tuple(each.values())) for each in pairs]
    parts = [weight**2 * statistics.variance(each.values) / each.n for weight, each in zip(weights, samples, strict=True)]
    errors, shares = dict[int, float](), dict[int, float]()
    for weight, values, sample, part in zip(weights, pairs, samples, parts, strict=True):
        root = math.sqrt(sample.n * (sample.n - 1))
        for seed, value in values.items():
            errors[seed] = errors.get(seed, 0.0) + weight * (value - sample.mean) / root
            shares[seed] = shares.get(seed, 0.0) + part / root
    variance = sum(error**2 for error in errors.values())
    scale = max(abs(weight * value) for weight, values in zip(weights, pairs, strict=True) for value in values.values())
    if variance <= (1e-12 * scale) ** 2:
        return None
    mean = sum(weight * each.mean for weight, each in zip(weights, samples, strict=True))
    freedom = sum(parts) ** 2 / sum(share**2 for share in shares.values())
    return Blocked(mean, math.sqrt(variance), freedom, tuple(sizes))


def blocked_differences(arms: Mapping[str, Mapping[int, float]], baseline: str) -> dict[str, Blocked]:
    """The difference of each other arm from the baseline, with seeds as blocks: least squares of ``value = arm + seed + error``.

    The error is pooled over all arms. With two arms the test is the paired t over the seeds that both have.

    >>> from orthokit.lab.comparison.inference import blocked_differences
    >>> arms = {"none": {0: 90.0, 1: 90.2, 2: 90.4}, "strict": {0: 90.5, 1: 90.6, 2: 91.0}}
    >>> effect = blocked_differences(arms, "none")["strict"]
    >>> round(effect.mean, 3), round(effect.p, 4), effect.seeds
    (0.5, 0.0131, (3,))

    Args:
        arms: values by seed.
        baseline: one of them.

    Returns:
        Arms with two or more of the baseline's seeds; nothing where no run differs from what its arm and seed say.
    """
    others = [arm for arm in arms if arm != baseline]
    seeds = sorted({seed for values in arms.values() for seed in values})
    runs = [(arm, seed, value) for arm, values in arms.items() for seed, value in values.items()]
    design = np.array([[arm == one for one in others] + [seed == one for one in seeds] for arm, seed, _ in runs], float)
    inverse = np.linalg.pinv(design)
    values = np.array([value for *_, value in runs])
    fit = inverse @ values
    residuals, freedom = values - design @ fit, len(runs) - int(np.linalg.matrix_rank(design))
    if freedom < 1 or np.abs(residuals).max() <= 1e-12 * np.abs(values).max():
        return {}
    errors = np.sqrt(np.square(inverse).sum(1) * float(residuals @ residuals) / freedom)
    counts = {arm: len(arms[arm].keys() & arms[baseline].keys()) for arm in others}
    return {
        arm: Blocked(float(fit[index]), float(errors[index]), freedom, (counts[arm],))
        for index, arm in enumerate(others)
        if counts[arm] > 1
    }


def per_doubling(numbers: Sequence[float]) -> list[float]:
    """The weights of the linear contrast over the binary logarithm: ``w_k = (log2 x_k - mean) / sum (log2 x - mean)^2``.

    >>> from orthokit.lab.comparison.inference import per_doubling
    >>> per_doubling([8, 16, 32])
    [-0.5, 0.0, 0.5]

    Args:
        numbers: above 0, and not all equal.
    """
    logs = [math.log2(number) for number in numbers]
    middle = statistics.fmean(logs)
    total = sum((log - middle) ** 2 for log in logs)
    return [(log - middle) / total for log in logs]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A context without SciPy's warnings on values that hardly spread, as those of seeds with few test images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def _welch(sample: Sample, control: Sample) -> tuple[tuple[float, float] | None, float | None]:
    if not sample.sd and not control.sd:  # seeds that do not differ at all tell nothing of those that were not run
        return None, None
    with _quiet():
        test = stats.ttest_ind(sample.values, control.values, equal_var=False)
        interval = test.confidence_interval(1 - ALPHA)
    return (float(interval.low), float(interval.high)), float(test.pvalue)


@dataclass(frozen=True, eq=False)
class _Family:
    """Arms whose differences from the baseline Dunnett tests together."""

    arms: Mapping[str, Sample]
    control: Sample

    def dunnett(self, name: str) -> float | None:
        """The p of an arm."""
        return self._p_values[name]

    @cached_property
    def _p_values(self) -> dict[str, float | None]:
        if not any(sample.sd for sample in (*self.arms.values(), self.control)):
            return dict.fromkeys(self.arms)
        values = [sample.values for sample in self.arms.values()]
        with _quiet():
            test = stats.dunnett(*values, control=self.control.values, rng=np.random.default_rng(0))
        return {name: float(p) for name, p in zip(self.arms, test.pvalue, strict=True)}


def holm(values: Sequence[float]) -> list[float]:
    """Adjusted p-values: calling all those below ``ALPHA`` real is wrong somewhere in at most that share of families.

    >>> from orthokit.lab.comparison.inference import holm
    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    p_values, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        p_values[index] = largest
    return p_values


def intraclass(blocks: Sequence[Sequence[Sequence[float]]]) -> tuple[float, float] | None:
    """The correlation of one seed's results beyond the means of their arms, and the p-value of the F test that it is 0.

    It is the share that seeds have in the variance between the runs of an arm, ICC(C,1) of K. O. McGraw and S. P. Wong, "Forming
    inferences about some intraclass correlation coefficients" (1996), the variances pooled over the blocks. Tests that take runs
    as independent are careful where it is above 0.

    >>> from orthokit.lab.comparison.inference import intraclass
    >>> correlation, p = intraclass([[[90.0, 90.2, 90.7], [91.1, 91.2, 91.9]]])
    >>> round(correlation, 3), round(p, 3)
    (0.969, 0.016)

    Args:
        blocks: for each panel the results of its arms, each with the same seeds in the same order; two or more of either. Others
            do not count.

    Returns:
        None where nothing counts, or no result differs.
    """
    between = within = weight = 0.0
    seeds = rest = 0
    for block in map(np.array, blocks):
        arms, runs = block.shape if block.ndim == 2 else (0, 0)
        if min(arms, runs) < 2:
            continue
        apart = block - block.mean(1, keepdims=True)
        common = apart.mean(0)
        between += arms * float(common @ common)
        within += float(np.square(apart - common).sum())
        seeds, rest, weight = seeds + runs - 1, rest + (arms - 1) * (runs - 1), weight + arms * (runs - 1)
    if not within > 0:
        return None
    error = within / rest
    of_seeds = (between - seeds * error) / weight
    return of_seeds / (of_seeds + error), float(stats.f.sf(between / seeds / error, seeds, rest))


def pooled_sd(samples: Sequence[Sample]) -> float | None:
    """The common standard deviation of several samples; None where none has two values."""
    spread = [(sample.n - 1, sample.sd) for sample in samples if sample.sd is not None]
    return math.sqrt(sum(k * sd**2 for k, sd in spread) / sum(k for k, _ in spread)) if spread else None


def power(n: int, effect: float, sd: float, *, comparisons: int = 1, alpha: float = ALPHA) -> float:
    """Chance that ``n`` seeds an arm resolve a difference of ``effect`` between two arms whose runs vary by ``sd``.

    The test is Welch's, two-sided, at level ``alpha / comparisons``, the strictest step of Holm's procedure. With several
    comparisons the chance is at least this. Given the variances' shares ``b`` and ``1 - b`` of their sum, which are independent
    of t and Beta((n - 1) / 2, (n - 1) / 2), the test has ``(n - 1) / (b^2 + (1 - b)^2)`` degrees of freedom. The chance is the
    mean over these shares.

    >>> from orthokit.lab.comparison.inference import power
    >>> round(power(6, 0.3, 0.15), 3)  # Cohen's d = 2
    0.865
    """
    check_count("n", n, 2, MOST)
    check_number("effect", effect)
    check_number("sd", sd)
    check_count("comparisons", comparisons, most=FAMILY)
    check_number("alpha", alpha, 0, 1, open_low=True)
    if alpha == 1:
        raise ValueError("alpha must be below 1: at 1 every difference counts as resolved")
    if effect == 0:
        return alpha / comparisons
    if sd == 0:
        return 1.0
    return _power(n, effect / sd * math.sqrt(n / 2), alpha / comparisons)


@lru_cache(maxsize=4096)
def _power(n: int, shift: float, level: float) -> float:
    """Chance that ``n`` seeds an arm resolve a difference of ``shift`` standard errors at this level."""
    freedom, critical = 2 * n - 2, _critical(n, level)
    if shift > FAR:  # where SciPy's noncentral t takes seconds: the mean over the quantiles of the variance under the root
        spread = np.sqrt(stats.chi2.ppf((np.arange(SHARES) + 0.5) / SHARES, freedom) / freedom)
        return float(stats.norm.cdf(shift - critical[:, None] * spread).mean())
    # SciPy's noncentral t is not a number far out: in the lower tail, which is then negligible, and where the chance is 0 or 1.
    upper, lower = stats.nct.sf(critical, freedom, shift), stats.nct.cdf(-critical, freedom, shift)
    upper, lower = np.where(np.isfinite(upper), upper, shift > critical), np.where(np.isfinite(lower), lower, 0.0)
    return float(np.minimum(upper + lower, 1.0).mean())


@lru_cache(maxsize=4096)
def _critical(n: int, level: float) -> NDArray[np.float64]:
    """Welch's critical t, two-sided, at each share of the variances."""
    share = stats.beta.ppf((np.arange(SHARES) + 0.5) / SHARES, (n - 1) / 2, (n - 1) / 2)
    return np.asarray(stats.t.isf(level / 2, (n - 1) / (share**2 + (1 - share) ** 2)))


def seeds_needed(effect: float, sd: float, *, chance: float = POWER, comparisons: int = 1, alpha: float = ALPHA) -> int:
    """The fewest seeds an arm that resolve a difference of ``effect`` with probability ``chance``.

    >>> from orthokit.lab.comparison.inference import seeds_needed
    >>> seeds_needed(effect=0.3, sd=0.15), seeds_needed(effect=0.1, sd=0.15)
    (6, 37)

    Raises:
        ValueError: ``effect`` is not above 0, or so small that more than ``MOST`` seeds were needed.
    """
    check_number("effect", effect, open_low=True)
    _check_chance(chance)
    if power(MOST, effect, sd, comparisons=comparisons, alpha=alpha) < chance:
        raise ValueError(f"a difference of {effect:g} with a standard deviation of {sd:g} needs more than {MOST:,} seeds")
    low, high = 1, MOST
    while high - low > 1:
        middle = (low + high) // 2
        enough = power(middle, effect, sd, comparisons=comparisons, alpha=alpha) >= chance
        low, high = (low, middle) if enough else (middle, high)
    return high


def detectable(n: int, sd: float, *, chance: float = POWER, comparisons: int = 1, alpha: float = ALPHA) -> float:
    """The least difference that ``n`` seeds an arm resolve with probability ``chance``.

    >>> from orthokit.lab.comparison.inference import detectable
    >>> round(detectable(3, 0.15), 2)
    0.53
    """
    check_count("n", n, 2, MOST)
    check_number("sd", sd)
    _check_chance(chance)
    if sd == 0:
        return 0.0

    def lacking(ratio: float) -> float:
        return power(n, ratio, 1.0, comparisons=comparisons, alpha=alpha) - chance

    high = 1.0
    while lacking(high) < 0:
        high *= 2
    return sd * float(optimize.brentq(lacking, 0.0, high)) if lacking(0.0) < 0 else 0.0


def _check_chance(chance: float) -> None:
    check_number("chance", chance, open_low=True)
    if chance >= 1:
        raise ValueError(f"chance must be below 1: no number of seeds makes it certain; got {chance:g}")

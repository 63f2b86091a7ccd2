"""What runs of several seeds say: means with their 95% confidence intervals, and whether one model is better than another."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from statistics import fmean, stdev

# 97.5% quantile of Student's t distribution with 1, 2, ... degrees of freedom
T_QUANTILES = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448, 2.1314)
HOLDS, FAILS, OPEN = "holds", "does not hold", "within the error"


@dataclass(frozen=True)
class Estimate:
    """mean +- half: a mean over seeds and half the width of its 95% confidence interval, infinite of one seed."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """By Student's t distribution; the quantile of 15 degrees of freedom stands for all more, which are a little safer."""
        if not values:
            raise ValueError("no value to estimate a mean from")
        if len(values) == 1:
            return cls(values[0], float("inf"))
        quantile = T_QUANTILES[min(len(values) - 1, len(T_QUANTILES)) - 1]
        return cls(fmean(values), quantile * stdev(values) / sqrt(len(values)))

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + (f" ± {self.half:.1f}" if isfinite(self.half) else " (one seed)")


def difference(better: dict[int, float], worse: dict[int, float]) -> Estimate:
    """Mean difference of two models' figures by seed, paired: over the seeds that both were run with."""
    return Estimate.of([better[seed] - worse[seed] for seed in sorted(better.keys() & worse.keys())])


def verdict(found: Estimate) -> str:
    """Of the claim that a difference is positive: it holds where the whole interval is, and does not where none of it is."""
    if found.mean - found.half > 0:
        return HOLDS
    return FAILS if found.mean + found.half < 0 else OPEN

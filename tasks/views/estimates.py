"""Shares and differences with their intervals."""

import math
from dataclasses import dataclass

import numpy as np
import polars as pl


@dataclass(frozen=True)
class Estimate:
    """A share, or a difference of two, with its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


DRAWS = 4000


def estimate_difference(differences: list[np.ndarray]) -> Estimate:
    """The mean of differences over prompts, averaged over seeds, with a bootstrapped interval.

    `differences` has one float array `[prompts]` per seed. Seeds are drawn with replacement, and prompts within each. So the
    interval covers the choice of prompts and, as far as few seeds can show it, the choice of seeds. With one seed it covers
    the choice of prompts only.
    """
    rng, seeds = np.random.default_rng(0), len(differences)
    chosen, total = rng.integers(seeds, size=(seeds, DRAWS)), np.zeros(DRAWS)
    for index in range(seeds):
        means = np.stack([each[rng.integers(len(each), size=(DRAWS, len(each)))].mean(1) for each in differences])
        total += means[chosen[index], np.arange(DRAWS)]
    low, high = np.quantile(total / seeds, [0.025, 0.975])
    return Estimate(float(np.mean([each.mean() for each in differences])), float(low), float(high))


def estimate_accuracy(evals: pl.DataFrame) -> Estimate:
    """Share of correct completions in an `evals` table, with a Wilson interval for the effective number of draws.

    Samples of one prompt are not independent. The effective number is p(1-p) over the variance of the mean of the prompts'
    shares.
    """
    shares = evals.group_by("prompt_id").agg(pl.col("correct").mean())["correct"].to_numpy()
    n, p = len(shares), float(shares.mean())
    variance = float(shares.var(ddof=1)) / n if n > 1 else 0.0
    effective = max(p * (1 - p) / variance, n) if variance > 0 else n
    quantile = 1.959964  # of the standard normal distribution, for 95%
    squared = quantile * quantile
    centre = (p + squared / (2 * effective)) / (1 + squared / effective)
    half = quantile / (1 + squared / effective) * math.sqrt(p * (1 - p) / effective + squared / (4 * effective**2))
    return Estimate(p, max(centre - half, 0.0), min(centre + half, 1.0))

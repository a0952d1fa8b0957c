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
    """The mean of differences over prompts, averaged over seeds (`[prompts]` a seed), with a bootstrapped interval.

    Seeds are drawn with replacement, and prompts within each: the interval holds for other prompts, and, as far as so few
    seeds can tell, for other seeds. One seed's interval is of the prompts alone.
    """
    rng, seeds = np.random.default_rng(0), len(differences)
    chosen, total = rng.integers(seeds, size=(seeds, DRAWS)), np.zeros(DRAWS)
    for place in range(seeds):
        means = np.stack([each[rng.integers(len(each), size=(DRAWS, len(each)))].mean(1) for each in differences])
        total += means[chosen[place], np.arange(DRAWS)]
    low, high = np.quantile(total / seeds, [0.025, 0.975])
    return Estimate(float(np.mean([each.mean() for each in differences])), float(low), float(high))


def estimate_accuracy(evals: pl.DataFrame) -> Estimate:
    """Share of correct completions, with a Wilson interval for as many independent draws as the prompts amount to.

    Samples of one prompt are not independent: the effective number is p(1-p) over the variance of the mean of the
    prompts' own shares.
    """
    shares = evals.group_by("prompt_id").agg(pl.col("correct").mean())["correct"].to_numpy()
    n, p = len(shares), float(shares.mean())
    variance = float(shares.var(ddof=1)) / n if n > 1 else 0.0
    effective = max(p * (1 - p) / variance, n) if variance > 0 else n
    z = 1.959964
    centre = (p + z * z / (2 * effective)) / (1 + z * z / effective)
    half = z / (1 + z * z / effective) * math.sqrt(p * (1 - p) / effective + z * z / (4 * effective**2))
    return Estimate(p, max(centre - half, 0.0), min(centre + half, 1.0))

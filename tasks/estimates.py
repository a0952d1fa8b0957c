"""Shares with their intervals."""

import math
from dataclasses import dataclass

import polars as pl


@dataclass(frozen=True)
class Estimate:
    """A share with its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def accuracy(evals: pl.DataFrame) -> Estimate:
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

"""How the students of several runs differ on the same held-out prompts and seeds."""

from typing import Any

import numpy as np
import polars as pl

from storage.read import scan
from tasks.views.estimates import estimate_difference
from tasks.views.rounds import summarise_rounds


def compare_runs(runs: dict[str, list[str]], number: int) -> list[dict[str, Any]]:
    """One row per name of `runs`, whose lists hold the addresses of its runs in the same order of seeds.

    `accuracy`, `recovered`, `divergence` (nats per byte) and `seconds` (of training) are means over the seeds after round
    `number`. `difference` is the accuracy less the first name's, with a 95% interval. It is paired: a prompt is compared with
    itself, seed by seed.
    """
    shares = {name: [_shares_correct_of(run, number) for run in seeds] for name, seeds in runs.items()}
    first = next(iter(shares.values()))
    rows = []
    for name, seeds in runs.items():
        tables = [summarise_rounds(run).filter(model="student", round=number) for run in seeds]
        graded = len(first[0]) > 0
        change = estimate_difference([(a - b).to_numpy() for a, b in zip(shares[name], first, strict=True)]) if graded else None
        rows.append(
            {
                "objective": name,
                "accuracy": f"{np.mean([correct.mean() for correct in shares[name]]):.3f}" if graded else "",
                "difference": f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"
                if change and shares[name] is not first
                else "",
                "recovered": _format_mean([table["recovered"][0] for table in tables], "{:.0%}"),
                "divergence": _format_mean([table["divergence"][0] for table in tables], "{:.4f}"),
                "seconds": f"{np.mean([_training_seconds_of(run, number) for run in seeds]):.1f}",
            }
        )
    return rows


def _shares_correct_of(run: str, number: int) -> pl.Series:
    """The share of correct answers to each held-out prompt, in order of `prompt_id`; of sampled answers if there are any."""
    evals = scan(run, "evals").filter(pl.col("round") == number, model="student").collect()
    kind = "sampled" if (evals["decoding"] == "sampled").any() else "greedy"
    evals = evals.drop_nulls("correct")  # prompts without a reference
    return evals.filter(decoding=kind).group_by("prompt_id").agg(pl.col("correct").mean()).sort("prompt_id")["correct"]


def _training_seconds_of(run: str, number: int) -> float:
    seconds: float = scan(run, "steps").filter(pl.col("round") <= number).select(pl.col("seconds").sum()).collect().item()
    return seconds


def _format_mean(values: list[float | None], pattern: str) -> str:
    known = [value for value in values if value is not None]
    return pattern.format(np.mean(known)) if known else ""

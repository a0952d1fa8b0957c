"""How the students of several runs differ, by the same held-out prompts and the same seeds."""

from typing import Any

import numpy as np
import polars as pl

from storage.read import scan
from tasks.views.estimates import estimate_difference
from tasks.views.rounds import summarise_rounds


def compare_runs(runs: dict[str, list[str]], number: int) -> list[dict[str, Any]]:
    """One row a name of `runs`, whose lists hold the addresses of its runs in the same order of seeds.

    `accuracy`, `recovered`, `divergence` and `seconds` (of training) are means over the seeds after round `number`;
    `difference` is of accuracy to the first name's, with a 95% interval: a prompt is compared with itself, seed by seed.
    """
    answers = {name: [_answers(run, number) for run in seeds] for name, seeds in runs.items()}
    first = next(iter(answers.values()))
    rows = []
    for name, seeds in runs.items():
        tables = [summarise_rounds(run).filter(model="student", round=number) for run in seeds]
        apart = [(own - other).to_numpy() for own, other in zip(answers[name], first, strict=True)]
        change = estimate_difference(apart)
        rows.append(
            {
                "objective": name,
                "accuracy": f"{np.mean([own.mean() for own in answers[name]]):.3f}",
                "difference": "" if answers[name] is first else f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]",
                "recovered": _mean([table["recovered"][0] for table in tables], "{:.0%}"),
                "divergence": _mean([table["divergence"][0] for table in tables], "{:.4f}"),
                "seconds": f"{np.mean([_training(run, number) for run in seeds]):.1f}",
            }
        )
    return rows


def _answers(run: str, number: int) -> pl.Series:
    """The share of right answers of each held-out prompt, in the prompts' order; sampled ones where there are any."""
    evals = scan(run, "evals").filter(pl.col("round") == number, model="student").collect()
    kind = "sampled" if (evals["decoding"] == "sampled").any() else "greedy"
    return evals.filter(decoding=kind).group_by("prompt_id").agg(pl.col("correct").mean()).sort("prompt_id")["correct"]


def _training(run: str, number: int) -> float:
    seconds: float = scan(run, "steps").filter(pl.col("round") <= number).select(pl.col("seconds").sum()).collect().item()
    return seconds


def _mean(values: list[float | None], pattern: str) -> str:
    known = [value for value in values if value is not None]
    return pattern.format(np.mean(known)) if known else ""

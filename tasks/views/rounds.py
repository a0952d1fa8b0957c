"""The figures of a run so far: one row per model and round."""

from typing import Any

import polars as pl

from configs.schema import Recipe
from storage.read import scan
from storage.schemas import LEFT_OUT
from tasks.views.estimates import Estimate, estimate_accuracy
from tasks.views.inspect import open_run
from tasks.views.kinds import ALL, Kind, list_kinds


def summarise_rounds(run: str, kind: Kind = ALL) -> pl.DataFrame:
    """The teacher, the student before training, and the student after each round, with 95% intervals.

    Of several teachers each answers the prompts of its own rows, and together they are the teacher. The figures are those of a
    `kind` of rows.

    `recovered` is the share of the teacher's lead in sampled accuracy that the student has gained since round 0.
    `divergence` estimates KL(student ‖ teacher) from the student's samples, in nats per byte. `tokens` is the mean length of
    completions, and `truncated` the share of them that was cut at the limit. `supervised` is the share of the round's
    completion bytes that a term of the loss covers.
    """
    try:
        evals = kind.select(run, scan(run, "evals")).collect()
    except (pl.exceptions.ComputeError, FileNotFoundError):
        return pl.DataFrame()  # a run that has only begun
    supervised = dict(sum_bytes(run, kind).select("round", "supervised").iter_rows())
    recipe = open_run(run).frozen_recipe()
    estimates: dict[tuple[str, int, str], Estimate] = {}
    rows = []
    for (model, number), group in evals.group_by(["model", "round"]):
        for (decoding,), some in group.drop_nulls("correct").group_by(["decoding"]):
            estimates[str(model), int(str(number)), str(decoding)] = estimate_accuracy(some)
        cached, answers = group.filter(decoding="cached"), group.filter(pl.col("decoding") != "cached")
        sampled = answers.filter(decoding="sampled") if (answers["decoding"] == "sampled").any() else answers
        rows.append(
            {
                "model": model,
                "round": number,
                "title": name_teacher(recipe, 1) if model == "teacher" else f"student, round {number}",
                "divergence": _cached_divergence(cached) if len(cached) else _divergence_of(sampled),
                "tokens": sampled["tokens"].mean(),
                "truncated": (sampled["finish_reason"] == "length").mean(),
            }
        )
    decoding = "sampled" if any(key[2] == "sampled" for key in estimates) else "greedy"
    before, teacher = estimates.get(("student", 0, decoding)), estimates.get(("teacher", 0, decoding))
    for row in rows:
        key = (row["model"], row["round"])
        for way in ("greedy", "sampled"):
            estimate = estimates.get((*key, way))
            row |= {
                way: estimate and estimate.value,
                f"{way}_low": estimate and estimate.low,
                f"{way}_high": estimate and estimate.high,
            }
        row["supervised"] = supervised.get(row["round"]) if row["model"] == "student" else None
        row["recovered"] = None
        if row["model"] == "student" and row["round"] and before and teacher and teacher.value > before.value:
            row["recovered"] = (estimates[*key, decoding].value - before.value) / (teacher.value - before.value)
    rows.sort(key=lambda row: (row["model"] != "teacher", row["round"]))
    return pl.DataFrame(rows, infer_schema_length=None)


def name_teacher(recipe: Recipe | None, number: int) -> str:
    """Who scores a round, counted from 1: the teacher, or the student that it was after which round (0: before any)."""
    if recipe is None or recipe.teacher is None or not recipe.self_taught:
        return "teacher"
    return f"teacher: student at round {number - 1 if recipe.teacher.weights == 'round' else 0}"


def _divergence_of(evals: pl.DataFrame) -> float | None:
    """Mean log-ratio of completions in nats per byte; None where none has a teacher's log-prob."""
    scored = evals.filter(pl.col("teacher_logprob").is_not_null())
    log_ratio = float((scored["logprob"] - scored["teacher_logprob"]).sum())
    return log_ratio / float(scored["bytes"].sum()) if scored["bytes"].sum() else None


def _cached_divergence(evals: pl.DataFrame) -> float | None:
    """Divergence of held-out cached texts in nats per byte; None where none has one."""
    compared = evals.drop_nulls("divergence")
    size = float(compared["bytes"].sum())
    return float((compared["divergence"] * compared["bytes"]).sum()) / size if size else None


def sum_bytes(run: str, kind: Kind = ALL) -> pl.DataFrame:
    """One row per round: shares of the bytes of completions that went on: supervised, unmatched, dropped, in the tail."""
    names = ["supervised", "unmatched", "dropped", "tail"]
    sums = [pl.col(f"{name}_bytes").cast(pl.Int64).sum().alias(name) for name in names]
    try:
        table = (
            kind.select(run, scan(run, "aligned"))
            .filter(pl.col("status") != LEFT_OUT)
            .group_by("round")
            .agg(sums)
            .sort("round")
            .collect(engine="streaming")
        )
    except (pl.exceptions.ComputeError, FileNotFoundError):  # before the first round
        return pl.DataFrame(schema={"round": pl.Int32, **dict.fromkeys(names, pl.Float64)})
    return table.with_columns(pl.col(names) / pl.max_horizontal(pl.sum_horizontal(names), 1))


def find_best(table: pl.DataFrame, figure: str) -> int | None:
    """The round whose student has the largest accuracy, or the least divergence; the earliest of equals, None if none has it.

    `table` is `summarise_rounds` of a run, `figure` the recipe's `evaluate.best`.
    """
    if table.is_empty():
        return None
    trained = table.filter(pl.col("model") == "student", pl.col("round") > 0, pl.col(figure).is_not_null())
    best = trained.sort(figure, "round", descending=[figure != "divergence", False]).head(1)
    return None if best.is_empty() else int(best["round"][0])


def tabulate_rounds(run: str) -> list[dict[str, Any]]:
    """The figures of a run for people: of all rows, and behind them of each kind of rows, where there are several."""
    rows = format_rounds(summarise_rounds(run))
    kinds = list_kinds(run, open_run(run).frozen_recipe())
    if not kinds or not rows:
        return rows
    tables = {ALL.name: rows} | {kind.name: format_rounds(summarise_rounds(run, kind)) for kind in kinds}
    return [{"rows of": name, **row} for name, table in tables.items() for row in table]


def format_rounds(table: pl.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table for people: accuracies such as `0.716 [0.66, 0.77]`, other shares in percent."""

    def format_interval(row: dict[str, Any], kind: str) -> str | None:
        return None if row[kind] is None else f"{row[kind]:.3f} [{row[kind + '_low']:.2f}, {row[kind + '_high']:.2f}]"

    return [
        {
            "model": row["title"],
            "sampled": format_interval(row, "sampled"),
            "greedy": format_interval(row, "greedy"),
            "recovered": _format_value(row["recovered"], "{:.0%}"),
            "divergence": _format_value(row["divergence"], "{:z.4f}"),
            "tokens": _format_value(row["tokens"], "{:.1f}"),
            "truncated": _format_value(row["truncated"], "{:.1%}"),
            "supervised": _format_value(row["supervised"], "{:.1%}"),
        }
        for row in table.iter_rows(named=True)
    ]


def _format_value(value: float | None, pattern: str) -> str | None:
    return None if value is None else pattern.format(value)

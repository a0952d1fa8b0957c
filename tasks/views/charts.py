"""Vega-Lite charts of a run by round, from its tables and manifests."""

import re
from collections.abc import Iterator
from typing import Any

import altair as alt
import polars as pl

from storage.read import scan
from storage.store import Run
from tasks.views.rounds import sum_bytes

STAGES = ("completions", "rollouts", "rewards", "scores", "aligned", "gates", "training", "evals")
BYTES = ("supervised", "unmatched", "dropped", "tail")
SIZE = {"width": 420, "height": 220}


def draw_charts(run: Run, rounds: pl.DataFrame) -> dict[str, dict[str, Any]]:
    """Vega-Lite specifications by title. Charts without data yet are left out.

    `rounds` is `tasks.views.rounds.summarise_rounds` of the run.
    """
    seconds = pl.DataFrame(list(list_seconds(run)), schema=["round", "stage", "seconds"], orient="row")
    charts = {
        "Accuracy on held-out prompts": _draw_accuracy(rounds),
        "Divergence from the teacher": _draw_divergence(rounds),
        "Length of answers": _draw_line(rounds, "tokens", "mean tokens per sampled answer"),
        "Answers cut at the length limit": _draw_line(rounds, "truncated", "share of sampled answers", ".2~%"),
        "Completion bytes covered by the loss": _draw_coverage(sum_bytes(run.address)),
        "Loss": _draw_loss(run.address),
        "Time by stage": _draw_time(seconds),
    }
    return {title: chart.properties(**SIZE).to_dict() for title, chart in charts.items() if chart is not None}


def list_seconds(run: Run) -> Iterator[tuple[int, str, float]]:
    """(round, stage, seconds) of each piece of work of this run. Artifacts taken over from another run are left out."""
    for slot, manifest in run.manifests():
        place = re.match(r"round=(\d+)/(\w+)", slot)
        if place is None or "taken_from" in manifest:
            continue
        stage = "training" if place[2] == "steps" else place[2]  # the student and its trainer's state are the same work
        if stage in STAGES:
            yield int(place[1]), stage, manifest["seconds"]


def _along(column: str, numbers: pl.Series) -> alt.X:
    """An axis of whole numbers, with at most about ten ticks: Vega's own ticks may be halves, which `d` shows as `1 1 2 2`."""
    first, last = int(numbers.min()), int(numbers.max())  # type: ignore[arg-type]
    step = -(-(last - first + 1) // 10)
    ticks = list(range(first, last + 1, step))
    return alt.X(f"{column}:Q", title=column, axis=alt.Axis(values=ticks, format="d"), scale=alt.Scale(nice=False, zero=False))


def _draw_accuracy(rounds: pl.DataFrame) -> alt.TopLevelMixin | None:
    kinds = [kind for kind in ("sampled", "greedy") if rounds[kind].is_not_null().any()]
    if not kinds:
        return None
    long = pl.concat(
        rounds.select(
            "model", "round", decoding=pl.lit(kind), accuracy=kind, low=f"{kind}_low", high=f"{kind}_high"
        ).drop_nulls("accuracy")
        for kind in kinds
    )  # fmt: skip
    colour = _colour_of("decoding")
    hint = [alt.Tooltip(name, format=".3f") for name in ("accuracy", "low", "high")]
    student = alt.Chart(long.filter(model="student")).encode(x=_along("round", long["round"]), color=colour)
    teacher = alt.Chart(long.filter(model="teacher")).encode(color=colour)
    height = alt.Y("accuracy:Q", title="share of correct answers", scale=alt.Scale(domain=[0, 1]))
    return alt.layer(
        student.mark_area(opacity=0.18).encode(y="low:Q", y2="high:Q"),
        student.mark_line(point=True).encode(y=height, tooltip=["round", "decoding", *hint]),
        teacher.mark_rule(strokeDash=[5, 4]).encode(y=height, tooltip=[alt.Tooltip("model"), "decoding", *hint]),
    )


def _draw_divergence(rounds: pl.DataFrame) -> alt.TopLevelMixin | None:
    return _draw_line(rounds.filter(model="student"), "divergence", "nats per byte, student's samples", ".2f")


def _draw_line(rounds: pl.DataFrame, column: str, title: str, style: str = ".1f") -> alt.TopLevelMixin | None:
    some = rounds.select("model", "round", pl.col(column).cast(pl.Float64)).drop_nulls()
    if some.is_empty():
        return None
    scale = alt.Scale(zero=True) if (some[column] != 0).any() else alt.Scale(domain=[0, 1])  # all zeros would give no axis
    height = alt.Y(f"{column}:Q", title=title, scale=scale, axis=alt.Axis(format=style))
    hint = ["model", "round", alt.Tooltip(column, format=style)]
    along = _along("round", some["round"])
    lines = [alt.Chart(some.filter(model="student")).mark_line(point=True).encode(x=along, y=height, tooltip=hint)]
    if len(teacher := some.filter(model="teacher")):
        lines.append(alt.Chart(teacher).mark_rule(strokeDash=[5, 4]).encode(y=height, tooltip=hint))
    return alt.layer(*lines)


def _draw_coverage(accounts: pl.DataFrame) -> alt.TopLevelMixin | None:
    if accounts.is_empty():
        return None
    long = accounts.unpivot(BYTES, index="round", variable_name="bytes", value_name="share")
    return _draw_bars(long, "bytes", alt.Y("share:Q", title="share of completion bytes", axis=alt.Axis(format="%")), BYTES)


def _draw_time(seconds: pl.DataFrame) -> alt.TopLevelMixin | None:
    if seconds.is_empty():
        return None
    total = seconds.group_by("round", "stage").agg(pl.col("seconds").sum())
    return _draw_bars(total, "stage", alt.Y("seconds:Q", title="seconds"), STAGES)


def _draw_bars(data: pl.DataFrame, kind: str, height: alt.Y, order: tuple[str, ...]) -> alt.TopLevelMixin:
    data = data.with_columns(place=pl.col(kind).replace_strict(order, range(len(order))))
    colour = _colour_of(kind, order)
    hint = ["round", kind, alt.Tooltip(height.shorthand, format=".3~r")]
    along = alt.X("round:O", title="round", axis=alt.Axis(labelAngle=0, labelOverlap=True))
    chart: alt.TopLevelMixin = alt.Chart(data).mark_bar().encode(x=along, y=height, color=colour, order="place:Q", tooltip=hint)
    return chart


def _colour_of(column: str, order: tuple[str, ...] | None = None) -> alt.Color:
    return alt.Color(f"{column}:N", title=None, sort=order, legend=alt.Legend(orient="top", symbolOpacity=1))


def _draw_loss(run: str) -> alt.TopLevelMixin | None:
    """Means over at most 400 groups of consecutive steps: a long run has more steps than a screen has points."""
    try:
        steps = scan(run, "steps").select("step", "round", "loss").sort("step").collect()
    except (pl.exceptions.ComputeError, FileNotFoundError):
        return None
    width = -(-len(steps) // 400)  # steps per point
    means = steps.group_by(pl.col("step") // width * width, "round").agg(pl.col("loss").mean()).sort("step")
    height = alt.Y("loss:Q", title="nats per unit", scale=alt.Scale(zero=False))
    hint = ["step", "round", alt.Tooltip("loss", format=".4f")]
    along = _along("step", means["step"])
    chart: alt.TopLevelMixin = alt.Chart(means).mark_line().encode(x=along, y=height, tooltip=hint)
    return chart

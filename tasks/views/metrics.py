"""A run's figures as experiment trackers take them: names and numbers at a step."""

import re
from collections.abc import Iterator

import polars as pl

from tasks.views.inspect import collect_rows, open_run
from tasks.views.kinds import ALL, list_kinds
from tasks.views.rounds import summarise_rounds


def list_metrics(run: str, number: int) -> Iterator[tuple[int, dict[str, float]]]:
    """(step, figures) of a round: each optimizer step, and with the last one the round's gates and evaluations.

    Round 0 is at step 0: the teacher, and the student before any training. Figures that a round does not have are left out.
    """
    selected, last = pl.col("round") == number, 0
    if number:
        for row in collect_rows(run, "steps", selected).sort("step").drop("round").iter_rows(named=True):
            last = row.pop("step")
            yield last, _name_figures("train", row)
    figures: dict[str, float] = {"round": number}
    if number:
        gates = collect_rows(run, "gates", selected)
        figures |= _name_figures("gates", dict(zip(gates["gate"], gates["value"], strict=True)) if len(gates) else {})
    for kind in (ALL, *list_kinds(run, open_run(run).frozen_recipe())):
        rows = summarise_rounds(run, kind)
        for row in rows.filter(selected).drop("round").iter_rows(named=True) if len(rows) else ():
            model = row.pop("model")
            figures |= _name_figures(model if kind is ALL else f"{model}/{kind.name.replace(' ', '_')}", row)
    yield last, figures


def _name_figures(table: str, values: dict[str, float | None]) -> dict[str, float]:
    return {f"{table}/{re.sub(r'[^a-z0-9]+', '_', key)}": value for key, value in values.items() if value is not None}

"""A run on one page of Markdown, as Prefect shows it: rounds, charts as pictures, answers before and after."""

import base64
from typing import Any

import polars as pl
import vl_convert

from configs.schema import Recipe
from storage.store import Run
from tasks.views.charts import draw_charts
from tasks.views.escapes import shorten
from tasks.views.markdown import MEANING, format_table, quote
from tasks.views.report import collect_answers
from tasks.views.rounds import summarise_rounds, tabulate_rounds

LONGEST = 200  # characters of a text in the table of answers


def summarise_run(run: Run, recipe: Recipe) -> str:
    """The page. It holds all that it shows: nothing is fetched when it is looked at."""
    rounds, done = summarise_rounds(run.address), run.rounds_done()
    parts = [
        f"# {recipe.name}",
        f"objective {quote(recipe.objective.name)} · {done} of {recipe.rounds} rounds · in {quote(run.address)}",
    ]
    if len(rounds):
        parts += ["## Rounds", format_table(tabulate_rounds(run.address)), MEANING]
        parts += ["## By round", *_draw_pictures(run, rounds)]
    if answers := collect_answers(run.address, done):
        parts += ["## The same prompts, before and after", format_table([_format_answers(row) for row in answers])]
    return "\n\n".join(parts)


def _draw_pictures(run: Run, rounds: pl.DataFrame) -> list[str]:
    """Each chart as a heading and a picture that is part of the text."""
    drawn = ((title, vl_convert.vegalite_to_svg(chart)) for title, chart in draw_charts(run, rounds).items())
    return [
        f"### {title}\n\n![{title}](data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()})"
        for title, svg in drawn
    ]


def _format_answers(row: dict[str, Any]) -> dict[str, str]:
    """A row of the table: what was asked, and each model's answer with its grade where there is a reference."""
    graded = row["reference"] is not None
    cells = {"prompt": _cut(row["prompt"]), "reference": _cut(row["reference"]) if graded else ""}
    for who, answer in row["answers"].items():
        grade = ("✓ " if answer["correct"] else "✗ ") if answer and graded else ""
        cells[who] = grade + _cut(answer["text"]) if answer else ""
    return cells


def _cut(text: str) -> str:
    return quote(shorten(text, LONGEST)) if text else "(empty)"

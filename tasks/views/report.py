"""A run as one self-contained HTML file: figures, charts, and samples with each unit shaded by its log-ratio."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import polars as pl
import vl_convert

from configs.gates import Gates
from configs.load import dump_recipe
from storage.read import scan
from storage.store import Run
from tasks.gates.gate import limit_figure
from tasks.tokens.align import Kind
from tasks.views.charts import draw_charts
from tasks.views.escapes import LONGEST, escape_controls, shorten
from tasks.views.inspect import collect_rows, count_kept, show_prompts
from tasks.views.readers import Readers
from tasks.views.rounds import summarise_rounds, tabulate_rounds

FILE = "report.html"
SHOWN = 8  # prompts, and rollouts of each kind
FULL = 5.0  # nats per unit from which the shade is full


def _escape(value: Any) -> Any:
    return escape_controls(shorten(value)) if type(value) is str else value  # markup of our own stays as it is


TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    finalize=_escape,
)


def write_report(run: Run) -> str:
    """Write the run's `report.html` and return its address. The report of a run that has only begun is short."""
    run.write_text(FILE, render_report(run))
    return f"{run.address}/{FILE}"


def render_report(run: Run) -> str:
    """The report as HTML, from the run's tables and manifests only."""
    recipe = run.frozen_recipe()
    assert recipe is not None
    rounds = summarise_rounds(run.address)
    done = run.rounds_done()
    readers = Readers(run)
    rollouts = _pick_rollouts(run.address, done, readers)
    return TEMPLATES.get_template("report.html").render(
        recipe=recipe,
        toml=dump_recipe(recipe),
        address=run.address,
        done=done,
        rounds=tabulate_rounds(run.address),
        charts=draw_charts(run, rounds) if len(rounds) else {},
        vega=_bundle_vega(),
        prompts=show_prompts(run.address),
        gates=_list_gates(run.address, done, recipe.gates),
        kept=count_kept(run.address, done),
        answers=collect_answers(run.address, done),
        rollouts=rollouts,
        missing=readers.missing,
        full=FULL,
    )


@lru_cache(maxsize=1)
def _bundle_vega() -> str:
    """The script that draws the charts: Vega and everything that it needs."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed")


def _list_gates(run: str, number: int, limits: Gates) -> list[dict[str, Any]]:
    """A round's figures with their units, limits and results, as preflight shows its own."""
    rows = collect_rows(run, "gates", pl.col("round") == number).iter_rows(named=True)
    records = [limit_figure(row["gate"], row["value"], limits, row["detail"]).record() for row in rows]
    return [{name: value for name, value in record.items() if name != "advice"} for record in records]


def collect_answers(run: str, last: int) -> list[dict[str, Any]]:
    """The first held-out prompts with their reference and the answers before and after; greedy ones if the run has them."""
    evals = collect_rows(run, "evals", pl.col("round").is_in([0, last]))
    if evals.is_empty():
        return []
    prompts = collect_rows(run, "prompts", pl.col("split") == "eval").head(SHOWN)
    kind = "greedy" if (evals["decoding"] == "greedy").any() else "sampled"
    answers = {
        (row["model"], row["round"], row["prompt_id"]): row
        for row in evals.filter(decoding=kind, sample=0).iter_rows(named=True)
    }
    who = {"teacher": ("teacher", 0), "student, round 0": ("student", 0), f"student, round {last}": ("student", last)}
    who = {title: key for title, key in who.items() if any(key == (model, number) for model, number, _ in answers)}
    return [
        {
            "prompt": " | ".join(message["content"] for message in prompt["messages"]),
            "reference": prompt["reference"],
            "answers": {title: answers.get((*key, prompt["prompt_id"])) for title, key in who.items()},
        }
        for prompt in prompts.iter_rows(named=True)
    ]


def _pick_rollouts(run: str, number: int, readers: Readers) -> dict[str, list[dict[str, Any]]]:
    """Samples of a round, unit by unit: the first ones, and those with the largest divergence in nats per byte."""
    log_ratio = (pl.col("student_logprobs").list.sum() - pl.col("teacher_logprobs").list.sum()).cast(pl.Float64)
    size = pl.col("byte_ends").list.last()
    scored = (
        scan(run, "aligned")
        .filter(pl.col("round") == number, status="ok")
        .drop_nulls(["student_logprobs", "teacher_logprobs"])
        .select("rollout_id", "byte_ends", "kind", "student_logprobs", "teacher_logprobs", divergence=log_ratio / (size + 1))
    )
    try:
        picked = {
            "The first samples": scored.head(SHOWN).collect(),
            "The samples furthest from the teacher": scored.top_k(SHOWN, by="divergence").collect(engine="streaming"),
        }
    except (pl.exceptions.ComputeError, FileNotFoundError):
        return {}
    wanted = pl.concat(picked.values())["rollout_id"].unique().to_list()
    texts = {row["rollout_id"]: row for row in collect_rows(run, "rollouts", pl.col("rollout_id").is_in(wanted)).to_dicts()}
    prompt_ids = [row["prompt_id"] for row in texts.values()]
    prompts = {row["prompt_id"]: row for row in collect_rows(run, "prompts", pl.col("prompt_id").is_in(prompt_ids)).to_dicts()}
    return {
        title: [
            {
                "rollout_id": row["rollout_id"],
                "read": readers.show(texts[row["rollout_id"]], prompts[texts[row["rollout_id"]]["prompt_id"]]),
                "divergence": row["divergence"],
                "units": split_units(texts[row["rollout_id"]]["text"], row),
            }
            for row in rows.iter_rows(named=True)
        ]
        for title, rows in picked.items()
        if len(rows)
    }


def split_units(text: str, aligned: dict[str, Any]) -> list[dict[str, Any]]:
    """The pieces of a completion between boundaries that both tokenizations share, each with both models' log-probs.

    Log-probs are in nats. `shade` is (log P_student − log P_teacher) / `FULL`, cut to −1 … 1. Text behind the last unit, or
    behind the first `LONGEST` ones, is one more piece without log-probs and shade.
    """
    data, start, pieces = text.encode(), 0, []
    columns = (aligned[name][:LONGEST] for name in ("byte_ends", "kind", "student_logprobs", "teacher_logprobs"))
    for end, kind, student, teacher in zip(*columns, strict=True):
        piece = data[start:end].decode(errors="backslashreplace")
        pieces.append(
            {
                "piece": piece or "■",  # the stop
                "kind": Kind(kind).name.lower().replace("_", " "),
                "student": student,
                "teacher": teacher,
                "shade": max(-1.0, min(1.0, (student - teacher) / FULL)),
            }
        )
        start = end
    if rest := data[start:].decode(errors="backslashreplace"):
        kind = "not shown by unit" if len(aligned["kind"]) > LONGEST else "not aligned"
        pieces.append({"piece": rest, "kind": kind, "student": None, "teacher": None, "shade": None})
    return pieces

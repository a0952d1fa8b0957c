"""What `potstill inspect` shows, as rows. Everything comes from the run's tables; no model is loaded."""

import itertools
import posixpath
from typing import Any

import numpy as np
import polars as pl

from configs.errors import BadInput
from storage.read import scan
from storage.store import Run
from tasks.rows.accounts import summarise_account
from tasks.tokens.align import Kind

SHOWN = 10  # rollouts in the view of a round

Piece = tuple[str, float | None]  # a token as a literal, and its log-prob in nats


def check_run(run: str) -> None:
    """Raise BadInput where `run` is not a run's folder."""
    if open_run(run).frozen_recipe() is None:
        raise BadInput(f"{run}: not a run (no run.toml in it); give a run's folder, such as runs/quickstart")


def open_run(run: str) -> Run:
    """The run whose folder or URI is `run`."""
    root, name = posixpath.split(run.rstrip("/"))
    return Run(root or ".", name)


def list_tables(run: str) -> list[dict[str, Any]]:
    """One row per committed table or folder, its shards added up."""
    rows: dict[str, dict[str, Any]] = {}
    for slot, manifest in open_run(run).manifests():
        place = posixpath.dirname(slot) if "/part-" in slot else slot
        row = rows.setdefault(place, {"artifact": place, "files": 0, "rows": 0, "seconds": 0.0, "taken from": ""})
        row["files"] += 1
        row["rows"] += manifest["rows"]
        row["seconds"] = round(row["seconds"] + manifest["seconds"], 1)
        row["taken from"] = manifest.get("taken_from", row["taken from"])
    return list(rows.values())


def show_prompts(run: str) -> list[dict[str, Any]]:
    """What became of every row of each source of prompts."""
    return summarise_account(collect_rows(run, "accounts", pl.lit(True)).to_dicts())


def show_round(run: str, number: int) -> dict[str, list[dict[str, Any]]]:
    """Tables of a round by title: bytes by status, units by kind, shares of matched tokens, the first rollouts."""
    aligned = collect_rows(run, "aligned", pl.col("round") == number)
    if not len(aligned):
        raise BadInput(f"{run}: no round {number} with aligned rollouts; rounds are counted from 1")
    rollouts = scan(run, "rollouts").filter(pl.col("round") == number).collect()
    counts = [pl.col(f"{name}_bytes").sum() for name in ("supervised", "unmatched", "dropped", "tail")]
    kinds = aligned.select(pl.col("kind").explode(empty_as_null=False)).drop_nulls().group_by("kind").len().sort("kind")
    first = rollouts.join(aligned, on="rollout_id", maintain_order="left").head(SHOWN)
    log_ratio = pl.col("student_logprobs").list.sum() - pl.col("teacher_logprobs").list.sum()
    shown = first.select(
        "rollout_id", "source", pl.col("text").str.head(60), "finish_reason", "status",
        units=pl.col("byte_ends").list.len(), log_ratio=log_ratio.cast(pl.Float64).round(3),
    )  # fmt: skip
    title = f"The first {len(shown)} of {len(rollouts)} rollouts (log_ratio: log P_student − log P_teacher, in nats)"
    return {
        "Bytes of the completions": aligned.group_by("status").agg(pl.len().alias("rollouts"), *counts).to_dicts(),
        "Units": [
            {"kind": Kind(row["kind"]).name.lower(), "units": row["len"], "share": f"{row['len'] / kinds['len'].sum():.1%}"}
            for row in kinds.to_dicts()
        ],
        "Tokens that match a token of the other side": _measure_matches(run, number, rollouts),
        "Retokenisation drift": [
            {
                "rollouts": len(aligned),
                "share whose ids differ from the text's encoding": f"{(~aligned['canonical']).sum() / len(aligned):.1%}",
            }
        ],
        title: shown.to_dicts(),
    }


def _measure_matches(run: str, number: int, rollouts: pl.DataFrame) -> list[dict[str, Any]]:
    """Shares of emitted tokens, and of the teacher's mass in its top k, that match an id of the other side (MATHS.md §2)."""
    vocab = scan(run, "vocab").filter(pl.col("match_id") >= 0).select("side", "token_id").collect()
    known = {side: frame["token_id"] for (side,), frame in vocab.group_by("side")}

    def format_share(ids: pl.Series, side: str, mass: pl.Series | None = None) -> str:
        matched = ids.is_in(known[side].implode()).to_numpy()
        weight = np.ones(len(ids)) if mass is None else mass.to_numpy()
        return f"{weight[matched].sum() / weight.sum():.1%}" if len(ids) else "–"

    def tokens_of(table: pl.DataFrame) -> pl.Series:
        return table["token_ids"].explode().drop_nulls()  # dropped rows have none

    lines = [{"side": "student", "of": "emitted tokens", "share": format_share(tokens_of(rollouts), "student")}]
    scores = collect_rows(run, "scores", pl.col("round") == number)
    if len(scores):
        lines.append({"side": "teacher", "of": "emitted tokens", "share": format_share(tokens_of(scores), "teacher")})
        if scores["top_ids"].null_count() < len(scores):
            top = scores.select(
                pl.col("top_ids").explode(), pl.col("top_logprobs").explode().cast(pl.Float32).exp().alias("mass")
            ).drop_nulls()
            share = format_share(top["top_ids"], "teacher", top["mass"])
            lines.append({"side": "teacher", "of": "mass of the top k", "share": share})
    return lines


def show_rollout(run: str, rollout_id: str) -> dict[str, list[dict[str, Any]]]:
    """One rollout token by token, unit after unit: both sides' pieces and log-probs, in nats."""
    selected = pl.col("rollout_id") == rollout_id
    rollouts = _list_rows(run, "rollouts", selected)
    if not rollouts:
        some = ", ".join(row["rollout_id"] for row in _list_rows(run, "rollouts", pl.int_range(pl.len()) < 3))
        hint = f"give one of the run's ids, such as {some}" if some else "the run has no rollouts yet"
        raise BadInput(f"{run}: no rollout '{rollout_id}'; {hint}")
    row = rollouts[0]
    if not (aligned_rows := _list_rows(run, "aligned", selected)):
        raise BadInput(f"{run}: rollout '{rollout_id}' is not aligned yet; continue the run first")
    aligned = aligned_rows[0]
    student = _pieces_of(run, "student", row["token_ids"], row["logprobs"])
    teacher: list[Piece] = []
    if aligned["teacher_logprobs"] is not None:
        scores = scan(run, "scores").filter(selected).collect().to_dicts()[0]
        teacher = _pieces_of(run, "teacher", scores["token_ids"], scores["logprobs"])
    lines: list[dict[str, Any]] = []
    s_start = t_start = 0
    for unit, (s_end, t_end, kind) in enumerate(
        zip(aligned["student_ends"], aligned["teacher_ends"], aligned["kind"], strict=True)
    ):
        lines += _format_unit(str(unit), Kind(kind).name.lower(), student[s_start:s_end], teacher[t_start:t_end])
        s_start, t_start = s_end, t_end
    lines += _format_unit("-", "not aligned", student[s_start:], teacher[t_start:])
    prompt = scan(run, "prompts").filter(pl.col("prompt_id") == row["prompt_id"]).collect().to_dicts()[0]
    about = {
        "rollout": rollout_id,
        "source": row["source"],
        "prompt": " | ".join(m["content"] for m in prompt["messages"]),
        "text": row["text"],
        "reference": prompt["reference"],
        "finish": row["finish_reason"],
        "status": aligned["status"],
    }
    return {"Rollout": [about], "Tokens (log-probs in nats)": lines}


def collect_rows(run: str, table: str, selected: pl.Expr) -> pl.DataFrame:
    """The selected rows of a table; none where the run does not have the table yet."""
    try:
        return scan(run, table).filter(selected).collect()
    except (pl.exceptions.ComputeError, FileNotFoundError):
        return pl.DataFrame()


def _list_rows(run: str, table: str, selected: pl.Expr) -> list[dict[str, Any]]:
    return collect_rows(run, table, selected).to_dicts()


def _pieces_of(run: str, side: str, ids: list[int], logprobs: list[float] | None) -> list[Piece]:
    vocab = scan(run, "vocab").filter(pl.col("side") == side).select("token_id", "bytes", "role")
    rows = {row["token_id"]: row for row in vocab.filter(pl.col("token_id").is_in(ids)).collect().to_dicts()}
    pieces = [f"<{rows[i]['role']}>" if rows[i]["bytes"] is None else _format_piece(rows[i]["bytes"]) for i in ids]
    return list(zip(pieces, itertools.repeat(None) if logprobs is None else logprobs))


def _format_piece(data: bytes) -> str:
    """A token as a literal: its text, or its bytes where they are only a part of a character."""
    try:
        return repr(data.decode())
    except UnicodeDecodeError:
        return repr(data)


def _format_unit(unit: str, kind: str, student: list[Piece], teacher: list[Piece]) -> list[dict[str, Any]]:
    lines = []
    for i in range(max(len(student), len(teacher))):
        s_piece, s_logprob = student[i] if i < len(student) else ("", None)
        t_piece, t_logprob = teacher[i] if i < len(teacher) else ("", None)
        lines.append(
            {
                "unit": unit if i == 0 else "",
                "kind": kind if i == 0 else "",
                "student": s_piece,
                "log P_student": None if s_logprob is None else round(s_logprob, 3),
                "teacher": t_piece,
                "log P_teacher": None if t_logprob is None else round(t_logprob, 3),
            }
        )
    return lines

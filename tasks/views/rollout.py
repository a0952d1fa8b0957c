"""What `potstill inspect --rollout` shows: one rollout token by token, and its prompt as each side read it."""

import itertools
from typing import Any

import polars as pl

from configs.errors import BadInput
from storage.read import scan
from storage.schemas import TEACHER
from tasks.tokens.align import Kind
from tasks.views.inspect import collect_rows, list_cleared, open_run
from tasks.views.readers import Readers
from tasks.views.rounds import name_teacher

Piece = tuple[str, float | None]  # a token as a literal, and its log-prob in nats


def show_rollout(run: str, rollout_id: str) -> dict[str, list[dict[str, Any]]]:
    """One rollout token by token, unit after unit: both sides' pieces and log-probs, in nats."""
    selected = pl.col("rollout_id") == rollout_id
    rollouts = collect_rows(run, "rollouts", selected).to_dicts()
    if not rollouts:
        some = ", ".join(row["rollout_id"] for row in collect_rows(run, "rollouts", pl.int_range(pl.len()) < 3).to_dicts())
        hint = f"give one of the run's ids, such as {some}" if some else "the run has no rollouts yet"
        gone = "".join(f"; those of round {number} were {why}" for number, why in list_cleared(run, "rollouts").items())
        raise BadInput(f"{run}: no rollout '{rollout_id}'; {hint}{gone}")
    row = rollouts[0]
    if not (aligned_rows := collect_rows(run, "aligned", selected).to_dicts()):
        raise BadInput(f"{run}: rollout '{rollout_id}' is not aligned yet; continue the run first")
    aligned = aligned_rows[0]
    # what it was drawn with is another law's where sampling had a temperature, top_p or top_k
    name = aligned.get(TEACHER) or ""
    student = _pieces_of(run, "student", row["token_ids"], row.get("model_logprobs") or row["logprobs"], name)
    teacher: list[Piece] = []
    if aligned["teacher_logprobs"] is not None:
        for scores in collect_rows(run, "scores", selected).to_dicts():  # none where they were cleared
            teacher = _pieces_of(run, "teacher", scores["token_ids"], scores["logprobs"], name)
    lines: list[dict[str, Any]] = []
    s_start = t_start = 0
    for unit, (s_end, t_end, kind) in enumerate(
        zip(aligned["student_ends"], aligned["teacher_ends"], aligned["kind"], strict=True)
    ):
        lines += _format_unit(str(unit), Kind(kind).name.lower(), student[s_start:s_end], teacher[t_start:t_end])
        s_start, t_start = s_end, t_end
    lines += _format_unit("-", "not aligned", student[s_start:], teacher[t_start:])
    prompt = scan(run, "prompts").filter(pl.col("prompt_id") == row["prompt_id"]).collect().to_dicts()[0]
    readers = Readers(open_run(run))
    about = {
        "rollout": rollout_id,
        "source": row["source"],
        "scored by": name_teacher(readers.recipe.by_teacher()[name], row["round"]) + f" {name}" * bool(name),
        "text": row["text"],
        "reference": prompt["reference"],
        "finish": row["finish_reason"],
        "status": aligned["status"],
    }
    if cleared := list_cleared(run, "scores").get(row["round"]):
        about["teacher's tokens"] = f"were {cleared}"
    read = readers.list_texts(row, prompt)
    return {"Rollout": [about], "The prompt, as each side read it": read, "Tokens (log-probs in nats)": lines}


def _pieces_of(run: str, side: str, ids: list[int], logprobs: list[float] | None, teacher: str) -> list[Piece]:
    vocab = scan(run, "vocab").filter(pl.col("side") == side, pl.col(TEACHER) == teacher).select("token_id", "bytes", "role")
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

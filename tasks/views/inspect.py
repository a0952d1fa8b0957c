"""What `potstill inspect` shows, as rows. Everything comes from the run's tables; no model is loaded."""

import posixpath
import re
from typing import Any

import numpy as np
import polars as pl

from configs.errors import BadInput
from storage.manifests import describe_clearing
from storage.read import scan
from storage.schemas import TEACHER
from storage.store import Run
from tasks.rows.accounts import summarise_account
from tasks.tokens.align import Kind

SHOWN = 10  # rollouts in the view of a round


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
        row = rows.setdefault(
            place, {"artifact": place, "files": 0, "rows": 0, "seconds": 0.0, "taken from": "", "cleared": ""}
        )
        row["files"] += 1
        row["rows"] += manifest["rows"]
        row["seconds"] = round(row["seconds"] + manifest["seconds"], 1)
        row["taken from"] = manifest.get("taken_from", row["taken from"])
        row["cleared"] = describe_clearing(manifest) or row["cleared"]
    cleared = any(row["cleared"] for row in rows.values())
    return [{name: value for name, value in row.items() if name != "cleared" or cleared} for row in rows.values()]


def list_cleared(run: str, table: str) -> dict[int, str]:
    """By round, when and why a table of the run was cleared."""
    found = {}
    for slot, manifest in open_run(run).manifests():
        if (place := re.match(rf"round=(\d+)/{table}\b", slot)) and (cleared := describe_clearing(manifest)):
            found[int(place[1])] = cleared
    return found


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
    by_source = rollouts.select("rollout_id", "source").join(aligned, on="rollout_id").group_by("source", maintain_order=True)
    drift = by_source.agg(pl.len().alias("rollouts"), (~pl.col("canonical")).mean().alias("share"))
    log_ratio = pl.col("student_logprobs").list.sum() - pl.col("teacher_logprobs").list.sum()
    shown = first.select(
        "rollout_id", "source", pl.col("text").str.head(60), "finish_reason", "status",
        units=pl.col("byte_ends").list.len(), log_ratio=log_ratio.cast(pl.Float64).round(3),
    )  # fmt: skip
    cleared = {table: gone for table in ("rollouts", "scores") if (gone := list_cleared(run, table).get(number))}
    title = f"The first {len(shown)} of {len(rollouts)} rollouts (log_ratio: log P_student − log P_teacher, in nats)"
    keys = ["status", *[TEACHER] * (TEACHER in aligned.columns)]
    return {
        "Bytes of the completions": aligned.group_by(keys, maintain_order=True)
        .agg(pl.len().alias("rollouts"), *counts)
        .to_dicts(),
        "Units": [
            {"kind": Kind(row["kind"]).name.lower(), "units": row["len"], "share": f"{row['len'] / kinds['len'].sum():.1%}"}
            for row in kinds.to_dicts()
        ],
        "Tokens that match a token of the other side": _list_matches(run, number, rollouts, aligned),
        "Retokenisation drift": [
            {"source": source, "rollouts": count, "share whose ids differ from the text's encoding": f"{share:.1%}"}
            for source, count, share in drift.iter_rows()
        ],
        title: shown.to_dicts(),
        **({"Samples that went on to training (rollout.keep)": rewards} if (rewards := count_kept(run, number)) else {}),
        **({"Cleared": [cleared]} if cleared else {}),
    }


def count_kept(run: str, number: int) -> list[dict[str, Any]]:
    """How many samples of a round went on and were left out, with their mean score; none where all went on unasked."""
    rewards = collect_rows(run, "rewards", pl.col("round") == number)
    if not len(rewards):
        return []
    score, graded = pl.col("score").mean().round(3).alias("mean score"), pl.col("score").count().alias("graded")
    rows = rewards.group_by("kept").agg(pl.len().alias("samples"), graded, score).sort("kept", descending=True)
    return [
        {"samples": "went on" if kept else "left out", "count": n, **rest}
        for kept, n, rest in ((row.pop("kept"), row.pop("samples"), row) for row in rows.to_dicts())
    ]


def _list_matches(run: str, number: int, rollouts: pl.DataFrame, aligned: pl.DataFrame) -> list[dict[str, Any]]:
    """Shares of emitted tokens, and of the teacher's mass in its top k, that match an id of the other side (MATHS.md §2)."""
    vocab = scan(run, "vocab").filter(pl.col("match_id") >= 0).select("side", TEACHER, "token_id").collect()
    scores = collect_rows(run, "scores", pl.col("round") == number)
    if TEACHER not in aligned.columns:
        return _measure_matches(vocab, rollouts, scores)
    lines = []
    for (name,), own in aligned.group_by(TEACHER, maintain_order=True):
        ids = own["rollout_id"].implode()
        some = scores.filter(pl.col("rollout_id").is_in(ids)) if len(scores) else scores
        rows = _measure_matches(vocab.filter(teacher_name=name), rollouts.filter(pl.col("rollout_id").is_in(ids)), some)
        lines += [{"rows of": name, **row} for row in rows]
    return lines


def _measure_matches(vocab: pl.DataFrame, rollouts: pl.DataFrame, scores: pl.DataFrame) -> list[dict[str, Any]]:
    known = {side: frame["token_id"] for (side,), frame in vocab.group_by("side")}

    def format_share(ids: pl.Series, side: str, mass: pl.Series | None = None) -> str:
        matched = ids.is_in(known[side].implode()).to_numpy()
        weight = np.ones(len(ids)) if mass is None else mass.to_numpy()
        return f"{weight[matched].sum() / weight.sum():.1%}" if len(ids) else "–"

    def tokens_of(table: pl.DataFrame) -> pl.Series:
        return table["token_ids"].explode().drop_nulls()  # dropped rows have none

    lines = [{"side": "student", "of": "emitted tokens", "share": format_share(tokens_of(rollouts), "student")}]
    if len(scores):
        lines.append({"side": "teacher", "of": "emitted tokens", "share": format_share(tokens_of(scores), "teacher")})
        if scores["top_ids"].null_count() < len(scores):
            top = scores.select(
                pl.col("top_ids").explode(), pl.col("top_logprobs").explode().cast(pl.Float32).exp().alias("mass")
            ).drop_nulls()
            share = format_share(top["top_ids"], "teacher", top["mass"])
            lines.append({"side": "teacher", "of": "mass of the top k", "share": share})
    return lines


def collect_rows(run: str, table: str, selected: pl.Expr) -> pl.DataFrame:
    """The selected rows of a table; none where the run does not have the table yet."""
    try:
        return scan(run, table).filter(selected).collect()
    except (pl.exceptions.ComputeError, FileNotFoundError):
        return pl.DataFrame()

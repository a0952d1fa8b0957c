"""Gates of a round: figures of its rollouts before they are trained on, and the teacher's lead before any training."""

from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import torch

from configs.gates import Gates
from storage.artifacts import Artifact, read_table
from storage.schemas import LEFT_OUT, TEACHER
from tasks.engines.base import Sampling
from tasks.gates.agreement import Gap, trainer_logprobs
from tasks.gates.gate import Gate, limit_figure, prefix_name
from tasks.models.reference import ModelRef
from tasks.models.weights import load_float32
from tasks.tokens.ragged import flat, index_in_row, rows_of

COMPARED = 32  # samples of a round that are run through the trainer's model
ENOUGH = 32_768  # tokens of them, prompts included
UNGRADED = "no answer of either is right; for free text, which is seldom equal to its reference, go by the divergence"
RUN = 4  # tokens of a run that counts as repeated


def lead_gate(limits: Gates, *, teacher: pa.Table, student: pa.Table, about: str = "") -> Gate:
    """The teacher's accuracy less the student's on the same prompts, from `evals` tables; of sampled answers if there are any.

    `about` says what else sets the two apart than their weights. The figure of the gate is the upper end of the 95% interval,
    so that chance alone does not stop a run.
    """
    t_shares, s_shares = _shares_correct_of(teacher), _shares_correct_of(student)
    if not len(t_shares):
        return Gate("lead", None, limits.lead, detail="no prompt has a reference to grade by")
    leads = t_shares - s_shares
    spread = 1.96 * float(leads.std(ddof=1)) / len(leads) ** 0.5 if len(leads) > 1 else 1.0
    detail = f"teacher {t_shares.mean():.3f}, student {s_shares.mean():.3f}; the lead is at most the figure, with 97.5%"
    detail += f"; {about}" * bool(about)
    if not t_shares.any() and not s_shares.any():
        return Gate("lead", None, limits.lead, detail=UNGRADED)
    return Gate("lead", float(leads.mean()) + spread, limits.lead, detail=detail)


def _shares_correct_of(evals: pa.Table) -> np.ndarray:
    """Each prompt's share of correct answers, float64 `[prompts]`, in order of `prompt_id`."""
    frame = pl.from_arrow(evals)
    assert isinstance(frame, pl.DataFrame)
    kind = "sampled" if (frame["decoding"] == "sampled").any() else "greedy"
    some = frame.filter(pl.col("decoding") == kind).drop_nulls("correct")
    return some.group_by("prompt_id").agg(pl.col("correct").mean()).sort("prompt_id")["correct"].to_numpy()


def round_gates(
    rollouts: list[Artifact],
    aligned: list[Artifact],
    size: int,
    limits: Gates,
    tokens_before: float | None,
    teachers: Sequence[str] = (),
) -> list[Gate]:
    """Coverage of rows that went on; truncation, repetition and length of the student's samples. One shard is read at a time.

    `size` is the size of the student's vocabulary, `tokens_before` the mean length of the first round's samples in tokens.
    The coverage is that of each of several `teachers`.
    """
    cut = samples = tokens = 0
    repeated = 0.0
    for artifact in rollouts:
        table = read_table(artifact, ["source", "finish_reason", "token_ids"])
        table = table.filter(pc.equal(table["source"], "student"))
        cut += pc.sum(pc.equal(table["finish_reason"], "length")).as_py() or 0
        samples += len(table)
        ids, offsets = flat(table["token_ids"])
        tokens += len(ids)
        repeated += float(repetition(ids, offsets, size).sum())
    mean = tokens / samples if samples else None
    drift = max(mean / tokens_before, tokens_before / mean) if mean and tokens_before else None
    return [
        *coverage_gates(aligned, limits, teachers),
        truncation_gate(cut, samples, limits),
        limit_figure("repetition", repeated / samples if samples else None, limits),
        limit_figure("tokens", mean, limits, "mean length of the student's samples"),
        limit_figure("length", drift, limits, f"{mean or 0:.1f} tokens now, {tokens_before or 0:.1f} in round 1"),
    ]


def coverage_gates(aligned: list[Artifact], limits: Gates, teachers: Sequence[str] = ()) -> Iterator[Gate]:
    """What the loss covers of the rows that went on, and how many were dropped; by teacher where there are several."""
    counts = ["supervised_bytes", "unmatched_bytes", "dropped_bytes", "tail_bytes"]
    sums = []
    for artifact in aligned:
        table = pl.from_arrow(read_table(artifact, ["status", *counts, *[TEACHER] * bool(teachers)]))
        assert isinstance(table, pl.DataFrame)
        kept = table.filter(pl.col("status") != LEFT_OUT).with_columns(pl.col(counts).cast(pl.Int64))
        sums.append(
            kept.group_by(pl.col(TEACHER) if teachers else pl.lit("").alias(TEACHER)).agg(
                pl.col(counts[0]).sum(),
                pl.sum_horizontal(counts).sum().alias("bytes"),
                (pl.col("status") != "ok").sum().alias("dropped"),
                pl.len().alias("rows"),
            )
        )
    found = {row[TEACHER]: row for row in pl.concat(sums).group_by(TEACHER).sum().to_dicts()} if sums else {}
    for teacher in teachers or [""]:
        row = found.get(teacher) or dict.fromkeys((counts[0], "bytes", "dropped", "rows"), 0)
        supervised, total, dropped, rows = (row[name] for name in (counts[0], "bytes", "dropped", "rows"))
        yield limit_figure(prefix_name(teacher, "supervised"), supervised / total if total else None, limits)
        detail = f"{dropped} of {rows} rollouts"
        yield limit_figure(prefix_name(teacher, "dropped"), dropped / rows if rows else None, limits, detail)


def truncation_gate(cut: int, samples: int, limits: Gates) -> Gate:
    """The share of the student's samples that were cut at `rollout.max_new_tokens`."""
    return limit_figure("truncated", cut / samples if samples else None, limits, f"{cut} of {samples} samples")


def repetition(ids: np.ndarray, offsets: np.ndarray, size: int) -> np.ndarray:
    """float64 `[rows]`: the share of a row's runs of four tokens that occurred in the row before; 0 for shorter rows.

    `ids` are flat, int32; `size` is the size of the vocabulary.
    """
    counts = np.maximum(np.diff(offsets) - RUN + 1, 0)
    begins = np.flatnonzero(np.repeat(np.diff(offsets), np.diff(offsets)) - index_in_row(offsets) >= RUN)
    key = np.zeros(len(begins), np.uint64)
    for step in range(RUN):
        key = key * np.uint64(size) + ids[begins + step].astype(np.uint64)  # wraps around for large vocabularies: a hash
    row = rows_of(offsets)[begins]
    order = np.lexsort((key, row))
    again = (np.diff(key[order]) == 0) & (np.diff(row[order]) == 0)
    share: np.ndarray = np.bincount(row[order][1:][again], minlength=len(counts)) / np.maximum(counts, 1)
    return share


def draw_samples(rollouts: list[Artifact]) -> pa.Table:
    """The first samples of each shard, as many of one as of another (each may have been sampled elsewhere); COMPARED in all.

    Fewer where they are long: beyond the first of each shard, no more than have ENOUGH tokens together.
    """
    some, each = [], -(-COMPARED // len(rollouts))
    for artifact in rollouts:
        table = read_table(artifact, ["prompt_token_ids", "token_ids", "logprobs"])
        some.append(table.filter(pc.is_valid(table["logprobs"])).slice(0, each))
    table, places = pa.concat_tables(some), np.concatenate([np.arange(len(part)) for part in some])
    order = np.argsort(places, kind="stable")  # the first of each shard, the second, …
    lengths = pc.add(*(pc.list_value_length(table[name]) for name in ("prompt_token_ids", "token_ids"))).to_numpy()
    return table.take(order[(places[order] == 0) | (np.cumsum(lengths[order]) <= ENOUGH)])


def engine_gates(student: ModelRef, rollouts: pa.Table, sampling: Sampling, limits: Gates) -> list[Gate]:
    """The gap between the log-probs of the engine that sampled and the trainer's, on up to COMPARED samples."""
    samples = rollouts.filter(pc.is_valid(rollouts["logprobs"])).slice(0, COMPARED)
    gap = Gap(None, None)
    if len(samples):
        with torch.inference_mode():
            trainers = trainer_logprobs(student, load_float32(student).eval(), samples, sampling)
        gap = Gap.between(trainers, flat(samples["logprobs"])[0])
    detail = f"log-probs of {len(samples)} samples against the trainer's"
    return [
        limit_figure("engine, mean", gap.mean, limits, detail),
        limit_figure("engine, largest", gap.largest, limits, detail),
    ]

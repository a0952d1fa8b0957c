"""The alignment stage: both token sequences onto common units, and the scores onto the objective's targets."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from prefect import task
from prefect.cache_policies import NO_CACHE

from configs.schema import Recipe, Score
from storage.artifacts import Artifact, read_table
from storage.schemas import ALIGNED
from storage.store import Run, part, round_slot
from tasks import objectives
from tasks.models import ModelRef, Side, side
from tasks.objectives.base import ObjectiveModule, Pairing
from tasks.objectives.divergences import FLOOR
from tasks.progress import logger
from tasks.ragged import Flat, first_of, flat, offsets_of, ragged, rows_of
from tasks.signals import Head, nothing, read_head, read_signal
from tasks.tokens.align import Units, align, unit_starts

CODE = 2


@task(name="aligned", task_run_name="aligned-{number}-{shard}", cache_policy=NO_CACHE)
def align_shard(
    recipe: Recipe,
    number: int,
    shard: int,
    student: ModelRef,
    teacher: ModelRef | None,
    vocab: dict[str, Artifact],
    rollouts: Artifact,
    scores: Artifact | None,
    head: Artifact | None = None,
) -> Artifact:
    """`round=…/aligned/part-…`: units, targets and byte accounts of one shard, in the rollouts' order."""
    run = Run(recipe.root, recipe.name)
    inputs = {
        "stage": "aligned",
        "code": CODE,
        "vocab": {role: artifact.digest for role, artifact in vocab.items()},
        "rollouts": rollouts.digest,
        "scores": scores.digest if scores else None,
        "recipe": recipe.objective.model_dump(),
        # Hidden states are cut to the likeliest events here; other scores are as they are.
        "hidden": [head.digest, recipe.score.k, recipe.score.top_p] if head else None,
    }

    def make() -> pa.Table:
        own, other = side(student), side(teacher or student)
        objective = objectives.build(recipe.objective, own.vocabulary, other.vocabulary)
        given = read_head(head, teacher) if head and teacher else None
        graded = read_table(scores) if scores else None
        return aligned_table(read_table(rollouts), graded, own, other, objective, recipe.score, given)

    return run.build_table(round_slot(number, "aligned", part(shard)), inputs, make, logger.info)


def aligned_table(
    rollouts: pa.Table,
    scores: pa.Table | None,
    own: Side,
    other: Side,
    objective: ObjectiveModule,
    config: Score | None = None,
    head: Head | None = None,
) -> pa.Table:
    """Align a shard of rollouts with its scores (None: the rows are their own teacher, without a signal).

    `config` says which signal the scores hold (default: the recipe's default); `head` is the teacher's, for hidden states.
    """
    total_bytes = _row_sums(own.vocabulary.lengths, rollouts["token_ids"])
    sampled = _sampled(rollouts, own)
    status = sampled.status
    if scores is None:
        other = own
    else:
        status = np.where(status == "ok", scores["status"].to_numpy(zero_copy_only=False), status)
    pairing = _pairing(sampled, scores, own, other, config or Score(), objective.reads_laws, head)
    units = pairing.units
    status = np.where((status == "ok") & (np.diff(units.offsets) == 0), "no_unit", status)
    projection = objective.project(pairing)
    # A row may hold no unit and still teach: not to begin with a control token.
    status = np.where(np.isin(status, ["empty", "no_unit"]) & (np.diff(projection.offsets) > 0), "ok", status)

    covered, ok = _last(units.byte_ends, units.offsets), status == "ok"
    graded = _unit_sums(units, units.teacher_ends, pairing.teacher_logprobs, pairing.teacher_offsets)
    columns = {
        "rollout_id": rollouts["rollout_id"],
        "student_ends": ragged(units.student_ends, units.offsets, pa.int32()),
        "teacher_ends": ragged(units.teacher_ends, units.offsets, pa.int32()),
        "byte_ends": ragged(units.byte_ends, units.offsets, pa.int32()),
        "kind": ragged(units.kind, units.offsets, pa.int8()),
        "student_logprobs": _nullable(pairing.behaviour, units),
        "teacher_logprobs": _nullable(graded, units),
        "status": pa.array(status),
        "supervised_bytes": np.where(ok, projection.supervised, 0),
        "unmatched_bytes": np.where(ok, covered - projection.supervised, 0),
        "dropped_bytes": np.where(ok, 0, total_bytes),
        "tail_bytes": np.where(ok, total_bytes - covered, 0),
        "canonical": _canonical(rollouts, own),
        **projection.columns(),
    }
    unused = {field.name: pa.nulls(pairing.rows, field.type) for field in ALIGNED if field.name not in columns}
    return pa.table(columns | unused).select(ALIGNED.names).cast(ALIGNED)


@dataclass(frozen=True)
class Sampled:
    """What of a shard's rollouts can be aligned: each row's ids up to its first control token."""

    status: np.ndarray  # [rows]
    ids: np.ndarray
    offsets: np.ndarray
    stopped: np.ndarray  # bool [rows]: the last of the ids is a stop
    logprobs: np.ndarray  # behaviour; NaN where the student did not sample
    escapes: np.ndarray  # [rows] behaviour of the control token that ended the ids; NaN where none did


def _sampled(rollouts: pa.Table, own: Side) -> Sampled:
    """What stands behind a control token that the student sampled is left out: the teacher never sees that token."""
    ids, offsets = flat(rollouts["token_ids"])
    row, rows = rows_of(offsets), len(offsets) - 1
    is_stop = np.isin(ids, own.stop_ids)
    last = np.zeros(len(ids), bool)
    last[offsets[1:][np.diff(offsets) > 0] - 1] = True
    control = (own.vocabulary.lengths[ids] == 0) & ~(is_stop & last)
    keep = np.cumsum(control) - np.concatenate([[0], np.cumsum(control)])[offsets[:-1]][row] == 0
    empty = np.where(rollouts["text"].is_null().to_numpy(), "no_reference", "lossy_text")
    logprobs = np.full(len(ids), np.nan)
    logprobs[~rollouts["logprobs"].is_null().to_numpy()[row]] = flat(rollouts["logprobs"])[0]
    escapes, escaped = np.full(rows, np.nan), np.flatnonzero(control)[::-1]
    escapes[row[escaped]] = logprobs[escaped]  # backwards: a row's first control token is written last
    return Sampled(
        np.where(np.diff(offsets) > 0, "ok", empty).astype(object),
        ids[keep],
        offsets_of(np.bincount(row[keep], minlength=rows)),
        np.bincount(row, is_stop & last & keep, rows) > 0,
        logprobs[keep],
        escapes,
    )


def _pairing(
    sampled: Sampled, scores: pa.Table | None, own: Side, other: Side, config: Score, laws: bool, head: Head | None
) -> Pairing:
    """Both sides of the rows, cut to what both spell: to the end of each row's last unit."""
    ids, offsets = sampled.ids, sampled.offsets
    z, z_offsets = (ids, offsets) if scores is None else flat(scores["token_ids"])
    rows, lengths, z_lengths = len(offsets) - 1, own.vocabulary.lengths[ids], other.vocabulary.lengths[z]
    reach, z_reach = np.bincount(rows_of(offsets), lengths, rows), np.bincount(rows_of(z_offsets), z_lengths, rows)
    z_stopped = np.bincount(rows_of(z_offsets), np.isin(z, other.stop_ids), rows) > 0
    stops = sampled.stopped & z_stopped & (reach == z_reach)  # a text that is cut on one side has no stop
    units = align(*_lengths_without(lengths, offsets), *_lengths_without(z_lengths, z_offsets), stops)
    counts, z_counts = _last(units.student_ends, units.offsets), _last(units.teacher_ends, units.offsets)
    keep, kept = first_of(z_offsets, z_counts), offsets_of(z_counts)
    signal = nothing(kept[-1])
    escapes = _escapes(sampled, counts, scores, z, z_offsets, z_counts, other)
    if scores is not None:
        signal = read_signal(scores, kept, keep, config, laws, other.vocabulary, head)
    return Pairing(
        student_ids=ids[first_of(offsets, counts)],
        student_offsets=offsets_of(counts),
        teacher_ids=z[keep],
        teacher_offsets=kept,
        stops=stops,
        units=units,
        behaviour=_unit_sums(units, units.student_ends, sampled.logprobs, offsets),
        escapes=escapes,
        **signal,
    )


def _escapes(
    sampled: Sampled,
    counts: np.ndarray,
    scores: pa.Table | None,
    z: np.ndarray,
    z_offsets: np.ndarray,
    z_counts: np.ndarray,
    other: Side,
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs of the control token that ended each row behind its last unit, under its policy and under the teacher.

    The policy's is NaN where there is none. A teacher that knows the same ids has scored it; to another it is impossible.
    """
    behaviour = np.where(counts == np.diff(sampled.offsets), sampled.escapes, np.nan)
    grades = np.full(len(behaviour), FLOOR)
    if scores is not None:
        behaviour[~np.isin(scores["status"].to_numpy(zero_copy_only=False), ["ok", "empty"])] = np.nan
        row = np.flatnonzero(z_counts < np.diff(z_offsets))
        at = z_offsets[row] + z_counts[row]
        known = (other.vocabulary.lengths[z[at]] == 0) & ~np.isin(z[at], other.stop_ids)
        grades[row[known]] = flat(scores["logprobs"])[0][at[known]]
    return behaviour, np.maximum(grades, FLOOR)


def _last(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Each row's last value, int64; 0 for an empty row."""
    last, some = np.zeros(len(offsets) - 1, np.int64), np.diff(offsets) > 0
    last[some] = values[offsets[1:][some] - 1]
    return last


def _row_sums(lengths: np.ndarray, column: pa.ChunkedArray) -> np.ndarray:
    ids, offsets = flat(column)
    return np.bincount(rows_of(offsets), lengths[ids], len(offsets) - 1).astype(np.int64)


def _lengths_without(lengths: np.ndarray, offsets: np.ndarray) -> Flat:
    """Byte lengths up to each row's first token without bytes: its stop, or a control token."""
    row = rows_of(offsets)
    empty = np.cumsum(lengths == 0)
    before = np.concatenate([[0], empty])[offsets[:-1]][row]
    keep = empty - before == 0
    return lengths[keep], offsets_of(np.bincount(row[keep], minlength=len(offsets) - 1))


def _unit_sums(units: Units, ends: np.ndarray, logprobs: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Σ over each unit's tokens of their log-probs; NaN in rows that have none."""
    row = rows_of(units.offsets)
    total = np.concatenate([[0.0], np.cumsum(np.nan_to_num(logprobs.astype(np.float64)))])
    sums = total[offsets[row] + ends] - total[offsets[row] + unit_starts(ends, units.offsets)]
    missing = np.bincount(rows_of(offsets), np.isnan(logprobs), len(offsets) - 1) > 0
    return np.where(missing[row], np.nan, sums)


def _nullable(sums: np.ndarray, units: Units) -> pa.Array:
    """A list column of units' sums; null rows where they are NaN."""
    array = ragged(sums, units.offsets, pa.float32())
    given = np.bincount(rows_of(units.offsets), np.isnan(sums), len(array)) == 0
    return pc.if_else(pa.array(given), array, pa.nulls(len(array), array.type))


def _canonical(rollouts: pa.Table, own: Side) -> pa.Array:
    """Whether the ids are those that encoding the text gives (retokenisation drift is the share that are not)."""
    stops = set(own.stop_ids)
    bodies = [ids[:-1] if ids and ids[-1] in stops else ids for ids in rollouts["token_ids"].to_pylist()]
    encoded = own.encoder.encode(rollouts["text"].fill_null("").to_pylist())
    return pa.array([ids == body for ids, body in zip(encoded, bodies, strict=True)], pa.bool_())

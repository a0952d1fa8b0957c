"""The alignment stage: both token sequences onto common units, and the scores onto the objective's targets."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from prefect import task
from prefect.cache_policies import NO_CACHE

from configs.schema import Recipe
from storage.schemas import ALIGNED
from storage.store import Artifact, Run, part, read_table, round_slot
from tasks import objectives
from tasks.models import ModelRef, Side, side
from tasks.objectives.base import ObjectiveModule, Pairing
from tasks.progress import logger
from tasks.ragged import Flat, expand, first_of, flat, keep_rows, offsets_of, ragged, rows_of
from tasks.tokens.align import Units, align, unit_starts

CODE = 1


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
    }

    def make() -> pa.Table:
        own, other = side(student), side(teacher or student)
        objective = objectives.build(recipe.objective, own.vocabulary, other.vocabulary)
        return aligned_table(read_table(rollouts), read_table(scores) if scores else None, own, other, objective)

    return run.build_table(round_slot(number, "aligned", part(shard)), inputs, make, logger.info)


def aligned_table(rollouts: pa.Table, scores: pa.Table | None, own: Side, other: Side, objective: ObjectiveModule) -> pa.Table:
    """Align a shard of rollouts with its scores (None: the rows are their own teacher, without a signal)."""
    total_bytes = _row_sums(own.vocabulary.lengths, rollouts["token_ids"])
    status, student, stopped, behaviour = _student_tokens(rollouts, own)
    if scores is None:
        pairing = _pairing(own, own, student, student, stopped, None)
    else:
        status = np.where(status == "ok", scores["status"].to_numpy(zero_copy_only=False), status)
        pairing = _pairing(own, other, keep_rows(student, status == "ok"), flat(scores["token_ids"]), stopped, scores)
    units = pairing.units
    status = np.where((status == "ok") & (np.diff(units.offsets) == 0), "no_unit", status)
    projection = objective.project(pairing)

    covered = np.zeros(pairing.rows, np.int64)
    some = np.diff(units.offsets) > 0
    covered[some] = units.byte_ends[units.offsets[1:][some] - 1]
    ok = status == "ok"
    columns = {
        "rollout_id": rollouts["rollout_id"],
        "student_ends": ragged(units.student_ends, units.offsets, pa.int32()),
        "teacher_ends": ragged(units.teacher_ends, units.offsets, pa.int32()),
        "byte_ends": ragged(units.byte_ends, units.offsets, pa.int32()),
        "kind": ragged(units.kind, units.offsets, pa.int8()),
        "student_logprobs": _per_unit(units, units.student_ends, behaviour, student[1]),
        "teacher_logprobs": _per_unit(units, units.teacher_ends, pairing.teacher_logprobs, pairing.teacher_offsets),
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


def _row_sums(lengths: np.ndarray, column: pa.ChunkedArray) -> np.ndarray:
    ids, offsets = flat(column)
    return np.bincount(rows_of(offsets), lengths[ids], len(offsets) - 1).astype(np.int64)


def _student_tokens(rollouts: pa.Table, own: Side) -> tuple[np.ndarray, Flat, np.ndarray, np.ndarray | None]:
    """Status a row; the ids up to the first control token; which rows stop; behaviour log-probs of those ids.

    What stands behind a control token that the student sampled cannot be aligned: the teacher never sees that token.
    """
    ids, offsets = flat(rollouts["token_ids"])
    row, rows = rows_of(offsets), len(offsets) - 1
    is_stop = np.isin(ids, own.stop_ids)
    last = np.zeros(len(ids), bool)
    last[offsets[1:][np.diff(offsets) > 0] - 1] = True
    control = (own.vocabulary.lengths[ids] == 0) & ~(is_stop & last)
    bad = np.cumsum(control) - np.concatenate([[0], np.cumsum(control)])[offsets[:-1]][row]
    keep = bad == 0
    stopped = np.bincount(row, is_stop & last & keep, rows) > 0
    empty = np.where(rollouts["text"].is_null().to_numpy(), "no_reference", "lossy_text")
    status = np.where(np.diff(offsets) > 0, "ok", empty).astype(object)
    behaviour = None
    if rollouts["logprobs"].null_count < rows:
        given = np.full(len(ids), np.nan, np.float32)
        present = ~rollouts["logprobs"].is_null().to_numpy()
        given[present[row]] = flat(rollouts["logprobs"])[0]
        behaviour = given[keep]
    return status, (ids[keep], offsets_of(np.bincount(row[keep], minlength=rows))), stopped, behaviour


def _pairing(own: Side, other: Side, student: Flat, teacher: Flat, stopped: np.ndarray, scores: pa.Table | None) -> Pairing:
    ids, offsets = student
    whole = np.bincount(rows_of(offsets), own.vocabulary.lengths[ids], len(stopped))
    z, z_offsets = teacher
    reached = np.bincount(rows_of(z_offsets), other.vocabulary.lengths[z], len(stopped))
    has_stop = np.zeros(len(stopped), bool)
    filled = np.diff(z_offsets) > 0
    has_stop[filled] = np.isin(z[z_offsets[1:][filled] - 1], other.stop_ids)
    stops = stopped & has_stop & (whole == reached) & (np.diff(offsets) > 0)  # a cut text has no stop
    # Without its stop, a row is what both sides spell; the teacher's side ends where its bytes end too.
    s_body = _lengths_without(own.vocabulary.lengths[ids], offsets)
    t_body = _lengths_without(other.vocabulary.lengths[z], z_offsets)
    units = align(*s_body, *t_body, stops)
    s_counts, t_counts = np.zeros(len(stops), np.int64), np.zeros(len(stops), np.int64)
    some = np.diff(units.offsets) > 0
    s_counts[some] = units.student_ends[units.offsets[1:][some] - 1]
    t_counts[some] = units.teacher_ends[units.offsets[1:][some] - 1]
    s_keep, t_keep = first_of(offsets, s_counts), first_of(z_offsets, t_counts)
    s_offsets, t_offsets = offsets_of(s_counts), offsets_of(t_counts)
    if scores is None:
        none = np.zeros(0)
        empty = np.zeros(t_offsets[-1] + 1, np.int64)
        zeros = np.full(t_offsets[-1], np.nan)
        return Pairing(ids[s_keep], s_offsets, z[t_keep], t_offsets, stops, zeros, none, none, empty, none, units)

    top_counts = flat(scores["top_counts"])[0].astype(np.int64)
    top_offsets = offsets_of(top_counts)
    tokens = np.flatnonzero(t_keep)
    entries, owner = expand(top_offsets[tokens], top_offsets[tokens + 1])
    top = flat(scores["top_logprobs"])[0].astype(np.float64)[entries]
    rest = flat(scores["rest"])[0].astype(np.float64)[tokens]
    # Half-precision log-probs do not quite sum to 1: what is missing is spread in proportion.
    total = np.log(np.bincount(owner, np.exp(top), len(tokens)) + np.exp(rest))
    return Pairing(
        ids[s_keep],
        s_offsets,
        z[t_keep],
        t_offsets,
        stops,
        flat(scores["logprobs"])[0].astype(np.float64)[t_keep],
        flat(scores["top_ids"])[0][entries],
        top - total[owner],
        offsets_of(top_counts[tokens]),
        rest - total,
        units,
    )


def _lengths_without(lengths: np.ndarray, offsets: np.ndarray) -> Flat:
    """Byte lengths up to each row's first token without bytes: its stop, or a control token."""
    row = rows_of(offsets)
    empty = np.cumsum(lengths == 0)
    before = np.concatenate([[0], empty])[offsets[:-1]][row]
    keep = empty - before == 0
    return lengths[keep], offsets_of(np.bincount(row[keep], minlength=len(offsets) - 1))


def _per_unit(units: Units, ends: np.ndarray, logprobs: np.ndarray | None, offsets: np.ndarray) -> pa.Array:
    """Σ over each unit's tokens of their log-probs; null rows where there are none."""
    rows = len(offsets) - 1
    if logprobs is None or np.isnan(logprobs).all():
        return pa.nulls(rows, pa.list_(pa.float32()))
    row = rows_of(units.offsets)
    total = np.concatenate([[0.0], np.cumsum(np.nan_to_num(logprobs.astype(np.float64)))])
    sums = total[offsets[row] + ends] - total[offsets[row] + unit_starts(ends, units.offsets)]
    missing = np.bincount(rows_of(offsets), np.isnan(logprobs), rows) > 0
    array = ragged(sums, units.offsets, pa.float32())
    return pc.if_else(pa.array(~missing), array, pa.nulls(rows, array.type))


def _canonical(rollouts: pa.Table, own: Side) -> pa.Array:
    """Whether the ids are those that encoding the text gives (retokenisation drift is the share that are not)."""
    stops = set(own.stop_ids)
    bodies = [ids[:-1] if ids and ids[-1] in stops else ids for ids in rollouts["token_ids"].to_pylist()]
    encoded = own.encoder.encode(rollouts["text"].fill_null("").to_pylist())
    return pa.array([ids == body for ids, body in zip(encoded, bodies, strict=True)], pa.bool_())

"""The alignment stage: it cuts both token sequences into common units and turns scores into the objective's targets."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from prefect import task
from prefect.cache_policies import NO_CACHE

from storage.artifacts import read_table
from storage.schemas import ALIGNED, TEACHER, without_teacher
from tasks import objectives
from tasks.models.pair import make_markers, marker_inputs
from tasks.models.text import Side, side
from tasks.objectives.base import ObjectiveModule
from tasks.objectives.pairing import last_of, pair_rows, show_skipped, sum_units
from tasks.objectives.sampled import read_rollouts
from tasks.rows.round import Pair, Round, Shard, own_rows
from tasks.running.progress import logger
from tasks.signals import make_signal
from tasks.signals.base import Signal
from tasks.signals.head import Head, read_head
from tasks.tokens.align import Units
from tasks.tokens.markers import NO_MARKERS, ONE_TOKENIZER, Markers, translate
from tasks.tokens.ragged import flat, ragged, rows_of

CODE = 4


@task(name="aligned", task_run_name="round {round.number} · align · shard {shard.number}", cache_policy=NO_CACHE)
def align_shard(round: Round, shard: Shard) -> Shard:
    """Make `round=…/aligned/part-…`: units, targets and byte accounts of one shard, in the rollouts' order."""
    recipe, rollouts = round.recipe, shard.rollouts
    assert rollouts is not None
    of_pairs = [_inputs_of(pair) for pair in round.pairs]
    scores = [scored.digest for scored in shard.scores]
    inputs = {
        "stage": "aligned",
        "code": CODE,
        "rollouts": rollouts.digest,
        "recipe": recipe.objective.model_dump(),
        **marker_inputs(recipe),
        **({"pairs": of_pairs, "scores": scores} if recipe.teachers else {**of_pairs[0], "scores": next(iter(scores), None)}),
    }

    def make() -> pa.Table:
        table = read_table(rollouts)
        if not recipe.teachers:
            return align_pair(round, table, read_table(shard.scores[0]) if shard.scores else None)
        return align_pairs(round, table, [read_table(scored) for scored in shard.scores])

    return replace(shard, aligned=round.run.build_table(round.slot("aligned", shard), inputs, make, logger.info))


def _inputs_of(pair: Pair) -> dict[str, Any]:
    score = pair.recipe.score
    return {
        "vocab": {"student": pair.vocabularies.student.digest, "teacher": pair.vocabularies.teacher.digest},
        # Hidden states are cut to the likeliest events here; other signals were cut when they were stored.
        "hidden": [pair.head.digest, score.k, score.top_p] if pair.head else None,
    }


def align_pairs(round: Round, rollouts: pa.Table, scores: Sequence[pa.Table]) -> pa.Table:
    """Align each teacher's rows with its `scores`, if there are any, in the order of the rollouts."""
    parts = []
    for n, one in enumerate(round.by_teacher()):
        own = own_rows(one, rollouts)
        aligned = align_pair(one, own, scores[n] if scores else None)
        names = pa.array([one.pair.name] * len(own), pa.string())
        parts.append(aligned.add_column(1, TEACHER, names))
    table = pa.concat_tables(parts)
    return table.take(pc.index_in(rollouts["rollout_id"], table["rollout_id"].combine_chunks()))


def align_pair(round: Round, rollouts: pa.Table, scores: pa.Table | None) -> pa.Table:
    """Align rollouts with the scores of the only pair's teacher."""
    pair, student = round.pair, side(round.student)
    teacher, score = side(pair.teacher or round.student), pair.recipe.score
    objective = objectives.build(round.recipe.objective, student=student.vocabulary, teacher=teacher.vocabulary)
    signal = make_signal(score.signal, score.k, score.top_p)
    head = read_head(pair.head, pair.teacher) if pair.head and pair.teacher else None
    markers = make_markers(pair.recipe, student=student, teacher=teacher)
    return align_rollouts(rollouts, scores, objective, signal, head, markers, student=student, teacher=teacher)


def align_rollouts(
    rollouts: pa.Table,
    scores: pa.Table | None,
    objective: ObjectiveModule,
    signal: Signal | None = None,
    head: Head | None = None,
    markers: Markers = NO_MARKERS,
    *,
    student: Side,
    teacher: Side,
) -> pa.Table:
    """Align rollouts with one teacher's scores: a table with the columns of `storage.schemas.ALIGNED`, in the same order.

    Without `scores` the student's side stands for both, and there is no signal. `signal` is the signal of the scores
    (default: `topk`). `head` is the teacher's head, for a signal that needs it. `markers` are those that the teacher's texts
    were made with.
    """
    total_bytes = _sum_rows(student.vocabulary.lengths, rollouts["token_ids"])
    if scores is None:
        teacher = student
    if student.vocabulary.same_as(teacher.vocabulary):
        markers = ONE_TOKENIZER
    sampled = read_rollouts(rollouts, student, markers)
    status = sampled.status
    if scores is not None:
        status = np.where(status == "ok", scores["status"].to_numpy(zero_copy_only=False), status)
    wants_laws = "laws" in objective.config.reads
    pairing = pair_rows(sampled, scores, signal or make_signal("topk"), wants_laws, head, student=student, teacher=teacher)
    units = pairing.units
    status = np.where((status == "ok") & (np.diff(units.offsets) == 0), "no_unit", status)
    projection = objective.project(pairing)
    # A row without a unit may still have a term: `opd`'s for a control token at the very start.
    status = np.where(np.isin(status, ["empty", "no_unit"]) & (np.diff(projection.offsets) > 0), "ok", status)

    covered, ok = last_of(units.byte_ends, units.offsets), status == "ok"
    student_sums = sum_units(units, units.student_starts, units.student_ends, sampled.model_logprobs, sampled.offsets)
    teacher_sums = sum_units(units, units.teacher_starts, units.teacher_ends, pairing.teacher_logprobs, pairing.teacher_offsets)
    shown, (student_sums, teacher_sums) = show_skipped(units, sampled, student_sums, teacher_sums)
    unpaired = sampled.escaped + np.bincount(rows_of(sampled.offsets), sampled.skipped, len(ok))
    columns = {
        "rollout_id": rollouts["rollout_id"],
        "student_ends": ragged(shown.student_ends, shown.offsets, pa.int32()),
        "teacher_ends": ragged(shown.teacher_ends, shown.offsets, pa.int32()),
        "byte_ends": ragged(shown.byte_ends, shown.offsets, pa.int32()),
        "kind": ragged(shown.kind, shown.offsets, pa.int8()),
        "student_logprobs": _list_sums(student_sums, shown),
        "teacher_logprobs": _list_sums(teacher_sums, shown),
        "status": pa.array(status),
        "supervised_bytes": np.where(ok, projection.supervised, 0),
        "unmatched_bytes": np.where(ok, covered - projection.supervised, 0),
        "dropped_bytes": np.where(ok, 0, total_bytes),
        "tail_bytes": np.where(ok, total_bytes - covered, 0),
        "unpaired": unpaired.astype(np.int32),
        "canonical": _check_canonical(rollouts, student),
        **projection.columns(),
    }
    schema = without_teacher(ALIGNED)
    unused = {field.name: pa.nulls(pairing.rows, field.type) for field in schema if field.name not in columns}
    return pa.table(columns | unused).select(schema.names).cast(schema)


def _sum_rows(lengths: np.ndarray, column: pa.ChunkedArray) -> np.ndarray:
    ids, offsets = flat(column)
    return np.bincount(rows_of(offsets), lengths[ids], len(offsets) - 1).astype(np.int64)


def _list_sums(sums: np.ndarray, units: Units) -> pa.Array:
    """A list column of units' sums, float32; a row with NaN is null."""
    array = ragged(sums, units.offsets, pa.float32())
    valid = np.bincount(rows_of(units.offsets), np.isnan(sums), len(array)) == 0
    return pc.if_else(pa.array(valid), array, pa.nulls(len(array), array.type))


def _check_canonical(rollouts: pa.Table, student: Side) -> pa.Array:
    """bool `[rows]`: whether a row's ids are the encoding of its text, of each text between control tokens by itself.

    The share that are not is the retokenisation drift.
    """
    texts, stops = rollouts["text"].fill_null("").to_pylist(), set(student.stop_ids)
    bodies = [ids[:-1] if ids and ids[-1] in stops else ids for ids in rollouts["token_ids"].to_pylist()]
    answers = ONE_TOKENIZER.find(texts, flat(rollouts["token_ids"]), student.vocabulary.beta, student.stop_ids)
    encoded = student.encoder.encode([text for row, text in enumerate(texts) if row not in answers])
    for row, ids in zip(answers, translate(list(answers.values()), student.encoder), strict=True):
        encoded.insert(row, ids)
    return pa.array([ids == body for ids, body in zip(encoded, bodies, strict=True)], pa.bool_())

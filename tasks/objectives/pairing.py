"""From a shard's rollouts and scores to what objectives read: both sides' tokens, flat, on common units, with the signal."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks.models.text import Side
from tasks.objectives.base import Pairing
from tasks.objectives.divergences import FLOOR
from tasks.signals.base import Events, Reading, Signal
from tasks.signals.head import Head
from tasks.tokens.align import Units, align, unit_starts
from tasks.tokens.byte_laws import REST
from tasks.tokens.ragged import Flat, add_up, first_of, flat, offsets_of, rows_of


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What of a shard's rollouts can be aligned: each row's ids up to its first control token."""

    status: np.ndarray  # [rows]
    ids: np.ndarray  # flat
    offsets: np.ndarray  # [rows + 1]
    stopped: np.ndarray  # bool [rows]: the last of the ids is a stop
    logprobs: np.ndarray  # behaviour, flat; NaN where the student did not sample
    model_logprobs: np.ndarray  # the same under the student itself, at temperature 1 and over all tokens
    escapes: np.ndarray  # [rows] behaviour of the control token that ended the ids; NaN where none did


def read_rollouts(rollouts: pa.Table, student: Side) -> Sampled:
    """What stands behind a control token that the student sampled is left out: the teacher never sees that token."""
    ids, offsets = flat(rollouts["token_ids"])
    row, rows = rows_of(offsets), len(offsets) - 1
    is_stop = np.isin(ids, student.stop_ids)
    last = np.zeros(len(ids), bool)
    last[offsets[1:][np.diff(offsets) > 0] - 1] = True
    control = (student.vocabulary.lengths[ids] == 0) & ~(is_stop & last)
    keep = np.cumsum(control) - np.concatenate([[0], np.cumsum(control)])[offsets[:-1]][row] == 0
    empty = np.where(rollouts["text"].is_null().to_numpy(), "no_reference", "lossy_text")
    logprobs, model_logprobs = (_spread(column, row) for column in (rollouts["logprobs"], model_logprobs_of(rollouts)))
    escapes, escaped = np.full(rows, np.nan), np.flatnonzero(control)[::-1]
    escapes[row[escaped]] = logprobs[escaped]  # backwards: a row's first control token is written last
    return Sampled(
        status=np.where(np.diff(offsets) > 0, "ok", empty).astype(object),
        ids=ids[keep],
        offsets=offsets_of(np.bincount(row[keep], minlength=rows)),
        stopped=np.bincount(row, is_stop & last & keep, rows) > 0,
        logprobs=logprobs[keep],
        model_logprobs=model_logprobs[keep],
        escapes=escapes,
    )


def model_logprobs_of(rollouts: pa.Table) -> pa.ChunkedArray:
    """The student's own log-probs, at temperature 1 and over all tokens: those that were drawn by, where they are these."""
    drawn = rollouts["logprobs"]
    return pc.coalesce(rollouts["model_logprobs"], drawn) if "model_logprobs" in rollouts.column_names else drawn


def _spread(column: pa.ChunkedArray, row: np.ndarray) -> np.ndarray:
    """A column of log-probs, flat over all tokens, whose rows are `row`; NaN in rows without any."""
    logprobs = np.full(len(row), np.nan)
    logprobs[~column.is_null().to_numpy()[row]] = flat(column)[0]
    return logprobs


def pair_rows(
    sampled: Sampled,
    scores: pa.Table | None,
    signal: Signal,
    wants_laws: bool,
    head: Head | None = None,
    *,
    student: Side,
    teacher: Side,
) -> Pairing:
    """Both sides of the rows, cut to what both spell: to the end of each row's last unit.

    Without `scores` the rows are their own teacher, without a signal.
    """
    s_ids, s_offsets = sampled.ids, sampled.offsets
    t_ids, t_offsets = (s_ids, s_offsets) if scores is None else flat(scores["token_ids"])
    rows, s_lengths, t_lengths = len(s_offsets) - 1, student.vocabulary.lengths[s_ids], teacher.vocabulary.lengths[t_ids]
    s_bytes, t_bytes = np.bincount(rows_of(s_offsets), s_lengths, rows), np.bincount(rows_of(t_offsets), t_lengths, rows)
    t_stopped = np.bincount(rows_of(t_offsets), np.isin(t_ids, teacher.stop_ids), rows) > 0
    stops = sampled.stopped & t_stopped & (s_bytes == t_bytes)  # a text that is cut on one side has no stop
    units = align(*_text_lengths(s_lengths, s_offsets), *_text_lengths(t_lengths, t_offsets), stops)
    s_counts, t_counts = last_of(units.student_ends, units.offsets), last_of(units.teacher_ends, units.offsets)
    t_keep, t_kept = first_of(t_offsets, t_counts), offsets_of(t_counts)
    reading = Reading(tokens=np.flatnonzero(t_keep), offsets=t_kept, laws=wants_laws, vocabulary=teacher.vocabulary, head=head)
    return Pairing(
        student_ids=s_ids[first_of(s_offsets, s_counts)],
        student_offsets=offsets_of(s_counts),
        teacher_ids=t_ids[t_keep],
        teacher_offsets=t_kept,
        stops=stops,
        units=units,
        behaviour=sum_units(units, units.student_ends, sampled.logprobs, s_offsets),
        escapes=_read_escapes(sampled, s_counts, scores, t_ids, t_offsets, t_counts, teacher),
        **read_signal(signal, scores, reading),
    )


def read_signal(signal: Signal, scores: pa.Table | None, reading: Reading) -> dict[str, Any]:
    """The signal fields of a Pairing at the teacher tokens of `reading`; without scores nothing is known of them."""
    tokens = len(reading.tokens)
    fields: dict[str, Any] = {
        "teacher_logprobs": np.full(tokens, np.nan),
        "top_ids": np.zeros(0, np.int64),
        "top_logprobs": np.zeros(0),
        "top_offsets": np.zeros(tokens + 1, np.int64),
        "rest": np.zeros(tokens),
    }
    if scores is None:
        return fields
    fields["teacher_logprobs"] = flat(scores["logprobs"])[0].astype(np.float64)[reading.tokens]
    if (events := signal.read(scores, reading)) is None:
        return fields
    owner, logprobs, rest = _renormalise(events)
    if not events.laws:
        return fields | {
            "top_ids": events.ids, "top_logprobs": logprobs, "top_offsets": offsets_of(events.counts), "rest": rest
        }  # fmt: skip
    everything = np.concatenate([owner, np.arange(tokens)])
    classes = np.concatenate([events.ids, np.full(tokens, REST)])
    return fields | {"laws": add_up(everything, classes, np.exp(np.concatenate([logprobs, rest])), tokens)}


def _renormalise(events: Events) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The events' owners, and log masses of events and rests that sum to 1: half precision makes them miss it a little."""
    tokens = len(events.counts)
    owner = np.repeat(np.arange(tokens), events.counts)
    total = np.log(np.bincount(owner, np.exp(events.logprobs), tokens) + np.exp(events.rest))
    return owner, events.logprobs - total[owner], events.rest - total


def _read_escapes(
    sampled: Sampled,
    s_counts: np.ndarray,
    scores: pa.Table | None,
    t_ids: np.ndarray,
    t_offsets: np.ndarray,
    t_counts: np.ndarray,
    teacher: Side,
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs of the control token that ended each row behind its last unit, under its policy and under the teacher.

    The policy's is NaN where there is none. A teacher that knows the same ids has scored it; to another it is impossible.
    """
    behaviour = np.where(s_counts == np.diff(sampled.offsets), sampled.escapes, np.nan)
    scored = np.full(len(behaviour), FLOOR)
    if scores is not None:
        behaviour[~np.isin(scores["status"].to_numpy(zero_copy_only=False), ["ok", "empty"])] = np.nan
        row = np.flatnonzero(t_counts < np.diff(t_offsets))
        at = t_offsets[row] + t_counts[row]
        known = (teacher.vocabulary.lengths[t_ids[at]] == 0) & ~np.isin(t_ids[at], teacher.stop_ids)
        scored[row[known]] = flat(scores["logprobs"])[0][at[known]]
    return behaviour, np.maximum(scored, FLOOR)


def _text_lengths(lengths: np.ndarray, offsets: np.ndarray) -> Flat:
    """Byte lengths up to each row's first token without bytes: its stop, or a control token."""
    row = rows_of(offsets)
    empty = np.cumsum(lengths == 0)
    before = np.concatenate([[0], empty])[offsets[:-1]][row]
    keep = empty - before == 0
    return lengths[keep], offsets_of(np.bincount(row[keep], minlength=len(offsets) - 1))


def last_of(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Each row's last value, int64 `[rows]`; 0 for an empty row."""
    last, some = np.zeros(len(offsets) - 1, np.int64), np.diff(offsets) > 0
    last[some] = values[offsets[1:][some] - 1]
    return last


def sum_units(units: Units, ends: np.ndarray, logprobs: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Σ over each unit's tokens of their log-probs, `[units]`; NaN in rows that have none."""
    row = rows_of(units.offsets)
    total = np.concatenate([[0.0], np.cumsum(np.nan_to_num(logprobs.astype(np.float64)))])
    sums = total[offsets[row] + ends] - total[offsets[row] + unit_starts(ends, units.offsets)]
    missing = np.bincount(rows_of(offsets), np.isnan(logprobs), len(offsets) - 1) > 0
    return np.where(missing[row], np.nan, sums)

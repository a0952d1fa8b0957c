"""Pair a shard's rollouts and scores: both sides' tokens, flat, their common units, and the teacher's signal."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from tasks.models.text import Side
from tasks.objectives.base import Pairing
from tasks.objectives.sampled import Sampled
from tasks.signals.base import Events, Reading, Signal
from tasks.signals.head import Head
from tasks.tokens.align import Kind, Units, align, byte_ends
from tasks.tokens.byte_laws import REST
from tasks.tokens.ragged import add_up, first_of, flat, index_in_row, offsets_of, rows_of


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
    """Both sides of the rows, cut to the end of each row's last unit.

    Without `scores` the student's side stands for both, and there is no signal.
    """
    s_ids, s_offsets = sampled.ids, sampled.offsets
    t_ids, t_offsets = (s_ids, s_offsets) if scores is None else flat(scores["token_ids"])
    units = _align_rows(sampled, t_ids, t_offsets, student=student, teacher=teacher)
    s_counts, t_counts = last_of(units.student_ends, units.offsets), last_of(units.teacher_ends, units.offsets)
    t_keep, t_kept = first_of(t_offsets, t_counts), offsets_of(t_counts)
    reading = Reading(tokens=np.flatnonzero(t_keep), offsets=t_kept, laws=wants_laws, vocabulary=teacher.vocabulary, head=head)
    escapes = np.where(s_counts == np.diff(s_offsets), sampled.escapes, np.nan)
    if scores is not None:
        escapes[~np.isin(scores["status"].to_numpy(zero_copy_only=False), ["ok", "empty"])] = np.nan
    return Pairing(
        student_ids=s_ids[first_of(s_offsets, s_counts)],
        student_offsets=offsets_of(s_counts),
        teacher_ids=t_ids[t_keep],
        teacher_offsets=t_kept,
        stops=np.bincount(units.rows, units.kind == Kind.STOP, len(s_counts)) > 0,
        units=units,
        behaviour=sum_units(units, units.student_starts, units.student_ends, sampled.logprobs, s_offsets),
        escapes=escapes,
        **read_signal(signal, scores, reading),
    )


def _align_rows(sampled: Sampled, t_ids: np.ndarray, t_offsets: np.ndarray, *, student: Side, teacher: Side) -> Units:
    """The common units of rows, whose ends on both sides are in one measure. Skipped tokens are in none."""
    s_ids, s_offsets, rows = sampled.ids, sampled.offsets, len(sampled.stopped)
    s_row, t_row = rows_of(s_offsets), rows_of(t_offsets)
    t_ends = byte_ends(np.maximum(teacher.vocabulary.lengths[t_ids], 1), t_offsets)
    for number, answer in sampled.answers.items():
        here = slice(t_offsets[number], t_offsets[number + 1])
        t_ends[here] = answer.places(t_ends[here], other=True)
    t_last = np.zeros(len(t_ids), bool)
    t_last[t_offsets[1:][np.diff(t_offsets) > 0] - 1] = True
    t_stop = t_last & np.isin(t_ids, teacher.stop_ids)
    s_stop = np.zeros(len(s_ids), bool)
    s_stop[s_offsets[1:][sampled.stopped] - 1] = True
    s_text, t_text = ~s_stop & ~sampled.skipped, ~t_stop
    reached = [np.zeros(rows, np.int64) for _ in range(2)]
    for furthest, row, text, ends in zip(reached, (s_row, t_row), (s_text, t_text), (sampled.ends, t_ends), strict=True):
        np.maximum.at(furthest, row[text], ends[text])
    # A text that is cut on one side has no stop.
    stops = sampled.stopped & (np.bincount(t_row, t_stop, rows) > 0) & (reached[0] == reached[1])

    def widths(ends: np.ndarray, row: np.ndarray, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        offsets = offsets_of(np.bincount(row[text], minlength=rows))
        steps = np.diff(ends[text], prepend=0)
        steps[offsets[:-1][np.diff(offsets) > 0]] = ends[text][offsets[:-1][np.diff(offsets) > 0]]
        return steps, offsets

    units = align(*widths(sampled.ends, s_row, s_text), *widths(t_ends, t_row, t_text), stops)
    if sampled.skipped.any():
        units = _count_skipped(units, sampled)
    total = np.concatenate([[0], np.cumsum(student.vocabulary.lengths[s_ids], dtype=np.int64)])
    reads = total[s_offsets[units.rows] + units.student_ends] - total[s_offsets[units.rows]]
    marked = _any_in(sampled.markers, s_offsets[units.rows] + units.student_starts, s_offsets[units.rows] + units.student_ends)
    return replace(
        units, byte_ends=reads.astype(np.int32), kind=np.where(marked, Kind.MARKER, units.kind).astype(units.kind.dtype)
    )


def _count_skipped(units: Units, sampled: Sampled) -> Units:
    """Units of the tokens that were not skipped, counted in all tokens of their rows."""
    read = np.flatnonzero(~sampled.skipped)
    before = offsets_of(np.bincount(rows_of(sampled.offsets)[read], minlength=len(sampled.stopped)))[units.rows]
    place = index_in_row(sampled.offsets)[read].astype(np.int32)
    starts, ends = place[before + units.student_starts], place[before + units.student_ends - 1] + 1
    return replace(units, student_starts=starts, student_ends=ends)


def _any_in(flags: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """bool `[ranges]`: whether a flag of each range `[start, end)` is set."""
    total = np.concatenate([[0], np.cumsum(flags)])
    found: np.ndarray = total[ends] > total[starts]
    return found


def show_skipped(units: Units, sampled: Sampled, *sums: np.ndarray) -> tuple[Units, list[np.ndarray]]:
    """Units with those of skipped tokens among them, and sums of each unit with 0 for these.

    A skipped token is shown where it stands before a row's last unit; it has a student token and no teacher token.
    """
    place = index_in_row(sampled.offsets)
    row = rows_of(sampled.offsets)
    tokens = np.flatnonzero(sampled.skipped & (place < last_of(units.student_ends, units.offsets)[row]))
    if not len(tokens):
        return units, list(sums)
    span = int(place.max()) + 2
    at = np.searchsorted(units.rows * span + units.student_starts, row[tokens] * span + place[tokens], side="right")
    inside = at > units.offsets[row[tokens]]  # whether a unit of its row is before it
    before = [np.where(inside, np.append(0, ends)[at], 0) for ends in (units.teacher_ends, units.byte_ends)]
    counts = np.diff(units.offsets) + np.bincount(row[tokens], minlength=len(units.offsets) - 1)
    shown = Units(
        offsets=offsets_of(counts),
        student_ends=np.insert(units.student_ends, at, place[tokens] + 1),
        teacher_ends=np.insert(units.teacher_ends, at, before[0]),
        byte_ends=np.insert(units.byte_ends, at, before[1]),
        kind=np.insert(units.kind, at, Kind.SKIPPED),
        student_starts=np.insert(units.student_starts, at, place[tokens]),
    )
    return shown, [np.insert(values, at, 0.0) for values in sums]


def read_signal(signal: Signal, scores: pa.Table | None, reading: Reading) -> dict[str, Any]:
    """The signal fields of a Pairing at the teacher tokens of `reading`; without scores they are empty."""
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
    owners = np.concatenate([owner, np.arange(tokens)])
    classes = np.concatenate([events.ids, np.full(tokens, REST)])
    return fields | {"laws": add_up(owners, classes, np.exp(np.concatenate([logprobs, rest])), tokens)}


def _renormalise(events: Events) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The token of each event, and log masses of events and rests, scaled to sum to 1: in half precision they do not quite."""
    tokens = len(events.counts)
    owner = np.repeat(np.arange(tokens), events.counts)
    total = np.log(np.bincount(owner, np.exp(events.logprobs), tokens) + np.exp(events.rest))
    return owner, events.logprobs - total[owner], events.rest - total


def last_of(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Each row's last value, int64 `[rows]`; 0 for an empty row."""
    last, some = np.zeros(len(offsets) - 1, np.int64), np.diff(offsets) > 0
    last[some] = values[offsets[1:][some] - 1]
    return last


def sum_units(units: Units, starts: np.ndarray, ends: np.ndarray, logprobs: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Σ of `logprobs` `[tokens]` over each unit's tokens: float64 `[units]`, in nats; NaN in rows with a NaN.

    `starts` and `ends` `[units]` are that side's of the units, `offsets` `[rows + 1]` its rows' bounds in the tokens.
    """
    row = units.rows
    total = np.concatenate([[0.0], np.cumsum(np.nan_to_num(logprobs.astype(np.float64)))])
    sums = total[offsets[row] + ends] - total[offsets[row] + starts]
    missing = np.bincount(rows_of(offsets), np.isnan(logprobs), len(offsets) - 1) > 0
    return np.where(missing[row], np.nan, sums)

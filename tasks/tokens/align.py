"""Align two tokenizations of the same bytes: cut both into common units (MATHS.md §3)."""

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np

from tasks.tokens.ragged import index_in_row, offsets_of, rows_of


class Kind(IntEnum):
    """How many tokens a unit has on each side, or what it is."""

    STOP = 0
    ONE_TO_ONE = 1
    MANY_TO_ONE = 2  # several student tokens, one teacher token
    ONE_TO_MANY = 3
    MANY_TO_MANY = 4
    MARKER = 5  # what the recipe pairs in place of a control token, with the text around it where tokens join them
    SKIPPED = 6  # an unpaired control token of the student's, which the teacher does not read


@dataclass(frozen=True)
class Units:
    """Units of many rows, flat and ordered by row; row r's are `offsets[r]:offsets[r + 1]`.

    Starts are inclusive, ends exclusive; both count from the row's start. Between two units the student may have tokens that
    are in neither; the teacher has none.
    """

    offsets: np.ndarray  # int64 [rows + 1]
    student_ends: np.ndarray  # int32 [units], in student tokens
    teacher_ends: np.ndarray  # int32 [units], in teacher tokens
    byte_ends: np.ndarray  # int32 [units]
    kind: np.ndarray  # int8 [units]: Kind
    student_starts: np.ndarray  # int32 [units], in student tokens

    @cached_property
    def rows(self) -> np.ndarray:
        """The row of each unit, int64 `[units]`."""
        return rows_of(self.offsets)

    @cached_property
    def teacher_starts(self) -> np.ndarray:
        """int32 `[units]`, in teacher tokens."""
        return unit_starts(self.teacher_ends, self.offsets)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Bytes of each unit, int32 `[units]`."""
        return unit_sizes(self.byte_ends, self.offsets)

    @cached_property
    def controls(self) -> np.ndarray:
        """bool `[units]`: markers, and with one tokenizer control tokens. They are events of their own, not text."""
        found: np.ndarray = (self.kind == Kind.MARKER) | ((self.sizes == 0) & (self.kind != Kind.STOP))
        return found


def byte_ends(lengths: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Cumulative byte ends of tokens within their rows, int64 `[tokens]`, from the tokens' `lengths` and the rows' bounds."""
    total = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    ends: np.ndarray = total[1:] - np.repeat(total[offsets[:-1]], np.diff(offsets))
    return ends


def align(
    student_lengths: np.ndarray,
    student_offsets: np.ndarray,
    teacher_lengths: np.ndarray,
    teacher_offsets: np.ndarray,
    stops: np.ndarray,
) -> Units:
    """The minimal common units of two tokenizations, for all rows at once.

    `*_lengths` are the bytes of each token (at least 1, and 1 for a control token), flat; `*_offsets` the rows' bounds in them.
    `stops[r]` says whether row r ended with a stop on both sides; that stop, which is not among the tokens, becomes its last
    unit.
    A unit's ends are the members of E_S ∩ E_T; bytes behind the last common end are in no unit.
    """
    rows = len(student_offsets) - 1
    s_rows, t_rows = rows_of(student_offsets), rows_of(teacher_offsets)
    s_ends, t_ends = byte_ends(student_lengths, student_offsets), byte_ends(teacher_lengths, teacher_offsets)
    span = max(int(s_ends.max(initial=0)), int(t_ends.max(initial=0))) + 1
    # (row, byte end) as one sorted number per token: one intersection gives the common ends of all rows.
    _, s_at, t_at = np.intersect1d(s_rows * span + s_ends, t_rows * span + t_ends, assume_unique=True, return_indices=True)

    stop_rows = np.flatnonzero(stops)
    row = np.concatenate([s_rows[s_at], stop_rows])
    order = np.argsort(row, kind="stable")  # a row's stop unit goes behind its others
    s_counts, t_counts = np.diff(student_offsets), np.diff(teacher_offsets)
    ends = [
        np.concatenate([inside, at_stop])[order]
        for inside, at_stop in (
            (index_in_row(student_offsets)[s_at] + 1, s_counts[stop_rows] + 1),
            (index_in_row(teacher_offsets)[t_at] + 1, t_counts[stop_rows] + 1),
            (s_ends[s_at], np.bincount(s_rows, student_lengths, rows).astype(np.int64)[stop_rows]),
        )
    ]
    offsets = offsets_of(np.bincount(row, minlength=rows))
    student_ends, teacher_ends, common = (end.astype(np.int32) for end in ends)
    is_stop = np.concatenate([np.zeros(len(s_at), bool), np.ones(len(stop_rows), bool)])[order]
    s_many, t_many = unit_sizes(student_ends, offsets) > 1, unit_sizes(teacher_ends, offsets) > 1
    kind = np.where(is_stop, Kind.STOP, Kind.ONE_TO_ONE + s_many + 2 * t_many).astype(np.int8)
    return Units(offsets, student_ends, teacher_ends, common, kind, unit_starts(student_ends, offsets))


def unit_sizes(ends: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Tokens in each unit, `[units]`, from exclusive `ends` that count from each row's start."""
    sizes: np.ndarray = ends - unit_starts(ends, offsets)
    return sizes


def unit_starts(ends: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Inclusive starts of units, `[units]`: the end of the unit before, 0 at a row's first."""
    starts = np.concatenate([ends[:0], [0], ends[:-1]])[: len(ends)]
    starts[offsets[:-1][np.diff(offsets) > 0]] = 0
    return starts

"""What objectives share: both sides of a shard's rows going in, terms with targets coming out.

A *term* is one summand of the loss: a unit, a position or a byte. It reads the student's next-token distributions at
the tokens `start … end - 1` and has a target: log masses on a few events, and the log mass of the rest.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from configs.objectives import ObjectiveConfig
from tasks.tokens.align import Units, unit_starts
from tasks.tokens.byte_laws import expand_ranges
from tasks.tokens.ragged import offsets_of, ragged, rows_of


@dataclass(frozen=True)
class Pairing:
    """The rows of one shard, both sides flat. Dropped rows have no tokens. Stops are among the tokens, last in a row."""

    student_ids: np.ndarray
    student_offsets: np.ndarray  # [rows + 1]
    teacher_ids: np.ndarray
    teacher_offsets: np.ndarray
    stops: np.ndarray  # bool [rows]: the last token of both sides is a stop
    teacher_logprobs: np.ndarray  # float64, of teacher_ids
    top_ids: np.ndarray  # teacher ids, flat; the signal of teacher token j is top_offsets[j]:top_offsets[j + 1]
    top_logprobs: np.ndarray  # float64; with `rest` they sum to 1 exactly
    top_offsets: np.ndarray
    rest: np.ndarray  # log mass outside top_ids, one per teacher token; all 0 where the signal is `laws`, which hold their own
    units: Units
    behaviour: np.ndarray  # log-prob of each unit under the policy that sampled it; NaN where none did
    escapes: tuple[np.ndarray, np.ndarray] | None = None  # [rows] of the control token behind the units: pairing.py
    laws: tuple[np.ndarray, ...] | None = None  # of the next byte before each teacher token: counts, classes, masses

    @property
    def rows(self) -> int:
        return len(self.stops)


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Terms of all rows with their targets, flat; row r's terms are `offsets[r]:offsets[r + 1]`."""

    offsets: np.ndarray
    starts: np.ndarray  # first student token read, counted in the row
    ends: np.ndarray  # exclusive
    counts: np.ndarray  # explicit events of each term's target
    ids: np.ndarray  # those events, flat: student ids or classes of bytes
    logprobs: np.ndarray
    rest: np.ndarray  # log mass outside them; what that is depends on the objective (MATHS.md §4)
    supervised: np.ndarray  # [rows] bytes that a term covers
    inside: np.ndarray | None = None  # bytes of the last token that are already read (`bytes` only)
    behaviour: np.ndarray | None = None  # of each term under the policy that sampled it (`opd` reads it)
    unmatched_counts: np.ndarray | None = None  # sorted log masses that have no event (`gold` only)
    unmatched_logprobs: np.ndarray | None = None

    def columns(self) -> dict[str, pa.Array]:
        """The `aligned` columns that training reads."""
        events = offsets_of(self.counts)[self.offsets]
        columns = {
            "units": pa.array(np.diff(self.offsets), pa.int32()),
            "term_starts": ragged(self.starts, self.offsets, pa.int32()),
            "term_ends": ragged(self.ends, self.offsets, pa.int32()),
            "target_counts": ragged(self.counts, self.offsets, pa.int32()),
            "target_ids": ragged(self.ids, events, pa.int32()),
            "target_logprobs": ragged(self.logprobs, events, pa.float32()),
            "target_rest": ragged(self.rest, self.offsets, pa.float32()),
        }
        if self.inside is not None:
            columns["term_inside"] = ragged(self.inside, self.offsets, pa.int32())
        if self.behaviour is not None:
            columns["term_behaviour"] = ragged(self.behaviour, self.offsets, pa.float32())
        if self.unmatched_counts is not None and self.unmatched_logprobs is not None:
            bounds = offsets_of(self.unmatched_counts)[self.offsets]
            columns["unmatched_counts"] = ragged(self.unmatched_counts, self.offsets, pa.int32())
            columns["unmatched_logprobs"] = ragged(self.unmatched_logprobs, bounds, pa.float32())
        return columns


@dataclass(frozen=True)
class Terms:
    """A chunk of terms as tensors; positions count from the chunk's first."""

    actual: torch.Tensor  # [positions] the student's tokens
    start: torch.Tensor  # [terms]
    end: torch.Tensor  # [terms], exclusive
    inside: torch.Tensor  # [terms]
    ids: torch.Tensor  # [terms, K], padded with 0
    logprobs: torch.Tensor  # [terms, K], padded with -inf
    rest: torch.Tensor  # [terms]
    behaviour: torch.Tensor  # [terms]
    unmatched: torch.Tensor  # [terms, K'], padded with -inf


class ObjectiveModule(nn.Module):
    """One objective for one pair of vocabularies. A module, so that its tables move to the device with the student."""

    config: ObjectiveConfig

    def __init__(self, config: ObjectiveConfig):
        super().__init__()
        self.config = config

    def prepare(self, rows: pa.Table, seed: int) -> pa.Table:
        """Rows of an optimizer step as the student reads them: `input_ids` where they differ from `token_ids`."""
        return rows

    def project(self, pairing: Pairing) -> Projection:
        """The terms and targets of a shard (the align stage)."""
        raise NotImplementedError

    def forward(self, logits: torch.Tensor, terms: Terms) -> torch.Tensor:
        """Loss of each term in nats, `[terms]`, from the student's logits `[positions, V]` (the train stage).

        Each new `[positions, V]` costs as much as the head of a small student: one softmax, few reads, no copies.
        """
        raise NotImplementedError


def log_of(mass: torch.Tensor) -> torch.Tensor:
    """Finite also where a mass is 0; far below the floor of divergences there."""
    return mass.clamp(min=torch.finfo(mass.dtype).tiny).log()


def unit_sums(path: torch.Tensor, terms: Terms) -> torch.Tensor:
    """Σ over each term's positions, `[terms]`, of values `[positions]`."""
    position, term = expand_ranges(terms.start, terms.end)
    return path.new_zeros(len(terms.start)).index_add(0, term, path[position])


def unit_logprobs(logprobs: torch.Tensor, terms: Terms, stops: torch.Tensor | None = None) -> torch.Tensor:
    """Σ of the actual tokens' log-probs over each term, `[terms]`: the student's probability of that path.

    With `stops`, the student's stop ids, a stop counts as the event: the sum over all of them.
    """
    ids = terms.actual[:, None]
    if stops is None or len(stops) < 2:
        return unit_sums(logprobs.gather(1, ids)[:, 0], terms)
    stopped = torch.isin(ids, stops)
    read = logprobs.gather(1, torch.where(stopped, stops, ids))  # what is no stop stands in every column
    read[:, 1:].masked_fill_(~stopped, -torch.inf)
    return unit_sums(read.logsumexp(-1), terms)


def project_units(pairing: Pairing, only: np.ndarray | None = None) -> Projection:
    """Units as terms with one event, the unit itself: its log-prob under the teacher. `only` picks units, bool."""
    units = pairing.units
    row = rows_of(units.offsets)
    chosen = np.flatnonzero(only) if only is not None else np.arange(len(row))
    total = np.concatenate([[0.0], np.cumsum(pairing.teacher_logprobs)])
    base = pairing.teacher_offsets[row]
    path = total[base + units.teacher_ends] - total[base + unit_starts(units.teacher_ends, units.offsets)]
    sizes = units.byte_ends - unit_starts(units.byte_ends, units.offsets)
    path = np.minimum(path[chosen], 0)
    with np.errstate(divide="ignore"):
        return Projection(
            offsets=offsets_of(np.bincount(row[chosen], minlength=pairing.rows)),
            starts=unit_starts(units.student_ends, units.offsets)[chosen],
            ends=units.student_ends[chosen],
            counts=np.ones(len(chosen), np.int64),
            ids=np.zeros(len(chosen), np.int64),
            logprobs=path,
            rest=np.log(-np.expm1(path)),
            supervised=np.bincount(row[chosen], sizes[chosen], pairing.rows).astype(np.int64),
            behaviour=pairing.behaviour[chosen],
        )

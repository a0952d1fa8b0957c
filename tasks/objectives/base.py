"""The interface of objectives: their input is both sides of a shard's rows, their output terms with targets.

A *term* is one summand of the loss: a unit, a position or a byte. It reads the student's next-token distributions at
the tokens `start … end - 1` and has a target: log masses on a few events, and the log mass of the rest.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from configs.objectives import ObjectiveConfig
from tasks.tokens.align import Units
from tasks.tokens.byte_laws import expand_ranges
from tasks.tokens.ragged import offsets_of, ragged

WHOLE = -1  # as `inside` of a term: its one event is the path of a marker, or of a control token, as a whole


@dataclass(frozen=True)
class Pairing:
    """The rows of one shard, both sides flat. Dropped rows have no tokens. A stop is a token, the last one of its row.

    Ids and offsets are integers, log-probs float64 in nats.
    """

    student_ids: np.ndarray  # [student tokens]
    student_offsets: np.ndarray  # [rows + 1]
    teacher_ids: np.ndarray  # [teacher tokens]
    teacher_offsets: np.ndarray  # [rows + 1]
    stops: np.ndarray  # bool [rows]: the last token of both sides is a stop
    teacher_logprobs: np.ndarray  # [teacher tokens], of teacher_ids
    top_ids: np.ndarray  # [events], teacher ids; those of teacher token j are top_offsets[j]:top_offsets[j + 1]
    top_logprobs: np.ndarray  # [events]; with `rest` their masses sum to 1 exactly
    top_offsets: np.ndarray  # [teacher tokens + 1]
    rest: np.ndarray  # log mass outside top_ids, one per teacher token; all 0 where the signal is `laws`, which hold their own
    units: Units
    behaviour: np.ndarray  # [units], log-prob under the policy that sampled the unit; NaN where none did
    # [rows], log-prob under its policy of the unpaired control token right behind the units; NaN where there is none
    escapes: np.ndarray | None = None
    laws: tuple[np.ndarray, ...] | None = None  # of the next byte before each teacher token: counts, classes, masses

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.stops)

    @cached_property
    def paths(self) -> np.ndarray:
        """float64 `[units]`: log P_T of each unit."""
        total = np.concatenate([[0.0], np.cumsum(self.teacher_logprobs)])
        base = self.teacher_offsets[self.units.rows]
        path: np.ndarray = total[base + self.units.teacher_ends] - total[base + self.units.teacher_starts]
        return path


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Terms of all rows with their targets, flat; row r's terms are `offsets[r]:offsets[r + 1]`. Log masses are in nats."""

    offsets: np.ndarray  # [rows + 1]
    starts: np.ndarray  # [terms], first student token that the term reads, counted in the row
    ends: np.ndarray  # [terms], exclusive
    counts: np.ndarray  # [terms], explicit events of the target
    ids: np.ndarray  # [events]: student ids or classes of bytes
    logprobs: np.ndarray  # [events]
    rest: np.ndarray  # [terms], log mass outside the events; what that is depends on the objective (MATHS.md §4)
    supervised: np.ndarray  # [rows], bytes that a term covers
    inside: np.ndarray | None = None  # [terms], bytes of the last token that were read before (`bytes`), or WHOLE
    behaviour: np.ndarray | None = None  # [terms], log-prob under the policy that sampled the term (`opd` reads it)
    unmatched_counts: np.ndarray | None = None  # [terms], teacher's masses without an event (`gold` only)
    unmatched_logprobs: np.ndarray | None = None  # those log masses, flat, the largest first

    def columns(self) -> dict[str, pa.Array]:
        """The columns of `aligned` that training reads."""
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
    """A chunk of terms as tensors; positions count from the chunk's first. Integers are int64, log masses float32 in nats."""

    actual: torch.Tensor  # [positions], the student's tokens
    start: torch.Tensor  # [terms]
    end: torch.Tensor  # [terms], exclusive
    inside: torch.Tensor  # [terms]
    ids: torch.Tensor  # [terms, K], padded with 0
    logprobs: torch.Tensor  # [terms, K], padded with -inf
    rest: torch.Tensor  # [terms]
    behaviour: torch.Tensor  # [terms]
    unmatched: torch.Tensor  # [terms, K'], padded with -inf


class ObjectiveModule(nn.Module):
    """One objective for one pair of vocabularies. It is a module, so that its tables move to the device with the student."""

    config: ObjectiveConfig

    def __init__(self, config: ObjectiveConfig):
        super().__init__()
        self.config = config

    def prepare(self, rows: pa.Table, seed: int) -> pa.Table:
        """Rows of an optimizer step, with a column `input_ids` where the student's input differs from `token_ids`."""
        return rows

    def project(self, pairing: Pairing) -> Projection:
        """The terms and targets of a shard (the align stage)."""
        raise NotImplementedError

    def forward(self, logits: torch.Tensor, terms: Terms) -> torch.Tensor:
        """Loss of each term in nats, `[terms]`, from the student's logits `[positions, V]` (the train stage).

        Each new `[positions, V]` costs as much as the head of a small student: compute one softmax, and make no copies.
        """
        raise NotImplementedError


def log_of(mass: torch.Tensor) -> torch.Tensor:
    """The log of masses, of the same shape. It is finite where a mass is 0, and far below the floor of divergences."""
    return mass.clamp(min=torch.finfo(mass.dtype).tiny).log()


def unit_sums(path: torch.Tensor, terms: Terms) -> torch.Tensor:
    """Σ of `path` `[positions]` over each term's positions: `[terms]`."""
    position, term = expand_ranges(terms.start, terms.end)
    return path.new_zeros(len(terms.start)).index_add(0, term, path[position])


def unit_logprobs(logprobs: torch.Tensor, terms: Terms, stops: torch.Tensor | None = None) -> torch.Tensor:
    """Σ of the actual tokens' `logprobs` `[positions, V]` over each term: `[terms]`, the log-prob of that path.

    With `stops`, the student's stop ids, a stop counts as the event: the sum over all of them.
    """
    ids = terms.actual[:, None]
    if stops is None or len(stops) < 2:
        return unit_sums(logprobs.gather(1, ids)[:, 0], terms)
    stopped = torch.isin(ids, stops)
    read = logprobs.gather(1, torch.where(stopped, stops, ids))  # an id that is no stop is in every column
    read[:, 1:].masked_fill_(~stopped, -torch.inf)
    return unit_sums(read.logsumexp(-1), terms)


def project_units(pairing: Pairing, only: np.ndarray | None = None) -> Projection:
    """Units as terms with one event, the unit itself: its log-prob under the teacher. `only` picks units: bool `[units]`."""
    units = pairing.units
    row = units.rows
    chosen = np.flatnonzero(only) if only is not None else np.arange(len(row))
    path = np.minimum(pairing.paths[chosen], 0)
    with np.errstate(divide="ignore"):
        return Projection(
            offsets=offsets_of(np.bincount(row[chosen], minlength=pairing.rows)),
            starts=units.student_starts[chosen],
            ends=units.student_ends[chosen],
            counts=np.ones(len(chosen), np.int64),
            ids=np.zeros(len(chosen), np.int64),
            logprobs=path,
            rest=np.log(-np.expm1(path)),
            supervised=np.bincount(row[chosen], units.sizes[chosen], pairing.rows).astype(np.int64),
            behaviour=pairing.behaviour[chosen],
        )

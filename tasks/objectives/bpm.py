"""`bpm`: the teacher's mass at a unit's start, carried onto student tokens by their bytes (arXiv 2607.22334).

The mass of each teacher token w goes to φ(w), the longest student token that begins it. A sampled student token that spans
several teacher tokens gets their joint probability, and the first one's target gives up as much; so does the student's first
token of a marker.
"""

import numpy as np
import torch

from configs.objectives import Bpm
from tasks.objectives.base import ObjectiveModule, Pairing, Projection, Terms, log_of
from tasks.objectives.classes import Classes
from tasks.objectives.divergences import bucketed_jsd
from tasks.tokens.align import Kind
from tasks.tokens.masses import read_masses
from tasks.tokens.ragged import add_up, expand
from tasks.tokens.vocabulary import Vocabulary, match


class BpmObjective(ObjectiveModule):
    """JSD of the distributions at a unit's start, the teacher's on student tokens."""

    config: Bpm

    def __init__(self, config: Bpm, *, student: Vocabulary, teacher: Vocabulary):
        super().__init__(config)
        matching = match(teacher, student)
        self.carry = np.where(matching.ids >= 0, matching.ids, matching.prefix)  # the stop is matched with the stop
        if student.same_as(teacher):
            self.carry = student.representative
        self.student = student
        self.classes = Classes(student)

    def project(self, pairing: Pairing) -> Projection:
        units = pairing.units
        row, starts = units.rows, units.student_starts
        first = pairing.teacher_offsets[row] + units.teacher_starts
        entries, unit = expand(pairing.top_offsets[first], pairing.top_offsets[first + 1])
        ids, mass = self.carry[pairing.top_ids[entries]], np.exp(pairing.top_logprobs[entries])

        spans = np.flatnonzero((units.kind == Kind.ONE_TO_MANY) | (units.kind == Kind.MARKER))
        joint = np.exp(pairing.paths[spans])
        sampled = self.student.representative[pairing.student_ids[pairing.student_offsets[row[spans]] + starts[spans]]]
        opening = pairing.teacher_ids[first]  # the teacher's first token of each unit
        carried = self.carry[opening[spans]]
        hit = ids >= 0
        named = np.bincount(unit[pairing.top_ids[entries] == opening[unit]], minlength=len(row)) > 0
        taken = (carried >= 0) & named[spans]  # else the mass is in the rest, and is taken from there
        counts, cells, masses = add_up(
            np.concatenate([unit[hit], spans, spans[taken]]),
            np.concatenate([ids[hit], sampled, carried[taken]]).astype(np.int64),
            np.concatenate([mass[hit], joint, -joint[taken]]),
            len(row),
        )
        masses = np.maximum(masses, 0)  # rounding
        owner = np.repeat(np.arange(len(row)), counts)
        covered = np.bincount(owner, masses, len(row))
        with np.errstate(divide="ignore"):
            return Projection(
                offsets=units.offsets,
                starts=starts,
                ends=starts + 1,
                counts=counts,
                ids=cells,
                logprobs=np.log(masses),
                rest=np.log(np.maximum(1 - covered, 0)),
                supervised=np.bincount(row, units.sizes * (counts > 0), pairing.rows).astype(np.int64),
            )

    def forward(self, logits: torch.Tensor, terms: Terms) -> torch.Tensor:
        places = self.classes.places(terms.start, terms.ids)
        law = self.classes.add_up(read_masses(logits, lambda _: places)[0], terms.ids)
        student = log_of(law).masked_fill(terms.logprobs.isneginf(), -torch.inf)
        return bucketed_jsd(terms.logprobs, terms.rest, student, self.config.beta)

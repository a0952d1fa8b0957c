"""`strict`: one-to-one units and the stop alone, on matched ids alone (arXiv 2610.08448)."""

import numpy as np
import torch

from configs.schema import Strict
from tasks.objectives.base import ObjectiveModule, Pairing, Projection, Terms
from tasks.objectives.classes import ClassFold
from tasks.objectives.divergences import bucketed
from tasks.ragged import add_up, expand, offsets_of, rows_of
from tasks.tokens.align import Kind, unit_starts
from tasks.tokens.vocabulary import Vocabulary, match


class StrictObjective(ObjectiveModule):
    matched: torch.Tensor  # [M] student ids that the teacher can express, in order

    def __init__(self, config: Strict, student: Vocabulary, teacher: Vocabulary):
        super().__init__()
        self.config = config
        self.to_student = student.representative if student.same_as(teacher) else match(teacher, student).ids
        self.register_buffer("matched", torch.tensor(np.unique(self.to_student[self.to_student >= 0])), persistent=False)
        self.fold = ClassFold(student)

    def project(self, pairing: Pairing) -> Projection:
        """The teacher's law on matched ids, renormalised; what it has outside its top k may be matched, and is the rest."""
        units = pairing.units
        row = rows_of(units.offsets)
        single = np.flatnonzero((units.kind == Kind.ONE_TO_ONE) | (units.kind == Kind.STOP))
        starts = unit_starts(units.student_ends, units.offsets)[single]
        at = pairing.teacher_offsets[row[single]] + units.teacher_ends[single] - 1
        entries, term = expand(pairing.top_offsets[at], pairing.top_offsets[at + 1])
        ids, mass = self.to_student[pairing.top_ids[entries]], np.exp(pairing.top_logprobs[entries])
        hit = ids >= 0
        counts, target_ids, masses = add_up(term[hit], ids[hit].astype(np.int64), mass[hit], len(single))
        owner = np.repeat(np.arange(len(single)), counts)
        rest = np.exp(pairing.rest[at])
        total = np.maximum(np.bincount(owner, masses, len(single)) + rest, np.finfo(float).tiny)
        sizes = (units.byte_ends - unit_starts(units.byte_ends, units.offsets))[single]
        with np.errstate(divide="ignore"):
            return Projection(
                offsets_of(np.bincount(row[single], minlength=pairing.rows)),
                starts,
                starts + 1,
                counts,
                target_ids,
                np.log(masses / total[owner]),
                np.log(rest / total),
                np.bincount(row[single], sizes * (counts > 0), pairing.rows).astype(np.int64),
            )

    def forward(self, logprobs: torch.Tensor, terms: Terms) -> torch.Tensor:
        """Reverse KL on the student's own top ids, of those that the teacher's signal names; all else is the rest."""
        law = self.fold(logprobs[terms.start])[:, self.matched].log_softmax(-1)
        top = law.topk(min(self.config.top, law.shape[1]))
        same = (self.matched[top.indices][:, :, None] == terms.ids[:, None, :]) & ~terms.logprobs.isneginf()[:, None, :]
        teacher = terms.logprobs[:, None, :].masked_fill(~same, -torch.inf).logsumexp(-1)
        student = top.values.masked_fill(~same.any(-1), -torch.inf)
        outside = (1 - teacher.exp().sum(-1)).clamp(min=torch.finfo(teacher.dtype).eps).log()
        return bucketed(teacher, outside, student, beta=1.0)

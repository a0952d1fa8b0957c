"""`strict`: one-to-one units and the stop only, on matched ids only (arXiv 2610.08448)."""

import numpy as np
import torch

from configs.objectives import Strict
from tasks.objectives.base import ObjectiveModule, Pairing, Projection, Terms, log_of
from tasks.objectives.classes import Classes, Subset
from tasks.objectives.divergences import bucketed_jsd
from tasks.tokens.align import Kind
from tasks.tokens.masses import read_masses
from tasks.tokens.ragged import add_up, expand, offsets_of
from tasks.tokens.vocabulary import Vocabulary, match_to_student


class StrictObjective(ObjectiveModule):
    """Reverse KL on the likeliest matched ids of either side."""

    config: Strict

    def __init__(self, config: Strict, *, student: Vocabulary, teacher: Vocabulary):
        super().__init__(config)
        self.to_student = match_to_student(student=student, teacher=teacher)
        self.matched = Subset(student, np.unique(self.to_student[self.to_student >= 0]))
        self.classes = Classes(student)

    def project(self, pairing: Pairing) -> Projection:
        """The teacher's distribution on matched ids, renormalised. Its mass outside the top k may be matched: it is rest."""
        units = pairing.units
        row = units.rows
        single = np.flatnonzero((units.kind == Kind.ONE_TO_ONE) | (units.kind == Kind.STOP))
        starts = units.student_starts[single]
        at = pairing.teacher_offsets[row[single]] + units.teacher_ends[single] - 1
        entries, term = expand(pairing.top_offsets[at], pairing.top_offsets[at + 1])
        ids, mass = self.to_student[pairing.top_ids[entries]], np.exp(pairing.top_logprobs[entries])
        hit = ids >= 0
        counts, target_ids, masses = add_up(term[hit], ids[hit].astype(np.int64), mass[hit], len(single))
        owner = np.repeat(np.arange(len(single)), counts)
        rest = np.exp(pairing.rest[at])
        total = np.maximum(np.bincount(owner, masses, len(single)) + rest, np.finfo(float).tiny)
        sizes = units.sizes[single]
        with np.errstate(divide="ignore"):
            return Projection(
                offsets=offsets_of(np.bincount(row[single], minlength=pairing.rows)),
                starts=starts,
                ends=starts + 1,
                counts=counts,
                ids=target_ids,
                logprobs=np.log(masses / total[owner]),
                rest=np.log(rest / total),
                supervised=np.bincount(row[single], sizes * (counts > 0), pairing.rows).astype(np.int64),
            )

    def forward(self, logits: torch.Tensor, terms: Terms) -> torch.Tensor:
        """Reverse KL `[terms]`, in nats, on the likeliest ids of either side that are in the teacher's signal, and the rest.

        The paper takes the student's likeliest ids only. Where the teacher's signal has none of them the term would have no
        gradient, just where both sides disagree most.
        """
        likeliest = terms.ids

        def find(mass: torch.Tensor) -> torch.Tensor:
            nonlocal likeliest
            likeliest = self.matched.top(mass, self.config.top)[terms.start]
            return self.classes.places(terms.start, terms.ids)

        read, totals, _ = read_masses(logits, find, self.matched)
        least = terms.logprobs.topk(min(self.config.top, terms.logprobs.shape[1])).values[:, -1:]
        compared = (terms.logprobs >= least) | (terms.ids[:, :, None] == likeliest[:, None, :]).any(-1)
        compared &= ~terms.logprobs.isneginf()
        outside = torch.cat([terms.logprobs.masked_fill(compared, -torch.inf), terms.rest[:, None]], 1).logsumexp(-1)
        student = log_of(self.classes.add_up(read, terms.ids)) - log_of(totals)[terms.start]
        teacher, student = (side.masked_fill(~compared, -torch.inf) for side in (terms.logprobs, student))
        return bucketed_jsd(teacher, outside, student, beta=1.0)

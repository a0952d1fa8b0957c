"""`uld`: sorted L1 between positions paired by index (Universal Logit Distillation, arXiv 2402.12030)."""

import numpy as np
import torch

from configs.objectives import Uld
from tasks.objectives.base import ObjectiveModule, Pairing, Projection, Terms
from tasks.tokens.ragged import expand, first_of, offsets_of
from tasks.tokens.vocabulary import Vocabulary


class UldObjective(ObjectiveModule):
    """Sorted L1, one term per pair of positions."""

    config: Uld

    def __init__(self, config: Uld, *, student: Vocabulary, teacher: Vocabulary):
        super().__init__(config)
        self.lengths = student.lengths

    def project(self, pairing: Pairing) -> Projection:
        units, rows = pairing.units, pairing.rows
        position, unit = expand(units.student_starts, units.student_ends)  # the tokens that units hold
        held = offsets_of(np.bincount(units.rows[unit], minlength=rows))
        pairs = np.minimum(np.diff(held), np.diff(pairing.teacher_offsets))
        paired = first_of(held, pairs)
        position, row = position[paired], units.rows[unit][paired]
        teacher, _ = expand(pairing.teacher_offsets[:-1], pairing.teacher_offsets[:-1] + pairs)
        entries, _ = expand(pairing.top_offsets[teacher], pairing.top_offsets[teacher + 1])
        sizes = self.lengths[pairing.student_ids[pairing.student_offsets[row] + position]]
        return Projection(
            offsets=offsets_of(pairs),
            starts=position,
            ends=position + 1,
            counts=np.diff(pairing.top_offsets)[teacher],
            ids=pairing.top_ids[entries],
            logprobs=pairing.top_logprobs[entries],
            rest=pairing.rest[teacher],
            supervised=np.bincount(row, sizes, rows).astype(np.int64),
        )

    def forward(self, logits: torch.Tensor, terms: Terms) -> torch.Tensor:
        """Σ_k |s_(k) - t_(k)|, `[terms]`, over the teacher's k largest and the rests as one more pair; exact at k = V."""
        logprobs = logits.log_softmax(-1)
        k = min(terms.logprobs.shape[1], logits.shape[1])
        likeliest = logprobs.detach().topk(k).indices
        read = logprobs.gather(1, torch.cat([likeliest, terms.actual[:, None]], 1))[terms.start]
        student = read[:, :k].exp() * ~terms.logprobs[:, :k].isneginf()
        teacher = terms.logprobs.exp()
        loss = (student - teacher[:, :k]).abs().sum(-1) + teacher[:, k:].sum(-1)
        loss = loss + (1 - student.sum(-1) - terms.rest.exp()).abs()
        if self.config.cross_entropy:
            loss = loss - self.config.cross_entropy * read[:, k]
        return loss

"""`sft`: cross-entropy on the rows' own tokens."""

import numpy as np
import torch

from tasks.objectives.base import ObjectiveModule, Pairing, Projection, Terms
from tasks.ragged import rows_of, within
from tasks.tokens.vocabulary import Vocabulary


class SftObjective(ObjectiveModule):
    def __init__(self, student: Vocabulary):
        super().__init__()
        self.lengths = student.lengths

    def project(self, pairing: Pairing) -> Projection:
        ids, offsets = pairing.student_ids, pairing.student_offsets
        position = within(offsets)
        return Projection(
            offsets,
            position,
            position + 1,
            np.ones(len(ids), np.int64),
            ids,
            np.zeros(len(ids)),
            np.full(len(ids), -np.inf),
            np.bincount(rows_of(offsets), self.lengths[ids], pairing.rows).astype(np.int64),
        )

    def forward(self, logits: torch.Tensor, terms: Terms) -> torch.Tensor:
        return -logits.log_softmax(-1)[terms.start, terms.ids[:, 0]]

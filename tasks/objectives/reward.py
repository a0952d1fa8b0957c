"""`reward`: no term of its own. What `[reward]` adds is all that is trained on (MATHS.md §10)."""

import numpy as np
import torch

from configs.objectives import RewardAlone
from tasks.objectives.base import ObjectiveModule, Pairing, Projection, Terms
from tasks.tokens.ragged import rows_of
from tasks.tokens.vocabulary import Vocabulary


class RewardAloneObjective(ObjectiveModule):
    """Rewards alone. The bytes of a row count as supervised: its advantage covers all of them."""

    def __init__(self, config: RewardAlone, *, student: Vocabulary, teacher: Vocabulary):
        super().__init__(config)
        self.lengths = student.lengths

    def project(self, pairing: Pairing) -> Projection:
        ids, offsets = pairing.student_ids, pairing.student_offsets
        none = np.zeros(0, np.int64)
        return Projection(
            offsets=np.zeros(pairing.rows + 1, np.int64),
            starts=none,
            ends=none,
            counts=none,
            ids=none,
            logprobs=np.zeros(0),
            rest=np.zeros(0),
            supervised=np.bincount(rows_of(offsets), self.lengths[ids], pairing.rows).astype(np.int64),
        )

    def forward(self, logits: torch.Tensor, terms: Terms) -> torch.Tensor:
        return logits.new_zeros(len(terms.start))

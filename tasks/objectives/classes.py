"""Ids with the same bytes, and all stops, are one event."""

import numpy as np
import torch
from torch import nn

from tasks.tokens.vocabulary import Vocabulary


class ClassFold(nn.Module):
    """Moves the mass of ids that another id of their class stands for onto that id."""

    duplicates: torch.Tensor
    stand_in: torch.Tensor

    def __init__(self, vocabulary: Vocabulary):
        super().__init__()
        stand_in = vocabulary.representative[vocabulary.duplicates].astype(np.int64)
        self.register_buffer("duplicates", torch.tensor(vocabulary.duplicates), persistent=False)
        self.register_buffer("stand_in", torch.tensor(stand_in), persistent=False)

    def forward(self, logprobs: torch.Tensor) -> torch.Tensor:
        """Log-probs `[…, V]` with whole classes at their representatives, and -inf at the other members."""
        if not len(self.duplicates):
            return logprobs
        mass = logprobs.exp().index_add(1, self.stand_in, logprobs[:, self.duplicates].exp())
        folded = mass.clamp(min=torch.finfo(mass.dtype).tiny).log()
        return folded.index_fill(1, self.duplicates, -torch.inf)

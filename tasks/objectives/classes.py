"""Ids with the same bytes, and all stops, are one event: masses of such classes, read from masses of ids."""

import numpy as np
import torch
from torch import nn

from tasks.tokens.vocabulary import Vocabulary


class Classes(nn.Module):
    """The mass of whole classes, each named by its representative."""

    members: torch.Tensor  # [V, largest class] the ids that an id stands for, itself first, padded with -1

    def __init__(self, vocabulary: Vocabulary):
        super().__init__()
        owners = vocabulary.representative[vocabulary.duplicates]
        order = np.argsort(owners, kind="stable")
        owners = owners[order]
        column = np.arange(len(owners)) - np.searchsorted(owners, owners) + 1
        members = np.full((vocabulary.size, int(column.max(initial=0)) + 1), -1, np.int64)
        members[:, 0] = np.arange(vocabulary.size)
        members[owners, column] = vocabulary.duplicates[order]
        self.register_buffer("members", torch.tensor(members), persistent=False)

    def forward(self, mass: torch.Tensor, row: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """`[terms, K]`: of `ids` `[terms, K]`, each line in its own row `[terms]` of `mass` `[positions, V]`."""
        members = self.members[ids]
        read = mass[row[:, None, None], members.clamp(min=0)]
        return (read * (members >= 0)).sum(-1)


class Subset(nn.Module):
    """Some of a vocabulary's classes, by their representatives in order."""

    ids: torch.Tensor  # [N]
    duplicates: torch.Tensor  # ids that some of them stand for too
    place: torch.Tensor  # and which of them does
    held: torch.Tensor  # [V] 1 for all of these ids, else 0

    def __init__(self, vocabulary: Vocabulary, ids: np.ndarray):
        super().__init__()
        duplicates = vocabulary.duplicates[np.isin(vocabulary.representative[vocabulary.duplicates], ids)]
        place = np.searchsorted(ids, vocabulary.representative[duplicates])
        held = np.zeros(vocabulary.size, np.float32)
        held[ids] = held[duplicates] = 1
        self.register_buffer("ids", torch.tensor(ids, dtype=torch.long), persistent=False)
        self.register_buffer("duplicates", torch.tensor(duplicates), persistent=False)
        self.register_buffer("place", torch.tensor(place), persistent=False)
        self.register_buffer("held", torch.tensor(held), persistent=False)

    def __len__(self) -> int:
        return len(self.ids)

    def total(self, mass: torch.Tensor) -> torch.Tensor:
        """Their mass together, `[positions]`."""
        with torch.autocast(mass.device.type, enabled=False):  # a sum, not a layer: bfloat16 would be too coarse
            return mass @ self.held.to(mass.dtype)

    @torch.no_grad()
    def top(self, mass: torch.Tensor, k: int) -> torch.Tensor:
        """The `k` likeliest (all, if there are fewer), the likeliest first, `[positions, k]`."""
        whole = mass.index_select(1, self.ids).index_add_(1, self.place, mass[:, self.duplicates])
        return self.ids[whole.topk(min(k, len(self.ids))).indices]

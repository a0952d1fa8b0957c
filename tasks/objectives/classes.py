"""Classes of ids: ids with the same bytes, or all stops, are one event. The mass of a class is the sum over its ids."""

import numpy as np
import torch
from torch import nn

from tasks.tokens.vocabulary import Vocabulary


class Classes(nn.Module):
    """Masses of classes, each named by its representative."""

    members: torch.Tensor  # int64 [V, largest class]: the ids that an id represents, itself first, padded with -1

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
        """Masses of the classes of `ids`, `[terms, K]`, each term's from its `row` `[terms]` of `mass` `[positions, V]`."""
        members = self.members[ids]
        read = mass[row[:, None, None], members.clamp(min=0)]
        return (read * (members >= 0)).sum(-1)


class Subset(nn.Module):
    """Some of a vocabulary's classes, by their representatives in order."""

    ids: torch.Tensor  # int64 [N]: the representatives
    duplicates: torch.Tensor  # int64: the other ids of these classes
    place: torch.Tensor  # int64: the index in `ids` of each duplicate's representative
    held: torch.Tensor  # float32 [V]: 1 for every id of these classes, else 0

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
        """The number of classes."""
        return len(self.ids)

    def total(self, mass: torch.Tensor) -> torch.Tensor:
        """The mass of all these classes together, `[positions]`, from `mass` `[positions, V]`."""
        with torch.autocast(mass.device.type, enabled=False):  # a sum, not a layer: bfloat16 would be too coarse
            return mass @ self.held.to(mass.dtype)

    @torch.no_grad()
    def top(self, mass: torch.Tensor, k: int) -> torch.Tensor:
        """The `k` likeliest classes (all, if there are fewer), the likeliest first: ids `[positions, k]`."""
        whole = mass.index_select(1, self.ids).index_add_(1, self.place, mass[:, self.duplicates])
        return self.ids[whole.topk(min(k, len(self.ids))).indices]

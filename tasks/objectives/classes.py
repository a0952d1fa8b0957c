"""Classes of ids: ids with the same bytes, or all stops, are one event. The mass of a class is the sum over its ids."""

import numpy as np
import torch
from torch import nn

from tasks.tokens.masses import find_likeliest
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

    def places(self, row: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Where `read_masses` finds the masses of the classes of `ids` `[terms, K]`, each term's in its `row` `[terms]`."""
        return (row[:, None, None] * len(self.members) + self.members[ids].clamp(min=0)).flatten()

    def add_up(self, read: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Masses of the classes of `ids`, `[terms, K]`, from what was read at their places."""
        members = self.members[ids]
        return (read.view(members.shape) * (members >= 0)).sum(-1)


class Subset(nn.Module):
    """Some of a vocabulary's classes, by their representatives, as one set of ids (`Sums`)."""

    duplicates: torch.Tensor  # int64: the other ids of these classes
    owners: torch.Tensor  # int64: the representative of each duplicate
    shared: torch.Tensor  # int64: the ids of classes with several
    held: torch.Tensor  # float32 [V]: 1 for every id of these classes, else 0

    def __init__(self, vocabulary: Vocabulary, ids: np.ndarray):
        super().__init__()
        duplicates = vocabulary.duplicates[np.isin(vocabulary.representative[vocabulary.duplicates], ids)]
        held = np.zeros(vocabulary.size, np.float32)
        held[ids] = held[duplicates] = 1
        self.count = len(ids)
        self.register_buffer("duplicates", torch.tensor(duplicates), persistent=False)
        self.register_buffer("owners", torch.tensor(vocabulary.representative[duplicates]), persistent=False)
        self.register_buffer(
            "shared", torch.tensor(np.union1d(duplicates, vocabulary.representative[duplicates])), persistent=False
        )
        self.register_buffer("held", torch.tensor(held), persistent=False)

    def __len__(self) -> int:
        """The number of classes."""
        return self.count

    def add_up(self, mass: torch.Tensor) -> torch.Tensor:
        """The mass of all these classes together, `[positions, 1]`, from `mass` `[positions, V]`."""
        with torch.autocast(mass.device.type, enabled=False):  # a sum, not a layer: bfloat16 would be too coarse
            return (mass @ self.held.to(mass.dtype))[:, None]

    def spread(self, of_sets: torch.Tensor, of_others: torch.Tensor) -> torch.Tensor:
        return ((of_sets - of_others) * self.held).add_(of_others)

    def top(self, mass: torch.Tensor, k: int) -> torch.Tensor:
        """The `k` likeliest classes (all, if there are fewer), the likeliest first: ids `[positions, k]`."""
        sign, before = 2 * self.held - 1, mass[:, self.shared]
        mass.mul_(sign)  # in place, and back: ids outside have less than nothing
        if len(self.shared):
            mass.index_add_(1, self.owners, mass[:, self.duplicates]).index_fill_(1, self.duplicates, -1.0)
        found = find_likeliest(mass, min(k, self.count))[1]
        mass.index_copy_(1, self.shared, before).mul_(sign)
        return found

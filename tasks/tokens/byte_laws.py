"""The next-byte law of one side along its token path (MATHS.md §5).

On a boundary of a model's own tokens its law comes from the first bytes of its next token. The text so far may also be the
start of a longer token; so longer tokens that start with the last token's bytes are added (the *cover*). Inside a token the
law comes from the tokens that start with the bytes read so far and are longer.
Classes: 0…255 the next byte, 256 the stop; other ids (control, padding) are the rest.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from tasks.tokens.masses import read_masses
from tasks.tokens.vocabulary import Vocabulary

STOP, REST, CLASSES = 256, 257, 258
TINY = 1e-12


def first_classes(vocabulary: Vocabulary) -> np.ndarray:
    """The class of each id at a boundary, int64 `[V]`."""
    classes = np.full(vocabulary.size, REST, np.int64)
    classes[vocabulary.order] = vocabulary.byte_at(vocabulary.order, np.zeros(len(vocabulary.order), np.int64))
    classes[vocabulary.stop_ids] = STOP
    return classes


def expand_ranges(starts: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `tasks.tokens.ragged.expand`, for int64 tensors `[ranges]`: all indices of the ranges, and the range of each."""
    counts = (ends - starts).clamp(min=0)
    owner = torch.repeat_interleave(torch.arange(len(starts), device=starts.device), counts)
    before = counts.cumsum(0) - counts
    return torch.arange(len(owner), device=starts.device) - before[owner] + starts[owner], owner


# Places of single masses (position · V + id), and the laws from these masses and those of all cells, `[positions, cells]`.
Plan = tuple[torch.Tensor, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]


class ByteLaws(nn.Module):
    """Next-byte laws from next-token distributions of one vocabulary.

    Ids that share their class and their second byte (or have none) are a *cell*. First bytes, and covers behind a single byte,
    can concern half a vocabulary: they are summed from cells. Longer prefixes have few ids.
    """

    cell: torch.Tensor  # [V]: the cell of each id
    first: torch.Tensor  # [cells]: the class of each cell
    summands: torch.Tensor  # ids in byte order, then V + cell: ids with one prefix are a range, the prefix itself comes first
    begins: torch.Tensor  # [summands]: where the bytes of each begin in `flat`
    flat: torch.Tensor  # uint8: bytes of all ids, then the second bytes of cells
    starts: torch.Tensor  # [V]: where the bytes of each id begin in `flat`
    lengths: torch.Tensor  # [V]: bytes of each id
    low: torch.Tensor  # for byte r of id i, at `starts[i] + r`: the range of its first r + 1 bytes
    equal: torch.Tensor
    high: torch.Tensor

    def __init__(self, vocabulary: Vocabulary):
        super().__init__()
        order, starts, lengths = vocabulary.order, vocabulary.starts, vocabulary.lengths
        second = np.zeros(vocabulary.size, np.int64)  # + 1, 0 for none
        longer = np.flatnonzero(lengths > 1)
        second[longer] = vocabulary.byte_at(longer, np.ones(len(longer), np.int64)) + 1
        cells, cell = np.unique(first_classes(vocabulary) * 257 + second, return_inverse=True)
        low, equal, high = (table.copy() for table in vocabulary.prefix_ranges)
        byte = vocabulary.byte_at(order, np.zeros(len(order), np.int64)).astype(np.int64)
        for table, bound in ((low, byte * 257), (equal, byte * 257 + 1), (high, (byte + 1) * 257)):
            table[starts[order]] = len(order) + np.searchsorted(cells, bound)
        tables = {
            "cell": cell,
            "first": cells // 257,
            "summands": np.concatenate([order, vocabulary.size + np.arange(len(cells))]),
            "begins": np.concatenate([starts[order], len(vocabulary.flat) - 1 + np.arange(len(cells))]),
            "flat": np.concatenate([vocabulary.flat, np.maximum(cells % 257 - 1, 0).astype(np.uint8)]),
            "starts": starts,
            "lengths": lengths.astype(np.int64),
            "low": low,
            "equal": equal,
            "high": high,
        }
        for name, table in tables.items():
            self.register_buffer(name, torch.tensor(table), persistent=False)

    def forward(
        self, logits: torch.Tensor, actual: torch.Tensor, start: torch.Tensor, end: torch.Tensor, inside: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The law at each term, probabilities `[terms, 258]`: (cover + path · first) / (Σ cover + path).

        `logits` `[positions, V]` chose `actual` `[positions]`, whose masses `[positions]` come second. A term `[terms]` reads
        the positions `start … end - 1`: two on a boundary behind a token, else one; `inside` bytes of its last token have
        been read.
        """
        places, finish = self._plan(actual, start, end, inside)
        own = torch.arange(len(actual), device=actual.device) * len(self.cell) + actual
        read, cells, _ = read_masses(logits, lambda _: torch.cat([own, places]), self)
        return finish(read[len(own) :], cells), read[: len(own)]

    def law(
        self, mass: torch.Tensor, actual: torch.Tensor, start: torch.Tensor, end: torch.Tensor, inside: torch.Tensor
    ) -> torch.Tensor:
        """As `forward`, the laws alone, from probabilities `[positions, V]`."""
        places, finish = self._plan(actual, start, end, inside)
        return finish(mass.reshape(-1)[places], self.add_up(mass))

    def add_up(self, mass: torch.Tensor) -> torch.Tensor:
        """The mass of each cell, `[positions, cells]`, from `mass` `[positions, V]` (`Sums`)."""
        return mass.new_zeros(len(mass), len(self.first)).index_add_(1, self.cell, mass)

    def spread(self, of_sets: torch.Tensor, of_others: torch.Tensor) -> torch.Tensor:
        """`[positions, V]`, to each id the value of its cell: every id has one."""
        return of_sets.index_select(1, self.cell)

    def _plan(self, actual: torch.Tensor, start: torch.Tensor, end: torch.Tensor, inside: torch.Tensor) -> Plan:
        size = len(self.cell)
        behind, token = end - start == 2, actual[start]
        known = torch.where(behind, self.lengths[token], inside)  # bytes read that a longer token may share
        at = (self.starts[token] + known - 1).clamp(min=0)
        low, equal, high = (torch.where(known > 0, table[at], 0) for table in (self.low, self.equal, self.high))
        place, term = expand_ranges(torch.where(behind, low, equal), high)
        position, summand = start[term], self.summands[place]
        byte = self.flat[self.begins[place] + known[term]].long()
        column = torch.where(place < equal[term], CLASSES, byte)  # the path itself stands behind the classes

        def finish(single: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
            first = cells.new_zeros(len(cells), CLASSES).index_add(1, self.first, cells)
            read = torch.where(summand < size, single, cells[position, (summand - size).clamp(min=0)])
            sums = cells.new_zeros(len(start) * (CLASSES + 1)).index_add(0, term * (CLASSES + 1) + column, read)
            cover, path = sums.view(-1, CLASSES + 1).split([CLASSES, 1], 1)
            law = cover + (path + (known == 0)[:, None]) * first[end - 1]
            normalised: torch.Tensor = law / law.sum(-1, keepdim=True).clamp(min=TINY)
            return normalised

        return position * size + summand.clamp(max=size - 1), finish


def boundary_laws(laws: ByteLaws, mass: torch.Tensor, actual: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """The law of the next byte before each token, covers applied: probabilities `[positions, 258]`.

    `actual`, int64 `[positions]`, were drawn from `mass` `[positions, V]`. `first`, bool `[positions]`, marks the first
    token of a completion. A chunk's first position gets no cover, even where it is not the first of its completion.
    """
    end = torch.arange(1, len(actual) + 1, device=actual.device)
    start = (end - 1 - (~first).long()).clamp(min=0)
    return laws.law(mass, actual, start, end, torch.zeros_like(end))

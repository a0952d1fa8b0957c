"""The next-byte law of one side along its token path (MATHS.md §5).

On a boundary of its own tokens a model's law is read from the first bytes of its next token; but the text so far could
also have been on its way through a longer token, so tokens that start with the last token's bytes and go on are added
(the *cover*). Inside a token the law is that of the tokens that share the bytes read so far and go on.
Classes: 0…255 the next byte, 256 the stop; ids that are neither (control, padding) are the rest.
"""

import numpy as np
import torch
from torch import nn

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
    """`tasks.tokens.ragged.expand` for tensors."""
    counts = (ends - starts).clamp(min=0)
    owner = torch.repeat_interleave(torch.arange(len(starts), device=starts.device), counts)
    before = counts.cumsum(0) - counts
    return torch.arange(len(owner), device=starts.device) - before[owner] + starts[owner], owner


class ByteLaws(nn.Module):
    """Next-byte laws from next-token distributions of one vocabulary.

    Ids that share their class and their second byte (or have none) are a *cell*. What half a vocabulary can take part
    in, first bytes and covers behind a single byte, is summed from cells; longer prefixes have few ids.
    """

    cell: torch.Tensor  # [V]: of each id
    first: torch.Tensor  # [cells]: their class
    summands: torch.Tensor  # ids in byte order, then V + cell: what shares a prefix is a range, what equals it in front
    begins: torch.Tensor  # [summands]: where the bytes of each begin in `flat`
    flat: torch.Tensor  # bytes of all ids, then the second bytes of cells
    starts: torch.Tensor  # where those of each id begin
    lengths: torch.Tensor
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
    ) -> torch.Tensor:
        """The law at each term, `[terms, 258]`: (cover + path · first) / (Σ cover + path).

        `logits` (or log-probs) `[positions, V]` chose `actual` `[positions]`. A term `[terms]` reads the positions
        `start … end - 1`: two on a boundary behind a token, else one; `inside` bytes of its last token have been read.
        """
        mass, size = logits.softmax(-1), logits.shape[1]
        cells = mass.new_zeros(len(mass), len(self.first)).index_add(1, self.cell, mass)
        first = mass.new_zeros(len(mass), CLASSES).index_add(1, self.first, cells)

        behind, token = end - start == 2, actual[start]
        known = torch.where(behind, self.lengths[token], inside)  # bytes read that a longer token may share
        at = (self.starts[token] + known - 1).clamp(min=0)
        low, equal, high = (torch.where(known > 0, table[at], 0) for table in (self.low, self.equal, self.high))
        place, term = expand_ranges(torch.where(behind, low, equal), high)
        position, summand = start[term], self.summands[place]
        read = torch.where(
            summand < size,
            mass[position, summand.clamp(max=size - 1)],
            cells[position, (summand - size).clamp(min=0)],
        )
        byte = self.flat[self.begins[place] + known[term]].long()
        column = torch.where(place < equal[term], CLASSES, byte)  # the path itself stands behind the classes
        sums = mass.new_zeros(len(start) * (CLASSES + 1)).index_add(0, term * (CLASSES + 1) + column, read)
        cover, path = sums.view(-1, CLASSES + 1).split([CLASSES, 1], 1)
        law = cover + (path + (known == 0)[:, None]) * first[end - 1]
        normalised: torch.Tensor = law / law.sum(-1, keepdim=True).clamp(min=TINY)
        return normalised


def boundary_laws(laws: ByteLaws, logprobs: torch.Tensor, actual: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """The law of the next byte before each token, covers applied, `[positions, 258]`.

    `logprobs` `[positions, V]` are those that `actual` `[positions]` were drawn from; `first`, bool `[positions]`, marks
    tokens with none before them. A position that is not first, but the first of the chunk, gets no cover.
    """
    end = torch.arange(1, len(actual) + 1, device=actual.device)
    start = (end - 1 - (~first).long()).clamp(min=0)
    law: torch.Tensor = laws(logprobs, actual, start, end, torch.zeros_like(end))
    return law

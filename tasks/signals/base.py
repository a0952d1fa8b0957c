"""The interface of a signal: an engine's output, the columns of a scores table, and the events that objectives read."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import pyarrow as pa
import torch

from storage.schemas import SCORES
from tasks.signals.head import Head
from tasks.tokens.byte_laws import ByteLaws
from tasks.tokens.masses import find_likeliest
from tasks.tokens.ragged import expand, flat, offsets_of
from tasks.tokens.vocabulary import Vocabulary

SCORE_CHUNK = 1024  # positions whose full distributions exist at once


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some flat positions with their whole distributions, from an engine in this process.

    All but `hidden` may have one more position in front (`lead` is 1 then): a token's byte law also reads the distribution
    before the last token.
    """

    hidden: torch.Tensor  # [positions, width], the last hidden states
    logits: torch.Tensor  # [lead + positions, V], in the head's dtype
    actual: torch.Tensor  # int64 [lead + positions], the ids of the completion
    first: torch.Tensor  # bool [lead + positions]: the first token of its completion
    lead: int
    laws: Callable[[], ByteLaws]
    model: str  # the model's name, for messages

    @cached_property
    def mass(self) -> torch.Tensor:
        """Probabilities, float32 `[lead + positions, V]`. Whoever reads them last may overwrite them."""
        return self.logits.softmax(-1, dtype=torch.float32)

    @cached_property
    def norm(self) -> torch.Tensor:
        """float32 `[lead + positions]`: logits minus this are log-probs. To be asked for before `mass` is overwritten."""
        return self.logits.amax(-1).float() - self.mass.amax(-1).log()


@dataclass(frozen=True)
class Top:
    """One completion's n tokens from an engine that returns only the likeliest ids."""

    actual: np.ndarray  # float [n]: log-probs of the completion's tokens, in nats
    ids: np.ndarray  # int32 [n, k], best first
    logprobs: np.ndarray  # float [n, k], in nats


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Which tokens to read from a scores table, and how."""

    tokens: np.ndarray  # int64: indices of teacher tokens, flat
    offsets: np.ndarray  # int64 [rows + 1]: the rows' bounds in `tokens`
    laws: bool  # whether to read byte laws, if the signal can give them
    vocabulary: Vocabulary
    head: Head | None


@dataclass(frozen=True)
class Events:
    """Sparse distributions: token j has `counts[j]` of the flat events, and the log mass `rest[j]` outside them."""

    ids: np.ndarray  # int64 [events]: teacher ids, or classes of bytes where `laws`
    logprobs: np.ndarray  # float64 [events], in nats
    counts: np.ndarray  # int64 [tokens]
    rest: np.ndarray  # float64 [tokens], in nats
    laws: bool = False


class Signal:
    """One kind of signal. At most `k` events per token are kept, fewer once they hold the mass `top_p`."""

    events: ClassVar[tuple[str, ...]] = ()  # columns of a scores table with several entries per token
    counts: ClassVar[str] = ""  # the column that says how many
    top: int = 0  # how many of the likeliest ids it needs from an engine that returns only those

    def __init__(self, k: int, top_p: float):
        self.k, self.top_p = k, top_p

    def store(self, chunk: Chunk) -> dict[str, torch.Tensor]:
        """The signal's columns of a scores table for a chunk of positions, `[positions]` or `[positions, width]`.

        Of those in `events` the first `counts` of each position are kept.
        """
        return {}

    def store_top(self, top: Top, size: int, rows: int) -> dict[str, np.ndarray]:
        """As `store`, from the likeliest ids of one completion, for signals that need no whole distributions.

        `rows` are the rows of the model's head; ids from `size` on are padding.
        """
        return {}

    def read(self, scores: pa.Table, reading: Reading) -> Events | None:
        """The events of the tokens of `reading`; None where the signal has none."""
        return None


def copy_to_host(columns: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Begin to copy columns to the CPU, in the types of a scores table. They are there once their device is synchronised."""
    types = {name: getattr(torch, np.dtype(SCORES.field(name).type.value_type.to_pandas_dtype()).name) for name in columns}
    return {name: column.to(types[name]).to("cpu", non_blocking=True) for name, column in columns.items()}


def join_chunks(signal: Signal, chunks: list[dict[str, torch.Tensor]]) -> dict[str, np.ndarray]:
    """Join the columns of chunks, on the CPU, as flat arrays; of events those that are kept."""
    columns = {name: torch.cat([chunk[name] for chunk in chunks]).numpy() for name in (chunks[0] if chunks else ())}
    if signal.counts in columns:
        counts = columns[signal.counts]
        for name in signal.events:
            columns[name] = columns[name][np.arange(columns[name].shape[1]) < counts[:, None]]
    return columns


def split_columns(signal: Signal, columns: dict[str, np.ndarray], ends: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Cut flat columns into completions. `ends`, int64 `[completions]`, are their exclusive ends in tokens."""
    starts = np.concatenate([[0], ends[:-1]])
    bounds = dict.fromkeys(columns, (starts, ends))
    if signal.counts in columns:
        offsets = offsets_of(columns[signal.counts].astype(np.int64))
        bounds |= dict.fromkeys(signal.events, (offsets[starts], offsets[ends]))
    return [{name: columns[name][low[i] : high[i]] for name, (low, high) in bounds.items()} for i in range(len(ends))]


def read_events(scores: pa.Table, tokens: np.ndarray, columns: tuple[str, str, str], laws: bool = False) -> Events:
    """Stored events of `tokens`, from the `columns` of ids, log-probs and counts, and from `rest`."""
    ids, logprobs, counts = (flat(scores[name])[0] for name in columns)
    bounds = offsets_of(counts.astype(np.int64))
    entries, _ = expand(bounds[tokens], bounds[tokens + 1])
    rest = flat(scores["rest"])[0].astype(np.float64)[tokens]
    return Events(ids[entries].astype(np.int64), logprobs[entries].astype(np.float64), np.diff(bounds)[tokens], rest, laws)


# Ids and log-probs `[positions, k]`, the likeliest first; how many are kept, and the log mass of the rest, `[positions]`.
Sparse = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def keep_likeliest(logprobs: torch.Tensor, k: int, top_p: float, events: int | None = None) -> Sparse:
    """The likeliest events of `logprobs` `[positions, N]`: the fewest that reach `top_p`, at most `k`, and the rest's log mass.

    Only the first `events` of the N can be kept (default: all); the others are always in the rest.
    """
    return keep_enough(*find_likeliest(logprobs[:, :events], k), logprobs.exp(), top_p)


def keep_enough(top: torch.Tensor, ids: torch.Tensor, mass: torch.Tensor, top_p: float) -> Sparse:
    """The first of `top`, log-probs `[positions, k]` of `ids`, that reach `top_p`. `mass` `[positions, N]` is overwritten."""
    enough = (top.exp().cumsum(-1) < top_p).sum(-1, keepdim=True) + 1
    keep = (torch.arange(top.shape[1], device=top.device) < enough) & ~top.isneginf()
    # The rest is summed itself, so that it does not drown in 1 - (almost 1).
    rest = mass.scatter_(1, ids.where(keep, ids[:, :1]), 0).sum(-1).log()
    return ids, top, keep.sum(-1), rest

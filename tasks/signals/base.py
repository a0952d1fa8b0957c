"""The interface of a signal: what an engine gives, what a scores table holds of it, what objectives read from that."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
import torch

from storage.schemas import SCORES
from tasks.signals.head import Head
from tasks.tokens.byte_laws import ByteLaws
from tasks.tokens.ragged import expand, flat, offsets_of
from tasks.tokens.vocabulary import Vocabulary

SCORE_CHUNK = 1024  # positions whose full distributions exist at once


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some flat positions with their whole distributions, which an engine in this process has.

    `logprobs`, `actual` and `first` may hold one position more in front (`lead` 1): a token's law of bytes also reads the
    distribution before it.
    """

    hidden: torch.Tensor  # [positions, width], the last hidden states
    logprobs: torch.Tensor  # [lead + positions, V]
    actual: torch.Tensor  # [lead + positions], the ids that are there
    first: torch.Tensor  # bool [lead + positions]: the first token of its completion
    lead: int
    laws: Callable[[], ByteLaws]
    model: str  # its name, for messages


@dataclass(frozen=True)
class Top:
    """One completion's n tokens from an engine that gives no more than the likeliest ids: `[n, k]`, best first."""

    actual: np.ndarray  # [n] log-probs of the tokens that are there
    ids: np.ndarray
    logprobs: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What is read of a scores table."""

    tokens: np.ndarray  # indices of teacher tokens, flat
    offsets: np.ndarray  # the rows' bounds in `tokens`
    laws: bool  # laws of bytes are wanted, where the signal has them by itself
    vocabulary: Vocabulary
    head: Head | None


@dataclass(frozen=True)
class Events:
    """Sparse distributions: token j has `counts[j]` of the flat events, and the log mass `rest[j]` outside them."""

    ids: np.ndarray  # int64: teacher ids, or classes of bytes where `laws`
    logprobs: np.ndarray  # float64
    counts: np.ndarray
    rest: np.ndarray
    laws: bool = False


class Signal:
    """One kind of signal. At most `k` events per token are kept, fewer once they hold the mass `top_p`."""

    events: ClassVar[tuple[str, ...]] = ()  # columns of a scores table with several entries per token
    counts: ClassVar[str] = ""  # the column that says how many
    top: int = 0  # how many of the likeliest ids it needs of an engine that gives no more than those

    def __init__(self, k: int, top_p: float):
        self.k, self.top_p = k, top_p

    def store(self, chunk: Chunk) -> dict[str, torch.Tensor]:
        """Its columns of a scores table for a chunk of positions."""
        return {}

    def store_top(self, top: Top, size: int, rows: int) -> dict[str, np.ndarray]:
        """The same from the likeliest ids, for signals that need no whole distributions.

        `rows` of the model's head include padding; ids from `size` on are none.
        """
        return {}

    def read(self, scores: pa.Table, reading: Reading) -> Events | None:
        """The events of some tokens; None where the signal has none."""
        return None


def join_chunks(chunks: list[dict[str, torch.Tensor]]) -> dict[str, np.ndarray]:
    """Columns of chunks one after another, on the CPU, in the types of a scores table."""
    return {
        name: torch.cat([chunk[name] for chunk in chunks])
        .cpu()
        .numpy()
        .astype(SCORES.field(name).type.value_type.to_pandas_dtype())
        for name in (chunks[0] if chunks else ())
    }


def split_columns(signal: Signal, columns: dict[str, np.ndarray], ends: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Flat columns cut into completions that end (exclusive) at the tokens `ends`."""
    starts = np.concatenate([[0], ends[:-1]])
    bounds = dict.fromkeys(columns, (starts, ends))
    if signal.counts in columns:
        offsets = offsets_of(columns[signal.counts].astype(np.int64))
        bounds |= dict.fromkeys(signal.events, (offsets[starts], offsets[ends]))
    return [{name: columns[name][low[i] : high[i]] for name, (low, high) in bounds.items()} for i in range(len(ends))]


def read_events(scores: pa.Table, tokens: np.ndarray, columns: tuple[str, str, str], laws: bool = False) -> Events:
    """Stored events of some tokens, from the columns of ids, log-probs and counts, and `rest`."""
    ids, logprobs, counts = (flat(scores[name])[0] for name in columns)
    bounds = offsets_of(counts.astype(np.int64))
    entries, _ = expand(bounds[tokens], bounds[tokens + 1])
    rest = flat(scores["rest"])[0].astype(np.float64)[tokens]
    return Events(ids[entries].astype(np.int64), logprobs[entries].astype(np.float64), np.diff(bounds)[tokens], rest, laws)


Sparse = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # flat ids and log-probs, counts, log rests


def keep_likeliest(logprobs: torch.Tensor, k: int, top_p: float, events: int | None = None) -> Sparse:
    """Of distributions `[positions, N]`: the events that reach `top_p`, at most `k`, and the log of what is left.

    Only the first `events` can be named (default: all); the others are always in the rest.
    """
    named = logprobs[:, :events]
    top, ids = named.topk(min(k, named.shape[1]))
    enough = (top.exp().cumsum(-1) < top_p).sum(-1) + 1
    keep = (torch.arange(top.shape[1], device=top.device) < enough[:, None]) & ~top.isneginf()
    # The rest is summed itself where it is small, so that it does not drown in 1 - (almost 1).
    rest = logprobs.scatter(1, ids.where(keep, ids[:, :1]), -torch.inf).logsumexp(-1)
    return ids[keep], top[keep], keep.sum(-1), rest

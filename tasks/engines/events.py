"""What is kept of distributions over a vocabulary: their likeliest events, their laws of bytes, hidden states (MATHS.md §6)."""

from collections.abc import Iterator

import numpy as np
import torch

from configs.errors import BadInput
from tasks.engines.base import Signal, TokenScores
from tasks.tokens.byte_laws import ByteLaws

Sparse = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # flat ids and log-probs, counts, log rests


def likeliest(logprobs: torch.Tensor, signal: Signal, events: int | None = None) -> Sparse:
    """Of laws `[positions, N]`: the events that reach `top_p`, at most `k`, and the log of what is left.

    Only the first `events` can be named (default: all); the others are always in the rest.
    """
    named = logprobs[:, :events]
    top, ids = named.topk(min(signal.k, named.shape[1]))
    enough = (top.exp().cumsum(-1) < signal.top_p).sum(-1) + 1
    keep = (torch.arange(top.shape[1], device=top.device) < enough[:, None]) & ~top.isneginf()
    # The rest is summed itself where it is small, so that it does not drown in 1 - (almost 1).
    rest = logprobs.scatter(1, ids.where(keep, ids[:, :1]), -torch.inf).logsumexp(-1)
    return ids[keep], top[keep], keep.sum(-1), rest


def stored(chunks: list[Sparse]) -> dict[str, np.ndarray]:
    """Chunks of positions as the fields of TokenScores."""
    kinds = {"top_ids": np.int32, "top_logprobs": np.float16, "counts": np.int16, "rest": np.float32}
    columns = (torch.cat(column).cpu().numpy() for column in zip(*chunks, strict=True))
    return {name: column.astype(kind) for (name, kind), column in zip(kinds.items(), columns, strict=True)}


def boundary_laws(laws: ByteLaws, logprobs: torch.Tensor, actual: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """The law of the next byte before each token, covers applied, `[positions, 258]`.

    `logprobs` `[positions, V]` are those that `actual` were drawn from; `first` marks tokens with none before them.
    A position that is not first, but the first of the chunk, gets no cover.
    """
    end = torch.arange(1, len(actual) + 1, device=actual.device)
    start = (end - 1 - (~first).long()).clamp(min=0)
    return laws(logprobs, actual, start, end, torch.zeros_like(end))


def half(hidden: torch.Tensor, name: str) -> np.ndarray:
    """float16 of hidden states; refused where one is too large for it."""
    if float(hidden.abs().max()) > torch.finfo(torch.float16).max:
        raise BadInput(f"{name}: its hidden states do not fit into float16; set score.signal = 'topk'")
    return hidden.to(torch.float16).cpu().numpy()


def split_scores(scores: TokenScores, ends: np.ndarray) -> Iterator[TokenScores]:
    """Flat scores cut into sequences that end (exclusive) at `ends`."""
    entries = None if scores.counts is None else np.concatenate([[0], np.cumsum(scores.counts, dtype=np.int64)])
    for low, high in zip(np.concatenate([[0], ends[:-1]]), ends, strict=True):
        span = slice(low, high)
        flat = slice(0) if entries is None else slice(entries[low], entries[high])
        yield TokenScores(
            scores.logprobs[span],
            *(None if a is None else a[at] for a, at in ((scores.top_ids, flat), (scores.top_logprobs, flat))),
            *(None if a is None else a[span] for a in (scores.counts, scores.rest, scores.hidden)),
        )

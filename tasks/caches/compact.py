"""Texts' scores in fewer bytes: events in the order of their classes, and log-probs with no more digits than they need."""

import numpy as np
import pyarrow as pa

from tasks.tokens.ragged import flat, offsets_of, ragged

COARSEST = 0.25  # nats: the largest step of a log-prob, whatever its mass
FINEST = 2.0**-24


def cut(scores: pa.Table, top_p: float) -> pa.Table:
    """`scores` with the likeliest events of each law alone, the fewest that reach `top_p`. Others go to the rest.

    Events come with the likeliest first, as signals store them.
    """
    counts, bounds = flat(scores["law_counts"])
    (classes, ends), (logprobs, _), (rest, _) = (flat(scores[name]) for name in ("law_classes", "law_logprobs", "rest"))
    owner, mass = np.repeat(np.arange(len(counts)), counts), np.exp(logprobs, dtype=np.float64)
    total = np.concatenate([[0], np.cumsum(mass)])
    first = offsets_of(counts.astype(np.int64))[:-1]
    keep = total[:-1] - total[first[owner]] < top_p
    more = np.bincount(owner[~keep], mass[~keep], len(counts))
    row = np.repeat(np.arange(len(scores)), np.diff(ends))
    kept = offsets_of(np.bincount(row[keep], minlength=len(scores)))
    with np.errstate(divide="ignore"):
        rest = np.where(more > 0, np.log(np.exp(rest, dtype=np.float64) + more), rest)
    columns = {
        "law_classes": (classes[keep], kept),
        "law_logprobs": (logprobs[keep], kept),
        "law_counts": (np.bincount(owner[keep], minlength=len(counts)), bounds),
        "rest": (rest, bounds),
    }
    return _replace(scores, columns)


def compact(scores: pa.Table, error: float) -> tuple[pa.Table, np.ndarray]:
    """`scores` with log-probs rounded, and how much that changes each token's law: Σ p |Δ log p|, float64 `[tokens]`, in nats.

    It is at most `error`, and so is the change of a token's own log-prob. An event of mass p among n gets steps of a power of
    two, at most 2 · error / (n p): each may be wrong by as much. With 0 nothing is rounded.
    """
    counts, bounds = flat(scores["law_counts"])
    classes, events = flat(scores["law_classes"])
    logprobs, rest, path = (flat(scores[name])[0] for name in ("law_logprobs", "rest", "logprobs"))
    owner, share = np.repeat(np.arange(len(counts)), counts), error / (counts + 1.0)  # the rest is an event, too
    order = np.lexsort((classes, owner))
    logprobs = logprobs[order]
    rounded = {
        "law_classes": (classes[order], events),
        "law_logprobs": (_round(logprobs, share[owner] / np.exp(logprobs, dtype=np.float64)), events),
        "rest": (_round(rest, share / np.maximum(np.exp(rest, dtype=np.float64), 1e-30)), bounds),
        "logprobs": (_round(path, np.full(len(path), error)), bounds),
    }
    change = np.bincount(owner, _change(logprobs, rounded["law_logprobs"][0]), len(counts)) + _change(rest, rounded["rest"][0])
    return _replace(scores, rounded), change


def _replace(scores: pa.Table, columns: dict[str, tuple[np.ndarray, np.ndarray]]) -> pa.Table:
    """`scores` with other values in some list columns, flat with the rows' bounds."""
    for name, (values, bounds) in columns.items():
        column = ragged(values, bounds, scores.schema.field(name).type.value_type)
        scores = scores.set_column(scores.column_names.index(name), name, column)
    return scores


def _round(logprobs: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Log-probs in whole steps, in their own type, each changed by at most `most`."""
    step = 2.0 ** np.floor(np.log2(np.clip(2 * most, FINEST, COARSEST)))
    rounded: np.ndarray = np.where(most > 0, np.round(logprobs / step) * step, logprobs).astype(logprobs.dtype)
    return rounded


def _change(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """p |Δ log p| of each event, float64; 0 for an event without mass."""
    there = np.isfinite(before)
    before, after = np.where(there, before, 0).astype(np.float64), np.where(there, after, 0).astype(np.float64)
    return np.where(there, np.exp(before) * np.abs(after - before), 0)

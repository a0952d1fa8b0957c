"""What the engines share whose vLLM runs elsewhere: it is told ids, and gives the likeliest ids of a distribution alone."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tasks.engines.base import Advance, Completion, Sampling, Signal, TokenScores, unseen
from tasks.models import ModelRef, side

STOP_ERROR = 1e-3  # nats that stop ids which were not returned may change a stop's log-prob by
SMALLEST_REST = 1e-7  # of probability: what float32 log-probs that sum to 1 can hide


@dataclass(frozen=True)
class Top:
    """One sequence's n completion tokens: float `actual` `[n]`, and `[n, k]` of the likeliest ids, best first."""

    actual: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray


class RemoteEngine(ABC):
    """`rest` is what the returned ids leave of 1, at most what as many ids as are left could have.

    A stop's log-prob is that of the event: its own mass and that of all other stop ids. Those that are not among the
    returned ids are asked for where they could change it by more than 0.001 nats.
    """

    def __init__(self, ref: ModelRef):
        self.ref, self.side = ref, side(ref)
        self.size = len(self.side.beta.values)
        self.rows = self.side.rows or self.size  # of the head; those past `size` are no ids

    @abstractmethod
    def generate(
        self, prompts: list[list[int]], seeds: list[int], sampling: Sampling, advance: Advance = unseen
    ) -> list[Completion]: ...

    @abstractmethod
    def tops(self, prompts: list[list[int]], completions: list[list[int]], k: int) -> Iterator[Top]:
        """Of every completion the actual tokens and the `k` likeliest at each, in order."""

    @abstractmethod
    def stops(self, contexts: list[list[int]]) -> np.ndarray:
        """Log-probs `[contexts, stops]` of all stop ids as the next token."""

    @abstractmethod
    def close(self) -> None: ...

    def score(self, prompts: list[list[int]], completions: list[list[int]], signal: Signal) -> list[TokenScores]:
        assert signal.kind in ("topk", "sampled"), "the recipe is refused before"
        k = min(signal.k, self.rows) if signal.kind == "topk" else 0
        scores, unsure = [], []
        for i, top in enumerate(self.tops(prompts, completions, k)):
            logprobs = top.actual.astype(np.float32)
            if completions[i][-1] in self.side.stop_ids and len(self.side.stop_ids) > 1:
                logprobs[-1], error = self._stop(completions[i][-1], top)
                if error > STOP_ERROR:
                    unsure.append(i)
            scores.append(TokenScores(logprobs, **(self._kept(top, signal) if k else {})))
        if unsure:
            asked = self.stops([prompts[i] + completions[i][:-1] for i in unsure])
            for i, logprob in zip(unsure, np.logaddexp.reduce(asked, axis=1), strict=True):
                scores[i].logprobs[-1] = logprob
        return scores

    def _stop(self, actual: int, top: Top) -> tuple[float, float]:
        """The stop's log-prob from what was returned at the last token, and the most nats that the unknown could add."""
        found = dict(zip(top.ids[-1].tolist(), top.logprobs[-1].tolist(), strict=True)) | {actual: float(top.actual[-1])}
        known = [found[i] for i in self.side.stop_ids if i in found]
        event = np.logaddexp.reduce(known)
        named = np.exp(list(found.values()))
        least = np.exp(top.logprobs[-1, -1]) if top.ids.shape[1] else 1.0
        unknown = min((len(self.side.stop_ids) - len(known)) * least, max(1 - named.sum(), 0.0))
        return float(event), float(np.log1p(unknown / np.exp(event)))

    def _kept(self, top: Top, signal: Signal) -> dict[str, np.ndarray]:
        """The `topk` columns: ids until `top_p` is reached; ids that are none (padded rows of the head) are in the rest."""
        p = np.where(top.ids < self.size, np.exp(top.logprobs.astype(np.float64)), 0.0)
        before = np.cumsum(p, 1) - p
        keep = (before < signal.top_p) & (p > 0)
        returned = np.exp(top.logprobs.astype(np.float64))
        left = (self.rows - top.ids.shape[1]) * returned[:, -1]
        outside = np.minimum(np.maximum(1 - returned.sum(1), SMALLEST_REST), left)
        rest = np.where(keep, 0.0, returned).sum(1) + outside
        with np.errstate(divide="ignore"):
            log_rest = np.log(rest)
        return {
            "top_ids": top.ids[keep].astype(np.int32),
            "top_logprobs": top.logprobs[keep].astype(np.float16),
            "counts": keep.sum(1).astype(np.int16),
            "rest": log_rest.astype(np.float32),
        }

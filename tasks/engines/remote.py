"""Base of the engines that return only the likeliest ids: a server takes ids, and gives no states or whole distributions."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np

from tasks.engines.base import Advance, Completion, Sampling, TokenScores, ignore_progress
from tasks.models.reference import ModelRef
from tasks.models.text import side
from tasks.signals.base import Signal, Top

STOP_ERROR = 1e-3  # nats: largest error of a stop's log-prob from stop ids that were not returned


class RemoteEngine(ABC):
    """An engine whose model runs elsewhere.

    A stop's log-prob is that of the event: the sum over all stop ids. Stop ids that are not among the returned ids are
    requested where they could change it by more than 0.001 nats.
    """

    def __init__(self, ref: ModelRef):
        self.ref, self.side = ref, side(ref)
        self.size = len(self.side.beta.values)
        self.rows = self.side.rows or self.size  # of the head; rows from `size` on are padding

    @abstractmethod
    def generate(
        self, prompts: list[list[int]], seeds: list[int], sampling: Sampling, advance: Advance = ignore_progress
    ) -> list[Completion]: ...

    @abstractmethod
    def tops(self, prompts: list[list[int]], completions: list[list[int]], k: int) -> Iterator[Top]:
        """For each completion, in order: log-probs of its tokens and of the `k` likeliest ids at each."""

    @abstractmethod
    def stops(self, contexts: list[list[int]]) -> np.ndarray:
        """Log-probs `[contexts, stop ids]`, in nats, of every stop id as the next token."""

    @abstractmethod
    def close(self) -> None: ...

    def score(self, prompts: list[list[int]], completions: list[list[int]], signal: Signal) -> list[TokenScores]:
        scores, unsure = [], []
        for i, top in enumerate(self.tops(prompts, completions, min(signal.top, self.rows))):
            logprobs = top.actual.astype(np.float32)
            if completions[i][-1] in self.side.stop_ids and len(self.side.stop_ids) > 1:
                logprobs[-1], error = self._bound_stop(completions[i][-1], top)
                if error > STOP_ERROR:
                    unsure.append(i)
            scores.append(TokenScores(logprobs, signal.store_top(top, self.size, self.rows)))
        if unsure:
            stops = self.stops([prompts[i] + completions[i][:-1] for i in unsure])
            for i, logprob in zip(unsure, np.logaddexp.reduce(stops, axis=1), strict=True):
                scores[i].logprobs[-1] = logprob
        return scores

    def _bound_stop(self, actual: int, top: Top) -> tuple[float, float]:
        """The stop's log-prob from the ids returned at the last token, and the most nats that the other stop ids could add."""
        returned = dict(zip(top.ids[-1].tolist(), top.logprobs[-1].tolist(), strict=True)) | {actual: float(top.actual[-1])}
        known = [returned[i] for i in self.side.stop_ids if i in returned]
        event = np.logaddexp.reduce(known)
        mass = np.exp(list(returned.values()))
        least = np.exp(top.logprobs[-1, -1]) if top.ids.shape[1] else 1.0
        unknown = min((len(self.side.stop_ids) - len(known)) * least, max(1 - mass.sum(), 0.0))
        return float(event), float(np.log1p(unknown / np.exp(event)))

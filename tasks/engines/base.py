"""The interface between a stage and an engine."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from configs.rollout import Rollout
from tasks.signals.base import Signal


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy; log-probs are then those at temperature 1."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    @classmethod
    def of(cls, config: Rollout) -> "Sampling":
        """As a recipe's rollouts are sampled."""
        return cls(config.max_new_tokens, config.temperature, config.top_p, config.top_k)

    @property
    def plain(self) -> bool:
        """Whether the log-probs of samples are the model's at temperature 1 and over all tokens (MATHS.md §7)."""
        return self.temperature in (0, 1) and self.top_p == 1 and not self.top_k


@dataclass(frozen=True)
class Completion:
    """Sampled ids, the stop included, and each one's log-prob in nats under the distribution that it was drawn from."""

    ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class TokenScores:
    """One sequence's scores, over its n completion tokens.

    `logprobs` are float32 `[n]`, in nats, of the actual tokens. A stop token's is that of the event: the sum over all stop
    ids. `columns` are the signal's columns of a scores table: flat, or `[n, width]`.
    """

    logprobs: np.ndarray
    columns: dict[str, np.ndarray] = field(default_factory=dict)


Advance = Callable[[int], object]


def ignore_progress(count: int) -> None:
    """An `advance` that shows nothing."""


class Engine(Protocol):
    """What runs a model. It raises BadInput for a request that can never work, Unavailable for one that may work next time."""

    def generate(
        self, prompts: list[list[int]], seeds: list[int], sampling: Sampling, advance: Advance = ignore_progress
    ) -> list[Completion]:
        """One completion per prompt. It depends on its prompt and seed, not on the other prompts.

        The engine makes its own batches and calls `advance` with the number of completions that each one adds.
        """
        ...

    def score(self, prompts: list[list[int]], completions: list[list[int]], signal: Signal) -> list[TokenScores]:
        """Scores of every completion token given its prompt, one TokenScores per completion, in order."""
        ...

    def close(self) -> None:
        """Release the model and its memory."""
        ...

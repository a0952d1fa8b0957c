"""What a stage asks of an engine, whichever runs the model."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from configs.schema import Rollout
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
        """Whether log-probs of what is drawn are the model's own, at temperature 1 and over all tokens (MATHS.md §7)."""
        return self.temperature in (0, 1) and self.top_p == 1 and not self.top_k


@dataclass(frozen=True)
class Completion:
    """Sampled ids, the stop included, and the log-prob of each under the distribution it was drawn from."""

    ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class TokenScores:
    """One sequence's scores, over its n completion tokens.

    `logprobs` float32 `[n]` of the actual tokens; a stop token's is that of the event: the sum over all stop ids.
    `columns` are those of the signal that was asked for, as a scores table has them: flat, or `[n, width]`.
    """

    logprobs: np.ndarray
    columns: dict[str, np.ndarray] = field(default_factory=dict)


Advance = Callable[[int], object]


def unseen(count: int) -> None:
    """Progress that nobody looks at."""


class Engine(Protocol):
    """What runs a model. Raises BadInput for what it can never do, Unavailable for what may work the next time."""

    def generate(
        self, prompts: list[list[int]], seeds: list[int], sampling: Sampling, advance: Advance = unseen
    ) -> list[Completion]:
        """One completion a prompt. A completion depends on its prompt and seed, not on its neighbours.

        The engine makes its own batches of them: `advance` is told how many more are done.
        """
        ...

    def score(self, prompts: list[list[int]], completions: list[list[int]], signal: Signal) -> list[TokenScores]:
        """Scores of every completion token given its prompt."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...

"""What a stage asks of an engine, whichever runs the model."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy; log-probs are then those at temperature 1."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class Completion:
    """Sampled ids, the stop included, and the log-prob of each under the distribution it was drawn from."""

    ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class TokenScores:
    """One sequence's scores, over its n completion tokens.

    `logprobs` float32 `[n]` of the actual tokens; a stop token's is that of the event: the sum over all stop ids.
    `top_ids` int32 and `top_logprobs` float16, flat, best first, `counts[i]` of them for token i; `rest` float32
    `[n]`, the log of the mass outside them.
    """

    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray
    counts: np.ndarray
    rest: np.ndarray


class Engine(Protocol):
    name: str  # with its version, for keys

    def generate(self, prompts: list[list[int]], seeds: list[int], sampling: Sampling) -> list[Completion]:
        """One completion a prompt. A completion depends on its prompt and seed, not on its neighbours."""
        ...

    def score(self, prompts: list[list[int]], completions: list[list[int]], k: int, top_p: float) -> list[TokenScores]:
        """Scores of every completion token given its prompt; at most `k` ids each, fewer once they hold `top_p`."""
        ...

"""What a stage asks of an engine, whichever runs the model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from configs.schema import Rollout


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


@dataclass(frozen=True)
class Completion:
    """Sampled ids, the stop included, and the log-prob of each under the distribution it was drawn from."""

    ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Signal:
    """What is wanted of a model's distributions beside the actual tokens' log-probs (MATHS.md §6)."""

    kind: Literal["topk", "bytes", "hidden", "sampled"] = "topk"
    k: int = 64  # most events a token
    top_p: float = 1.0  # fewer once they hold this mass


@dataclass(frozen=True)
class TokenScores:
    """One sequence's scores, over its n completion tokens; what the signal does not have is None.

    `logprobs` float32 `[n]` of the actual tokens; a stop token's is that of the event: the sum over all stop ids.
    `top_ids` int32 and `top_logprobs` float16, flat, best first, `counts[i]` of them for token i: token ids (`topk`)
    or next bytes, 256 for the stop (`bytes`); `rest` float32 `[n]`, the log of the mass outside them.
    `hidden` float16 `[n, width]`, the last hidden state that each token was predicted from.
    """

    logprobs: np.ndarray
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
    counts: np.ndarray | None = None
    rest: np.ndarray | None = None
    hidden: np.ndarray | None = None


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

"""What a vLLM server answers: its form, and the numbers in it, which are held to what log-probs and ids can be."""

from collections.abc import Sequence
from typing import Annotated, NotRequired

import numpy as np
from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from tasks.engines.base import Completion
from tasks.signals.base import Top

ROUNDING = 1e-3  # nats that a log-prob may be above 0
MASS = 1e-2  # nats that the likeliest ids' mass may be above 1


Id = Annotated[int, Field(ge=0, lt=2**31)]


class Model(TypedDict):
    id: str
    root: NotRequired[str | None]


class Models(TypedDict):
    data: list[Model]


class Tokens(TypedDict):
    tokens: list[Id]


class Entry(TypedDict):
    logprob: float


class Logprobs(TypedDict):
    token_logprobs: list[float]
    top_logprobs: NotRequired[list[dict[str, float] | None] | None]


class Choice(TypedDict):
    index: int
    token_ids: NotRequired[list[Id] | None]
    prompt_token_ids: NotRequired[list[Id] | None]
    prompt_logprobs: NotRequired[list[dict[Id, Entry] | None] | None]
    logprobs: NotRequired[Logprobs | None]


class Choices(TypedDict):
    choices: list[Choice]


MODELS, TOKENS, CHOICES = TypeAdapter(Models), TypeAdapter(Tokens), TypeAdapter(Choices)


class Wrong(ValueError):
    """What is wrong with an answer that has the right form."""


def read_completion(choice: Choice, *, most: int, size: int) -> Completion:
    """The ids, below `size` and `most` of them at most, and their log-probs. Raises Wrong."""
    ids, logprobs = choice.get("token_ids") or [], _logprobs_of(choice)["token_logprobs"]
    if not 1 <= len(ids) <= most or len(ids) != len(logprobs):
        raise Wrong(f"{len(ids)} ids and {len(logprobs)} log-probs for at most {most} tokens")
    _check_ids(np.array(ids), size)
    _check_logprobs(np.array(logprobs, float))
    return Completion(ids, logprobs)


def read_top(choice: Choice, prompt: Sequence[int], completion: Sequence[int], k: int, *, rows: int) -> Top:
    """The log-probs of a completion's tokens, and of the k likeliest ids at each, below `rows`. Raises Wrong."""
    positions, n = choice.get("prompt_logprobs") or [], len(completion)
    if len(positions) != len(prompt) + n:
        raise Wrong(f"prompt_logprobs for {len(positions)} tokens, of {len(prompt) + n}")
    actual, ids, logprobs = np.empty(n), np.empty((n, k), np.int32), np.empty((n, k))
    for t, (entries, token) in enumerate(zip(positions[-n:], completion, strict=True)):
        by_id = {i: entry["logprob"] for i, entry in (entries or {}).items()}
        if token not in by_id:
            raise Wrong(f"prompt_logprobs without the token itself ({token})")
        actual[t] = by_id[token]
        if len(by_id) > k:
            del by_id[token]  # it is not among the likeliest
        if len(by_id) != k:
            raise Wrong(f"{len(by_id)} ids for a token, where the {k} likeliest were asked for")
        best = sorted(by_id, key=by_id.__getitem__, reverse=True)
        ids[t], logprobs[t] = best, [by_id[i] for i in best]
    _check_ids(ids, rows)
    _check_logprobs(actual)
    _check_logprobs(logprobs)
    if k and n and np.logaddexp.reduce(logprobs, axis=1).max() > MASS:
        raise Wrong("the likeliest ids have more than the whole mass")
    return Top(actual, ids, logprobs)


def read_stops(choice: Choice, stops: Sequence[int]) -> list[float]:
    """The log-prob of each stop as the next token. Raises Wrong."""
    first = next(iter(_logprobs_of(choice).get("top_logprobs") or []), None) or {}
    if missing := [i for i in stops if f"token_id:{i}" not in first]:
        raise Wrong(f"no log-probs for the ids {missing}, which were asked for")
    found = [first[f"token_id:{i}"] for i in stops]
    _check_logprobs(np.array(found))
    return found


def _logprobs_of(choice: Choice) -> Logprobs:
    found = choice.get("logprobs")
    if found is None:
        raise Wrong("no log-probs")
    return found


def _check_ids(ids: np.ndarray, size: int) -> None:
    if len(wrong := ids[ids >= size]):
        raise Wrong(f"id {wrong[0]}, where the vocabulary has {size}")


def _check_logprobs(found: np.ndarray) -> None:
    if len(wrong := found[~(np.isfinite(found) & (found <= ROUNDING))]):
        raise Wrong(f"a log-prob of {wrong[0]}")

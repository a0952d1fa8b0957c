"""Which rows a round has: the prompt, the source and the seed of each, before any of them is made."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from configs.rollout import Rollout
from tasks.running.seeds import derive_seed, derive_uniform

Source = Literal["student", "teacher", "reference"]


@dataclass(frozen=True)
class Row:
    """One rollout to be made."""

    prompt: int  # index in prompts/train
    sample: int
    source: Source
    seed: int
    rollout_id: str
    before: int = 0  # rows of its prompt that came before it, in all rounds


def count_shards(config: Rollout) -> int:
    """How many shards a round has."""
    return -(-config.prompts * config.samples // config.shard_rows)


def teacher_writes(config: Rollout) -> bool:
    """Whether some rows of a round are the teacher's own completions."""
    return config.off_policy == "teacher" and config.on_policy < 1


def plan_rows(config: Rollout, seed: int, number: int, shard: int, prompt_ids: list[str]) -> list[Row]:
    """The rows of a shard. Each epoch, over the rounds, takes the prompts in a new random order."""
    total = config.prompts * config.samples
    rows = []
    for at in range(shard * config.shard_rows, min((shard + 1) * config.shard_rows, total)):
        turn, sample = divmod(at, config.samples)
        epoch, place = divmod((number - 1) * config.prompts + turn, len(prompt_ids))
        prompt = int(_order(seed, epoch, len(prompt_ids))[place])
        key = (seed, number, prompt_ids[prompt], turn, sample)
        source, name = draw_source(config, *key), f"{number:04d}-{turn:06d}-{sample:03d}"
        rows.append(Row(prompt, sample, source, derive_seed("rollout", *key), name, epoch * config.samples + sample))
    return rows


def draw_source(config: Rollout, *key: str | int) -> Source:
    """Where the row of a key comes from: the student with probability λ, `rollout.on_policy`."""
    return "student" if derive_uniform("source", *key) < config.on_policy else config.off_policy


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, prompts: int) -> np.ndarray:
    return np.random.default_rng(derive_seed("order", seed, epoch)).permutation(prompts)

"""The rollout stage: completions of a round, sampled by the current student or taken from elsewhere by λ."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from prefect import task
from prefect.cache_policies import NO_CACHE

from configs.load import content
from configs.schema import Recipe, Rollout
from storage.artifacts import Artifact, read_table
from storage.schemas import ROLLOUTS
from storage.store import Run, part, round_slot
from tasks.engines.base import Completion, Sampling
from tasks.engines.choose import engine, engine_name
from tasks.models import ModelRef, Side, side
from tasks.progress import logger, progress
from tasks.retries import RETRIES
from tasks.seeds import derive, uniform
from tasks.tokens.token_bytes import split_completion

CODE = 1


@dataclass(frozen=True)
class Row:
    """One rollout to be made."""

    prompt: int  # index in prompts/train
    sample: int
    source: str
    seed: int
    rollout_id: str


@task(name="rollouts", task_run_name="rollouts-{number}-{shard}", cache_policy=NO_CACHE, **RETRIES)
def roll_out(
    recipe: Recipe, number: int, shard: int, student: ModelRef, prompts: Artifact, completions: Artifact | None
) -> Artifact:
    """`round=…/rollouts/part-…`: one shard of a round. `completions` are the teacher's, where some rows are its own."""
    run, config = Run(recipe.root, recipe.name), recipe.rollout
    inputs = {
        "stage": "rollouts",
        "code": CODE,
        "engine": engine_name(student),
        "policy": student.identity,
        "completions": completions.digest if completions else None,
        "prompts": prompts.digest,
        "recipe": content(recipe, "rollout"),
        "seed": recipe.seed,
        "round": number,
        "part": shard,
    }

    def make() -> pa.Table:
        table = read_table(prompts)
        rows = plan(config, recipe.seed, number, shard, table["prompt_id"].to_pylist())
        given = read_table(completions).to_pylist() if completions else []
        return rollouts_table(rows, table, config, number, student, given)

    return run.build_table(round_slot(number, "rollouts", part(shard)), inputs, make, logger.info)


def shards(config: Rollout) -> int:
    """How many shards a round has."""
    return -(-config.prompts * config.samples // config.shard_rows)


def uses_teacher(config: Rollout) -> bool:
    return config.off_policy == "teacher" and config.on_policy < 1


def plan(config: Rollout, seed: int, number: int, shard: int, prompt_ids: list[str]) -> list[Row]:
    """The rows of a shard. Prompts are gone through in a new random order each epoch, over the rounds."""
    total = config.prompts * config.samples
    rows = []
    for at in range(shard * config.shard_rows, min((shard + 1) * config.shard_rows, total)):
        turn, sample = divmod(at, config.samples)
        epoch, place = divmod((number - 1) * config.prompts + turn, len(prompt_ids))
        prompt = int(_order(seed, epoch, len(prompt_ids))[place])
        key = (seed, number, prompt_ids[prompt], turn, sample)
        own = uniform("source", *key) < config.on_policy
        source = "student" if own else config.off_policy
        rows.append(Row(prompt, sample, source, derive("rollout", *key), f"{number:04d}-{turn:06d}-{sample:03d}"))
    return rows


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, prompts: int) -> np.ndarray:
    return np.random.default_rng(derive("order", seed, epoch)).permutation(prompts)


def rollouts_table(
    rows: list[Row], prompts: pa.Table, config: Rollout, number: int, student: ModelRef, completions: list[dict[str, Any]]
) -> pa.Table:
    """Fill in the completions of `rows` from where each comes from: the student, references, or the teacher's `completions`."""
    chosen = prompts.take(np.array([row.prompt for row in rows]))
    messages, references = chosen["messages"].to_pylist(), chosen["reference"].to_pylist()
    text_side, name = side(student), engine_name(student)
    rendered = [text_side.render(m) for m in messages]
    sampling = Sampling.of(config)
    made: dict[int, dict[str, Any]] = {}

    own = [i for i, row in enumerate(rows) if row.source == "student"]
    if own:
        with progress(f"round {number} rollouts", len(own)) as advance:
            generator = engine(student, config.batch_size)
            sampled = generator.generate([rendered[i] for i in own], [rows[i].seed for i in own], sampling, advance)
            made = {i: _sampled(completion, text_side) for i, completion in zip(own, sampled, strict=True)}
    written = {completion["rollout_id"]: completion for completion in completions}
    for i, row in enumerate(rows):
        if row.source == "reference":
            made[i] = _given(references[i], True, text_side, config.max_new_tokens)
        elif row.source == "teacher":
            source = written[row.rollout_id]
            made[i] = _given(source["text"], source["finish_reason"] == "stop", text_side, config.max_new_tokens)
            made[i] |= {"policy": source["policy"], "engine": source["engine"]}

    return pa.Table.from_pylist(
        [
            {
                "rollout_id": row.rollout_id,
                "prompt_id": prompt_id,
                "round": number,
                "sample": row.sample,
                "source": row.source,
                "policy": student.digest if row.source == "student" else "",
                "prompt_token_ids": rendered[i],
                "seed": row.seed,
                "engine": name if row.source == "student" else "",
                **made[i],
            }
            for i, (row, prompt_id) in enumerate(zip(rows, chosen["prompt_id"].to_pylist(), strict=True))
        ],
        ROLLOUTS,
    )


def _sampled(completion: Completion, text_side: Side) -> dict[str, Any]:
    stops = set(text_side.stop_ids)
    return {
        "token_ids": completion.ids,
        "logprobs": completion.logprobs,
        "text": split_completion(text_side.beta, completion.ids, stops)[0],
        "finish_reason": "stop" if completion.ids[-1] in stops else "length",
    }


def _given(text: str | None, ended: bool, text_side: Side, limit: int) -> dict[str, Any]:
    """A text that the student did not sample, as it would have had to; cut at the limit like a sample.

    A prompt without a reference, or a text that the tokenizer cannot spell byte for byte, has no ids: the align stage
    drops and counts it.
    """
    ids = None if text is None else text_side.encoder.encode([text])[0]
    if text is None or ids is None:
        return {"token_ids": [], "logprobs": None, "text": text, "finish_reason": "length"}
    ids = [*ids, *text_side.stop_ids[:ended]][:limit]
    stopped = ended and ids[-1] == text_side.stop_ids[0]
    kept = text if stopped else split_completion(text_side.beta, ids, set())[0]
    return {"token_ids": ids, "logprobs": None, "text": kept, "finish_reason": "stop" if stopped else "length"}

"""The evaluation stage: greedy and sampled accuracy on held-out prompts, and the distance to the teacher."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from prefect import task
from prefect.cache_policies import NO_CACHE

from configs.load import content
from configs.schema import Recipe
from storage.artifacts import Artifact, read_table
from storage.schemas import EVALS
from storage.store import Run, round_slot
from tasks.engines.base import Sampling, Signal
from tasks.engines.choose import engine, engine_name
from tasks.models import ModelRef, side
from tasks.progress import logger, progress
from tasks.retries import RETRIES
from tasks.score import teacher_ids
from tasks.scorers import scorer
from tasks.seeds import derive
from tasks.tokens.token_bytes import split_completion

CODE = 1


@task(name="evaluate", task_run_name="evaluate-{number}-{role}", cache_policy=NO_CACHE, **RETRIES)
def evaluate_model(
    recipe: Recipe, number: int, role: str, model: ModelRef, teacher: ModelRef | None, prompts: Artifact
) -> Artifact:
    """`round=…/evals/student` (or `teacher`): completions of the eval prompts, their scores, their divergence."""
    run = Run(recipe.root, recipe.name)
    inputs = {
        "stage": "evals",
        "code": CODE,
        "engine": engine_name(model),
        "teacher_engine": engine_name(teacher) if teacher else None,
        "model": model.identity,
        "teacher": teacher.identity if teacher else None,
        "prompts": prompts.digest,
        "recipe": recipe.evaluate.model_dump(),
        "rollout": content(recipe, "rollout"),
        "seed": recipe.seed,
        "role": role,
        "round": number,
    }

    def make() -> pa.Table:
        rows = read_table(prompts).to_pylist()
        records = completions(recipe, number, role, model, rows)
        if teacher is not None:
            _teacher_logprobs(recipe, records, model, teacher, {row["prompt_id"]: row["messages"] for row in rows})
        return pa.Table.from_pylist(records, EVALS)

    return run.build_table(round_slot(number, "evals", role), inputs, make, logger.info)


def completions(recipe: Recipe, number: int, role: str, model: ModelRef, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One greedy and `evaluate.samples` sampled completions of every prompt, graded."""
    config, text_side = recipe.rollout, side(model)
    stops, score = set(text_side.stop_ids), scorer(recipe.evaluate.scorer)
    rendered = [text_side.render(row["messages"]) for row in rows]
    generator = engine(model, config.batch_size, recipe.score.batch_tokens)
    records = []
    with progress(f"round {number} evaluate {role}", len(rows) * (1 + recipe.evaluate.samples)) as advance:
        for decoding, samples in (("greedy", 1), ("sampled", recipe.evaluate.samples)):
            sampling = replace(Sampling.of(config), temperature=0.0) if decoding == "greedy" else Sampling.of(config)
            for sample in range(samples):
                # The same seeds in every round: the figures differ by the model alone.
                seeds = [derive(recipe.seed, "eval", row["prompt_id"], sample) for row in rows]
                for row, completion in zip(rows, generator.generate(rendered, seeds, sampling, advance), strict=True):
                    text, whole = split_completion(text_side.beta, completion.ids, stops)
                    value = score(text, row)
                    records.append(
                        {
                            "model": role,
                            "round": number,
                            "decoding": decoding,
                            "prompt_id": row["prompt_id"],
                            "sample": sample,
                            "text": text,
                            "reference": row["reference"],
                            "score": value,
                            "correct": value >= 1.0,
                            "finish_reason": "stop" if completion.ids[-1] in stops else "length",
                            "tokens": len(completion.ids),
                            "bytes": len(text.encode()),
                            "logprob": float(np.sum(completion.logprobs, dtype=np.float64)),
                            "token_ids": completion.ids,
                            "whole": whole,
                        }
                    )
    return records


def _teacher_logprobs(
    recipe: Recipe, records: list[dict[str, Any]], model: ModelRef, teacher: ModelRef, messages: dict[str, Any]
) -> None:
    own, other = side(model), side(teacher)
    ids = teacher_ids(records, other, own.vocabulary.same_as(other.vocabulary))
    # A text that is cut before the student's last token has no counterpart on the teacher's side.
    able = [i for i, completion in enumerate(ids) if completion and records[i]["whole"]]
    grader = engine(teacher, recipe.rollout.batch_size, recipe.score.batch_tokens)
    prompts = [other.render(messages[records[i]["prompt_id"]]) for i in able]
    for i, scores in zip(able, grader.score(prompts, [ids[i] or [] for i in able], Signal("sampled")), strict=True):
        record = records[i]
        record["teacher_logprob"] = float(scores.logprobs.sum(dtype=np.float64))
        record["divergence"] = (record["logprob"] - record["teacher_logprob"]) / max(record["bytes"], 1)

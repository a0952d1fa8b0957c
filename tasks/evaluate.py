"""The evaluation stage: greedy and sampled accuracy on held-out prompts, and the divergence from the teacher."""

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from prefect import task
from prefect.cache_policies import NO_CACHE

from configs.load import select_content
from configs.schema import Recipe
from configs.teachers import suffix_of
from storage.artifacts import Artifact, read_table
from storage.lineage import digest_json
from storage.schemas import EVALS, TEACHER, without_teacher
from storage.store import Run, round_slot
from tasks.engines.base import Sampling
from tasks.engines.choose import get_engine
from tasks.engines.names import engine_name
from tasks.models.pair import find_answers, make_markers, marker_inputs, teacher_ids
from tasks.models.reference import ModelRef
from tasks.models.text import side
from tasks.rows.messages import Prompt, load_prompts
from tasks.rows.round import Teachers
from tasks.rows.scorers import is_graded, make_grader
from tasks.rows.teachers import assign_teachers
from tasks.running.progress import logger, progress
from tasks.running.retries import RETRIES
from tasks.running.seeds import derive_seed
from tasks.signals import make_signal
from tasks.tokens.token_bytes import spell_answer, split_completion

CODE = 3


@task(name="evaluate", task_run_name="round {number} · evaluate {role}", cache_policy=NO_CACHE, **RETRIES)
def evaluate_model(
    recipe: Recipe,
    number: int,
    role: Literal["student", "teacher"],
    prompts: Artifact,
    name: str = "",
    *,
    model: ModelRef,
    teachers: Teachers,
) -> Artifact:
    """Make `round=…/evals/student` (or `teacher`): completions of the eval prompts, their scores and their divergence.

    One of several teachers, by its `name`, answers the prompts of its own rows (`evals/teacher-math`). The student's answers
    are held against the teacher that each prompt belongs to.
    """
    run = Run(recipe.root, recipe.name)
    inputs = {
        "stage": "evals",
        "code": CODE,
        "engine": engine_name(model, "sample"),
        **_inputs_of(recipe, prompts, teachers),
        "model": model.identity,
        "prompts": prompts.digest,
        "recipe": select_content(recipe, "evaluate"),
        "rollout": select_content(recipe, "rollout"),
        "seed": recipe.seed,
        "role": role,
        "round": number,
    }
    if teachers and needs_rescoring(recipe, model):
        inputs["divergence"] = "both at temperature 1"
    if teachers and list(teachers.values()) != [model]:
        inputs |= marker_inputs(recipe)
    if not all(is_graded(recipe.evaluate.scorer, row) for row in read_table(prompts, ["reference", "metadata"]).to_pylist()):
        inputs["graded"] = "what has a reference"

    def make() -> pa.Table:
        rows, whose = read_table(prompts).to_pylist(), _owners(recipe, prompts, teachers)
        if name:
            rows = [row for row in rows if row["prompt_id"] in whose]
        records = evaluate_prompts(recipe, number, role, model, rows)
        by_id = dict(zip([row["prompt_id"] for row in rows], load_prompts(rows), strict=True))
        for record in records:
            record[TEACHER] = whose.get(record["prompt_id"], "")
        for other, teacher in teachers.items():
            own = [record for record in records if record[TEACHER] == other]
            _add_teacher_logprobs(recipe.by_teacher()[other], own, by_id, model=model, teacher=teacher)
        return pa.Table.from_pylist(records, EVALS if recipe.teachers else without_teacher(EVALS))

    return run.build_table(round_slot(number, "evals", role) + suffix_of(name), inputs, make, logger.info)


def _inputs_of(recipe: Recipe, prompts: Artifact, teachers: Teachers) -> dict[str, Any]:
    """What of the teachers goes into a key: each with its engine; of several also which prompts are whose."""
    if recipe.teachers:
        told = {name: [ref.identity, engine_name(ref, "score")] for name, ref in teachers.items()}
        return {"teachers": told, "whose": digest_json(_owners(recipe, prompts, teachers))}
    teacher = teachers.get("")
    return {
        "teacher_engine": engine_name(teacher, "score") if teacher else None,
        "teacher": teacher.identity if teacher else None,
    }


def _owners(recipe: Recipe, prompts: Artifact, teachers: Teachers) -> dict[str, str]:
    """The name of the teacher of each prompt that one of `teachers` grades, where the recipe has several."""
    if not recipe.teachers:
        return {}
    ids, names = read_table(prompts, ["prompt_id"])["prompt_id"].to_pylist(), [teacher.name for teacher in recipe.teachers]
    owners = {prompt_id: names[at] for prompt_id, at in zip(ids, assign_teachers(recipe.teachers, prompts), strict=True)}
    return {prompt_id: name for prompt_id, name in owners.items() if name in teachers}


def needs_rescoring(recipe: Recipe, model: ModelRef) -> bool:
    """Whether the log-probs of samples differ from the model's at temperature 1: another law was drawn from, or a stop is one
    of several ids.
    """
    return not Sampling.of(recipe.rollout).plain or len(side(model).stop_ids) > 1


def evaluate_prompts(
    recipe: Recipe, number: int, role: str, model: ModelRef, rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """One greedy and `evaluate.samples` sampled completions of every prompt with their scores, as rows of `evals`."""
    config, text_side = recipe.rollout, side(model)
    stops, grade = set(text_side.stop_ids), make_grader(recipe.evaluate.scorer)
    rendered = [text_side.render(*prompt) for prompt in load_prompts(rows)]
    generator = get_engine(model, config.batch_size, recipe.score.batch_tokens, use="sample")
    records = []
    with progress(f"round {number} evaluate {role}", len(rows) * (1 + recipe.evaluate.samples)) as advance:
        for decoding, samples in (("greedy", 1), ("sampled", recipe.evaluate.samples)):
            sampling = replace(Sampling.of(config), temperature=0.0) if decoding == "greedy" else Sampling.of(config)
            for sample in range(samples):
                # The same seeds in every round, so that figures differ by the model only.
                seeds = [derive_seed(recipe.seed, "eval", row["prompt_id"], sample) for row in rows]
                completions = generator.generate(rendered, seeds, sampling, advance)
                for row, ids, completion in zip(rows, rendered, completions, strict=True):
                    whole = split_completion(text_side.beta, completion.ids, stops)[1]
                    text, answer = spell_answer(text_side.beta, completion.ids, stops)
                    value = grade((text, answer), row)
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
                            "correct": None if value is None else value >= 1.0,
                            "finish_reason": "stop" if completion.ids[-1] in stops else "length",
                            "tokens": len(completion.ids),
                            "bytes": len(text.encode()),
                            "logprob": float(np.sum(completion.logprobs, dtype=np.float64)),
                            "prompt_token_ids": ids,
                            "token_ids": completion.ids,
                            "whole": whole,
                        }
                    )
    return records


def _add_teacher_logprobs(
    recipe: Recipe, records: list[dict[str, Any]], by_id: dict[str, Prompt], *, model: ModelRef, teacher: ModelRef
) -> None:
    """Add `teacher_logprob` and `divergence` to completions of `model`, in nats and nats per byte.

    Log-probs of both models are at temperature 1 and over all tokens, and a stop is one event (MATHS.md §7). Where the model's
    samples were drawn from another law, its log-probs are computed here.
    """
    t_side = side(teacher)
    if needs_rescoring(recipe, model):
        engine = get_engine(model, recipe.rollout.batch_size, recipe.score.batch_tokens)
        prompts, completions = ([record[name] for record in records] for name in ("prompt_token_ids", "token_ids"))
        for record, scored in zip(records, engine.score(prompts, completions, make_signal("sampled")), strict=True):
            record["logprob"] = float(scored.logprobs.sum(dtype=np.float64))
    markers = make_markers(recipe, student=side(model), teacher=t_side)
    ids = teacher_ids(records, student=side(model), teacher=t_side, markers=markers)
    # A text that ends before the student's last token, or lacks one of them, has no counterpart on the teacher's side.
    answers = {} if markers.same else find_answers(records, side(model), markers)
    scorable = [n for n, row in enumerate(ids) if row and records[n]["whole"] and (n not in answers or answers[n].paired)]
    engine = get_engine(teacher, recipe.rollout.batch_size, recipe.score.batch_tokens)
    prompts = [t_side.render(*by_id[records[i]["prompt_id"]]) for i in scorable]
    scores = engine.score(prompts, [ids[i] or [] for i in scorable], make_signal("sampled"))
    for i, scored in zip(scorable, scores, strict=True):
        record = records[i]
        record["teacher_logprob"] = float(scored.logprobs.sum(dtype=np.float64))
        record["divergence"] = (record["logprob"] - record["teacher_logprob"]) / max(record["bytes"], 1)

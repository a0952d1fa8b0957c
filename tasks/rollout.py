"""The rollout stage: completions of a round, sampled by the current student or, by λ, taken from references or the teacher."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from prefect import task
from prefect.cache_policies import NO_CACHE

from configs.load import select_content
from configs.rollout import Rollout
from storage.artifacts import read_table
from storage.schemas import ROLLOUTS, TURNS
from tasks.engines.base import Completion, Sampling
from tasks.engines.choose import get_engine
from tasks.engines.names import engine_name
from tasks.gates.rendering import expect_room
from tasks.models.pair import make_markers, marker_inputs, student_ids
from tasks.models.reference import ModelRef
from tasks.models.text import Side, side
from tasks.rows.messages import prompts_of, reasoning_of
from tasks.rows.plan import Row, plan_rows
from tasks.rows.round import Round, Shard
from tasks.running.progress import logger, progress
from tasks.running.retries import RETRIES
from tasks.signals import make_signal
from tasks.tokens.markers import Markers
from tasks.tokens.token_bytes import split_completion

CODE = 3


@task(name="rollouts", task_run_name="round {round.number} · rollouts · shard {shard.number}", cache_policy=NO_CACHE, **RETRIES)
def roll_out(round: Round, shard: Shard) -> Shard:
    """Make `round=…/rollouts/part-…`: one shard's completions. Rows whose source is the teacher get `shard.completions`."""
    recipe, config = round.recipe, round.recipe.rollout
    inputs = {
        "stage": "rollouts",
        "code": CODE,
        "engine": engine_name(round.student, "sample"),
        "policy": round.student.identity,
        "completions": _digests_of(shard),
        "prompts": round.prompts.digest,
        "recipe": select_content(recipe, "rollout"),
        "seed": recipe.seed,
        "round": round.number,
        "part": shard.number,
        **(marker_inputs(recipe) if shard.completions else {}),
    }

    def make() -> pa.Table:
        prompts = read_table(round.prompts)
        rows = plan_rows(config, recipe.seed, round.number, shard.number, prompts["prompt_id"].to_pylist())
        completions = []
        for pair, written in zip(round.pairs, shard.completions):
            assert pair.teacher is not None
            own, other = side(round.student), side(pair.teacher)
            markers = make_markers(pair.recipe, student=own, teacher=other)
            completions += translate_completions(read_table(written).to_pylist(), student=own, teacher=other, markers=markers)
        return make_rollouts(rows, prompts, config, round.number, round.student, completions)

    return replace(shard, rollouts=round.run.build_table(round.slot("rollouts", shard), inputs, make, logger.info))


def _digests_of(shard: Shard) -> Any:
    """The digest of the teacher's completions; of several teachers a list, and None where there are none."""
    digests = [written.digest for written in shard.completions]
    return digests if len(digests) > 1 else next(iter(digests), None)


def translate_completions(
    rows: list[dict[str, Any]], *, student: Side, teacher: Side, markers: Markers
) -> list[dict[str, Any]]:
    """The teacher's completions with `token_ids` of the student's, None where it cannot spell them, and `whole`: all of it."""
    translated = student_ids(rows, student=student, teacher=teacher, markers=markers)
    return [{**row, "token_ids": ids, "whole": whole} for row, (ids, whole) in zip(rows, translated, strict=True)]


def make_rollouts(
    rows: list[Row], prompts: pa.Table, config: Rollout, number: int, student: ModelRef, completions: list[dict[str, Any]]
) -> pa.Table:
    """Make the completion of each of `rows` from its source: the student, the reference, or the teacher's `completions`.

    Those are as `translate_completions` gives them.
    Returns a table with the columns of `storage.schemas.ROLLOUTS`, in order of `rows`.
    """
    chosen = prompts.take(np.array([row.prompt for row in rows]))
    references = chosen["reference"].to_pylist()
    text_side, name = side(student), engine_name(student, "sample")
    rendered = [text_side.render(*prompt) for prompt in prompts_of(chosen)]
    expect_room("student", student, rendered, config.max_new_tokens)
    sampling = Sampling.of(config)
    filled: dict[int, dict[str, Any]] = {}

    on_policy = [i for i, row in enumerate(rows) if row.source == "student"]
    if on_policy:
        with progress(f"round {number} rollouts", len(on_policy)) as advance:
            generator, seeds = get_engine(student, config.batch_size, use="sample"), [rows[i].seed for i in on_policy]
            sampled = generator.generate([rendered[i] for i in on_policy], seeds, sampling, advance)
            filled = {i: _fields_of_sample(sample, text_side) for i, sample in zip(on_policy, sampled, strict=True)}
        if not sampling.plain:  # reported figures compare both models at temperature 1 (MATHS.md §7)
            scores = generator.score([rendered[i] for i in on_policy], [c.ids for c in sampled], make_signal("sampled"))
            for i, scored in zip(on_policy, scores, strict=True):
                filled[i]["model_logprobs"] = scored.logprobs
    spelled = _spell_references(rows, chosen, text_side)
    turns = chosen.select([name for name in TURNS if name in prompts.column_names]).to_pylist() or [{}] * len(rows)
    by_teacher = {completion["rollout_id"]: completion for completion in completions}
    for i, row in enumerate(rows):
        if row.source == "reference":
            filled[i] = _fields_of_ids(spelled[i], references[i], True, text_side, config.max_new_tokens)
        elif row.source == "teacher":
            completion = by_teacher[row.rollout_id]
            stopped = completion["finish_reason"] == "stop" and completion["whole"]
            ids, text = completion["token_ids"], completion["text"]
            filled[i] = _fields_of_ids(ids, text, stopped, text_side, config.max_new_tokens)
            filled[i] |= {"policy": completion["policy"], "engine": completion["engine"]}
            filled[i] |= {} if completion["policy"] else {"source": "reference"}  # which a cache has, too

    table = pa.Table.from_pylist(
        [
            {
                "rollout_id": row.rollout_id,
                "prompt_id": prompt_id,
                **turns[i],
                "round": number,
                "sample": row.sample,
                "source": row.source,
                "policy": student.digest if row.source == "student" else "",
                "prompt_token_ids": rendered[i],
                "seed": row.seed,
                "engine": name if row.source == "student" else "",
                **filled[i],
            }
            for i, (row, prompt_id) in enumerate(zip(rows, chosen["prompt_id"].to_pylist(), strict=True))
        ],
        ROLLOUTS,
    )
    unused = ["model_logprobs"] * sampling.plain + [name for name in TURNS if name not in prompts.column_names]
    return table.drop_columns(unused)


def _spell_references(rows: list[Row], prompts: pa.Table, text_side: Side) -> list[list[int] | None]:
    """The ids of each reference, with its reasoning where the chat template writes it; None for one that cannot be spelled."""
    references = prompts["reference"].to_pylist()
    spelled = text_side.encoder.encode([text or "" for text in references])
    if "metadata" not in prompts.column_names:
        return spelled
    metadata = prompts["metadata"].to_pylist()
    thought = [i for i, row in enumerate(rows) if row.source == "reference" and references[i] and reasoning_of(metadata[i])]
    left_out = 0
    for i, prompt in zip(thought, prompts_of(prompts.take(pa.array(thought, pa.int64()))), strict=True):
        answer = {"role": "assistant", "content": references[i], "reasoning_content": reasoning_of(metadata[i])}
        ids = text_side.render_answer(*prompt, answer)
        spelled[i], left_out = (spelled[i], left_out + 1) if ids is None else (ids, left_out)
    if left_out:
        logger.warning("%d references have a reasoning_content that the student's chat template does not write", left_out)
    return spelled


def _fields_of_sample(completion: Completion, text_side: Side) -> dict[str, Any]:
    stops = set(text_side.stop_ids)
    return {
        "token_ids": completion.ids,
        "logprobs": completion.logprobs,
        "text": split_completion(text_side.beta, completion.ids, stops)[0],
        "finish_reason": "stop" if completion.ids[-1] in stops else "length",
    }


def _fields_of_ids(ids: list[int] | None, text: str | None, ended: bool, text_side: Side, limit: int) -> dict[str, Any]:
    """A reference or teacher's text in the student's ids, cut at the limit like a sample.

    A missing reference, or a text that the tokenizer cannot spell byte for byte, has no ids: the align stage drops and counts
    its row.
    """
    if text is None or ids is None:
        return {"token_ids": [], "logprobs": None, "text": text, "finish_reason": "length"}
    ids = [*ids, *text_side.stop_ids[:ended]][:limit]
    stopped = ended and ids[-1] == text_side.stop_ids[0]
    kept = split_completion(text_side.beta, ids, set(text_side.stop_ids))[0]
    return {"token_ids": ids, "logprobs": None, "text": kept, "finish_reason": "stop" if stopped else "length"}

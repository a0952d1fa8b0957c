"""The completions stage: the teacher's completions for off-policy rows. They do not depend on the student; runs share them."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
from prefect import task
from prefect.cache_policies import NO_CACHE

from configs.load import select_content
from configs.rollout import Rollout
from storage.artifacts import read_table
from storage.schemas import COMPLETIONS
from tasks.caches.recall import recall_completions
from tasks.engines.base import Advance, Sampling, ignore_progress
from tasks.engines.choose import get_engine
from tasks.engines.names import engine_name
from tasks.gates.rendering import expect_room
from tasks.models.reference import ModelRef
from tasks.models.text import side
from tasks.rows.messages import prompts_of
from tasks.rows.plan import Row, plan_rows
from tasks.rows.round import Round, Shard, teacher_inputs
from tasks.running.progress import logger, progress
from tasks.running.retries import RETRIES
from tasks.tokens.token_bytes import split_completion

CODE = 4


@task(
    name="completions",
    task_run_name="round {round.number} · completions · shard {shard.number}",
    cache_policy=NO_CACHE,
    **RETRIES,
)
def complete_shard(round: Round, shard: Shard) -> Shard:
    """Make `round=…/completions/part-…`: the teacher's completions for those rows of a shard whose source is the teacher.

    Of one of several teachers they are those of its rows, in a table of its own.
    """
    recipe, config, teacher = round.recipe, round.recipe.rollout, round.pair.teacher
    assert teacher is not None
    inputs = {
        "stage": "completions",
        "code": CODE,
        "engine": engine_name(teacher, "sample"),
        "teacher": teacher.identity,
        "prompts": round.prompts.digest,
        "recipe": select_content(recipe, "rollout"),
        "seed": recipe.seed,
        "round": round.number,
        "part": shard.number,
        **teacher_inputs(round),
    }

    def make() -> pa.Table:
        prompts = read_table(round.prompts)
        rows = plan_rows(config, recipe.seed, round.number, shard.number, prompts["prompt_id"].to_pylist())
        own = set(round.own_prompts().tolist())
        rows = [row for row in rows if row.source == "teacher" and row.prompt in own]
        total = len(rows)
        with progress(f"round {round.number} teacher's completions", total) as advance:
            return make_completions(rows, prompts, config, teacher, advance)

    made = round.run.build_table(round.own_slot("completions", shard), inputs, make, logger.info)
    return replace(shard, completions=(*shard.completions, made))


def make_completions(
    rows: list[Row], prompts: pa.Table, config: Rollout, teacher: ModelRef, advance: Advance = ignore_progress
) -> pa.Table:
    """The teacher's completions of those `rows` whose source is the teacher, under its own rendering of the prompts.

    A cache has its texts already.
    """
    if teacher.cached:
        return recall_completions(rows, prompts, teacher)
    planned = [row for row in rows if row.source == "teacher"]
    chosen = prompts.take(np.array([row.prompt for row in planned], np.int64))
    ids = chosen["prompt_id"].to_pylist()
    text_side, generator, records = side(teacher), get_engine(teacher, config.batch_size, use="sample"), []
    rendered = [text_side.render(*prompt) for prompt in prompts_of(chosen)]
    expect_room("teacher", teacher, rendered, config.max_new_tokens)
    name = engine_name(teacher, "sample")
    sampling, stops = Sampling.of(config), set(text_side.stop_ids)
    sampled = generator.generate(rendered, [row.seed for row in planned], sampling, advance)
    for row, prompt_id, completion in zip(planned, ids, sampled, strict=True):
        text, whole = split_completion(text_side.beta, completion.ids, stops)
        finish = "stop" if whole and completion.ids[-1] in stops else "length"
        record = (row.rollout_id, prompt_id, teacher.digest, text, completion.ids, finish, name)
        records.append(dict(zip(COMPLETIONS.names, record, strict=True)))
    return pa.Table.from_pylist(records, COMPLETIONS)

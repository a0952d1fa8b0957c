"""The teacher's own completions, for off-policy rows. No student's tokenizer enters: students share them."""

import numpy as np
import pyarrow as pa
from prefect import task
from prefect.cache_policies import NO_CACHE

from configs.load import content
from configs.schema import Recipe, Rollout
from storage.artifacts import Artifact, read_table
from storage.schemas import COMPLETIONS
from storage.store import Run, part, round_slot
from tasks.engines.base import Advance, Sampling, unseen
from tasks.engines.choose import engine, engine_name
from tasks.models import ModelRef, side
from tasks.progress import logger, progress
from tasks.retries import RETRIES
from tasks.rollout import Row, plan
from tasks.tokens.token_bytes import split_completion

CODE = 2


@task(name="completions", task_run_name="completions-{number}-{shard}", cache_policy=NO_CACHE, **RETRIES)
def complete_shard(recipe: Recipe, number: int, shard: int, teacher: ModelRef, prompts: Artifact) -> Artifact:
    """`round=…/completions/part-…`: what the teacher writes for the rows of a shard that are its own."""
    run, config = Run(recipe.root, recipe.name), recipe.rollout
    inputs = {
        "stage": "completions",
        "code": CODE,
        "engine": engine_name(teacher),
        "teacher": teacher.identity,
        "prompts": prompts.digest,
        "recipe": content(recipe, "rollout"),
        "seed": recipe.seed,
        "round": number,
        "part": shard,
    }

    def make() -> pa.Table:
        table = read_table(prompts, ["prompt_id", "messages"])
        rows = plan(config, recipe.seed, number, shard, table["prompt_id"].to_pylist())
        with progress(f"round {number} teacher's completions", sum(row.source == "teacher" for row in rows)) as advance:
            return completions_table(rows, table, config, teacher, advance)

    return run.build_table(round_slot(number, "completions", part(shard)), inputs, make, logger.info)


def completions_table(
    rows: list[Row], prompts: pa.Table, config: Rollout, teacher: ModelRef, advance: Advance = unseen
) -> pa.Table:
    """The teacher's completions, under its own rendering of the prompts, of those `rows` whose source it is."""
    mine = [row for row in rows if row.source == "teacher"]
    chosen = prompts.take(np.array([row.prompt for row in mine], np.int64))
    ids = chosen["prompt_id"].to_pylist()
    text_side, generator, records = side(teacher), engine(teacher, config.batch_size), []
    rendered = [text_side.render(messages) for messages in chosen["messages"].to_pylist()]
    name = engine_name(teacher)
    sampling, stops = Sampling.of(config), set(text_side.stop_ids)
    made = generator.generate(rendered, [row.seed for row in mine], sampling, advance)
    for row, prompt_id, completion in zip(mine, ids, made, strict=True):
        text, whole = split_completion(text_side.beta, completion.ids, stops)
        finish = "stop" if whole and completion.ids[-1] in stops else "length"
        record = (row.rollout_id, prompt_id, teacher.digest, text, finish, name)
        records.append(dict(zip(COMPLETIONS.names, record, strict=True)))
    return pa.Table.from_pylist(records, COMPLETIONS)

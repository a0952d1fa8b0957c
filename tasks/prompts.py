"""The prompts stage: training and held-out prompts of a run, as committed tables, and what became of every row."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import pyarrow as pa
from prefect import task
from prefect.cache_policies import NO_CACHE

from configs.load import select_content
from configs.schema import Recipe
from storage.artifacts import Artifact, read_table
from storage.store import Run
from tasks.gates.rendering import judge_of, leaves_out
from tasks.models.reference import ModelRef
from tasks.rows.accounts import describe_account
from tasks.rows.round import SplitPrompts
from tasks.rows.sources import deal_prompts, digest_source, field_of, warn_of_few
from tasks.rows.split import Split
from tasks.rows.teachers import check_teachers
from tasks.running.progress import logger

CODE = 3


@task(name="prompts", cache_policy=NO_CACHE)
def make_prompts(recipe: Recipe, sides: Mapping[str, ModelRef] = MappingProxyType({})) -> SplitPrompts:
    """`prompts/train` and `prompts/eval`, disjoint, and `accounts/prompts`. `sides` are the models that are there already."""
    run, config = Run(recipe.root, recipe.name), recipe.prompts
    inputs = {"stage": "prompts", "code": CODE, "recipe": select_content(recipe, "prompts"), "seed": recipe.seed}
    inputs["files"] = digest_source(config)
    if leaves_out(recipe):
        inputs["sides"] = {role: ref.identity for role, ref in sides.items()}
        inputs["max_new_tokens"] = recipe.rollout.max_new_tokens
        if recipe.teachers:
            inputs["teachers"] = [[teacher.name, teacher.where] for teacher in recipe.teachers]
    dealt: list[Split] = []

    def deal() -> Split:
        if not dealt:
            dealt.append(deal_prompts(config, recipe.seed, judge_of(recipe, sides)))
            check_teachers(recipe.teachers, [(row.place, row.fields) for row in (*dealt[0].train, *dealt[0].eval)])
            warn_of_few(config, dealt[0])
        return dealt[0]

    def build(slot: str, table: str, make: Callable[[], pa.Table]) -> Artifact:
        return run.build_table(slot, inputs | {"split": table}, make, logger.info)

    account = build("accounts/prompts", "account", lambda: deal().account())
    train = build("prompts/train", "train", lambda: deal().tables()["train"])
    held_out = build("prompts/eval", "eval", lambda: deal().tables()["eval"])
    for line in describe_account(field_of(config), read_table(account).to_pylist()):
        logger.info(line)
    return SplitPrompts(train=train, eval=held_out)

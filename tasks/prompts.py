"""The prompts stage: training and held-out prompts of a run, as committed tables."""

import pyarrow as pa
from prefect import task
from prefect.cache_policies import NO_CACHE

from configs.schema import FilePrompts, Recipe
from storage.artifacts import Artifact
from storage.lineage import digest_file
from storage.store import Run
from tasks.rows.round import SplitPrompts
from tasks.rows.sources import split_prompts
from tasks.running.progress import logger

CODE = 1


@task(name="prompts", cache_policy=NO_CACHE)
def make_prompts(recipe: Recipe) -> SplitPrompts:
    """`prompts/train` and `prompts/eval`, disjoint."""
    run, config = Run(recipe.root, recipe.name), recipe.prompts
    inputs = {"stage": "prompts", "code": CODE, "recipe": config.model_dump(mode="json"), "seed": recipe.seed}
    if isinstance(config, FilePrompts):
        inputs["file"] = digest_file(config.path)
    tables: dict[str, pa.Table] = {}

    def build(split: str) -> Artifact:
        def make() -> pa.Table:
            if not tables:
                tables.update(split_prompts(config, recipe.seed))
            return tables[split]

        return run.build_table(f"prompts/{split}", inputs | {"split": split}, make, logger.info)

    return SplitPrompts(train=build("train"), eval=build("eval"))

"""The preflight flow: it finds what would make a run fail, or waste its time, before the run starts."""

from typing import Annotated, Any

from prefect import flow
from prefect.artifacts import create_table_artifact
from pydantic import Field

from configs.load import load_recipe
from flows.compute import hold_accelerators
from flows.distill import make_models
from flows.ending import stoppable
from flows.publish import named, slug
from flows.refuse import check_pairs, check_recipe
from tasks.preflight import try_recipe


@flow(name="preflight", flow_run_name=named(lambda recipe, _: f"{recipe.name} · preflight"), validate_parameters=True)
def preflight(
    config: Annotated[str, Field(description="recipe: path of a TOML file")],
    prompts: Annotated[int, Field(ge=1, description="number of prompts to try")] = 64,
    overrides: Annotated[tuple[str, ...], Field(description="recipe fields to set, each as a.b=c")] = (),
) -> list[dict[str, Any]]:
    """The gates of a recipe as rows: `gate`, `value`, `limit`, `result`, `detail`, and `advice` where one is breached.

    Models that another recipe makes are made first, as in the run. Nothing is written into the run's own folder.
    """
    recipe = load_recipe(config, overrides)
    check_recipe(recipe, rendering=False)
    with stoppable(), hold_accelerators(recipe):
        student, teachers = make_models(recipe)
        check_pairs(recipe, student=student, teachers=teachers)
        rows = try_recipe(recipe, prompts, student=student, teachers=teachers)
    create_table_artifact(rows, key=slug(recipe.name, "preflight"))
    return rows

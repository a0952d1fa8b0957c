"""Everything that would make a run fail, or not be worth its time, found before it starts."""

from typing import Annotated, Any

from prefect import flow
from prefect.artifacts import create_table_artifact
from pydantic import Field

from configs.load import load
from flows.compute import exclusive
from flows.distill import check, check_pair, made, slug
from tasks.checks import examine


@flow(name="preflight", validate_parameters=True)
def preflight(
    config: Annotated[str, Field(description="recipe: path of a TOML file")],
    prompts: Annotated[int, Field(ge=1, description="how many prompts to try")] = 64,
    overrides: Annotated[tuple[str, ...], Field(description="recipe fields to set, each as a.b=c")] = (),
) -> list[dict[str, Any]]:
    """The gates of a recipe as rows: `gate`, `found`, `limit`, `verdict`, `detail`, and `advice` where one is breached.

    Models that another recipe makes are made first, as the run would. Of the run itself nothing is written.
    """
    recipe = load(config, overrides)
    check(recipe)
    with exclusive(recipe):
        teacher = made(recipe, recipe.teacher) if recipe.teacher else None
        student = None if recipe.student.scratch else made(recipe, recipe.student)
        check_pair(recipe, student, teacher)
        rows = [gate.record() for gate in examine(recipe, student, teacher, prompts)]
    create_table_artifact(rows, key=slug(recipe.name, "preflight"))
    return rows

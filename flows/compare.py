"""One recipe under several objectives and seeds: the runs, which share what they can, and how they differ."""

from typing import Annotated, Any

from prefect import flow
from prefect.artifacts import create_table_artifact
from pydantic import Field

from configs.errors import BadInput
from configs.load import load
from configs.schema import Recipe
from flows.distill import check, distill, slug
from storage.store import Run
from tasks.compare import compared


@flow(name="compare", validate_parameters=True)
def compare(
    config: Annotated[str, Field(description="recipe: path of a TOML file")],
    objectives: Annotated[tuple[str, ...], Field(description="names, each with options where wanted: gold:merge=sum")],
    seeds: Annotated[tuple[int, ...], Field(description="of the runs of each objective; none: the recipe's own")] = (),
    rounds: Annotated[int | None, Field(ge=1, description="compare after so many rounds; default: the recipe's")] = None,
    overrides: Annotated[tuple[str, ...], Field(description="recipe fields to set, each as a.b=c")] = (),
) -> list[dict[str, Any]]:
    """A row an objective, with its difference to the first one on the same held-out prompts and seeds (tasks/compare.py).

    A run of each objective and seed is made, or gone on with, under the recipe's root; from the second on they take over
    the rollouts and scores of a seed's first round. Every run stays, to be inspected like any other.
    """
    recipe = load(config, overrides)
    variants = planned(config, objectives, seeds, overrides)
    number = recipe.rounds if rounds is None else rounds
    for told in (told for runs in variants.values() for told in runs):
        distill(config, rounds=number, overrides=told)
    made = {name: [_run(config, told).address for told in runs] for name, runs in variants.items()}
    rows = compared(made, number)
    create_table_artifact(rows, key=slug(recipe.name, "compare"), description=f"after round {number}")
    return rows


def planned(
    config: str, objectives: tuple[str, ...], seeds: tuple[int, ...], overrides: tuple[str, ...]
) -> dict[str, list[tuple[str, ...]]]:
    """The overrides of each objective's runs, one a seed. BadInput, before anything is made, where one cannot work."""
    recipe = load(config, overrides)
    seeds = seeds or (recipe.seed,)
    if len(objectives) < 2:
        raise BadInput(f"objectives: {', '.join(objectives) or 'none'}: give two or more to compare, such as bytes,gold")
    for what, given in (("objectives", objectives), ("seeds", seeds)):
        if len(set(given)) < len(given):
            raise BadInput(f"{what}: {', '.join(map(str, given))}: one is there twice; name each once")
    variants = {
        objective: [
            (*overrides, *_told(recipe, objective), f"seed={seed}", f"name={slug(recipe.name, objective)}-seed{seed}")
            for seed in seeds
        ]
        for objective in objectives
    }
    for runs in variants.values():
        for told in runs:
            check(load(config, told))
            _run(config, told).check_free()
    return variants


def _told(recipe: Recipe, objective: str) -> tuple[str, ...]:
    """Overrides that choose an objective: the recipe's own keeps its options, another one has its defaults."""
    name, *options = objective.split(":")
    own = () if name == recipe.objective.name else (f'objective={{name="{name}"}}',)
    return (*own, *(f"objective.{option}" for option in options))


def _run(config: str, told: tuple[str, ...]) -> Run:
    recipe = load(config, told)
    return Run(recipe.root, recipe.name)

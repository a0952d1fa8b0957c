"""One recipe under several objectives and seeds: its runs, which share finished work, and how their students differ."""

from typing import Annotated, Any

from prefect import flow
from prefect.artifacts import create_table_artifact
from pydantic import Field

from configs.errors import BadInput
from configs.load import load_recipe
from configs.schema import Recipe
from flows.compute import keep_loaded
from flows.distill import distill
from flows.ending import starting, stoppable
from flows.publish import named, slug
from flows.refuse import check_recipe
from storage.store import Run
from tasks.views.compare import compare_runs


@flow(
    name="compare",
    flow_run_name=named(lambda recipe, told: f"{recipe.name} · compare {', '.join(told['objectives'])}"),
    validate_parameters=True,
)
def compare(
    config: Annotated[str, Field(description="recipe: path of a TOML file")],
    objectives: Annotated[tuple[str, ...], Field(description="two or more names, with options if any: gold:merge=sum")],
    seeds: Annotated[tuple[int, ...], Field(description="seeds of each objective's runs; empty: the recipe's seed")] = (),
    rounds: Annotated[int | None, Field(ge=1, description="rounds after which to compare; default: the recipe's")] = None,
    overrides: Annotated[tuple[str, ...], Field(description="recipe fields to set, each as a.b=c")] = (),
) -> list[dict[str, Any]]:
    """One row per objective, with its difference to the first on the same held-out prompts and seeds (tasks/views/compare.py).

    Each objective and seed has a run of its own under the recipe's root, which is made or continued. Runs of one seed share
    the rollouts and scores of round 1. Every run stays and can be inspected like any other.
    """
    recipe = load_recipe(config, overrides)
    variants = plan_runs(config, objectives, seeds, overrides)
    number = recipe.rounds if rounds is None else rounds
    with keep_loaded():  # they share a teacher
        for variant in (variant for runs in variants.values() for variant in runs):
            with stoppable(), starting():
                distill(config, rounds=number, overrides=variant)
    rows = compare_runs({name: [_open_run(config, v).address for v in runs] for name, runs in variants.items()}, number)
    units = "difference: of accuracy; divergence: nats per byte; seconds: of training"
    create_table_artifact(rows, key=slug(recipe.name, "compare"), description=f"after round {number} ({units})")
    return rows


def plan_runs(
    config: str, objectives: tuple[str, ...], seeds: tuple[int, ...], overrides: tuple[str, ...]
) -> dict[str, list[tuple[str, ...]]]:
    """The overrides of each objective's runs, one tuple per seed. Raises BadInput where a run cannot work; writes nothing."""
    recipe = load_recipe(config, overrides)
    seeds = seeds or (recipe.seed,)
    if len(objectives) < 2:
        raise BadInput(f"objectives: {', '.join(objectives) or 'none'}: give two or more to compare, such as bytes,gold")
    for what, values in (("objectives", objectives), ("seeds", seeds)):
        if len(set(values)) < len(values):
            raise BadInput(f"{what}: {', '.join(map(str, values))}: one of them is there twice; name each once")
    variants = {
        objective: [(*overrides, *_override_objective(recipe, objective), *_override_run(recipe, objective, s)) for s in seeds]
        for objective in objectives
    }
    for runs in variants.values():
        for variant in runs:
            check_recipe(load_recipe(config, variant))
            _open_run(config, variant).check_free()
    return variants


def _override_objective(recipe: Recipe, objective: str) -> tuple[str, ...]:
    """Overrides that choose an objective. The recipe's objective keeps its options; another one starts from its defaults."""
    name, *options = objective.split(":")
    chosen = () if name == recipe.objective.name else (f'objective={{name="{name}"}}',)
    return (*chosen, *(f"objective.{option}" for option in options))


def _override_run(recipe: Recipe, objective: str, seed: int) -> tuple[str, ...]:
    return (f"seed={seed}", f"name={slug(recipe.name, objective)}-seed{seed}")


def _open_run(config: str, overrides: tuple[str, ...]) -> Run:
    recipe = load_recipe(config, overrides)
    return Run(recipe.root, recipe.name)

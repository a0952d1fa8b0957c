"""The rounds: each samples from the student that the last one trained."""

import re
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, runtime
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from pydantic import Field

from configs.errors import BadInput
from configs.load import load
from configs.objectives import Gkd
from configs.schema import Compute, Model, Recipe
from flows.compute import check_compute, exclusive, in_time, shard_runner
from storage.artifacts import Artifact
from storage.store import Run, round_slot
from tasks.align import align_shard
from tasks.completions import complete_shard
from tasks.engines.choose import check_engine
from tasks.evaluate import evaluate_model
from tasks.gates import check_lead, check_round
from tasks.lora import check_lora
from tasks.models import ModelRef, check_machine, check_weights, reference, side
from tasks.processes import check_processes
from tasks.progress import logger
from tasks.prompts import check_prompts, make_prompts
from tasks.report import write_report
from tasks.rollout import roll_out, shards, uses_teacher
from tasks.rounds import markdown, records, rounds_table
from tasks.score import score_shard
from tasks.scorers import check_scorer
from tasks.scratch import make_scratch
from tasks.signals import keep_head
from tasks.train import train_round
from tasks.vocab import match_vocabularies


def _flow_run_name() -> str:
    return f"distill-{Path(runtime.flow_run.parameters['config']).stem}"


@flow(name="distill", flow_run_name=_flow_run_name, validate_parameters=True)
def distill(
    config: Annotated[str, Field(description="recipe: path of a TOML file")],
    rounds: Annotated[int | None, Field(ge=0, description="go on until the run has so many; default: the recipe's")] = None,
    at_most: Annotated[int | None, Field(ge=1, description="add at most so many rounds now; for a schedule")] = None,
    overrides: Annotated[tuple[str, ...], Field(description="recipe fields to set, each as a.b=c")] = (),
) -> dict[str, Any]:
    """Run, or go on with, the run of a recipe. What is committed is not made again; a complete run is left as it is."""
    recipe = load(config, overrides)
    check(recipe)
    nested = runtime.flow_run.parent_flow_run_id is not None  # a model that two runs need is made by one of them
    with exclusive(recipe), Run(recipe.root, recipe.name).lock(logger.info, wait=nested):
        return _distill(recipe, rounds, at_most)


def _distill(recipe: Recipe, rounds: int | None, at_most: int | None) -> dict[str, Any]:
    run = Run(recipe.root, recipe.name)
    teacher = made(recipe, recipe.teacher) if recipe.teacher else None
    given = None if recipe.student.scratch else made(recipe, recipe.student)
    check_pair(recipe, given, teacher)
    run.freeze(recipe)

    done = run.rounds_done()
    target = recipe.rounds if rounds is None else rounds
    if at_most is not None:
        target = min(target, done + at_most)
    prompts = make_prompts(recipe)
    student = given or _checkpoint(recipe.student, make_scratch(recipe, prompts["train"]))
    vocab = match_vocabularies(recipe, student, teacher)
    first = in_time(recipe.compute, evaluate_model, recipe, 0, "student", student, teacher, prompts["eval"])
    if teacher is not None:
        check_lead(
            recipe, in_time(recipe.compute, evaluate_model, recipe, 0, "teacher", teacher, teacher, prompts["eval"]), first
        )

    bar = create_progress_artifact(100 * done / max(target, done, 1), key=slug(recipe.name, "progress"))
    base, trainer = student, None
    for number in range(1, target + 1):
        compute = recipe.compute if number > done else Compute()  # what is committed is only looked up
        trained = _round(recipe, compute, number, student, teacher, prompts, vocab, trainer, base)
        student, trainer = _checkpoint(recipe.student, trained["student"]), trained["trainer"]
        in_time(compute, evaluate_model, recipe, number, "student", student, teacher, prompts["eval"])
        if number > done:
            table = rounds_table(run.address)
            create_table_artifact(records(table), key=slug(recipe.name, "rounds"), description=f"after round {number}")
            update_progress_artifact(bar, 100 * number / target)  # type: ignore[arg-type]
            logger.info("round %d: %s", number, _headline(records(table)[-1]))
    table = rounds_table(run.address)
    create_markdown_artifact(markdown(table, run.address), key=slug(recipe.name, "summary"))
    if target > done:
        create_link_artifact(write_report(run), link_text="report", key=slug(recipe.name, "report"))
    last = run.find(round_slot(target, "student"))
    student_at = last.path if last else student.path
    return {"run": run.address, "rounds": run.rounds_done(), "student": student_at, "table": records(table)}


def _round(
    recipe: Recipe,
    compute: Compute,
    number: int,
    student: ModelRef,
    teacher: ModelRef | None,
    prompts: dict[str, Artifact],
    vocab: dict[str, Artifact],
    trainer: Artifact | None,
    base: ModelRef,
) -> dict[str, Artifact]:
    """One round: rollouts, scores, alignment, training; stage by stage, so that one model is loaded at a time."""
    parts = range(shards(recipe.rollout))
    written: list[Artifact | None] = [None for _ in parts]
    scores: list[Artifact | None] = [None for _ in parts]
    head: Artifact | None = None
    with shard_runner(compute) as each:
        if teacher is not None and uses_teacher(recipe.rollout):
            written = [*each(complete_shard, [(recipe, number, p, teacher, prompts["train"]) for p in parts])]
        rollouts = each(roll_out, [(recipe, number, p, student, prompts["train"], written[p]) for p in parts])
        if teacher is not None and recipe.objective.name != "sft":
            graded = [(recipe, number, p, student, teacher, prompts["train"], rollouts[p]) for p in parts]
            scores = [*each(score_shard, graded)]
            if recipe.score.signal == "hidden":
                head = keep_head(recipe, teacher)
        aligned = each(align_shard, [(recipe, number, p, student, teacher, vocab, rollouts[p], scores[p], head) for p in parts])
    check_round(recipe, number, student, rollouts, aligned)
    return in_time(compute, train_round, recipe, number, student, teacher, rollouts, aligned, trainer, base)


def made(recipe: Recipe, config: Model) -> ModelRef:
    """The model that `config` names; one that another recipe makes is made first, by the same flow."""
    if config.recipe is None:
        assert config.model is not None
        return reference(config, config.model)
    overrides = inherited(recipe, config.recipe)
    maker = load(config.recipe, overrides)
    distill(config.recipe, overrides=overrides)
    checkpoint = Run(maker.root, maker.name).find(round_slot(maker.rounds, "student"))
    assert checkpoint is not None
    return _checkpoint(config, checkpoint)


def inherited(recipe: Recipe, path: str) -> tuple[str, ...]:
    """What a recipe that makes a model takes from the one that asks for it: the root and the seed."""
    name = load(path).name
    return (f"name={name}-seed{recipe.seed}", f'root="{recipe.root}"', f"seed={recipe.seed}")


def _checkpoint(config: Model, made: Artifact) -> ModelRef:
    return reference(config, made.path, made.digest)


def check(recipe: Recipe, above: tuple[str, ...] = ()) -> None:
    """Refuse what cannot work before anything is written: the run's folder, the prompts, models that exist already.

    `above` are the recipes that ask for this one's model.
    """
    Run(recipe.root, recipe.name).check_recipe(recipe)
    config: Model | None
    for role in ("student", "teacher") if recipe.compute.runner == "local" else ():
        if (config := getattr(recipe, role)) is not None and config.engine != "server":
            check_machine(role, config)
    check_processes(recipe)
    check_compute(recipe.compute)
    check_scorer(recipe.evaluate)
    scratch = recipe.student.scratch
    check_prompts(recipe.prompts, recipe.seed, references=scratch is not None and scratch.tokenizer_text == "references")
    found: dict[str, ModelRef] = {}
    for role in ("student", "teacher"):
        config = getattr(recipe, role)
        if config is not None and config.recipe is not None:
            if config.recipe in above:
                raise BadInput(f"{role}.recipe: {config.recipe} asks for itself; name a recipe that makes its own model")
            check(load(config.recipe, inherited(recipe, config.recipe)), (*above, config.recipe))
        if config is not None and config.model is not None:
            found[role] = ref = reference(config, config.model)
            if config.engine != "server":
                check_weights(ref)
            if config.lora is not None:
                check_lora(ref, config.lora)
    check_pair(recipe, found.get("student"), found.get("teacher"))


def check_pair(recipe: Recipe, student: ModelRef | None, teacher: ModelRef | None) -> None:
    """Refuse models that exist but do not fit the recipe or each other; None where a model is still to be made."""
    for ref in (student, teacher):
        if ref is not None:
            side(ref).encoder.check(ref.path)
            check_engine(ref)
    if teacher is not None and recipe.score.signal in ("topk", "hidden") and recipe.score.k > side(teacher).vocabulary.size:
        raise BadInput(
            f"score.k = {recipe.score.k} is more than the {side(teacher).vocabulary.size} ids "
            f"of the teacher's vocabulary ({teacher.path}); set score.k to at most that"
        )
    if student is None or teacher is None or not isinstance(recipe.objective, Gkd):
        return
    if not side(student).vocabulary.same_as(side(teacher).vocabulary):
        raise BadInput(
            f"objective.name = 'gkd' needs one tokenizer on both sides; those of {student.path} and {teacher.path} differ; "
            "choose objective.name = 'bytes' or 'gold'"
        )


def _headline(row: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {row[key]}" for key in ("sampled", "greedy", "recovered", "divergence") if row.get(key) is not None
    )


def slug(*parts: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")

"""The start of a run: what is known of it without a model, a server or a look at what is committed."""

import posixpath
from pathlib import Path
from typing import Any

from configs.load import inherit_overrides, load_recipe
from configs.models import STUDENT, Model
from configs.prompts import CachePrompts, FilePrompts
from configs.schema import Recipe
from configs.teachers import role_of
from flows.track import Trackers
from storage.artifacts import Artifact
from storage.caches import list_files
from storage.lineage import digest_code, digest_json, versions
from storage.manifests import describe_clearing
from storage.receipt import files_hold, inputs_hold, read_receipt, trust_inputs, write_receipt
from storage.store import Run, round_slot
from tasks.engines.names import engine_name
from tasks.models.files import find_hub_commit, find_model_files
from tasks.rows.files import find_files
from tasks.rows.scorers import check_scorer
from tasks.rows.sources import check_prompts, field_of
from tasks.running.progress import logger
from tasks.views.rounds import tabulate_rounds


def models_of(recipe: Recipe) -> dict[str, Model]:
    """The models of a recipe by role: `student`, `teacher`, or each of several as `teachers.math`."""
    teachers = [view.teacher for view in recipe.by_teacher().values()]
    return {"student": recipe.student} | {role_of(teacher): teacher for teacher in teachers if teacher is not None}


def check_data(recipe: Recipe) -> None:
    """Refuse a run's folder, prompts or a scorer that cannot work. Needs no model library."""
    Run(recipe.root, recipe.name).check_recipe(recipe)
    check_scorer(recipe.evaluate)
    scratch = recipe.student.scratch
    needed = scratch is not None and scratch.tokenizer_text == "references"
    templates = {f"{role}.template": config.template for role, config in models_of(recipe).items() if config.template}
    check_prompts(recipe.prompts, recipe.seed, references=needed, templates=templates, teachers=recipe.teachers)


def announce(config: Path, recipe: Recipe, rounds: int | None) -> None:
    """Log what is about to be run, where, and how much of it is committed."""
    run, target = Run(recipe.root, recipe.name), recipe.rounds if rounds is None else rounds
    if run.frozen_recipe() is None:
        logger.info("%s: a new run of %d round%s in %s", config, target, "s" * (target != 1), run.address)
    else:
        logger.info("%s: %d of %d rounds are committed in %s", config, min(run.rounds_done(), target), target, run.address)


def find_result(recipe: Recipe, rounds: int | None) -> dict[str, Any] | None:
    """What the flow would return; None where something is to be made, or where that is not known without a closer look."""
    run, target = Run(recipe.root, recipe.name), recipe.rounds if rounds is None else rounds
    settled = count_settled(recipe)
    if settled is None or settled < target or (student := run.find(round_slot(target, "student"))) is None:
        return None
    return describe_result(run, student) if Trackers(run, recipe).have(target) else None


def describe_result(run: Run, student: Artifact) -> dict[str, Any]:
    """What the flow returns: the run, its rounds, the last student and the table of rounds."""
    table = tabulate_rounds(run.address)
    cleared = describe_clearing(run.manifest(posixpath.relpath(student.path, run.address)))
    described = f"{student.path}, which was {cleared}" if cleared else student.path
    return {"run": run.address, "rounds": run.rounds_done(), "student": described, "table": table}


def count_settled(recipe: Recipe) -> int | None:
    """How many rounds were found whole under this very recipe, code and input, and have not changed since.

    None where something has changed, and all is to be looked up again.
    """
    run = Run(recipe.root, recipe.name)
    if (receipt := read_receipt(run)) is None:
        return None
    trust_inputs(receipt)
    made_from = describe_source(recipe)
    whole = made_from == receipt.made_from and inputs_hold(receipt, find_inputs(recipe)) and files_hold(receipt, run)
    return min(receipt.rounds, run.rounds_done()) if whole else None


def settle(recipe: Recipe, rounds: int) -> None:
    """Keep that so many rounds were found or made whole."""
    if (made_from := describe_source(recipe)) is not None:
        write_receipt(Run(recipe.root, recipe.name), made_from, rounds, find_inputs(recipe))


def describe_source(recipe: Recipe) -> str | None:
    """The digest of all that the keys of a run follow from but the files of `find_inputs`; None where it is not known."""
    models: dict[str, Any] = {}
    for role, config in models_of(recipe).items():
        content = None
        if config.recipe is not None:
            maker = load_recipe(config.recipe, inherit_overrides(recipe, config.recipe))
            settled, made = count_settled(maker), Run(maker.root, maker.name).find(round_slot(maker.rounds, "student"))
            if settled is None or settled < maker.rounds or made is None:
                return None
            content = made.digest
        elif config.cache is not None and not Path(config.cache).exists():
            content = find_hub_commit(config.cache, "cache.json", "dataset")
            if content is None:
                return None
        elif config.model not in (None, STUDENT) and not Path(config.model).exists():
            content = find_hub_commit(config.model)
            if content is None:
                return None
        models[role] = [engine_name(config, "sample"), engine_name(config, "score"), content]
    content_of_recipe = recipe.model_dump(mode="json", exclude={"root"})  # a run may be moved
    return digest_json([content_of_recipe, models, digest_code(), versions()])


def find_inputs(recipe: Recipe) -> list[Path]:
    """The files that a recipe names: prompts, models, chat templates. Those of a model's recipe are that recipe's."""
    files = [path for config in models_of(recipe).values() for path in find_model_files(config)]
    if isinstance(recipe.prompts, FilePrompts):
        field = field_of(recipe.prompts)
        files += [path for entry in recipe.prompts.entries for path in find_files(entry.path, field)]
    if isinstance(recipe.prompts, CachePrompts):
        files += list_files(recipe.prompts.dataset)
    return files

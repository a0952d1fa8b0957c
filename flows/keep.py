"""What of a run's complete rounds is cleared, by the recipe's `[keep]`: after each round, and by `potstill clean`."""

import os
import re
from pathlib import Path

from configs.keep import ALL, BEST, CLEARED, Keep
from configs.schema import Recipe
from storage.clearing import clear, recipes_beside
from storage.manifests import describe_clearing
from storage.store import Run, round_slot
from tasks.running.progress import logger
from tasks.views.rounds import find_best, summarise_rounds


def clear_rounds(run: Run, recipe: Recipe) -> None:
    """Clear what the recipe does not keep of the complete rounds. The caller holds the run's lock."""
    clear(run, plan_clearing(run, recipe, recipe.keep), logger.info)


def stays(run: Run, slot: str, *made_from: str) -> bool:
    """Whether what is committed at `slot` stays as it is, whatever its stage would make now: some of what it was made from is
    cleared, and nothing follows from it.
    """
    return run.find(slot) is not None and any(describe_clearing(run.manifest(source)) for source in made_from)


def plan_clearing(run: Run, recipe: Recipe, keep: Keep) -> dict[str, str]:
    """What `keep` does not keep: the slots, each with the reason why. Nothing that is cleared already is among them.

    Nothing of a round that is not complete, nor what the next round starts from, nor the recipe's result, nor a student that
    another run's recipe under the root names.
    """
    done, planned = run.rounds_done(), dict[str, str]()
    manifests = {slot: manifest for slot, manifest in run.manifests() if not manifest.get("cleared")}
    for field, tables in CLEARED.items():
        value = getattr(keep, field)
        kept = choose_rounds(run, recipe, value, done)
        if field == "students":
            kept |= {done, recipe.rounds} | find_named(run)
        for number in (number for number in range(1, done + 1) if number not in kept):
            for slot in manifests:
                if any(slot == place or slot.startswith(f"{place}/") for place in (round_slot(number, t) for t in tables)):
                    planned[slot] = f'keep.{field} = "{value}"' if isinstance(value, str) else f"keep.{field} = {value}"
    return planned


def choose_rounds(run: Run, recipe: Recipe, value: int | str, done: int) -> set[int]:
    """The complete rounds that a value of `[keep]` keeps. Where no round is the best one by any figure, all."""
    if value == BEST and (best := find_best(summarise_rounds(run.address), recipe.evaluate.best)) is not None:
        return {best}
    return set(range(1, done + 1)) if value in (ALL, BEST) else set(range(done - int(value) + 1, done + 1))


def find_named(run: Run) -> set[int]:
    """The rounds whose students the recipes of other runs under the root name as a model by their folders."""
    here, found = Path(os.path.realpath(run.path)), set[int]()
    for recipe in recipes_beside(run):
        teachers = [view.teacher and view.teacher.model for view in recipe.by_teacher().values()]
        for model in (recipe.student.model, *teachers):
            place = Path(os.path.realpath(model or ""))  # of a stranger's recipe, too: a loop of links is no error here
            if place.is_relative_to(here) and (number := re.match(r"round=(\d+)", str(place.relative_to(here)))):
                found.add(int(number[1]))
    return found

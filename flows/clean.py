"""`potstill clean`: what of a run is not to be kept, how much it is, and to clear it."""

import sys

from pydantic import ValidationError

from configs.errors import BadInput
from configs.keep import Keep
from flows.options import Flag
from flows.terminal import log_plainly, print_line, print_table


def clean(
    run: str,
    *,
    students: str | None = None,
    trainers: str | None = None,
    rollouts: str | None = None,
    scores: str | None = None,
    yes: Flag = False,
) -> None:
    """Show what of a run's complete rounds is not kept by its recipe's [keep], and clear it after a question.

    What the next round starts from always stays. Of what is cleared the manifests stay, for lineage.

    Parameters
    ----------
    run
        A run's folder or URI, such as runs/quickstart.
    students
        In place of keep.students: all, best, or of how many rounds, from the newest.
    trainers
        In place of keep.trainers: all, or of how many rounds.
    rollouts
        In place of keep.rollouts: all, or of how many rounds.
    scores
        In place of keep.scores: all, or of how many rounds.
    yes
        Clear it without a question.
    """
    log_plainly()
    from flows.keep import plan_clearing
    from storage.clearing import clear, list_clearable, place_of, word_bytes
    from tasks.running.progress import logger
    from tasks.views.inspect import check_run, open_run

    check_run(run)
    here = open_run(run)
    recipe = here.frozen_recipe()
    assert recipe is not None
    keep = override(recipe.keep, students=students, trainers=trainers, rollouts=rollouts, scores=scores)
    here.check_free()
    found = list_clearable(here, plan_clearing(here, recipe, keep))
    places: dict[tuple[str, str], int] = {}
    for each in found:
        place = (place_of(each.slot), each.why)
        places[place] = places.get(place, 0) + each.bytes
    rows = [{"artifact": place, "frees": word_bytes(size), "why": why} for (place, why), size in places.items()]
    print_table(f"Not to be kept of {here.address}", rows)
    total = word_bytes(sum(places.values()))
    if found and (yes or agree(f"Clear these {total}? [y/N] ")):
        with here.lock(logger.info):
            clear(here, plan_clearing(here, recipe, keep), logger.info)
    elif found:
        print_line(f"Nothing was cleared; --yes clears these {total}")


def override(keep: Keep, **given: str | None) -> Keep:
    """`keep` with what the options say. Raises BadInput for the option that says neither a word that it knows nor a number."""
    values = {name: int(value) if value.isdecimal() else value for name, value in given.items() if value is not None}
    try:
        return Keep.model_validate({**keep.model_dump(), **values})
    except ValidationError as error:
        wrong = error.errors()[0]
        raise BadInput(f"--{wrong['loc'][0]}: {wrong['msg'].removeprefix('Value error, ')}") from None


def agree(question: str) -> bool:
    """The answer to a question, on a terminal; elsewhere no."""
    if not sys.stdin.isatty():
        return False
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False

"""`potstill push`: a round's student and its model card, sent to the Hugging Face Hub in one commit."""

import os
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from configs.errors import BadInput, Unavailable
from storage.artifacts import local_folder
from storage.lineage import files_below
from storage.manifests import describe_clearing
from storage.store import Run, round_slot
from tasks.views.card import FILE, render_card
from tasks.views.inspect import check_run, open_run
from tasks.views.rounds import find_best, summarise_rounds
from tasks.views.trace import refuse_damage


def push_student(address: str, repo: str, *, number: int | None = None, best: bool = False, public: bool = False) -> str:
    """Send a student of the run at `address` to `repo`, which is made where it is missing. Returns the commit's address.

    The round is `number`, with `best` the one that the recipe's `evaluate.best` names, else the last. The token is HF_TOKEN.
    Raises BadInput for what the user can mend, and Unavailable where the Hub does not answer.
    """
    check_run(address)
    run, token = open_run(address), os.environ.get("HF_TOKEN")
    if not token:
        raise BadInput("HF_TOKEN is not set: give a token that may write, from https://huggingface.co/settings/tokens")
    with refuse_damage(address):
        number = choose_round(run, number, best=best)
    slot = round_slot(number, "student")
    if problem := run.find_damage(slot):
        raise BadInput(f"{run.path}: {slot}: {problem}; the `potstill run` command that made the run makes it again")
    if cleared := describe_clearing(run.manifest(slot)):
        there = [n for n in range(1, run.rounds_done() + 1) if not describe_clearing(run.manifest(round_slot(n, "student")))]
        raise BadInput(f"{run.path}: {slot} was {cleared}; give a --round whose student is there: {', '.join(map(str, there))}")
    checkpoint = run.find(slot)
    assert checkpoint is not None
    root = Path(local_folder(checkpoint))
    files = files_below(root)
    if run.local:
        check_inside(Path(run.path), files)
    weights = [CommitOperationAdd(file.relative_to(root).as_posix(), file) for file in files]
    api = HfApi(token=token, library_name="potstill")
    try:
        name = api.create_repo(repo, private=not public, exist_ok=True).repo_id
    except Exception as error:
        raise _explain_failure(repo, api.endpoint, error) from None
    with refuse_damage(address):
        card = CommitOperationAdd(FILE, render_card(run, number, where=name).encode())
    try:
        commit = api.create_commit(name, [card, *weights], commit_message=f"{run.name}: the student of round {number}")
    except Exception as error:
        raise _explain_failure(name, api.endpoint, error) from None
    return commit.commit_url


def check_inside(folder: Path, files: list[Path]) -> None:
    """Raise BadInput where a file is a link out of `folder`: what a stranger's run links to is not handed on."""
    whole = folder.resolve()
    for file in files:
        if not (target := file.resolve()).is_relative_to(whole):
            raise BadInput(f"{file}: leads to {target}, out of {folder}, so it is not sent; put a copy in its place")


def choose_round(run: Run, number: int | None, *, best: bool) -> int:
    """The round that is asked for. Raises BadInput where the run does not have it."""
    recipe, done = run.frozen_recipe(), run.rounds_done()
    assert recipe is not None
    if best and number is not None:
        raise BadInput(f"--round {number} and --best: give one of them")
    if not done:
        raise BadInput(f"{run.path}: no round is complete yet; continue the run first")
    if best:
        number = find_best(summarise_rounds(run.address), recipe.evaluate.best)
        if number is None:
            raise BadInput(f"--best: no round has the figure that evaluate.best = '{recipe.evaluate.best}' names; give --round")
    number = done if number is None else number
    if not 1 <= number <= done:
        raise BadInput(f"--round {number}: the run has rounds 1 to {done}")
    return number


def _explain_failure(repo: str, endpoint: str, error: Exception) -> Exception:
    """What the Hub said, or the network. Its client's errors share no base; of an upload's the cause is the one that tells."""
    error = error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception) else error
    if isinstance(error, HFValidationError):
        return BadInput(f"{repo}: not the name of a repository ({error}); give one such as user/my-student")
    if isinstance(error, OfflineModeIsEnabled):
        return BadInput("HF_HUB_OFFLINE is set, so nothing is sent: unset it for this command")
    if not isinstance(error, HfHubHTTPError):
        return Unavailable(f"{repo}: not sent to {endpoint} ({type(error).__name__}: {error}); check the network")
    status = error.response.status_code
    said = (error.server_message or str(error)).strip().splitlines()[0]
    if status == 401:
        return BadInput(f"{repo}: the Hub does not take this token ({said}); set HF_TOKEN to one that may write")
    if status == 429 or status >= 500:
        return Unavailable(f"{repo}: {endpoint} answers with status {status} ({said})")
    return BadInput(f"{repo}: refused by the Hub ({status}: {said}); give a repository that this token may write to")

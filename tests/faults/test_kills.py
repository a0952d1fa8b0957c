"""kill -9 at any moment: the finished run equals an unbroken one, and nothing committed is made twice."""

import os
import random
import shutil
import signal
from pathlib import Path

import pytest
from killing import (
    TINY,
    TWO,
    Stamp,
    Tally,
    arguments,
    committed,
    damages,
    digests,
    halves,
    kill_and_go_on,
    moments,
    redone,
    steps,
    unbroken,
)

KILLS = int(os.environ.get("POTSTILL_KILLS", "4"))
SEED = 20
KEEP = ("rounds=3", "keep.students=1", "keep.trainers=1", "keep.rollouts=1", "keep.scores=1")
# `potstill` that kills itself before the n-th change of a file in its clearing. Audit events come before what they tell of.
KILLED_CLEARING = """
import os, signal, sys
import flows.distill
left, clearing, clear_rounds = int(sys.argv.pop(1)), False, flows.distill.clear_rounds

def count(event, details):
    global left
    if clearing and (event in CHANGES or (event == "open" and details[2] & os.O_CREAT)):
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

def watched(*arguments):
    global clearing
    clearing = True
    clear_rounds(*arguments)
    clearing = False

CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir")
flows.distill.clear_rounds = watched
sys.addaudithook(count)
from flows.cli import main
main()
"""
VARIANTS = {
    "hidden states, the teacher's text": (
        TINY, "score.signal=hidden", "rollout.off_policy=teacher", "rollout.shard_rows=24"
    ),
    "two teachers, their texts": (TWO,),
}  # fmt: skip


@pytest.mark.slow
def test_killed_runs_end_as_unbroken_ones(potstill, reference, tmp_path):
    """The models' own recipes are killed as well: three runs under a root, each in the middle of its stages."""
    draw, tally = random.Random(SEED), Tally()
    references = {"top-k, references": (arguments, reference)}
    for name, changes in VARIANTS.items() if KILLS >= 10 else ():  # fewer are a look, not a search

        def changed(root: Path, changes: tuple[Path | str, ...] = changes) -> list[str]:
            recipe, *settings = changes
            return arguments(root, *map(str, settings), recipe=Path(recipe))

        references[name] = (changed, unbroken(potstill, tmp_path / "unbroken" / name.replace(" ", "-"), changed))
    number = 0
    while sum(tally.kills.values()) < KILLS:
        told, wanted = references[draw.choice(sorted(references))]
        root = tmp_path / f"killed-{number}"
        kills = min(draw.randint(1, 4), KILLS - sum(tally.kills.values()))
        kill_and_go_on(potstill, root, told, wanted, moments(draw, wanted, kills), tally)
        shutil.rmtree(root)
        number += 1
        print(f"{sum(tally.kills.values())} of {KILLS}", flush=True)
    print("\n".join(tally.lines()))
    assert tally.equal == tally.chains
    assert tally.redone == 0


@pytest.mark.slow
def test_kills_while_rounds_are_cleared(potstill, tmp_path):
    """Before any change of a file that clearing makes: nothing kept is harmed, and in the end all is cleared that was to be."""

    def told(root: Path) -> list[str]:
        return arguments(root, *KEEP)

    def cleared(root: Path) -> dict[str, bool]:
        """Of each cleared slot whether its content is there all the same."""
        return {
            slot: any((root / (slot + ending)).exists() for ending in ("", ".parquet"))
            for slot, stamp in committed(root).items()
            if stamp.cleared
        }

    draw, wanted = random.Random(SEED), unbroken(potstill, tmp_path / "unbroken", told)
    most, kills, half_made, left = KILLS // 2, 0, 0, 0
    while kills < most:
        root, before, status = tmp_path / f"killed-{kills}", dict[str, Stamp](), -signal.SIGKILL
        while status == -signal.SIGKILL:
            at = draw.randint(1, 40) if kills < most else 10_000
            status = potstill.run("-c", KILLED_CLEARING, at, *told(root))
            after = committed(root)
            assert redone(before, after) == set(), "made again although it was committed"
            assert damages(root) == {}
            before = after
            if status == -signal.SIGKILL:
                kills += 1
                half_made += bool(halves(root))
                left += any(cleared(root).values())
        assert status == 0, potstill.err
        assert halves(root) == []
        assert cleared(root)
        assert cleared(root) == dict.fromkeys(cleared(wanted.root), False)
        assert digests(root) == wanted.digests
        assert steps(root) == wanted.steps
        shutil.rmtree(root)
    print(f"{kills} kills while rounds were cleared; {half_made} left half-made files, {left} what was marked as cleared")

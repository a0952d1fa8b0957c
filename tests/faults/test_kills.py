"""kill -9 at any moment: the finished run equals an unbroken one, and nothing committed is made twice."""

import os
import random
import shutil
from pathlib import Path

import pytest
from killing import Tally, arguments, kill_and_go_on, moments, unbroken

KILLS = int(os.environ.get("POTSTILL_KILLS", "4"))
SEED = 20
VARIANTS = {
    "hidden states, the teacher's text": ("score.signal=hidden", "rollout.off_policy=teacher", "rollout.shard_rows=24"),
}


@pytest.mark.slow
def test_killed_runs_end_as_unbroken_ones(potstill, reference, tmp_path):
    """The models' own recipes are killed as well: three runs under a root, each in the middle of its stages."""
    draw, tally = random.Random(SEED), Tally()
    references = {"top-k, references": (arguments, reference)}
    for name, changes in VARIANTS.items() if KILLS >= 10 else ():  # fewer are a look, not a search

        def changed(root: Path, changes: tuple[str, ...] = changes) -> list[str]:
            return arguments(root, *changes)

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

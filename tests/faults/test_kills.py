"""kill -9 at any moment: the finished run equals an unbroken one, and nothing committed is made twice."""

import os
import random
import shutil
from pathlib import Path

from killing import TINY, Tally, kill_and_go_on, moments, started, unbroken

KILLS = int(os.environ.get("POTSTILL_KILLS", "4"))
SEED = 20
VARIANTS = {
    "top-k, references": (),
    "hidden states, the teacher's text": ("score.signal=hidden", "rollout.off_policy=teacher", "rollout.shard_rows=24"),
}


def test_killed_runs_end_as_unbroken_ones(server, tmp_path):
    """The models' own recipes are killed as well: three runs under a root, each in the middle of its stages."""
    draw, tally = random.Random(SEED), Tally()
    with started(server, tmp_path) as potstill:
        references = {}
        for name, changes in VARIANTS.items():

            def arguments(root: Path, changes: tuple[str, ...] = changes) -> list[str]:
                settings = (f"root={root}", *changes)
                return ["run", str(TINY), *(word for setting in settings for word in ("--set", setting))]

            references[name] = (arguments, unbroken(potstill, tmp_path / "unbroken" / name.replace(" ", "-"), arguments))
            if KILLS < 10:
                break  # a look, not a search
        number = 0
        while sum(tally.kills.values()) < KILLS:
            arguments, reference = references[draw.choice(sorted(references))]
            root = tmp_path / f"killed-{number}"
            kills = min(draw.randint(1, 4), KILLS - sum(tally.kills.values()))
            kill_and_go_on(potstill, root, arguments, reference, moments(draw, reference, kills), tally)
            shutil.rmtree(root)
            number += 1
            print(f"{sum(tally.kills.values())} of {KILLS}", flush=True)
    print("\n".join(tally.lines()))
    assert tally.equal == tally.chains
    assert tally.redone == 0

"""Runs `potstill` as real processes that can be killed, and looks at what they leave."""

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
from forks import CHECKOUT, Forks

from storage.store import Run

TINY, TWO = (CHECKOUT / "tests" / "recipes" / f"{name}.toml" for name in ("tiny", "two"))


def arguments(root: Path, *changes: str, recipe: Path = TINY) -> list[str]:
    """The run of tiny.toml, or of another recipe, under a root, and what is set in it."""
    return ["run", str(recipe), *(word for setting in (f"root={root}", *changes) for word in ("--set", setting))]


class Potstill:
    """The command in forks of one process that has imported everything: a second each, in place of fifteen."""

    def __init__(self, forks: Forks, place: Path):
        self.forks, self.place, self.pid = forks, place, 0
        self.arguments: list[str] = []

    def start(self, *arguments: object) -> int:
        """Start the command; its process id."""
        self.arguments = [str(argument) for argument in arguments]
        for name in ("out", "err"):
            (self.place / name).write_text("")
        self.pid = self.forks.start(arguments, self.place, self.place / "out", self.place / "err")
        return self.pid

    def wait(self) -> int:
        """The exit status of what was started last; negative where a signal ended it."""
        return self.forks.wait(self.pid)

    def run(self, *arguments: object) -> int:
        self.start(*arguments)
        return self.wait()

    @property
    def err(self) -> str:
        return (self.place / "err").read_text()

    @property
    def out(self) -> str:
        return (self.place / "out").read_text()


# -- what lies under a root -----------------------------------------------------------------------------------------------


def runs(root: Path) -> list[Run]:
    return [Run(str(root), path.name) for path in sorted(root.iterdir())] if root.exists() else []


@dataclass(frozen=True)
class Stamp:
    """What changes when a thing is made again, and not when it is cleared."""

    inode: int
    changed: int  # ns
    manifest: str
    cleared: bool

    def is_of(self, before: "Stamp | None") -> bool:
        return before is not None and (self == before or (self.cleared and self.manifest == before.manifest))


def committed(root: Path) -> dict[str, Stamp]:
    """`run/slot` of every manifest under a root: what must not be made again. A cleared one is known by what else it says."""
    found: dict[str, Stamp] = {}
    for path in root.glob("*/_manifests/**/*.json"):
        stat, (run, slot) = path.stat(), str(path.relative_to(root).with_suffix("")).split("/_manifests/")
        manifest = json.loads(path.read_text())
        cleared = manifest.pop("cleared", None) is not None
        found[f"{run}/{slot}"] = Stamp(stat.st_ino, stat.st_mtime_ns, json.dumps(manifest), cleared)
    return found


def finished(found: Iterable[str]) -> set[str]:
    """What is committed as a whole: training is one piece of work, and in hand until all of its three manifests are there."""
    whole = Counter(_piece(slot) for slot in found if stage(slot) == "train")
    return {slot for slot in found if stage(slot) != "train" or whole[_piece(slot)] == 3}


def redone(before: dict[str, Stamp], after: dict[str, Stamp]) -> set[str]:
    """What was made again although it was committed, or is gone."""
    return {slot for slot in finished(before) if slot not in after or not after[slot].is_of(before[slot])}


def digests(root: Path) -> dict[str, str]:
    """The digest of everything committed but the steps, which hold the seconds that a step took."""
    found = {f"{run.name}/{slot}": manifest["digest"] for run in runs(root) for slot, manifest in run.manifests()}
    return {slot: digest for slot, digest in found.items() if "/steps/" not in slot}


def steps(root: Path) -> list[dict]:
    table = pl.scan_parquet(f"{root}/*/round=*/steps/*.parquet", include_file_paths="file").collect()
    table = table.with_columns(pl.col("file").str.strip_prefix(str(root)))
    return table.drop("seconds").sort("file", "step").to_dicts()


def damages(root: Path) -> dict[str, str]:
    return {f"{run.name}/{slot}": problem for run in runs(root) for slot in run.slots() if (problem := run.find_damage(slot))}


def resize(disk: Path, size: int) -> None:
    """Let the test's disk have so many KiB."""
    subprocess.run(["mount", "-o", f"remount,size={size}k", disk], check=True)


def halves(root: Path) -> list[str]:
    """What half-made things are left under a root."""
    return [str(path.relative_to(root)) for path in root.glob("*/_tmp/**/*") if path.name != "lock"]


def stage(slot: str) -> str:
    """`scores` of `tiny/round=0001/scores/part-00000`; `train` of the three things that training makes."""
    name = slot.split("/")[1 if "round=" not in slot else 2]
    if name == "student" and "round=0000" in slot:
        return "new-model"
    return "train" if name in ("student", "trainer", "steps") else name


def _piece(slot: str) -> str:
    """`tiny/round=0001` of everything in that round."""
    return "/".join(slot.split("/")[:2])


# -- killing --------------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What happened over many killed runs."""

    kills: Counter = field(default_factory=Counter)  # by the stage in hand
    half_made: int = 0  # kills that left work in hand behind
    kept: int = 0  # committed things found again after a kill, over all kills
    redone: int = 0  # of those made again: must be none
    chains: int = 0
    equal: int = 0
    ran_out: int = 0  # processes that ended before their kill came

    def lines(self) -> list[str]:
        return [
            f"{sum(self.kills.values())} killed runs; in hand: "
            + ", ".join(f"{name} {count}" for name, count in sorted(self.kills.items())),
            f"{self.half_made} of the kills left half-made files, all removed by the next start",
            f"{self.redone} of {self.kept} committed things were made again",
            f"{self.equal} of {self.chains} finished runs equal the unbroken one",
        ]


@dataclass
class Reference:
    """An unbroken run: what it made, in which order and how long each thing took."""

    root: Path
    order: list[str]
    seconds: dict[str, float]
    total: float
    digests: dict[str, str]
    steps: list[dict]


def unbroken(potstill: Potstill, root: Path, arguments: Callable[[Path], list[str]]) -> Reference:
    started = time.time()
    status = potstill.run(*arguments(root))
    assert status == 0, potstill.err
    assert damages(root) == {}
    stamps = committed(root)
    made = {slot: f"{_piece(slot)}/steps/part-00000" if stamp.cleared else slot for slot, stamp in stamps.items()}
    times = {slot: stamps[other].changed / 1e9 - (slot != other) * 1e-6 for slot, other in made.items()}
    order = sorted(times, key=lambda slot: times[slot])
    before = dict(zip(order, [started, *(times[slot] for slot in order)]))
    seconds = {slot: times[slot] - before[slot] for slot in order}
    return Reference(root, order, seconds, times[order[-1]] - started, digests(root), steps(root))


def wait_for(moment: tuple[str, float], potstill: Potstill, root: Path, reference: Reference) -> None:
    """Wait for the moment: (slot, share): so far into the making of that slot; ("", seconds): after so long."""
    slot, amount = moment
    if slot:
        place = reference.order.index(slot)
        before = reference.order[place - 1].replace("/", "/_manifests/", 1) + ".json" if place else None
        deadline = time.monotonic() + 60
        while before and not (root / before).exists() and time.monotonic() < deadline:
            time.sleep(0.002)
            if "The run is in" in potstill.out:
                break
        amount *= reference.seconds[slot]
        while not potstill.err and time.monotonic() < deadline:  # its first line: what it is about to make
            time.sleep(0.002)
    time.sleep(amount)


def kill_and_go_on(
    potstill: Potstill,
    root: Path,
    arguments: Callable[[Path], list[str]],
    reference: Reference,
    moments: list[tuple[str, float]],
    tally: Tally,
) -> None:
    """One run, killed at each of `moments`, then left to end; asserts that it lost nothing and ended as it should."""
    before: dict[str, Stamp] = {}
    for moment in moments:
        process = os.pidfd_open(potstill.start(*arguments(root)))  # an id may come to be another process's, this does not
        wait_for(moment, potstill, root, reference)
        with suppress(ProcessLookupError):  # it ended before
            signal.pidfd_send_signal(process, signal.SIGKILL)
        os.close(process)
        status = potstill.wait()
        after = committed(root)
        _compare(before, after, tally)
        before = after
        if status != -signal.SIGKILL:
            assert status == 0, potstill.err
            tally.ran_out += 1
            continue
        missing = [slot for slot in reference.order if slot not in after]
        tally.kills[stage(missing[0]) if missing else "the end"] += 1
        tally.half_made += bool(halves(root))
    status = potstill.run(*arguments(root))
    assert status == 0, potstill.err
    _compare(before, committed(root), tally)
    assert halves(root) == []
    assert damages(root) == {}
    tally.chains += 1
    assert digests(root) == reference.digests
    assert steps(root) == reference.steps
    tally.equal += 1


def _compare(before: dict[str, Stamp], after: dict[str, Stamp], tally: Tally) -> None:
    changed = redone(before, after)
    tally.kept += len(finished(before))
    tally.redone += len(changed)
    assert changed == set()


def moments(draw: random.Random, reference: Reference, kills: int) -> list[tuple[str, float]]:
    """Four of ten kills after a random time, the others in the middle of a stage, each stage as often as the others."""
    by_stage: dict[str, list[str]] = {}
    for slot in reference.order:
        by_stage.setdefault(stage(slot), []).append(slot)
    chosen: list[tuple[str, float]] = []
    for _ in range(kills):
        if draw.random() < 0.4:
            chosen.append(("", draw.uniform(0.2, 0.6 * reference.total)))
        else:
            slot = draw.choice(by_stage[draw.choice(sorted(by_stage))])
            chosen.append((slot, draw.random()))

    def place(moment: tuple[str, float]) -> float:
        return reference.order.index(moment[0]) if moment[0] else draw.random() * len(reference.order)

    return sorted(chosen, key=place)  # a run goes forward only

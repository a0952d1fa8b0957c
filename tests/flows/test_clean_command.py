"""`potstill clean`: it shows what is not to be kept and how much that is, and clears it."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from helpers import files, refused

from storage.clearing import word_bytes
from storage.store import Run


@pytest.fixture
def copied(tiny, tmp_path) -> Path:
    """The tiny run to clear things of, with two rounds; its first trainer is cleared already."""
    return Path(shutil.copytree(tiny, tmp_path / "runs" / "tiny"))


def size_of(*places: Path) -> str:
    return word_bytes(sum(file.stat().st_size for place in places for file in place.rglob("*") if file.is_file()))


def test_it_shows_what_and_how_much_and_then_clears_it(potstill, copied):
    before, gone = files(copied), [copied / "round=0001" / table for table in ("rollouts", "scores")]
    size, untouched = size_of(*gone), size_of(copied)
    shown = potstill("clean", copied, "--rollouts", "1", "--scores", "1")
    assert shown.status == 0, shown.err
    for place, option in zip(gone, ("keep.rollouts = 1", "keep.scores = 1"), strict=True):
        (line,) = [line for line in shown.out.splitlines() if f"round=0001/{place.name}" in line]
        assert size_of(place) in line
        assert option in line
    assert f"Nothing was cleared; --yes clears these {size}" in shown.out
    assert files(copied) == before, "there is no terminal to ask on"

    done = potstill("clean", copied, "--rollouts", "1", "--scores", "1", "--yes")
    assert done.status == 0, done.err
    assert f"cleared {size}: " in done.err
    assert not any(place.exists() for place in gone)
    assert size_of(copied) != untouched
    run = Run(str(copied.parent), copied.name)
    assert [slot for slot in run.slots() if run.find_damage(slot)] == []
    again = potstill("clean", copied, "--rollouts", "1", "--scores", "1", "--yes")
    assert (again.status, again.err) == (0, "")
    assert "round=0001" not in again.out, "nothing is left to clear"
    assert potstill("inspect", copied, "--verify").status == 0


def test_what_lies_elsewhere_stays(potstill, copied, tmp_path):
    """A round that was moved to a larger disk, with a link in its place; in a stranger's run it may lead anywhere."""
    shutil.move(copied / "round=0001", elsewhere := tmp_path / "elsewhere")
    (copied / "round=0001").symlink_to(elsewhere)
    before = files(elsewhere)
    ended = potstill("clean", copied, "--scores", "1", "--yes")
    assert ended.status == 0, ended.err
    assert f"round=0001/scores/part-00000: a link leads to {elsewhere}/scores, out of the run, so it stays" in ended.err
    assert "cleared" not in ended.err
    assert files(elsewhere) == before
    assert potstill("inspect", copied, "--verify").status == 0


def test_where_nothing_is_to_be_cleared(potstill, copied):
    before = files(copied)
    ended = potstill("clean", copied, "--yes")
    assert (ended.status, ended.err) == (0, "")
    assert "round=" not in ended.out
    assert files(copied) == before


def test_a_run_that_another_process_works_on(potstill, forks, copied, tmp_path):
    hold = "import sys, time; from storage.store import Run\nwith Run(*sys.argv[1:]).lock(): time.sleep(100)"
    pid = forks.start(["-c", hold, copied.parent, copied.name], tmp_path, tmp_path / "out", tmp_path / "err")
    while not (copied / "_tmp" / "lock").exists() or not (copied / "_tmp" / "lock").read_text():
        time.sleep(0.01)
    try:
        refused(potstill("clean", copied, "--scores", "1", "--yes"), str(copied), f"process {pid} on")
        assert (copied / "round=0001" / "scores").exists()
    finally:
        os.kill(pid, signal.SIGKILL)
        forks.wait(pid)


def test_wrong_options(potstill, copied, tmp_path):
    refused(potstill("clean", copied, "--scores", "best"), "--scores: give 'all'", "found 'best'")
    refused(potstill("clean", copied, "--students", "0"), "--students: give 'all' or 'best'", "1 or more")
    refused(potstill("clean", tmp_path / "none"), str(tmp_path / "none"))


def test_help(potstill):
    shown = potstill("clean", "--help")
    assert shown.status == 0
    for option in ("--students", "--trainers", "--rollouts", "--scores", "--yes"):
        assert option in shown.out

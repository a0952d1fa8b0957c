"""A stop that was asked for, a disk that is full, a file that was damaged: one message, and the run goes on."""

import itertools
import os
import signal
import time
from pathlib import Path

import httpx
import pytest
from killing import Potstill, Reference, arguments, committed, damages, digests, halves, redone, resize, steps, wait_for
from stopping import Stop, one_message


def when(path: Path) -> None:
    """Wait until a file is there."""
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.005)


def ended_as_unbroken(potstill: Potstill, root: Path, reference) -> None:
    assert potstill.run(*arguments(root)) == 0, potstill.err
    assert digests(root) == reference.digests
    assert steps(root) == reference.steps
    assert halves(root) == []
    assert damages(root) == {}


def flow_runs(server: str) -> dict[str, str]:
    """The state of each flow run that Prefect's server knows of, the newest 200; other tests leave some running."""
    found = httpx.post(f"{server}/flow_runs/filter", json={"sort": "EXPECTED_START_TIME_DESC", "limit": 200}, timeout=30).json()
    return {run["id"]: run["state_type"] for run in found}


# What is in the making in each stage, in the order in which they come, with others between them.
STAGES = {
    "prompts": "test-teacher-seed0/prompts/train",
    "scratch": "test-student-seed0/round=0000/student",
    "vocab": "tiny/vocab/teacher",
    "evaluation": "tiny/round=0000/evals/teacher",
    "scores": "tiny/round=0001/scores/part-00000",
    "check": "tiny/round=0001/gates/part-00000",
    "rollouts": "tiny/round=0002/rollouts/part-00001",
    "alignment": "tiny/round=0002/aligned/part-00001",
    "training": "tiny/round=0002/student",
    "report": "tiny/round=0002/evals/student",
}
MOST_FORCED = 2  # stops of one run that may take longer than a command waits for itself
TOLD = [(number, group) for group in (True, False) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def stop_in(stages: list[str], told: list[tuple[int, bool]], potstill: Potstill, root: Path, reference: Reference) -> None:
    """One run, stopped in each of these stages, then left to end as if nothing had been."""
    forced: list[str] = []
    states: list[str] = []
    for name, (number, group) in zip(stages, itertools.cycle(told)):
        before, others = committed(root), flow_runs(potstill.forks.server)
        potstill.start(*arguments(root))
        wait_for((STAGES[name], 0.5), potstill, root, reference)
        stop = Stop(potstill, number, group)
        print(f"{name} | {signal.Signals(number).name}{' to the group' if group else ''} | {stop.seconds:.1f} s | {stop.line}")
        if stop.forced:  # on a machine that stands still; what is half-made then goes with the next start
            forced.append(stop.line)
            assert len(forced) <= MOST_FORCED, forced
            assert damages(root) == {}
            assert redone(before, committed(root)) == set()
            continue
        stop.goes_on()
        assert halves(root) == []
        assert list(root.glob("*/_tmp")) == []
        assert damages(root) == {}
        assert redone(before, committed(root)) == set()
        states += [state for run, state in flow_runs(potstill.forks.server).items() if run not in others]
        assert set(states) <= {"CRASHED", "COMPLETED"}  # the runs of its models have completed, where it made them
    assert states.count("CRASHED") >= len(stages) // 2  # some have none yet
    ended_as_unbroken(potstill, root, reference)


def test_a_stop_in_the_middle_of_a_run(potstill, reference, tmp_path):
    """Here with the session's Prefect server, where the flow runs end as crashed."""
    stop_in(["scores", "training"], TOLD, potstill, tmp_path / "runs", reference)


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(3))
def test_a_stop_in_each_stage(potstill, reference, tmp_path, turn):
    told = TOLD[turn:] + TOLD[:turn]
    stop_in(list(STAGES), told, potstill, tmp_path / "runs", reference)


def test_two_processes_on_one_run(potstill, forks, tmp_path):
    root = tmp_path / "runs"
    pid = potstill.start(*arguments(root))
    when(root / "tiny" / "_tmp" / "lock")
    time.sleep(0.2)
    os.kill(pid, signal.SIGSTOP)
    before = committed(root)
    second = Potstill(forks, tmp_path)
    assert second.run(*arguments(root)) == 2
    message = one_message(second.err)
    assert str(root / "tiny") in message
    assert f"process {pid} on" in message
    assert committed(root) == before
    os.kill(pid, signal.SIGKILL)
    assert potstill.wait() == -signal.SIGKILL
    assert potstill.run(*arguments(root), "--rounds", "0") == 0, potstill.err


@pytest.mark.slow
def test_a_full_disk(potstill, reference, disk):
    """A real one, that grows a little after each failure: every stage meets its end."""
    root, size, messages = disk / "runs", 300, []
    resize(disk, size)
    while (status := potstill.run(*arguments(root))) != 0:
        assert status in (1, 2), potstill.err
        message = one_message(potstill.err)
        assert str(root) in message
        assert "No space left on device" in message
        messages.append(message)
        before = committed(root)
        assert damages(root) == {}
        assert halves(root) == []
        size += 450
        assert size < 20_000
        resize(disk, size)
        assert redone(before, committed(root)) == set()
    assert len(messages) > 3
    assert digests(root) == reference.digests
    assert steps(root) == reference.steps


@pytest.mark.slow
def test_damaged_files_of_a_finished_run(potstill, reference, tmp_path):
    """One of every kind of file, and manifests: made again, the same; nothing else is."""
    root = tmp_path / "runs"
    assert potstill.run(*arguments(root)) == 0, potstill.err
    before = committed(root)
    first = [slot for slot in before if slot.startswith("tiny/") and ("round=0001" in slot or "round" not in slot)]
    broken = [slot for slot in first if not before[slot].cleared]
    for turn, slot in enumerate(sorted(broken)):
        run, place = slot.split("/", 1)
        if turn % 3 == 0:
            file = root / run / "_manifests" / f"{place}.json"
        else:
            file = root / run / f"{place}.parquet"
            file = file if file.exists() else sorted(path for path in (root / run / place).rglob("*") if path.is_file())[-1]
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 16
        file.write_bytes(data if turn % 3 == 1 else data[: len(data) // 2])
    assert set(damages(root)) == set(broken)
    ended_as_unbroken(potstill, root, reference)
    assert redone(before, committed(root)) == {*broken, "tiny/round=0001/trainer"}  # of one piece with the student
    assert potstill.err.count("damaged (") == len(broken)

"""One process at a time works on a run: real processes, real kills."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import fsspec
import pytest

from configs.errors import BadInput
from storage.store import Run

HOLD = """
import sys, time
from storage.store import Run
with Run(sys.argv[1], "a").lock(print):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def root(tmp_path) -> str:
    return str(tmp_path / "runs")


def holder(root: str) -> subprocess.Popen:
    """Another process that holds the run `a`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, root], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen, number: int = signal.SIGKILL) -> None:
    process.send_signal(number)
    process.wait(20)
    process.stdout.close()


def test_the_second_is_told_who_holds_it(root):
    process = holder(root)
    try:
        for attempt in (Run(root, "a").check_free, Run(root, "a").lock(print).__enter__):
            with pytest.raises(BadInput) as caught:
                attempt()
            assert all(part in str(caught.value) for part in (f"{root}/a", str(process.pid), socket.gethostname(), "since 2"))
        assert os.listdir(f"{root}/a") == ["_tmp"]
        with Run(root, "b").lock(print):  # another run is free
            pass
    finally:
        end(process)


def stop_at(moment: int) -> Callable:
    """A trace that raises KeyboardInterrupt, once, at the n-th line of `workspace` or call below it."""
    moments, inside = 0, 0

    def trace(frame: FrameType, event: str, _: object) -> Callable | None:
        nonlocal moments, inside
        here = frame.f_code.co_name == "workspace"
        if not here and not inside:
            return None
        inside += here and (event == "call") - (event == "return")
        moments += event == ("line" if here else "call")
        if moments == moment and event == ("line" if here else "call"):
            raise KeyboardInterrupt
        return trace

    return trace


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # one is raised in a destructor
def test_a_stop_at_any_moment_leaves_nothing_half_made(root):
    """Such as between the making of a folder and the `try` that removes it, or while it is being removed."""
    for moment in itertools.count(1):
        stopped = False
        try:
            with Run(root, "a").lock(print):
                before = sys.gettrace()
                sys.settrace(stop_at(moment))
                try:
                    Run(root, "a").write_text("note", "all of it")
                finally:
                    sys.settrace(before)
        except KeyboardInterrupt:
            stopped = True
        assert {path.name for path in Path(root).glob("a/*")} <= {"note"}, moment
        if not stopped:
            break
    assert moment > 30


def test_a_killed_holders_run_is_free_at_once_and_its_leftovers_go(root):
    process = holder(root)
    half = Path(root) / "a" / "_tmp" / "tmpx" / "half.parquet"
    half.parent.mkdir()
    half.write_text("half")
    end(process)
    assert half.exists()
    Run(root, "a").check_free()
    started = time.monotonic()
    with Run(root, "a").lock(print):
        assert time.monotonic() - started < 0.5
        assert not half.parent.exists()
        assert json.loads((Path(root) / "a" / "_tmp" / "lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(("host", "lines"), [("elsewhere", 1), (socket.gethostname(), 0)])
def test_what_a_process_of_another_machine_has_left_is_named(root, host, lines):
    """It was killed, or its lock does not reach between the machines, as on some network disks."""
    note = Path(root) / "a" / "_tmp" / "lock"
    note.parent.mkdir(parents=True)
    note.write_text(json.dumps({"pid": 7, "host": host, "since": "yesterday"}))
    logged = []
    with Run(root, "a").lock(logged.append):
        assert json.loads(note.read_text())["pid"] == os.getpid()
    assert len(logged) == lines
    assert all("process 7 on elsewhere (since yesterday)" in line for line in logged)


def test_two_machines_on_one_root(root):
    """The second is told the first one's name, by a lock that a kernel holds."""
    code = f"import socket; socket.gethostname = lambda: 'machine-a'\n{HOLD}"
    first = subprocess.Popen([sys.executable, "-c", code, root], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    try:
        with pytest.raises(BadInput, match=f"process {first.pid} on machine-a .* is working on this run"):
            Run(root, "a").lock(print).__enter__()
    finally:
        end(first)
    logged = []
    with Run(root, "a").lock(logged.append):
        assert len(logged) == 1
        assert f"process {first.pid} on machine-a" in logged[0]


def test_nothing_is_left_of_a_lock(root):
    Run(root, "a").check_free()
    assert not os.path.exists(root)  # looking writes nothing
    with Run(root, "a").lock(print):
        pass
    assert os.listdir(root) == []


def test_waiting_for_another_process(root):
    """As for a teacher that two runs need: one line, and on it goes when the other is done."""
    process, lines = holder(root), []

    def log(line: str) -> None:
        lines.append(line)
        process.kill()

    with Run(root, "a").lock(log, wait=True):
        assert len(lines) == 1
        assert f"waiting for process {process.pid}" in lines[0]
    end(process)


def test_a_file_between_opening_and_locking(root, monkeypatch):
    """The last holder removes the file while the next one has it open: the next one must not hold a file nobody sees."""
    import fcntl

    real, seen = fcntl.flock, []

    def flock(descriptor: int, how: int) -> None:
        if not seen:
            (Path(root) / "a" / "_tmp" / "lock").unlink()
        seen.append(descriptor)
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with Run(root, "a").lock(print):
        assert len(seen) == 2
        assert (Path(root) / "a" / "_tmp" / "lock").exists()


def test_a_disk_without_locks_says_so(root, monkeypatch):
    import errno
    import fcntl

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    lines = []
    with Run(root, "a").lock(lines.append):
        assert len(lines) == 1
        assert "no locks" in lines[0]


def test_notes_on_a_remote_filesystem():
    root = f"memory://{uuid.uuid4().hex}/runs"
    fs, path = fsspec.url_to_fs(root)
    note = f"{path}/a/_tmp/lock"
    with Run(root, "a").lock(print):
        assert json.loads(fs.cat_file(note))["pid"] == os.getpid()
    assert not fs.exists(note)
    me = {"pid": os.getppid(), "host": socket.gethostname(), "since": "yesterday"}
    fs.pipe_file(note, json.dumps(me).encode())
    with pytest.raises(BadInput, match=f"process {os.getppid()} on"):
        Run(root, "a").check_free()
    fs.pipe_file(note, json.dumps(me | {"host": "elsewhere"}).encode())
    with pytest.raises(BadInput, match=r"if it is dead, delete memory://.*/a/_tmp/lock"):
        Run(root, "a").lock(print).__enter__()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    fs.pipe_file(note, json.dumps(me | {"pid": dead.pid}).encode())
    with Run(root, "a").lock(print):
        pass

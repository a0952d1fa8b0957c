"""Tells a running command to stop, and looks at how it ends."""

import os
import shlex
import time

import psutil
from killing import Potstill

from flows import ending

PATIENCE = 10.0  # seconds until a command has ended; on a quiet machine it takes half of them at most


def one_message(text: str) -> str:
    """The last line, which is the only one of its kind; the others are plain lines of the log."""
    *log, last = text.strip().splitlines()
    assert "Traceback" not in text
    assert last.startswith("potstill: "), text
    assert not any(line.startswith("potstill: ") for line in log), text
    assert all(line[2] == line[5] == ":" for line in log), text
    return last


class Stop:
    """A command that is told to end, and told again: how long it takes, its last line, and that no process is left."""

    def __init__(self, potstill: Potstill, number: int, group: bool):
        pid = potstill.pid
        process = psutil.Process(pid)
        tree = [process, *process.children(recursive=True)]
        started = time.monotonic()
        for _ in range(3):  # as of somebody impatient, or of `timeout`, which tells the process and then its group
            (os.killpg if group else os.kill)(pid, number)  # once it has ended it is there until it is waited for
            time.sleep(0.1)
        status = potstill.wait()
        self.seconds = time.monotonic() - started
        _, left = psutil.wait_procs(tree, timeout=2)
        assert not left, left
        assert status == 128 + number, potstill.err
        assert self.seconds < PATIENCE
        assert potstill.out == ""
        self.line = one_message(potstill.err)
        self.command = f"potstill {shlex.join(potstill.arguments)}"
        self.forced = self.seconds > ending.PATIENCE  # a disk or a library did not let go: it was ended as it was

    def goes_on(self, *parts: str) -> None:
        """The line says what is committed, if it is not all of it, and the command that goes on."""
        assert self.line.startswith(("potstill: stopped in round ", "potstill: stopped with all "))
        assert self.line.endswith(f"; `{self.command}` goes on")
        for part in parts:
            assert part in self.line

"""A child process that ends when the process that started it has ended, even by `kill -9`.

As a script it runs a module as `python -m` does, and reads its standard input, to which nothing is written: that closes when
the process at its other end is gone. The child has a session of its own, so that a signal to the command's process group
(Ctrl-C, `timeout`, `docker stop`) reaches the command alone, which then ends the child.
"""

import os
import runpy
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

SCRIPT = str(Path(__file__))
_attached: set[subprocess.Popen[Any]] = set()


def start_attached(module: str, *args: str, **options: Any) -> subprocess.Popen[Any]:
    """Start `python -m module args…` attached to this process. `options` are those of Popen."""
    command = [sys.executable, SCRIPT, module, *args]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, **options)
    _attached.add(process)
    return process


def end_attached(process: subprocess.Popen[Any]) -> None:
    """Kill an attached child, and what it has started in its session."""
    _attached.discard(process)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()


def kill_attached() -> None:
    """Kill the attached children that are left, also one that is suspended. For a process that ends at once."""
    for process in list(_attached):
        _kill_descendants(process.pid)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _end_with_the_starter() -> None:
    os.read(0, 1)
    _kill_descendants(os.getpid())
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _kill_descendants(pid: int) -> None:
    """Kill what a process has started, also in sessions of their own, as Prefect's worker starts flow runs."""
    import psutil

    with suppress(psutil.Error):
        for child in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.Error):
                child.kill()


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])  # not this folder, and not that in which the command was called
    threading.Thread(target=_end_with_the_starter, daemon=True).start()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)

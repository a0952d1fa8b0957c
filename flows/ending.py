"""How a command ends: its last line, its exit status, and that SIGINT, SIGTERM and SIGHUP end it within seconds.

A stop is raised in the main thread, so that locks, half-made files and Prefect's states are seen to. What does not let go (a
library in C, a server that does not answer) is not waited for: a thread ends the process then, with the same line and status.
"""

import atexit
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from flows import take_back_folders
from flows.stops import STOPS, on_stops
from tasks.running.attached import kill_attached
from tasks.views.escapes import escape_controls

if TYPE_CHECKING:  # which takes a while to import, and a stop may come at once
    from configs.schema import Recipe

PATIENCE = 3.5  # seconds from the signal until the process is ended whatever it does
SHOW_CURSOR = "\r\x1b[2K\x1b[?25h"  # a progress bar hides it

_told: int | None = None  # the signal that ends this command
_starting = False  # Prefect makes a flow run
_over = False  # the command has ended, and the process is about to
_status = 1
_said = threading.Lock()  # taken by the thread that says the last line
_committed: Callable[[], str] | None = None  # what a stop finds committed, as a part of a sentence; called in any thread
_reason = ""  # why the command ends itself
_line = ""


class Told(KeyboardInterrupt):
    """The command was told to end by a signal. It is raised again where something has swallowed it.

    Destructors, callbacks of weak references and libraries that catch everything do; it then goes before the command has ended.
    """

    def __del__(self) -> None:
        global _told
        if _told is not None and not _over:
            number, _told = _told, None
            _start_timer(0.05, os.kill, os.getpid(), number)


@contextmanager
def ending() -> Iterator[None]:
    """End the process after a command, with the status that it ended with; a stop with one line."""
    global _over, _status
    try:
        try:
            _catch_stops()
            yield
        finally:
            _over = True
        _status = 0
    except SystemExit as ended:
        _status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # what a stop breaks need not be Told: imports make other errors of it
        if _told is None:
            traceback.print_exc()
    if _told is not None:
        _status = _status_of(_told)
        _say(_describe_stop())
    sys.exit(_status)


def end(message: str, status: int) -> NoReturn:
    """End the command with one message."""
    if _told is None:  # else it is what the stop broke
        print(f"potstill: {escape_controls(message)}", file=sys.stderr)
    sys.exit(status)


def give_up(reason: str) -> None:
    """End the command from another thread, as a stop does; the reason begins its last line, and the exit status is 1."""
    global _reason
    _reason = f"{reason}: "
    os.kill(os.getpid(), signal.SIGTERM)


def work_on(recipe: "Recipe", rounds: int | None) -> None:
    """Let a stop say what is committed of this recipe's run."""
    global _committed
    _committed = partial(_describe_committed, recipe, recipe.rounds if rounds is None else rounds)


@contextmanager
def starting() -> Iterator[None]:
    """The call of a flow: a stop waits for the flow's `stoppable`. A flow run would stay pending that is stopped before."""
    global _starting
    _starting = True
    try:
        yield
    finally:
        _let_stops()


@contextmanager
def stoppable(recipe: "Recipe | None" = None, rounds: int | None = None) -> Iterator[None]:
    """What a flow does, on a recipe's run if it works on one.

    What a stop breaks (in Prefect's own code, an import, a library) is a stop too, and the flow run crashed, not failed.
    """
    global _committed
    _let_stops()
    before = _committed
    if recipe is not None:
        work_on(recipe, rounds)
    take_sigterm_back()
    try:
        yield
    except Exception as broken:
        if _told is None:
            raise
        raise Told from broken
    _committed = before  # but not where a stop goes through


def take_sigterm_back() -> None:
    """In a command: from Prefect, whose own handler breaks off what ends the flow if the signal comes twice, or from Ray.

    Ray's aborts the process with a trace of C functions.
    """
    if signal.getsignal(signal.SIGINT) is _stop:  # this process is a command, not a worker's
        signal.signal(signal.SIGTERM, _stop)


def _catch_stops() -> None:
    """Let each stop raise Told here, and let a thread see it at once."""
    atexit.register(_leave)  # the first one registered is the last one called
    seen, mark = os.pipe()
    os.set_blocking(mark, False)
    signal.set_wakeup_fd(mark, warn_on_full_buffer=False)
    on_stops(_stop)
    sys.unraisablehook = _report_unraisable
    threading.Thread(target=_wait_for_stop, args=(seen,), daemon=True).start()


def _stop(number: int, _: Any) -> None:
    global _told
    if _told is None and not _over:
        _told = number
        if not _starting:
            raise Told


def _let_stops() -> None:
    global _starting
    if _starting:
        _starting = False
        if _told is not None:
            raise Told


def _report_unraisable(swallowed: Any) -> None:
    if not isinstance(swallowed.exc_value, Told):
        sys.__unraisablehook__(swallowed)


def _wait_for_stop(seen: int) -> None:
    global _line
    number = 0
    while number not in STOPS:
        number = os.read(seen, 1)[0]
    _start_timer(PATIENCE, _end_now, number)
    _line = _describe_stop()


def _end_now(number: int) -> None:
    _say(_line or "stopped; the same command goes on from what is committed")
    kill_attached()
    os._exit(_status_of(number))


def _status_of(number: int) -> int:
    return 1 if _reason else 128 + number


def _start_timer(seconds: float, function: Callable[..., None], *args: Any) -> None:
    timer = threading.Timer(seconds, function, args)
    timer.daemon = True
    timer.start()


def _describe_stop() -> str:
    command = shlex.join(["potstill", *sys.argv[1:]])
    if _committed is None:
        return f"{_reason}stopped; `{command}` starts again"
    try:
        return f"{_reason}stopped {_committed()}; `{command}` goes on"
    except Exception:  # the disk may be what is wrong
        return f"{_reason}stopped; `{command}` goes on from what is committed"


def _describe_committed(recipe: "Recipe", rounds: int) -> str:
    """Where the run stands, such as `in round 2 of 3 of tiny; committed of it: rollouts, 1 of 2 shards of scores`."""
    from storage.store import Run, round_slot
    from tasks.rows.plan import count_shards

    run = Run(recipe.root, recipe.name)
    number = run.rounds_done() + 1
    if number > rounds:
        return f"with all {rounds} rounds of {run.name} committed"
    tables = [slot.split("/")[1] for slot in run.slots() if slot.startswith(round_slot(number) + "/")]
    shards, found = count_shards(recipe.rollout), []
    for table in ("completions", "rollouts", "scores", "aligned"):
        if made := tables.count(table):
            found.append(table if made == shards else f"{made} of {shards} shards of {table}")
    if "steps" in tables:  # the last of what training commits
        found.append("the trained student")
    return f"in round {number} of {rounds} of {run.name}; committed of it: {', '.join(found) or 'nothing'}"


def _say(line: str) -> None:
    """Print the last line, once. The stream's own lock may be held, and the terminal may be gone."""
    if _said.acquire(blocking=False):
        with suppress(OSError):
            os.write(2, f"{SHOW_CURSOR if sys.stderr.isatty() else ''}potstill: {line}\n".encode())
        for descriptor in (1, 2):  # what libraries still say while they end is of no use to anybody
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _leave() -> None:
    """The last of the functions at exit: to take the interpreter down piece by piece takes seconds, and may never end."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    take_back_folders()
    os._exit(_status)

"""The command at a terminal: tables on standard output, the log on standard error, and how a command ends."""

import logging
import os
import signal
import sys
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tasks.views.escapes import escape_controls

out = Console(width=None if sys.stdout.isatty() else 140)


class Terminated(KeyboardInterrupt):
    """SIGTERM, as a scheduler, a container's stop or a machine's shutdown sends it."""


def catch_stops() -> None:
    """Let SIGTERM end a command as Ctrl-C does, wherever it arrives.

    Python swallows what is raised in a destructor or a weak reference's callback, as the garbage collector runs them: a stop
    that arrived there is raised again a moment later.
    """

    def terminate(*_: Any) -> None:
        raise Terminated

    def raise_again(swallowed: Any) -> None:
        stop = swallowed.exc_value
        if not isinstance(stop, KeyboardInterrupt):
            sys.__unraisablehook__(swallowed)
            return

        def stop_now(*_: Any) -> None:
            raise stop

        signal.signal(signal.SIGALRM, stop_now)
        signal.setitimer(signal.ITIMER_REAL, 0.05)

    signal.signal(signal.SIGTERM, terminate)
    sys.unraisablehook = raise_again


def end(message: str, status: int) -> NoReturn:
    """End the command with one message."""
    print(f"potstill: {message}", file=sys.stderr)
    sys.exit(status)


def log_plainly() -> None:
    """Log Potstill's lines to standard error, and of Prefect's only critical errors."""
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("potstill")
    logger.addHandler(handler)
    logger.propagate = False


def print_line(text: str) -> None:
    """Print a line without wrapping it, so that a path in it can be copied."""
    out.print(text, soft_wrap=True, highlight=False)


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows that have the same columns as a table."""
    if not rows:
        out.print(f"{title}: none")
        return
    table = Table(title=title, title_justify="left", highlight=False)
    for column in rows[0]:
        numeric = all(isinstance(row[column], int | float | None) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if value is None else escape_controls(str(value))) for value in row.values()))  # no markup
    out.print(table)

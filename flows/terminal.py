"""The command at a terminal: tables on standard output, the log on standard error."""

import logging
import os
import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tasks.views.escapes import escape_controls, shorten

out = Console(width=None if sys.stdout.isatty() else 140)


class Plain(logging.Formatter):
    """Lines that no terminal obeys: names and texts in them may be a stranger's."""

    def format(self, record: logging.LogRecord) -> str:
        return escape_controls(super().format(record))


def log_plainly() -> None:
    """Log Potstill's lines to standard error, and of Prefect's only critical errors."""
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Plain("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("potstill")
    logger.addHandler(handler)
    logger.propagate = False


def print_line(text: str) -> None:
    """Print a line without wrapping it, so that a path in it can be copied."""
    out.print(_plain(text), soft_wrap=True, highlight=False)


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows that have the same columns as a table."""
    if not rows:
        out.print(_plain(f"{title}: none"))
        return
    table = Table(title=_plain(title), title_justify="left", highlight=False)
    for column in rows[0]:
        numeric = all(isinstance(row[column], int | float | None) for row in rows)
        table.add_column(_plain(column), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_plain("" if value is None else shorten(str(value))) for value in row.values()))
    out.print(table)


def _plain(text: str) -> Text:
    """A text in which neither rich nor the terminal finds anything to obey."""
    return Text(escape_controls(text))

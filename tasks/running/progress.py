"""A stage's progress: a bar on a terminal, plain lines elsewhere (a log file, a Prefect worker)."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger("potstill")
logger.setLevel(logging.INFO)
LINE_SECONDS = 20.0


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[..., None]]:
    """Yield `advance(count, note="")`. Without a terminal a line is logged every 20 s, if the work takes that long."""
    if sys.stderr.isatty():
        from rich.console import Console

        columns = (
            TextColumn("{task.description:>24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total, note="")
            yield lambda count=1, note="": bar.update(task, advance=count, note=note)
        return
    done, last = 0, time.monotonic()

    def advance(count: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += count
        if time.monotonic() - last >= LINE_SECONDS and done < total:
            last = time.monotonic()
            logger.info("%s: %d of %d %s", what, done, total, note)

    yield advance

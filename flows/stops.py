"""The signals that stop a command. It imports next to nothing: a stop may come while Python still imports the rest."""

import signal
from collections.abc import Callable

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def on_stops(handler: Callable[[int, object], None]) -> None:
    """Call it for each stop that is not ignored (as `nohup` ignores SIGHUP)."""
    for number in STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)

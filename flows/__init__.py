"""What runs, in which order."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tempfile

# Prefect reads these when it is imported. A value from the user's environment has priority.
for _name, _value in {
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "potstill",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}.items():
    os.environ.setdefault(_name, _value)


def _has_place(home: str) -> bool:
    """Whether there is a place for Prefect's own files; not so in a container with a read-only home."""
    try:
        os.makedirs(os.path.join(home, ".prefect"), exist_ok=True)
    except OSError:
        return False
    return True


def _lend_folder(variable: str) -> None:
    """Let an environment variable name a folder that goes with the process."""
    import tempfile

    _lent.append(tempfile.TemporaryDirectory(prefix="potstill-home-", ignore_cleanup_errors=True))
    os.environ[variable] = _lent[-1].name


def take_back_folders() -> None:
    """Remove what was lent, for a process that ends without Python's own end."""
    for folder in _lent:
        folder.cleanup()


_lent: "list[tempfile.TemporaryDirectory[str]]" = []
if not os.path.isabs(os.path.expanduser("~")):  # a user without an entry: libraries make a folder "~", or end in a traceback
    _lend_folder("HOME")
if "PREFECT_HOME" not in os.environ and not _has_place(os.path.expanduser("~")):
    _lend_folder("PREFECT_HOME")

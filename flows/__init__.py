"""What runs, in which order."""

import os
import tempfile
from pathlib import Path

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


def _writable_home() -> tempfile.TemporaryDirectory[str] | None:
    """A temporary PREFECT_HOME where the user's own cannot be written, as in a container with a read-only home."""
    try:
        (Path.home() / ".prefect").mkdir(parents=True, exist_ok=True)
        return None
    except (OSError, RuntimeError):  # RuntimeError: no home at all
        return tempfile.TemporaryDirectory(prefix="potstill-prefect-", ignore_cleanup_errors=True)


if "PREFECT_HOME" not in os.environ and (_home := _writable_home()) is not None:
    os.environ["PREFECT_HOME"] = _home.name

"""What runs, in which order."""

import os

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


def _has_home() -> bool:
    """Whether there is a place for Prefect's own files; not so in a container with a read-only home."""
    home = os.path.expanduser("~")
    if not os.path.isabs(home):  # a user without an entry
        return False
    try:
        os.makedirs(os.path.join(home, ".prefect"), exist_ok=True)
    except OSError:
        return False
    return True


if "PREFECT_HOME" not in os.environ and not _has_home():
    import tempfile

    _home = tempfile.TemporaryDirectory(prefix="potstill-prefect-", ignore_cleanup_errors=True)
    os.environ["PREFECT_HOME"] = _home.name

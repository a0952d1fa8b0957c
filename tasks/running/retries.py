"""Which failures make a stage try again: those of engines and networks, where another try can succeed."""

import errno
from typing import Any

import httpx

from configs.errors import Unavailable

NETWORK = {errno.ECONNRESET, errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ETIMEDOUT, errno.EPIPE}


def may_help(error: object) -> bool:
    """Whether another try may succeed. It never does for a user's mistake, a full disk, or a bug."""
    temporary = isinstance(error, Unavailable | ConnectionError | TimeoutError | httpx.TransportError)
    return temporary or (isinstance(error, OSError) and error.errno in NETWORK)


def _check_retry(task: Any, task_run: Any, state: Any) -> bool:
    return may_help(state.result(raise_on_failure=False))


RETRIES: dict[str, Any] = {"retries": 2, "retry_delay_seconds": [5, 30], "retry_condition_fn": _check_retry}

"""One Prefect server for all tests that run a flow."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")

import flows  # noqa: F401  (Prefect's defaults, before anything imports Prefect)


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """A Prefect server for the session; its address."""
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield PREFECT_API_URL.value()

"""What tests of several folders share: a Prefect server, and commands in forks of one process."""

import os
import signal
from collections.abc import Iterator

import pytest

os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores: each computes on one
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from forks import Forks

import flows  # noqa: F401  (Prefect's defaults, before anything imports Prefect)

FIRST = ("server", "faults", "flows")  # a file of theirs takes up to a minute: none of them should be what all wait for last


def pytest_configure() -> None:
    """Where a shell ignores them (nohup, a background job), commands would ignore them, too, and some are sent them here."""
    for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that pytest's workers end together; within a folder as ever."""
    place = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path.parent.name, len(FIRST)))


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """A Prefect server for the session; its address."""
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield PREFECT_API_URL.value()


@pytest.fixture(scope="session")
def forks(server) -> Iterator[Forks]:
    """Where commands run: forks of one process, which know the session's server."""
    started = Forks(server)
    yield started
    started.close()

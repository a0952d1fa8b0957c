"""Toy models from the property tests, served over real sockets."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

CHECKOUT = Path(__file__).parents[2]
sys.path.append(str(CHECKOUT / "tests" / "property"))

from fake_server import FakeServer  # noqa: E402

from tasks.engines import http  # noqa: E402
from tasks.models.reference import ModelRef  # noqa: E402


@pytest.fixture
def serve(monkeypatch) -> Iterator[Callable[..., FakeServer]]:
    """Starts a server of a model; all are stopped in the end. Second attempts come soon."""
    monkeypatch.setattr(http, "PAUSE", 0.01)
    started: list[FakeServer] = []

    def start(ref: ModelRef, **options) -> FakeServer:
        started.append(FakeServer(ref.path, **options))
        return started[-1]

    yield start
    for one in started:
        one.stop()


@pytest.fixture
def pauses(serve, monkeypatch) -> list[float]:
    """The seconds between attempts, noted and not waited for. Other modules, such as Prefect's threads, sleep on."""
    noted: list[float] = []
    monkeypatch.setattr(http, "time", SimpleNamespace(**{**vars(time), "sleep": noted.append}))
    monkeypatch.setattr(http, "PAUSE", 1.0)
    return noted

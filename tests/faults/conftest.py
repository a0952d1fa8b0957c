"""The command as a process that can be killed, and one run that nothing happened to."""

import pytest
from killing import Potstill, Reference, arguments, unbroken


@pytest.fixture(scope="session")
def potstill(forks, tmp_path_factory) -> Potstill:
    return Potstill(forks, tmp_path_factory.mktemp("commands"))


@pytest.fixture(scope="session")
def reference(potstill, tmp_path_factory) -> Reference:
    return unbroken(potstill, tmp_path_factory.mktemp("unbroken") / "runs", arguments)

"""The command as a process that can be killed, and one run that nothing happened to."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from killing import Potstill, Reference, arguments, unbroken


@pytest.fixture(scope="session")
def potstill(forks, tmp_path_factory) -> Potstill:
    return Potstill(forks, tmp_path_factory.mktemp("commands"))


@pytest.fixture(scope="session")
def reference(potstill, tmp_path_factory) -> Reference:
    return unbroken(potstill, tmp_path_factory.mktemp("unbroken") / "runs", arguments)


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A disk of its own, of 1 MiB until `resize`: a tmpfs, which a superuser alone can mount."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)

"""One Prefect server for all tests that run a flow, one small run to look at, and commands as a shell runs them."""

import multiprocessing
import os
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from prefect.settings import PREFECT_API_URL
from prefect.testing.utilities import prefect_test_harness

from flows.distill import distill

CHECKOUT = Path(__file__).parents[2]
RECIPES = CHECKOUT / "tests" / "recipes"
TINY = RECIPES / "tiny.toml"
POTSTILL = Path(sys.executable).parent / "potstill"


@dataclass(frozen=True)
class Ended:
    """A command that ran: its exit status and what it wrote."""

    status: int
    out: str
    err: str


def _command(arguments: list[str], folder: str, out: str, err: str) -> None:
    """In a process of its own: `potstill` with these arguments, its output in files."""
    for number, path in ((0, os.devnull), (1, out), (2, err)):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(descriptor, number)
    os.chdir(folder)
    sys.argv = ["potstill", *arguments]
    from flows.cli import main

    main()


@pytest.fixture(scope="session")
def potstill(tmp_path_factory) -> Callable[..., Ended]:
    """Runs the command in a fork of a process that has imported everything already: 0.3 s in place of 7."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flows.cli", "flows.distill", "tasks.inspect", "reasoning_gym"])

    def run(*arguments: Any, folder: Path | None = None) -> Ended:
        place = tmp_path_factory.mktemp("command")
        texts = [str(arg) for arg in arguments]
        process = context.Process(target=_command, args=(texts, str(folder or place), f"{place}/out", f"{place}/err"))
        process.start()
        process.join(60)
        assert process.exitcode is not None, "the command hangs"
        return Ended(process.exitcode, (place / "out").read_text(), (place / "err").read_text())

    return run


@pytest.fixture(scope="session")
def server() -> str:
    """A Prefect server for the session; its address."""
    with prefect_test_harness(server_startup_timeout=120):
        yield PREFECT_API_URL.value()


@pytest.fixture(scope="session")
def tiny(server, tmp_path_factory) -> Path:
    """The run folder of tests/recipes/tiny.toml after its two rounds; the models it is made of lie beside it."""
    root = tmp_path_factory.mktemp("tiny")
    result = distill(str(TINY), overrides=(f"root={root}",))
    assert result["rounds"] == 2
    return root / "tiny"


@pytest.fixture(scope="session")
def models(tiny) -> dict[str, Path]:
    """Model folders: a student and a teacher with their own tokenizers, and the student as it was before any training."""
    made = {role: tiny.parent / f"test-{role}-seed0" for role in ("student", "teacher")}
    folders = {role: folder / "round=0001" / "student" for role, folder in made.items()}
    return {**folders, "untrained": made["student"] / "round=0000" / "student"}


@pytest.fixture
def recipe(models, tmp_path) -> Callable[..., Path]:
    """Writes tiny.toml with models that exist already, and with changes (`train__batch_size=8`); its path."""

    def write(**changes: Any) -> Path:
        data = tomllib.loads(TINY.read_text())
        data["student"], data["teacher"] = {"model": str(models["student"])}, {"model": str(models["teacher"])}
        data["root"] = str(tmp_path / "runs")
        for key, value in changes.items():
            *tables, last = key.split("__")
            table = data
            for name in tables:
                table = table.setdefault(name, {})
            if value is None:
                table.pop(last, None)
            else:
                table[last] = str(value) if isinstance(value, Path) else value
        path = tmp_path / f"{data['name']}.toml"
        path.write_text(tomli_w.dumps(data))
        return path

    return write


def files(folder: Path) -> dict[str, int]:
    """Every file below a folder with its time of change."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in found}

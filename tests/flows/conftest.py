"""One small run to look at, and commands as a shell runs them."""

import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from forks import retried
from helpers import TINY, Ended

from flows.distill import distill

os.environ["HF_HUB_OFFLINE"] = "1"  # a model that is not here is not looked for elsewhere


@pytest.fixture(scope="session")
def potstill(forks, tmp_path_factory) -> Callable[..., Ended]:
    """Runs the command in a fork of a process that has imported everything already: 0.1 s in place of 7."""

    def run(*arguments: Any, folder: Path | None = None, patient: bool = True) -> Ended:
        place = tmp_path_factory.mktemp("command")
        status = forks.wait(forks.start(arguments, folder or place, place / "out", place / "err", patient))
        return Ended(status, (place / "out").read_text(), (place / "err").read_text())

    return run


@pytest.fixture
def impatient(monkeypatch) -> None:
    """Stages that fail in this process are tried again at once; how long they wait is held in tests/unit/test_retries.py."""
    for stage in retried():
        monkeypatch.setattr(stage, "retry_delay_seconds", 0)


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

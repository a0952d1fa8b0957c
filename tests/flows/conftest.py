"""One small run to look at, and commands as a shell runs them."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from helpers import CHECKOUT, TINY, Ended

from flows.distill import distill

os.environ["HF_HUB_OFFLINE"] = "1"  # a model that is not here is not looked for elsewhere


@pytest.fixture(scope="session")
def potstill(tmp_path_factory) -> Iterator[Callable[..., Ended]]:
    """Runs the command in a fork of a process that has imported everything already: 0.1 s in place of 7."""
    python = [sys.executable, Path(__file__).parent / "forks.py"]
    forks = subprocess.Popen(python, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT)

    def run(*arguments: Any, folder: Path | None = None) -> Ended:
        place = tmp_path_factory.mktemp("command")
        request = [[str(arg) for arg in arguments], str(folder or place), f"{place}/out", f"{place}/err"]
        print(json.dumps(request), file=forks.stdin, flush=True)
        _, status = forks.stdout.readline(), int(forks.stdout.readline())
        return Ended(status, (place / "out").read_text(), (place / "err").read_text())

    yield run
    forks.stdin.close()
    forks.stdout.close()
    assert forks.wait(10) == 0


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

"""The deployments of prefect.yaml on a real server with a real worker, as the README says to use them."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
import yaml

from storage.store import Run

HOUSE = Path(__file__).parents[2]
TINY = "tests/recipes/tiny.toml"
PATIENCE = 240.0  # seconds, on a busy machine


class Prefect:
    """The `prefect` command against a server of its own."""

    def __init__(self, home: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.home, self.children = home, []
        self.env = {
            **os.environ,
            "PWD": str(HOUSE),
            "PREFECT_HOME": str(home),
            "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_LOGGING_LEVEL": "INFO",
            "DO_NOT_TRACK": "1",
        }

    def __call__(self, *args: str) -> str:
        command = [sys.executable, "-m", "prefect", "--no-prompt", *args]
        done = subprocess.run(command, cwd=HOUSE, env=self.env, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, *args: str) -> None:
        log = open(self.home / f"{args[0]}.log", "w")  # noqa: SIM115
        self.children.append(
            subprocess.Popen([sys.executable, "-m", "prefect", *args], cwd=HOUSE, env=self.env, stdout=log, stderr=log)
        )

    def stop(self) -> None:
        for child in reversed(self.children):
            child.terminate()
            child.wait(60)


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    command = Prefect(tmp_path_factory.mktemp("prefect"))
    command.start("server", "start", "--host", "127.0.0.1", "--port", str(command.port))
    wait_until(lambda: healthy(command.port), "the server is healthy")
    command("work-pool", "create", "potstill", "--type", "process")
    command.start("worker", "start", "--pool", "potstill", "--type", "process")
    yield command
    command.stop()


def healthy(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=5).status == 200
    except OSError:
        return False


def wait_until(condition, what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited {PATIENCE:.0f} s in vain until {what}"
        time.sleep(0.5)


def test_manual_deployment_runs_to_the_rounds_asked_for(prefect: Prefect, tmp_path: Path) -> None:
    prefect("deploy", "--all")
    assert "distill/quickstart-nightly" in prefect("deployment", "ls")

    here = f'overrides=["root={tmp_path}"]'
    prefect("deployment", "run", "distill/quickstart", "-p", f"config={TINY}", "-p", "rounds=2", "-p", here, "--watch")

    assert Run(str(tmp_path), "tiny").rounds_done() == 2
    correct = pl.scan_parquet(f"{tmp_path}/tiny/round=*/evals/*.parquet").select("model", "correct").collect()
    assert set(correct["model"]) == {"student", "teacher"}


@pytest.mark.slow
def test_scheduled_deployment_advances_a_run_by_one_round_each_time(prefect: Prefect, tmp_path: Path) -> None:
    """The nightly deployment as it stands, on a schedule of seconds: two firings, two rounds, and no third."""
    house = yaml.safe_load((HOUSE / "prefect.yaml").read_text())
    nightly = next(d for d in house["deployments"] if d["name"] == "quickstart-nightly")
    assert nightly["schedules"][0]["cron"]
    nightly["parameters"] |= {"config": TINY, "overrides": [f"root={tmp_path}"]}
    nightly["schedules"] = [{"interval": 40}]
    often = tmp_path / "often.yaml"
    often.write_text(yaml.safe_dump({**house, "deployments": [nightly]}))
    run = Run(str(tmp_path), "tiny")

    prefect("deploy", "--all", "--prefect-file", str(often))
    seen = []

    def advanced() -> bool:
        seen.append(run.rounds_done())
        return seen[-1] == 2

    wait_until(advanced, "the schedule has made two rounds")
    assert sorted(set(seen)) == seen[:1] + [n for n in (1, 2) if n > seen[0]], "a firing skipped a round"

    time.sleep(45)  # one more firing finds the recipe's rounds done
    assert run.rounds_done() == 2
    prefect("deployment", "schedule", "clear", "distill/quickstart-nightly", "--accept-yes")

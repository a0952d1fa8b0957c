"""`potstill up`: the deployments of prefect.yaml on a real server with a real worker, as flows/README.md says to use them."""

import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import polars as pl
import psutil
import pytest
import yaml

from storage.store import Run

HOUSE = Path(__file__).parents[2]
TINY = "tests/recipes/tiny.toml"
PATIENCE = 240.0  # seconds, on a busy machine

pytestmark = pytest.mark.slow


class Prefect:
    """`potstill up`, and the `prefect` command against its server."""

    def __init__(self, home: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.home, self.url = home, f"http://127.0.0.1:{port}/api"
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        self.env |= {"PREFECT_HOME": str(home), "PREFECT_SERVER_API_PORT": str(port), "DO_NOT_TRACK": "1"}
        with open(home / "out", "w") as out, open(home / "err", "w") as err:
            command = [sys.executable, "-m", "flows.cli", "up"]
            self.up = subprocess.Popen(command, cwd=HOUSE, env=self.env, stdout=out, stderr=err, process_group=0)
        wait_until(lambda: "export PREFECT_API_URL=" in self.read("out") or self.up.poll() is not None, "all of it is up")
        assert self.up.poll() is None, self.read("err")

    def read(self, name: str) -> str:
        return (self.home / name).read_text()

    def __call__(self, *args: str) -> str:
        """As in another terminal, after the line that `up` says."""
        (url,) = re.findall(r"^export PREFECT_API_URL=(\S+)", self.read("out"), re.MULTILINE)
        command = [sys.executable, "-m", "prefect", "--no-prompt", *args]
        env = {**self.env, "PREFECT_API_URL": url}
        done = subprocess.run(command, cwd=HOUSE, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def states(self) -> dict[str, str]:
        """The flow runs that the database has, and their states."""
        with closing(sqlite3.connect(self.home / "prefect.db")) as database:
            return dict(database.execute("SELECT name, state_type FROM flow_run"))

    def end(self) -> None:
        """Ctrl-C, unless it has ended."""
        if self.up.poll() is None:
            os.killpg(self.up.pid, signal.SIGINT)
            self.up.wait(60)


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    command = Prefect(tmp_path_factory.mktemp("prefect"))
    yield command
    command.end()


def wait_until(condition, what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited {PATIENCE:.0f} s in vain until {what}"
        time.sleep(0.5)


def test_manual_deployment_runs_to_the_rounds_asked_for(prefect: Prefect, tmp_path: Path) -> None:
    assert "distill/quickstart-nightly" in prefect("deployment", "ls")

    here = f'overrides=["root={tmp_path}"]'
    prefect("deployment", "run", "distill/quickstart", "-p", f"config={TINY}", "-p", "rounds=2", "-p", here, "--watch")

    assert Run(str(tmp_path), "tiny").rounds_done() == 2
    correct = pl.scan_parquet(f"{tmp_path}/tiny/round=*/evals/*.parquet").select("model", "correct").collect()
    assert set(correct["model"]) == {"student", "teacher"}


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


def test_a_stop_ends_all_of_it(prefect: Prefect, tmp_path: Path) -> None:
    """Last, in the middle of a flow run: which ends as crashed, so that it does not keep the next one waiting."""
    here = f'overrides=["root={tmp_path}"]'
    prefect("deployment", "run", "distill/quickstart", "-p", f"config={TINY}", "-p", here)
    wait_until((tmp_path / "tiny/_manifests/vocab/teacher.json").exists, "the flow run has begun")
    assert "RUNNING" in prefect.states().values()

    processes = psutil.Process(prefect.up.pid).children(recursive=True)
    assert len(processes) > 2
    started = time.monotonic()
    prefect.end()
    assert time.monotonic() - started < 10
    assert prefect.up.returncode == 130
    assert not psutil.wait_procs(processes, timeout=2)[1]
    assert prefect.read("err").endswith("potstill: stopped; `potstill up` starts again\n")
    assert "RUNNING" not in prefect.states().values()
    assert "CRASHED" in prefect.states().values()


def test_what_a_killed_one_leaves_does_not_last(prefect: Prefect, tmp_path: Path) -> None:
    """Nobody tells the server of it. Its processes end by themselves; the next `up` says that the flow run has crashed."""
    again = Prefect(prefect.home)
    here = f'overrides=["root={tmp_path}"]'
    again("deployment", "run", "distill/quickstart", "-p", f"config={TINY}", "-p", here)
    wait_until((tmp_path / "tiny/_manifests/vocab/teacher.json").exists, "the flow run has begun")
    processes = psutil.Process(again.up.pid).children(recursive=True)
    again.up.kill()
    again.up.wait()
    assert not psutil.wait_procs(processes, timeout=10)[1]
    (left,) = [name for name, state in again.states().items() if state == "RUNNING"]

    again = Prefect(prefect.home)
    try:
        assert again.states()[left] == "CRASHED"
        assert "RUNNING" not in again.states().values()
        again("deployment", "run", "distill/quickstart", "-p", f"config={TINY}", "-p", here, "--watch")
        assert Run(str(tmp_path), "tiny").rounds_done() == 2
    finally:
        again.end()

"""What a command has started or waits for ends with it: Prefect's temporary server, vLLM, training processes, requests."""

import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from forks import CHECKOUT
from killing import Potstill, arguments
from stopping import Stop, one_message

sys.path.append(str(CHECKOUT / "tests" / "engines"))

from fake_server import FakeServer

FAKES = CHECKOUT / "tests" / "engines" / "fakes"
# `potstill` in a process that knows of no Prefect server.
ALONE = """
import os, sys
del os.environ["PREFECT_API_URL"]
os.environ["PREFECT_HOME"] = sys.argv.pop(1)
from prefect.context import refresh_global_settings_context
refresh_global_settings_context()
from flows.cli import main
main()
"""


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def children(potstill: Potstill, words: str) -> list[psutil.Process]:
    """Those of the command whose command line has these words."""
    found = []
    for each in psutil.Process(potstill.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has just ended
            if words in " ".join(each.cmdline()):
                found.append(each)
    return found


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture
def alone(potstill, home, tmp_path) -> Callable[..., None]:
    """Starts a run with a temporary Prefect server, and waits until something of it is committed."""

    def start(slot: str) -> None:
        command = arguments(tmp_path / "runs")
        potstill.start("-c", ALONE, home, *command)
        potstill.arguments = command
        wait_until((tmp_path / "runs" / slot).exists)

    return start


def test_prefects_temporary_server_ends_with_the_command(potstill, alone):
    """Told to, in its group; killed; and told to while the server does not answer."""
    alone("test-teacher-seed0/_manifests/round=0000/student.json")
    assert len(children(potstill, "prefect.server")) == 1
    Stop(potstill, signal.SIGTERM, group=True).goes_on()

    alone("test-teacher-seed0/_manifests/round=0001/evals/student.json")
    (server,) = children(potstill, "prefect.server")
    os.kill(potstill.pid, signal.SIGKILL)
    potstill.wait()
    assert psutil.wait_procs([server], timeout=10) == ([server], [])

    alone("tiny/_manifests/prompts/train.json")
    (server,) = children(potstill, "prefect.server")
    server.suspend()
    Stop(potstill, signal.SIGINT, group=False).goes_on()


@pytest.mark.slow
def test_a_temporary_server_that_dies(potstill, alone):
    """As where memory is short: not waited for, as Prefect's client would."""
    alone("test-teacher-seed0/_manifests/round=0000/student.json")
    (server,) = children(potstill, "prefect.server")
    server.kill()
    assert potstill.wait() == 1
    begins = "potstill: Prefect's temporary server ended by itself (status -9): stopped in round 1 of 1 of test-"
    assert one_message(potstill.err).startswith(begins)


@pytest.mark.slow
def test_a_temporary_server_that_cannot_start(potstill, tmp_path):
    command = arguments(tmp_path / "runs")
    setting = "sqlite+aiosqlite:////nowhere/prefect.db"
    code = f"import os; os.environ['PREFECT_SERVER_DATABASE_CONNECTION_URL'] = {setting!r}\n{ALONE}"
    assert potstill.run("-c", code, tmp_path, *command) == 1
    assert "potstill: Prefect's temporary server did not start; its last output:\n" in potstill.err
    assert "unable to open database file" in potstill.err
    assert "Traceback" not in potstill.err


@pytest.fixture
def model(reference, tmp_path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(reference.root / "test-teacher-seed0" / "round=0001" / "student", folder)
    return folder


def with_teacher(root: Path, **teacher: object) -> list[str]:
    settings = ", ".join(f"{name} = {json.dumps(value)}" for name, value in teacher.items())
    return arguments(root, f"teacher={{{settings}}}")


def test_a_server_that_does_not_answer_is_not_waited_for(potstill, model, tmp_path):
    """Asked what it serves, asked for scores, and between two tries."""
    served = {"model": str(model), "engine": "server"}
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        potstill.start(*with_teacher(tmp_path / "runs", **served, urls=[f"http://127.0.0.1:{deaf.getsockname()[1]}"]))
        deaf.settimeout(120)
        with deaf.accept()[0]:
            assert "committed of it: nothing" in Stop(potstill, signal.SIGTERM, group=True).line

    fake = FakeServer(str(model))
    try:
        for faults, number in (([3600] * 1000, signal.SIGINT), ([503] * 1000, signal.SIGHUP)):
            fake.requests.clear()
            fake.faults.clear()
            fake.faults.extend(faults)
            potstill.start(*with_teacher(tmp_path / "runs", **served, urls=[fake.url]))
            wait_until(lambda: fake.requests)
            time.sleep(0.3)
            Stop(potstill, number, group=True).goes_on()
    finally:
        fake.stop()


def test_vllm_ends_with_the_command(potstill, model, tmp_path):
    """While it loads nothing and computes; also where the command is killed."""
    python = tmp_path / "python"
    code = f"import runpy, sys; sys.path.insert(0, {str(FAKES)!r}); sys.argv = sys.argv[2:]"
    python.write_text(f"#!{sys.executable}\n{code}; runpy.run_path(sys.argv[0], run_name='__main__')\n")
    python.chmod(0o755)
    (model / "fault").write_text("slow")
    for number in (signal.SIGINT, signal.SIGKILL):
        command = with_teacher(tmp_path / "runs", model=str(model), engine="vllm", vllm_python=str(python))
        potstill.start(*command)
        wait_until(lambda: children(potstill, "gpu_memory_utilization"))
        time.sleep(0.5)
        (child,) = children(potstill, "gpu_memory_utilization")
        if number == signal.SIGINT:
            Stop(potstill, number, group=True).goes_on()
        else:
            os.kill(potstill.pid, number)
            potstill.wait()
        assert psutil.wait_procs([child], timeout=10) == ([child], [])


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.5, 3.0])  # seconds; a quiet machine has trained in five
def test_training_processes_end_with_the_command(potstill, tmp_path, after):
    """Told to in all ways, and killed; then the run goes on with them."""
    root = tmp_path / "runs"
    command = arguments(root, "train.processes=2", "train.micro_batch_size=1")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL):
        potstill.start(*command)
        wait_until(lambda: len(children(potstill, "tasks.training.processes")) == 3)
        time.sleep(after)
        started = children(potstill, "tasks.training.processes")
        if number == signal.SIGKILL:
            os.kill(potstill.pid, number)
            potstill.wait()
        else:
            Stop(potstill, number, group=True).goes_on()
        assert not psutil.wait_procs(started, timeout=10)[1]
    assert potstill.run(*command) == 0, potstill.err

"""How long tasks may take, and whose turn it is on an accelerator: real processes, real kills."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from helpers import CHECKOUT
from huggingface_hub.utils import _cache_assets as assets
from prefect import flow, task

from configs.errors import Unavailable
from configs.load import load
from configs.schema import Compute
from flows import compute
from flows.compute import accelerators, exclusive, in_time
from flows.distill import distill
from tasks.retries import RETRIES

USER = """
import logging, sys, time, flows.compute as compute
logging.basicConfig(level=logging.INFO)
from configs.load import load
compute.accelerators = lambda recipe: {"GPU-of-a-test"}
with compute.exclusive(load(sys.argv[1], sys.argv[2:])):
    print("has it", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def user(tmp_path):
    """Starts another process that computes on an accelerator until it is killed; ends it after the test."""
    with ExitStack() as ended:

        def start(*overrides: str) -> subprocess.Popen:
            command = [sys.executable, "-c", USER, str(CHECKOUT / "tests/recipes/tiny.toml"), *overrides]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(
                command, **pipes, text=True, cwd=CHECKOUT, env=os.environ | {"HF_ASSETS_CACHE": str(tmp_path)}
            )
            ended.callback(process.wait)
            ended.callback(process.kill)
            return process

        yield start


def until(process: subprocess.Popen, words: str) -> None:
    """Reads what a process says until it says this."""
    assert any(words in line for line in process.stdout), f"it ended without saying {words!r}"


def test_a_crash_leaves_no_accelerator_taken(user, tmp_path):
    first = user()
    until(first, "has it")
    second = user()
    until(second, f"GPU-of-a-test: waiting for process {first.pid} on")
    first.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    until(second, "has it")
    assert time.monotonic() - killed < 5


def test_who_has_it_is_said(user, tmp_path, monkeypatch, caplog):
    first = user()
    until(first, "has it")
    monkeypatch.setattr(assets, "HF_ASSETS_CACHE", str(tmp_path))
    monkeypatch.setattr(compute, "accelerators", lambda recipe: {"GPU-of-a-test"})
    caplog.set_level("INFO", "potstill")

    def kill(_: float) -> None:
        first.kill()
        first.wait()

    monkeypatch.setattr(time, "sleep", kill)  # between two looks
    with exclusive(load(CHECKOUT / "tests/recipes/tiny.toml")), exclusive(load(CHECKOUT / "tests/recipes/tiny.toml")):
        assert f"GPU-of-a-test: waiting for process {first.pid} on" in caplog.text
    assert not list(tmp_path.rglob("GPU-*"))


def test_an_accelerator_may_be_shared(user):
    first = user()
    until(first, "has it")
    until(user("compute.exclusive=false"), "has it")


def test_the_accelerators_of_a_recipe(monkeypatch):
    """Every GPU that training is spread over, and the teacher's; not that of a server, nor the CPU."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: SimpleNamespace(uuid=index))
    tiny = CHECKOUT / "tests/recipes/tiny.toml"
    assert accelerators(load(tiny, ["student.device=cpu", "teacher.device=cpu"])) == set()
    used = accelerators(load(tiny, ["student.device=cuda", "teacher.device='cuda:5'", "train.processes=2"]))
    assert used == {"GPU-0", "GPU-1", "GPU-5"}
    served = "teacher={model='x', engine='server', urls=['http://x'], device='cuda:1'}"
    assert accelerators(load(tiny, ["student.device=mps", served])) == {f"mps-0-of-{socket.gethostname()}"}
    assert accelerators(load(tiny, ["student.device='cuda:9'", "teacher.device=cpu"])) == set()


@pytest.mark.usefixtures("server")
def test_what_takes_too_long_is_stopped_and_tried_again():
    """Twice, as every failure of an engine; what is not an engine's once. Time enough changes nothing."""
    tries = []

    def wait(seconds: float) -> str:
        tries.append(seconds)
        time.sleep(seconds)
        return "done"

    again = task(wait, name="again", **RETRIES).with_options(retry_delay_seconds=0)

    @flow
    def late():
        limit = Compute(task_timeout=0.5)
        assert in_time(limit, again, 0.0) == in_time(Compute(), again, 0.6) == "done"
        tries.clear()
        for stage, times in ((again, 3), (task(wait, name="once"), 1)):
            with pytest.raises(Unavailable, match=rf"^{stage.name}: not done in compute\.task_timeout = 0\.5 seconds; "):
                in_time(limit, stage, 30.0)
            assert tries == [30.0] * times
            tries.clear()

    started = time.monotonic()
    late()
    assert time.monotonic() - started < 25


def test_a_run_whose_task_took_too_long_goes_on(potstill, recipe, tmp_path):
    path = recipe()
    ended = potstill("run", path, "--rounds", "1", "--set", "compute.task_timeout=0.001")
    assert ended.status == 1, ended.err
    assert "not done in compute.task_timeout = 0.001 seconds" in ended.err
    assert "the same command goes on from what is committed" in ended.err
    assert "Traceback" not in ended.err.rsplit("potstill:", 1)[-1]
    assert distill(str(path), rounds=1)["rounds"] == 1

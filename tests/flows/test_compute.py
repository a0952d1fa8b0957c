"""How long tasks may take, and whose turn it is on an accelerator: real processes, real kills."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
from forks import Forks
from helpers import CHECKOUT, TINY
from huggingface_hub.utils import _cache_assets as assets
from prefect import flow, task

from configs.compute import Compute
from configs.errors import Unavailable
from configs.load import load_recipe
from flows import compute
from flows.compute import accelerators_of, hold_accelerators, run_in_time
from flows.distill import distill
from tasks.running.retries import RETRIES

USER = """
import logging, sys, time, flows.compute as compute
from huggingface_hub.utils import _cache_assets as assets
logging.basicConfig(level=logging.INFO, force=True)
from configs.load import load_recipe
assets.HF_ASSETS_CACHE = sys.argv[1]
compute.accelerators_of = lambda recipe: {"GPU-of-a-test"}
with compute.hold_accelerators(load_recipe(sys.argv[2], sys.argv[3:])):
    print("has it", flush=True)
    time.sleep(60)
"""


class User:
    """A process that computes on an accelerator until it is killed; what it says is read as it says it."""

    def __init__(self, forks: Forks, cache: Path, overrides: tuple[str, ...]):
        said = cache / f"{len(list(cache.iterdir()))}.fifo"
        os.mkfifo(said)
        self.forks = forks
        self.pid = forks.start(["-c", USER, cache, TINY, *overrides], CHECKOUT, said, said)
        self.said = said.open()

    def until(self, words: str) -> None:
        assert any(words in line for line in self.said), f"it ended without saying {words!r}"

    def end(self) -> None:
        """Kill it, if it still is there."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self.forks.wait(self.pid)
            self.said.close()
            self.pid = 0


@pytest.fixture
def user(forks, tmp_path) -> Iterator[Callable[..., User]]:
    """Starts such processes, which share what they know of accelerators; ends them after the test."""
    cache = tmp_path / "users"
    cache.mkdir()
    with ExitStack() as ended:

        def start(*overrides: str) -> User:
            process = User(forks, cache, overrides)
            ended.callback(process.end)
            return process

        yield start


def test_a_crash_leaves_no_accelerator_taken(user):
    first = user()
    first.until("has it")
    second = user()
    second.until(f"GPU-of-a-test: waiting for process {first.pid} on")
    killed = time.monotonic()
    first.end()
    second.until("has it")
    assert time.monotonic() - killed < 5


def test_who_has_it_is_said(user, tmp_path, monkeypatch, caplog):
    first = user()
    first.until("has it")
    said = f"GPU-of-a-test: waiting for process {first.pid} on"
    monkeypatch.setattr(assets, "HF_ASSETS_CACHE", str(tmp_path / "users"))
    monkeypatch.setattr(compute, "accelerators_of", lambda recipe: {"GPU-of-a-test"})
    caplog.set_level("INFO", "potstill")
    monkeypatch.setattr(time, "sleep", lambda _: first.end())  # between two looks
    with hold_accelerators(load_recipe(TINY)), hold_accelerators(load_recipe(TINY)):
        assert said in caplog.text
    assert not list(tmp_path.rglob("GPU-*"))


def test_an_accelerator_may_be_shared(user):
    user().until("has it")
    user("compute.exclusive=false").until("has it")


def test_the_accelerators_of_a_recipe(monkeypatch):
    """Every GPU that training is spread over, and the teacher's; not that of a server, nor the CPU."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: SimpleNamespace(uuid=index))
    assert accelerators_of(load_recipe(TINY, ["student.device=cpu", "teacher.device=cpu"])) == set()
    used = accelerators_of(load_recipe(TINY, ["student.device=cuda", "teacher.device='cuda:5'", "train.processes=2"]))
    assert used == {"GPU-0", "GPU-1", "GPU-5"}
    served = "teacher={model='x', engine='server', urls=['http://x'], device='cuda:1'}"
    assert accelerators_of(load_recipe(TINY, ["student.device=mps", served])) == {f"mps-0-of-{socket.gethostname()}"}
    assert accelerators_of(load_recipe(TINY, ["student.device='cuda:9'", "teacher.device=cpu"])) == set()


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
        assert run_in_time(limit, again, 0.0) == run_in_time(Compute(), again, 0.6) == "done"
        tries.clear()
        for stage, times in ((again, 3), (task(wait, name="once"), 1)):
            with pytest.raises(Unavailable, match=rf"^{stage.name}: not done in compute\.task_timeout = 0\.5 seconds; "):
                run_in_time(limit, stage, 30.0)
            assert tries == [30.0] * times
            tries.clear()

    started = time.monotonic()
    late()
    assert time.monotonic() - started < 25


def test_a_run_whose_task_took_too_long_goes_on(potstill, recipe, tmp_path):
    path = recipe()
    ended = potstill("run", path, "--rounds", "1", "--set", "compute.task_timeout=0.001", patient=False)
    assert ended.status == 1, ended.err
    assert "not done in compute.task_timeout = 0.001 seconds" in ended.err
    assert "the same command goes on from what is committed" in ended.err
    assert "Traceback" not in ended.err.rsplit("potstill:", 1)[-1]
    assert distill(str(path), rounds=1)["rounds"] == 1

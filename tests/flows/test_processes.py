"""Training in several real processes: the same as in one to rounding, and what is said when it fails."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from helpers import CHECKOUT
from safetensors.torch import load_file

from configs.errors import BadInput
from configs.load import load_recipe
from flows.distill import distill
from storage.artifacts import Artifact
from storage.read import scan
from tasks.models.reference import make_reference
from tasks.training.processes import check_processes, launch
from tasks.training.trainer import JOB, Job


@pytest.fixture(scope="module")
def job(models, tmp_path_factory) -> Job:
    """A round without a row, in two processes."""
    recipe = load_recipe(
        CHECKOUT / "tests/recipes/tiny.toml", ["train.processes=2", f"student={{model='{models['student']}', device='cpu'}}"]
    )
    student = make_reference(recipe.student, str(models["student"]))
    return Job(recipe=recipe, number=1, student=student, teachers={}, shards=(), state=None)


@contextmanager
def listening() -> Iterator[set[str]]:
    """The addresses that processes of this one listen on meanwhile, Prefect's server aside (it is started once a session)."""
    before, heard, over = set(psutil.Process().children(recursive=True)), set(), threading.Event()

    def look() -> None:
        while not over.wait(0.05):
            for process in set(psutil.Process().children(recursive=True)) - before:
                with suppress(psutil.Error):
                    connections = process.net_connections("inet")
                    heard.update(c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield heard
    finally:
        over.set()
        thread.join()


@pytest.mark.slow
def test_as_in_one_process(recipe, tmp_path, caplog):
    """Two rounds in one process, and one round in each of DDP and FSDP: losses, norms, counts, weights, optimizer.

    33 rows in batches of 16 by 4: the last batch has one row, and a process without any.
    """
    texts = {"rollout__on_policy": 0.0, "rollout__prompts": 33, "prompts__eval": 2, "evaluate__samples": 0}
    changes = {
        **texts,
        "train__micro_batch_size": 4,
        "student__device": "cpu",
        "teacher__device": "cpu",
        "keep__trainers": "all",
    }
    config, alone, shared = str(recipe(**changes)), tmp_path / "alone" / "tiny", tmp_path / "shared" / "tiny"
    distill(config, overrides=(f"root={alone.parent}",))
    caplog.set_level(logging.INFO, "potstill")
    with listening() as heard:
        distill(config, rounds=1, overrides=(f"root={shared.parent}", "train.processes=2"))
    assert heard == {"127.0.0.1"}  # where the two meet: nothing is open to other machines
    assert distill(config, overrides=(f"root={shared.parent}", "train.processes=2", "train.sharding=full"))["rounds"] == 2

    one, two = (scan(str(run), "steps").sort("step").collect() for run in (alone, shared))
    assert two["rows"].to_list() == [16, 16, 1] * 2
    for name in ("step", "round", "rows", "units", "tokens", "learning_rate"):
        assert one[name].equals(two[name]), name
    for name in ("loss", "grad_norm"):
        assert two[name].to_list() == pytest.approx(one[name].to_list(), rel=1e-4), name
    for number in (1, 2):
        for file in ("student/model.safetensors", "trainer/optimizer.safetensors"):
            first, second = (load_file(run / f"round=000{number}" / file) for run in (alone, shared))
            assert first.keys() == second.keys()
            assert all(first[key].allclose(second[key], rtol=1e-3, atol=1e-5) for key in first), file

    said = [record.getMessage() for record in caplog.records if "processes" in record.getMessage()]
    held = [[int(word) for word in line.split() if word.isdigit()][-2:] for line in said]
    assert held[0][0] == held[0][1]  # the whole student
    assert held[1][0] < 0.6 * held[1][1]  # a part of it


def test_a_failing_process_is_quoted(job, tmp_path):
    tmp_path.joinpath("other.parquet").write_text("no table at all")
    other = Artifact(str(tmp_path / "other.parquet"), "", 8)
    broken = Job(recipe=job.recipe, number=1, student=job.student, teachers={}, shards=((other, other),), state=None)
    with pytest.raises(RuntimeError, match=r"(?s)2 processes failed.*process [01]:.*ArrowInvalid.*Parquet magic bytes"):
        launch(JOB.dump_json(broken).decode(), tmp_path, 2)


def test_what_libraries_do_at_exit_keeps_nobody(tmp_path):
    """gloo's destructor can wait for the GIL that it holds: seen once in many runs, with all files written."""
    tmp_path.joinpath("job.json").write_text("")
    code = """
import atexit, pathlib, sys, time, tasks.training.processes, tasks.training.trainer as train
atexit.register(time.sleep, 600)
train.train, train.JOB = lambda *_: print("trained"), type("Job", (), {"validate_json": print})
tasks.training.processes.main(pathlib.Path(sys.argv[1]))"""
    command, alone = [sys.executable, "-c", code, str(tmp_path)], os.environ | {"RANK": "0", "WORLD_SIZE": "1"}
    with subprocess.Popen(command, cwd=CHECKOUT, env=alone, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.wait(120) == 0
            assert b"trained" in process.stdout.read()
        finally:
            process.kill()


def test_what_a_process_refuses_is_one_message(job, tmp_path):
    with pytest.raises(BadInput, match=r"^round 1: no row of 0 can be trained on; [^\n]*$"):
        launch(JOB.dump_json(job).decode(), tmp_path, 2)


def test_the_number_of_processes_is_held(job, tmp_path):
    """As with `accelerate launch --cpu --num_processes 2`, which starts one."""
    with pytest.raises(RuntimeError, match=r"train\.processes = 2, but 1 take part"):
        launch(JOB.dump_json(job).decode(), tmp_path, 1)


def test_more_processes_than_gpus_are_refused(job, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    on_gpus = load_recipe(CHECKOUT / "tests/recipes/tiny.toml", ["train.processes=2", "student.device=cuda"])
    with pytest.raises(BadInput, match=r"train\.processes = 2 needs as many GPUs, this machine has 1; set it to at most that"):
        check_processes(on_gpus)
    check_processes(job.recipe)  # which trains on the CPU


@pytest.mark.slow
def test_a_killed_flow_leaves_no_process(tmp_path):
    os.mkfifo(tmp_path / "job.json")  # the processes wait for a writer
    code = "import sys, tasks.training.processes as p; p.Path.write_text = print; p.launch('', p.Path(sys.argv[1]), 2)"
    flow = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=CHECKOUT, stdout=subprocess.DEVNULL)
    wait(lambda: len(processes(tmp_path)) >= 4, 60)  # the flow, torchrun and its two
    flow.send_signal(signal.SIGKILL)
    flow.wait()
    wait(lambda: not processes(tmp_path), 60)


def processes(folder: Path) -> list[int]:
    """Those whose command line names this folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().decode().split("\0")
        except OSError:
            continue  # it has ended
        if str(folder) in words:
            found.append(int(entry.parent.name))
    return found


def wait(for_what, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not for_what():
        assert time.monotonic() < end
        time.sleep(0.2)

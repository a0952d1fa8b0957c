"""Shards on the workers of a real Ray cluster: two nodes with a worker each, on this machine."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
import torch
from prefect import flow, task
from prefect.testing.utilities import prefect_test_harness
from ray.cluster_utils import Cluster

from configs.compute import Compute
from configs.errors import BadInput
from flows.compute import check_compute, shard_runner
from flows.distill import distill
from storage.artifacts import Artifact
from storage.store import Run

TINY = Path(__file__).parents[1] / "recipes" / "tiny.toml"


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


@task
def where(number: int) -> Artifact:
    time.sleep(1)
    return Artifact(ray.get_runtime_context().get_node_id(), str(os.getpid()), number)


@task
def refuse(number: int) -> Artifact:
    raise BadInput(f"shard {number} cannot be read")


@flow
def on_workers(address: str) -> list[Artifact]:
    with shard_runner(Compute(runner="ray", address=address)) as each:
        with pytest.raises(BadInput, match="shard 3 cannot be read"):
            each(refuse, [(3,)])
        return each(where, [(number,) for number in range(6)])


def test_both_workers_work_and_results_come_in_order(address):
    found = on_workers(address)
    assert [artifact.rows for artifact in found] == list(range(6))
    assert len({artifact.path for artifact in found}) == 2  # nodes
    assert os.getpid() not in {int(artifact.digest) for artifact in found}


def test_a_run_is_the_same_as_without_ray(address, tmp_path):
    """Two rounds of two shards, their models made in the same way: bit-equal rollouts, scores, units, students."""
    torch.set_num_threads(1)  # as a worker with one core has: sums differ in their last bits with the number of threads
    told = ("compute.runner=ray", f"compute.address={address}")
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    distill(str(TINY), overrides=(f"root={alone}",))
    assert distill(str(TINY), rounds=1, overrides=(f"root={shared}", *told))["rounds"] == 1
    assert distill(str(TINY), overrides=(f"root={shared}", *told))["rounds"] == 2
    one, two = (
        {slot: m["digest"] for slot, m in Run(str(root), "tiny").manifests() if "/steps/" not in slot}
        for root in (alone, shared)
    )
    assert one == two
    assert sum("/rollouts/" in slot or "/scores/" in slot for slot in one) == 8
    before = time.monotonic()
    assert distill(str(TINY), overrides=(f"root={shared}",))["rounds"] == 2  # without Ray: nothing is left to do
    assert time.monotonic() - before < 30


@pytest.mark.parametrize("where", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:port"])
def test_no_cluster(where):
    with pytest.raises(BadInput, match=rf"^compute\.address = '{where}': nothing answers there .*leave it out"):
        check_compute(Compute(runner="ray", address=where))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop(number, tmp_path):
    """Ray has a handler of its own for SIGTERM, which would abort the command."""
    command = [sys.executable, "-m", "flows.cli", "run", str(TINY)]
    command += [word for field in (f"root={tmp_path / 'runs'}", "compute.runner=ray") for word in ("--set", field)]
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    deadline = time.monotonic() + 300
    while "(rollouts pid=" not in log.read_text():  # while Ray starts, the handler is its own
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    tree = psutil.Process(process.pid).children(recursive=True)
    assert tree
    os.killpg(process.pid, number)
    assert process.wait(10) == 128 + number, log.read_text()
    assert psutil.wait_procs(tree, timeout=10)[1] == []
    *_, last = log.read_text().splitlines()
    assert last.startswith("potstill: stopped in round 1 of 2 of tiny; ")
    assert last.endswith(" goes on")
    assert subprocess.run(command, capture_output=True, timeout=300, check=False).returncode == 0

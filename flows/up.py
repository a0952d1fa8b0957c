"""Prefect in one command: a server where none is configured, the work pool, a worker, and the deployments of prefect.yaml."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.request import urlopen
from uuid import UUID

import psutil
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import StateType
from prefect.context import refresh_global_settings_context
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import get_current_settings
from prefect.states import Crashed

from configs.errors import BadInput, Unavailable
from flows.server import expect_answer
from tasks.running.attached import end_attached, start_attached

CHECKOUT = Path(__file__).parents[1]  # where prefect.yaml lies, and what the deployments run
POOL = "potstill"
PATIENCE = 120.0  # seconds until the server answers
GRACE = 2.0  # seconds in which a flow run that is stopped tells the server so


def bring_up(say: Callable[[str], None]) -> None:
    """Start all of it, say where it is, and wait until one of the processes ends, which raises Unavailable, or for a stop."""
    with _running_server(say) as url:
        with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
        deployed = subprocess.run(command, cwd=CHECKOUT, env=_environment(), capture_output=True, text=True, check=False)
        if deployed.returncode:
            raise Unavailable(f"the deployments of {CHECKOUT}/prefect.yaml were refused:\n{deployed.stdout}{deployed.stderr}")
        say(f"export PREFECT_API_URL={url}   # in another terminal, then: prefect deployment run 'distill/quickstart'")
        worker = start_attached(
            *("prefect", "worker", "start", "--pool", POOL, "--type", "process"), cwd=CHECKOUT, env=_environment()
        )
        try:
            raise Unavailable(f"the worker ended with status {worker.wait()}")
        finally:
            _end_worker(worker)


@contextmanager
def _running_server(say: Callable[[str], None]) -> Iterator[str]:
    """The address of the server that Prefect is configured with, or of one that is started here."""
    if url := get_current_settings().api.url:
        expect_answer(url)
        yield url
        return
    host, port = get_current_settings().server.api.host, get_current_settings().server.api.port
    url = f"http://{host}:{port}/api"
    if _answers(url):
        raise BadInput(
            f"a Prefect server is at {url} already: export PREFECT_API_URL={url} to use it, or choose another port with "
            "PREFECT_SERVER_API_PORT"
        )
    server = start_attached("prefect", "server", "start", stdout=subprocess.DEVNULL, env=_environment())
    try:
        deadline = time.monotonic() + PATIENCE
        while not _answers(url):
            if server.poll() is not None or time.monotonic() > deadline:
                raise Unavailable(f"Prefect's server did not start at {url}; `prefect server start` may say why")
            time.sleep(0.2)
        say(f"Prefect's server and its pages are at {url.removesuffix('/api')}")
        os.environ["PREFECT_API_URL"] = url
        refresh_global_settings_context()
        _crash_left_runs()
        yield url
    finally:
        end_attached(server)


def _crash_left_runs() -> None:
    """Where `potstill up` was killed nobody told the server: what its worker ran would keep the next flow runs waiting."""
    at_work = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]))
    with get_client(sync_client=True) as client:
        ours = WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL]))
        left = client.read_flow_runs(flow_run_filter=FlowRunFilter(state=at_work), work_pool_filter=ours)
        while left:
            for run in left:
                client.set_flow_run_state(run.id, Crashed(message="potstill up was killed"), force=True)
            within = FlowRunFilterParentFlowRunId(any_=[run.id for run in left])
            left = client.read_flow_runs(flow_run_filter=FlowRunFilter(state=at_work, parent_flow_run_id=within))


def _end_worker(worker: "subprocess.Popen[bytes]") -> None:
    """Tell the flow runs to end, which they report to the server, then kill the worker, which would wait for more."""
    with suppress(psutil.Error):
        children = psutil.Process(worker.pid).children()
        runs = {run: UUID(found) for run in children if (found := run.environ().get("PREFECT__FLOW_RUN_ID"))}
        for run in runs:
            run.terminate()
        for run in psutil.wait_procs(runs, GRACE)[1]:
            run.kill()
            with get_client(sync_client=True) as client:  # or the server would count it as running, and no other would start
                client.set_flow_run_state(runs[run], Crashed(message="potstill up was stopped"), force=True)
    end_attached(worker)


def _answers(url: str) -> bool:
    try:
        return bool(urlopen(f"{url}/health", timeout=5).status == 200)
    except OSError:
        return False


def _environment() -> dict[str, str]:
    return {**os.environ, "PWD": str(CHECKOUT)}  # prefect.yaml names it as the place of the code

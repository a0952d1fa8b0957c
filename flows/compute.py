"""Where a run's tasks are worked on, for how long, and on whose accelerators."""

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any, TypeVar

from prefect import Task
from prefect.task_engine import TaskRunTimeoutError
from prefect.utilities.callables import get_call_parameters

from configs.errors import BadInput, Unavailable
from configs.schema import Compute, Recipe
from storage.artifacts import Artifact
from storage.lock import device_lock
from tasks.models import accelerator_names
from tasks.progress import logger

T = TypeVar("T")
Each = Callable[[Task[..., Artifact], list[tuple[Any, ...]]], list[Artifact]]

_held: set[str] = set()  # accelerators that this process has


def check_compute(compute: Compute) -> None:
    """Refuse a runner whose packages are missing, or a cluster that nothing answers for: Ray itself would try for minutes."""
    if compute.runner != "ray":
        return
    if find_spec("prefect_ray") is None:
        raise BadInput("compute.runner = 'ray' needs more packages: pip install -e '.[ray]'")
    host, colon, port = (compute.address or "").removeprefix("ray://").rpartition(":")
    if colon:
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, ValueError) as error:
            raise BadInput(
                f"compute.address = '{compute.address}': nothing answers there ({error}); "
                "give a running cluster's host:port, or leave it out to start one here"
            ) from None


@contextmanager
def shard_runner(compute: Compute) -> Iterator[Each]:
    """Yields `each(task, calls)`, which calls a task once a shard and gives the artifacts in the calls' order.

    With Ray the calls run side by side, as many as the cluster has room for; a worker's exception is raised here. Results
    are bit-equal where a worker has as many threads (Ray: as `cpus`) as this process, else equal to rounding.
    """
    if compute.runner == "local":
        yield lambda task, calls: [in_time(compute, task, *call) for call in calls]
        return
    from prefect_ray import RayTaskRunner
    from prefect_ray.context import remote_options

    own = {} if compute.address else {"include_dashboard": False}
    with RayTaskRunner(address=compute.address, init_kwargs=own) as runner:

        def each(task: Task[..., Artifact], calls: list[tuple[Any, ...]]) -> list[Artifact]:
            limited = task.with_options(timeout_seconds=compute.task_timeout)
            with remote_options(num_cpus=compute.cpus, num_gpus=compute.gpus), _late(compute, task):
                futures = [runner.submit(limited, get_call_parameters(task.fn, call, {})) for call in calls]
                return [future.result() for future in futures]

        yield each


def in_time(compute: Compute, task: Task[..., T], *call: Any) -> T:
    """What a task returns. One that takes longer than `compute.task_timeout` is stopped; an engine's is tried again."""
    with _late(compute, task):
        return task.with_options(timeout_seconds=compute.task_timeout)(*call)


@contextmanager
def _late(compute: Compute, task: Task[..., Any]) -> Iterator[None]:
    try:
        yield
    except TaskRunTimeoutError:
        raise Unavailable(
            f"{task.name}: not done in compute.task_timeout = {compute.task_timeout:g} seconds; "
            "see what its engine waits for, or give it more"
        ) from None


@contextmanager
def exclusive(recipe: Recipe) -> Iterator[None]:
    """Compute on the accelerators of this machine that a recipe names while no other run of this user does.

    They are held under locks of the operating system, which end with the process: a crash leaves none taken. A run
    within a run (a teacher that is made first) computes on what the outer one holds.
    """
    names = sorted(accelerators(recipe) - _held) if recipe.compute.exclusive else []
    with ExitStack() as locks:
        for name in names:
            locks.enter_context(device_lock(name, logger.info))
        _held.update(names)
        locks.callback(_held.difference_update, names)
        yield


def accelerators(recipe: Recipe) -> set[str]:
    """Those of this machine that a recipe computes on, by names that another process would give them too."""
    used = accelerator_names(recipe.student, recipe.train.processes)
    if recipe.teacher is not None and recipe.teacher.engine != "server":
        used |= accelerator_names(recipe.teacher)
    return used

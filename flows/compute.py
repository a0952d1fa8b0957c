"""Where a run's tasks are worked on, for how long, and on whose accelerators."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import ParamSpec, Protocol, TypeVar

from prefect import Task
from prefect.task_engine import TaskRunTimeoutError

from configs.errors import BadInput, Unavailable
from configs.schema import Compute, Recipe
from storage.lock import device_lock
from tasks.models.reference import accelerator_names
from tasks.rows.round import Round, Shard
from tasks.running.progress import logger

P = ParamSpec("P")
T = TypeVar("T")

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


class RunShards(Protocol):
    """Calls a stage once per shard; its results are in the shards' order."""

    def __call__(self, task: Task[[Round, Shard], Shard], round: Round, shards: tuple[Shard, ...], /) -> tuple[Shard, ...]: ...


@contextmanager
def shard_runner(compute: Compute) -> Iterator[RunShards]:
    """Yields what calls a stage for all shards of a round.

    With Ray the calls run side by side, as many as the cluster has room for; a worker's exception is raised here. Results
    are bit-equal where a worker has as many threads (Ray: as `cpus`) as this process, else equal to rounding.
    """
    if compute.runner == "local":
        yield lambda task, round, shards: tuple(run_in_time(compute, task, round, shard) for shard in shards)
        return
    from prefect_ray import RayTaskRunner
    from prefect_ray.context import remote_options

    started_here = {} if compute.address else {"include_dashboard": False}
    with RayTaskRunner(address=compute.address, init_kwargs=started_here) as runner:

        def run_shards(task: Task[[Round, Shard], Shard], round: Round, shards: tuple[Shard, ...]) -> tuple[Shard, ...]:
            limited = task.with_options(timeout_seconds=compute.task_timeout)
            with remote_options(num_cpus=compute.cpus, num_gpus=compute.gpus), _explain_timeout(compute, task.name):
                futures = [runner.submit(limited, {"round": round, "shard": shard}) for shard in shards]
                return tuple(future.result() for future in futures)

        yield run_shards


def run_in_time(compute: Compute, task: Task[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What a task returns. One that takes longer than `compute.task_timeout` is stopped; an engine's is tried again."""
    with _explain_timeout(compute, task.name):
        return task.with_options(timeout_seconds=compute.task_timeout)(*args, **kwargs)


@contextmanager
def _explain_timeout(compute: Compute, name: str) -> Iterator[None]:
    try:
        yield
    except TaskRunTimeoutError:
        raise Unavailable(
            f"{name}: not done in compute.task_timeout = {compute.task_timeout:g} seconds; "
            "see what its engine waits for, or give it more"
        ) from None


@contextmanager
def hold_accelerators(recipe: Recipe) -> Iterator[None]:
    """Compute on the accelerators of this machine that a recipe names while no other run of this user does.

    They are held under locks of the operating system, which end with the process: a crash leaves none taken. A run
    within a run (a teacher that is made first) computes on what the outer one holds.
    """
    names = sorted(accelerators_of(recipe) - _held) if recipe.compute.exclusive else []
    with ExitStack() as locks:
        for name in names:
            locks.enter_context(device_lock(name, logger.info))
        _held.update(names)
        locks.callback(_held.difference_update, names)
        yield


def accelerators_of(recipe: Recipe) -> set[str]:
    """Those of this machine that a recipe computes on, by names that another process would give them too."""
    used = accelerator_names(recipe.student, recipe.train.processes)
    if recipe.teacher is not None and recipe.teacher.engine != "server":
        used |= accelerator_names(recipe.teacher)
    return used

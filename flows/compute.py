"""Where a run's tasks are computed, how long they may take, and which accelerators they hold."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import ParamSpec, Protocol, TypeVar

from prefect import Task
from prefect.task_engine import TaskRunTimeoutError

from configs.compute import Compute
from configs.errors import BadInput, Unavailable
from configs.schema import Recipe
from flows.ending import take_sigterm_back
from storage.lock import device_lock
from tasks.engines.choose import release
from tasks.models.reference import accelerator_names
from tasks.rows.round import Round, Shard
from tasks.running.progress import logger

P = ParamSpec("P")
T = TypeVar("T")

_held: set[str] = set()  # names of the accelerators that this process holds
_keepers = 0  # how many runs, one within the other, keep models loaded


def check_compute(compute: Compute) -> None:
    """Refuse a runner whose packages are missing, or a cluster that does not answer: Ray itself would try for minutes."""
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
    """Calls a stage once per shard and returns the results in the shards' order."""

    def __call__(self, task: Task[[Round, Shard], Shard], round: Round, shards: tuple[Shard, ...], /) -> tuple[Shard, ...]: ...


@contextmanager
def shard_runner(compute: Compute) -> Iterator[RunShards]:
    """Yield the function that calls a stage for all shards of a round.

    With Ray as many calls run at once as the cluster has room for. A worker's exception is raised here. Results are
    bit-equal where a worker has as many threads (`cpus` of them) as this process, else equal to rounding.
    """
    if compute.runner == "local":
        yield lambda task, round, shards: tuple(run_in_time(compute, task, round, shard) for shard in shards)
        return
    from prefect_ray import RayTaskRunner
    from prefect_ray.context import remote_options

    started_here = {} if compute.address else {"include_dashboard": False}
    with RayTaskRunner(address=compute.address, init_kwargs=started_here) as runner:
        take_sigterm_back()

        def run_shards(task: Task[[Round, Shard], Shard], round: Round, shards: tuple[Shard, ...]) -> tuple[Shard, ...]:
            limited = task.with_options(timeout_seconds=compute.task_timeout)
            with remote_options(num_cpus=compute.cpus, num_gpus=compute.gpus), _explain_timeout(compute, task.name):
                futures = [runner.submit(limited, {"round": round, "shard": shard}) for shard in shards]
                return tuple(future.result() for future in futures)

        yield run_shards


def run_in_time(compute: Compute, task: Task[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a task. It is stopped after `compute.task_timeout`; a task that uses an engine is then tried again."""
    with _explain_timeout(compute, task.name):
        return task.with_options(timeout_seconds=compute.task_timeout)(*args, **kwargs)


@contextmanager
def _explain_timeout(compute: Compute, name: str) -> Iterator[None]:
    try:
        yield
    except TaskRunTimeoutError:
        raise Unavailable(
            f"{name}: not done in compute.task_timeout = {compute.task_timeout:g} seconds; "
            "check what its engine is waiting for, or raise compute.task_timeout"
        ) from None


@contextmanager
def hold_accelerators(recipe: Recipe) -> Iterator[None]:
    """Hold the accelerators of this machine that a recipe names, once no other run of this user computes on them.

    The locks are the operating system's and end with the process, so a crash leaves no accelerator locked. A run within a
    run (a teacher that is made first) uses the accelerators that the outer run holds.
    """
    names = sorted(accelerators_of(recipe) - _held) if recipe.compute.exclusive else []
    with ExitStack() as locks:
        for name in names:
            locks.enter_context(device_lock(name, logger.info))
        _held.update(names)
        locks.callback(_held.difference_update, names)
        yield


@contextmanager
def keep_loaded() -> Iterator[None]:
    """Models that are loaded within stay loaded, also after a run within a run. The end of the outermost releases them."""
    global _keepers
    _keepers += 1
    try:
        yield
    finally:
        _keepers -= 1
        if not _keepers:
            release()


def accelerators_of(recipe: Recipe) -> set[str]:
    """Names of the accelerators of this machine that a recipe computes on. They are the same in every process."""
    used = accelerator_names(recipe.student, recipe.train.processes)
    for view in recipe.by_teacher().values():
        if view.teacher is not None and view.teacher.engine != "server" and view.teacher.cache is None:
            used |= accelerator_names(view.teacher)
    return used

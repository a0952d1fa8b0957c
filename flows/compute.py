"""Where the shards of a stage are worked on: here, one after another, or by Ray's workers."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from prefect import Task
from prefect.utilities.callables import get_call_parameters

from configs.errors import BadInput
from configs.schema import Compute
from storage.artifacts import Artifact

Each = Callable[[Task[..., Artifact], list[tuple[Any, ...]]], list[Artifact]]


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
        yield lambda task, calls: [task(*call) for call in calls]
        return
    from prefect_ray import RayTaskRunner
    from prefect_ray.context import remote_options

    own = {} if compute.address else {"include_dashboard": False}
    with RayTaskRunner(address=compute.address, init_kwargs=own) as runner:

        def each(task: Task[..., Artifact], calls: list[tuple[Any, ...]]) -> list[Artifact]:
            with remote_options(num_cpus=compute.cpus, num_gpus=compute.gpus):
                futures = [runner.submit(task, get_call_parameters(task.fn, call, {})) for call in calls]
            return [future.result() for future in futures]

        yield each

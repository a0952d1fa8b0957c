"""A stage is tried again where that can help, and only there."""

import errno

import httpx
import pytest
from prefect import flow, task

from configs.errors import BadInput, CannotWrite, Unavailable
from tasks.completions import complete_shard
from tasks.evaluate import evaluate_model
from tasks.rollout import roll_out
from tasks.running.retries import RETRIES, may_help
from tasks.score import score_shard

HELPS = [Unavailable("gone"), ConnectionResetError(), TimeoutError(), httpx.ReadTimeout("slow"), OSError(errno.ENETUNREACH, "")]
HOPELESS = [BadInput("x"), CannotWrite("x"), OSError(errno.ENOSPC, ""), FileNotFoundError(), RuntimeError("bug"), None]


@pytest.mark.parametrize("error", HELPS, ids=repr)
def test_tried_again(error):
    assert may_help(error)


@pytest.mark.parametrize("error", HOPELESS, ids=repr)
def test_not_tried_again(error):
    assert not may_help(error)


def test_stages_with_engines_have_them():
    for stage in (roll_out, score_shard, complete_shard, evaluate_model):
        assert stage.retries == 2
        assert stage.retry_delay_seconds == [5, 30]
        assert stage.retry_condition_fn is RETRIES["retry_condition_fn"]


@pytest.mark.parametrize(("error", "calls"), [(Unavailable("gone"), 3), (BadInput("wrong"), 1)])
def test_prefect_does_as_told(server, error, calls):
    made = []

    @task(**{**RETRIES, "retry_delay_seconds": 0})
    def stage() -> None:
        made.append(1)
        raise error

    @flow
    def run() -> None:
        stage()

    with pytest.raises(type(error)):
        run()
    assert len(made) == calls

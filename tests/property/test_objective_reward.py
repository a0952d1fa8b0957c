"""Rewards beside the objective (MATHS.md §10), against sums made by hand and laws that are enumerated."""

import itertools
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from toys import full_logprobs, student_ref
from training import CPU, OBJECTIVES, loss_and_gradient, plain_rows, student_module

from configs.errors import BadInput
from configs.load import load_recipe
from configs.objectives import Bytes, Objective, RewardAlone
from configs.reward import Reward
from tasks.models.text import side
from tasks.models.weights import load_weights
from tasks.training.batches import collate, rows_to_train
from tasks.training.rewarded import Rewarded, reward_losses, share_advantages
from tasks.training.steps import Shape, make_step
from tests.flows.helpers import TINY

BYTES = Bytes(name="bytes", beta=1.0)


def rewarded_rows(objective: Objective) -> pa.Table:
    """Rows of which each third has no advantage, and no behaviour either, as a reference has."""
    rows, random = plain_rows(objective), np.random.default_rng(7)
    worth = [0.0 if row % 3 == 0 else float(random.normal()) for row in range(len(rows))]
    lengths = [len(ids) for ids in rows["token_ids"].to_pylist()]
    sampled = [random.uniform(-6, 0, n).tolist() if a else None for n, a in zip(lengths, worth, strict=True)]
    rows = rows.append_column("advantage", pa.array(worth, pa.float32()))
    return rows.append_column("logprobs", pa.array(sampled, pa.list_(pa.float32())))


def by_hand(rows: pa.Table, weight: float, clip: float) -> float:
    """α's part of a step's loss: row by row, in float64, by the definition."""
    model, own, total, tokens = load_weights(student_ref()), side(student_ref()), 0.0, 0
    for row in rows.to_pylist():
        ids = row["token_ids"]
        tokens += len(ids)
        if row["advantage"] == 0:
            continue
        whole = [*row["prompt_token_ids"], *ids]
        laws = full_logprobs(model, whole, own.vocabulary.size)[len(whole) - len(ids) - 1 : -1]
        for law, token, before in zip(laws, ids, row["logprobs"], strict=True):
            total -= weight * row["advantage"] * min(np.exp(float(law[token]) - before), clip)
    return total / tokens


def shape(rows: int) -> Shape:
    return Shape(rows=rows, tokens=None, process=0, processes=1, pad_id=0, positions=7, pinned=False)


def loss_of(objective: Objective, rows: pa.Table, reward: Reward, size: int) -> float:
    """A step's loss, in passes of so many rows."""
    step, module = make_step(rows, shape(size)), student_module(objective, chunk_positions=7)
    module.reward = reward
    return sum(float(module(batch.ids, batch).detach()) for batch, counts in step.passes if counts) / max(step.units, 1)


@pytest.mark.parametrize("size", [1, 4, 100])
@pytest.mark.parametrize("objective", [BYTES, RewardAlone(name="reward")], ids=lambda objective: objective.name)
def test_a_step_is_its_terms_and_the_advantages_of_its_tokens(objective: Objective, size: int) -> None:
    """However it is split: divided by the tokens of the whole step. Rows that no policy sampled have no such term."""
    rows = rewarded_rows(BYTES)
    if objective.name == "reward":  # no term at all; a row without an advantage is then not trained on
        rows = rows.filter(pa.compute.not_equal(rows["advantage"], 0))
        rows = rows.set_column(rows.column_names.index("units"), "units", pa.array([0] * len(rows), pa.int32()))
        for name in [name for name in rows.column_names if name.startswith(("term_", "target_"))]:
            empty = pa.array([[]] * len(rows), rows.schema.field(name).type)
            rows = rows.set_column(rows.column_names.index(name), name, empty)
    reward = Reward(weight=0.7, clip=1.5)
    plain = loss_of(objective, rows, Reward(), size)
    assert loss_of(objective, rows, reward, size) - plain == pytest.approx(by_hand(rows, 0.7, 1.5), rel=1e-4, abs=1e-6)
    assert (plain == 0) == (objective.name == "reward")


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
def test_no_weight_changes_no_bit(objective: Objective) -> None:
    rows = rewarded_rows(objective)
    batch = collate(share_advantages(rows, 9), 0, CPU)
    module = student_module(objective)
    loss, gradient = loss_and_gradient(module, batch)
    bare, without = loss_and_gradient(module, replace(batch, rewarded=None))
    assert loss == bare
    assert torch.equal(gradient, without)


def test_the_expected_gradient_is_that_of_the_expected_advantage() -> None:
    """All texts of two tokens over four, sampled by the very policy, with any advantages."""
    random = np.random.default_rng(1)
    weights = torch.tensor(random.normal(size=(5, 4)), requires_grad=True)  # of the first token, and behind each
    worth = {text: float(random.normal()) for text in itertools.product(range(4), repeat=2)}

    expected = torch.zeros((), dtype=torch.float64)
    exact = torch.zeros((), dtype=torch.float64)
    for text, advantage in worth.items():
        logits, actual = weights[[0, 1 + text[0]]], torch.tensor(text)
        path = logits.log_softmax(-1).gather(1, actual[:, None])[:, 0]
        tokens = Rewarded(at=actual, advantage=torch.full((2,), advantage, dtype=torch.float64), behaviour=path.detach())
        expected = expected + path.sum().exp().detach() * reward_losses(logits, actual, tokens, clip=2.0).sum()
        exact = exact - path.sum().exp() * advantage
    (ours,), (right,) = torch.autograd.grad(expected, weights, retain_graph=True), torch.autograd.grad(exact, weights)
    torch.testing.assert_close(ours, right)
    assert right.abs().max() > 0.01


def test_a_weight_beyond_the_clip_has_no_gradient() -> None:
    logits = torch.tensor([[2.0, 0.0]], requires_grad=True)
    tokens = Rewarded(at=torch.zeros(1).long(), advantage=torch.ones(1), behaviour=torch.tensor([-3.0]))
    loss = reward_losses(logits, torch.tensor([0]), tokens, clip=2.0)
    assert float(loss.detach()) == -2.0
    assert not torch.autograd.grad(loss.sum(), logits)[0].any()


def test_rows_are_matched_by_their_ids() -> None:
    """Rows that are not among the rewards have none; a row without a term but with an advantage is trained on."""
    names = ["a", "b", "c", "d"]
    rows = plain_rows(BYTES).slice(0, 4)
    units = pa.array([1, 0, 0, 2], pa.int32())
    aligned = rows.set_column(rows.column_names.index("units"), "units", units)
    logprobs = pa.array([[float(n)] for n in range(4)], pa.list_(pa.float32()))
    rollouts = rows.append_column("rollout_id", pa.array(names)).append_column("logprobs", logprobs)
    rewards = pa.table({"rollout_id": ["d", "b"], "advantage": pa.array([0.5, -2.0], pa.float32())})
    found = rows_to_train(rollouts, aligned, rewards)
    assert found["advantage"].to_pylist() == [0.0, -2.0, 0.5]
    assert found["logprobs"].to_pylist() == [[0.0], [1.0], [3.0]]
    assert "advantage" not in rows_to_train(rollouts, aligned).column_names


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["reward.weight=0.5"], "reward.weight = 0.5 compares the samples of a prompt: set rollout.samples to 2 or more"),
        (["reward.weight=0.5", "rollout.samples=4", "rollout.on_policy=0.0"], "rollout.on_policy = 0 makes none"),
        (["objective={name='reward'}"], "set reward.weight above 0 and rollout.on_policy = 1"),
        (
            ["objective={name='reward'}", "reward.weight=1.0", "rollout.on_policy=0.5"],
            "set reward.weight above 0 and rollout.on",
        ),
        (["reward.wieght=1.0"], "weight"),
    ],
)
def test_what_cannot_teach_is_refused(changes: list[str], said: str) -> None:
    with pytest.raises(BadInput) as caught:
        load_recipe(TINY, tuple(changes))
    assert said in str(caught.value)

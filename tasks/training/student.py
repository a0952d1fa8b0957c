"""The student and its objective as one module: a forward pass is a loss."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from configs.objectives import ObjectiveConfig
from configs.reward import Reward
from configs.schema import Recipe
from tasks import objectives
from tasks.models.reference import ModelRef, device_of
from tasks.models.text import side
from tasks.models.weights import hidden_states, load_weights, logits_of
from tasks.objectives.base import ObjectiveModule
from tasks.rows.round import Teachers
from tasks.running.memory import Room, room_of
from tasks.tokens.ragged import length_batches
from tasks.training.batches import Chunk, MicroBatch, collate, row_lengths, rows_to_train
from tasks.training.precision import autocasts, keep_in_half
from tasks.training.rewarded import Rewarded, reward_losses


class Student(nn.Module):
    """The student and the objective as one module, so that wrappers (DDP, FSDP, autocast) see one forward pass."""

    def __init__(
        self,
        model: PreTrainedModel,
        objectives: Sequence[ObjectiveModule],
        size: int,
        chunk_positions: int,
        reward: Reward | None = None,
    ):
        super().__init__()
        self.model, self.size, self.chunk_positions = model, size, chunk_positions
        self.objectives = nn.ModuleList(objectives)  # one a teacher
        self.reward = reward or Reward()

    def forward(self, ids: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """Sum of the batch's terms in nats, and of what rewards add, a scalar. `ids`, int64 `[rows, time]`, are the batch's.

        Logits exist for one chunk of positions at a time. They are computed again in the backward pass.
        """
        hidden = hidden_states(self.model, ids)[batch.row, batch.time - 1]

        def terms_loss(chunk: Chunk) -> torch.Tensor:
            objective, logits = self.objectives[chunk.teacher], logits_of(self.model, hidden[chunk.at], self.size)
            loss: torch.Tensor = objective(logits, chunk.terms).sum()
            return loss

        def reward_loss(tokens: Rewarded) -> torch.Tensor:
            logits = logits_of(self.model, hidden[tokens.at], self.size)
            return reward_losses(logits, batch.actual[tokens.at], tokens, self.reward.clip).sum() * self.reward.weight

        parts: list[Callable[[], torch.Tensor]] = [partial(terms_loss, chunk) for chunk in batch.chunks(self.chunk_positions)]
        if batch.rewarded is not None:
            parts += [partial(reward_loss, tokens) for tokens in batch.rewarded.split(self.chunk_positions)]
        if len(parts) == 1:
            return parts[0]()
        return torch.stack([checkpoint(part, use_reentrant=False) for part in parts]).sum()


def build_objectives(config: ObjectiveConfig, student: ModelRef, teachers: Teachers) -> list[ObjectiveModule]:
    """The objective for each teacher; without any the student stands for one."""
    own = side(student).vocabulary
    return [
        objectives.build(config, student=own, teacher=side(teacher).vocabulary) for teacher in teachers.values() or [student]
    ]


def load_for_training(ref: ModelRef, dropout: bool) -> PreTrainedModel:
    """Load the student for training: float32 weights, and without dropout unless `dropout` is set.

    With dropout a student that is its own teacher has a loss. A layer's rate is the `p` of a Dropout, or an attribute with
    `drop` in its name.
    """
    model = load_weights(ref, torch.float32)
    model.train()
    for layer in () if dropout else model.modules():
        for name, value in vars(layer).items():
            if isinstance(value, float) and ("drop" in name or (name == "p" and "Dropout" in type(layer).__name__)):
                setattr(layer, name, 0.0)
    return model


def shard_module(
    module: nn.Module, model: PreTrainedModel, accelerator: Accelerator, policy: MixedPrecisionPolicy
) -> nn.Module:
    """FSDP: each process holds a part of the weights, gradients and optimizer state; a layer is gathered while it runs."""
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    module.to(accelerator.device)
    for layer in [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    return module


def training_room(recipe: Recipe) -> Room:
    """How many tokens of a run's student can be trained on at once."""
    mend = "lower train.chunk_positions or rollout.max_new_tokens, or set train.gradient_checkpointing = true"
    return room_of("training", mend, recipe.root, recipe.name)


def mean_loss(recipe: Recipe, rollouts: pa.Table, aligned: pa.Table, *, student: ModelRef, teacher: ModelRef | None) -> float:
    """Loss per term of rows, in nats, in the state that trains, before its first step; NaN where no row has a term."""
    table, most = rows_to_train(rollouts, aligned), recipe.train.micro_batch_size
    losses = sum(loss for _, loss in _batch_losses(recipe, recipe.objective, table, most, student=student, teacher=teacher))
    return losses / units if (units := pc.sum(table["units"]).as_py()) else float("nan")


def row_losses(
    recipe: Recipe, objective: ObjectiveConfig, rollouts: pa.Table, aligned: pa.Table, *, student: ModelRef, teacher: ModelRef
) -> dict[str, float]:
    """The sum of an objective's terms in nats, as `mean_loss` has it, by `rollout_id`, of rows that have a term."""
    table = rows_to_train(rollouts, aligned)
    ids = aligned.filter(pc.and_(pc.equal(aligned["status"], "ok"), pc.greater(aligned["units"], 0)))["rollout_id"].to_pylist()
    found = _batch_losses(recipe, objective, table, 1, student=student, teacher=teacher)
    return {ids[rows[0]]: loss for rows, loss in found}


def _batch_losses(
    recipe: Recipe, config: ObjectiveConfig, table: pa.Table, most: int, *, student: ModelRef, teacher: ModelRef | None
) -> Iterator[tuple[list[int], float]]:
    """The rows of each batch, of `most` rows at most, and the sum of their terms in nats."""
    s_side, train = side(student), recipe.train
    objective = build_objectives(config, student, {"": teacher} if teacher else {})
    model, device = load_for_training(student, train.dropout), device_of(student)
    module = Student(model, objective, len(s_side.beta.values), train.chunk_positions).to(device)
    if train.param_dtype == "bfloat16":
        keep_in_half(module.parameters())

    def loss_of(rows: Sequence[int]) -> float:
        batch = collate(table.take(pa.array(rows)), s_side.pad_id, device)
        return float(module(batch.ids, batch))

    lengths, room = row_lengths(table).tolist(), training_room(recipe)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=autocasts(train, student)):
        for batch in length_batches(lengths, train.micro_batch_tokens, most):
            yield batch, sum(part for _, part in room.run(batch, lengths, loss_of))

"""The trainer: optimizer steps of one round, and its state between rounds."""

import time
from collections.abc import Generator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import patch_environment
from pydantic import TypeAdapter
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, get_scheduler

from configs.errors import BadInput, Stopped
from configs.schema import Recipe
from storage.artifacts import Artifact, write_parquet
from storage.schemas import STEPS
from tasks.models.reference import ModelRef, device_of
from tasks.models.stops import name_stops
from tasks.models.text import side
from tasks.rows.round import NOBODY, Teachers
from tasks.running.memory import Halved, insist
from tasks.running.progress import logger, progress
from tasks.running.seeds import derive_seed
from tasks.training.adapters import add_adapters
from tasks.training.batches import optimizer_batches
from tasks.training.precision import Masters, autocasts, fast_products, keep_in_half, make_optimizer, policy_of
from tasks.training.state import State
from tasks.training.steps import Shape, Step, ahead, behind, make_step
from tasks.training.student import Student, build_objectives, load_for_training, shard_module, training_room

ADAMW_NEEDS = "train adapters alone ([student.lora]), or part the student among GPUs (train.processes, train.sharding = 'full')"
Shards = tuple[tuple[Artifact, Artifact], ...]  # rollouts and aligned


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a process needs to know of a round's training."""

    recipe: Recipe
    number: int
    student: ModelRef
    teachers: dict[str, ModelRef]  # by name
    shards: Shards
    rewards: Artifact | None = None  # where they teach
    state: str | None  # folder of what the last round's trainer left
    most_tokens: int | None = None  # at once, as far as is known from running out of memory


JOB = TypeAdapter(Job)


def train(job: Job, folder: Path) -> None:
    """Write `student`, `trainer` and `steps.parquet` under `folder`; where several processes run this, their first does."""
    training_room(job.recipe).limit = job.most_tokens
    with insist("training: out of memory while the student is loaded", ADAMW_NEEDS):
        trainer = Trainer(job.recipe, job.number, student=job.student, teachers=job.teachers, state=job.state)
    steps = trainer.run(job.shards, folder, job.rewards)
    if trainer.accelerator.is_main_process:
        write_parquet(pa.Table.from_pylist(steps, STEPS), folder / "steps.parquet")
    trainer.accelerator.end_training()


def count_steps(recipe: Recipe) -> int:
    """Optimizer steps of a complete run: what the learning rate's schedule is laid over."""
    rows = recipe.rollout.prompts * recipe.rollout.samples
    return recipe.rounds * recipe.train.epochs * -(-rows // recipe.train.batch_size)


@dataclass(frozen=True, kw_only=True)
class Taken:
    """A step that was handed to the device."""

    number: int  # from 1, over all rounds
    step: Step
    loss: torch.Tensor  # a scalar on the device, as `norm`
    norm: torch.Tensor
    rate: float


class Trainer:
    """Optimizer steps of one round; the optimizer goes on from the state that the last round left."""

    def __init__(
        self, recipe: Recipe, number: int, *, student: ModelRef, teachers: Teachers = NOBODY, state: str | None = None
    ):
        """`student` is what training starts from, `state` the folder that the last round's trainer wrote."""
        self.recipe, self.number, self.ref, self.teachers = recipe, number, student, [name for name in teachers if name]
        config = recipe.train
        torch.manual_seed(derive_seed(recipe.seed, "train", number))
        device = device_of(student)
        named = {} if device.index is None else {"ACCELERATE_TORCH_DEVICE": str(device)}
        if config.processes == 1:
            AcceleratorState._reset_state(reset_partial_state=True)  # another recipe may have trained here, on another device
        with patch_environment(**named):
            precision = "bf16" if autocasts(config, student) else "no"
            self.accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
        if self.accelerator.num_processes != config.processes:
            raise RuntimeError(
                f"train.processes = {config.processes}, but {self.accelerator.num_processes} take part: "
                "start potstill itself, not torchrun or accelerate launch"
            )
        model = load_for_training(student, config.dropout)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.adapters = add_adapters(model, recipe.student.lora) if recipe.student.lora is not None else None
        self.objectives = build_objectives(recipe.objective, student, teachers)
        size = len(side(student).beta.values)
        module: nn.Module = Student(model, self.objectives, size, config.chunk_positions, recipe.reward)
        if config.sharding == "full":
            module = shard_module(module, model, self.accelerator, policy_of(config))
        else:
            module = self.accelerator.prepare(module)
        if config.processes > 1 and self.accelerator.is_main_process:
            here = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in module.parameters())
            total = sum(p.numel() for p in module.parameters())
            logger.info("round %d train: %d processes, this one holds %d of %d weights", number, config.processes, here, total)
        half, masters = config.param_dtype == "bfloat16", None
        if half and self.adapters is not None:  # adapters stay in float32; what they are added to is not trained
            keep_in_half(p for p in module.parameters() if not p.requires_grad)
        elif half and config.sharding == "none":
            masters = Masters(module)
        self.module, self.masters = module, masters
        self.held = masters.module if masters is not None else module  # the optimizer's weights, by the same names
        optimizer = make_optimizer(self.held.parameters(), config)
        self.optimizer = self.accelerator.prepare(optimizer)
        self.scheduler = get_scheduler(config.schedule, optimizer, config.warmup_steps, count_steps(recipe))
        self.room = training_room(recipe)
        self.state = State(
            module=self.held,
            model=self.accelerator.unwrap_model(self.held).model,
            optimizer=optimizer,
            adapters=self.adapters,
            masters=half and self.adapters is None,
        )
        self.step = self._restore(Path(state)) if state else 0
        self.looked = time.monotonic()  # at the last step's figures

    def run(self, shards: Shards, folder: Path, rewards: Artifact | None = None) -> list[dict[str, Any]]:
        """Train over the shards, write `student` and `trainer` under `folder`, return one record a step."""
        config, steps = self.recipe.train, []
        rows = sum(aligned.rows for _, aligned in shards)
        waits = self.accelerator.device.type != "cpu"  # a GPU computes while the host makes what comes next
        with (
            progress(f"round {self.number} train", config.epochs * -(-rows // config.batch_size)) as advance,
            fast_products(autocasts(config, self.ref) or config.param_dtype == "bfloat16"),
            closing(self._steps(shards, rewards)) as made,
            closing(ahead(made) if waits else made) as ready,
        ):
            self.looked = time.monotonic()
            for taken in behind(map(self._optimize, ready), by=int(waits)):
                steps.append(self._look(taken))
                advance(1, f"loss {steps[-1]['loss']:.4f}")
        if not steps:
            raise BadInput(
                f"round {self.number}: no row of {rows} can be trained on; "
                "the aligned table's `status` says why each was dropped, and `advantage` in rewards what a sample is worth"
            )
        self._save(folder)
        return steps

    def _steps(self, shards: Shards, rewards: Artifact | None) -> Generator[Step, None, None]:
        """The steps of the round. A thread may be ahead here: of what training changes, only the room's limit is read."""
        config, number = self.recipe.train, self.step
        for epoch in range(config.epochs):
            seed = derive_seed(self.recipe.seed, "batches", self.number, epoch)
            for table in optimizer_batches(shards, config.batch_size, seed, rewards, self.teachers):
                yield self._make_step(table, number)
                number += 1

    def _make_step(self, table: pa.Table, number: int) -> Step:
        seed = derive_seed(self.recipe.seed, "corrupt", number, 0, 0)
        return make_step(self.objectives[0].prepare(table, seed), self._shape())

    def _shape(self) -> Shape:
        config, accelerator = self.recipe.train, self.accelerator
        return Shape(
            rows=config.micro_batch_size,
            tokens=min((n for n in (config.micro_batch_tokens, self.room.limit) if n is not None), default=None),
            process=accelerator.process_index,
            processes=accelerator.num_processes,
            pad_id=side(self.ref).pad_id,
            positions=config.chunk_positions,
            pinned=accelerator.device.type == "cuda",
        )

    def _optimize(self, step: Step) -> Taken:
        """Take a step. Nothing here waits for the device."""
        loss = self._add_gradients(step)
        norm = self.accelerator.clip_grad_norm_(self.held.parameters(), self.recipe.train.grad_clip)
        rate = self.scheduler.get_last_lr()[0]
        with insist("training: out of memory for AdamW's moments", ADAMW_NEEDS):
            self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        if self.masters is not None:
            self.masters.publish()
        self.step += 1
        return Taken(
            number=self.step,
            step=step,
            loss=self.accelerator.reduce(loss, "mean"),
            norm=norm.full_tensor() if isinstance(norm, DTensor) else norm,
            rate=rate,
        )

    def _add_gradients(self, step: Step) -> torch.Tensor:
        """Sum the gradients of a step's loss, and return this process's part of it.

        Where memory runs out the step begins anew in smaller passes: a gradient may have been added in part. Several
        processes wait for each other in each pass; there Halved is raised, and whoever started them starts them again.
        """
        while True:
            if step.shape != (shape := self._shape()):
                step = make_step(step.table, shape)
            try:
                return self._run_passes(step)
            except Halved as halved:
                if shape.processes > 1:
                    raise
                limit = halved.limit
            self.module.zero_grad()
            self.held.zero_grad()
            self.room.shrink(limit)

    def _run_passes(self, step: Step) -> torch.Tensor:
        accelerator, processes = self.accelerator, self.accelerator.num_processes
        loss = torch.zeros((), device=accelerator.device)
        for index, (made, counts) in enumerate(step.passes):
            # Gradients are averaged over processes: the loss is a sum over all their terms. A row that stands in counts 0.
            scale = processes / max(step.units, 1) if counts else 0.0
            with self.room.taking(*made.ids.shape), self._sync_gradients(index + 1 == len(step.passes)), accelerator.autocast():
                batch = made.on(accelerator.device)
                part_loss = self.module(batch.ids, batch) * scale
                accelerator.backward(part_loss)
            loss = loss + part_loss.detach()
        return loss

    def _look(self, taken: Taken) -> dict[str, Any]:
        """The record of a step. Waits for the device to have taken it."""
        self._check_norm(float(taken.norm), taken.number)
        now = time.monotonic()
        seconds, self.looked = now - self.looked, now
        return {
            "step": taken.number,
            "round": self.number,
            "loss": float(taken.loss),
            "grad_norm": float(taken.norm),
            "learning_rate": taken.rate,
            "rows": len(taken.step.table),
            "units": taken.step.units,
            "tokens": taken.step.tokens,
            "seconds": seconds,
        }

    def _check_norm(self, norm: float, step: int) -> None:
        """Stop before the weights are lost. A loss that is not a number has a gradient that is none."""
        limit = self.recipe.gates.grad_norm
        if not norm <= limit:
            raise Stopped(
                f"round {self.number}, step {step}: the gradient's norm is {norm:.3g}, at most {limit:.3g} is allowed "
                "(gates.grad_norm); nothing of this round's training is kept; lower train.learning_rate, or add "
                "train.warmup_steps"
            )

    def _sync_gradients(self, last: bool) -> AbstractContextManager[None]:
        """Whether the gradients of this forward and backward pass, and those gathered before, are summed over processes."""
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last else self.accelerator.no_sync(self.module)

    def _save(self, folder: Path) -> None:
        gathered = self.state.gather()
        weights = self.state.whole_weights() if isinstance(self.module, FSDPModule) else None
        if not self.accelerator.is_main_process:
            return
        self.state.write(folder / "trainer", self.step, *gathered)
        model: PreTrainedModel = self.accelerator.unwrap_model(self.module).model
        model = model if self.adapters is None else self.adapters.merge_and_unload()
        if weights is not None and self.state.masters:
            weights = {name: weight.bfloat16() for name, weight in weights.items()}
        name_stops(model, side(self.ref).stop_ids)
        model.save_pretrained(folder / "student", state_dict=weights)
        side(self.ref).tokenizer.save_pretrained(folder / "student")

    def _restore(self, folder: Path) -> int:
        step = self.state.restore(folder)
        if self.masters is not None:
            self.masters.publish()
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scheduler.load_state_dict(self.scheduler.state_dict() | {"last_epoch": step, "_last_lr": rates})
        return step

"""The trainer: optimizer steps of one round, and its state between rounds."""

import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import patch_environment
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import get_scheduler

from configs.errors import BadInput, Stopped
from configs.schema import Recipe
from storage.artifacts import Artifact, write_parquet
from storage.schemas import STEPS
from tasks import objectives
from tasks.models.reference import ModelRef, device_of, dtype_of
from tasks.models.stops import name_stops
from tasks.models.text import side
from tasks.running.progress import logger, progress
from tasks.running.seeds import derive_seed
from tasks.training.adapters import add_adapters
from tasks.training.batches import collate, optimizer_batches
from tasks.training.student import Student, load_for_training, shard_module

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a process needs to know of a round's training."""

    recipe: Recipe
    number: int
    student: ModelRef
    teacher: ModelRef | None
    shards: tuple[tuple[Artifact, Artifact], ...]  # rollouts and aligned
    state: str | None  # folder of what the last round's trainer left


JOB = TypeAdapter(Job)


def train(job: Job, folder: Path) -> None:
    """Write `student`, `trainer` and `steps.parquet` under `folder`; where several processes run this, their first does."""
    trainer = Trainer(job.recipe, job.number, student=job.student, teacher=job.teacher, state=job.state)
    steps = trainer.run(job.shards, folder)
    if trainer.accelerator.is_main_process:
        write_parquet(pa.Table.from_pylist(steps, STEPS), folder / "steps.parquet")
    trainer.accelerator.end_training()


def count_steps(recipe: Recipe) -> int:
    """Optimizer steps of a complete run: what the learning rate's schedule is laid over."""
    rows = recipe.rollout.prompts * recipe.rollout.samples
    return recipe.rounds * recipe.train.epochs * -(-rows // recipe.train.batch_size)


class Trainer:
    """Optimizer steps of one round; the optimizer goes on from the state that the last round left."""

    def __init__(
        self, recipe: Recipe, number: int, *, student: ModelRef, teacher: ModelRef | None = None, state: str | None = None
    ):
        """`student` is what training starts from, `state` the folder that the last round's trainer wrote."""
        self.recipe, self.number, self.ref = recipe, number, student
        config = recipe.train
        torch.manual_seed(derive_seed(recipe.seed, "train", number))
        device, half = device_of(student), dtype_of(student) == torch.bfloat16
        named = {} if device.index is None else {"ACCELERATE_TORCH_DEVICE": str(device)}
        if config.processes == 1:
            AcceleratorState._reset_state(reset_partial_state=True)  # another recipe may have trained here, on another device
        with patch_environment(**named):
            self.accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16" if half else "no")
        if self.accelerator.num_processes != config.processes:
            raise RuntimeError(
                f"train.processes = {config.processes}, but {self.accelerator.num_processes} take part: "
                "start potstill itself, not torchrun or accelerate launch"
            )
        model = load_for_training(student, config.dropout)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.adapters = add_adapters(model, recipe.student.lora) if recipe.student.lora is not None else None
        s_side, t_side = side(student), side(teacher or student)
        self.objective = objectives.build(recipe.objective, student=s_side.vocabulary, teacher=t_side.vocabulary)
        module: nn.Module = Student(model, self.objective, len(s_side.beta.values), config.chunk_positions)
        module = (
            shard_module(module, model, self.accelerator) if config.sharding == "full" else self.accelerator.prepare(module)
        )
        if config.processes > 1 and self.accelerator.is_main_process:
            here = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in module.parameters())
            total = sum(p.numel() for p in module.parameters())
            logger.info("round %d train: %d processes, this one holds %d of %d weights", number, config.processes, here, total)
        trained = [p for p in module.parameters() if p.requires_grad]
        matrices, vectors = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=config.adam_betas,
        )
        self.module, self.optimizer = module, self.accelerator.prepare(optimizer)
        self.scheduler = get_scheduler(config.schedule, optimizer, config.warmup_steps, count_steps(recipe))
        self.step = self._restore(state) if state else 0

    def run(self, shards: Sequence[tuple[Artifact, Artifact]], folder: Path) -> list[dict[str, Any]]:
        """Train over the shards, write `student` and `trainer` under `folder`, return one record a step."""
        config, steps = self.recipe.train, []
        rows = sum(aligned.rows for _, aligned in shards)
        with progress(f"round {self.number} train", config.epochs * -(-rows // config.batch_size)) as advance:
            for epoch in range(config.epochs):
                seed = derive_seed(self.recipe.seed, "batches", self.number, epoch)
                for table in optimizer_batches(shards, config.batch_size, seed):
                    steps.append(self._optimize(table))
                    advance(1, f"loss {steps[-1]['loss']:.4f}")
        if not steps:
            raise BadInput(
                f"round {self.number}: no row of {rows} can be trained on; "
                "the `status` column of the aligned table says why each was dropped"
            )
        self._save(folder)
        return steps

    def _optimize(self, table: pa.Table) -> dict[str, Any]:
        started = time.monotonic()
        accelerator, size = self.accelerator, self.recipe.train.micro_batch_size
        units, processes = sum(table["units"].to_pylist()), accelerator.num_processes
        table = self.objective.prepare(table, derive_seed(self.recipe.seed, "corrupt", self.step, 0, 0))
        share = table.take(np.arange(accelerator.process_index, len(table), processes))
        passes = -(-len(table) // (processes * size))  # of the process with most rows, and so of all: they wait for each other
        loss, tokens = torch.zeros((), device=accelerator.device), 0
        for index in range(passes):
            rows = share.slice(index * size, size)
            batch = collate(rows if len(rows) else table.slice(0, 1), side(self.ref).pad_id, accelerator.device)
            # Gradients are averaged over processes: the loss is a sum over all their terms. A row that stands in counts 0.
            scale = processes / units if len(rows) else 0.0
            with self._sync_gradients(index + 1 == passes), accelerator.autocast():
                part_loss = self.module(batch.ids, batch) * scale
                accelerator.backward(part_loss)
            loss, tokens = loss + part_loss.detach(), tokens + batch.tokens * bool(len(rows))
        norm = accelerator.clip_grad_norm_(self.module.parameters(), self.recipe.train.grad_clip)
        self._check_norm(float(norm))
        rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        return {
            "step": self.step,
            "round": self.number,
            "loss": float(accelerator.reduce(loss, "mean")),
            "grad_norm": float(norm.full_tensor() if isinstance(norm, DTensor) else norm),
            "learning_rate": rate,
            "rows": len(table),
            "units": units,
            "tokens": int(accelerator.reduce(torch.tensor(tokens, device=accelerator.device), "sum")),
            "seconds": time.monotonic() - started,
        }

    def _check_norm(self, norm: float) -> None:
        """Stop before the weights are lost. A loss that is not a number has a gradient that is none."""
        limit = self.recipe.gates.grad_norm
        if not norm <= limit:
            raise Stopped(
                f"round {self.number}, step {self.step + 1}: the gradient's norm is {norm:.3g}, at most {limit:.3g} is allowed "
                "(gates.grad_norm); nothing of this round's training is kept; lower train.learning_rate, or add "
                "train.warmup_steps"
            )

    def _sync_gradients(self, last: bool) -> AbstractContextManager[None]:
        """Whether the gradients of this forward and backward pass, and those gathered before, are summed over processes."""
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last else self.accelerator.no_sync(self.module)

    # No pickle: the optimizer's tensors (and adapters), by parameter name, go to safetensors, and the rest to JSON.

    def _save(self, folder: Path) -> None:
        state: dict[str, Any] = get_optimizer_state_dict(self.module, self.optimizer.optimizer, options=FULL)
        model = self.accelerator.unwrap_model(self.module).model
        whole = get_model_state_dict(model, options=FULL) if isinstance(self.module, FSDPModule) else None
        if not self.accelerator.is_main_process:
            return
        (folder / "trainer").mkdir()
        if self.adapters is not None:
            trained = {name: p.detach() for name, p in self.adapters.named_parameters() if p.requires_grad}
            save_file(trained, folder / "trainer" / "adapters.safetensors")
            model = self.adapters.merge_and_unload()
        tensors = {f"{name}/{key}": value for name, values in state["state"].items() for key, value in values.items()}
        save_file(tensors, folder / "trainer" / "optimizer.safetensors")
        saved = {"step": self.step, "param_groups": state["param_groups"]}
        (folder / "trainer" / "state.json").write_text(json.dumps(saved, indent=1))
        weights = whole and {name: value for name, value in whole.items() if name not in model.all_tied_weights_keys}
        name_stops(model, side(self.ref).stop_ids)
        model.save_pretrained(folder / "student", state_dict=weights)
        side(self.ref).tokenizer.save_pretrained(folder / "student")

    def _restore(self, folder: str) -> int:
        saved = json.loads((Path(folder) / "state.json").read_text())
        if self.adapters is not None:
            for name, value in load_file(Path(folder) / "adapters.safetensors").items():
                self.adapters.get_parameter(name).data.copy_(value)
        state: dict[str, dict[str, torch.Tensor]] = {}
        for path, tensor in load_file(Path(folder) / "optimizer.safetensors").items():
            name, key = path.rsplit("/", 1)
            state.setdefault(name, {})[key] = tensor
        saved_state = {"state": state, "param_groups": saved["param_groups"]}
        set_optimizer_state_dict(self.module, self.optimizer.optimizer, saved_state, options=FULL)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scheduler.load_state_dict(self.scheduler.state_dict() | {"last_epoch": saved["step"], "_last_lr": rates})
        step: int = saved["step"]
        return step

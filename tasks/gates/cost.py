"""Gates of preflight on what a run will cost: disk, memory, hours."""

import os
from collections.abc import Iterator, Sequence

import pyarrow as pa
import torch

from configs.keep import ALL, BEST
from configs.schema import Recipe
from storage.artifacts import measure_parquet
from storage.store import Run
from tasks.gates.gate import Gate
from tasks.gates.sample import Sample
from tasks.models.reference import ModelRef, device_of, dtype_of
from tasks.models.weights import count_weights
from tasks.training.room import training_need

GIB = 2**30
HALF, MASTER, MOMENTS = 2, 4, 8  # bytes per weight: in bfloat16, in float32, and AdamW's two moments


def cost_gates(recipe: Recipe, made: Sequence[tuple[Sample, Sequence[pa.Table]]], seconds: float) -> Iterator[Gate]:
    """Disk, memory and hours of the whole run, from the tables that the samples made in `seconds`.

    There is a sample for each teacher, as large as the teacher's share of the prompts.
    """
    rows = sum(len(tables[0]) for _, tables in made)
    total = recipe.rounds * recipe.rollout.prompts * recipe.rollout.samples
    weights = {ref: count_weights(ref) for sample, _ in made for ref in sample.sides().values()}
    sizes = dict.fromkeys(("rollouts", "scores", "aligned"), 0.0)
    for _, tables in made:
        for name, table in zip(sizes, tables, strict=False):
            sizes[name] += measure_parquet(table) / rows
    student = made[0][0].student
    disk, free = disk_need(recipe, sizes, weights[student]) / GIB, Run(recipe.root, recipe.name).free()
    detail = f"{sum(sizes.values()):,.0f} bytes per rollout, and checkpoints, as [keep] keeps them; the limit is the free space"
    yield Gate("disk", disk, free and free / GIB, detail=detail)
    for device, need in memory_needs(recipe, student, weights).items():
        detail = "weights and optimizer, without activations; the limit is the device's memory"
        yield Gate(f"{device}: memory", need / GIB, memory_of(device), detail=detail)
    yield Gate(
        "hours", total * seconds / rows / 3600, detail="sampling and scoring at the speed of this sample, without training"
    )


def disk_need(recipe: Recipe, sizes: dict[str, float], weights: int) -> float:
    """The most bytes that all rounds of a recipe take at one time.

    `sizes` are bytes per rollout by table, `weights` those of the student. A round is complete before an older one is cleared.
    """

    def rounds_of(kept: int | str) -> int:
        most = {ALL: recipe.rounds, BEST: 3}  # the best one, the newest, and the next
        return min(recipe.rounds, most[kept] if isinstance(kept, str) else kept + 1)

    keep, rows = recipe.keep, recipe.rollout.prompts * recipe.rollout.samples
    rounds = {"rollouts": rounds_of(keep.rollouts), "scores": rounds_of(keep.scores), "aligned": recipe.rounds}
    student, trainer = (HALF, MASTER + MOMENTS) if recipe.train.param_dtype == "bfloat16" else (MASTER, MOMENTS)
    if recipe.student.lora is not None:
        trainer = 0  # of adapters, which are small
    checkpoints = rounds_of(keep.students) * student + rounds_of(keep.trainers) * trainer
    return sum(rounds[name] * rows * size for name, size in sizes.items()) + checkpoints * weights


def memory_needs(recipe: Recipe, student: ModelRef, weights: dict[ModelRef, int]) -> dict[torch.device, float]:
    """The most bytes that each device of this machine needs at one time. One model is loaded at a time."""
    train, needs = recipe.train, dict[torch.device, float]()
    for ref, count in weights.items():
        device, each = device_of(ref), float(dtype_of(ref).itemsize)
        if ref.engine == "server":
            continue  # its weights are on another machine or in another process
        if ref == student:
            needed = training_need(train, device, count, lora=recipe.student.lora is not None)
            needs[device] = max(needs.get(device, 0), needed)
        needs[device] = max(needs.get(device, 0), each * count)
    return needs


def memory_of(device: torch.device) -> float:
    """The memory of a device in GiB, free or not."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1] / GIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB

"""Gates of preflight on what a run will cost: disk, memory, hours."""

import os
from collections.abc import Iterator

import pyarrow as pa
import torch

from storage.artifacts import measure_parquet
from storage.store import Run
from tasks.gates.gate import Gate
from tasks.gates.sample import Sample
from tasks.models.reference import ModelRef, device_of, dtype_of
from tasks.models.weights import empty_model

GIB = 2**30
TRAINED = 16  # bytes per trained weight: float32 weight, gradient, and AdamW's two moments
FROZEN = 4  # bytes per weight where only adapters are trained


def cost_gates(sample: Sample, tables: list[pa.Table], seconds: float) -> Iterator[Gate]:
    """Disk, memory and hours of the whole run, from the `tables` that the sample made in `seconds`."""
    recipe, rows = sample.recipe, len(tables[0])
    total = recipe.rounds * recipe.rollout.prompts * recipe.rollout.samples
    weights = {role: weights_of(ref) for role, ref in sample.sides().items()}
    per_row = sum(map(measure_parquet, tables)) / rows
    disk = (total * per_row + recipe.rounds * 12 * weights["student"]) / GIB  # float32 weights, and two moments
    free = Run(recipe.root, recipe.name).free()
    yield Gate(
        "disk",
        disk,
        free and free / GIB,
        detail=f"{per_row:,.0f} bytes per rollout, and one checkpoint per round; the limit is the free space",
    )
    for device, need in memory_needs(sample, weights).items():
        detail = "weights and optimizer, without activations; the limit is the device's memory"
        yield Gate(f"{device}: memory", need / GIB, memory_of(device), detail=detail)
    yield Gate(
        "hours", total * seconds / rows / 3600, detail="sampling and scoring at the speed of this sample, without training"
    )


def memory_needs(sample: Sample, weights: dict[str, int]) -> dict[torch.device, float]:
    """The most bytes that each device of this machine needs at one time. One model is loaded at a time."""
    train, needs = sample.recipe.train, dict[torch.device, float]()
    for role, ref in sample.sides().items():
        device, each = device_of(ref), float(dtype_of(ref).itemsize)
        if ref.engine == "server":
            continue  # its weights are on another machine or in another process
        if role == "student":
            trained = TRAINED if sample.recipe.student.lora is None else FROZEN
            parts = train.processes if train.sharding == "full" else 1
            copies = train.processes if device.type == "cpu" else 1  # processes on the CPU share one memory
            each = max(each, trained * copies / parts)
        needs[device] = max(needs.get(device, 0), each * weights[role])
    return needs


def weights_of(ref: ModelRef) -> int:
    """The number of weights of a model."""
    return sum(p.numel() for p in empty_model(ref).parameters())


def memory_of(device: torch.device) -> float:
    """The memory of a device in GiB, free or not."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1] / GIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB

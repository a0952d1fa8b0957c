"""The memory that training takes, and room for it."""

import torch

from configs.train import Train
from tasks.engines.pool import make_room
from tasks.models.reference import ModelRef, device_of
from tasks.models.weights import count_weights

TRAINED = 16  # bytes per trained weight: float32 weight, gradient, and AdamW's two moments
FROZEN = 4  # bytes per weight where only adapters are trained


def training_need(train: Train, device: torch.device, weights: int, *, lora: bool) -> float:
    """The bytes that training takes of one device, without activations."""
    parts = train.processes if train.sharding == "full" else 1
    copies = train.processes if device.type == "cpu" else 1  # processes on the CPU share one memory
    return float(weights * (FROZEN if lora else TRAINED) * copies / parts)


def make_room_to_train(train: Train, student: ModelRef, *, lora: bool) -> None:
    """Have engines give their memory back as far as training needs it, on each device that it uses."""
    device = device_of(student)
    need = training_need(train, device, count_weights(student), lora=lora)
    for index in range(train.processes if device.type == "cuda" else 1):
        make_room(torch.device(device.type, index + (device.index or 0)), need)

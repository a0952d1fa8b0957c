"""A model's head without the model: the last layer, which turns hidden states into log-probs."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional
from transformers import PreTrainedModel

from storage.artifacts import Artifact, local_folder
from tasks.models.reference import ModelRef, device_of
from tasks.models.weights import LogitScale, logit_scale_of, scaled_logits

FILE = "head.safetensors"


@dataclass(frozen=True)
class Head:
    """The weights of a head, and how the model scales its logits."""

    weight: torch.Tensor  # [V, width], without padded rows
    bias: torch.Tensor | None  # [V]
    scale: LogitScale

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[positions, V]` of hidden states `[positions, width]`, as `head_logits` gives them."""
        states = hidden.to(self.weight.device, self.weight.dtype)
        return scaled_logits(functional.linear(states, self.weight, self.bias), self.scale)

    def on(self, device: torch.device) -> "Head":
        """The same on a device, in memory of its own: whatever else the model holds may go."""
        bias = None if self.bias is None else self.bias.to(device, copy=True)
        return Head(self.weight.to(device, copy=True), bias, self.scale)


def head_of(model: PreTrainedModel, size: int) -> Head:
    """The head of a loaded model, without the padded rows behind `size`."""
    layer = model.get_output_embeddings()
    bias = getattr(layer, "bias", None)
    return Head(layer.weight[:size].detach(), None if bias is None else bias[:size].detach(), logit_scale_of(model))


def save_head(head: Head, folder: Path) -> None:
    """Write a head into an empty folder, as safetensors."""
    tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
    folder.mkdir()
    contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / FILE, {"finish": json.dumps(head.scale)})


def read_head(artifact: Artifact, teacher: ModelRef) -> Head:
    """The head that `save_head` wrote, on the teacher's device."""
    with safe_open(Path(local_folder(artifact)) / FILE, "pt", device=str(device_of(teacher))) as file:
        bias = file.get_tensor("bias") if "bias" in file.keys() else None  # noqa: SIM118 (not a dict)
        factor, cap = json.loads(file.metadata()["finish"])
        return Head(file.get_tensor("weight"), bias, (factor, cap))

"""What a trainer leaves for the next round. No pickle: tensors go to safetensors by the parameter's name, the rest to JSON."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers import PreTrainedModel

from tasks.training.precision import ADAMW

if TYPE_CHECKING:
    from peft import PeftModel

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
TO_PARTS = StateDictOptions(full_state_dict=True, strict=False)  # tied weights are there once

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class State:
    """The parts of a trainer that outlive its round."""

    module: nn.Module  # whose weights the optimizer changes, in any wrapper
    model: PreTrainedModel  # the student in it
    optimizer: torch.optim.Optimizer
    adapters: "PeftModel | None"
    masters: bool  # whether the weights are masters, of which the student is a copy in bfloat16

    def whole_weights(self) -> Tensors:
        """All weights on the CPU, tied ones once. Every process takes part; the first one gets them."""
        found: dict[str, Any] = get_model_state_dict(self.model, options=FULL)
        return {name: value for name, value in found.items() if name not in self.model.all_tied_weights_keys}

    def gather(self) -> tuple[dict[str, Any], Tensors | None]:
        """The optimizer's state and the master weights. Every process takes part; the first one gets them."""
        state: dict[str, Any] = get_optimizer_state_dict(self.module, self.optimizer, options=FULL)
        return state, self.whole_weights() if self.masters else None

    def write(self, folder: Path, step: int, state: dict[str, Any], masters: Tensors | None) -> None:
        """Make `folder` from what was gathered."""
        folder.mkdir()
        if self.adapters is not None:
            trained = {name: p.detach() for name, p in self.adapters.named_parameters() if p.requires_grad}
            save_file(trained, folder / "adapters.safetensors")
        if masters is not None:
            save_file(masters, folder / "weights.safetensors")
        tensors = {f"{name}/{key}": value for name, values in state["state"].items() for key, value in values.items()}
        save_file(tensors, folder / "optimizer.safetensors")
        saved = {"step": step, "param_groups": state["param_groups"]}
        (folder / "state.json").write_text(json.dumps(saved, indent=1))

    def restore(self, folder: Path) -> int:
        """Take over what the last round left, and return the number of its last step."""
        saved = json.loads((folder / "state.json").read_text())
        if self.adapters is not None:
            for name, value in load_file(folder / "adapters.safetensors").items():
                self.adapters.get_parameter(name).data.copy_(value)
        if self.masters:
            weights: dict[str, Any] = load_file(folder / "weights.safetensors")
            set_model_state_dict(self.model, weights, options=TO_PARTS)
        state: dict[str, Tensors] = {}
        for path, tensor in load_file(folder / "optimizer.safetensors").items():
            name, key = path.rsplit("/", 1)
            state.setdefault(name, {})[key] = tensor
        groups = [group | ADAMW for group in saved["param_groups"]]  # another version may have stepped in another way
        whole: dict[str, Any] = {"state": state, "param_groups": groups}
        set_optimizer_state_dict(self.module, self.optimizer, whole, options=FULL)
        step: int = saved["step"]
        return step

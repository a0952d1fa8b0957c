"""Low-rank adapters on a student, through peft."""

from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from configs.errors import BadInput
from configs.models import Lora
from tasks.models.reference import ModelRef
from tasks.models.weights import empty_model

if TYPE_CHECKING:
    from peft import PeftModel


def add_adapters(model: PreTrainedModel, lora: Lora) -> "PeftModel":
    """`model` with adapters in its layers, which change nothing yet; they alone require a gradient.

    Raises BadInput without peft, or where no layer has the name of a target.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise BadInput("student.lora needs one more package: pip install -e '.[lora]'") from None
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets, task_type="CAUSAL_LM")  # type: ignore[arg-type]
    try:
        return get_peft_model(model, config)
    except ValueError:
        linear = {name.rsplit(".", 1)[-1] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
        raise BadInput(
            f"student.lora.targets = {lora.targets}: the model has no such layers; name some of {', '.join(sorted(linear))}"
        ) from None


def check_lora(ref: ModelRef, lora: Lora) -> None:
    """Refuse adapters that the model has no layers for, from its config alone."""
    add_adapters(empty_model(ref), lora)

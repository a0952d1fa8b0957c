"""A model's weights: loading and checking them, its hidden states and its logits."""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from configs.errors import BadInput
from tasks.models.reference import FLASH, ModelRef, dtype_of, explain_load_errors

transformers_logging.disable_progress_bar()  # a bar for every shard of weights would drown ours


def load_weights(ref: ModelRef, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load the model on the CPU in `dtype` (default: the reference's dtype outside training)."""
    with explain_load_errors(ref.path):
        return AutoModelForCausalLM.from_pretrained(
            ref.local,
            dtype=dtype or dtype_of(ref),
            attn_implementation=ref.attention,
            trust_remote_code=ref.trust_remote_code,
            use_safetensors=True,
        )


def load_float32(ref: ModelRef) -> PreTrainedModel:
    """Load the model in float32, to compare an engine's log-probs with. flash-attn does not run in float32; sdpa does."""
    return load_weights(replace(ref, attention="sdpa") if ref.attention == FLASH else ref, torch.float32)


def empty_model(ref: ModelRef) -> PreTrainedModel:
    """The model's layers without memory for their weights, from its config alone."""
    config = AutoConfig.from_pretrained(ref.local, trust_remote_code=ref.trust_remote_code)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=ref.trust_remote_code)
        return model


def check_weights(ref: ModelRef) -> None:
    """Refuse a local folder without weights, or whose code the recipe does not trust; reads no weights."""
    folder = Path(ref.path)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise BadInput(f"{ref.path}: no *.safetensors in it; give a folder with config.json, weights and tokenizer.json")
    if folder.is_dir():
        with explain_load_errors(ref.path):
            AutoConfig.from_pretrained(ref.path, trust_remote_code=ref.trust_remote_code)


def hidden_states(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Last hidden states `[rows, time, width]` of right-padded `ids`, int64 `[rows, time]`.

    Causal attention never looks at padding on the right, so no mask is passed and the fast kernels stay available.
    """
    states: torch.Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return states


def logits_of(model: PreTrainedModel, hidden: torch.Tensor, size: int) -> torch.Tensor:
    """float32 logits `[…, size]` of hidden states `[…, width]`: padded rows of the head are not ids and are cut off."""
    return apply_logit_scale(model.get_output_embeddings()(hidden)[..., :size].float(), logit_scale_of(model))


LogitScale = tuple[float, float]  # the factor, and the soft cap (0: none)


def logit_scale_of(model: PreTrainedModel) -> LogitScale:
    """How a model scales and caps the logits of its head."""
    config = model.config.get_text_config()
    factor = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return factor, getattr(config, "final_logit_softcapping", None) or 0.0


def apply_logit_scale(logits: torch.Tensor, scale: LogitScale) -> torch.Tensor:
    """Logits as the model itself gives them, of the same shape."""
    factor, cap = scale
    logits = logits * factor if factor != 1 else logits
    return torch.tanh(logits / cap) * cap if cap else logits


def check_head(model: PreTrainedModel, name: str, size: int) -> None:
    """Refuse a model whose own logits are not `logits_of` its hidden states: some families post-process them."""
    ids = torch.tensor([[1, 2, 3]], device=model.device)
    with torch.inference_mode():
        whole = model(input_ids=ids, use_cache=False).logits[..., :size].float()
        ours = logits_of(model, hidden_states(model, ids), size)
    if not torch.allclose(whole, ours, rtol=1e-2, atol=1e-2):
        raise BadInput(
            f"{name}: the model changes the logits of its head in a way that this version does not support "
            f"(largest difference {float((whole - ours).abs().max()):.3g}); choose another model"
        )

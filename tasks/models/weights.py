"""A model's weights: loading and checking them, its hidden states and its logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from configs.errors import BadInput
from storage.lineage import digest_json
from tasks.models.reference import FLASH, ModelRef, device_of, dtype_of, explain_load_errors
from tasks.running.memory import insist

CPU = torch.device("cpu")
# Of a config: what may differ between a model and what was trained from it.
OF_ORIGIN = {"_name_or_path", "transformers_version", "dtype", "use_cache"}
OF_ORIGIN |= {"bos_token_id", "eos_token_id", "pad_token_id"}  # `side` reads them anew
MEND = "take a smaller model, another device, or dtype = 'bfloat16' (training's is float32), or end what else takes it"

transformers_logging.disable_progress_bar()  # a bar for every shard of weights would drown ours


def load_weights(ref: ModelRef, dtype: torch.dtype | None = None, device: torch.device = CPU) -> PreTrainedModel:
    """Load the model in `dtype` (default: the reference's dtype outside training) on `device`.

    Raises BadInput where weights are missing or have another shape: transformers would go on with random ones. Raises Stopped
    where memory runs out.
    """
    dtype = dtype or dtype_of(ref)
    with insist(f"{ref.path}: out of memory while its weights are loaded in {str(dtype).removeprefix('torch.')}", MEND):
        return _load(ref, dtype).to(device)  # type: ignore[arg-type, no-any-return]


def _load(ref: ModelRef, dtype: torch.dtype, device: str | None = None) -> PreTrainedModel:
    with explain_load_errors(ref.path), _silent():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            ref.local,
            dtype=dtype,
            attn_implementation=ref.attention,
            trust_remote_code=ref.trust_remote_code,
            use_safetensors=True,
            device_map=device,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    model: PreTrainedModel = loaded[0]
    found: dict[str, Any] = loaded[1]
    if missing := sorted(found["missing_keys"]):
        raise BadInput(
            f"{ref.path}: its *.safetensors lack {_first(missing)}, which config.json asks for; "
            "give a folder with all weights of the model"
        )
    if other := sorted(f"{key} ({list(there)}, not {list(here)})" for key, there, here in found["mismatched_keys"]):
        raise BadInput(
            f"{ref.path}: its *.safetensors have other shapes than config.json says: {_first(other)}; "
            "give the config.json and tokenizer that belong to these weights"
        )
    if device is None and not ref.committed and device_of(ref).type == "cpu":
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()  # it is mapped: who wrote into the file would change it, or end the process
    return model


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextmanager
def _silent() -> Iterator[None]:
    """transformers prints a table of what did not fit and goes on; here it is an error with one message."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def load_float32(ref: ModelRef) -> PreTrainedModel:
    """Load the model on its device in float32, to hold an engine's log-probs against. flash-attn has none; sdpa does."""
    return load_weights(replace(ref, attention="sdpa") if ref.attention == FLASH else ref, torch.float32, device_of(ref))


def empty_model(ref: ModelRef) -> PreTrainedModel:
    """The model's layers without memory for their weights, from its config alone."""
    config = AutoConfig.from_pretrained(ref.local, trust_remote_code=ref.trust_remote_code)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=ref.trust_remote_code)
        return model


@lru_cache(maxsize=64)
def count_weights(ref: ModelRef) -> int:
    """The number of weights of a model, from its config alone."""
    return sum(p.numel() for p in empty_model(ref).parameters())


def architecture_of(ref: ModelRef) -> str:
    """A digest of what shapes a model and how it computes: of its config without what says where it comes from."""
    config = AutoConfig.from_pretrained(ref.local, trust_remote_code=ref.trust_remote_code).to_dict()
    return digest_json({name: value for name, value in config.items() if name not in OF_ORIGIN})


def check_weights(ref: ModelRef) -> None:
    """Refuse a local folder without weights, with damaged ones, or whose code the recipe does not trust.

    Names and shapes of the weights are read, their values are not. Another engine, and quantised weights, need not be
    what transformers can lay out here.
    """
    folder = Path(ref.path)
    if not folder.is_dir():
        return
    if not (found := sorted(folder.glob("*.safetensors"))):
        raise BadInput(f"{ref.path}: no *.safetensors in it; give a folder with config.json, weights and tokenizer.json")
    for file in found:
        try:
            with safe_open(file, "pt"):  # holds its length against its header
                pass
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{file}: cannot be read as safetensors ({error}); give the whole file") from None
    with explain_load_errors(ref.path):
        config = AutoConfig.from_pretrained(ref.path, trust_remote_code=ref.trust_remote_code)
    if ref.engine in ("transformers", "auto") and getattr(config, "quantization_config", None) is None:
        _load(replace(ref, attention="eager") if ref.attention == FLASH else ref, torch.float32, device="meta")


def hidden_states(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Last hidden states `[rows, time, width]` of right-padded `ids`, int64 `[rows, time]`.

    Causal attention never looks at padding on the right, so no mask is passed and the fast kernels stay available.
    """
    states: torch.Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return states


def logits_of(model: PreTrainedModel, hidden: torch.Tensor, size: int) -> torch.Tensor:
    """float32 logits `[…, size]` of hidden states `[…, width]`: padded rows of the head are not ids and are cut off."""
    return head_logits(model, hidden, size).float()


def head_logits(model: PreTrainedModel, hidden: torch.Tensor, size: int) -> torch.Tensor:
    """As `logits_of`, in the head's own dtype: half precision is half as much to read. float32 where the model scales them."""
    return scaled_logits(model.get_output_embeddings()(hidden)[..., :size], logit_scale_of(model))


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


def scaled_logits(logits: torch.Tensor, scale: LogitScale) -> torch.Tensor:
    """As `apply_logit_scale`, in float32 where there is anything to do."""
    return logits if scale == (1.0, 0.0) else apply_logit_scale(logits.float(), scale)


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

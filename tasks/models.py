"""Load models and tokenizers. The one place that decides on device, dtype and attention."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import is_flash_attn_2_available
from transformers.utils import logging as transformers_logging

from configs.errors import BadInput
from configs.schema import Model
from storage.artifacts import Artifact, local_folder
from storage.lineage import digest_folder, digest_json
from tasks.gguf import folder_of
from tasks.tokens.token_bytes import Encoder, TokenBytes, token_bytes
from tasks.tokens.vocabulary import Vocabulary

transformers_logging.disable_progress_bar()  # a bar for every shard of weights would drown ours


FLASH = "flash_attention_2"


@dataclass(frozen=True)
class ModelRef:
    """A model as stages are told of it: where it lies, what it is, how to use it."""

    path: str
    digest: str
    rendering: str = "chat"
    dtype: str = "auto"
    device: str = "auto"
    attention: str = "sdpa"
    trust_remote_code: bool = False
    engine: str = "transformers"
    urls: tuple[str, ...] = ()
    vllm_python: str = ""
    vllm_memory: float = 0.9

    @property
    def local(self) -> str:
        """Its folder on this machine (or hub id): one on object storage is fetched, once a machine."""
        return local_folder(Artifact(self.path, self.digest)) if "://" in self.path else self.path

    @property
    def identity(self) -> dict[str, str]:
        """What of it can change a result, for keys: not where it or its engine lies, not the device.

        The engine is named by the stages that use it (`tasks.engines.choose.engine_name`).
        """
        return {"digest": self.digest, "rendering": self.rendering, "dtype": self.dtype, "attention": self.attention}


def reference(config: Model, path: str, digest: str = "") -> ModelRef:
    """A ModelRef for the weights at `path` (a folder, hub id or GGUF file), used as `config` says.

    Where a run lies on object storage, its checkpoints are given by URI and `digest`.
    """
    use = config.model_dump(exclude={"model", "recipe", "scratch", "lora"})
    if "://" in path and digest:
        return ModelRef(path, digest, **use)
    path = _folder(path)
    if Path(path).is_dir():
        return ModelRef(path, digest_folder(path), **use)
    return ModelRef(path, digest_json([path, _hub_commit(path, config.trust_remote_code)]), **use)


def _folder(name: str) -> str:
    if not name.endswith(".gguf"):
        return name
    with _explained(name):
        return folder_of(name)


def _hub_commit(name: str, trust_remote_code: bool) -> str | None:
    with _explained(name):
        return getattr(AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code), "_commit_hash", None)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns transformers' ways of failing to load into one message."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "custom code" in reason:
            raise BadInput(
                f"{name}: the model needs code of its own; set trust_remote_code = true for it if you trust that code, "
                "or choose another model"
            ) from None
        if "gated repo" in str(error):
            raise BadInput(
                f"{name}: its owner asks who uses it; request access at https://huggingface.co/{name}, then `hf auth login` "
                "(or HF_TOKEN) here, or choose another model"
            ) from None
        raise BadInput(
            f"{name}: no such model, or not one that transformers can load ({reason[:300]}); "
            "give a folder with config.json, *.safetensors and tokenizer.json, or a hub id that this machine reaches"
        ) from None


class Side:
    """A model's text side, without its weights: tokenizer, bytes, stop ids, rendering of prompts."""

    def __init__(self, ref: ModelRef):
        self.ref = ref
        with _explained(ref.path):
            tokenizer = AutoTokenizer.from_pretrained(ref.local, trust_remote_code=ref.trust_remote_code)
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise BadInput(f"{ref.path}: its tokenizer has no tokenizer.json; choose a model that has one (a fast tokenizer)")
        self.tokenizer = tokenizer
        if ref.rendering == "chat" and not self.tokenizer.chat_template:
            raise BadInput(
                f"{ref.path}: its tokenizer has no chat template, and the prompts are chats; "
                "set rendering = 'plain' for this model, or choose one with a template"
            )

    @cached_property
    def stop_ids(self) -> list[int]:
        """Ids that end a completion, the tokenizer's own end token first."""
        try:
            configured = GenerationConfig.from_pretrained(self.ref.local).eos_token_id
        except OSError:
            configured = None
        ids = [self.tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])]
        stops = list(dict.fromkeys(i for i in ids if i is not None))
        if not stops:
            raise BadInput(f"{self.ref.path}: no end token in its tokenizer or generation config; set eos_token there")
        return stops

    @cached_property
    def beta(self) -> TokenBytes:
        """Bytes of the ids that the model can emit: a tokenizer may know more ids than the head has rows."""
        beta = token_bytes(self.tokenizer, self.stop_ids, self.ref.path)
        return TokenBytes(beta.values[: self.rows], beta.roles[: self.rows])

    @cached_property
    def rows(self) -> int | None:
        """Rows of the model's head, padding included; None for a tokenizer alone."""
        try:
            config = AutoConfig.from_pretrained(self.ref.local, trust_remote_code=self.ref.trust_remote_code)
        except (OSError, ValueError):
            return None
        return config.get_text_config().vocab_size

    @cached_property
    def vocabulary(self) -> Vocabulary:
        pieces = self.tokenizer.convert_ids_to_tokens(list(range(len(self.beta.values))))
        return Vocabulary(self.beta, self.stop_ids, [piece or "" for piece in pieces])

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.tokenizer, self.beta)

    @property
    def pad_id(self) -> int:
        return self.stop_ids[0] if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    def render(self, messages: list[dict[str, str]]) -> list[int]:
        """The ids of a prompt, up to where the completion starts."""
        if self.ref.rendering == "plain":
            return self.tokenizer("\n".join(m["content"] for m in messages) + "\n")["input_ids"]
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # the template writes BOS itself


@lru_cache(maxsize=8)
def side(ref: ModelRef) -> Side:
    """The text side of a model, loaded once a process."""
    return Side(ref)


def tokenizer_of(name: str) -> Side:
    """The text side of a hub id, folder or GGUF file whose weights and template are not needed."""
    text_side = side(ModelRef(_folder(name), "", rendering="plain"))
    text_side.encoder.check(name)
    return text_side


def device_of(ref: ModelRef | Model) -> torch.device:
    if ref.device != "auto":
        return torch.device(ref.device)
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def accelerator_names(config: Model, processes: int = 1) -> set[str]:
    """What the accelerators of this machine that a model's processes use are called, in every process alike."""
    device = device_of(config)
    indices = range(device.index or 0, (device.index or 0) + processes)
    if device.type == "cuda":  # one that is not here is a cluster's worker's
        return {f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in indices if i < torch.cuda.device_count()}
    return set() if device.type == "cpu" else {f"{device.type}-{i}-of-{socket.gethostname()}" for i in indices}


def check_machine(role: str, config: Model) -> None:
    """Refuse a device that this machine does not have, or a kind of attention without its package."""
    kind, _, index = config.device.partition(":")
    devices = {"cuda": torch.cuda.device_count(), "xpu": torch.xpu.device_count(), "mps": torch.backends.mps.is_available()}
    if kind in devices and int(index or 0) >= (found := int(devices[kind])):
        raise BadInput(
            f"{role}.device = '{config.device}': this machine has {found} such devices, counted from 0; "
            f"set {role}.device to 'auto' or 'cpu'"
        )
    if config.attention == FLASH and not is_flash_attn_2_available():
        raise BadInput(f"{role}.attention = 'flash_attention_2' needs the flash-attn package and a GPU; set it to 'sdpa'")
    if config.attention == FLASH and role == "student" and (dtype := dtype_of(config)) != torch.bfloat16:
        raise BadInput(
            f"student.attention = 'flash_attention_2' trains in bfloat16 alone (found {str(dtype).removeprefix('torch.')}); "
            "set student.dtype = 'bfloat16', or student.attention = 'sdpa'"
        )


def dtype_of(ref: ModelRef | Model) -> torch.dtype:
    if ref.dtype != "auto":
        return getattr(torch, ref.dtype)
    device = device_of(ref)
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def load_weights(ref: ModelRef, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model on the CPU in `dtype` (default: what the reference says for use outside training)."""
    with _explained(ref.path):
        return AutoModelForCausalLM.from_pretrained(
            ref.local,
            dtype=dtype or dtype_of(ref),
            attn_implementation=ref.attention,
            trust_remote_code=ref.trust_remote_code,
            use_safetensors=True,
        )


def float32_model(ref: ModelRef) -> PreTrainedModel:
    """The model as the trainer's to compare with, in float32 and outside of autocast: where flash-attn does not run."""
    return load_weights(replace(ref, attention="sdpa") if ref.attention == FLASH else ref, torch.float32)


def empty_model(ref: ModelRef) -> PreTrainedModel:
    """The model's layers without memory for their weights, from its config alone."""
    config = AutoConfig.from_pretrained(ref.local, trust_remote_code=ref.trust_remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=ref.trust_remote_code)


def check_weights(ref: ModelRef) -> None:
    """Refuse a local folder without weights, or whose code the recipe does not trust; reads no weights."""
    folder = Path(ref.path)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise BadInput(f"{ref.path}: no *.safetensors in it; give a folder with config.json, weights and tokenizer.json")
    if folder.is_dir():
        with _explained(ref.path):
            AutoConfig.from_pretrained(ref.path, trust_remote_code=ref.trust_remote_code)


def hidden_states(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Last hidden states `[batch, time, hidden]` of right-padded `ids`.

    Causal attention never looks at padding on the right, so no mask is passed and the fast kernels stay available.
    """
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


def logits_of(model: PreTrainedModel, hidden: torch.Tensor, size: int) -> torch.Tensor:
    """float32 logits `[…, size]` of hidden states: padded rows of the head are not ids and are cut off."""
    return finished(model.get_output_embeddings()(hidden)[..., :size].float(), finish_of(model))


def finish_of(model: PreTrainedModel) -> tuple[float, float]:
    """What a model does to its logits behind the head: the factor, and the soft cap (0: none)."""
    config = model.config.get_text_config()
    factor = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return factor, getattr(config, "final_logit_softcapping", None) or 0.0


def finished(logits: torch.Tensor, finish: tuple[float, float]) -> torch.Tensor:
    factor, cap = finish
    logits = logits * factor if factor != 1 else logits
    return torch.tanh(logits / cap) * cap if cap else logits


def check_head(model: PreTrainedModel, name: str, size: int) -> None:
    """Refuse a model whose own logits are not `logits_of` its hidden states: some families post-process them."""
    ids = torch.tensor([[1, 2, 3]], device=model.device)
    with torch.inference_mode():
        own = model(input_ids=ids, use_cache=False).logits[..., :size].float()
        ours = logits_of(model, hidden_states(model, ids), size)
    if not torch.allclose(own, ours, rtol=1e-2, atol=1e-2):
        raise BadInput(
            f"{name}: the model changes its logits behind the head in a way this version does not know "
            f"(largest difference {float((own - ours).abs().max()):.3g}); choose another model"
        )

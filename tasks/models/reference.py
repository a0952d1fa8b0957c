"""The reference to a model that passes between stages, and the one place that decides on device, dtype and attention."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateSyntaxError
from transformers import AutoConfig
from transformers.utils.import_utils import is_flash_attn_2_available

from configs.errors import BadInput, Damaged
from configs.models import Model
from storage.artifacts import Artifact, local_folder
from storage.caches import open_cache
from storage.lineage import digest_folder, digest_json
from tasks.models.chat import parse_chat_template
from tasks.models.gguf import convert_once
from tasks.running.memory import is_out_of_memory

FLASH = "flash_attention_2"
CACHE = "cache"  # as a teacher's engine: what it said lies in a cache
CONTEXT = ("system", "template", "chat_template", "chat_template_kwargs", "prefix", "stop")  # in keys only where they are set


@dataclass(frozen=True)
class ModelRef:
    """The reference to a model: where it lies, the digest of its content, and how to use it."""

    path: str
    digest: str
    rendering: str = "chat"
    system: str | None = None
    template: str | None = None
    chat_template: str | None = None  # its text
    chat_template_kwargs: str = "{}"  # as JSON
    prefix: str = ""
    stop: tuple[str, ...] = ()
    dtype: str = "auto"
    device: str = "auto"
    attention: str = "sdpa"
    trust_remote_code: bool = False
    engine: str = "transformers"
    urls: tuple[str, ...] = ()
    vllm_python: str = ""
    vllm_memory: float = 0.9
    committed: bool = False  # by a run: its content is held against its digest before it is read
    moves: str = field(default="", compare=False)  # as who its weights change from round to round; empty: they do not

    @property
    def local(self) -> str:
        """Its folder on this machine, or its hub id. A folder on object storage is fetched once per machine.

        Raises Damaged where a run committed it and it is not what it was.
        """
        return local_folder(Artifact(self.path, self.digest)) if self.committed or "://" in self.path else self.path

    @property
    def cached(self) -> bool:
        """Whether it is a cache: neither weights nor a tokenizer, but what a teacher said of texts."""
        return self.engine == CACHE

    @property
    def usage(self) -> "ModelRef":
        """How it is used, without whose weights."""
        return replace(self, path="", digest="", committed=False)

    @property
    def identity(self) -> dict[str, Any]:
        """What can change a result, for keys: not where the model or its engine lies, and not the device.

        The stages that use its engine add the engine's name (`tasks.engines.names.engine_name`).
        """
        always = {"digest": self.digest, "rendering": self.rendering, "dtype": self.dtype, "attention": self.attention}
        unset = {field.name: field.default for field in fields(self) if field.name in CONTEXT}
        return always | {name: value for name in CONTEXT if (value := getattr(self, name)) != unset[name]}


def make_reference(config: Model, path: str) -> ModelRef:
    """The ModelRef for the weights at `path` (a folder, hub id or GGUF file), used as `config` says."""
    path = local_name(path)
    if Path(path).is_dir():
        return refer_as_used(config, path, digest_folder(path))
    return refer_as_used(config, path, digest_json([path, _hub_commit(path, config.trust_remote_code)]))


def refer_to_cache(name: str) -> ModelRef:
    """The reference to a cache (a folder or hub id) in the place of a teacher. Raises BadInput where it is damaged."""
    cache = open_cache(name)
    return ModelRef(str(cache.folder), cache.digest, rendering="plain", engine=CACHE)


def refer_as_used(config: Model, path: str, digest: str, *, committed: bool = False) -> ModelRef:
    """The ModelRef for the weights at `path`, whose digest is known, used as `config` says.

    A checkpoint that a run `committed` has a URI for `path` on object storage.
    """
    use = config.model_dump(include={field.name for field in fields(ModelRef)})
    use["chat_template_kwargs"] = json.dumps(config.chat_template_kwargs, sort_keys=True, default=str)
    use["chat_template"] = config.chat_template and read_template(config.chat_template)
    return ModelRef(path, digest, committed=committed, **use)


def read_template(path: str) -> str:
    """The chat template in a file. Raises BadInput where it cannot be read, or is none."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        parse_chat_template(text)
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"chat_template: {path}: cannot be read ({error}); give a file with a chat template in it") from None
    except TemplateSyntaxError as error:
        raise BadInput(f"chat_template: {path}: line {error.lineno} does not parse ({error.message}); correct it") from None
    return text


def local_name(name: str) -> str:
    """A hub id or folder as it is; for a GGUF file the folder that it is converted to."""
    if not name.endswith(".gguf"):
        return name
    with explain_load_errors(name):
        return convert_once(name)


def _hub_commit(name: str, trust_remote_code: bool) -> str | None:
    with explain_load_errors(name):
        return getattr(AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code), "_commit_hash", None)


@contextmanager
def explain_load_errors(name: str) -> Iterator[None]:
    """Turn the errors with which transformers fails to load `name` into one BadInput."""
    try:
        yield
    except (BadInput, Damaged):
        raise
    except Exception as error:  # what a damaged file makes of a library: SafetensorError, TypeError, ZeroDivisionError, …
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "attn_implementation" in reason or "attention implementation" in reason:
            raise BadInput(
                f"{name}: its family does not have this kind of attention in transformers ({reason[:120]}…); "
                "set attention = 'eager' for this model"
            ) from None
        if "custom code" in reason:
            raise BadInput(
                f"{name}: the model needs code of its own; set trust_remote_code = true for it if you trust that code, "
                "or choose another model"
            ) from None
        if "gated repo" in str(error):
            raise BadInput(
                f"{name}: access to this model is restricted; request it at https://huggingface.co/{name}, then run "
                "`hf auth login` here (or set HF_TOKEN), or choose another model"
            ) from None
        here = Path(name).exists()
        what = "transformers cannot load this model" if here else "no such model, or none that transformers can load"
        raise BadInput(
            f"{name}: {what} ({reason[:300]}); "
            "give a folder with config.json, *.safetensors and tokenizer.json, or a hub id that this machine reaches"
        ) from None


def device_of(ref: ModelRef | Model) -> torch.device:
    """The device that a model is used on; `auto` is an accelerator if there is one, else the CPU."""
    if ref.device != "auto":
        return torch.device(ref.device)
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def accelerator_names(config: Model, processes: int = 1) -> set[str]:
    """Names of the accelerators of this machine that a model's processes use; the same in every process."""
    device = device_of(config)
    indices = range(device.index or 0, (device.index or 0) + processes)
    if device.type == "cuda":  # an index that this machine lacks belongs to a worker of a cluster
        return {f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in indices if i < torch.cuda.device_count()}
    return set() if device.type == "cpu" else {f"{device.type}-{i}-of-{socket.gethostname()}" for i in indices}


def check_machine(role: str, config: Model) -> None:
    """Refuse a device that this machine does not have, or a kind of attention without its package."""
    kind, _, index = config.device.partition(":")
    devices = {"cuda": torch.cuda.device_count(), "xpu": torch.xpu.device_count(), "mps": torch.backends.mps.is_available()}
    if kind in devices and int(index or 0) >= (count := int(devices[kind])):
        raise BadInput(
            f"{role}.device = '{config.device}': this machine has {count} such devices, counted from 0; "
            f"set {role}.device to 'auto' or 'cpu'"
        )
    if config.attention == FLASH and not is_flash_attn_2_available():
        raise BadInput(f"{role}.attention = 'flash_attention_2' needs the flash-attn package and a GPU; set it to 'sdpa'")
    if config.attention == FLASH and role == "student" and (dtype := dtype_of(config)) != torch.bfloat16:
        raise BadInput(
            f"student.attention = 'flash_attention_2' trains in bfloat16 only (found {str(dtype).removeprefix('torch.')}); "
            "set student.dtype = 'bfloat16', or student.attention = 'sdpa'"
        )


def dtype_of(ref: ModelRef | Model) -> torch.dtype:
    """The dtype of a model's weights outside training; `auto` is bfloat16 on a GPU that supports it, else float32."""
    if ref.dtype != "auto":
        dtype: torch.dtype = getattr(torch, ref.dtype)
        return dtype
    device = device_of(ref)
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32

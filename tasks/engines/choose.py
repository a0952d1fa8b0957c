"""Picks the engine that a model's recipe names. One loaded model at a time is held; a server holds nothing here."""

import gc
from functools import lru_cache
from importlib.metadata import version

import torch

from configs.errors import Unavailable
from tasks.engines.base import Engine
from tasks.engines.server import ServerEngine
from tasks.engines.transformers import TransformersEngine
from tasks.engines.vllm import VllmEngine, vllm_version
from tasks.models.reference import ModelRef

_held: dict[ModelRef, TransformersEngine | VllmEngine] = {}
_server = lru_cache(maxsize=8)(ServerEngine)


def engine_name(ref: ModelRef) -> str:
    """The engine with its version, for keys and the `engine` column.

    A server is named without one: its scores stay good when it is upgraded, or gone.
    """
    if ref.engine == "vllm":
        return f"vllm-{vllm_version(ref.vllm_python)}"
    return "server" if ref.engine == "server" else f"transformers-{version('transformers')}"


def get_engine(ref: ModelRef, batch_size: int = 256, batch_tokens: int = 16_384) -> Engine:
    """The engine for a model: the one that is held, or a new one once the memory of the last is given back.

    transformers generates `batch_size` sequences and scores `batch_tokens` tokens, padding included, at once.
    """
    if ref.engine == "server":
        return _server(ref)
    if ref not in _held:
        release()
        _held[ref] = VllmEngine(ref) if ref.engine == "vllm" else TransformersEngine(ref)
    loaded = _held[ref]
    if isinstance(loaded, TransformersEngine):
        loaded.batch_size, loaded.batch_tokens = batch_size, batch_tokens
    return loaded


def release() -> None:
    """Give back the memory of the model that is held, and of what was trained: a vLLM beside this process needs it."""
    loaded = bool(_held)
    while _held:
        _held.popitem()[1].close()
    if loaded or torch.cuda.is_available():  # (half a second in a process with as many modules)
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_engine(ref: ModelRef) -> None:
    """Refuse an engine that is not there, or servers of another model. A server that is down may not be needed: no error."""
    engine_name(ref)
    if ref.engine == "server":
        try:
            _server(ref).check(attempts=1)
        except Unavailable:
            return

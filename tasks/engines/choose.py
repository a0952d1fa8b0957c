"""Choose the engine that a model's recipe names. At most one model is loaded at a time; a server loads nothing here."""

import gc
from functools import lru_cache

import torch

from configs.errors import Unavailable
from tasks.engines.base import Engine
from tasks.engines.names import engine_name
from tasks.engines.server import ServerEngine
from tasks.engines.transformers import TransformersEngine
from tasks.engines.vllm import VllmEngine
from tasks.models.reference import ModelRef

_loaded: dict[ModelRef, TransformersEngine | VllmEngine] = {}
_connect = lru_cache(maxsize=8)(ServerEngine)


def get_engine(ref: ModelRef, batch_size: int = 256, batch_tokens: int = 16_384) -> Engine:
    """The engine for a model: the loaded one, or a new one after the memory of the last is released.

    `transformers` generates `batch_size` sequences at once, and scores `batch_tokens` tokens at once, padding included.
    """
    if ref.engine == "server":
        return _connect(ref)
    if ref not in _loaded:
        release()
        _loaded[ref] = VllmEngine(ref) if ref.engine == "vllm" else TransformersEngine(ref)
    engine = _loaded[ref]
    if isinstance(engine, TransformersEngine):
        engine.batch_size, engine.batch_tokens = batch_size, batch_tokens
    return engine


def release() -> None:
    """Release the memory of the loaded model, and of a model that was trained: a vLLM process beside this one needs it."""
    was_loaded = bool(_loaded)
    while _loaded:
        _loaded.popitem()[1].close()
    if was_loaded or torch.cuda.is_available():  # a collection takes half a second with this many modules
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_engine(ref: ModelRef) -> None:
    """Refuse an engine that is not installed, or a server of another model. A server that is down is accepted: finished work
    may not need it.
    """
    engine_name(ref)
    if ref.engine == "server":
        try:
            _connect(ref).check(attempts=1)
        except Unavailable:
            return

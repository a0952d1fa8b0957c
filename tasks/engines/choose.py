"""Choose the engine that a model's recipe names. What is loaded stays loaded while there is room (pool.py)."""

from dataclasses import replace
from functools import lru_cache

from configs.errors import Unavailable
from tasks.engines.base import Engine
from tasks.engines.names import Use, engine_for, engine_name
from tasks.engines.pool import collect
from tasks.engines.server import ServerEngine
from tasks.engines.transformers import TransformersEngine
from tasks.engines.vllm import VllmEngine
from tasks.models.reference import ModelRef
from tasks.models.weights import architecture_of
from tasks.signals.head import Head

MOST = 8  # models of this process, those of earlier runs included

Local = TransformersEngine | VllmEngine
_engines: dict[ModelRef, Local] = {}  # the one that was not asked for for the longest time first
_places: dict[str, tuple[ModelRef, str]] = {}  # of each model that moves on, where its weights are now, and their shape
_connect = lru_cache(maxsize=8)(ServerEngine)


def get_engine(ref: ModelRef, batch_size: int = 256, batch_tokens: int = 16_384, *, use: Use = "score") -> Engine:
    """The engine for a use of a model: one that has it, one that takes its weights in place, or a new one.

    `transformers` generates `batch_size` sequences at once, and scores `batch_tokens` tokens at once, padding included.
    """
    if ref.engine == "server":
        return _connect(ref)
    if ref.engine == "auto":
        chosen = engine_for(ref, use)
        ref = replace(ref, engine=chosen, moves=ref.moves and f"{ref.moves} in {chosen}")
    engine = _engines.pop(ref, None) or _move(ref) or (VllmEngine(ref) if ref.engine == "vllm" else TransformersEngine(ref))
    _engines[ref] = engine
    if ref.moves and _places.get(ref.moves, (None,))[0] != ref:
        _places[ref.moves] = ref, architecture_of(ref)
    if isinstance(engine, TransformersEngine):
        engine.batch_size, engine.batch_tokens = batch_size, batch_tokens
        engine.load()
    while len(_engines) > MOST:
        _engines.pop(next(iter(_engines))).close()
    return engine


def _move(ref: ModelRef) -> Local | None:
    """The engine of the weights that `ref` follows on, with those of `ref`. None where there is no such engine."""
    if ref.moves not in _places:
        return None
    before, shape = _places[ref.moves]
    if before in [place for name, (place, _) in _places.items() if name != ref.moves]:
        return None  # another one still uses them
    if before.usage != ref.usage or before not in _engines or shape != architecture_of(ref):
        return None
    engine = _engines.pop(before)
    engine.renew(ref)
    return engine


def get_head(ref: ModelRef) -> Head:
    """The head of a model that this machine has."""
    engine = get_engine(ref)
    assert isinstance(engine, Local), "a server's head is not here: the recipe is refused before"
    return engine.head


def release() -> None:
    """Release the memory of all loaded models."""
    if not _engines:  # a collection takes half a second with this many modules
        return
    while _engines:
        _engines.popitem()[1].close()
    _places.clear()
    collect()


def check_engine(ref: ModelRef) -> None:
    """Refuse an engine that is not installed, or a server of another model. A server that is down is accepted: finished work
    may not need it.
    """
    engine_name(ref, "sample")
    if ref.engine == "server":
        try:
            _connect(ref).check(attempts=1)
        except Unavailable:
            return

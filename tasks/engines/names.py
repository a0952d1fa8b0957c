"""Engines by name and version, for keys and the `engine` column, found without loading one."""

import subprocess
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Literal, Protocol

from configs.errors import BadInput

CHILD = Path(__file__).with_name("vllm_child.py")


Use = Literal["sample", "score"]


class UsesEngine(Protocol):
    """A model of a recipe, or the reference to one."""

    @property
    def engine(self) -> str: ...

    @property
    def device(self) -> str: ...

    @property
    def vllm_python(self) -> str: ...


def engine_for(model: UsesEngine, use: Use) -> str:
    """The engine that a recipe names, or for `auto` what the figures of one GPU say (README.md of this folder).

    There vLLM samples, where it is installed, and transformers scores; elsewhere transformers does both.
    """
    if model.engine != "auto":
        return model.engine
    if use == "score" or not Path(model.vllm_python).exists():
        return "transformers"
    import torch  # (a complete run is told without it)

    on_gpu = model.device.startswith("cuda") or (model.device == "auto" and torch.cuda.is_available())
    return "vllm" if on_gpu else "transformers"


def engine_name(model: UsesEngine, use: Use) -> str:
    """The engine for a use, with its version.

    A server has no version here: its scores stay valid when it is upgraded or stopped.
    """
    engine = engine_for(model, use)
    if engine == "vllm":
        return f"vllm-{vllm_version(model.vllm_python)}"
    return engine if engine in ("server", "cache") else f"transformers-{version('transformers')}"


@lru_cache(maxsize=4)
def vllm_version(python: str) -> str:
    """The version of vLLM that this interpreter has."""
    try:
        process = subprocess.run([python, "-I", CHILD, "version"], capture_output=True, text=True, timeout=120, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        words = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise BadInput(
            f"vllm_python: {python} is not a Python with vLLM ({words[-1] if words else error}); run `make vllm`, "
            "or give the path of a Python that has it"
        ) from None
    return process.stdout.strip()

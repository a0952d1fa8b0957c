"""Engines by name and version, for keys and the `engine` column, found without loading one."""

import subprocess
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from configs.errors import BadInput

CHILD = Path(__file__).with_name("vllm_child.py")


class UsesEngine(Protocol):
    """A model of a recipe, or the reference to one."""

    @property
    def engine(self) -> str: ...

    @property
    def vllm_python(self) -> str: ...


def engine_name(model: UsesEngine) -> str:
    """The engine with its version.

    A server has no version here: its scores stay valid when it is upgraded or stopped.
    """
    if model.engine == "vllm":
        return f"vllm-{vllm_version(model.vllm_python)}"
    return "server" if model.engine == "server" else f"transformers-{version('transformers')}"


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

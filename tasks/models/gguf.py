"""GGUF files as ordinary model folders: dequantised once, and kept in Hugging Face's cache of assets."""

import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import cached_assets_path
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from configs.errors import BadInput
from storage.filesystems import move_into_place
from storage.lineage import digest_file
from tasks.running.progress import logger


def convert_once(path: str) -> str:
    """The folder with the float32 weights and the tokenizer of a GGUF file, made where this machine has none yet.

    Raises BadInput without the file or the `gguf` package, and what transformers raises for a model it cannot read.
    """
    file = Path(path)
    if not file.is_file():
        raise BadInput(f"{path}: no such file; give a .gguf file, a model's folder or a hub id")
    if find_spec("gguf") is None:
        raise BadInput(f"{path}: a GGUF file needs one more package: pip install -e '.[gguf]'")
    folder = cached_assets_path("potstill", "gguf", digest_file(file)) / "model"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=folder.parent) as half_made:
            convert(file, Path(half_made) / "model")
            move_into_place(Path(half_made) / "model", folder)
        logger.info("%s: made into a folder once, %s", path, folder)
    return str(folder)


def convert(file: Path, folder: Path) -> None:
    """Write a GGUF file's model, dequantised to float32, and its tokenizer."""
    whole = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=whole
    )
    model.save_pretrained(folder)
    # It would write down whether the Hub was looked at, and the folder's digest would tell machines apart.
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True).save_pretrained(folder)

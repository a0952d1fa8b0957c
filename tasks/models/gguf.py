"""GGUF files as model folders: dequantised once, and kept in Hugging Face's cache of assets."""

import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from configs.errors import BadInput
from storage.filesystems import move_into_place
from tasks.models.files import converted_folder
from tasks.running.progress import logger


def convert_once(path: str) -> str:
    """The folder with the float32 weights and the tokenizer of a GGUF file, made if this machine has none yet.

    Raises BadInput without the file or the `gguf` package, and the errors of transformers for a model that it cannot read.
    """
    file = Path(path)
    if not file.is_file():
        raise BadInput(f"{path}: no such file; give a .gguf file, a model's folder or a hub id")
    if find_spec("gguf") is None:
        raise BadInput(f"{path}: a GGUF file needs one more package: pip install -e '.[gguf]'")
    folder = converted_folder(file)
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
            convert(file, Path(unfinished) / "model")
            move_into_place(Path(unfinished) / "model", folder)
        logger.info("%s: converted to the folder %s", path, folder)
    return str(folder)


def convert(file: Path, folder: Path) -> None:
    """Write a GGUF file's model, dequantised to float32, and its tokenizer."""
    dequantised = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=dequantised
    )
    model.save_pretrained(folder)
    # Without `local_files_only` the tokenizer would store whether the Hub was asked, and digests would differ by machine.
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True).save_pretrained(folder)

"""The files that a model is read from, found without a model library."""

from pathlib import Path

from huggingface_hub import cached_assets_path

from configs.models import STUDENT, Model
from storage.caches import list_files
from storage.lineage import digest_file, files_below


def converted_folder(file: Path) -> Path:
    """Where a GGUF file's model lies once it is converted. The file is read, unless its digest is known."""
    return cached_assets_path("potstill", "gguf", digest_file(file)) / "model"


def find_model_files(config: Model) -> list[Path]:
    """The local files of a model that is no other recipe's: weights, tokenizer, chat template. None of a hub's model.

    Of a cache its own files.
    """
    if config.cache is not None:
        return list_files(config.cache)
    name = None if config.model == STUDENT else config.model  # whose files are its own, whatever folder has this name
    place = Path(name or "")
    files = [Path(config.chat_template)] if config.chat_template else []
    if place.suffix == ".gguf" and place.is_file():
        return [*files, place, *files_below(converted_folder(place))]
    return [*files, *(files_below(place) if name else [])]


def find_hub_commit(name: str, file: str = "config.json", kind: str = "model") -> str | None:
    """The commit of a hub's model (or data set) that this machine has fetched last, by a `file` of it; None for none."""
    from huggingface_hub import try_to_load_from_cache  # 0.2 s that a model in a folder does not need

    try:
        found = try_to_load_from_cache(name, file, repo_type=kind)
    except ValueError:  # not a hub id
        return None
    return Path(found).parent.name if isinstance(found, str) else None

"""Digests and keys: what a result is, and what it was made from."""

import hashlib
import json
import os
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

CHUNK = 1 << 20


def digest_json(value: Any) -> str:
    """sha256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digest_table(table: pa.Table) -> str:
    """sha256 of a table's columns and values, whatever its chunks."""
    whole, sink = table.replace_schema_metadata(None).combine_chunks(), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, whole.schema) as writer:
        writer.write_table(whole)
    return hashlib.sha256(sink.getvalue()).hexdigest()


def digest_file(path: str | Path) -> str:
    """sha256 of a local file's content."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            sha.update(chunk)
    return sha.hexdigest()


def digest_folder(path: str | Path) -> str:
    """One digest for the names and contents of a local folder's files."""
    root = Path(path)
    files = sorted(file for file in root.rglob("*") if file.is_file())
    stamp = tuple((str(f.relative_to(root)), f.stat().st_size, f.stat().st_mtime_ns) for f in files)
    return _digest_folder(os.fspath(root), stamp)


@lru_cache(maxsize=256)
def _digest_folder(root: str, stamp: tuple[tuple[str, int, int], ...]) -> str:
    """Gigabytes of weights are read once a process, and again only when a size or time changed."""
    return digest_json({name: digest_file(Path(root) / name) for name, _, _ in stamp})


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Versions of the packages that results depend on, for manifests."""
    return {name: version(name) for name in ("torch", "transformers", "tokenizers", "pyarrow", "accelerate", "prefect")}

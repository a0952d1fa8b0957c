"""Digests of results and of their inputs: what artifacts are named and keyed by."""

import hashlib
import json
import os
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

CHUNK = 1 << 20


def digest_json(value: Any) -> str:
    """sha256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digest_table(table: pa.Table) -> str:
    """sha256 of a table's columns and values, independent of its chunks."""
    whole, sink = table.replace_schema_metadata(None).combine_chunks(), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, whole.schema) as writer:
        writer.write_table(whole)
    return hashlib.sha256(sink.getvalue()).hexdigest()


def digest_file(path: str | Path) -> str:
    """sha256 of a local file's content."""
    return _digest_file(os.fspath(path), _stamp_of(Path(path)))


def digest_folder(path: str | Path) -> str:
    """One digest for the names and contents of a local folder's files."""
    root = Path(path)
    return digest_json({str(f.relative_to(root)): digest_file(f) for f in sorted(root.rglob("*")) if f.is_file()})


def digest_local(path: str | Path) -> str:
    """The digest of a local file or folder, whichever it is."""
    return digest_folder(path) if os.path.isdir(path) else digest_file(path)


def _stamp_of(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=16_384)
def _digest_file(path: str, stamp: tuple[int, int, int]) -> str:
    """Cached per process: gigabytes are read again only when a file's size or time has changed."""
    with open(path, "rb") as file:
        return digest_stream(file)


def digest_stream(file: IO[bytes]) -> str:
    """sha256 of an open file, from its current position on."""
    sha = hashlib.sha256()
    while chunk := file.read(CHUNK):
        sha.update(chunk)
    return sha.hexdigest()


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Versions of the packages that results depend on, for manifests."""
    return {name: version(name) for name in ("torch", "transformers", "tokenizers", "pyarrow", "accelerate", "prefect")}

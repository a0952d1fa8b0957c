"""Digests of results and of their inputs: what artifacts are named and keyed by."""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from configs.errors import BadInput

CHUNK = 1 << 20
CHECKOUT = Path(__file__).parents[1]
PACKAGES = ("configs", "storage", "tasks", "flows")


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
    """sha256 of a local file's content. It is read again only when the file's size, time or inode has changed."""
    return _digest_file(os.fspath(path), stamp_of(path))[0]


def digest_folder(path: str | Path) -> str:
    """One digest for the names and contents of a local folder's files."""
    root = Path(path)
    return digest_json({str(f.relative_to(root)): digest_file(f) for f in files_below(root)})


def digest_local(path: str | Path) -> str:
    """The digest of a local file or folder, whichever it is."""
    return digest_folder(path) if os.path.isdir(path) else digest_file(path)


def files_below(folder: Path) -> list[Path]:
    """All files of a local folder, at any depth, in order."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


# -- what is known without reading ---------------------------------------------------------------------------------------

Stamp = tuple[int, int, int, int]  # of a file: inode, bytes, times of change of its content and of its entry, in ns
TICK = 2_000_000_000  # ns: the coarsest clock of a filesystem

_known: dict[tuple[str, Stamp], str] = {}


def stamp_of(path: str | Path) -> Stamp:
    """What changes when a file is written or replaced. A copy may set the first time as it was, nobody sets the second."""
    stat = os.stat(path)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def know_digest(path: str, stamp: Stamp, digest: str) -> None:
    """Trust `digest` for a file as long as it has this `stamp`: an earlier process has read it."""
    _known[path, stamp] = digest


def read_once(path: str | Path) -> tuple[Stamp, str] | None:
    """The stamp and digest of a file, for another process to know; None where it was written while it was read, or just before.

    Two changes within one tick of a filesystem's clock leave the same stamp.
    """
    stamp = stamp_of(path)
    digest, read_at = _digest_file(os.fspath(path), stamp)
    return (stamp, digest) if max(stamp[2:]) + TICK < read_at else None


@lru_cache(maxsize=16_384)
def _digest_file(path: str, stamp: Stamp) -> tuple[str, int]:
    """The digest of a file and when it was read, in ns. Cached per process."""
    read_at = time.time_ns()
    if (path, stamp) in _known:
        return _known[path, stamp], read_at
    with open(path, "rb") as file:
        return digest_stream(file), read_at


def digest_stream(file: IO[bytes]) -> str:
    """sha256 of an open file, from its current position on."""
    sha = hashlib.sha256()
    while chunk := file.read(CHUNK):
        sha.update(chunk)
    return sha.hexdigest()


# -- what must not change ------------------------------------------------------------------------------------------------

_watched: dict[str, str] = {}


@contextmanager
def watching() -> Iterator[None]:
    """Forget at the end what `watch` is told inside."""
    before = dict(_watched)
    try:
        yield
    finally:
        _watched.clear()
        _watched.update(before)


def watch(folder: str, digest: str) -> None:
    """Let nothing that this process makes be committed once a local folder's content is not of this digest any more.

    A model is read more than once: what others write into it meanwhile would go by the name of what it was.
    """
    _watched[folder] = digest


def check_watched() -> None:
    """Raise BadInput where a watched folder has changed. Files are read where their size, time or inode is another one."""
    for folder, digest in _watched.items():
        try:
            holds = digest_folder(folder) == digest
        except OSError:  # it is being replaced
            holds = False
        if not holds:
            raise BadInput(
                f"{folder}: its files have changed while the run used them; what was made since is not committed. Put "
                "them back and give the same command again, or give this recipe another name (--set name=…)"
            )


@lru_cache(maxsize=1)
def digest_code() -> str:
    """One digest for the source of this checkout, so that what it has found is not trusted by another version."""
    sources = {str(f.relative_to(CHECKOUT)): f.read_bytes() for p in PACKAGES for f in sorted((CHECKOUT / p).rglob("*.py"))}
    return digest_json({name: hashlib.sha256(data).hexdigest() for name, data in sources.items()})


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Versions of the packages that results depend on, for manifests."""
    return {name: version(name) for name in ("torch", "transformers", "tokenizers", "pyarrow", "accelerate", "prefect")}

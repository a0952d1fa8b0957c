"""Committed files and folders: the reference to one of them, and how it is written and read."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from configs.errors import Damaged
from storage.damage import check_content
from storage.filesystems import filesystem, move_into_place


@dataclass(frozen=True)
class Artifact:
    """The reference to a committed file or folder that passes between tasks."""

    path: str
    digest: str
    rows: int = 0


def write_parquet(table: pa.Table, target: Path | pa.NativeFile) -> None:
    """Write zstd Parquet with settings that fit token tables: numbers split by byte, strings by dictionary."""
    numbers = [
        field.name + (".list.element" if nested else "")
        for field in table.schema
        if (nested := pa.types.is_list(field.type) or pa.types.is_large_list(field.type)) or pa.types.is_floating(field.type)
        if pa.types.is_primitive(field.type.value_type if nested else field.type)
    ]
    plain = {name.split(".")[0] for name in numbers}
    pq.write_table(
        table,
        target,
        compression="zstd",
        use_dictionary=[f.name for f in table.schema if f.name not in plain and not pa.types.is_nested(f.type)],
        column_encoding=dict.fromkeys(numbers, "BYTE_STREAM_SPLIT"),
    )


def measure_parquet(table: pa.Table) -> int:
    """The bytes that a table takes on disk. Nothing is written."""
    sink = pa.BufferOutputStream()
    write_parquet(table, sink)
    size: int = sink.getvalue().size
    return size


def read_table(artifact: Artifact, columns: list[str] | None = None) -> pa.Table:
    """Read a committed table, or the `columns` of it, into memory: one shard. Raises Damaged where it is not what it was."""
    fs, path = filesystem(artifact.path)
    if isinstance(fs, LocalFileSystem) and artifact.digest:
        check_content(path, artifact.digest)
    try:
        with fs.open(path, "rb") as file:
            return pq.read_table(file, columns=columns)
    except FileNotFoundError:
        raise Damaged(path) from None


def local_folder(artifact: Artifact) -> str:
    """The local path of a committed folder. It is fetched once where the run lies on a remote filesystem.

    Raises Damaged where it is not what it was.
    """
    fs, path = filesystem(artifact.path)
    if isinstance(fs, LocalFileSystem):
        check_content(path, artifact.digest)
        return path
    target = Path(tempfile.gettempdir()) / f"potstill-{os.getuid()}" / artifact.digest
    if not target.exists():
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            try:
                fs.get(path, f"{folder}/fetched", recursive=True)
            except FileNotFoundError:
                raise Damaged(path) from None
            move_into_place(Path(folder) / "fetched", target)
    return str(target)

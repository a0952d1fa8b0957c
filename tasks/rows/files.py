"""Files of rows: JSON, JSON lines, CSV and Parquet, compressed or not, one by one, in folders or by a pattern."""

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from configs.errors import BadInput

BROKEN = (OSError, EOFError, ValueError, RecursionError, csv.Error, lzma.LZMAError, zlib.error, pl.exceptions.PolarsError)

Rows = Iterable[tuple[int, Any]]  # each with its number: a line of JSON lines, otherwise a row, counted from 1


def find_files(pattern: str, field: str) -> list[Path]:
    """The files that a path, a folder or a pattern names, in order. Raises BadInput where there are none.

    Of a folder all files of one kind, at any depth: the first of `IN_FOLDERS` that it has.
    """
    path = Path(pattern)
    if path.is_file():
        return [path]
    if path.is_dir():
        inside = [p for p in sorted(path.rglob("*")) if p.is_file() and not is_hidden(p.relative_to(path))]
        kinds = ([p for p in inside if _ending(p) == ending] for ending in IN_FOLDERS)
        if found := next(filter(None, kinds), None):
            return found
        raise BadInput(f"{field}: {pattern}: a folder without {', '.join(IN_FOLDERS)} files; give a file or a pattern")
    if has_magic(pattern):
        if found := [p for p in map(Path, sorted(glob(pattern, recursive=True))) if p.is_file()]:
            return found
        raise BadInput(f"{field}: {pattern}: matches no file; give a pattern that does, such as data/*.parquet")
    raise BadInput(f"{field}: {pattern}: no such file; give a {ENDINGS} file, a folder of them or a pattern")


def is_hidden(path: Path) -> bool:
    """Whether a file, or a folder it lies in, is set aside by its name, as `_SUCCESS` and `.cache` are."""
    return any(part.startswith((".", "_")) for part in path.parts)


def read_file(path: Path, field: str = "prompts.path") -> list[tuple[int, Any]]:
    """The rows of a file, numbered; BadInput says what is wrong with it, and which `field` named it."""
    ending = _ending(path)
    if ending not in READERS:
        raise BadInput(f"{field}: {path}: not a {ENDINGS} file, nor one of these compressed")
    try:
        return list(READERS[ending](path))
    except FileNotFoundError:
        raise BadInput(f"{field}: {path}: no such file; give a {ENDINGS} file") from None
    except (
        OSError,
        EOFError,
        ValueError,
        csv.Error,
        lzma.LZMAError,
        zlib.error,
        pl.exceptions.PolarsError,
        RecursionError,
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadInput(f"{field}: {path}: cannot be read as {ending[1:]}: {reason}") from None


def _ending(path: Path) -> str:
    """`.jsonl` of `a.jsonl` and of `a.jsonl.gz`."""
    name = path.with_suffix("") if path.suffix in UNPACK else path
    return "" if path.suffix in UNPACK and name.suffix == ".parquet" else name.suffix


def _read_parquet(path: Path) -> Rows:
    frame = pl.read_parquet(path, glob=False)
    short = [name for name, kind in frame.schema.items() if kind == pl.Float32]
    frame = frame.with_columns(pl.col(short).cast(pl.String).cast(pl.Float64))  # 0.1, not 0.10000000149
    nested = [name for name, kind in frame.schema.items() if kind.is_nested()]
    for number, row in enumerate(frame.iter_rows(named=True), 1):
        yield number, row | {name: _without_nulls(row[name]) for name in nested}


def _without_nulls(value: Any) -> Any:
    """Parquet has every field in every object: one that is null was not there."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _read_lines(path: Path) -> Rows:
    return _parse_lines(_read_text(path))


def _parse_lines(text: str) -> Rows:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None


def _read_json(path: Path) -> Rows:
    """A list of objects, or JSON lines under the shorter name."""
    text = _read_text(path)
    return enumerate(json.loads(text), 1) if text.lstrip().startswith("[") else _parse_lines(text)


def _read_csv(path: Path) -> Rows:
    """Each cell is a text; an empty one is null."""
    csv.field_size_limit(2**31 - 1)
    lines = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    header = next(lines, [])
    if len(set(header)) < len(header):
        raise ValueError(f"two columns have one name: {', '.join(header)}")
    return _parse_cells(lines, header)


def _parse_cells(lines: Iterator[list[str]], header: list[str]) -> Rows:
    number = 0
    try:
        for number, cells in enumerate(filter(None, lines), 1):
            if len(cells) != len(header):
                raise ValueError(f"row {number} has {len(cells)} cells, the header {len(header)}: {', '.join(header)}")
            yield number, {name: cell or None for name, cell in zip(header, cells)}
    except csv.Error as error:
        raise ValueError(f"row {number + 1}: {error}") from None


def _read_text(path: Path) -> str:
    """The text of a file in UTF-8, unpacked, without a byte order mark."""
    return UNPACK.get(path.suffix, bytes)(path.read_bytes()).decode("utf-8-sig")


def _unpack_frames(codec: str) -> Callable[[bytes], bytes]:
    return lambda data: pa.CompressedInputStream(pa.BufferReader(data), codec).read()


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
UNPACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
    ".zst": _unpack_frames("zstd"),
    ".lz4": _unpack_frames("lz4"),
}
IN_FOLDERS = (".parquet", ".jsonl", ".csv")  # a .json beside the data says something about it
ENDINGS = ".jsonl, .json, .csv or .parquet"

"""A cache on disk: what a teacher said of texts, as a data set that stands in the place of the teacher.

`cache.json` holds what it is and the digest of each file; its own digest is the cache's identity. Nothing is read of a file
that is not what `cache.json` says.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from configs.errors import BadInput
from storage.folder import Folder
from storage.lineage import digest_file, digest_json
from storage.schemas import CACHED_TEXTS, CACHED_VOCAB, PROMPTS

FORMAT = 1
TOLD, CARD = "cache.json", "README.md"
PROMPTS_FILE, VOCAB_FILE = "prompts.parquet", "vocab.parquet"
NAMES = re.compile(rf"{PROMPTS_FILE}|{VOCAB_FILE}|texts/part-\d{{5,}}\.parquet")  # a stranger's cache names no other file
AGAIN = "fetch the cache again, or export it anew"


@dataclass(frozen=True)
class Cache:
    """A cache on this machine, whose files are what its `cache.json` says."""

    folder: Path
    digest: str
    told: dict[str, Any]

    @property
    def parts(self) -> list[str]:
        """The files of texts, in order."""
        return sorted(name for name in self.told["files"] if name.startswith("texts/"))

    def vocab(self) -> pa.Table:
        """The teacher's vocabulary: `token_id`, `bytes` and `role` of each id, in order."""
        return self._read(VOCAB_FILE, CACHED_VOCAB)

    def prompts(self) -> pa.Table:
        """The prompts that have a text, as the run's table had them, without `split`."""
        return self._read(PROMPTS_FILE, pa.schema([field for field in PROMPTS if field.name != "split"]))

    def prompt_ids(self) -> set[str]:
        """The ids of the prompts that have a text."""
        return set(self._read(PROMPTS_FILE, pa.schema([PROMPTS.field("prompt_id")]))["prompt_id"].to_pylist())

    def texts(self, prompt_ids: Collection[str], columns: list[str] | None = None) -> pa.Table:
        """The texts of some prompts, in the order of the files; one file is in memory at a time."""
        wanted, schema = pa.array(sorted(prompt_ids), pa.string()), CACHED_TEXTS
        if columns is not None:
            schema = pa.schema([CACHED_TEXTS.field(name) for name in columns])
        parts = (self._read(name, schema) for name in self.parts)
        found = [part.filter(pc.is_in(part["prompt_id"], wanted)) for part in parts]
        return pa.concat_tables(found).combine_chunks() if found else schema.empty_table()

    def _read(self, name: str, schema: pa.Schema) -> pa.Table:
        """A file's columns of `schema`; of prompts all of them."""
        try:
            table = pq.read_table(self.folder / name, columns=None if name == PROMPTS_FILE else schema.names)
        except (pa.ArrowException, OSError) as error:
            raise BadInput(f"{self.folder / name}: cannot be read ({str(error).splitlines()[0]}); {AGAIN}") from None
        for field in schema:
            if field.name not in table.column_names:
                raise BadInput(f"{self.folder / name}: it has no column `{field.name}`; {AGAIN}")
            if not pa.types.is_list(field.type) and not table.schema.field(field.name).type.equals(field.type):
                raise BadInput(f"{self.folder / name}: its column `{field.name}` is not {field.type}; {AGAIN}")
        return table


def open_cache(name: str) -> Cache:
    """The cache in a folder, or with a hub id, once all of it is what its `cache.json` says. Raises BadInput."""
    folder = find_cache(name)
    told = _read_told(folder)
    for file, digest in told["files"].items():
        path = folder / file
        if not path.is_file():
            raise BadInput(f"{path}: missing; {AGAIN}")
        if digest_file(path) != digest:
            raise BadInput(f"{path}: its content was altered: it is not what {TOLD} says; {AGAIN}")
    return Cache(folder, digest_json(told), told)


def list_files(name: str) -> list[Path]:
    """The files of a cache in a folder; none of one that is only on the hub."""
    folder = Path(name)
    return [folder / TOLD, *(folder / file for file in _read_told(folder)["files"])] if folder.is_dir() else []


def find_cache(name: str) -> Path:
    """The folder of a cache on this machine; a hub's is fetched."""
    return Path(name) if Path(name).is_dir() else _fetch(name)


@lru_cache(maxsize=8)
def _fetch(name: str) -> Path:
    """The snapshot of a hub's data set, fetched once a process."""
    from huggingface_hub import snapshot_download  # 0.2 s that a cache in a folder does not need

    try:
        return Path(snapshot_download(name, repo_type="dataset"))
    except Exception as error:  # its client's errors share no base
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadInput(
            f"{name}: no cache in a folder of this name, nor a data set of the hub that this machine reaches ({reason}); "
            "give a folder that `potstill cache export` wrote, or the hub id of one"
        ) from None


def _read_told(folder: Path) -> dict[str, Any]:
    file = folder / TOLD
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        version, files, _ = told["format"], told["files"], told["teacher"]["digest"]
    except FileNotFoundError:
        raise BadInput(
            f"{folder}: not a cache (no {TOLD} in it); give a folder that `potstill cache export` wrote, or the hub id of one"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BadInput(f"{file}: not the description of a cache ({type(error).__name__}: {error}); {AGAIN}") from None
    if version != FORMAT:
        raise BadInput(f"{file}: a cache of format {version!r}, and this version of potstill reads {FORMAT}; export it anew")
    if not isinstance(files, dict) or not {PROMPTS_FILE, VOCAB_FILE} <= files.keys():
        raise BadInput(f"{file}: it does not name {PROMPTS_FILE} and {VOCAB_FILE}; {AGAIN}")
    if strange := [name for name in files if not NAMES.fullmatch(name)]:
        raise BadInput(f"{file}: it names {strange[0]!r:.80}, which is no file of a cache; {AGAIN}")
    whole: dict[str, Any] = told
    return whole


# -- writing -------------------------------------------------------------------------------------------------------------


class CacheWriter:
    """A cache that is being written, in a folder beside its own; `finish` moves it into place."""

    def __init__(self, folder: Path):
        self.folder, self.parts, self.texts_bytes = folder, 0, 0
        (folder / "texts").mkdir()

    def add_texts(self, table: pa.Table) -> None:
        """Write a file of texts."""
        file = self.folder / "texts" / f"part-{self.parts:05d}.parquet"
        write_compact(table.select(CACHED_TEXTS.names).cast(CACHED_TEXTS), file)
        self.parts, self.texts_bytes = self.parts + 1, self.texts_bytes + file.stat().st_size

    def finish(self, prompts: pa.Table, vocab: pa.Table, told: dict[str, Any], card: str) -> None:
        """Write everything else, `cache.json` last."""
        write_compact(prompts, self.folder / PROMPTS_FILE)
        write_compact(vocab.select(CACHED_VOCAB.names), self.folder / VOCAB_FILE)
        (self.folder / CARD).write_text(card, encoding="utf-8")
        names = [PROMPTS_FILE, VOCAB_FILE, *(f"texts/part-{number:05d}.parquet" for number in range(self.parts))]
        files = {name: digest_file(self.folder / name) for name in names}
        (self.folder / TOLD).write_text(json.dumps({"format": FORMAT, **told, "files": files}, indent=1), encoding="utf-8")


def write_compact(table: pa.Table, file: Path) -> None:
    """Write Parquet in the smallest form: brotli, numbers split by byte. It takes a minute for a hundred megabytes."""
    lists = [f.name for f in table.schema if pa.types.is_list(f.type) and pa.types.is_primitive(f.type.value_type)]
    pq.write_table(
        table,
        file,
        compression="brotli",
        compression_level=11,
        use_dictionary=[name for name in ("source", "finish_reason", "role") if name in table.column_names],
        column_encoding={f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in lists},
    )


def check_target(out: str) -> None:
    """Refuse a place that a cache cannot be written to."""
    target = Path(out)
    if "://" in out:
        raise BadInput(f"{out}: an address; give a new folder on this machine")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BadInput(f"{out}: exists and is not empty; give a new folder")


@contextmanager
def writing_cache(out: str) -> Iterator[CacheWriter]:
    """A new cache in the folder `out`, which appears whole, or not at all."""
    check_target(out)
    target = Path(out)
    with Folder(os.fspath(target.parent), target.name).writing():
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            yield CacheWriter(folder)
            folder.chmod(0o755)
            if target.exists():
                target.rmdir()
            folder.rename(target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

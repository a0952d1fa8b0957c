"""A run's folder: where things lie, and how they are committed.

Everything a stage makes goes through `Run.build_table` and `Run.build_files`: what was made from the same inputs, here
or in another run under the same root, is not made again. A file is written under `_tmp/`, closed, fsynced and renamed
into place, and its manifest last; so a data folder holds finished Parquet only, and a reader who goes by manifests sees
whole artifacts only.
"""

import json
import os
import posixpath
import shutil
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from configs.errors import BadInput
from configs.load import differences, dumps, validate
from configs.schema import Recipe
from storage.filesystems import filesystem, fsync_folder, link, settle, unreachable, unwritable
from storage.lineage import digest_file, digest_folder, digest_json, versions


@dataclass(frozen=True)
class Artifact:
    """A committed file or folder: the small reference that passes between tasks."""

    path: str
    digest: str
    rows: int = 0


def round_slot(number: int, *parts: str) -> str:
    """`round=0003/rollouts/part-00000` and the like."""
    return posixpath.join(f"round={number:04d}", *parts)


def part(number: int) -> str:
    return f"part-{number:05d}"


class Run:
    """One run's folder under a root, on any fsspec filesystem.

    A *slot* is where an artifact lives, relative to the run and without its ending:
    `round=0001/scores/part-00000` is that file with `.parquet`, and `_manifests/….json` beside it.
    """

    def __init__(self, root: str, name: str):
        try:
            self.fs, base = filesystem(root)
        except ImportError as error:
            raise BadInput(f"root: {root} cannot be used: {error}; for s3:// that is: pip install -e '.[s3]'") from None
        except ValueError as error:
            raise BadInput(f"root: {root} cannot be used: {error}; give a folder, or a URI such as s3://bucket/runs") from None
        self.uri, self.root, self.name = root, base.rstrip("/"), name
        self.path = posixpath.join(self.root, name)
        self.local = isinstance(self.fs, LocalFileSystem)
        self.address = self._address(self.path)

    # -- what is there --------------------------------------------------------------------------------------------

    def find(self, slot: str, key: str | None = None) -> Artifact | None:
        """The artifact committed at `slot`, if it is there and (when given) was made under `key`."""
        manifest = self.manifest(slot)
        if manifest is None or (key is not None and manifest["key"] != key):
            return None
        path = posixpath.join(self.path, manifest["path"])
        if not self.fs.exists(path):
            return None
        return Artifact(self._address(path), manifest["digest"], manifest["rows"])

    def manifest(self, slot: str) -> dict[str, Any] | None:
        try:
            return json.loads(self.fs.cat_file(self._manifest_path(slot)))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def manifests(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every committed slot of the run with its manifest, in order of the slots."""
        folder = posixpath.join(self.path, "_manifests")
        for path in sorted(self.fs.find(folder)) if self.fs.exists(folder) else []:
            yield posixpath.relpath(path, folder).removesuffix(".json"), json.loads(self.fs.cat_file(path))

    def rounds_done(self) -> int:
        """How many rounds are complete: a round is, when the student it trained has been evaluated."""
        number = 0
        while self.find(round_slot(number + 1, "evals", "student")) is not None:
            number += 1
        return number

    # -- making things --------------------------------------------------------------------------------------------

    def build_table(
        self, slot: str, inputs: dict[str, Any], make: Callable[[], pa.Table], log: Callable[[str], None] = print
    ) -> Artifact:
        """The table that `make` gives for `inputs`, committed at `slot`; taken over where the same was made before.

        `inputs` is JSON and names everything that can change the result (digests, options, versions of code).
        """

        def write(folder: Path) -> dict[str, int]:
            table = make()
            write_parquet(table, folder / "table.parquet")
            return {"table.parquet": table.num_rows}

        return self.build_files({"table.parquet": slot}, inputs, write, log)["table.parquet"]

    def build_files(
        self,
        slots: dict[str, str],
        inputs: dict[str, Any],
        make: Callable[[Path], dict[str, int]],
        log: Callable[[str], None] = print,
    ) -> dict[str, Artifact]:
        """As `build_table`, for what one piece of work makes at once.

        `make` gets an empty local folder, writes the files and folders named by `slots`, and returns the rows in each.
        """
        key = digest_json(inputs)
        found = {name: self.find(slot, key) or self._take_over(slot, key, log) for name, slot in slots.items()}
        complete = {name: artifact for name, artifact in found.items() if artifact is not None}
        if len(complete) == len(slots):
            return complete
        started = time.monotonic()
        with self._workspace() as folder:
            rows = make(folder)
            seconds = round(time.monotonic() - started, 3)
            for name, slot in slots.items():
                made = folder / name
                digest = digest_folder(made) if made.is_dir() else digest_file(made)
                place = slot + made.suffix * made.is_file()
                if self.manifest(slot) is not None:
                    self.fs.rm_file(self._manifest_path(slot))  # it does not speak of what comes
                self._commit(made, place)
                manifest = {"key": key, "path": place, "digest": digest, "rows": rows[name], "seconds": seconds}
                self._write_manifest(slot, {**manifest, "inputs": inputs, "versions": versions()})
        log(f"{', '.join(slots.values())}: {max(rows.values())} rows, {seconds:.1f} s")
        return {name: artifact for name, slot in slots.items() if (artifact := self.find(slot, key))}

    def _take_over(self, slot: str, key: str, log: Callable[[str], None]) -> Artifact | None:
        """Link (or copy) what another run under this root committed at the same slot under the same key."""
        entries = self.fs.ls(self.root, detail=True) if self.fs.exists(self.root) else []
        for path in sorted(entry["name"] for entry in entries if entry["type"] == "directory"):
            other = Run(self.uri, posixpath.basename(path))
            if other.name == self.name or (found := other.find(slot, key)) is None:
                continue
            manifest = other.manifest(slot)
            assert manifest is not None
            source = posixpath.join(other.path, manifest["path"])
            with self._workspace() as folder:
                copy = folder / "copy"
                if not self.local:
                    self.fs.get(source, str(copy), recursive=self.fs.isdir(source))
                elif os.path.isdir(source):
                    shutil.copytree(source, copy, copy_function=link)
                else:
                    link(source, copy)
                self._commit(copy, manifest["path"])
            self._write_manifest(slot, {**manifest, "taken_from": other.name})
            log(f"{slot}: {found.rows} rows, taken over from {other.name}")
            return self.find(slot, key)
        return None

    @contextmanager
    def _workspace(self) -> Iterator[Path]:
        """A folder for half-made things: on the run's own disk where it has one, so that a rename is atomic."""
        parent = None
        if self.local:
            parent = Path(self.path) / "_tmp"
            parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if parent is not None and not any(parent.iterdir()):
                parent.rmdir()

    def _commit(self, made: Path, place: str) -> None:
        target = posixpath.join(self.path, place)
        if self.local:
            for file in [made] if made.is_file() else sorted(f for f in made.rglob("*") if f.is_file()):
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            if os.path.isdir(target):
                os.rename(target, tempfile.mkdtemp(dir=made.parent))  # goes with the workspace
            os.replace(made, target)
            fsync_folder(Path(target).parent)
        else:
            if self.fs.isdir(target):
                self.fs.rm(target, recursive=True)  # put would go inside it
            self.fs.put(str(made), target, recursive=made.is_dir())

    def _write_manifest(self, slot: str, manifest: dict[str, Any]) -> None:
        self.write_text(posixpath.relpath(self._manifest_path(slot), self.path), json.dumps(manifest, indent=1))

    def _address(self, path: str) -> str:
        """What others call a path: polars, the user, another process."""
        return path if self.local else self.fs.unstrip_protocol(path)

    def _manifest_path(self, slot: str) -> str:
        return posixpath.join(self.path, "_manifests", slot + ".json")

    # -- small files ----------------------------------------------------------------------------------------------

    def write_text(self, place: str, text: str) -> None:
        """Write a small file of the run atomically."""
        with self._workspace() as folder:
            file = folder / "text"
            file.write_text(text, encoding="utf-8")
            self._commit(file, place)

    def read_text(self, place: str) -> str:
        return self.fs.cat_file(posixpath.join(self.path, place)).decode()

    def frozen_recipe(self) -> Recipe | None:
        """The recipe this run was started with; None where there is no run yet."""
        path = posixpath.join(self.path, "run.toml")
        if not self.fs.exists(path):
            return None
        try:
            return validate(tomllib.loads(self.read_text("run.toml")), path)
        except tomllib.TOMLDecodeError as error:
            raise BadInput(f"{path}: not valid TOML: {error}; put it back, or choose another name or root") from None

    def check_recipe(self, recipe: Recipe) -> None:
        """Refuse a run folder that belongs to another recipe, or a root that cannot be written. Leaves nothing behind."""
        if not self.local and (reason := unreachable(self.fs, self.path)):
            raise BadInput(f"{self.uri}: cannot be written ({reason}); check its name, the credentials and the endpoint")
        inside = self.fs.ls(self.path, detail=False) if self.fs.isdir(self.path) else []
        left = posixpath.join(self.path, "_tmp")  # by a run that was killed at its start
        frozen = self.frozen_recipe()
        if frozen is None and any(path.rstrip("/") != left for path in inside):
            raise BadInput(f"{self.path}: not a run folder (no run.toml in it); choose another name or root")
        if frozen is not None and (lines := differences(frozen, recipe)):
            raise BadInput(
                f"{self.path}: this run belongs to another recipe: "
                + "; ".join(lines)
                + "; give this recipe another name (--set name=…) or go on with the old one"
            )
        if self.local:
            existing = next(p for p in (Path(self.path), *Path(self.path).parents) if p.exists())
            if reason := unwritable(existing):
                raise BadInput(f"{self.root}: cannot be written ({existing} {reason}); set root to a folder of yours")

    def freeze(self, recipe: Recipe) -> None:
        """Write `run.toml`, once."""
        if self.frozen_recipe() is None:
            self.write_text("run.toml", dumps(recipe))


def write_parquet(table: pa.Table, path: Path) -> None:
    """zstd Parquet with the settings that fit token tables: numbers split by byte, strings by dictionary."""
    numbers = [
        field.name + (".list.element" if nested else "")
        for field in table.schema
        if (nested := pa.types.is_list(field.type) or pa.types.is_large_list(field.type)) or pa.types.is_floating(field.type)
        if pa.types.is_primitive(field.type.value_type if nested else field.type)
    ]
    plain = {name.split(".")[0] for name in numbers}
    pq.write_table(
        table,
        path,
        compression="zstd",
        use_dictionary=[f.name for f in table.schema if f.name not in plain and not pa.types.is_nested(f.type)],
        column_encoding=dict.fromkeys(numbers, "BYTE_STREAM_SPLIT"),
    )


def read_table(artifact: Artifact, columns: list[str] | None = None) -> pa.Table:
    """A committed table, whole: one shard."""
    fs, path = filesystem(artifact.path)
    with fs.open(path, "rb") as file:
        return pq.read_table(file, columns=columns)


def local_folder(artifact: Artifact) -> str:
    """A committed folder as a local path; fetched once where the run lies on a remote filesystem."""
    fs, path = filesystem(artifact.path)
    if isinstance(fs, LocalFileSystem):
        return path
    target = Path(tempfile.gettempdir()) / f"potstill-{os.getuid()}" / artifact.digest
    if not target.exists():
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            fs.get(path, f"{folder}/fetched", recursive=True)
            settle(Path(folder) / "fetched", target)
    return str(target)

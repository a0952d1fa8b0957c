"""A run's folder: where its artifacts lie, and how they are committed.

Everything that a stage makes goes through `Run.build_table` and `Run.build_files`. Work that was done on the same inputs,
in this run or in another under the same root, is not done again. A file is written under `_tmp/`, closed, fsynced and
renamed into place, and its manifest is written last. So a data folder holds finished Parquet only, and a reader who follows
the manifests sees whole artifacts only.

Before a committed artifact is used, its size is compared; its digest is computed again when it is read (`storage.damage`), or
when `storage.receipt` finds that it has changed. A truncated, altered or missing artifact is made again. On object storage,
which guards its content itself, only the size is compared.
"""

import json
import posixpath
import shutil
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from glob import escape, glob
from pathlib import Path
from typing import Any

import pyarrow as pa

from configs.errors import BadInput
from configs.load import dump_recipe, list_differences, validate_recipe
from configs.schema import Recipe
from storage import disk
from storage.artifacts import Artifact, write_parquet
from storage.damage import clear_suspicion, is_suspect
from storage.filesystems import explain_unreachable
from storage.folder import Folder
from storage.lineage import check_watched, digest_json, digest_local
from storage.lock import hold_file
from storage.manifests import check_same, describe_clearing, describe_output, parse_manifest
from storage.schemas import explain_columns


def round_slot(number: int, *parts: str) -> str:
    """The slot of an artifact of a round, such as `round=0003/rollouts/part-00000`."""
    return posixpath.join(f"round={number:04d}", *parts)


def part(number: int) -> str:
    """The name of a shard's file, without its ending: `part-00000`."""
    return f"part-{number:05d}"


class Run(Folder):
    """One run's folder under a root, on any fsspec filesystem.

    A *slot* is where an artifact lives, relative to the run and without its ending:
    `round=0001/scores/part-00000` is that file with `.parquet`, and its manifest is `_manifests/….json`.
    """

    def __init__(self, root: str, name: str):
        super().__init__(root, name)
        self.name = name

    def find(self, slot: str, key: str | None = None) -> Artifact | None:
        """The artifact committed at `slot`, cleared or not; None where there is none, or it has another key than `key`."""
        manifest = self.manifest(slot)
        if manifest is None or (key is not None and manifest["key"] != key):
            return None
        path = posixpath.join(self.path, manifest["path"])
        if not manifest.get("cleared") and not self.fs.exists(path):
            return None
        return Artifact(self.address_of(path), manifest["digest"], manifest["rows"])

    def manifest(self, slot: str) -> dict[str, Any] | None:
        """The manifest of `slot`; None where there is none, or where it cannot be read."""
        try:
            return parse_manifest(self.fs.cat_file(self._manifest_path(slot)), slot)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def slots(self) -> list[str]:
        """Every slot of the run that has a manifest, in order."""
        folder = posixpath.join(self.path, "_manifests")
        paths = sorted(self.fs.find(folder)) if self.fs.exists(folder) else []
        return [posixpath.relpath(path, folder).removesuffix(".json") for path in paths]

    def manifests(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every committed slot of the run with its manifest, in order of the slots."""
        for slot in self.slots():
            if (manifest := self.manifest(slot)) is not None:
                yield slot, manifest

    def find_damage(self, slot: str, read: bool = True) -> str | None:
        """What is wrong with the artifact at `slot`; None where it is as its manifest says.

        Without `read` the size is compared, not the content.
        """
        manifest = self.manifest(slot)
        if manifest is None:
            return "its manifest cannot be read"
        if digest_json(manifest.get("inputs")) != manifest["key"]:
            return "its manifest was altered"
        if manifest.get("cleared"):
            return None
        path = posixpath.join(self.path, manifest["path"])
        try:
            if not self.fs.exists(path):
                return "it is missing"
            size = disk.size_of(path) if self.local else self.fs.du(path)
            if size != manifest.get("bytes", size):
                return f"it has {size} bytes, and had {manifest['bytes']}"
            if read and self.digest(path) != manifest["digest"]:
                return "its content was altered"
            if read and path.endswith(".parquet") and (rows := self.read_footer(path).num_rows) != manifest["rows"]:
                return f"it has {rows} rows, its manifest says {manifest['rows']}"
        except pa.ArrowInvalid:
            return "it is no Parquet file"
        except OSError as error:
            return f"it cannot be read: {error.strerror or error}"
        return None

    def find_misfit(self, slot: str) -> str | None:
        """Why the intact file at `slot` is no part of its table; None where it is one, or where a folder lies there."""
        path = posixpath.join(self.path, slot + ".parquet")
        table = slot.split("/")[1 if slot.startswith("round=") else 0]
        return explain_columns(table, self.read_footer(path).schema.to_arrow_schema()) if self.fs.exists(path) else None

    def rounds_done(self) -> int:
        """How many rounds are complete. A round is complete when the student that it trained has been evaluated."""
        number = 0
        while self.find(round_slot(number + 1, "evals", "student")) is not None:
            number += 1
        return number

    # -- building -------------------------------------------------------------------------------------------------

    def build_table(
        self, slot: str, inputs: dict[str, Any], make: Callable[[], pa.Table], log: Callable[[str], None] = print
    ) -> Artifact:
        """Commit the table that `make` returns at `slot`. It is not called where the same inputs gave a table before.

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
        """As `build_table`, for several artifacts of one piece of work: `slots` maps their names to their slots.

        `make` gets an empty local folder, writes the files and folders of these names, and returns the rows of each.
        """
        key, complete = digest_json(inputs), dict[str, Artifact]()
        for name, slot in slots.items():
            if artifact := self._find_intact(slot, key, log) or self._take_over(slot, key, log, beside=bool(complete)):
                complete[name] = artifact
        if len(complete) == len(slots):
            return complete
        started = time.monotonic()
        with self.writing(), self.workspace() as folder:
            rows = make(folder)
            check_watched()
            seconds = round(time.monotonic() - started, 3)
            made = {name: describe_output(folder / name, slot, key, inputs) for name, slot in slots.items()}
            check_same([(self.manifest(slot), made[name]) for name, slot in slots.items()])
            for name, slot in slots.items():
                self._commit_slot(slot, folder / name, {**made[name], "rows": rows[name], "seconds": seconds})
        log(f"{', '.join(slots.values())}: {max(rows.values())} rows, {seconds:.1f} s")
        return {name: artifact for name, slot in slots.items() if (artifact := self.find(slot, key))}

    def _find_intact(self, slot: str, key: str, log: Callable[[str], None]) -> Artifact | None:
        """As `find`, but a damaged artifact is logged, and None is returned for it."""
        if not self.fs.exists(self._manifest_path(slot)):
            return None
        manifest = self.manifest(slot)
        if manifest is not None and manifest["key"] != key:
            return None
        path = None if manifest is None else posixpath.join(self.path, manifest["path"])
        suspected = path is not None and is_suspect(path)
        if suspected and (cleared := describe_clearing(manifest)):
            log(f"{slot}: {cleared}, and needed again; it is made again")
            return None
        if problem := self.find_damage(slot, read=suspected):
            log(f"{slot}: damaged ({problem}); it is made again")
            return None
        if path is not None:
            clear_suspicion(path)
        return self.find(slot, key)

    def _take_over(self, slot: str, key: str, log: Callable[[str], None], beside: bool = False) -> Artifact | None:
        """Link or copy the artifact that another run under this root committed at the same slot under the same key.

        Of what was cleared there the manifest alone is taken, and that only `beside` what is found of the same piece of work:
        a trainer's state is seldom needed where its student is there.
        """
        for other in self._others_with(slot):
            if (manifest := other.manifest(slot)) is None or manifest["key"] != key:
                continue
            if manifest.get("cleared"):
                if beside and not is_suspect(posixpath.join(self.path, manifest["path"])):
                    self.write_manifest(slot, {**manifest, "taken_from": other.name})
                    return self.find(slot, key)
                continue
            source = posixpath.join(other.path, manifest["path"])
            with self.writing(), self.workspace() as folder, other.hold(slot, alone=False):
                copy = folder / "copy"
                try:
                    self.copy(source, copy)
                except (FileNotFoundError, shutil.Error):
                    continue  # it is missing there, or is being replaced
                if digest_local(copy) != manifest["digest"]:
                    log(f"{slot}: damaged in {other.name}; not taken over")
                    continue
                self._commit_slot(slot, copy, {**manifest, "taken_from": other.name})
            log(f"{slot}: {manifest['rows']} rows, taken over from {other.name}")
            return self.find(slot, key)
        return None

    def _others_with(self, slot: str) -> Iterator["Run"]:
        """The other runs under this root that have a manifest of `slot`. On object storage each is listed once per process."""
        if self.local:
            paths = glob(f"{escape(self.root)}/*/_manifests/{escape(slot)}.json")
            names = [path.removeprefix(f"{self.root}/").partition("/")[0] for path in paths]
        else:
            entries = self.fs.ls(self.root, detail=True) if self.fs.exists(self.root) else []
            names = [posixpath.basename(entry["name"].rstrip("/")) for entry in entries if entry["type"] == "directory"]
        others = (Run(self.uri, name) for name in sorted(names) if name != self.name)
        yield from others if self.local else (other for other in others if slot in _list_once(other))

    def _commit_slot(self, slot: str, source: Path, manifest: dict[str, Any]) -> None:
        _listed.pop(self.address, None)
        clear_suspicion(posixpath.join(self.path, manifest["path"]))
        if self.fs.exists(self._manifest_path(slot)):
            self.fs.rm_file(self._manifest_path(slot))  # it describes the artifact that is replaced
        self.commit(source, manifest["path"])
        self.write_manifest(slot, manifest)

    def hold(self, slot: str, *, alone: bool) -> AbstractContextManager[bool]:
        """Hold what lies at a slot while it is cleared (`alone`) or copied; whether that may begin."""
        return hold_file(self._manifest_path(slot), alone=alone) if self.local else nullcontext(True)

    def write_manifest(self, slot: str, manifest: dict[str, Any]) -> None:
        self.write_text(posixpath.join("_manifests", slot + ".json"), json.dumps(manifest, indent=1))

    def _manifest_path(self, slot: str) -> str:
        return posixpath.join(self.path, "_manifests", slot + ".json")

    # -- the recipe -----------------------------------------------------------------------------------------------

    def frozen_recipe(self) -> Recipe | None:
        """The recipe that this run was started with; None where there is no run yet."""
        path = posixpath.join(self.path, "run.toml")
        if not self.fs.exists(path):
            return None
        try:
            return validate_recipe(tomllib.loads(self.read_text("run.toml")), path)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadInput(f"{path}: not valid TOML: {error}; restore this file, or choose another name or root") from None

    def check_recipe(self, recipe: Recipe) -> None:
        """Refuse a run folder that belongs to another recipe, or a root that cannot be written. Leaves nothing behind."""
        if not self.local and (reason := explain_unreachable(self.fs, self.path)):
            raise BadInput(f"{self.uri}: cannot be written ({reason}); check its name, the credentials and the endpoint")
        entries = self.fs.ls(self.path, detail=False) if self.fs.isdir(self.path) else []
        unfinished = posixpath.join(self.path, "_tmp")  # left by a run that was killed at its start
        frozen = self.frozen_recipe()
        if frozen is None and any(path.rstrip("/") != unfinished for path in entries):
            raise BadInput(f"{self.path}: not a run folder (no run.toml in it); choose another name or root")
        if frozen is not None and (lines := list_differences(frozen, recipe)):
            raise BadInput(
                f"{self.path}: this run belongs to another recipe: "
                + "; ".join(lines)
                + "; give this recipe another name (--set name=…) or go on with the old one"
            )
        if self.local:
            existing = disk.find_existing(Path(self.path))
            if reason := disk.explain_unwritable(existing):
                raise BadInput(f"{self.root}: cannot be written ({existing} {reason}); set root to a folder of yours")

    def freeze(self, recipe: Recipe) -> None:
        """Write `run.toml` at the start of the run, and again when a field that may change has changed."""
        self.check_recipe(recipe)  # again, because the lock is held now
        if self.frozen_recipe() != recipe:
            self.write_text("run.toml", dump_recipe(recipe))


_listed: dict[str, frozenset[str]] = {}  # by address, the slots of runs on object storage


def _list_once(run: Run) -> frozenset[str]:
    if run.address not in _listed:
        _listed[run.address] = frozenset(run.slots())
    return _listed[run.address]

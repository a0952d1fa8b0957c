"""A folder on any filesystem that is written by one process at a time, whole file by whole file."""

import os
import posixpath
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from configs.errors import BadInput, CannotWrite
from storage import disk
from storage.filesystems import filesystem
from storage.lineage import digest_json, digest_local, digest_stream
from storage.lock import check_local, check_remote, local_lock, remote_lock


class Folder:
    """The folder `name` under `root`, a local folder or any fsspec URI. Half-made things lie in `_tmp` in it."""

    def __init__(self, root: str, name: str):
        try:
            self.fs, base = filesystem(root)
        except ImportError as error:
            raise BadInput(f"root: {root} cannot be used: {error}; for s3:// that is: pip install -e '.[s3]'") from None
        except ValueError as error:
            raise BadInput(f"root: {root} cannot be used: {error}; give a folder, or a URI such as s3://bucket/runs") from None
        self.uri, self.root = root, base.rstrip("/")
        self.path = posixpath.join(self.root, name)
        self.local = isinstance(self.fs, LocalFileSystem)
        self.address = self.address_of(self.path)

    def address_of(self, path: str) -> str:
        """What others call a path: polars, the user, another process."""
        return path if self.local else self.fs.unstrip_protocol(path)

    def free(self) -> int | None:
        """Bytes that the disk has left; None where it is no disk."""
        return shutil.disk_usage(disk.existing(Path(self.path))).free if self.local else None

    # -- writing ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def workspace(self) -> Iterator[Path]:
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

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Says in one message what a full disk, or one that became read-only, makes libraries say in many ways."""
        try:
            yield
        except Exception as error:
            if not self.local or (reason := disk.refusal(error, Path(self.root))) is None:
                raise
            raise CannotWrite(
                f"{self.path}: cannot be written: {reason}; what is committed stays, "
                "and the same command goes on from there once that is put right"
            ) from error

    def commit(self, made: Path, place: str) -> None:
        """Move what was made in a `workspace` to `place` in the folder: there it is whole, or not at all."""
        target = posixpath.join(self.path, place)
        if self.local:
            disk.sync(made)
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            if os.path.isdir(target):
                os.rename(target, tempfile.mkdtemp(dir=made.parent))  # goes with the workspace
            os.replace(made, target)
            disk.sync_entry(Path(target).parent)
        else:
            if self.fs.isdir(target):
                self.fs.rm(target, recursive=True)  # put would go inside it
            self.fs.put(str(made), target, recursive=made.is_dir())

    def write_text(self, place: str, text: str) -> None:
        """Write a small file of the run atomically."""
        with self.writing(), self.workspace() as folder:
            file = folder / "text"
            file.write_text(text, encoding="utf-8")
            self.commit(file, place)

    def read_text(self, place: str) -> str:
        text: str = self.fs.cat_file(posixpath.join(self.path, place)).decode()
        return text

    # -- reading ---------------------------------------------------------------------------------------------------------

    def digest(self, path: str) -> str:
        """The digest of a file or folder, wherever it lies."""
        if self.local:
            return digest_local(path)
        if not self.fs.isdir(path):
            with self.fs.open(path, "rb") as file:
                return digest_stream(file)
        return digest_json({posixpath.relpath(file, path): self.digest(file) for file in self.fs.find(path)})

    def copy(self, source: str, target: Path) -> None:
        """A file or folder of this filesystem, linked or copied to a local place on the same disk as `workspace`."""
        if not self.local:
            self.fs.get(source, str(target), recursive=self.fs.isdir(source))
        elif os.path.isdir(source):
            shutil.copytree(source, target, copy_function=disk.link)
        else:
            disk.link(source, target)

    # -- who works on it --------------------------------------------------------------------------------------------

    @contextmanager
    def lock(self, log: Callable[[str], None] = print, wait: bool = False) -> Iterator[None]:
        """Be the only process that works on the run; BadInput, or with `wait` patience, where another one does.

        What a killed process left half-made is removed.
        """
        if not self.local:
            with remote_lock(self.fs, self._lock_path, self.path):
                yield
            return
        file = Path(self._lock_path)
        with ExitStack() as held:
            with self.writing():
                held.enter_context(local_lock(file, self.path, log, wait))
                for left in file.parent.iterdir():
                    if left.is_dir():
                        shutil.rmtree(left)
            yield

    def check_free(self) -> None:
        """BadInput where another process works on the run. Writes nothing."""
        if self.local:
            check_local(Path(self._lock_path), self.path)
        else:
            check_remote(self.fs, self._lock_path, self.path)

    @property
    def _lock_path(self) -> str:
        return posixpath.join(self.path, "_tmp", "lock")

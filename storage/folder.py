"""A folder on any filesystem. One process at a time writes to it, and each file appears whole."""

import os
import posixpath
import shutil
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from configs.errors import BadInput, CannotWrite
from storage import disk
from storage.filesystems import filesystem
from storage.lineage import digest_json, digest_local, digest_stream
from storage.lock import check_local, check_remote, local_lock, remote_lock


class Folder:
    """The folder `name` under `root`, a local folder or any fsspec URI. Unfinished files lie in `_tmp` in it."""

    def __init__(self, root: str, name: str):
        try:
            self.fs, base = filesystem(root)
        except ImportError as error:
            raise BadInput(f"root: {root} cannot be used: {error}; s3:// needs: pip install -e '.[s3]'") from None
        except ValueError as error:
            raise BadInput(f"root: {root} cannot be used: {error}; give a folder, or a URI such as s3://bucket/runs") from None
        self.uri, self.root = root, base.rstrip("/")
        self.path = posixpath.join(self.root, name)
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in self.path):
            raise BadInput(f"root: {self.path!a}: a control character, or what is not UTF-8, in its name; choose another one")
        self.local = isinstance(self.fs, LocalFileSystem)
        self.address = self.address_of(self.path)

    def address_of(self, path: str) -> str:
        """A path as polars, the user and other processes use it: with its protocol where it is not local."""
        return path if self.local else self.fs.unstrip_protocol(path)

    def free(self) -> int | None:
        """Free bytes of the disk; None on object storage."""
        return shutil.disk_usage(disk.find_existing(Path(self.path))).free if self.local else None

    # -- writing ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """A folder for unfinished files: on the run's disk if it has one, so that a rename is atomic."""
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
        """Turn the many errors that libraries raise on a full or read-only disk into one CannotWrite."""
        try:
            yield
        except Exception as error:
            if not self.local or (reason := disk.explain_write_error(error, Path(self.root))) is None:
                raise
            raise CannotWrite(
                f"{self.path}: cannot be written: {reason}; what is committed stays. "
                "Make the disk writable again or free some space; then the same command goes on from there"
            ) from error

    def commit(self, source: Path, place: str) -> None:
        """Move a finished file or folder from a `workspace` to `place`. A reader sees it whole or not at all."""
        target = posixpath.join(self.path, place)
        if self.local:
            disk.sync(source)
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            if os.path.isdir(target):
                os.rename(target, tempfile.mkdtemp(dir=source.parent))  # is removed with the workspace
            os.replace(source, target)
            disk.sync_entry(Path(target).parent)
        else:
            if self.fs.isdir(target):
                self.fs.rm(target, recursive=True)  # put would go inside it
            self.fs.put(str(source), target, recursive=source.is_dir())

    def remove(self, place: str) -> None:
        """Take a file or folder away. A reader sees it whole or not at all."""
        target = posixpath.join(self.path, place)
        if not self.local:
            self.fs.rm(target, recursive=self.fs.isdir(target))
            return
        with self.workspace() as folder:
            os.rename(target, folder / "removed")
        if not os.listdir(os.path.dirname(target)):
            os.rmdir(os.path.dirname(target))

    def write_text(self, place: str, text: str) -> None:
        """Write a small file of the run atomically."""
        with self.writing(), self.workspace() as folder:
            file = folder / "text"
            file.write_text(text, encoding="utf-8")
            self.commit(file, place)

    def read_text(self, place: str) -> str:
        """Read a small file of the run."""
        text: str = self.fs.cat_file(posixpath.join(self.path, place)).decode()
        return text

    # -- reading ---------------------------------------------------------------------------------------------------------

    def digest(self, path: str) -> str:
        """The digest of a file or folder, on a local disk or on object storage."""
        if self.local:
            return digest_local(path)
        if not self.fs.isdir(path):
            with self.fs.open(path, "rb") as file:
                return digest_stream(file)
        return digest_json({posixpath.relpath(file, path): self.digest(file) for file in self.fs.find(path)})

    def read_footer(self, path: str) -> pq.FileMetaData:
        """Rows and columns of a Parquet file. Raises ArrowInvalid where it is none."""
        with self.fs.open(path, "rb") as file:
            return pq.read_metadata(file)

    def copy(self, source: str, target: Path) -> None:
        """Link or copy a file or folder of this filesystem to a local path on the same disk as `workspace`."""
        if not self.local:
            self.fs.get(source, str(target), recursive=self.fs.isdir(source))
        elif os.path.isdir(source):
            shutil.copytree(source, target, copy_function=disk.link)
        else:
            disk.link(source, target)

    # -- who works on it --------------------------------------------------------------------------------------------

    @contextmanager
    def lock(self, log: Callable[[str], None] = print, wait: bool = False) -> Iterator[None]:
        """Hold the run's lock. Where another process holds it, raise BadInput, or with `wait` wait for its end.

        Unfinished files of a killed process are removed, and at the end those that a stop has left: it may come where a
        `workspace` opens or closes.
        """
        if not self.local:
            with remote_lock(self.fs, self._lock_path, self.path):
                yield
            return
        file = Path(self._lock_path)
        with ExitStack() as held:
            with self.writing():
                held.enter_context(local_lock(file, self.path, log, wait))
                held.callback(_remove_folders, file.parent, ignore_errors=True)
                _remove_folders(file.parent)
            yield

    def check_free(self) -> None:
        """Raise BadInput where another process works on the run. Writes nothing."""
        if self.local:
            check_local(Path(self._lock_path), self.path)
        else:
            check_remote(self.fs, self._lock_path, self.path)

    @property
    def _lock_path(self) -> str:
        return posixpath.join(self.path, "_tmp", "lock")


def _remove_folders(parent: Path, ignore_errors: bool = False) -> None:
    for folder in parent.iterdir():
        if folder.is_dir():
            shutil.rmtree(folder, ignore_errors)

"""What disks and object stores do differently, in small functions."""

import os
import posixpath
import shutil
import tempfile
from pathlib import Path

import fsspec


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem and the path in it; listings are not cached, because other machines write there too."""
    return fsspec.url_to_fs(uri, use_listings_cache=False)


def link(source: str, target: str | Path) -> object:
    """A hard link: committed files are never changed. A copy where the disk cannot link."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def settle(made: Path, target: Path) -> None:
    """Rename a folder into place where its name says what is in it: another process that was first has made the same."""
    try:
        os.replace(made, target)
    except OSError:
        if not target.is_dir():
            raise


def unreachable(fs: fsspec.AbstractFileSystem, run: str) -> str | None:
    """Why a remote filesystem takes no run at the path `run`; tried out where there is none yet."""
    probe = posixpath.join(run, "_tmp", "probe")
    try:
        if not fs.exists(posixpath.join(run, "run.toml")):
            fs.pipe_file(probe, b"")
            fs.rm_file(probe)
    except Exception as error:  # each filesystem's library has errors of its own
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None


def unwritable(folder: Path) -> str | None:
    """Why no folder can be made in `folder`; tried out, because a superuser's permissions always say yes."""
    if not folder.is_dir():
        return "is a file"
    if not os.access(folder, os.W_OK) or os.statvfs(folder).f_flag & os.ST_RDONLY:
        return "is read-only"
    try:
        os.rmdir(tempfile.mkdtemp(dir=folder))
    except OSError as error:
        return f"takes no folders: {error.strerror}"
    return None


def fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

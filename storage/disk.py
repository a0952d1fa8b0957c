"""What a local disk can and cannot do."""

import errno
import os
import re
import shutil
import tempfile
from pathlib import Path

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


def link(source: str, target: str | Path) -> object:
    """A hard link: committed files are never changed. A copy where the disk cannot link."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def sync(made: Path) -> None:
    """Force a file, or all of a folder, from memory onto the disk."""
    for path in [made] if made.is_file() else [*made.rglob("*"), made]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_entry(folder: Path) -> None:
    """Force a folder's list of names onto the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def size(path: str | Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    files = [Path(path)] if os.path.isfile(path) else [f for f in Path(path).rglob("*") if f.is_file()]
    return sum(file.stat().st_size for file in files)


def existing(path: Path) -> Path:
    """The path, or what of it there is already."""
    return next(place for place in (path, *path.parents) if place.exists())


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


def refusal(error: Exception, folder: Path) -> str | None:
    """Why the disk below `folder` takes no more, where that is what `error` comes from; else None.

    Libraries written in Rust raise errors of their own, which name the system's error in their text alone.
    """
    named = re.findall(r"(?:errno|os error|code:) (\d+)", str(error), re.IGNORECASE)
    for number in (getattr(error, "errno", None), *map(int, named)):
        if number in FULL:
            return os.strerror(number)
    return unwritable(folder) if isinstance(error, PermissionError) else None

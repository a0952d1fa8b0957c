"""Operations on a local disk, and the reasons why it refuses them."""

import errno
import os
import re
import shutil
import tempfile
from pathlib import Path

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


def link(source: str, target: str | Path) -> object:
    """Make a hard link, since committed files are never changed; a copy where the disk cannot link.

    Of a symbolic link, to the file that it leads to: what another run has must not change with it.
    """
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)
    return target


def sync(path: Path) -> None:
    """Force a file, or all of a folder, from memory onto the disk."""
    for entry in [path] if path.is_file() else [*path.rglob("*"), path]:
        descriptor = os.open(entry, os.O_RDONLY)
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


def size_of(path: str | Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    files = [Path(path)] if os.path.isfile(path) else [f for f in Path(path).rglob("*") if f.is_file()]
    return sum(file.stat().st_size for file in files)


def find_existing(path: Path) -> Path:
    """The path, or its nearest parent that exists, be it a link that leads nowhere."""
    return next(place for place in (path, *path.parents) if os.path.lexists(place))


def explain_unwritable(folder: Path) -> str | None:
    """Why no folder can be made in `folder`; None where one can. It is tried: permissions never refuse a superuser."""
    if not folder.is_dir():
        return "is a link that leads nowhere" if folder.is_symlink() and not folder.exists() else "is a file"
    if not os.access(folder, os.W_OK) or os.statvfs(folder).f_flag & os.ST_RDONLY:
        return "is read-only"
    try:
        os.rmdir(tempfile.mkdtemp(dir=folder))
    except OSError as error:
        return f"takes no folders: {error.strerror}"
    return None


def explain_write_error(error: Exception, folder: Path) -> str | None:
    """Why the disk below `folder` takes no more, if that is the cause of `error`; else None.

    Libraries written in Rust raise errors of their own, which give the system's error number in their text only.
    """
    numbers = re.findall(r"(?:errno|os error|code:) (\d+)", str(error), re.IGNORECASE)
    for number in (getattr(error, "errno", None), *map(int, numbers)):
        if number in FULL:
            return os.strerror(number)
    return explain_unwritable(folder) if isinstance(error, PermissionError) else None

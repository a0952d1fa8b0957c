"""What lies behind a URI."""

import os
import posixpath
from pathlib import Path

import fsspec


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem and the path in it; listings are not cached, because other machines write there too."""
    found: tuple[fsspec.AbstractFileSystem, str] = fsspec.url_to_fs(uri, use_listings_cache=False)
    return found


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

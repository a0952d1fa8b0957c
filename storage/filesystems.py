"""The filesystem behind a URI."""

import os
import posixpath
from pathlib import Path

import fsspec


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a URI and the path in it. Listings are not cached, because other machines write there too."""
    parts: tuple[fsspec.AbstractFileSystem, str] = fsspec.url_to_fs(uri, use_listings_cache=False)
    return parts


def move_into_place(folder: Path, target: Path) -> None:
    """Rename `folder` to `target`, whose name is a digest of its content. If `target` is there already, it is the same."""
    try:
        os.replace(folder, target)
    except OSError:
        if not target.is_dir():
            raise


def explain_unreachable(fs: fsspec.AbstractFileSystem, run: str) -> str | None:
    """Why a remote filesystem takes no run at the path `run`; None where it does. A new run's path is probed by a write."""
    probe = posixpath.join(run, "_tmp", "probe")
    try:
        if not fs.exists(posixpath.join(run, "run.toml")):
            fs.pipe_file(probe, b"")
            fs.rm_file(probe)
    except Exception as error:  # each filesystem's library has errors of its own
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None

"""One process at a time works on a run; the others are told which one does."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from huggingface_hub import cached_assets_path

from configs.errors import BadInput

POLL_SECONDS = 1.0


@contextmanager
def local_lock(file: Path, what: str, log: Callable[[str], None], wait: bool) -> Iterator[None]:
    """Hold `file` under an OS lock, which ends with its process however that ends: nothing is left to clean up by hand.

    The file says who holds it (pid, host, since when), and is gone afterwards. Where another process has it: BadInput,
    or with `wait` one line and patience. On a network disk the lock holds between machines as far as its `flock` does;
    on a disk without any a line says so, and the run goes on unguarded.
    """
    told = False
    while (descriptor := _acquire(file, what, log)) is None:
        if not wait:
            raise BadInput(_taken(what, _read(file)))
        if not told:
            log(f"{what}: waiting for {_describe(_read(file))}")
        told = True
        time.sleep(POLL_SECONDS)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_me()).encode(), 0)
        yield
    finally:
        with suppress(OSError):
            file.unlink()
        os.close(descriptor)
        with suppress(OSError):  # where nothing was made, nothing is left
            file.parent.rmdir()
            file.parent.parent.rmdir()


def device_lock(name: str, log: Callable[[str], None]) -> AbstractContextManager[None]:
    """Wait until no other process of this user holds a device, then hold it: a lock in the user's own folder."""
    return local_lock(cached_assets_path("potstill", "locks") / name, name, log, wait=True)


def _acquire(file: Path, what: str, log: Callable[[str], None]) -> int | None:
    """The open and locked file; None where another process has it."""
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # its last holder has just removed the folder
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            log(f"{what}: this disk has no locks ({error.strerror}); do not start the run twice at a time")
        if _is_open_at(descriptor, file):
            return descriptor
        os.close(descriptor)  # its last holder removed it between opening and locking


def check_local(file: Path, what: str) -> None:
    """BadInput where another process holds `file`. Writes nothing."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(_taken(what, _read(file))) from None
    except OSError:
        pass  # no locks here: `local_lock` will say so
    finally:
        os.close(descriptor)


@contextmanager
def remote_lock(fs: Any, path: str, what: str) -> Iterator[None]:
    """Leave a note at `path` that says who works on a run; BadInput where someone else's note lies there.

    Object stores have no locks. Two processes that start within the same second may both pass (they then make the same
    things twice: results do not depend on who makes them). A note of a dead process of this machine is taken over; of
    another machine's process nothing is known, so the message names the note, to be deleted by hand.
    """
    check_remote(fs, path, what)
    fs.pipe_file(path, json.dumps(_me()).encode())
    try:
        yield
    finally:
        with suppress(OSError):
            fs.rm_file(path)


def check_remote(fs: Any, path: str, what: str) -> None:
    try:
        holder = _parse(fs.cat_file(path))
    except FileNotFoundError:
        return
    if holder.get("host") != socket.gethostname():
        raise BadInput(f"{_taken(what, holder)}; if it is dead, delete {fs.unstrip_protocol(path)}")
    if holder["pid"] != os.getpid() and _is_alive(holder["pid"]):
        raise BadInput(_taken(what, holder))


def _me() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now().astimezone().isoformat(" ", "seconds")}


def _taken(what: str, holder: dict[str, Any]) -> str:
    return f"{what}: {_describe(holder)} is working on this run; wait until it has ended, or give this one another name"


def _describe(holder: dict[str, Any]) -> str:
    known = {"pid": "?", "host": "?", "since": "just now"} | holder
    return f"process {known['pid']} on {known['host']} (since {known['since']})"


def _read(file: Path) -> dict[str, Any]:
    try:
        return _parse(file.read_bytes())
    except OSError:
        return {}


def _parse(data: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(data))
    except (ValueError, TypeError):
        return {}  # it is being written just now


def _is_open_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # someone else's
    return True

"""One process at a time works on a run. The others say which process that is."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from huggingface_hub import cached_assets_path

from configs.errors import BadInput

POLL_SECONDS = 1.0


@contextmanager
def local_lock(file: Path, what: str, log: Callable[[str], None], wait: bool) -> Iterator[None]:
    """Hold `file` under a lock of the operating system. It ends with the process, so nothing needs cleaning up by hand.

    The file names its holder (pid, host, since when) and is removed afterwards. Where another process holds it, raise
    BadInput, or with `wait` log one line and wait. On a network disk the lock holds between machines as far as the disk's
    `flock` does: where a process of another machine has left its name, which it does when it is killed, a line says so. On a
    disk without locks a line says so as well, and the run goes on without one.
    """
    announced = False
    while (descriptor := _acquire(file, what, log)) is None:
        if not wait:
            raise BadInput(_explain_holder(what, _read_holder(file)))
        if not announced:
            log(f"{what}: waiting for {_describe_holder(_read_holder(file))}")
        announced = True
        time.sleep(POLL_SECONDS)
    before, here = _read_holder(file), socket.gethostname()
    if before.get("host", here) != here:
        log(f"{what}: {_describe_holder(before)} has not ended in order; if it is still at work there, stop one of the two")
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_identify_process()).encode(), 0)
        yield
    finally:
        with suppress(OSError):
            file.unlink()
        os.close(descriptor)
        with suppress(OSError):  # remove the folders if they are empty
            file.parent.rmdir()
            file.parent.parent.rmdir()


def device_lock(name: str, log: Callable[[str], None]) -> AbstractContextManager[None]:
    """Wait until no other process of this user holds a device, then hold it. The lock lies in the user's own folder."""
    return local_lock(cached_assets_path("potstill", "locks") / name, name, log, wait=True)


@contextmanager
def hold_file(path: str, *, alone: bool) -> Iterator[bool]:
    """Hold a file together with others, or `alone`; False at once where it is to be held alone and others hold it.

    A file that is gone, and a disk without locks, hold nobody up.
    """
    with ExitStack() as opened:
        try:
            descriptor = os.open(path, os.O_RDONLY)
            opened.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass
        yield True


def _acquire(file: Path, what: str, log: Callable[[str], None]) -> int | None:
    """Open and lock the file; None where another process holds it."""
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
            log(f"{what}: this disk has no locks ({error.strerror}); do not start this run in two processes at once")
        if _is_open_at(descriptor, file):
            return descriptor
        os.close(descriptor)  # its last holder removed the file after it was opened here and before it was locked


def check_local(file: Path, what: str) -> None:
    """Raise BadInput where another process holds `file`. Writes nothing."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise BadInput(f"{what}: cannot be opened ({error.strerror}); set root to a folder of yours") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(_explain_holder(what, _read_holder(file))) from None
    except OSError:
        pass  # the disk has no locks: `local_lock` logs it
    finally:
        os.close(descriptor)


@contextmanager
def remote_lock(fs: Any, path: str, what: str) -> Iterator[None]:
    """Write a note at `path` that names this process; raise BadInput where another process's note lies there.

    Object stores have no locks. Two processes that start within the same second may both pass; then both do the same work,
    with the same results. A note of a dead process of this machine is replaced. Whether a process of another machine still
    runs is not known, so the message names the note, to be deleted by hand.
    """
    check_remote(fs, path, what)
    fs.pipe_file(path, json.dumps(_identify_process()).encode())
    try:
        yield
    finally:
        with suppress(OSError):
            fs.rm_file(path)


def check_remote(fs: Any, path: str, what: str) -> None:
    """Raise BadInput where another process's note lies at `path`. Writes nothing."""
    try:
        holder = _parse_holder(fs.cat_file(path))
    except FileNotFoundError:
        return
    if holder.get("host") != socket.gethostname():
        raise BadInput(f"{_explain_holder(what, holder)}; if it is dead, delete {fs.unstrip_protocol(path)}")
    if holder["pid"] != os.getpid() and _is_alive(holder["pid"]):
        raise BadInput(_explain_holder(what, holder))


def _identify_process() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now().astimezone().isoformat(" ", "seconds")}


def _explain_holder(what: str, holder: dict[str, Any]) -> str:
    name = _describe_holder(holder)
    return f"{what}: {name} is working on this run; wait until it has ended, or give your run another name (--set name=…)"


def _describe_holder(holder: dict[str, Any]) -> str:
    holder = {"pid": "?", "host": "?", "since": "just now"} | holder
    return f"process {holder['pid']} on {holder['host']} (since {holder['since']})"


def _read_holder(file: Path) -> dict[str, Any]:
    try:
        return _parse_holder(file.read_bytes())
    except OSError:
        return {}


def _parse_holder(data: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(data))
    except (ValueError, TypeError):
        return {}  # its holder is writing it just now


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
        pass  # it is another user's process
    return True

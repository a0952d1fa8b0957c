"""Committed content that is about to be read is held against its digest, and made again where it is something else."""

from collections.abc import Callable
from typing import TypeVar

from configs.errors import Damaged
from storage.lineage import digest_local

T = TypeVar("T")

SUSPECTS: set[str] = set()  # local paths whose content must be read before what is committed there is used


def check_content(path: str, digest: str) -> None:
    """Raise Damaged where a local file or folder is not what its digest says. It is read once per process."""
    try:
        intact = digest_local(path) == digest
    except FileNotFoundError:
        intact = False
    if not intact:
        raise Damaged(path)


def is_suspect(path: str) -> bool:
    """Whether a file or folder, or a file inside it, is suspected."""
    return any(suspect == path or suspect.startswith(f"{path}/") for suspect in SUSPECTS)


def clear_suspicion(path: str) -> None:
    """Forget what was suspected of a file or folder: it was found intact, or made again."""
    SUSPECTS.difference_update([suspect for suspect in SUSPECTS if suspect == path or suspect.startswith(f"{path}/")])


def mend(work: Callable[[], T]) -> T:
    """Do `work`, which looks for each committed artifact that it uses. Where one turns out damaged, do it once more.

    The damaged one is then found and made again. Raises Damaged where the same path is damaged twice.
    """
    mended: set[str] = set()
    while True:
        try:
            return work()
        except Damaged as damaged:
            if damaged.path in mended:
                raise
            mended.add(damaged.path)
            SUSPECTS.add(damaged.path)

"""Out of memory is no end: the batch is halved. That is said once, and remembered as long as this process lives."""

import errno
import gc
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch
from safetensors import SafetensorError

from configs.errors import Stopped
from tasks.running.progress import logger

T = TypeVar("T")

# What an allocation that fails says, where torch has no exception of its own for it.
SIGNS = ("can't allocate memory", "Cannot allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch, of an array on the host, or of a file that is mapped, says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError | SafetensorError) and any(sign in str(error) for sign in SIGNS)


class Halved(Exception):
    """Memory ran out, and a smaller batch can be tried."""

    def __init__(self, limit: int | str):
        super().__init__(str(limit))

    @property
    def limit(self) -> int:
        """Tokens, padding included, that are to be tried at once."""
        return int(self.args[0])


@contextmanager
def insist(what: str, mend: str) -> Iterator[None]:
    """Do something of which there is no smaller part. Raises Stopped with `what` and `mend` where memory runs out."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError, SafetensorError) as error:
        if not is_out_of_memory(error):
            raise
        raise Stopped(f"{what}; {mend}") from None


class Room:
    """How many tokens of some work fit into memory at once: as many as are asked for, until memory runs out."""

    def __init__(self, what: str, mend: str):
        """`what` is the work, for people, and `mend` what they can do where a single sequence does not fit."""
        self.what, self.mend = what, mend
        self.limit: int | None = None  # tokens, padding included
        self.said = False

    @contextmanager
    def taking(self, rows: int, width: int) -> Iterator[None]:
        """Work on `rows` sequences padded to `width` tokens.

        Raises Halved where memory runs out meanwhile, and Stopped where it does for one sequence.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if rows == 1:
                raise Stopped(f"{self.what}: out of memory with a single sequence of {width:,} tokens; {self.mend}") from None
            raise Halved(-(-rows // 2) * width) from None

    def shrink(self, limit: int) -> None:
        """Take at most `limit` tokens at once from here on, and free what the failed attempt left."""
        self.limit = limit
        if not self.said:
            logger.warning(
                "%s: out of memory; from here on at most %s tokens, padding included, are taken at once, or fewer where "
                "memory runs out again; results stay the same",
                self.what,
                f"{limit:,}",
            )
            self.said = True
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    def run(
        self, rows: Sequence[int], lengths: Sequence[int], work: Callable[[Sequence[int]], T]
    ) -> Iterator[tuple[Sequence[int], T]]:
        """Yield parts of `rows`, in order, each with what `work` makes of it. `lengths` are in tokens, by row."""
        parts = [rows]
        while parts:
            part = parts.pop()
            width, half = max(lengths[i] for i in part), -(-len(part) // 2)
            if len(part) == 1 or self.limit is None or len(part) * width <= self.limit:
                try:
                    with self.taking(len(part), width):
                        result = work(part)
                except Halved as halved:
                    limit = halved.limit
                else:
                    yield part, result
                    continue
                self.shrink(limit)
            parts += [part[half:], part[:half]]


@cache
def room_of(what: str, mend: str, *key: Hashable) -> Room:
    """The Room for some work of a model, one for each `key`: what was learnt is known to whoever does this work next."""
    return Room(what, mend)

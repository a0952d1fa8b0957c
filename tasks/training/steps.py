"""Steps of the optimizer, made ready: each process's rows in micro-batches of like length, as tensors, one step ahead."""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from queue import Queue
from threading import Event, Thread
from typing import TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from tasks.tokens.ragged import length_batches
from tasks.training.batches import MicroBatch, collate, row_lengths
from tasks.training.rewarded import share_advantages

T = TypeVar("T")
HOST = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How the rows of a step are split: among processes, and into forward passes."""

    rows: int  # at most, in a pass
    tokens: int | None  # at most, in a pass, padding included; a longer row is a pass of its own
    process: int
    processes: int
    pad_id: int
    positions: int  # whose logits exist at once
    pinned: bool  # in memory that a GPU copies from while it computes


@dataclass(frozen=True, kw_only=True)
class Step:
    """The rows of an optimizer step. What one process computes of them is `passes`, in as many passes as the others."""

    table: pa.Table
    shape: Shape
    units: int  # of all processes
    tokens: int  # of all processes, without padding
    passes: tuple[tuple[MicroBatch, bool], ...]  # and whether it counts: a row stands in where this process has none left


def make_step(table: pa.Table, shape: Shape) -> Step:
    """Split and collate the rows of one optimizer step (what the objective's `prepare` returns).

    Its loss is a sum over its rows, so the split changes it by rounding alone.
    """
    lengths = row_lengths(table)
    order = np.argsort(lengths, kind="stable")
    shares = [order[process :: shape.processes] for process in range(shape.processes)]
    splits = [_split(lengths[share].tolist(), shape) for share in shares]
    own, split = shares[shape.process], splits[shape.process]
    units = pc.sum(table["units"]).as_py()
    rows = share_advantages(table, units)
    passes = [(rows.take(own[batch]), True) for batch in split]
    passes += [(rows.slice(0, 1), False)] * (max(map(len, splits)) - len(split))
    return Step(
        table=table,
        shape=shape,
        units=units,
        tokens=int(lengths.sum()),
        passes=tuple((_ready(rows, shape), counts) for rows, counts in passes),
    )


def _split(lengths: list[int], shape: Shape) -> list[list[int]]:
    """The longest first: what does not fit into memory is found at once."""
    return length_batches(lengths, shape.tokens, shape.rows)[::-1]


def _ready(rows: pa.Table, shape: Shape) -> MicroBatch:
    batch = collate(rows, shape.pad_id, HOST)
    batch.chunks(shape.positions)
    return batch.pinned() if shape.pinned else batch


def ahead(items: Iterator[T], room: int = 1) -> Generator[T, None, None]:
    """The same items, made by a thread that is at most `room` and the one in hand ahead. Its error is raised where it is met.

    The thread ends with this iterator: close it.
    """
    made: Queue[tuple[T | None, BaseException | None] | None] = Queue(room)
    over = Event()

    def work() -> None:
        try:
            for item in items:
                made.put((item, None))
                if over.is_set():
                    return
            made.put(None)
        except BaseException as error:
            made.put((None, error))

    thread = Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        while (given := made.get()) is not None:
            item, error = given
            if error is not None:
                raise error
            yield cast(T, item)
    finally:
        over.set()
        while thread.is_alive():
            while not made.empty():
                made.get()
            thread.join(0.01)


def behind(items: Iterable[T], by: int) -> Iterator[T]:
    """The same items, each of them once `by` more are made."""
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > by:
            yield waiting.popleft()
    yield from waiting

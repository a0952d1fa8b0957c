"""Rows of different lengths as flat values and bounds: row r is `values[offsets[r]:offsets[r + 1]]`."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Flat = tuple[np.ndarray, np.ndarray]  # values of all rows one after another, and the rows' bounds in them


def offsets_of(counts: np.ndarray) -> np.ndarray:
    """The bounds of rows with these `counts` `[rows]`: `[0, c0, c0 + c1, …]`, int64 `[rows + 1]`."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def rows_of(offsets: np.ndarray) -> np.ndarray:
    """The row of each flat element, int64."""
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def index_in_row(offsets: np.ndarray) -> np.ndarray:
    """Each flat element's index in its own row, int64."""
    index: np.ndarray = np.arange(offsets[-1]) - np.repeat(offsets[:-1], np.diff(offsets))
    return index


def flat(column: pa.ChunkedArray) -> Flat:
    """A list column as flat values and bounds, int64 `[rows + 1]`, that start at 0. Null rows are empty."""
    array = column.combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy()
    return pc.list_flatten(array).to_numpy(zero_copy_only=False), offsets_of(lengths)


def ragged(values: np.ndarray, offsets: np.ndarray, kind: pa.DataType) -> pa.ListArray:
    """A list column from flat values and row bounds."""
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values).cast(kind))


def expand(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All indices of the ranges `[start, end)` one after another, and the range that each is from; both int64."""
    counts = np.maximum(ends - starts, 0)
    owner = np.repeat(np.arange(len(starts)), counts)
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + starts[owner], owner


def add_up(owner: np.ndarray, ids: np.ndarray, masses: np.ndarray, owners: int) -> tuple[np.ndarray, ...]:
    """Sum masses of the same (owner, id). Returns counts `[owners]`, ids and masses, flat in order of owner and id."""
    if not len(ids):
        return np.zeros(owners, np.int64), ids, masses
    width = int(ids.max()) + 1
    keys, inverse = np.unique(owner * width + ids, return_inverse=True)
    return np.bincount(keys // width, minlength=owners), keys % width, np.bincount(inverse, masses, len(keys))


def first_of(offsets: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """bool, flat: the first `counts[r]` elements of each row."""
    mask: np.ndarray = index_in_row(offsets) < np.repeat(counts, np.diff(offsets))
    return mask


def length_batches(lengths: list[int], tokens: int | None, rows: int | None = None) -> list[list[int]]:
    """Rows in batches of like length, the shortest first; each at most `tokens`, padding included, and at most `rows`.

    A longer row is a batch of its own.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        more = len(batches[-1]) + 1 if batches else 1
        if batches and (tokens is None or more * lengths[i] <= tokens) and (rows is None or more <= rows):
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches

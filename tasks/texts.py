"""Two tokenizations of given texts side by side, without a model's weights: what `potstill align` shows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from configs.errors import BadInput
from storage.schemas import ALIGNED
from storage.store import write_parquet
from tasks.models import Side
from tasks.prompts import read_rows
from tasks.ragged import offsets_of, ragged
from tasks.tokens.align import Kind, align
from tasks.tokens.token_bytes import TokenBytes

COLUMNS = ["rollout_id", "student_ends", "teacher_ends", "byte_ends", "kind", "status", "supervised_bytes", "dropped_bytes"]
VISIBLE = str.maketrans({" ": "·", "\n": "↵", "\t": "→", "\r": "␍"})


def aligned_texts(names: list[str], texts: list[str], own: Side, other: Side) -> pa.Table:
    """Units of `texts` under two tokenizers: the columns of `aligned` that need no model, one row a text and in order.

    `supervised_bytes` are those in a unit; a text that a tokenizer cannot spell byte for byte is dropped, and its
    `status` says whose. There is no stop unit: a text is not a completion.
    """
    student, teacher = own.encoder.encode(texts), other.encoder.encode(texts)
    status = [
        "student_lossy" if s is None else "teacher_lossy" if t is None else "ok" for s, t in zip(student, teacher, strict=True)
    ]
    good = [state == "ok" for state in status]
    s_lengths, s_offsets = _lengths(student, own, good)
    t_lengths, t_offsets = _lengths(teacher, other, good)
    units = align(s_lengths, s_offsets, t_lengths, t_offsets, np.zeros(len(texts), bool))
    sizes = np.array([len(text.encode()) for text in texts], np.int64)
    schema = pa.schema([ALIGNED.field(name) for name in COLUMNS])
    return pa.table(
        {
            "rollout_id": names,
            "student_ends": ragged(units.student_ends, units.offsets, pa.int32()),
            "teacher_ends": ragged(units.teacher_ends, units.offsets, pa.int32()),
            "byte_ends": ragged(units.byte_ends, units.offsets, pa.int32()),
            "kind": ragged(units.kind, units.offsets, pa.int8()),
            "status": status,
            "supervised_bytes": pa.array(np.where(good, sizes, 0), pa.int32()),
            "dropped_bytes": pa.array(np.where(good, 0, sizes), pa.int32()),
        },
        schema,
    )


def read_texts(path: Path) -> tuple[list[str], list[str]]:
    """Names and texts of a .jsonl or .parquet file: its `text` column, named by `rollout_id` or the row's number."""
    rows = list(read_rows(path, "--file"))
    if missing := next(
        (n for n, row in enumerate(rows, 1) if not isinstance(row, dict) or not isinstance(row.get("text"), str)), 0
    ):
        raise BadInput(f"--file: {path}: row {missing} has no `text`; give rows with a `text` column")
    return [str(row.get("rollout_id", number)) for number, row in enumerate(rows)], [row["text"] for row in rows]


def write(table: pa.Table, path: Path) -> None:
    try:
        write_parquet(table, path)
    except OSError as error:
        raise BadInput(f"--out: {path} cannot be written: {error.strerror or error}") from None


def _lengths(rows: list[list[int] | None], text_side: Side, good: list[bool]) -> tuple[np.ndarray, np.ndarray]:
    kept = [ids if ids is not None and ok else [] for ids, ok in zip(rows, good, strict=True)]
    flat = np.array([i for ids in kept for i in ids], np.int64)
    return text_side.vocabulary.lengths[flat], offsets_of(np.array([len(ids) for ids in kept], np.int64))


def summary(table: pa.Table) -> dict[str, Any]:
    """Units by kind and bytes by fate, over all rows."""
    kinds = np.bincount(table["kind"].combine_chunks().flatten().to_numpy(), minlength=len(Kind))
    total = max(int(kinds.sum()), 1)
    return {
        "texts": len(table),
        "dropped texts": sum(state != "ok" for state in table["status"].to_pylist()),
        "units": int(kinds.sum()),
        **{kind.name.lower(): f"{kinds[kind] / total:.1%}" for kind in Kind if kind != Kind.STOP},
        "bytes in units": sum(table["supervised_bytes"].to_pylist()),
        "bytes dropped": sum(table["dropped_bytes"].to_pylist()),
    }


def two_rows(text: str, row: dict[str, Any], own: Side, other: Side, width: int) -> Iterator[tuple[str, str]]:
    """A text as pairs of lines, student above teacher, at most `width` wide: units between ┃, their tokens between |."""
    sides = []
    for text_side, ends in ((own, row["student_ends"]), (other, row["teacher_ends"])):
        pieces = [piece(text_side.beta, i) for i in text_side.encoder.encode([text])[0] or []]
        sides.append(["|".join(pieces[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)])
    lines = ("┃", "┃")
    for student, teacher in zip(*sides, strict=True):
        size = max(len(student), len(teacher))
        if len(lines[0]) > 1 and len(lines[0]) + size + 1 > width:
            yield lines
            lines = ("┃", "┃")
        lines = (f"{lines[0]}{student:<{size}}┃", f"{lines[1]}{teacher:<{size}}┃")
    yield lines


def piece(beta: TokenBytes, token_id: int) -> str:
    """A token's bytes for the eye: spaces and line ends visible, bytes that are no character as \\xNN."""
    return (beta.values[token_id] or b"").decode(errors="backslashreplace").translate(VISIBLE)

"""Two tokenizations of given texts side by side, without a model's weights: what `potstill align` shows."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from configs.errors import BadInput
from storage.artifacts import write_parquet
from storage.schemas import ALIGNED
from tasks.models.text import Side
from tasks.rows.files import read_file
from tasks.tokens.align import Kind, align, unit_sizes
from tasks.tokens.ragged import Flat, flat, offsets_of, ragged
from tasks.tokens.token_bytes import TokenBytes
from tasks.tokens.vocabulary import Vocabulary, count_overlap

COLUMNS = ["rollout_id", "student_ends", "teacher_ends", "byte_ends", "kind", "status", "supervised_bytes", "dropped_bytes"]
VISIBLE = str.maketrans({" ": "·", "\n": "↵", "\t": "→", "\r": "␍"})
LENGTHS = ("1", "2", "3", "4+")


@dataclass(frozen=True)
class AlignedTexts:
    """Texts under two tokenizers.

    `table` has the columns of `aligned` that need no model, one row a text and in order. `supervised_bytes` are those
    in a unit; a text that a tokenizer cannot spell byte for byte is dropped, and its `status` says whose. There is no
    stop unit: a text is not a completion. `student` and `teacher` are the ids of all texts that are not dropped.
    """

    table: pa.Table
    student: np.ndarray
    teacher: np.ndarray


def align_texts(names: list[str], texts: list[str], own: Side, other: Side) -> AlignedTexts:
    student, teacher = own.encoder.encode(texts), other.encoder.encode(texts)
    status = [
        "student_lossy" if s is None else "teacher_lossy" if t is None else "ok" for s, t in zip(student, teacher, strict=True)
    ]
    good = [state == "ok" for state in status]
    s_ids, s_offsets = _flat(student, good)
    t_ids, t_offsets = _flat(teacher, good)
    s_lengths, t_lengths = own.vocabulary.lengths[s_ids], other.vocabulary.lengths[t_ids]
    units = align(s_lengths, s_offsets, t_lengths, t_offsets, np.zeros(len(texts), bool))
    sizes = np.array([len(text.encode()) for text in texts], np.int64)
    schema = pa.schema([ALIGNED.field(name) for name in COLUMNS])
    table = pa.table(
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
    return AlignedTexts(table, s_ids, t_ids)


def read_texts(path: Path) -> tuple[list[str], list[str]]:
    """Names and texts of a file: its `text` column, named by `rollout_id` or the row's number."""
    rows = [row for _, row in read_file(path, "--file")]
    if missing := next(
        (n for n, row in enumerate(rows, 1) if not isinstance(row, dict) or not isinstance(row.get("text"), str)), 0
    ):
        raise BadInput(f"--file: {path}: row {missing} has no `text`; give rows with a `text` column")
    return [str(row.get("rollout_id", number)) for number, row in enumerate(rows)], [row["text"] for row in rows]


def write_units(table: pa.Table, path: Path) -> None:
    try:
        write_parquet(table, path)
    except OSError as error:
        raise BadInput(f"--out: {path} cannot be written: {error.strerror or error}") from None


def _flat(rows: list[list[int] | None], good: list[bool]) -> Flat:
    kept = [ids if ids is not None and ok else [] for ids, ok in zip(rows, good, strict=True)]
    return np.array([i for ids in kept for i in ids], np.int64), offsets_of(np.array([len(ids) for ids in kept], np.int64))


def summarise(aligned: AlignedTexts, own: Side, other: Side) -> dict[str, list[dict[str, Any]]]:
    """Tables by title, over all texts: units by kind and bytes by fate; what of either side matches; units by length."""
    table = aligned.table
    kinds = np.bincount(flat(table["kind"])[0], minlength=len(Kind))
    totals = {
        "texts": len(table),
        "dropped texts": sum(state != "ok" for state in table["status"].to_pylist()),
        "units": int(kinds.sum()),
        **{kind.name.lower(): _share(kinds[kind], kinds.sum()) for kind in Kind if kind != Kind.STOP},
        "bytes in units": sum(table["supervised_bytes"].to_pylist()),
        "bytes dropped": sum(table["dropped_bytes"].to_pylist()),
    }
    return {
        "Alignment": [totals],
        "Tokens": _matched(aligned, own.vocabulary, other.vocabulary),
        "Units by length": _by_length(table),
    }


def _matched(aligned: AlignedTexts, own: Vocabulary, other: Vocabulary) -> list[dict[str, Any]]:
    """Of each vocabulary's entries and of the tokens of the texts: the share whose bytes the other has as a token, too."""
    both = count_overlap(student=own, teacher=other)
    sides = (("student", own, other, aligned.student, both.student), ("teacher", other, own, aligned.teacher, both.teacher))
    rows = []
    for role, this, that, ids, entries in sides:
        used, counts = np.unique(ids, return_counts=True)
        matched = counts[[this.beta.values[i] in that.by_bytes for i in used]].sum()
        rows.append(
            {
                "": role,
                "entries": entries,
                "matched entries": _share(both.shared, entries),
                "Jaccard": f"{both.jaccard:.3f}",
                "tokens": len(ids),
                "matched tokens": _share(matched, len(ids)),
            }
        )
    return rows


def _by_length(table: pa.Table) -> list[dict[str, Any]]:
    """Shares of units, and of the bytes in them, by how many tokens or bytes a unit has."""
    sizes = {}
    for name in ("student", "teacher", "byte"):
        ends, offsets = flat(table[f"{name}_ends"])
        sizes[name] = unit_sizes(ends.astype(np.int64), offsets)
    whole = np.ones(len(sizes["byte"]), np.int64)
    measures = {
        "units by student tokens": (sizes["student"], whole),
        "units by teacher tokens": (sizes["teacher"], whole),
        "units by bytes": (sizes["byte"], whole),
        "bytes by student tokens": (sizes["student"], sizes["byte"]),
        "bytes by teacher tokens": (sizes["teacher"], sizes["byte"]),
    }
    rows = []
    for name, (length, weight) in measures.items():
        counts = np.bincount(np.minimum(length, len(LENGTHS)) - 1, weight, len(LENGTHS))
        rows.append({"": name, **{label: _share(n, counts.sum()) for label, n in zip(LENGTHS, counts, strict=True)}})
    return rows


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "–"


def format_pairs(text: str, row: dict[str, Any], own: Side, other: Side, width: int) -> Iterator[tuple[str, str]]:
    """A text as pairs of lines, student above teacher, at most `width` wide: units between ┃, their tokens between |."""
    sides = []
    for text_side, ends in ((own, row["student_ends"]), (other, row["teacher_ends"])):
        pieces = [show_token(text_side.beta, i) for i in text_side.encoder.encode([text])[0] or []]
        sides.append(["|".join(pieces[start:end]) for start, end in pairwise([0, *ends])])
    lines = ("┃", "┃")
    for student, teacher in zip(*sides, strict=True):
        size = max(len(student), len(teacher))
        if len(lines[0]) > 1 and len(lines[0]) + size + 1 > width:
            yield lines
            lines = ("┃", "┃")
        lines = (f"{lines[0]}{student:<{size}}┃", f"{lines[1]}{teacher:<{size}}┃")
    yield lines


def show_token(beta: TokenBytes, token_id: int) -> str:
    """A token's bytes for the eye: spaces and line ends visible, bytes that are no character as \\xNN."""
    return (beta.values[token_id] or b"").decode(errors="backslashreplace").translate(VISIBLE)

"""Two tokenizations of texts side by side, without a model's weights: what `potstill align` shows."""

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
from tasks.rows.messages import is_text
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

    `table` has the columns of `aligned` that need no model: one row per text, in order. `supervised_bytes` are the bytes in
    units. A text that a tokenizer cannot spell byte for byte is dropped, and its `status` names that side. There is no stop
    unit, because a text is not a completion.
    """

    table: pa.Table
    student: np.ndarray  # int64: the student's ids of all texts that are not dropped, flat
    teacher: np.ndarray  # int64: the teacher's


def align_texts(names: list[str], texts: list[str], student: Side, teacher: Side) -> AlignedTexts:
    """Align the two tokenizations of each text; `names` become the `rollout_id` of the rows."""
    student_ids, teacher_ids = student.encoder.encode(texts), teacher.encoder.encode(texts)
    status = [
        "student_lossy" if s is None else "teacher_lossy" if t is None else "ok"
        for s, t in zip(student_ids, teacher_ids, strict=True)
    ]
    good = [state == "ok" for state in status]
    s_ids, s_offsets = _flatten(student_ids, good)
    t_ids, t_offsets = _flatten(teacher_ids, good)
    s_lengths, t_lengths = student.vocabulary.lengths[s_ids], teacher.vocabulary.lengths[t_ids]
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
    """Names and texts of a file: its `text` column, and its `rollout_id` or the row's number."""
    rows = [row for _, row in read_file(path, "--file")]
    if missing := next((n for n, row in enumerate(rows, 1) if not isinstance(row, dict) or not is_text(row.get("text"))), 0):
        raise BadInput(f"--file: {path}: row {missing} has no `text`; give every row a text in a `text` column")
    return [str(row.get("rollout_id", number)) for number, row in enumerate(rows)], [row["text"] for row in rows]


def write_units(table: pa.Table, path: Path) -> None:
    """Write the table of aligned texts as Parquet. Raises BadInput where `path` cannot be written."""
    try:
        write_parquet(table, path)
    except OSError as error:
        raise BadInput(f"--out: {path} cannot be written: {error.strerror or error}; give another path") from None


def _flatten(rows: list[list[int] | None], good: list[bool]) -> Flat:
    kept = [ids if ids is not None and ok else [] for ids, ok in zip(rows, good, strict=True)]
    return np.array([i for ids in kept for i in ids], np.int64), offsets_of(np.array([len(ids) for ids in kept], np.int64))


def summarise_alignment(aligned: AlignedTexts, student: Side, teacher: Side) -> dict[str, list[dict[str, Any]]]:
    """Tables by title, over all texts: units by kind and their bytes; shares of matched tokens; units by length."""
    table = aligned.table
    kinds = np.bincount(flat(table["kind"])[0], minlength=len(Kind))
    totals = {
        "texts": len(table),
        "dropped texts": sum(state != "ok" for state in table["status"].to_pylist()),
        "units": int(kinds.sum()),
        **{kind.name.lower(): _format_share(kinds[kind], kinds.sum()) for kind in Kind if Kind.STOP < kind < Kind.MARKER},
        "bytes in units": sum(table["supervised_bytes"].to_pylist()),
        "bytes dropped": sum(table["dropped_bytes"].to_pylist()),
    }
    return {
        "Alignment": [totals],
        "Tokens": _count_matches(aligned, student.vocabulary, teacher.vocabulary),
        "Units by length": _count_lengths(table),
    }


def _count_matches(aligned: AlignedTexts, student: Vocabulary, teacher: Vocabulary) -> list[dict[str, Any]]:
    """Shares of each vocabulary's entries, and of its tokens in the texts, whose bytes are a token of the other one."""
    overlap = count_overlap(student=student, teacher=teacher)
    sides = (
        ("student", student, teacher, aligned.student, overlap.student),
        ("teacher", teacher, student, aligned.teacher, overlap.teacher),
    )
    rows = []
    for role, vocabulary, counterpart, ids, entries in sides:
        used, counts = np.unique(ids, return_counts=True)
        matched = counts[[vocabulary.beta.values[i] in counterpart.by_bytes for i in used]].sum()
        rows.append(
            {
                "": role,
                "entries": entries,
                "matched entries": _format_share(overlap.shared, entries),
                "Jaccard": f"{overlap.jaccard:.3f}",
                "tokens": len(ids),
                "matched tokens": _format_share(matched, len(ids)),
            }
        )
    return rows


def _count_lengths(table: pa.Table) -> list[dict[str, Any]]:
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
        rows.append({"": name, **{label: _format_share(n, counts.sum()) for label, n in zip(LENGTHS, counts, strict=True)}})
    return rows


def _format_share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "–"


def format_pairs(text: str, row: dict[str, Any], student: Side, teacher: Side, width: int) -> Iterator[tuple[str, str]]:
    """A text as pairs of lines, student above teacher, at most `width` wide: units between ┃, their tokens between |."""
    sides = []
    for text_side, ends in ((student, row["student_ends"]), (teacher, row["teacher_ends"])):
        pieces = [format_token(text_side.beta, i) for i in text_side.encoder.encode([text])[0] or []]
        sides.append(["|".join(pieces[start:end]) for start, end in pairwise([0, *ends])])
    lines = ("┃", "┃")
    for above, below in zip(*sides, strict=True):
        size = max(len(above), len(below))
        if len(lines[0]) > 1 and len(lines[0]) + size + 1 > width:
            yield lines
            lines = ("┃", "┃")
        lines = (f"{lines[0]}{above:<{size}}┃", f"{lines[1]}{below:<{size}}┃")
    yield lines


def format_token(beta: TokenBytes, token_id: int) -> str:
    """A token's bytes as visible text: spaces and line ends as symbols, bytes that are no character as \\xNN."""
    return (beta.values[token_id] or b"").decode(errors="backslashreplace").translate(VISIBLE)

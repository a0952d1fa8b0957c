"""Both text sides of a recipe as a pair: what each has in place of the other's control tokens (MATHS.md §3)."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from configs.errors import BadInput
from configs.schema import Recipe
from tasks.models.text import Side
from tasks.tokens.markers import NO_MARKERS, ONE_TOKENIZER, Answer, Markers, Path, spell, translate
from tasks.tokens.ragged import offsets_of


def make_markers(recipe: Recipe, *, student: Side, teacher: Side) -> Markers:
    """The markers of a recipe, as they are read in the student's answers. Raises BadInput where a side cannot write one."""
    if student.vocabulary.same_as(teacher.vocabulary):
        return ONE_TOKENIZER
    config = recipe.teacher
    if config is None:
        return NO_MARKERS
    pairs = [(_path(student, own), _path(teacher, other)) for own, other in config.markers]
    for n, (own, _) in enumerate(pairs):
        if own.spelling in [before.spelling for before, _ in pairs[:n]]:
            raise BadInput(f"teacher.markers: {config.markers[n][0]!r} is paired twice; pair each of the student's once")
    return Markers(tuple(pairs), skip=config.unpaired == "skip")


def marker_inputs(recipe: Recipe) -> dict[str, Any]:
    """What of the markers goes into keys: nothing where the recipe says nothing of them."""
    if recipe.teachers:
        several = {name: given for name, view in recipe.by_teacher().items() if (given := marker_inputs(view))}
        return {"markers_by_teacher": several} if several else {}
    config = recipe.teacher
    if config is None or (not config.markers and config.unpaired == "end"):
        return {}
    return {"markers": config.model_dump(mode="json", include={"markers", "unpaired"})}


def _path(text_side: Side, text: str) -> Path:
    """A marker's tokens: special tokens that its text names, and the encoding of what is between them."""
    added, beta = text_side.tokenizer.backend_tokenizer.get_added_tokens_decoder(), text_side.beta
    ids_of = {token.content: i for i, token in added.items() if i < len(beta.values) and not beta.lengths[i]}
    longest = sorted(ids_of, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, longest))})" if longest else "(?!)", text)
    ids: list[int] = []
    for part in filter(None, parts):
        encoded = [ids_of[part]] if part in ids_of else text_side.encoder.encode([part])[0]
        if encoded is None:
            raise BadInput(f"{text_side.ref.path}: teacher.markers: its tokenizer cannot spell {text!r}; give other characters")
        ids += encoded
    if stops := [i for i in ids if i in text_side.stop_ids]:
        name = text_side.tokenizer.convert_ids_to_tokens(stops[0])
        raise BadInput(f"{text_side.ref.path}: teacher.markers: {text!r} has {name}, which ends its answers; leave that out")
    return Path(spell(beta, ids), tuple(ids))


def find_answers(rows: Sequence[dict[str, Any]], text_side: Side, markers: Markers) -> dict[int, Answer]:
    """By place, the answers of `rows` with markers or control tokens. Rows have `text`, and `token_ids` if they are more."""
    ids = [row.get("token_ids") or [] for row in rows]
    values = np.array([i for row in ids for i in row], np.int64)
    offsets = offsets_of(np.array([len(row) for row in ids], np.int64))
    return markers.find([row["text"] or "" for row in rows], (values, offsets), text_side.beta, text_side.stop_ids)


def hide_ids(rows: pa.Table, text_side: Side, markers: Markers) -> pa.Table:
    """`rows` with `token_ids` only where an answer is more than its text; without that column where none is."""
    answers = find_answers(rows.select(["text", "token_ids"]).to_pylist(), text_side, markers)
    shown = np.isin(np.arange(len(rows)), list(answers))
    others = rows.drop_columns(["token_ids"])
    if not answers:
        return others
    ids = rows["token_ids"].combine_chunks()
    return others.append_column("token_ids", pc.if_else(pa.array(shown), ids, pa.nulls(len(rows), ids.type)))


def teacher_ids(rows: Sequence[dict[str, Any]], *, student: Side, teacher: Side, markers: Markers) -> list[list[int] | None]:
    """Each completion in the teacher's ids, its stop included; None where its tokenizer cannot spell the text.

    `rows` have `token_ids`, `text` and `finish_reason`. With one tokenizer on both sides the sampled ids themselves are used:
    a student may split a text in other ways than `encode` does. Otherwise markers are the teacher's own.
    """
    if markers.same:
        return [row["token_ids"] or None for row in rows]
    encoded = _encode(rows, find_answers(rows, student, markers), teacher)
    stop = teacher.stop_ids[:1]
    return [
        None if ids is None else ids + stop * (row["finish_reason"] == "stop") for ids, row in zip(encoded, rows, strict=True)
    ]


def student_ids(
    rows: Sequence[dict[str, Any]], *, student: Side, teacher: Side, markers: Markers
) -> list[tuple[list[int] | None, bool]]:
    """The teacher's completions in the student's ids, without a stop, and whether that is all of each; None as above.

    `rows` have `token_ids` and `text`; `markers` are as they are read in the student's answers.
    """
    answers = find_answers(rows, teacher, markers.turned())
    whole = [n not in answers or answers[n].whole for n in range(len(rows))]
    return list(zip(_encode(rows, answers, student), whole, strict=True))


def _encode(rows: Sequence[dict[str, Any]], answers: dict[int, Answer], other: Side) -> list[list[int] | None]:
    """Each row in the ids of the other side: in parts where it has `answers`, else its text."""
    encoded = other.encoder.encode([row["text"] or "" for n, row in enumerate(rows) if n not in answers])
    for n, ids in zip(answers, translate(list(answers.values()), other.encoder), strict=True):
        encoded.insert(n, ids)
    return encoded

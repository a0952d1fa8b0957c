"""Which of several teachers grades a row: said by the columns of its prompt (`teachers.where`)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from configs.errors import BadInput
from configs.teachers import Teacher, choose_teacher
from storage.artifacts import Artifact, read_table
from storage.lineage import digest_json
from tasks.rows.messages import prompts_of

_assigned: dict[tuple[str, str], np.ndarray] = {}  # by digests of the prompts and of the teachers' `where`


def assign_teachers(teachers: Sequence[Teacher], prompts: Artifact) -> np.ndarray:
    """int64 `[rows]`: which of the teachers grades the rows of each of the committed `prompts`."""
    key = prompts.digest, digest_json([[teacher.name, teacher.where] for teacher in teachers])
    if key not in _assigned:
        _assigned[key] = assign_rows(teachers, read_table(prompts))
    return _assigned[key]


def assign_rows(teachers: Sequence[Teacher], prompts: pa.Table) -> np.ndarray:
    """The same of a table. Raises BadInput where no teacher takes a row."""
    found = [choose_teacher(teachers, prompt.fields) for prompt in prompts_of(prompts)]
    if None in found:
        fields = prompts_of(prompts.slice(found.index(None), 1))[0].fields
        raise BadInput(explain_untaken(teachers, fields, f"prompt {prompts['prompt_id'][found.index(None)].as_py()}"))
    return np.array(found, np.int64)


def find_rows(teachers: Sequence[Teacher], prompts: pa.Table, name: str) -> np.ndarray:
    """bool `[rows]`: the prompts whose rows the teacher of this name grades; all of them where it has no name."""
    if not name:
        return np.ones(len(prompts), bool)
    found: np.ndarray = assign_rows(teachers, prompts) == [teacher.name for teacher in teachers].index(name)
    return found


def check_teachers(
    teachers: Sequence[Teacher],
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    *,
    all_taken: bool = True,
    whole: bool = True,
) -> None:
    """Raise BadInput where a `where` names a column that no row has, or a teacher takes no row, or one is taken by none.

    `rows` are the fields of each behind the place where it stands. Rows that no teacher takes are left out, and no fault,
    unless `all_taken`. Where these are not the `whole` of the rows, a teacher may take others.
    """
    if not teachers:
        return
    known: set[str] = set()
    taken = [0] * len(teachers)
    untaken: tuple[str, Mapping[str, Any]] | None = None
    for place, row in rows:
        known |= row.keys()
        at = choose_teacher(teachers, row)
        if at is None:
            untaken = untaken or (place, row)
        else:
            taken[at] += 1
    for teacher in teachers:
        for column in teacher.where.keys() - known:
            raise BadInput(
                f"teachers.{teacher.name}.where.{column}: no row of the prompts has this column; there are "
                f"{', '.join(sorted(known))}"
            )
    if untaken is not None and all_taken:
        raise BadInput(explain_untaken(teachers, untaken[1], untaken[0]))
    for teacher, count in zip(teachers, taken, strict=True):
        if whole and not count:
            raise BadInput(f"teachers.{teacher.name}: it takes no row of the prompts; correct its `where`, or leave it out")


def explain_untaken(teachers: Sequence[Teacher], row: Mapping[str, Any], place: str) -> str:
    """One line about a row that no teacher takes."""
    columns = dict.fromkeys(column for teacher in teachers for column in teacher.where)
    has = ", ".join(f"{column} = {row[column]!r:.40}" if column in row else f"no {column}" for column in columns)
    return f"teachers: none takes {place} ({has}); give a teacher `where` that fits it, or a last one without `where`"

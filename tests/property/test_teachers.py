"""Several teachers (MATHS.md §11): the loss is the sum over all rows' terms, each under its own teacher's vocabulary."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from toys import student_ref, teacher_ref
from training import CPU, OBJECTIVES, PLAIN, completions_of, loss_and_gradient, student_module, trainable_rows

from configs.objectives import Objective
from configs.teachers import Teacher, choose_teacher
from tasks import objectives
from tasks.models.reference import ModelRef
from tasks.models.text import side
from tasks.models.weights import load_weights
from tasks.training.batches import collate
from tasks.training.student import Student

TEACHERS = [teacher_ref, student_ref]  # of two vocabularies
TAUGHT = [objective for objective in OBJECTIVES if objective.needs_teacher]


def named(objective: Objective) -> str:
    return "-".join(map(str, objective.model_dump().values()))


def rows_of(objective: Objective, refs: list[ModelRef]) -> list[pa.Table]:
    """Some rows for each teacher, and its place among them."""
    completions = completions_of(PLAIN)
    tables = [trainable_rows(objective, ref, completions[n :: len(refs)]) for n, ref in enumerate(refs)]
    return [t.append_column("teacher", pa.array([n] * len(t), pa.int32())) for n, t in enumerate(tables)]


def student_of(objective: Objective, refs: list[ModelRef], chunk_positions: int = 10**6) -> Student:
    own = side(student_ref())
    built = [objectives.build(objective, student=own.vocabulary, teacher=side(ref).vocabulary) for ref in refs]
    return Student(load_weights(student_ref(), torch.float32).train(), built, len(own.beta.values), chunk_positions)


@pytest.mark.parametrize("objective", TAUGHT, ids=named)
@pytest.mark.parametrize("chunk_positions", [5, 10**6])
def test_the_loss_of_two_teachers_is_that_of_two_runs_terms_together(objective: Objective, chunk_positions: int) -> None:
    refs = [ref() for ref in TEACHERS]
    tables = rows_of(objective, refs)
    alone = [
        loss_and_gradient(student_module(objective, ref), collate(table.drop_columns(["teacher"]), 0, CPU))
        for ref, table in zip(refs, tables, strict=True)
    ]
    mixed = pa.concat_tables(tables)
    mixed = mixed.take(np.random.default_rng(0).permutation(len(mixed)))
    loss, gradient = loss_and_gradient(student_of(objective, refs, chunk_positions), collate(mixed, 0, CPU))
    assert len({len(t) for t in tables} - {0}) > 0
    assert all(len(table) for table in tables)
    assert loss == pytest.approx(sum(part for part, _ in alone), rel=1e-5)
    torch.testing.assert_close(gradient, alone[0][1] + alone[1][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", TAUGHT, ids=named)
def test_the_order_of_teachers_changes_nothing(objective: Objective) -> None:
    refs = [ref() for ref in TEACHERS]
    mixed = pa.concat_tables(rows_of(objective, refs))
    turned = mixed.set_column(mixed.column_names.index("teacher"), "teacher", pa.compute.subtract(1, mixed["teacher"]))
    wanted = loss_and_gradient(student_of(objective, refs), collate(mixed, 0, CPU))
    loss, gradient = loss_and_gradient(student_of(objective, refs[::-1]), collate(turned.cast(mixed.schema), 0, CPU))
    assert loss == pytest.approx(wanted[0], rel=1e-5)
    torch.testing.assert_close(gradient, wanted[1], rtol=1e-4, atol=1e-5)


def test_rows_under_the_wrong_teacher_have_another_loss() -> None:
    """What the tests above would not see, if a row's teacher were never looked at."""
    objective = next(o for o in OBJECTIVES if o.name == "gold")
    refs = [ref() for ref in TEACHERS]
    mixed = pa.concat_tables(rows_of(objective, refs))
    right, wrong = (loss_and_gradient(student_of(objective, r), collate(mixed, 0, CPU))[0] for r in (refs, refs[::-1]))
    assert abs(right - wrong) > 1e-3


ROWS = [{"task": "sums", "level": 1}, {"task": "words"}, {"task": "sums", "level": True}, {"level": 1.0}, {}]


@pytest.mark.parametrize(
    ("wheres", "chosen"),
    [
        ([{"task": "sums"}, {}], [0, 1, 0, 1, 1]),
        ([{"level": 1}, {"task": ["words", "sums"]}], [0, 1, 1, 0, None]),
        ([{"level": True}, {"task": "sums", "level": 1}], [1, None, 0, None, None]),
        ([{"task": ["words"]}, {"task": "words"}], [None, 0, None, None, None]),
    ],
)
def test_the_first_teacher_that_fits_takes_a_row(wheres: list[dict[str, object]], chosen: list[int | None]) -> None:
    teachers = [Teacher.model_validate({"name": f"t{n}", "model": "m", "where": where}) for n, where in enumerate(wheres)]
    assert [choose_teacher(teachers, row) for row in ROWS] == chosen

"""Stored work is used again while a stage's `CODE` is the same: a stage that makes something else must raise it."""

import ast
import re
from pathlib import Path

import pytest
from cases import MODULES, Case, cases, differ, hold

from tasks.objectives.alm import AlmObjective
from tasks.objectives.base import Pairing, Projection

CASES = {case.name: case for case in cases()}
CHECKOUT = Path(__file__).parents[2]


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_a_stage_makes_what_it_made(case: Case, tmp_path: Path) -> None:
    assert hold(case, tmp_path) is None


def test_every_constant_has_a_case() -> None:
    """Each `…CODE` of a stage is held by a case, so that none of them goes stale unseen."""
    found = {
        f"tasks/{path.name} {target.id}"
        for path in (CHECKOUT / "tasks").rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and re.fullmatch(r"(\w+_)?CODE", target.id)
    }
    assert found == {case.constant for case in CASES.values()}
    assert len(MODULES) == 12


def test_another_projection_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`align`'s number covers every objective's `project`: the message names the stage, and the number to raise it to."""
    project = AlmObjective.project

    def shifted(self: AlmObjective, pairing: Pairing) -> Projection:
        projection = project(self, pairing)
        projection.logprobs[:] -= 0.01
        return projection

    monkeypatch.setattr(AlmObjective, "project", shifted)
    said = hold(CASES["aligned-alm-topk"], tmp_path)
    assert said is not None
    assert "tasks/align.py makes something else" in said
    assert "target_logprobs" in said
    assert f"Raise CODE to {CASES['aligned-alm-topk'].code + 1}" in said
    assert hold(CASES["aligned-opd-topk"], tmp_path / "other") is None


def test_a_raised_number_asks_for_new_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["vocab-student"]
    monkeypatch.setattr(MODULES["tasks/vocab.py"], "CODE", case.code + 1)
    assert "make golden" in str(hold(case, tmp_path))


def test_tables_differ_in_more_than_rounding() -> None:
    import pyarrow as pa

    one = pa.table({"a": [[1.0, 2.0]], "b": ["x"]})
    assert differ(pa.table({"a": [[1.0 + 1e-5, 2.0]], "b": ["x"]}), one) is None
    assert "column a" in str(differ(pa.table({"a": [[1.01, 2.0]], "b": ["x"]}), one))
    assert "column b" in str(differ(pa.table({"a": [[1.0, 2.0]], "b": ["y"]}), one))
    assert "rows" in str(differ(one.slice(0, 0), one))
    assert "columns" in str(differ(one.select(["a"]), one))

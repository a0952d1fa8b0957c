"""The notebook: its cells run from top to bottom on a finished run, and their figures are the run's."""

import ast
import json
from typing import Any

import altair as alt
import polars as pl
import pytest
import vl_convert
from helpers import CHECKOUT

from storage.read import scan

NOTEBOOK = CHECKOUT / "tasks" / "views" / "analysis.ipynb"
RUN = 'run = str(Path(storage.__file__).parents[1] / "runs" / "quickstart-seed0")'


def execute(source: str, scope: dict[str, Any]) -> Any:
    """Run a cell; the value of its last expression, as a notebook shows it."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), scope)
    return last and eval(compile(ast.Expression(last.value), "cell", "eval"), scope)


@pytest.fixture(scope="module")
def executed(tiny) -> tuple[dict[str, Any], list[Any]]:
    cells = ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells[0].count(RUN) == 1
    scope: dict[str, Any] = {}
    return scope, [execute(cell.replace(RUN, f"run = {str(tiny)!r}"), scope) for cell in cells]


def test_it_is_kept_without_outputs():
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])


def test_every_cell_shows_something_and_the_charts_can_be_drawn(executed):
    _, shown = executed
    assert shown[0] == 2
    charts = [value for value in shown if isinstance(value, alt.TopLevelMixin)]
    assert len(charts) == 4
    for chart in charts:
        svg = vl_convert.vegalite_to_svg(chart.to_dict())
        assert svg.count("<path") > 5
        assert "NaN" not in svg
    assert all(isinstance(value, alt.TopLevelMixin | pl.DataFrame | int) for value in shown)


def test_its_figures_are_the_runs(executed, tiny):
    """Units that are cut from token ids add up to them; sums are those of whole rows."""
    scope, shown = executed
    aligned = scan(str(tiny), "aligned").filter(pl.col("student_logprobs").is_not_null()).collect()
    whole = aligned["student_logprobs"].list.sum().sum() - aligned["teacher_logprobs"].list.sum().sum()
    assert scope["units"]["log_ratio"].sum() == pytest.approx(whole, rel=1e-4)
    assert scope["units"].height == aligned["student_ends"].list.len().sum()

    joined = scope["units"].group_by("round", "rollout_id", maintain_order=True).agg(pl.col("ids").flatten())
    rollouts = scan(str(tiny), "rollouts").select("round", "rollout_id", "token_ids").collect()
    for row in joined.join(rollouts, on=["round", "rollout_id"]).iter_rows(named=True):
        assert row["token_ids"][: len(row["ids"])] == row["ids"]

    evals = scan(str(tiny), "evals").filter(pl.col("decoding") == "sampled").collect()
    assert scope["by_prompt"]["teacher"].mean() == pytest.approx(evals.filter(model="teacher")["correct"].mean())
    assert scope["by_prompt"]["student"].mean() == pytest.approx(evals.filter(model="student", round=2)["correct"].mean())

    places = shown[-1]
    assert places["log_ratio"].is_sorted(descending=True)
    assert places["teacher_would_write"].list.len().to_list() == [4] * places.height

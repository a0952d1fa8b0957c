"""What the README says about a run's tables holds, as it is written there."""

import re
from typing import get_args

import polars as pl
from helpers import CHECKOUT

from configs.objectives import Objective

README = (CHECKOUT / "README.md").read_text()


def test_queries_of_the_readme(tiny, tmp_path, monkeypatch):
    """Both queries run on a finished run, one after the other as in a notebook, and answer what their captions promise."""
    (tmp_path / "runs").symlink_to(tiny.parent)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    by_round, largest = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

    frame = evaluate(by_round, scope)
    rounds = frame.filter((pl.col("run") == "tiny") & (pl.col("model") == "student") & (pl.col("decoding") == "greedy"))
    assert rounds["round"].to_list() == [0, 1, 2]
    assert frame["accuracy"].is_between(0, 1).all()

    frame = evaluate(largest.replace("quickstart-seed0", "tiny"), scope)
    assert frame.height == 10
    assert frame["divergence"].is_sorted(descending=True)
    assert frame["reference"].null_count() == 0


def test_the_objectives_of_the_readme_are_those_there_are():
    table = README.split("### Objectives")[1].split("`beta` is")[0]
    there_are = [get_args(model.model_fields["name"].annotation)[0] for model in get_args(get_args(Objective)[0])]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == sorted(there_are)


def evaluate(block: str, scope: dict) -> pl.DataFrame:
    """The value of a block's last expression, as a notebook shows it."""
    *statements, last = re.split(r"\n(?=\(\n)", block)
    exec("\n".join(statements), scope)
    return eval(last.strip(), scope)

"""The kinds of rows that a run's figures are told by, beside those of all: each teacher's, and each turn's."""

from dataclasses import dataclass

import polars as pl

from configs.schema import Recipe
from storage.read import scan
from storage.schemas import TEACHER


@dataclass(frozen=True)
class Kind:
    """Some of the rows of a run."""

    name: str
    teacher: str = ""  # the rows that this one of several teachers grades
    turn: int | None = None  # the rows of this turn of their conversations

    def select(self, run: str, rows: pl.LazyFrame) -> pl.LazyFrame:
        """The rows of this kind, of a table with `prompt_id` or `rollout_id`."""
        if self.teacher:
            rows = rows.filter(pl.col(TEACHER) == self.teacher)
        if self.turn is None:
            return rows
        own = scan(run, "prompts").filter(turn=self.turn).select("prompt_id")
        if "prompt_id" in rows.collect_schema():
            return rows.join(own, on="prompt_id", how="semi")
        made = scan(run, "rollouts").join(own, on="prompt_id", how="semi").select("rollout_id")
        return rows.join(made, on="rollout_id", how="semi")


ALL = Kind("all")


def list_kinds(run: str, recipe: Recipe | None) -> list[Kind]:
    """The kinds that a run has: of one teacher, and conversations of which the last answer alone is read, there are none."""
    kinds = [Kind(teacher.name, teacher=teacher.name) for teacher in (recipe.teachers if recipe else ())]
    return kinds + [Kind(f"turn {turn}", turn=turn) for turn in _list_turns(run)]


def _list_turns(run: str) -> list[int]:
    """The turns of the held-out prompts; none where conversations are not read turn by turn."""
    try:
        prompts = scan(run, "prompts")
        if "turn" not in prompts.collect_schema():
            return []
        return prompts.filter(split="eval").select(pl.col("turn").unique().sort()).collect()["turn"].to_list()
    except (pl.exceptions.ComputeError, FileNotFoundError):  # a run that has only begun
        return []

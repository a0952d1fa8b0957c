"""`[[teachers]]` of a recipe: several teachers, each for its own rows."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from configs.models import Model
from configs.score import Score

Value = str | int | float | bool


def _check_values(wanted: Value | list[Value]) -> Value | list[Value]:
    if wanted == []:
        raise ValueError("an empty list, which no row has: give a value or several, or leave the column out")
    return wanted


Wanted = Annotated[Value | list[Value], AfterValidator(_check_values)]


class Teacher(Model):
    """One of several teachers: as `[teacher]`, with a name and the rows that it grades."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,39}$", description="in tables, figures and names of files")
    where: dict[str, Wanted] = Field(
        {},
        description="columns of the rows that it grades, each with a value or a list of them; the first teacher that fits "
        "takes a row, and one without `where` takes the rest",
    )
    score: Score | None = Field(None, description="in place of what [score] says, for its rows")

    def takes(self, row: Mapping[str, Any]) -> bool:
        """Whether its `where` fits the fields of a row."""
        return all(
            any(_same(row.get(column), value) for value in (wanted if isinstance(wanted, list) else [wanted]))
            for column, wanted in self.where.items()
        )


def _same(found: Any, value: Value) -> bool:
    return bool(found == value) and isinstance(found, bool) == isinstance(value, bool)  # 1 is not true


def inherit_score(teacher: dict[str, Any], score: Any) -> dict[str, Any]:
    """An entry of `[[teachers]]` whose `score` says what `[score]` says where it says nothing itself."""
    own = teacher.get("score")
    return {**teacher, "score": {**score, **own}} if isinstance(own, dict) and isinstance(score, dict) else teacher


def check_names(teachers: Sequence[Teacher]) -> None:
    """Raise ValueError where two have one name, one is a cache, or one stands where no row reaches it."""
    for at, teacher in enumerate(teachers):
        if teacher.name in [before.name for before in teachers[:at]]:
            raise ValueError(f"teachers: two are called '{teacher.name}'; give each a name of its own")
        if teacher.cache is not None:
            raise ValueError(f"teachers.{teacher.name}.cache: a cache teaches alone; give it as teacher.cache")
        if not teacher.where and at < len(teachers) - 1:
            raise ValueError(
                f"teachers: '{teacher.name}' has no `where` and takes every row, so that '{teachers[at + 1].name}' behind it "
                "takes none; put it last, or give it a `where`"
            )


def choose_teacher(teachers: Sequence[Teacher], row: Mapping[str, Any]) -> int | None:
    """Which of the teachers grades a row with these fields: the first that fits; None where none does."""
    return next((at for at, teacher in enumerate(teachers) if teacher.takes(row)), None)


def role_of(config: Model | None) -> str:
    """What a teacher is called in messages: `teacher`, or `teachers.math`."""
    return f"teachers.{config.name}" if isinstance(config, Teacher) else "teacher"


def suffix_of(name: str) -> str:
    """What follows the name of a file or folder of one of several teachers, such as `-math`; nothing where there is one."""
    return f"-{name}" if name else ""

"""What a recipe may ask for whose teacher is a cache: texts with next-byte laws, from `potstill cache export`."""

from typing import Protocol

from configs.models import Model


class Rows(Protocol):
    """`[rollout]`, as far as it says where rows come from."""

    @property
    def on_policy(self) -> float: ...

    @property
    def off_policy(self) -> str: ...


class Stored(Protocol):
    """`[score]`, as far as it says what is stored."""

    @property
    def signal(self) -> str: ...

    @property
    def k(self) -> int: ...

    @property
    def top_p(self) -> float: ...


def check_cache(student: Model, teacher: Model | None, rows: Rows, stored: Stored) -> None:
    """Raise ValueError where a cache is asked for what only a model has."""
    if student.cache is not None:
        raise ValueError("student.cache: a cache has no weights to train; give student.model, .recipe or .scratch")
    if teacher is None or teacher.cache is None:
        return
    if rows.on_policy > 0:
        raise ValueError(
            f"rollout.on_policy = {rows.on_policy}: the student's own samples need the teacher itself, and teacher.cache holds "
            "what it said of other texts; set rollout.on_policy = 0"
        )
    if rows.off_policy != "teacher":
        raise ValueError("rollout.off_policy = 'reference': texts come with teacher.cache; set rollout.off_policy = 'teacher'")
    if stored.signal != "bytes":
        raise ValueError(f"score.signal = '{stored.signal}': a cache holds next-byte laws; set score.signal = 'bytes'")
    for name in ("k", "top_p"):
        if getattr(stored, name) != type(stored).model_fields[name].default:  # type: ignore[attr-defined]
            raise ValueError(f"score.{name}: the laws of teacher.cache were cut when they were stored; leave it out")

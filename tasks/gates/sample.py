"""A few prompts of a recipe, and the models that preflight tries on them."""

from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa

from configs.schema import Recipe
from tasks.engines.base import Engine
from tasks.engines.choose import get_engine
from tasks.engines.names import Use
from tasks.models.pair import make_markers
from tasks.models.reference import ModelRef
from tasks.models.text import side
from tasks.rows.messages import Prompt, prompts_of
from tasks.tokens.markers import Markers


@dataclass(frozen=True)
class Sample:
    """Some training prompts of a recipe, and its models."""

    recipe: Recipe
    prompts: pa.Table
    student: ModelRef
    teacher: ModelRef | None

    @cached_property
    def asked(self) -> list[Prompt]:
        """Each prompt as a template reads it."""
        return prompts_of(self.prompts)

    def sides(self) -> dict[str, ModelRef]:
        """The models by role; without a teacher, or with a cache in its place, the student alone."""
        return {"student": self.student} | ({"teacher": self.teacher} if self.teacher and not self.teacher.cached else {})

    def markers(self, teacher: ModelRef) -> Markers:
        """The recipe's markers, between the student and a teacher."""
        return make_markers(self.recipe, student=side(self.student), teacher=side(teacher))

    def engine(self, ref: ModelRef, batch_tokens: int | None = None, *, use: Use = "score") -> Engine:
        """A model's engine, with the recipe's batches or with `batch_tokens`."""
        return get_engine(ref, self.recipe.rollout.batch_size, batch_tokens or self.recipe.score.batch_tokens, use=use)

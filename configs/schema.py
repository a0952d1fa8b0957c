"""What a recipe may say. Each field states its unit and its limits; unknown keys are refused."""

from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from configs import combinations
from configs.cache import check_cache
from configs.compute import Compute
from configs.evaluate import Evaluate
from configs.fields import Int, Table
from configs.gates import Gates
from configs.keep import Keep
from configs.models import STUDENT, Model, teach_itself
from configs.objectives import Objective
from configs.prompts import Prompts
from configs.reward import Reward
from configs.rollout import Rollout
from configs.score import Score
from configs.teachers import Teacher, check_names, inherit_score
from configs.track import Track
from configs.train import Train

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"


class Recipe(Table):
    """One run, from prompts to the last round's student."""

    name: str = Field(pattern=NAME, description="the run's folder under root; letters, digits, . _ -")
    root: str = Field("runs", min_length=1, description="folder or URI that holds the runs")
    seed: Int = Field(0, ge=0, lt=2**31, description="everything random derives from it")
    rounds: Int = Field(1, ge=1, le=9999, description="rounds of a complete run; the learning rate's horizon")
    student: Model
    teacher: Model | None = None
    teachers: tuple[Teacher, ...] = Field(
        (), description="several teachers in place of [teacher], each for its own rows", exclude_if=lambda several: not several
    )
    prompts: Prompts = Field(description="where prompts come from")
    rollout: Rollout = Rollout()
    score: Score = Score()
    objective: Objective = Field(description="what training makes small")
    reward: Reward = Reward()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    gates: Gates = Gates()
    keep: Keep = Keep()
    compute: Compute = Compute()
    track: Track = Track()

    @field_validator("root")
    @classmethod
    def _no_secrets(cls, root: str) -> str:
        # The recipe is frozen to disk; the message must not repeat it either.
        if "@" in urlsplit(root).netloc or ("://" in root and "?" in root):
            raise ValueError("a user or key in the URI would be written to disk; give it in the environment instead")
        return root

    @model_validator(mode="before")
    @classmethod
    def _complete_teachers(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        student, score, several = data.get("student"), data.get("score", {}), data.get("teachers")

        def complete(teacher: Any) -> Any:
            if isinstance(teacher, dict) and isinstance(student, dict) and teacher.get("model") == STUDENT:
                return teach_itself(student, teacher)
            return teacher

        teacher = {"teacher": complete(data["teacher"])} if "teacher" in data else {}
        entries = [inherit_score(complete(t), score) if isinstance(t, dict) else t for t in several or ()]
        return {**data, **teacher, **({"teachers": entries} if isinstance(several, list | tuple) else {})}

    @model_validator(mode="after")
    def _combinations(self) -> "Recipe":
        if self.teacher is not None and self.teachers:
            raise ValueError("[teacher] and [[teachers]] are both there: name that one in [[teachers]], too, or leave one out")
        check_names(self.teachers)
        combinations.check_student(self.student)
        for view in self.by_teacher().values():
            combinations.check_teacher(self.student, view.teacher, view.score)
            check_cache(self.student, view.teacher, self.rollout, view.score)
            combinations.check_signal(self.objective, view.score)
        combinations.check_sources(self.objective, self.rollout, taught=self.taught)
        combinations.check_rewards(self.objective, self.rollout, self.reward)
        combinations.check_training(self.train, self.student)
        combinations.check_figures(self.evaluate, taught=self.taught)
        return self

    @property
    def graded(self) -> bool:
        """Whether the student's samples are graded in each round: they are chosen by it, or it teaches."""
        return self.rollout.keep != "all" or self.reward.weight > 0

    @property
    def taught(self) -> bool:
        """Whether there is a teacher."""
        return self.teacher is not None or bool(self.teachers)

    @property
    def self_taught(self) -> bool:
        """Whether the student is its own teacher, the only one."""
        return self.teacher is not None and self.teacher.model == STUDENT

    def by_teacher(self) -> dict[str, "Recipe"]:
        """The recipe as it is for each teacher's rows, with that teacher alone, by its name.

        A recipe with one teacher, or none, is itself, under an empty name.
        """
        if not self.teachers:
            return {"": self}
        changed = ({"teacher": teacher, "teachers": (), "score": teacher.score or self.score} for teacher in self.teachers)
        return {teacher.name: self.model_copy(update=update) for teacher, update in zip(self.teachers, changed, strict=True)}

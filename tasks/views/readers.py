"""What each side read of a prompt: the text of what was rendered, special tokens included. No weights are loaded."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

from configs.errors import BadInput, Damaged
from configs.load import inherit_overrides, load_recipe
from configs.models import Model
from configs.schema import Recipe
from configs.teachers import choose_teacher, suffix_of
from storage.store import Run, round_slot
from tasks.models.reference import ModelRef, local_name, refer_as_used
from tasks.models.text import Side, side
from tasks.rows.messages import Prompt, load_prompts

Row = dict[str, Any]


class Readers:
    """Both sides of a run, as far as their tokenizers are still where they were; each is loaded when it is asked for."""

    def __init__(self, run: Run):
        recipe = run.frozen_recipe()
        assert recipe is not None
        self.run, self.recipe = run, recipe
        self.missing: dict[str, str] = {}  # by role, why a side's texts cannot be shown

    @cached_property
    def student(self) -> Side | None:
        """None where its tokenizer is gone."""
        return self._load("student", lambda: _find_student(self.run, self.recipe))

    @cached_property
    def _teachers(self) -> dict[str, Side | None]:
        return {name: self._find(name, view) for name, view in self.recipe.by_teacher().items()}

    def _find(self, name: str, view: Recipe) -> Side | None:
        config = view.teacher
        if config is None or config.cache is not None:
            return None
        return self._load("teacher", lambda: _find_teacher(self.run, view, config, name))

    def teacher_of(self, prompt: Prompt) -> Side | None:
        """The side of the teacher that grades a prompt's rows; None without one, without its tokenizer, and for a cache."""
        at = choose_teacher(self.recipe.teachers, prompt.fields)
        return self._teachers[self.recipe.teachers[at].name if at is not None else ""]

    def _load(self, role: str, find: Callable[[], ModelRef]) -> Side | None:
        try:
            return side(find())
        except (BadInput, Damaged) as error:
            self.missing[role] = str(error)
            return None

    def show(self, rollout: Row, prompt: Row) -> dict[str, str]:
        """By role, the text of a rollout's prompt: the student's from its stored ids, the teacher's rendered again.

        Where both are one text, the student's alone.
        """
        shown = {} if self.student is None else {"student": self.student.spell(rollout["prompt_token_ids"])}
        (asked,) = load_prompts([prompt])
        if (teacher := self.teacher_of(asked)) is not None:
            try:
                text = teacher.show(*asked)
            except BadInput as error:  # its template is another one now
                self.missing["teacher"] = str(error)
            else:
                shown |= {"teacher": text} if text != shown.get("student") else {}
        return shown

    def list_texts(self, rollout: Row, prompt: Row) -> list[Row]:
        """The same as rows for people, with why a side's text cannot be shown."""
        shown = self.show(rollout, prompt)
        taught = self.teacher_of(load_prompts([prompt])[0]) is not None
        alike = taught and "teacher" not in shown | self.missing
        rows = [{"side": "both" if alike else role, "text": text} for role, text in shown.items()]
        return rows + [{"side": role, "text": f"cannot be shown: {why}"} for role, why in self.missing.items()]


def _find_student(run: Run, recipe: Recipe) -> ModelRef:
    """The newest checkpoint, which has the tokenizer with it; before there is one, the student that the recipe names."""
    for number in range(run.rounds_done(), -1, -1):
        if checkpoint := run.find(round_slot(number, "student")):
            return ModelRef(checkpoint.path, checkpoint.digest, rendering="plain", committed="://" in checkpoint.path)
    return ModelRef(*_find_model(run, recipe, recipe.student), rendering="plain")


def _find_teacher(run: Run, recipe: Recipe, config: Model, name: str) -> ModelRef:
    if recipe.self_taught:
        own = _find_student(run, recipe)
        return _refer(config, own.path, own.digest, committed=own.committed)
    path, digest = _find_model(run, recipe, config)
    evaluated = run.manifest(round_slot(0, "evals", "teacher") + suffix_of(name))
    return _refer(config, path, evaluated["inputs"]["model"]["digest"] if evaluated else digest)


def _refer(config: Model, path: str, digest: str, *, committed: bool = False) -> ModelRef:
    """As in the run, but that no code of the model's is run: the run, and what its recipe trusts, may be a stranger's."""
    return replace(refer_as_used(config, path, digest, committed=committed), trust_remote_code=False)


def _find_model(run: Run, recipe: Recipe, config: Model) -> tuple[str, str]:
    """Where a model lies, and its digest if that is known without reading its weights."""
    if config.model is not None:
        return local_name(config.model), ""
    if config.recipe is None:
        raise BadInput("the new model is not in this run any more; continue the run first")
    maker = load_recipe(config.recipe, inherit_overrides(recipe, config.recipe))
    checkpoint = Run(run.uri, maker.name).find(round_slot(maker.rounds, "student"))  # beside the run, wherever that is now
    if checkpoint is None:
        raise BadInput(f"{config.recipe}: its model is not in {run.uri}/{maker.name}; run that recipe again")
    return checkpoint.path, checkpoint.digest

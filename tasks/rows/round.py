"""What passes between the stages of a round: small references, never a table or a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from configs.schema import Recipe
from configs.teachers import role_of, suffix_of
from storage.artifacts import Artifact, read_table
from storage.lineage import digest_json
from storage.store import Run, part, round_slot
from tasks.models.reference import ModelRef
from tasks.rows.teachers import assign_teachers

Teachers = Mapping[str, ModelRef]  # by name, in the recipe's order; one alone has an empty name
NOBODY: Teachers = MappingProxyType({})


def sides_of(recipe: Recipe, student: ModelRef | None, teachers: Teachers) -> dict[str, ModelRef]:
    """The models that are there, by their roles: `student`, `teacher`, or each of several as `teachers.math`.

    A cache reads no prompts.
    """
    roles = {name: role_of(view.teacher) for name, view in recipe.by_teacher().items()}
    there = {roles[name]: ref for name, ref in teachers.items() if not ref.cached}
    return ({"student": student} if student else {}) | there


@dataclass(frozen=True, kw_only=True)
class Vocabularies:
    """Both sides' committed vocabulary tables."""

    student: Artifact
    teacher: Artifact


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The student and one of its teachers, for the rows that this teacher grades; without any teacher the student alone."""

    name: str  # the teacher's, empty where it is the only one
    recipe: Recipe  # with this teacher alone
    teacher: ModelRef | None
    vocabularies: Vocabularies
    head: Artifact | None = None  # the teacher's, where its signal needs it


@dataclass(frozen=True, kw_only=True)
class SplitPrompts:
    """A run's committed prompts; no prompt is in both."""

    train: Artifact
    eval: Artifact


def teachers_of(pairs: Sequence[Pair]) -> dict[str, ModelRef]:
    """The teachers of pairs by name."""
    return {pair.name: pair.teacher for pair in pairs if pair.teacher is not None}


@dataclass(frozen=True)
class Shard:
    """One shard of a round: its number, and what has been made of it so far. Each stage adds its own artifact."""

    number: int  # from 0
    completions: tuple[Artifact, ...] = ()  # each teacher's, where some rows are a teacher's own
    rollouts: Artifact | None = None
    scores: tuple[Artifact, ...] = ()  # each teacher's, of its rows; none where the objective needs no teacher
    aligned: Artifact | None = None


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round before any of it is made: everything that its stages have in common."""

    recipe: Recipe
    number: int  # from 1
    student: ModelRef  # that samples, and is trained
    pairs: tuple[Pair, ...]  # at least one
    start: ModelRef  # the student before round 1, which adapters are laid over
    prompts: Artifact  # prompts/train
    trainer: Artifact | None = None  # what the last round's trainer left: optimizer, step, adapters
    rewards: Artifact | None = None  # of the student's samples, where they choose some of them, or teach

    @property
    def teachers(self) -> dict[str, ModelRef]:
        """The teachers by name."""
        return teachers_of(self.pairs)

    @property
    def pair(self) -> Pair:
        """The only pair, of a round as `by_teacher` gives it."""
        (pair,) = self.pairs
        return pair

    def by_teacher(self) -> "tuple[Round, ...]":
        """The round for each teacher alone."""
        return tuple(replace(self, pairs=(pair,)) for pair in self.pairs)

    def own_prompts(self) -> np.ndarray:
        """int64: the places, in the round's prompts, of those whose rows the only pair's teacher grades."""
        if not self.recipe.teachers:
            return np.arange(self.prompts.rows)
        at = [teacher.name for teacher in self.recipe.teachers].index(self.pair.name)
        return np.flatnonzero(assign_teachers(self.recipe.teachers, self.prompts) == at)

    @property
    def run(self) -> Run:
        return Run(self.recipe.root, self.recipe.name)

    def reader_of(self, ref: ModelRef) -> ModelRef:
        """A model for its tokenizer alone. A student's is that of the start: what a round has trained may be cleared."""
        start = self.start
        return (
            replace(ref, path=start.path, digest=start.digest, committed=start.committed)
            if ref.path == self.student.path
            else ref
        )

    def slot(self, table: str, shard: Shard | None = None) -> str:
        """Where an artifact of the round, or a shard of it, lies in the run's folder: `round=0001/scores/part-00000`."""
        return round_slot(self.number, table, *([] if shard is None else [part(shard.number)]))

    def own_slot(self, table: str, shard: Shard) -> str:
        """The same of what the only pair's teacher makes: `round=0001/scores/part-00000-math`."""
        return self.slot(table, shard) + suffix_of(self.pair.name)


def teacher_inputs(round: Round) -> dict[str, Any]:
    """What goes into the keys of what one of several teachers makes: which rows are its own."""
    return {"own_prompts": digest_json(round.own_prompts().tolist())} if round.recipe.teachers else {}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What training leaves: the new student's folder, and the trainer's state for the next round."""

    student: Artifact
    trainer: Artifact


def left_out(round: Round) -> set[str]:
    """The ids of the round's rollouts that do not go on to scoring and training (`rollout.keep`)."""
    if round.rewards is None:
        return set()
    table = read_table(round.rewards, ["rollout_id", "kept"])
    return set(table.filter(pc.invert(table["kept"]))["rollout_id"].to_pylist())


def own_rows(round: Round, rollouts: pa.Table) -> pa.Table:
    """The rollouts that the only pair's teacher grades: all of them, where there is no other."""
    if not round.recipe.teachers:
        return rollouts
    own = read_table(round.prompts, ["prompt_id"])["prompt_id"].take(pa.array(round.own_prompts()))
    return rollouts.filter(pc.is_in(rollouts["prompt_id"], own.combine_chunks()))

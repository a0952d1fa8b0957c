"""What passes between the stages of a round: small references, never a table or a model."""

from dataclasses import dataclass, replace

import pyarrow.compute as pc

from configs.schema import Recipe
from storage.artifacts import Artifact, read_table
from storage.store import Run, part, round_slot
from tasks.models.reference import ModelRef


@dataclass(frozen=True, kw_only=True)
class Vocabularies:
    """Both sides' committed vocabulary tables."""

    student: Artifact
    teacher: Artifact


@dataclass(frozen=True, kw_only=True)
class SplitPrompts:
    """A run's committed prompts; no prompt is in both."""

    train: Artifact
    eval: Artifact


@dataclass(frozen=True)
class Shard:
    """One shard of a round: its number, and what has been made of it so far. Each stage adds its own artifact."""

    number: int  # from 0
    completions: Artifact | None = None  # the teacher's, where some rows are its own
    rollouts: Artifact | None = None
    scores: Artifact | None = None  # None also where the objective needs no teacher
    aligned: Artifact | None = None


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round before any of it is made: everything that its stages have in common."""

    recipe: Recipe
    number: int  # from 1
    student: ModelRef  # that samples, and is trained
    teacher: ModelRef | None
    start: ModelRef  # the student before round 1, which adapters are laid over
    prompts: Artifact  # prompts/train
    vocabularies: Vocabularies
    trainer: Artifact | None = None  # what the last round's trainer left: optimizer, step, adapters
    rewards: Artifact | None = None  # of the student's samples, where they choose some of them, or teach
    head: Artifact | None = None  # the teacher's, where the signal needs it

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

"""The vocabulary stage: both sides' token bytes, and what of them matches."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from prefect import task
from prefect.cache_policies import NO_CACHE

from configs.schema import Recipe
from storage.artifacts import Artifact
from storage.lineage import digest_json
from storage.schemas import VOCAB
from storage.store import Run
from tasks.models import ModelRef, Side, side
from tasks.progress import logger
from tasks.tokens.vocabulary import Vocabulary, match

CODE = 1


@task(name="vocab", cache_policy=NO_CACHE)
def match_vocabularies(recipe: Recipe, student: ModelRef, teacher: ModelRef | None) -> dict[str, Artifact]:
    """`vocab/student` and `vocab/teacher`; a student without a teacher is matched with itself."""
    run, own, other = Run(recipe.root, recipe.name), side(student), side(teacher or student)
    own.encoder.check(student.path)
    other.encoder.check((teacher or student).path)
    identities = {"student": tokenizer_digest(own), "teacher": tokenizer_digest(other)}

    def build(role: str, this: Side, that: Side) -> Artifact:
        inputs = {"stage": "vocab", "code": CODE, "role": role, **identities}
        return run.build_table(f"vocab/{role}", inputs, lambda: vocab_table(this.vocabulary, that.vocabulary), logger.info)

    artifacts = {"student": build("student", own, other), "teacher": build("teacher", other, own)}
    if teacher is not None:
        logger.info("vocab: %s", describe(own.vocabulary, other.vocabulary))
    return artifacts


def tokenizer_digest(text_side: Side) -> str:
    return digest_json([text_side.tokenizer.backend_tokenizer.to_str(), text_side.stop_ids])


def vocab_table(own: Vocabulary, other: Vocabulary) -> pa.Table:
    matching = match(own, other)
    return pa.table(
        {
            "token_id": np.arange(own.size, dtype=np.int32),
            "bytes": pa.array(own.beta.values, pa.binary()),
            "role": own.beta.roles,
            "match_id": matching.ids,
            "prefix_id": matching.prefix,
        },
        VOCAB,
    )


@dataclass(frozen=True)
class Overlap:
    """How many byte strings are tokens of each vocabulary, and of both."""

    student: int
    teacher: int
    shared: int

    @property
    def jaccard(self) -> float:
        return self.shared / (self.student + self.teacher - self.shared)


def overlap(student: Vocabulary, teacher: Vocabulary) -> Overlap:
    mine, theirs = student.by_bytes.keys(), teacher.by_bytes.keys()
    return Overlap(len(mine), len(theirs), len(mine & theirs))


def describe(student: Vocabulary, teacher: Vocabulary) -> str:
    both = overlap(student, teacher)
    return (
        f"{both.shared} tokens shared by bytes: {both.shared / both.student:.1%} of the student's {both.student}, "
        f"{both.shared / both.teacher:.1%} of the teacher's {both.teacher} (Jaccard {both.jaccard:.3f})"
    )

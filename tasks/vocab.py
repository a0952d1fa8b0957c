"""The vocabulary stage: the token bytes of both sides, and which tokens match."""

import numpy as np
import pyarrow as pa
from prefect import task
from prefect.cache_policies import NO_CACHE

from configs.schema import Recipe
from configs.teachers import suffix_of
from storage.artifacts import Artifact
from storage.lineage import digest_json
from storage.schemas import VOCAB
from storage.store import Run
from tasks.models.reference import ModelRef
from tasks.models.text import Side, side
from tasks.rows.round import Vocabularies
from tasks.running.progress import logger
from tasks.tokens.vocabulary import Vocabulary, describe_overlap, match

CODE = 1


@task(name="vocab", cache_policy=NO_CACHE)
def match_vocabularies(recipe: Recipe, name: str = "", *, student: ModelRef, teacher: ModelRef | None) -> Vocabularies:
    """Make `vocab/student` and `vocab/teacher`; of one of several teachers, by its `name`, `vocab/student-math` and so on.

    A student without a teacher is matched with itself.
    """
    run, s_side, t_side = Run(recipe.root, recipe.name), side(student), side(teacher or student)
    s_side.check()
    t_side.check()
    identities = {"student": digest_tokenizer(s_side), "teacher": digest_tokenizer(t_side)}

    def build(role: str, vocabulary: Vocabulary, counterpart: Vocabulary) -> Artifact:
        inputs = {"stage": "vocab", "code": CODE, "role": role, **identities}
        return run.build_table(
            f"vocab/{role}{suffix_of(name)}", inputs, lambda: make_vocab_table(vocabulary, counterpart), logger.info
        )

    vocabularies = Vocabularies(
        student=build("student", s_side.vocabulary, t_side.vocabulary),
        teacher=build("teacher", t_side.vocabulary, s_side.vocabulary),
    )
    if teacher is not None:
        logger.info("vocab%s: %s", suffix_of(name), describe_overlap(student=s_side.vocabulary, teacher=t_side.vocabulary))
    return vocabularies


def digest_tokenizer(text_side: Side) -> str:
    """The digest of a tokenizer and its stop ids."""
    return digest_json([text_side.spelling, text_side.stop_ids])


def make_vocab_table(vocabulary: Vocabulary, counterpart: Vocabulary) -> pa.Table:
    """One row per id of `vocabulary`, with its match in `counterpart`, in the columns of `storage.schemas.VOCAB`."""
    matching = match(vocabulary, counterpart)
    return pa.table(
        {
            "token_id": np.arange(vocabulary.size, dtype=np.int32),
            "bytes": pa.array(vocabulary.beta.values, pa.binary()),
            "role": vocabulary.beta.roles,
            "match_id": matching.ids,
            "prefix_id": matching.prefix,
        },
        VOCAB,
    )

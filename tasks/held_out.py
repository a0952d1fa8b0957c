"""The stage that evaluates a student by a cache: its distance to the teacher on the cached texts of held-out prompts."""

import pyarrow as pa
from prefect import task
from prefect.cache_policies import NO_CACHE

from configs.objectives import Bytes
from configs.schema import Recipe
from storage.artifacts import Artifact, read_table
from storage.caches import open_cache
from storage.schemas import EVALS, without_teacher
from storage.store import Run, round_slot
from tasks import objectives
from tasks.align import align_rollouts
from tasks.caches.recall import recall_completions, recall_scores
from tasks.models.pair import make_markers
from tasks.models.reference import ModelRef
from tasks.models.text import side
from tasks.rollout import make_rollouts, translate_completions
from tasks.rows.plan import Row
from tasks.running.progress import logger
from tasks.signals import make_signal
from tasks.training.student import row_losses

CODE = 1
FORWARD = Bytes(name="bytes", beta=0.0)  # KL(teacher ‖ student): the texts are the teacher's, not the student's


@task(name="held out", task_run_name="round {number} · held-out texts", cache_policy=NO_CACHE)
def compare_cached(recipe: Recipe, number: int, prompts: Artifact, *, student: ModelRef, teacher: ModelRef) -> Artifact:
    """Make `round=…/evals/cached`: of each held-out prompt's first text, KL(teacher ‖ student) of next-byte laws per byte."""
    inputs = {
        "stage": "held out",
        "code": CODE,
        "model": student.identity,
        "teacher": teacher.identity,
        "prompts": prompts.digest,
        "max_new_tokens": recipe.rollout.max_new_tokens,
        "round": number,
    }

    def make() -> pa.Table:
        table, known = read_table(prompts), open_cache(teacher.path).prompt_ids()
        ids = table["prompt_id"].to_pylist()
        rows = [Row(place, 0, "teacher", 0, prompt_id) for place, prompt_id in enumerate(ids) if prompt_id in known]
        if len(rows) < len(ids):
            logger.warning("%d of %d held-out prompts have no text in the cache", len(ids) - len(rows), len(ids))
        return compare_rows(recipe, number, rows, table, student=student, teacher=teacher)

    run = Run(recipe.root, recipe.name)
    return run.build_table(round_slot(number, "evals", "cached"), inputs, make, logger.info)


def compare_rows(
    recipe: Recipe, number: int, rows: list[Row], prompts: pa.Table, *, student: ModelRef, teacher: ModelRef
) -> pa.Table:
    """The rows of `evals` for the cached text of each of `rows`, whose ids are those of their prompts."""
    if not rows:
        return without_teacher(EVALS).empty_table()
    s_side, t_side = side(student), side(teacher)
    markers = make_markers(recipe, student=s_side, teacher=t_side)
    completions = recall_completions(rows, prompts, teacher)
    written = translate_completions(completions.to_pylist(), student=s_side, teacher=t_side, markers=markers)
    rollouts = make_rollouts(rows, prompts, recipe.rollout, number, student, written)
    scores, signal = recall_scores(completions, teacher), make_signal("bytes")
    objective = objectives.build(FORWARD, student=s_side.vocabulary, teacher=t_side.vocabulary)
    aligned = align_rollouts(rollouts, scores, objective, signal, None, markers, student=s_side, teacher=t_side)
    losses = row_losses(recipe, FORWARD, rollouts, aligned, student=student, teacher=teacher)
    given = prompts.take(pa.array([row.prompt for row in rows]))["reference"].to_pylist()
    records = []
    for rollout, reference in zip(rollouts.to_pylist(), given, strict=True):
        size = len((rollout["text"] or "").encode())
        loss = losses.get(rollout["rollout_id"])
        records.append(
            {
                "model": "student",
                "round": number,
                "decoding": "cached",
                "prompt_id": rollout["prompt_id"],
                "sample": 0,
                "text": rollout["text"],
                "reference": reference,
                "finish_reason": rollout["finish_reason"],
                "tokens": len(rollout["token_ids"]),
                "bytes": size,
                "divergence": None if loss is None else loss / max(size, 1),
            }
        )
    return pa.Table.from_pylist(records, without_teacher(EVALS))

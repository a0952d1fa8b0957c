"""The scoring stage: the teacher's log-probs of every token of a shard, under its own rendering of the prompt."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from prefect import task
from prefect.cache_policies import NO_CACHE

from configs.errors import BadInput
from configs.load import select_content
from configs.schema import Recipe
from configs.signals import SIGNALS
from storage.artifacts import Artifact, read_table
from storage.lineage import digest_table
from storage.schemas import LEFT_OUT, SCORES, TEACHER, without_teacher
from storage.store import Run
from tasks.caches.recall import recall_scores
from tasks.engines.base import Advance, Engine, TokenScores, ignore_progress
from tasks.engines.choose import get_engine, get_head
from tasks.engines.names import engine_name
from tasks.gates.rendering import context_of
from tasks.models.pair import hide_ids, make_markers, marker_inputs, teacher_ids
from tasks.models.reference import ModelRef
from tasks.models.text import Side, side
from tasks.rows.messages import Prompt, prompts_of
from tasks.rows.round import Round, Shard, left_out, own_rows
from tasks.running.progress import logger, progress
from tasks.running.retries import RETRIES
from tasks.signals import make_signal
from tasks.signals.base import Signal
from tasks.signals.head import save_head
from tasks.tokens.markers import Markers

CODE = 2
HEAD_CODE = 1
ROWS_AT_ONCE = 1024  # rows between two steps of the progress bar


@task(name="scores", task_run_name="round {round.number} · scores · shard {shard.number}", cache_policy=NO_CACHE, **RETRIES)
def score_shard(round: Round, shard: Shard) -> Shard:
    """Make `round=…/scores/part-…`: the teacher's scores of one shard of rollouts, in the same order.

    Of one of several teachers they are those of its rows, in a table of its own.
    """
    recipe, teacher = round.pair.recipe, round.pair.teacher
    assert teacher is not None
    config = recipe.score
    assert shard.rollouts is not None
    student, own = side(round.reader_of(round.student)), side(round.reader_of(teacher))
    markers = make_markers(recipe, student=student, teacher=own)

    def read() -> pa.Table:
        assert shard.rollouts is not None
        table = own_rows(round, read_table(shard.rollouts, ["rollout_id", "prompt_id", "text", "finish_reason", "token_ids"]))
        # The key holds what is scored: other rollouts with the same texts need no new scores. Ids count where they are more.
        return table if markers.same else hide_ids(table, student, markers)

    said = marker_inputs(recipe)
    if (before := find_inputs(round, shard)) is not None:
        digest, with_ids = before["rollouts"], before.keys() >= said.keys()
    else:
        scored = read()
        digest, with_ids = digest_table(scored), "token_ids" in scored.column_names
    inputs = {
        "stage": "scores",
        "code": CODE,
        "engine": engine_name(teacher, "score"),
        "teacher": teacher.identity,
        "prompts": round.prompts.digest,
        "rollouts": digest,
        "recipe": _stored_fields(recipe),
        "as_sampled": markers.same,
        **(said if with_ids and not markers.same else {}),
        **({"rewards": round.rewards.digest} if round.rewards and recipe.rollout.keep != "all" else {}),
        **({"completions": shard.completions[0].digest} if teacher.cached else {}),
    }

    def make() -> pa.Table:
        if teacher.cached:
            return recall_scores(read_table(shard.completions[0]), teacher)
        rows = read().to_pylist()
        table = read_table(round.prompts)
        prompts = dict(zip(table["prompt_id"].to_pylist(), prompts_of(table), strict=True))
        engine = get_engine(teacher, recipe.rollout.batch_size, config.batch_tokens)
        signal = make_signal(config.signal, config.k, config.top_p)
        with progress(f"round {round.number} scores", len(rows)) as advance:
            return score_rows(
                rows,
                prompts,
                engine,
                signal,
                markers,
                advance,
                left_out(round),
                student=student,
                teacher=side(teacher),
                name=round.pair.name,
            )

    made = round.run.build_table(round.own_slot("scores", shard), inputs, make, logger.info)
    return replace(shard, scores=(*shard.scores, made))


def find_inputs(round: Round, shard: Shard) -> dict[str, Any] | None:
    """The inputs of a shard's committed scores, where its rollouts are cleared and were aligned with them; else None."""
    rollouts, aligned = (round.run.manifest(round.slot(table, shard)) for table in ("rollouts", "aligned"))
    scores = round.run.manifest(round.own_slot("scores", shard))
    if not rollouts or not rollouts.get("cleared") or not scores or not aligned:
        return None
    used = aligned["inputs"]["scores"]
    fits = scores["digest"] in (used if isinstance(used, list) else [used])
    inputs: dict[str, Any] = scores["inputs"]
    return inputs if fits and aligned["inputs"]["rollouts"] == rollouts["digest"] else None


@task(name="head", cache_policy=NO_CACHE)
def keep_head(recipe: Recipe, teacher: ModelRef, slot: str = "teacher") -> Artifact:
    """Make `teacher/` (or another `slot`): the weights of the teacher's head, for a signal that needs them to be read."""
    run = Run(recipe.root, recipe.name)
    inputs = {"stage": "head", "code": HEAD_CODE, "teacher": teacher.identity}

    def make(folder: Path) -> dict[str, int]:
        head = get_head(teacher)
        save_head(head, folder / "teacher")
        return {"teacher": len(head.weight)}

    return run.build_files({"teacher": slot}, inputs, make, logger.info)["teacher"]


def _stored_fields(recipe: Recipe) -> dict[str, Any]:
    """The fields of `[score]` that change a scores file: `k` and `top_p` only where the signal is cut by them."""
    cut = SIGNALS[recipe.score.signal].cut
    return {key: value for key, value in select_content(recipe, "score").items() if cut or key not in ("k", "top_p")}


def score_rows(
    rows: Sequence[dict[str, Any]],
    prompts: dict[str, Prompt],
    engine: Engine,
    signal: Signal,
    markers: Markers,
    advance: Advance = ignore_progress,
    unwanted: Collection[str] = (),
    *,
    student: Side,
    teacher: Side,
    name: str = "",
) -> pa.Table:
    """Scores of `rows` (rollouts with prompt_id, text, finish_reason, and token_ids where they are more than the text).

    One row of `SCORES` each, in order. `prompts` are by `prompt_id`. Rollouts whose ids are `unwanted` are not scored. One of
    several teachers has a `name`.
    """
    completions = teacher_ids(rows, student=student, teacher=teacher, markers=markers)
    context = context_of(teacher.ref)
    scored: list[dict[str, Any]] = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        batch = range(start, min(start + ROWS_AT_ONCE, len(rows)))
        scorable = [i for i in batch if completions[i] and rows[i]["rollout_id"] not in unwanted]
        rendered = [teacher.render(*prompts[rows[i]["prompt_id"]]) for i in scorable]
        lengths = [len(ids) + len(completions[i] or []) for i, ids in zip(scorable, rendered, strict=True)]
        if context and max(lengths, default=0) > context:
            raise BadInput(
                f"teacher: room: a prompt with its answer has {max(lengths)} tokens, and {teacher.ref.path} has room for "
                f"{context}; shorten the prompts, lower rollout.max_new_tokens, or take a model with a longer context"
            )
        results = engine.score(rendered, [completions[i] or [] for i in scorable], signal)
        by_row: dict[int, TokenScores] = dict(zip(scorable, results, strict=True))
        for i in batch:
            common = {"rollout_id": rows[i]["rollout_id"], "teacher": teacher.ref.digest, TEACHER: name}
            if (scores := by_row.get(i)) is None:
                unscored = "lossy_text" if completions[i] is None else "empty"
                scored.append({**common, "status": LEFT_OUT if common["rollout_id"] in unwanted else unscored})
                continue
            columns = {name: values.reshape(-1) for name, values in scores.columns.items()}
            scored.append({**common, "token_ids": completions[i], "logprobs": scores.logprobs, **columns, "status": "ok"})
        advance(len(batch))
    return pa.Table.from_pylist(scored, SCORES if name else without_teacher(SCORES))

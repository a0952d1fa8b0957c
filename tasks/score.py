"""The scoring stage: the teacher's log-probs of every token of a shard, under its own rendering of the prompt."""

from typing import Any

import pyarrow as pa
from prefect import task
from prefect.cache_policies import NO_CACHE

from configs.load import content
from configs.schema import Recipe, Score
from storage.artifacts import Artifact, read_table
from storage.lineage import digest_table
from storage.schemas import SCORES
from storage.store import Run, part, round_slot
from tasks.engines.base import Advance, Engine, Signal, TokenScores, unseen
from tasks.engines.choose import engine, engine_name
from tasks.models import ModelRef, Side, side
from tasks.progress import logger, progress
from tasks.retries import RETRIES

CODE = 1
ROWS_AT_ONCE = 1024  # between two steps of the progress bar
COLUMNS = {  # of each signal: its events, their log-probs, and how many each token has
    "topk": ("top_ids", "top_logprobs", "top_counts"),
    "bytes": ("law_classes", "law_logprobs", "law_counts"),
}


@task(name="scores", task_run_name="scores-{number}-{shard}", cache_policy=NO_CACHE, **RETRIES)
def score_shard(
    recipe: Recipe, number: int, shard: int, student: ModelRef, teacher: ModelRef, prompts: Artifact, rollouts: Artifact
) -> Artifact:
    """`round=…/scores/part-…`: the teacher's scores of one shard of rollouts, in the same order."""
    run, config = Run(recipe.root, recipe.name), recipe.score
    as_sampled = side(student).vocabulary.same_as(side(teacher).vocabulary)
    # What is scored is the text, whichever tokenizer wrote it: another student's rollouts of it need no new scores.
    wanted = read_table(rollouts, ["rollout_id", "prompt_id", "text", "finish_reason"] + ["token_ids"] * as_sampled)
    inputs = {
        "stage": "scores",
        "code": CODE,
        "engine": engine_name(teacher),
        "teacher": teacher.identity,
        "prompts": prompts.digest,
        "rollouts": digest_table(wanted),
        "recipe": _scored_fields(recipe),
        "as_sampled": as_sampled,
    }

    def make() -> pa.Table:
        rows = wanted.to_pylist()
        messages = read_table(prompts, ["prompt_id", "messages"])
        by_id = dict(zip(messages["prompt_id"].to_pylist(), messages["messages"].to_pylist(), strict=True))
        grader = engine(teacher, recipe.rollout.batch_size, config.batch_tokens)
        with progress(f"round {number} scores", len(rows)) as advance:
            return scores_table(rows, by_id, grader, side(teacher), config, as_sampled, advance)

    return run.build_table(round_slot(number, "scores", part(shard)), inputs, make, logger.info)


def _scored_fields(recipe: Recipe) -> dict[str, Any]:
    """What of the recipe changes a scores file: `k` and `top_p` only where the signal is cut by them."""
    cut = recipe.score.signal in ("topk", "bytes")
    return {key: value for key, value in content(recipe, "score").items() if cut or key not in ("k", "top_p")}


def teacher_ids(rows: list[dict[str, Any]], text_side: Side, as_sampled: bool) -> list[list[int] | None]:
    """Each completion in the teacher's ids, its stop included; None where its tokenizer cannot spell the text.

    With one vocabulary on both sides the sampled ids themselves are used: a student may split a text in other ways
    than `encode` does.
    """
    if as_sampled:
        return [row["token_ids"] or None for row in rows]
    encoded = text_side.encoder.encode([row["text"] or "" for row in rows])
    stop = text_side.stop_ids[:1]
    return [
        None if ids is None else ids + stop * (row["finish_reason"] == "stop") for ids, row in zip(encoded, rows, strict=True)
    ]


def scores_table(
    rows: list[dict[str, Any]],
    messages: dict[str, Any],
    grader: Engine,
    text_side: Side,
    config: Score,
    as_sampled: bool,
    advance: Advance = unseen,
) -> pa.Table:
    """Scores of `rows` (rollouts with prompt_id, token_ids, text, finish_reason), one row each and in order."""
    completions = teacher_ids(rows, text_side, as_sampled)
    signal = Signal(config.signal, config.k, config.top_p)
    scored: list[dict[str, Any]] = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        batch = range(start, min(start + ROWS_AT_ONCE, len(rows)))
        able = [i for i in batch if completions[i]]
        prompts = [text_side.render(messages[rows[i]["prompt_id"]]) for i in able]
        results = grader.score(prompts, [completions[i] or [] for i in able], signal)
        by_row: dict[int, TokenScores] = dict(zip(able, results, strict=True))
        for i in batch:
            common = {"rollout_id": rows[i]["rollout_id"], "teacher": text_side.ref.digest}
            if (s := by_row.get(i)) is None:
                status = "lossy_text" if completions[i] is None else "empty"
                scored.append({**common, "status": status})
                continue
            events = dict(zip(COLUMNS.get(config.signal, ()), (s.top_ids, s.top_logprobs, s.counts), strict=False))
            hidden = None if s.hidden is None else s.hidden.reshape(-1)
            given = {"token_ids": completions[i], "logprobs": s.logprobs, "rest": s.rest, "hidden": hidden}
            scored.append({**common, **given, **events, "status": "ok"})
        advance(len(batch))
    return pa.Table.from_pylist(scored, SCORES)

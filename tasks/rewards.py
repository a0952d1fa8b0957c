"""The reward stage: what the student's own samples are worth, and which of them go on to scoring and training."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from prefect import task
from prefect.cache_policies import NO_CACHE

from storage.artifacts import Artifact, read_table
from storage.schemas import REWARDS
from tasks.models.text import Side, side
from tasks.rows.round import Round, Shard
from tasks.rows.scorers import make_grader
from tasks.running.progress import logger, progress
from tasks.tokens.token_bytes import spell_answer

CODE = 1
EPSILON = 1e-6  # added to a standard deviation of scores


@task(name="rewards", task_run_name="round {round.number} · rewards", cache_policy=NO_CACHE)
def reward_rows(round: Round, shards: Sequence[Shard]) -> Artifact:
    """Make `round=…/rewards/part-00000`, a row for each of the student's own samples, in the rollouts' order.

    The samples of one prompt may lie in two shards, so it is one table a round.
    """
    recipe = round.recipe
    rollouts = [shard.rollouts for shard in shards if shard.rollouts]
    inputs = {
        "stage": "rewards",
        "code": CODE,
        "rollouts": [artifact.digest for artifact in rollouts],
        "prompts": round.prompts.digest,
        "scorer": recipe.evaluate.scorer,
        "keep": recipe.rollout.keep,
        "stop": list(side(round.reader_of(round.student)).stop_ids),
    }

    def make() -> pa.Table:
        columns = ["rollout_id", "prompt_id", "source", "token_ids"]
        samples = pa.concat_tables([read_table(artifact, columns) for artifact in rollouts])
        samples = samples.filter(pc.equal(samples["source"], "student"))
        scores = grade_samples(samples, read_table(round.prompts), side(round.student), recipe.evaluate.scorer, round.number)
        groups = samples["prompt_id"].to_numpy()
        kept = choose_rows(scores, groups, recipe.rollout.keep)
        worth = advantages(scores, groups)
        logger.info(
            "round %d: %d of %d samples go on (rollout.keep = %r), %d are left out; mean score %.3f, %d cannot be graded, "
            "%d have an advantage",
            round.number, kept.sum(), len(kept), recipe.rollout.keep, (~kept).sum(), mean_score(scores),
            np.isnan(scores).sum(), np.count_nonzero(worth),
        )  # fmt: skip
        columns_made = {
            "rollout_id": samples["rollout_id"],
            "score": pa.array(scores, from_pandas=True),
            "advantage": worth,
            "kept": kept,
        }
        return pa.table(columns_made).cast(REWARDS)

    return round.run.build_table(round.slot("rewards", shards[0]), inputs, make, logger.info)


def grade_samples(samples: pa.Table, prompts: pa.Table, student: Side, scorer: str, number: int) -> np.ndarray:
    """float64 `[rows]`: the score of each sample (`prompt_id`, `token_ids`), as an evaluation grades it; NaN: not graded."""
    grade, stops = make_grader(scorer), set(student.stop_ids)
    by_id: dict[str, dict[str, Any]] = {row["prompt_id"]: row for row in prompts.to_pylist()}
    scores = np.full(len(samples), np.nan)
    with progress(f"round {number} rewards", len(samples)) as advance:
        for at, (prompt_id, ids) in enumerate(
            zip(*(samples[name].to_pylist() for name in ("prompt_id", "token_ids")), strict=True)
        ):
            score = grade(spell_answer(student.beta, ids, stops), by_id[prompt_id])
            scores[at] = np.nan if score is None else score
            advance(1)
    return scores


def mean_score(scores: np.ndarray) -> float:
    """Of the graded rows; NaN where there are none."""
    graded = scores[~np.isnan(scores)]
    return float(graded.mean()) if len(graded) else float("nan")


def advantages(scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """float32 `[rows]`: (score − mean) / (std + ε) among the graded rows of a group; 0 where all are equal."""
    found = np.zeros(len(scores), np.float32)
    graded = np.flatnonzero(~np.isnan(scores))
    _, group = np.unique(groups[graded].astype(str), return_inverse=True)
    sizes = np.maximum(np.bincount(group), 1)
    centred = scores[graded] - (np.bincount(group, scores[graded]) / sizes)[group]
    spread = np.sqrt(np.bincount(group, centred**2) / sizes)[group]
    found[graded] = np.where(spread > EPSILON, centred / (spread + EPSILON), 0.0)
    return found


def choose_rows(scores: np.ndarray, groups: np.ndarray, keep: int | str) -> np.ndarray:
    """bool `[rows]`: the rows that `rollout.keep` lets go on. What cannot be graded is neither right nor wrong.

    A number keeps so many rows of each group: those of the best score, of equal ones the first; the ungraded come last.
    """
    if keep == "all":
        return np.ones(len(scores), bool)
    if isinstance(keep, str):
        chosen: np.ndarray = scores >= 1 if keep == "right" else scores < 1
        return chosen
    _, group = np.unique(groups.astype(str), return_inverse=True)
    order = np.lexsort((-np.nan_to_num(scores, nan=-np.inf), group))
    sizes = np.bincount(group)
    rank = np.empty(len(scores), np.int64)
    rank[order] = np.arange(len(scores)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return rank < keep

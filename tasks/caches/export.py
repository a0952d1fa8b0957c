"""Write what a run's teacher said of texts as a data set: a cache that stands in the place of the teacher."""

import re
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from configs.errors import BadInput
from configs.models import Context
from configs.schema import Recipe
from storage.artifacts import read_table
from storage.caches import check_target, writing_cache
from storage.schemas import CACHED_TEXTS
from storage.store import Run
from tasks.caches.compact import compact, cut
from tasks.running.progress import logger
from tasks.views.cache_card import name_source, render_cache_card
from tasks.views.inspect import check_run, open_run

SHARD = re.compile(r"round=(\d+)/scores/(part-\d+)")
OF_ROLLOUTS = ["rollout_id", "prompt_id", "source", "text", "finish_reason"]


def export_cache(address: str, out: str, *, error: float, top_p: float) -> dict[str, Any]:
    """Write the texts of the run at `address` that its student did not write, with all that a student learns from them.

    Each text of a prompt is written once. Laws are cut at `top_p` and rounded as `compact` does it. Returns what
    `cache.json` says. Raises BadInput where the run has nothing of the kind, and leaves nothing behind then.
    """
    check_run(address)
    check_target(out)
    run = open_run(address)
    recipe = run.frozen_recipe()
    assert recipe is not None
    _check_recipe(run, recipe)
    vocab, prompts = run.find("vocab/teacher"), run.find("prompts/train")
    if vocab is None or prompts is None:
        raise BadInput(f"{run.path}: nothing is scored yet; continue the run first")
    figures = dict.fromkeys(("texts", "tokens", "events", "on_policy", "unscored", "twice"), 0)
    seen: set[tuple[str, tuple[int, ...]]] = set()
    asked: set[str] = set()
    teachers: set[str] = set()
    changes: list[np.ndarray] = []
    rests: list[np.ndarray] = []
    with writing_cache(out) as writer:
        for rollouts, scores in _list_shards(run):
            texts = _choose_texts(rollouts, scores, seen, figures)
            if not len(texts):
                continue
            teachers |= set(texts["teacher"].to_pylist())
            if len(teachers) > 1:
                raise BadInput(f"{run.path}: scored by several teachers, and a cache is what one said; export another run")
            texts, change = compact(cut(texts, top_p) if top_p < recipe.score.top_p else texts, error)
            writer.add_texts(texts)
            asked |= set(texts["prompt_id"].to_pylist())
            changes.append(change)
            rests.append(np.exp(pc.list_flatten(texts["rest"]).to_numpy().astype(np.float64)))
            figures["texts"] += len(texts)
            figures["tokens"] += len(change)
            figures["events"] += len(pc.list_flatten(texts["law_classes"]))
        if not figures["texts"]:
            raise BadInput(
                f"{run.path}: no scored text of the teacher's or reference ({figures['on_policy']} are the student's own "
                "samples): make a run with rollout.on_policy = 0"
            )
        table = read_table(prompts)
        table = table.filter(pc.is_in(table["prompt_id"], pa.array(sorted(asked)))).drop_columns(["split"])
        told = {
            "made_by": f"potstill {version('potstill')}",
            "teacher": {"name": name_source(recipe), "digest": teachers.pop(), "reads": _what_it_reads(recipe)},
            "signal": {"name": recipe.score.signal, "k": recipe.score.k, "top_p": min(recipe.score.top_p, top_p)},
            "prompts": len(table),
            **figures,
            "bytes_per_token": round(writer.texts_bytes / figures["tokens"], 2),
            "rounding": {
                "limit": error,
                "largest": float(max(change.max() for change in changes)),
                "mean": float(np.concatenate(changes).mean()),
            },
            "outside": {"largest": float(max(rest.max() for rest in rests)), "mean": float(np.concatenate(rests).mean())},
        }
        writer.finish(table, read_table(vocab), told, render_cache_card(recipe, told))
    return told


def _check_recipe(run: Run, recipe: Recipe) -> None:
    if recipe.teachers:
        raise BadInput(f"{run.path}: a cache is one teacher's, and this run has several; export a run with one [teacher]")
    if recipe.teacher is None or not recipe.objective.needs_teacher:
        raise BadInput(f"{run.path}: no teacher scored its texts; export a run with a [teacher] and score.signal = 'bytes'")
    if recipe.teacher.cache is not None:
        raise BadInput(f"{run.path}: its teacher is a cache already, {recipe.teacher.cache}; copy that")
    if recipe.score.signal != "bytes":
        raise BadInput(
            f"{run.path}: score.signal = '{recipe.score.signal}', and a cache holds next-byte laws, which fit every student; "
            "export a run with score.signal = 'bytes'"
        )


def _what_it_reads(recipe: Recipe) -> dict[str, Any]:
    """What the teacher made of a prompt for itself alone, where its recipe says so."""
    assert recipe.teacher is not None
    fields = Context.model_fields
    told = recipe.teacher.model_dump(mode="json", include=set(fields))
    return {name: value for name, value in told.items() if getattr(recipe.teacher, name) != fields[name].default}


def _list_shards(run: Run) -> Iterator[tuple[pa.Table, pa.Table]]:
    """The rollouts and scores of every scored shard that is still there."""
    cleared = 0
    for slot, manifest in run.manifests():
        if not SHARD.fullmatch(slot):
            continue
        other = slot.replace("/scores/", "/rollouts/")
        rollouts, scores, beside = run.find(other), run.find(slot), run.manifest(other)
        if manifest.get("cleared") or rollouts is None or scores is None or (beside or {}).get("cleared"):
            cleared += 1
            continue
        yield read_table(rollouts, OF_ROLLOUTS), read_table(scores)
    if cleared:
        logger.warning("%s: %d shards were cleared, so they are not in the cache", run.path, cleared)


def _choose_texts(
    rollouts: pa.Table, scores: pa.Table, seen: set[tuple[str, tuple[int, ...]]], figures: dict[str, int]
) -> pa.Table:
    """The rows of a cache's texts with the teacher's digest: what was scored of others' texts, and not `seen` before."""
    assert rollouts["rollout_id"].equals(scores["rollout_id"])
    keep = []
    columns = (rollouts["source"], scores["status"], rollouts["prompt_id"], scores["token_ids"])
    for source, status, prompt_id, ids in zip(*(column.to_pylist() for column in columns), strict=True):
        key = (prompt_id, tuple(ids or ()))
        left_out = (source == "student" and "on_policy") or (status != "ok" and "unscored") or (key in seen and "twice")
        keep.append(not left_out)
        if left_out:
            figures[left_out] += 1
        else:
            seen.add(key)
    common = {name: rollouts[name] for name in OF_ROLLOUTS if name in CACHED_TEXTS.names}
    scored = {name: scores[name] for name in (*CACHED_TEXTS.names, "teacher") if name in scores.column_names}
    return pa.table(common | scored).filter(pa.array(keep, pa.bool_())).combine_chunks()

"""What a cache holds of the rows of a round: the texts in place of the teacher's completions, and its scores of them."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from configs.errors import BadInput
from configs.schema import Recipe
from storage.caches import Cache, open_cache
from storage.schemas import CACHED_TEXTS, COMPLETIONS, SCORES, without_teacher
from tasks.models.reference import CACHE, ModelRef
from tasks.models.text import side
from tasks.rows.plan import Row
from tasks.rows.sources import split_prompts
from tasks.running.progress import logger
from tasks.tokens.byte_laws import STOP
from tasks.tokens.ragged import flat, offsets_of

OF_TEXTS = ["prompt_id", "source", "text", "token_ids", "finish_reason"]
PER_TOKEN = ("logprobs", "law_counts", "rest")
LAWS = [name for name in CACHED_TEXTS.names if name in SCORES.names]


def recall_completions(rows: Iterable[Row], prompts: pa.Table, teacher: ModelRef) -> pa.Table:
    """The text of each row as a completion, in the teacher's ids. The texts of a prompt take turns, over samples and epochs.

    `policy` is the digest of the teacher that wrote it; empty for a reference. Raises BadInput for a prompt without a text.
    """
    cache, ids = open_cache(teacher.path), prompts["prompt_id"].to_pylist()
    planned = [row for row in rows if row.source == "teacher"]
    texts: dict[str, list[dict[str, Any]]] = {}
    found = cache.texts({ids[row.prompt] for row in planned}, OF_TEXTS)
    _refuse(cache, _faults_of_ids(found, len(side(teacher).beta.values)))
    for text in found.to_pylist():
        texts.setdefault(text["prompt_id"], []).append(text)
    writer, records, given = cache.told["teacher"]["digest"], [], set[tuple[str, int]]()
    for row in planned:
        if not (of_prompt := texts.get(ids[row.prompt])):
            raise missing(cache, ids[row.prompt])
        text = of_prompt[row.before % len(of_prompt)]
        given.add((text["prompt_id"], row.before % len(of_prompt)))
        policy = writer if text["source"] == "teacher" else ""
        records.append({"rollout_id": row.rollout_id, "policy": policy, "engine": CACHE if policy else "", **text})
    if len(given) < len(planned):
        logger.warning(
            "%d of %d rows have a text for the second time: the cache has no more", len(planned) - len(given), len(planned)
        )
    return pa.Table.from_pylist(records, COMPLETIONS)


def recall_scores(completions: pa.Table, teacher: ModelRef) -> pa.Table:
    """The scores of what `recall_completions` gave, one row of `SCORES` each, in order."""
    cache = open_cache(teacher.path)
    texts = cache.texts(set(completions["prompt_id"].to_pylist()), ["prompt_id", *LAWS])
    _refuse(cache, _faults_of_ids(texts, len(side(teacher).beta.values)) or _faults_of_laws(texts))
    places = {key: place for place, key in enumerate(_keys(texts))}
    found = texts.take(pa.array([places[key] for key in _keys(completions)], pa.int64()))
    columns = {name: found[name] for name in LAWS}
    same = {"teacher": cache.told["teacher"]["digest"], "status": "ok"}
    columns |= {"rollout_id": completions["rollout_id"], **{name: pa.array([text] * len(found)) for name, text in same.items()}}
    schema = without_teacher(SCORES)
    others = {field.name: pa.nulls(len(found), field.type) for field in schema if field.name not in columns}
    return pa.table(columns | others).select(schema.names).cast(schema)


def check_cached_prompts(recipe: Recipe, teacher: ModelRef) -> None:
    """Raise BadInput where a prompt that a recipe trains on has no text in its cache."""
    cache = open_cache(teacher.path)
    known = cache.prompt_ids()
    asked = split_prompts(recipe.prompts, recipe.seed)["train"]["prompt_id"].to_pylist()
    lacking = [prompt_id for prompt_id in asked if prompt_id not in known]
    if lacking:
        raise missing(cache, lacking[0], len(lacking) - 1)


def missing(cache: Cache, prompt_id: str, more: int = 0) -> BadInput:
    """The message about prompts of a recipe that a cache has no text of."""
    others = f" and of {more:,} more" * bool(more)
    return BadInput(
        f"teacher.cache: {cache.folder} has no text of prompt {prompt_id}{others}, and no teacher is here to write one; set "
        "prompts.source = 'cache', or export a cache of these prompts"
    )


def _keys(table: pa.Table) -> list[tuple[str, tuple[int, ...]]]:
    ids = [tuple(row) for row in table["token_ids"].to_pylist()]
    return list(zip(table["prompt_id"].to_pylist(), ids, strict=True))


def _faults_of_ids(texts: pa.Table, size: int) -> list[str]:
    ids = flat(texts["token_ids"])[0]
    null, beyond = any(column.null_count for column in texts.columns), ((ids < 0) | (ids >= size)).any()
    return ["a null in it"] * null + ["token ids beyond its vocabulary"] * bool(beyond)


def _faults_of_laws(texts: pa.Table) -> list[str]:
    lengths = {name: pc.list_value_length(texts[name]).to_numpy() for name in LAWS}
    values = {name: flat(texts[name])[0].astype(np.float64) for name in LAWS}
    tokens, events = lengths["token_ids"], lengths["law_classes"]
    if any((lengths[name] != tokens).any() for name in PER_TOKEN) or (lengths["law_logprobs"] != events).any():
        return ["lists of different lengths"]
    bounds, total = offsets_of(tokens), np.concatenate([[0], np.cumsum(values["law_counts"])])
    faults = {
        "counts that do not add up": (total[bounds[1:]] - total[bounds[:-1]] != events).any()
        or (values["law_counts"] < 0).any(),
        "next bytes that are none": ((values["law_classes"] < 0) | (values["law_classes"] > STOP)).any(),
        # NaN is not below anything; rounding may lift a log-prob of 0.
        "log-probs that are none": not all((values[name] <= 0.01).all() for name in ("logprobs", "law_logprobs", "rest")),
    }
    return [fault for fault, there in faults.items() if there]


def _refuse(cache: Cache, faults: list[str]) -> None:
    """Refuse what cannot be: a cache may be a stranger's, and what is wrong in it would be trained on."""
    if faults:
        raise BadInput(f"{cache.folder}: texts with {faults[0]}; the cache cannot be used: export it anew")

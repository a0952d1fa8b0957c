"""Where prompts come from, and how they are split into training and held-out ones."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from configs.errors import BadInput
from configs.schema import FilePrompts, GymPrompts, HubPrompts, Prompts
from storage.lineage import digest_json
from storage.schemas import PROMPTS
from tasks.running.progress import logger
from tasks.running.seeds import derive_seed

ATTEMPTS = 20  # procedural items drawn for each prompt wanted, before their supply counts as exhausted


def check_prompts(config: Prompts, seed: int, references: bool = False) -> None:
    """Raise BadInput where `config` cannot give prompts, or none with a reference where `references` are needed.

    A file is read whole, of a task one item is made.
    """
    if next(iter(_rows(config, seed)), None) is None:
        raise BadInput(f"prompts.{_where(config)}: no prompts in it; give rows with `messages` or `prompt`")
    if isinstance(config, FilePrompts):
        rows = _split_rows(config, seed)["train"]
        if references and not any(row["reference"] for row in rows):
            raise BadInput(f"prompts.{_where(config)}: no row has a `reference`, which student.scratch and sft learn from")


def split_prompts(config: Prompts, seed: int) -> dict[str, pa.Table]:
    """Distinct prompts, dealt to train and eval by a hash of their content, so that no prompt is in both."""
    dealt = _split_rows(config, seed)
    for split, wanted in (("train", config.train), ("eval", config.eval)):
        if (found := len(dealt[split])) < wanted:
            logger.warning("prompts: %s has %d distinct prompts, prompts.%s asks for %d", split, found, split, wanted)
    return {split: pa.Table.from_pylist(rows, PROMPTS) for split, rows in dealt.items()}


def _split_rows(config: Prompts, seed: int) -> dict[str, list[dict[str, Any]]]:
    wanted = {"train": config.train, "eval": config.eval}
    found: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
    seen: set[str] = set()
    share = config.eval / (config.eval + config.train)
    for row in _rows(config, seed):
        identity = digest_json(row["messages"])[:16]
        if identity in seen:
            continue
        seen.add(identity)
        split = "eval" if int(identity, 16) / 16**16 < share else "train"
        if len(found[split]) < wanted[split]:
            found[split].append({"prompt_id": identity, "split": split, **row})
        elif all(len(found[s]) == wanted[s] for s in wanted):
            break
    for split, rows in found.items():
        if not rows:
            raise BadInput(f"prompts.{_where(config)}: only {len(seen)} distinct prompts, none of them for {split}; give more")
    return found


def _where(config: Prompts) -> str:
    match config:
        case GymPrompts():
            return f"task: {config.task}"
        case FilePrompts():
            return f"path: {config.path}"
        case HubPrompts():
            return f"dataset: {config.dataset}"


def _rows(config: Prompts, seed: int) -> Iterator[dict[str, Any]]:
    match config:
        case GymPrompts():
            return _gym_rows(config, seed)
        case FilePrompts():
            return _table_rows(config, read_rows(Path(config.path)))
        case HubPrompts():
            return _table_rows(config, _hub_rows(config))


def load_gym_dataset(name: str, options: dict[str, Any], seed: int = 0, size: int = 1) -> Any:
    """A reasoning-gym dataset; BadInput names an unknown task or option."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        near = ", ".join(sorted(d for d in DATASETS if set(name.split("_")) & set(d.split("_"))) or sorted(DATASETS)[:10])
        raise BadInput(f"prompts.task: reasoning-gym has no task '{name}'; near it: {near}")
    try:
        return reasoning_gym.create_dataset(name, **options, seed=seed, size=size)
    except (TypeError, AssertionError, ValueError) as error:
        raise BadInput(f"prompts.options: {name} does not take {options}: {error}") from None


def _gym_rows(config: GymPrompts, seed: int) -> Iterator[dict[str, Any]]:
    size = ATTEMPTS * (config.train + config.eval)
    for entry in load_gym_dataset(config.task, config.options, derive_seed(seed, "prompts") % 2**31, size):
        fields = {**entry["metadata"], "question": entry["question"]}
        metadata = {"task": config.task, "options": config.options, "entry": entry}
        yield {
            "messages": [{"role": "user", "content": _fill_template(config.template, fields)}],
            "reference": entry["answer"],
            "metadata": json.dumps(metadata, default=str),
        }


def read_rows(path: Path, field: str = "prompts.path") -> Iterable[dict[str, Any]]:
    """Rows of a JSONL or Parquet file; BadInput says what is wrong with it, and which `field` named it."""
    try:
        if path.suffix == ".parquet":
            return pl.read_parquet(path).iter_rows(named=True)
        if path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8").split("\n")
            return [_parse(line, number) for number, line in enumerate(lines, 1) if line.strip()]
    except FileNotFoundError:
        raise BadInput(f"{field}: {path}: no such file; give a .jsonl or .parquet file") from None
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        raise BadInput(f"{field}: {path}: cannot be read as {path.suffix[1:]}: {error}") from None
    raise BadInput(f"{field}: {path}: neither .jsonl nor .parquet")


def _parse(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from None


def _hub_rows(config: HubPrompts) -> Iterable[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise BadInput("prompts.source: 'hub' needs the datasets package: pip install -e '.[hub]'") from None
    try:
        rows: Iterable[dict[str, Any]] = load_dataset(config.dataset, config.subset, split=config.hub_split)
        return rows
    except (OSError, ValueError) as error:
        raise BadInput(f"prompts.dataset: {config.dataset} cannot be loaded: {error}") from None


def _table_rows(config: FilePrompts | HubPrompts, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    where = _where(config)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise BadInput(f"prompts.{where}: row {number} is {row!r:.60}; give objects with `messages` or `prompt`")
        messages = row.get("messages")
        if messages is None:
            if "prompt" not in row:
                raise BadInput(
                    f"prompts.{where}: row {number} has neither `messages` nor a text `prompt`; it has {sorted(row)}"
                )
            if not _is_text(row["prompt"]):
                raise BadInput(f"prompts.{where}: row {number}: `prompt` must be text, found {row['prompt']!r:.60}")
            messages = [{"role": "user", "content": _fill_template(config.template, {**row, "question": row["prompt"]})}]
        if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
            raise BadInput(
                f"prompts.{where}: row {number}: `messages` must be a list of {{role, content}}, both text, "
                f"found {messages!r:.60}"
            )
        reference = row.get("reference")
        if isinstance(reference, str) and not _is_text(reference):
            raise BadInput(f"prompts.{where}: row {number}: `reference` must be text, found {reference!r:.60}")
        rest = {key: value for key, value in row.items() if key not in ("messages", "prompt", "reference")}
        yield {
            "messages": [{"role": m["role"], "content": m["content"]} for m in messages],
            "reference": None if reference is None else str(reference),
            "metadata": json.dumps(rest, default=str),
        }


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(_is_text(message.get(key)) for key in ("role", "content"))


def _is_text(value: Any) -> bool:
    """Whether it is a string that UTF-8 can hold: JSON's escapes can spell half a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _fill_template(template: str, fields: dict[str, Any]) -> str:
    try:
        return template.format_map(fields)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        known = ", ".join(sorted(fields))
        raise BadInput(f"prompts.template: {template!r} cannot be filled ({error!r}); fields here: {known}") from None

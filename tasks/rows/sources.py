"""Where prompts come from: procedural tasks, files, data sets of the hub."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from string import Formatter
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from configs.errors import BadInput
from configs.prompts import CachePrompts, FilePrompts, GymPrompts, HubPrompts, Prompts, PromptSource, TablePrompts
from configs.teachers import Teacher, choose_teacher, role_of
from storage.caches import PROMPTS_FILE, open_cache
from storage.lineage import digest_file, digest_json
from tasks.models.template import Message, Unfilled, fill_template, last_of_user, write_last
from tasks.rows.conventions import Convention, Reading, Row, choose_convention, pick
from tasks.rows.files import find_files, read_file
from tasks.rows.hub import digest_hub_dataset, load_hub_dataset
from tasks.rows.messages import Refused, check_length, check_prompt, load_messages, read_reasoning, read_reference
from tasks.rows.split import UNREAD, Judge, Refusal, RefusedRow, SourceRow, Split, accept_all, split_stream, split_table
from tasks.rows.teachers import check_teachers
from tasks.rows.trajectories import list_turns
from tasks.running.progress import logger
from tasks.running.seeds import derive_seed

LOOKED_AT = 64  # procedural items, to find out which rows are whose
ATTEMPTS = 20  # procedural items drawn for each prompt wanted, before their supply counts as exhausted
PLAIN: str = PromptSource.model_fields["template"].default
FIELD = "prompts.template"
CHECKED: set[str] = set()  # digests of what this process found right

Placed = tuple[str, Any]  # a row behind the place it stands at: `data/a.jsonl: row 3`


def check_prompts(
    config: Prompts,
    seed: int,
    references: bool = False,
    templates: Mapping[str, str] = MappingProxyType({}),
    teachers: Sequence[Teacher] = (),
) -> None:
    """Raise BadInput where `config` cannot give prompts, or none with a reference where `references` are needed, or rows that
    `templates` (of a side, by their field) cannot be filled with, or that none of several `teachers` takes.

    Every row of a file or a data set is read; of a task one item is made, or some where there are several teachers. What was
    found right is not read again.
    """
    if isinstance(config, GymPrompts):
        some = list(islice(_gym_rows(config, seed), LOOKED_AT if teachers else 1))
        check_teachers(teachers, [(row.place, row.fields) for row in some], whole=False)
        _check_templates(templates, some, teachers)
        return
    whose = [teacher.model_dump(mode="json", include={"name", "where"}) for teacher in teachers]
    key = digest_json([config.model_dump(mode="json"), digest_source(config), references, dict(templates), whose])
    if key in CHECKED:
        return
    split, strict = deal_prompts(config, seed), not isinstance(config, TablePrompts) or config.unusable == "refuse"
    check_teachers(teachers, [(row.place, row.fields) for row in (*split.train, *split.eval)], all_taken=strict)
    if strict:  # else such rows are left out, once both sides are there to say which
        _check_templates(templates, [*split.train, *split.eval], teachers)
    if references and not any(row.reference for row in split.train):
        raise BadInput(f"{_where(config)}: no row has a `reference`, which student.scratch and sft learn from")
    CHECKED.add(key)


def _check_templates(templates: Mapping[str, str], rows: list[SourceRow], teachers: Sequence[Teacher]) -> None:
    owners = {f"{role_of(teacher)}.template": teacher for teacher in teachers}
    for field, template in templates.items():
        for row in rows:
            if field in owners and owners[field] is not _teacher_of(teachers, row):
                continue
            try:
                write_last(row.messages, template, row.fields)
            except Unfilled as error:
                raise _unfilled(field, template, row.place, error) from None


def _teacher_of(teachers: Sequence[Teacher], row: SourceRow) -> Teacher | None:
    at = choose_teacher(teachers, row.fields)
    return None if at is None else teachers[at]


def split_prompts(config: Prompts, seed: int, judge: Judge = accept_all) -> dict[str, pa.Table]:
    """The tables `train` and `eval`: distinct prompts, none of them in both."""
    return deal_prompts(config, seed, judge).tables()


def deal_prompts(config: Prompts, seed: int, judge: Judge = accept_all) -> Split:
    """Distinct prompts, dealt to train and eval by a hash of their content, and what became of every row.

    Of rows of files and data sets `judge` says which are left out.
    """
    try:
        if isinstance(config, GymPrompts):
            return split_stream(_gym_rows(config, seed), config.train, config.eval)
        if isinstance(config, CachePrompts):
            return split_table(_cache_rows(config), config.train, config.eval, judge)
        rows = list(_file_rows(config) if isinstance(config, FilePrompts) else _hub_rows(config))
        if not rows:
            raise Refused("no prompts in it; give rows with `messages` or `prompt`, or in another convention")
        return split_table(rows, config.train, config.eval, judge)
    except Refused as error:
        raise BadInput(f"{_where(config)}: {error}") from None


def warn_of_few(config: Prompts, split: Split) -> None:
    """Say where there are fewer prompts than the recipe asks for, and why rows were left out."""
    for outcome, why in split.refusals.items():
        logger.warning("%s: %s, as the first of them: %s", field_of(config), outcome, why)
    for side, rows, wanted in (("train", split.train, config.train), ("eval", split.eval, config.eval)):
        if wanted is not None and len(rows) < wanted:
            logger.warning("prompts: %s has %d distinct prompts, prompts.%s asks for %d", side, len(rows), side, wanted)


def field_of(config: Prompts) -> str:
    """The field that names the source."""
    match config:
        case GymPrompts():
            return "prompts.task"
        case FilePrompts():
            return "prompts.paths" if config.paths else "prompts.path"
        case HubPrompts() | CachePrompts():
            return "prompts.dataset"


def _where(config: Prompts) -> str:
    match config:
        case GymPrompts():
            found = config.task
        case FilePrompts():
            found = ", ".join(entry.path for entry in config.entries)
        case HubPrompts() | CachePrompts():
            found = config.dataset
    return f"{field_of(config)}: {found}"


def digest_source(config: Prompts) -> list[str]:
    """Digests of all that is read: of each file in order, of a data set's rows; none of a generated task."""
    match config:
        case GymPrompts():
            return []
        case FilePrompts():
            return [digest_file(file) for entry in config.entries for file in find_files(entry.path, field_of(config))]
        case HubPrompts():
            return [digest_hub_dataset(config)]
        case CachePrompts():
            return [str(open_cache(config.dataset).told["files"][PROMPTS_FILE])]


# -- procedural tasks --------------------------------------------------------------------------------------------------


def load_gym_dataset(name: str, options: dict[str, Any], seed: int = 0, size: int = 1) -> Any:
    """A reasoning-gym dataset; BadInput names an unknown task or option."""
    import reasoning_gym
    from reasoning_gym.composite import DatasetSpec
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        near = ", ".join(sorted(d for d in DATASETS if set(name.split("_")) & set(d.split("_"))) or sorted(DATASETS)[:10])
        raise BadInput(f"prompts.task: reasoning-gym has no task '{name}'; near it: {near}")
    try:
        if name == "composite":  # several tasks, of which each item is one's
            options = {**options, "datasets": [DatasetSpec(**{"weight": 1, "config": {}} | s) for s in options["datasets"]]}
        return reasoning_gym.create_dataset(name, **options, seed=seed, size=size)
    except (TypeError, KeyError, AssertionError, ValueError) as error:
        raise BadInput(f"prompts.options: {name} does not take {options}: {error}") from None


def _gym_rows(config: GymPrompts, seed: int) -> Iterator[SourceRow]:
    size = ATTEMPTS * (config.train + config.eval)
    for entry in load_gym_dataset(config.task, config.options, derive_seed(seed, "prompts") % 2**31, size):
        fields = {"prompt": entry["question"], **entry["metadata"], "question": entry["question"]}
        metadata = {"task": config.task, "options": config.options, "entry": entry}
        try:
            content = fill_template(config.template, fields, Formatter())  # which writes lists of numbers as well
        except Unfilled as error:
            raise _unfilled(FIELD, config.template, f"prompts of {config.task}", error) from None
        messages, known = [{"role": "user", "content": content}], json.dumps(metadata, default=str)
        yield SourceRow(config.task, "reasoning-gym", messages, entry["answer"], known, place=f"prompts of {config.task}")


# -- files and data sets -----------------------------------------------------------------------------------------------


def _file_rows(config: FilePrompts) -> Iterator[SourceRow | RefusedRow]:
    field = field_of(config)
    for entry in config.entries:
        files = find_files(entry.path, field)
        rows = [(f"{file}: row {number}", row) for file in files for number, row in read_file(file, field)]
        yield from _table_rows(config, field, rows, entry.path, entry.weight, entry.add)


def _hub_rows(config: HubPrompts) -> Iterator[SourceRow | RefusedRow]:
    rows = [(f"{config.dataset}: row {number}", row) for number, row in enumerate(load_hub_dataset(config), 1)]
    yield from _table_rows(config, "prompts.dataset", rows, config.dataset)


def _cache_rows(config: CachePrompts) -> Iterator[SourceRow]:
    for row in open_cache(config.dataset).prompts().to_pylist():
        messages, reference = load_messages([row["messages"]])[0], row["reference"]
        place = f"{config.dataset}: prompt {row['prompt_id']}"
        yield SourceRow(config.dataset, "cache", messages, reference, row["metadata"] or "{}", row.get("tools"), place=place)


def _table_rows(
    config: TablePrompts,
    field: str,
    rows: list[Placed],
    source: str,
    weight: float | None = None,
    add: Mapping[str, Any] = MappingProxyType({}),
) -> Iterator[SourceRow | RefusedRow]:
    """The rows of one path or data set, all in one convention; each gets the columns of `add`."""
    for place, row in rows:
        if not isinstance(row, dict):
            raise BadInput(f"{field}: {place} is {row!r:.60}; give objects with `messages` or `prompt`")
    if not rows:
        return
    convention = _recognise(config, field, rows, source)
    consumed = {*convention.needs, *convention.may}
    title = convention.title + ", turn by turn" * (config.turns == "all")
    refused: list[str] = []
    for place, row in rows:
        try:
            reading = _read(config, convention, row)
            if convention.needs:
                check_prompt(reading.messages, convention.needs[0])
            turns = list_turns(reading, config.turns)
            asked = [_fill_template(config.template, row, turn.messages) for turn, _ in turns]
            check_length(asked[-1], reading.reference)  # the longest
            reasoning = read_reasoning(row, consumed)
        except Refused as error:
            refused.append(f"{place}: {error}")
            if config.unusable == "leave_out":
                yield RefusedRow(source, title, Refusal(UNREAD, refused[-1]))
            continue
        kept = {key: value for key, value in row.items() if key not in consumed} | {**add}
        tools = None if reading.tools is None else json.dumps(reading.tools)
        for messages, (turn, at) in zip(asked, turns, strict=True):
            thought = {"reasoning_content": reasoning} if turn is reading and turn.reference is not None and reasoning else {}
            metadata = json.dumps(kept | thought, default=str)
            yield SourceRow(source, title, messages, turn.reference, metadata, tools, weight, place, at)
    if refused and config.unusable == "refuse":
        more = f"; and {len(refused) - 1:,} more of {len(rows):,} rows cannot be read" if len(refused) > 1 else ""
        raise BadInput(f"{field}: {refused[0]}{more}")


def _recognise(config: TablePrompts, field: str, rows: list[Placed], source: str) -> Convention:
    """The convention of all rows; the fault of one that nobody named is shown at the first row."""
    columns = {key for _, row in rows for key in row}
    filled = {key for _, row in rows for key, value in row.items() if value is not None}
    named = config.columns.model_dump(exclude_none=True)
    try:
        for name, column in named.items():
            if columns.isdisjoint({column, column.partition(".")[0]}):
                raise Refused(f"prompts.columns.{name} = '{column}': there is no such column; there are {sorted(columns)}")
        templated = config.template != PLAIN
        return choose_convention(columns, filled, name=config.convention, given=config.columns, templated=templated)
    except Refused as error:
        place = source if named or config.convention else rows[0][0]
        raise BadInput(f"{field}: {place}: {error}") from None


def _read(config: TablePrompts, convention: Convention, row: Row) -> Reading:
    named = config.columns.reference
    if named is None:
        return convention.read(row)
    reading = convention.read({key: value for key, value in row.items() if key != "reference"} if named in row else row)
    return Reading(reading.messages, read_reference(pick(row, named), named), reading.tools)


# -- templates ---------------------------------------------------------------------------------------------------------


def _fill_template(template: str, row: Row, messages: list[Message]) -> list[Message]:
    """The messages with the user's last one written by the template, in which it is `{prompt}` and `{question}`."""
    if template == PLAIN and messages:
        return messages
    at = last_of_user(messages)
    asked = {} if at is None else dict.fromkeys(("prompt", "question"), messages[at]["content"])
    try:
        if not messages:
            return [{"role": "user", "content": fill_template(template, row)}]
        return write_last(messages, template, row | asked)
    except Unfilled as error:
        raise Refused(f"{FIELD}: {template!r} cannot be filled: {error}") from None


def _unfilled(field: str, template: str, place: str, error: Unfilled) -> BadInput:
    return BadInput(f"{field}: {template!r} cannot be filled for {place}: {error}")

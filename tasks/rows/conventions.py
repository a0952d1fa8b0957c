"""The conventions that data sets are written in: which columns each needs, and how a row becomes a prompt and an answer.

To add one, add an entry to `CONVENTIONS`: nothing else lists them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from configs.prompts import Columns
from tasks.models.template import Message
from tasks.rows.messages import (
    Refused,
    Tools,
    expect_text,
    read_conversation,
    read_messages,
    read_reference,
    read_tools,
    split_answer,
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Reading:
    """What a row says."""

    messages: list[Message]
    reference: str | None = None
    tools: Tools | None = None


@dataclass(frozen=True)
class Convention:
    """`read` gives a row's Reading, or raises Refused. The columns in `may` are read where they are there."""

    name: str  # as prompts.convention names it
    title: str  # as people know it
    needs: tuple[str, ...]
    read: Callable[[Row], Reading]
    may: tuple[str, ...] = ()
    question: str = ""  # the column of a prompt that is one text, which others may belong to

    def reads(self, columns: set[str]) -> set[str]:
        return columns & {*self.needs, *self.may}


def read_own(row: Row) -> Reading:
    """Potstill's own and OpenAI's: `messages`, otherwise `prompt`; `reference`, otherwise the answer that they end with."""
    column = "messages" if row.get("messages") is not None else "prompt"
    if column == "messages":
        prompt, answer = split_answer(read_messages(row["messages"], column))
    elif column in row:
        prompt, answer = split_answer(read_conversation(row[column], column))
    else:
        raise Refused(f"it has neither `messages` nor `prompt`; it has {sorted(row)}")
    given = read_reference(row.get("reference"), "reference")
    if given is not None and answer is not None and given != answer:
        raise Refused(
            f"`{column}` end with an answer of the assistant, and `reference` is another, {given!r:.60}; "
            f'say which: prompts.columns = {{ prompt = "{column}", reference = "reference" }} takes the column'
        )
    return Reading(prompt, answer if given is None else given, read_tools(row.get("tools")))


def read_trl(row: Row) -> Reading:
    """TRL: `prompt` and `completion`, each text or a list of messages."""
    return _answered(row, "prompt", "completion")


def read_preference(row: Row) -> Reading:
    """Preferences: the chosen answer is the reference. `chosen` may hold the whole conversation."""
    chosen = row.get("chosen")
    if isinstance(chosen, list) and any(message["role"] == "user" for message in read_messages(chosen, "chosen")):
        return Reading(*split_answer(read_messages(chosen, "chosen")), read_tools(row.get("tools")))
    if row.get("prompt") is None:
        raise Refused(f"`chosen` is an answer without its prompt, {chosen!r:.60}; give a `prompt`, or lists of messages")
    return _answered(row, "prompt", "chosen")


def read_verl(row: Row) -> Reading:
    """verl: `prompt`, a list of messages, and `reward_model.ground_truth`."""
    model = row.get("reward_model")
    truth = model.get("ground_truth") if isinstance(model, dict) else model
    reference = read_reference(truth, "reward_model.ground_truth")
    return Reading(read_conversation(row.get("prompt"), "prompt"), reference, read_tools(row.get("tools")))


def read_sharegpt(row: Row) -> Reading:
    """ShareGPT: `conversations` of `{from, value}`, and sometimes a column `system`."""
    prompt, answer = split_answer(read_messages(row.get("conversations"), "conversations"))
    return Reading(_with_system(row.get("system"), prompt), answer, read_tools(row.get("tools")))


def read_input_output(row: Row) -> Reading:
    """`input`, text or a list of messages, and `output`; perhaps `system_prompt`."""
    reading = _answered(row, "input", "output")
    return Reading(_with_system(row.get("system_prompt"), reading.messages), reading.reference, reading.tools)


def pair(name: str, title: str, prompt: str, answer: str, *, context: str = "", system: str = "") -> Convention:
    """A column with the prompt and one with its answer; `context` stands behind the prompt and an empty line."""

    def read(row: Row) -> Reading:
        parts = [expect_text(row.get(prompt), prompt)]
        if row.get(context) not in (None, ""):
            parts.append(expect_text(row[context], context))
        messages = _with_system(row.get(system), [{"role": "user", "content": "\n\n".join(parts)}])
        return Reading(messages, read_reference(row.get(answer), answer))

    return Convention(name, title, (prompt, answer), read, tuple(filter(None, (context, system))), question=prompt)


CONVENTIONS = (
    Convention("messages", "chat messages", ("messages",), read_own, ("prompt", "reference", "tools")),
    Convention("prompt", "prompts", ("prompt",), read_own, ("reference", "tools")),
    Convention("trl", "TRL", ("prompt", "completion"), read_trl, ("tools",)),
    Convention("verl", "verl", ("prompt", "reward_model"), read_verl, ("tools",)),
    Convention("sharegpt", "ShareGPT", ("conversations",), read_sharegpt, ("system", "tools")),
    Convention("preference", "preferences", ("chosen", "rejected"), read_preference, ("prompt", "tools")),
    pair("question-answer", "question and answer", "question", "answer"),
    pair("alpaca", "Alpaca", "instruction", "output", context="input", system="system"),
    pair("dolly", "Dolly", "instruction", "response", context="context"),
    pair("openorca", "OpenOrca", "question", "response", system="system_prompt"),
    Convention("input-output", "input and output", ("input", "output"), read_input_output, ("system_prompt", "tools")),
    pair("query-response", "query and response", "query", "response"),
    pair("problem-solution", "problem and solution", "problem", "solution"),
    pair("problem-answer", "problem and answer", "problem", "answer"),
    pair("prompt-response", "prompt and response", "prompt", "response"),
    pair("prompt-answer", "prompt and answer", "prompt", "answer"),
    pair("prompt-solution", "prompt and solution", "prompt", "solution"),
)


PARTS = {"choices", "options", "context", "passage", "article", "document"}  # of a question, in data sets that have them apart


def choose_convention(columns: set[str], filled: set[str], *, name: str | None, given: Columns, templated: bool) -> Convention:
    """The convention that rows with these columns are in, or that the recipe names. Raises Refused.

    Columns with a value in some row (`filled`) say more than those without one. A convention whose columns contain all
    that another reads is the better one of the two. With a template of its own a recipe needs no convention: the
    template names the columns.
    """
    if given.prompt is not None:
        return _by_columns(given.prompt, given.reference)
    if name is not None:
        return _by_name(name, columns)
    columns = filled if any(filled.issuperset(c.needs) for c in CONVENTIONS) else columns
    fits = [c for c in CONVENTIONS if columns.issuperset(c.needs)]
    best = [c for c in fits if not any(c.reads(columns) < other.reads(columns) for other in fits)]
    if len(best) == 1:
        return best[0] if templated else _expect_whole(best[0], filled)
    if best:
        readings = " or ".join(f"{c.title} ({', '.join(sorted(c.reads(columns)))})" for c in best)
        names = " or ".join(f'"{c.name}"' for c in best)
        raise Refused(f"its columns can be read as {readings}; say which: prompts.convention = {names}")
    if templated:
        return Convention("columns", "columns through prompts.template", (), _read_template, ("reference",))
    tried = "; ".join(f"{c.title}: {', '.join(c.needs)}" for c in CONVENTIONS)
    raise Refused(
        f"its columns {sorted(columns)} are of no convention that is known ({tried}); name the columns: "
        'prompts.columns = { prompt = "…", reference = "…" }, or a prompts.template of them'
    )


def _expect_whole(convention: Convention, filled: set[str]) -> Convention:
    """Refuse a question whose choices or context stand in columns that would not be read."""
    if convention.question and (left := sorted(filled & PARTS - convention.reads(filled))):
        raise Refused(
            f"it has `{left[0]}` beside `{convention.question}`, and {convention.title} leaves that out; write it in: "
            f'prompts.template = "{{question}} {{{left[0]}}}" (an item of a list is {{{left[0]}[0]}}), or leave it out: '
            f'prompts.convention = "{convention.name}"'
        )
    return convention


def _by_name(name: str, columns: set[str]) -> Convention:
    known = {c.name: c for c in CONVENTIONS}
    if name not in known:
        raise Refused(f"prompts.convention = '{name}' is not known; one of {', '.join(known)}")
    if not columns.issuperset(known[name].needs):
        raise Refused(
            f"prompts.convention = '{name}' needs the columns {', '.join(known[name].needs)}; there are {sorted(columns)}"
        )
    return known[name]


def pick(row: Row, column: str) -> Any:
    """A column's value; `reward_model.ground_truth` is a field of one."""
    first, _, rest = column.partition(".")
    value = row.get(column, row.get(first))
    return pick(value, rest) if rest and column not in row and isinstance(value, dict) else value


def _by_columns(prompt: str, reference: str | None) -> Convention:
    """Columns that the recipe names; without one for the reference it is the answer that a conversation ends with."""

    def read(row: Row) -> Reading:
        messages, answer = split_answer(read_conversation(pick(row, prompt), prompt))
        return Reading(messages, answer, read_tools(row.get("tools")))

    return Convention("columns", "columns", (prompt,), read, (*([reference] if reference else []), "tools"))


def _read_template(row: Row) -> Reading:
    return Reading([], read_reference(row.get("reference"), "reference"))


def _answered(row: Row, prompt: str, answer: str) -> Reading:
    """A prompt and an answer that are texts or lists of messages each; turns of the answer before its last are prompt."""
    asked, given = read_conversation(row.get(prompt), prompt), row.get(answer)
    if not isinstance(given, list):
        return Reading(asked, read_reference(given, answer), read_tools(row.get("tools")))
    messages, reference = split_answer([*asked, *read_messages(given, answer)])
    return Reading(messages, reference, read_tools(row.get("tools")))


def _with_system(system: Any, messages: list[Message]) -> list[Message]:
    if system in (None, ""):
        return messages
    return [{"role": "system", "content": expect_text(system, "system")}, *messages]

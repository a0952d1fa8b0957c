"""Messages in one form, however a data set writes them: `role`, text `content`, and what turns with tools have beside it."""

import json
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from functools import cached_property
from math import isnan
from typing import Any, NamedTuple

import pyarrow as pa

from tasks.models.template import Message, last_of_user

Tools = list[dict[str, Any]]

MORE = ("name", "tool_calls", "tool_call_id", "reasoning_content")  # what a message may have beside role and content
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant"}
ROLES |= {"model": "assistant", "bot": "assistant", "system": "system", "developer": "developer", "tool": "tool"}
ROLES |= {"observation": "tool", "function_response": "tool", "function_call": "assistant"}  # of ShareGPT's `from`
UNASKED = {"system", "developer", "assistant"}  # roles that ask for no answer
MOST = 16_000_000  # characters of a row's texts: as tokens they take gigabytes, and no context holds them
WHOLE = 2.0**53  # floats below it stand for one integer each


class Refused(Exception):
    """Why rows cannot be used. Whoever reads them adds where they stand."""


def is_text(value: Any) -> bool:
    """Whether it is a string that UTF-8 can hold: JSON's escapes can spell half a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def expect_text(value: Any, column: str) -> str:
    if not is_text(value):
        raise Refused(f"`{column}` must be text, found {value!r:.60}")
    return str(value)


def read_conversation(value: Any, column: str) -> list[Message]:
    """A text as the user's message, or a list of messages in OpenAI's form or ShareGPT's."""
    if is_text(value):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise Refused(f"`{column}` must be text or a list of messages, found {value!r:.60}")
    return read_messages(value, column)


def read_messages(value: Any, column: str) -> list[Message]:
    """A list of `{role, content}`, or of `{from, value}`, in OpenAI's form. Raises Refused."""
    if not isinstance(value, list) or not value:
        raise Refused(_wrong(column, value))
    return [_from_sharegpt(m, column) if isinstance(m, dict) and "from" in m else _message(m, column, value) for m in value]


def split_answer(messages: list[Message]) -> tuple[list[Message], str | None]:
    """The prompt, and the assistant's message that a conversation ends with; an answer that calls tools has no text."""
    if messages[-1]["role"] != "assistant":
        return messages, None
    answer = messages[-1]
    return messages[:-1], None if "tool_calls" in answer else answer["content"]


def read_reasoning(row: dict[str, Any], columns: Iterable[str]) -> str | None:
    """The `reasoning_content` of the assistant's message that a conversation in one of these columns ends with."""
    for column in sorted(columns):
        last = value[-1] if isinstance(value := row.get(column), list) and value else None
        if isinstance(last, dict) and last.get("role") == "assistant" and last.get("reasoning_content"):
            return expect_text(last["reasoning_content"], f"{column}.reasoning_content")
    return None


def reasoning_of(metadata: str | None) -> str | None:
    """The reasoning that belongs to a prompt's reference, from its metadata."""
    return json.loads(metadata).get("reasoning_content") if metadata and '"reasoning_content"' in metadata else None


def check_prompt(messages: list[Message], column: str) -> None:
    """Refuse a conversation that asks for nothing."""
    if all(message["role"] in UNASKED for message in messages):
        roles = ", ".join(message["role"] for message in messages) or "none"
        raise Refused(f"`{column}` has no message to answer before the answer (roles: {roles}); give one of the user's")
    if not any(message["content"].strip() for message in messages if message["role"] not in UNASKED):
        raise Refused(f"`{column}` is empty; give a prompt, or leave the row out")


def check_length(messages: list[Message], reference: str | None) -> None:
    """Refuse a row that would take the machine's memory before its tokens were counted."""
    size = len(reference or "") + sum(
        len(value) for message in messages for value in message.values() if isinstance(value, str)
    )
    if size > MOST:
        raise Refused(f"its texts have {size:,} characters, more than {MOST:,}; leave the row out, or cut it")


def read_reference(value: Any, column: str) -> str | None:
    """The text of a reference: a text, a number (21.0 is "21") or true or false; None where there is none (null, NaN, "")."""
    if value is None or (isinstance(value, float | Decimal) and isnan(value)):
        return None
    if isinstance(value, str):
        return expect_text(value, column) or None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, float) and value.is_integer() and abs(value) < WHOLE:
        return str(int(value))
    if isinstance(value, int | float):
        return str(value)
    kinds: dict[type, str] = {dict: "an object", list: "a list", bytes: "binary data"}
    kind = kinds.get(type(value), f"a {type(value).__name__}")
    raise Refused(
        f"`{column}` is {kind}, {value!r:.60}; a reference is text, a number, or true or false: "
        "put it into a column and name that in prompts.columns.reference"
    )


def read_tools(value: Any) -> Tools | None:
    """The functions that a prompt offers: a list of objects, or the JSON text of one."""
    tools = _parse_json(value)
    if tools is None or tools == [] or tools == "":
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Refused(f"`tools` must be a list of objects, or its JSON text, found {value!r:.60}")
    return tools


def store_messages(messages: list[Message]) -> list[Message]:
    """Messages as the table `prompts` holds them: `tool_calls` as JSON text."""
    return [{**m, "tool_calls": json.dumps(m["tool_calls"])} if "tool_calls" in m else m for m in messages]


def load_messages(stored: Iterable[list[Message]]) -> list[list[Message]]:
    """Prompts of the table as a template reads them: what is absent is left out, `tool_calls` are objects."""
    present = [[{key: value for key, value in m.items() if value is not None} for m in messages] for messages in stored]
    for message in (m for messages in present for m in messages if "tool_calls" in m):
        message["tool_calls"] = json.loads(message["tool_calls"])
    return present


class Fields(Mapping[str, Any]):
    """What a side's template may name of a row; its columns are parsed when they are asked for.

    `prompt` is the user's last message, `question` the source's own where it has one, `reference` the answer, where there is
    one. The others are the columns that are kept as metadata, or what a task's item is made of.
    """

    def __init__(self, messages: list[Message], reference: str | None, metadata: str | None):
        self._messages, self._reference, self._metadata = messages, reference, metadata

    @cached_property
    def _known(self) -> dict[str, Any]:
        columns: dict[str, Any] = json.loads(self._metadata or "{}")
        if is_of_task(columns):
            columns = {**columns["entry"]["metadata"], "question": columns["entry"]["question"]}
        at = last_of_user(self._messages)
        asked = {} if at is None else dict.fromkeys(("question", "prompt"), self._messages[at]["content"])
        own = {"question": columns["question"]} if "question" in columns else {}
        answer = {} if self._reference is None else {"reference": self._reference}
        return columns | asked | own | answer

    def __getitem__(self, name: str) -> Any:
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


class Prompt(NamedTuple):
    """What a side renders: messages, the tools that they may call, and what its template may name."""

    messages: list[Message]
    tools: Tools | None
    fields: Fields


def load_prompts(rows: Iterable[dict[str, Any]]) -> list[Prompt]:
    """Rows of the table `prompts` as a side renders them."""
    rows = list(rows)
    messages = load_messages(row["messages"] for row in rows)
    return [
        Prompt(m, json.loads(row["tools"]) if row.get("tools") else None, Fields(m, row.get("reference"), row.get("metadata")))
        for m, row in zip(messages, rows, strict=True)
    ]


def prompts_of(table: pa.Table) -> list[Prompt]:
    """The same of the whole table, whose other columns stay Arrow's."""
    read = [name for name in ("messages", "tools", "reference", "metadata") if name in table.column_names]
    return load_prompts(table.select(read).to_pylist())


def is_of_task(metadata: dict[str, Any]) -> bool:
    """Whether it is what a procedural task's item is made of; a data set may have a column of one of these names."""
    return metadata.keys() >= {"task", "options", "entry"}


def _message(message: Any, column: str, whole: Any) -> Message:
    if not isinstance(message, dict) or not is_text(message.get("role")):
        raise Refused(_wrong(column, whole))
    calls = _read_calls(message.get("tool_calls"), column)
    content = message.get("content")
    if isinstance(content, list):
        content = _join_parts(content, column)
    if content is None and calls:
        content = ""
    if not is_text(content):
        raise Refused(_wrong(column, whole))
    more = {key: message[key] for key in MORE if message.get(key) is not None and key != "tool_calls"}
    for key, value in more.items():
        expect_text(value, f"{column}.{key}")
    return {"role": message["role"], "content": content, **more, **({"tool_calls": calls} if calls else {})}


def _from_sharegpt(message: Message, column: str) -> Message:
    speaker, value = message["from"], message.get("value")
    if speaker not in ROLES:
        raise Refused(f"`{column}` has a message from {speaker!r:.60}; known: {', '.join(ROLES)}")
    if speaker == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _read_calls(value, column)}
    if not is_text(value):
        raise Refused(f"`{column}` must be a list of {{from, value}}, both text, found {message!r:.60}")
    return {"role": ROLES[speaker], "content": value}


def _join_parts(parts: list[Any], column: str) -> str | None:
    """The text of typed content; None where a part is none, Refused where it is an image or the like."""
    for part in parts:
        if isinstance(part, dict) and part.get("type", "text") != "text":
            raise Refused(f"`{column}` has content of type {part['type']!r:.60}; only parts of type 'text' are read")
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    return "".join(texts) if all(map(is_text, texts)) else None  # type: ignore[arg-type]


def _read_calls(value: Any, column: str) -> list[dict[str, Any]]:
    """Calls of tools, each `{type, function: {name, arguments}}` with the arguments as an object; none for null."""
    calls = _parse_json(value)
    calls = [calls] if isinstance(calls, dict) else calls or []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise Refused(f"`{column}` has tool calls that are no list of objects, found {value!r:.60}")
    found = []
    for call in calls:
        function = call.get("function", {key: call[key] for key in ("name", "arguments") if key in call})
        if not isinstance(function, dict) or not is_text(function.get("name")):
            raise Refused(f"`{column}` has a tool call without a function's name, found {call!r:.60}")
        function = {**function, "arguments": _parse_json(function.get("arguments"))}
        named = {key: value for key, value in call.items() if key not in ("name", "arguments")}
        found.append({"type": "function", **named, "function": function})
    return found


def _parse_json(value: Any) -> Any:
    """What a JSON text says; other values, and texts that are no JSON, as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _wrong(column: str, value: Any) -> str:
    return f"`{column}` must be a list of {{role, content}}, both text, found {value!r:.60}"

"""Templates of the user's last message: texts and numbers of a row in place of the names in braces."""

from collections.abc import Mapping
from string import Formatter
from typing import Any

Message = dict[str, Any]  # role, content, and what else a chat template reads, such as tool_calls

FAILURES = (LookupError, ValueError, AttributeError, TypeError)


class Unfilled(Exception):
    """Why a template cannot be filled. Whoever fills it adds which one, and where the row stands."""


class Texts(Formatter):
    """Fills a template with texts and numbers alone."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None or isinstance(value, dict | list | bytes):
            raise ValueError(f"{value!r:.60} is no text")
        return str(super().format_field(value, format_spec))


def fill_template(template: str, fields: Mapping[str, Any], formatter: Formatter | None = None) -> str:
    """The template with a row's `fields` in place of the names. Raises Unfilled with what the row has."""
    try:
        return (formatter or Texts()).vformat(template, (), fields)
    except FAILURES as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise Unfilled(f"{reason}; fields here: {', '.join(sorted(fields))}") from None


def write_last(messages: list[Message], template: str, fields: Mapping[str, Any]) -> list[Message]:
    """The messages with the user's last one written by the template. Raises Unfilled."""
    at = last_of_user(messages)
    if at is None:
        raise Unfilled("it writes the user's last message, and there is none")
    return [*messages[:at], {**messages[at], "content": fill_template(template, fields)}, *messages[at + 1 :]]


def last_of_user(messages: list[Message]) -> int | None:
    """The place of the user's last message."""
    return max((at for at, message in enumerate(messages) if message["role"] == "user"), default=None)

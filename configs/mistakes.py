"""What is wrong with a recipe, in one line a mistake: the field, what was found, what would be right."""

import re
from typing import Any

from configs.describe import field_of, fields_at, nearest, suggest_field, variants_at


def describe_mistake(error: Any) -> str:
    """One of pydantic's errors about a Recipe as a line."""
    location = [str(part) for part in error["loc"]]
    field, kind, found = field_of(location), error["type"], error["input"]
    if kind == "extra_forbidden":
        return f"{field}: unknown key; {_ask(suggest_field(location))}known here: {', '.join(fields_at(location[:-1]))}"
    if kind == "union_tag_invalid":
        tag, known = error["ctx"]["tag"], error["ctx"]["expected_tags"]
        return f"{_tag_of(location, error)}: unknown '{tag}'; {_ask(_nearest_value(tag, known))}one of {known}"
    if kind == "union_tag_not_found":
        return f"{_tag_of(location, error)}: missing; one of {', '.join(variants_at(location))}"
    if kind == "missing":
        return f"{field}: missing; set it"
    message = error["msg"].removeprefix("Value error, ").replace("valid tuple", "list")  # what TOML calls it
    given = "" if kind == "value_error" else f" (found {found!r})"
    if kind == "literal_error" and (near := _nearest_value(found, error["ctx"]["expected"])):
        given = f" (found {found!r}; did you mean {near}?)"
    return f"{field + ': ' if field else ''}{message}{given}"


def _ask(meant: str | None) -> str:
    return f"did you mean {meant}? " if meant else ""


def _nearest_value(found: Any, known: str) -> str | None:
    """The nearest of the values that pydantic lists in quotes, in quotes."""
    near = nearest(found, re.findall(r"'([^']*)'", known)) if isinstance(found, str) else None
    return f"'{near}'" if near else None


def _tag_of(location: list[str], error: Any) -> str:
    """The field that names a table's variant, such as `objective.name`."""
    return f"{field_of(location)}.{error['ctx']['discriminator'].strip(chr(39))}"

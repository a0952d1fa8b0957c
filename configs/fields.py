"""The types that the fields and tables of a recipe are made of."""

from string import Formatter
from typing import Annotated, Any
from urllib.parse import urlsplit

import pydantic
from pydantic import BaseModel, ConfigDict

Int = Annotated[int, pydantic.Strict()]  # TOML knows its types: neither "3" nor true is a number
Float = Annotated[float, pydantic.Strict()]
Bool = Annotated[bool, pydantic.Strict()]


def words_or_count(*words: str, counted: str) -> tuple[Any, Any]:
    """How a field that is one of `words` or a number from 1 is checked, and what it is in JSON Schema.

    `counted` says in the message what the number counts.
    """

    def check(value: Any) -> Any:
        if value in words or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            return value
        raise ValueError(f"give {' or '.join(map(repr, words))}, or {counted}, 1 or more (found {value!r})")

    schema = {"anyOf": [{"enum": list(words)}, {"type": "integer", "minimum": 1}]}
    return pydantic.PlainValidator(check), pydantic.WithJsonSchema(schema)


def _check_address(url: str) -> str:
    if "@" in url or "?" in url:  # the recipe is written to disk, and the message must not repeat a secret either
        raise ValueError("a user or key in an address would be written to disk; set VLLM_API_KEY in the environment instead")
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not any(map(str.isspace, url))
    except ValueError:  # not a port number, or half an IPv6 address
        valid = False
    if not valid:
        raise ValueError(f"{url!r} is not an address; give one such as http://host:8000")
    return url


def _check_layers(targets: Any) -> Any:
    names = isinstance(targets, list | tuple) and targets and all(isinstance(name, str) for name in targets)
    if targets != "all-linear" and not names:
        raise ValueError(f"give 'all-linear' or names of layers, such as ['q_proj', 'v_proj'] (found {targets!r})")
    return targets


def names_in(template: str) -> list[str]:
    """The fields of a row that a template names in braces. Raises ValueError where it is no template."""
    found = (name for _, name, _, _ in Formatter().parse(template) if name is not None)
    return [name.partition(".")[0].partition("[")[0] for name in found]


def _check_template(template: str) -> str:
    try:
        names = names_in(template)
    except ValueError as error:
        raise ValueError(f"{template!r} is no template: {error}; a brace of the text's own is {{{{ or }}}}") from None
    if not names or not all(name and not name.isdecimal() for name in names):
        found = "nothing" if not names else ", ".join(f"{{{name}}}" for name in names)
        raise ValueError(f"{template!r} names {found}; name fields of a row in braces, such as {{prompt}}")
    return template


def _check_local(path: str) -> str:
    if "://" in path:
        raise ValueError(
            "an address, and files of prompts are read from this machine: download it first, or set source = 'hub'"
        )
    return path


Text = Annotated[str, pydantic.StringConstraints(min_length=1)]
Template = Annotated[str, pydantic.AfterValidator(_check_template)]
LocalPath = Annotated[str, pydantic.StringConstraints(min_length=1), pydantic.AfterValidator(_check_local)]
Url = Annotated[str, pydantic.AfterValidator(_check_address)]
Layers = Annotated[list[str] | str, pydantic.BeforeValidator(_check_layers)]


class Table(BaseModel):
    """A table of a recipe. It is immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

"""What every table of a recipe is made of."""

from typing import Annotated, Any
from urllib.parse import urlsplit

import pydantic
from pydantic import BaseModel, ConfigDict

Int = Annotated[int, pydantic.Strict()]  # TOML knows its types: neither "3" nor true is a number
Float = Annotated[float, pydantic.Strict()]
Bool = Annotated[bool, pydantic.Strict()]


def _address(url: str) -> str:
    if "@" in url or "?" in url:  # the recipe is frozen to disk; the message must not repeat it either
        raise ValueError("a user or key in an address would be written to disk; set VLLM_API_KEY in the environment instead")
    try:
        parts = urlsplit(url)
        right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not any(map(str.isspace, url))
    except ValueError:  # a port that is none, half an IPv6 address
        right = False
    if not right:
        raise ValueError(f"{url!r} is no address; give one as http://host:8000")
    return url


def _layers(targets: Any) -> Any:
    names = isinstance(targets, list | tuple) and targets and all(isinstance(name, str) for name in targets)
    if targets != "all-linear" and not names:
        raise ValueError(f"give 'all-linear' or names of layers, such as ['q_proj', 'v_proj'] (found {targets!r})")
    return targets


Text = Annotated[str, pydantic.StringConstraints(min_length=1)]
Url = Annotated[str, pydantic.AfterValidator(_address)]
Layers = Annotated[list[str] | str, pydantic.BeforeValidator(_layers)]


class Table(BaseModel):
    """A TOML table: immutable, and a key that nothing reads is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

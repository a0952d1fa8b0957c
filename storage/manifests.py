"""The manifest of a committed artifact: what is read of it, and whether it is one. It may come from a stranger."""

import json
import re
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt


class Manifest(BaseModel):
    """What is read of a manifest. There may be more in it."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    key: str
    path: str
    digest: str
    rows: NonNegativeInt
    seconds: float
    inputs: dict[str, Any]
    versions: dict[str, str]
    bytes: NonNegativeInt | None = None  # older runs have none
    taken_from: str = ""


def parse_manifest(data: bytes, slot: str) -> dict[str, Any] | None:
    """Parse the manifest of `slot`; None where it is cut or altered, or names anything but what lies at the slot."""
    try:
        found: dict[str, Any] = json.loads(data)
        path = Manifest.model_validate(found).path
    except (ValueError, RecursionError):
        return None
    return found if path == slot or re.fullmatch(re.escape(slot) + r"\.\w+", path) else None

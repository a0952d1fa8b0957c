"""The manifest of a committed artifact: what is read of it, and whether it is one. It may come from a stranger."""

import json
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt

from configs.errors import Stopped
from storage.disk import size_of
from storage.lineage import digest_local, versions


class Cleared(BaseModel):
    """That what a manifest is about was taken away to make room."""

    model_config = ConfigDict(strict=True)

    when: str
    why: str
    bytes: NonNegativeInt


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
    cleared: Cleared | None = None


def parse_manifest(data: bytes, slot: str) -> dict[str, Any] | None:
    """Parse the manifest of `slot`; None where it is cut or altered, or names anything but what lies at the slot."""
    try:
        found: dict[str, Any] = json.loads(data)
        path = Manifest.model_validate(found).path
    except (ValueError, RecursionError):
        return None
    return found if path == slot or re.fullmatch(re.escape(slot) + r"\.\w+", path) else None


def describe_clearing(manifest: dict[str, Any] | None) -> str | None:
    """When and why what a manifest is about was cleared; None where it was not."""
    cleared = (manifest or {}).get("cleared")
    return f"cleared on {cleared['when'][:10]} ({cleared['why']})" if cleared else None


def describe_output(output: Path, slot: str, key: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """The manifest of what a stage has made at `output`, but for its rows and seconds."""
    return {
        "key": key,
        "path": slot + output.suffix * output.is_file(),
        "digest": digest_local(output),
        "bytes": size_of(output),
        "inputs": inputs,
        "versions": versions(),
    }


def check_same(pairs: list[tuple[dict[str, Any] | None, dict[str, Any]]]) -> None:
    """Raise Stopped where what was cleared (its manifest, and the new one) came out otherwise when it was made again."""
    for before, made in pairs:
        if before and before["key"] == made["key"] and before["digest"] != made["digest"] and before.get("cleared"):
            raise Stopped(
                f"{before['path']} was {describe_clearing(before)}, and is needed again; made again it came out otherwise (as "
                "on another device, or with another version of a library), and what was made from it would not follow from it. "
                "Nothing was replaced: put it back from a copy, or make the run anew under another root (--set root=…)"
            )

"""What `potstill inspect` says of a run's past: what a checkpoint was made from, and whether it is all still there."""

import json
import posixpath
import re
from collections.abc import Iterator
from typing import Any

from configs.errors import BadInput
from storage.store import Run, round_slot
from tasks.views.inspect import open_run

ELSEWHERE = "no artifact of a run here: a model from elsewhere, a tokenizer, the texts of rows"
DIGEST = re.compile(r"[0-9a-f]{64}")


def trace_lineage(run: str, number: int | None = None) -> dict[str, list[dict[str, Any]]]:
    """From a round's checkpoint (default: the last) back to all of that round and to what came from before it.

    Each input is found by its digest, in this run or in another under the same root; an earlier round's checkpoint is
    named, and has a lineage of its own.
    """
    here = open_run(run)
    made = dict(here.manifests())
    last = next((n for n in range(len(made), 0, -1) if round_slot(n, "student") in made), None)
    number = last if number is None else number
    if number is None or round_slot(number, "student") not in made:
        raise BadInput(f"{run}: no checkpoint of round {number or 1}; " + (f"there are 1 to {last}" if last else "none yet"))
    places = {manifest["digest"]: slot for slot, manifest in made.items()}
    elsewhere = _elsewhere(here)
    tree: list[dict[str, Any]] = []
    shown: set[str] = set()

    def grow(slot: str, role: str, depth: int) -> None:
        manifest, again = made[slot], slot in shown
        shown.add(slot)
        tree.append(
            {
                "made from": "  " * depth + role,
                "artifact": slot + " (see above)" * again,
                "digest": manifest["digest"][:12],
                "rows": manifest["rows"],
                "taken from": manifest.get("taken_from"),
            }
        )
        earlier = slot.startswith("round=") and not slot.startswith(round_slot(number))
        for name, digest in [] if again or earlier else _digests(manifest["inputs"]):
            if digest in places:
                grow(places[digest], name, depth + 1)
            else:
                known = elsewhere.get(digest, ELSEWHERE)
                tree.append({"made from": "  " * (depth + 1) + name, "artifact": known, "digest": digest[:12]})

    grow(round_slot(number, "student"), "checkpoint", 0)
    columns = ("made from", "artifact", "digest", "rows", "taken from")
    options: dict[tuple[str, str], dict[str, Any]] = {}
    for slot in sorted(shown):
        inputs, versions = made[slot]["inputs"], made[slot]["versions"]
        row = {
            "stage": inputs.get("stage"),
            "code": inputs.get("code"),
            "engine": inputs.get("engine"),
            "recipe": json.dumps(inputs.get("recipe") or {}),
            "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        }
        options.setdefault((str(row["stage"]), json.dumps(row)), row)
    return {
        f"Lineage of {round_slot(number, 'student')} of {here.name}": [{c: row.get(c) for c in columns} for row in tree],
        "Recipe and versions of the stages": list(options.values()),
    }


def find_damage(run: str) -> list[dict[str, Any]]:
    """Everything committed whose digest, computed again, is not the manifest's; and every manifest that is none."""
    here = open_run(run)
    return [{"artifact": slot, "problem": problem} for slot in here.slots() if (problem := here.find_damage(slot))]


def count_artifacts(run: str) -> int:
    """How many artifacts a run has."""
    return len(open_run(run).slots())


def _elsewhere(here: Run) -> dict[str, str]:
    """Where under the root other runs have what a digest names."""
    found: dict[str, str] = {}
    for path in sorted(here.fs.ls(here.root, detail=False)):
        other = Run(here.uri, posixpath.basename(path.rstrip("/")))
        if other.name != here.name and other.fs.isdir(other.path):
            found |= {manifest["digest"]: f"{slot} of {other.name}" for slot, manifest in other.manifests()}
    return found


def _digests(inputs: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every digest among a stage's inputs with the name it has there."""
    if isinstance(inputs, str) and DIGEST.fullmatch(inputs):
        yield name.removesuffix(".digest"), inputs
    elif isinstance(inputs, dict):
        for key, value in inputs.items():
            yield from _digests(value, f"{name}.{key}" if name else key)
    elif isinstance(inputs, list):
        for value in inputs:
            yield from _digests(value, name)

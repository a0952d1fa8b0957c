"""What `potstill inspect` shows of a run's past: what a checkpoint was made from, and whether every artifact is intact."""

import json
import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import polars as pl
import pyarrow as pa

from configs.errors import BadInput
from storage.manifests import describe_clearing
from storage.store import Run, round_slot
from tasks.views.inspect import open_run

ELSEWHERE = "from outside the runs: a model, a tokenizer, a file, or the texts of rows"
DIGEST = re.compile(r"[0-9a-f]{64}")


def trace_lineage(run: str, number: int | None = None) -> dict[str, list[dict[str, Any]]]:
    """The artifacts that a round's checkpoint (default: the last) was made from, as a tree, with their stages' options.

    Each input is found by its digest, in this run or in another under the same root. The tree ends at the checkpoint of the
    round before, which has a lineage of its own.
    """
    here = open_run(run)
    manifests = dict(here.manifests())
    last = next((n for n in range(len(manifests), 0, -1) if round_slot(n, "student") in manifests), None)
    number = last if number is None else number
    if number is None or round_slot(number, "student") not in manifests:
        raise BadInput(f"{run}: no checkpoint of round {number or 1}; " + (f"there are 1 to {last}" if last else "none yet"))
    slots = {manifest["digest"]: slot for slot, manifest in manifests.items()}
    elsewhere = _index_other_runs(here)
    tree: list[dict[str, Any]] = []
    shown: set[str] = set()

    def add_to_tree(slot: str, role: str, depth: int) -> None:
        manifest, again = manifests[slot], slot in shown
        shown.add(slot)
        tree.append(
            {
                "made from": "  " * depth + role,
                "artifact": slot + " (see above)" * again,
                "digest": manifest["digest"][:12],
                "rows": manifest["rows"],
                "taken from": manifest.get("taken_from"),
                "cleared": describe_clearing(manifest),
            }
        )
        earlier = slot.startswith("round=") and not slot.startswith(round_slot(number))
        for name, digest in [] if again or earlier else _list_digests(manifest["inputs"]):
            if digest in slots:
                add_to_tree(slots[digest], name, depth + 1)
            else:
                artifact = elsewhere.get(digest, ELSEWHERE)
                tree.append({"made from": "  " * (depth + 1) + name, "artifact": artifact, "digest": digest[:12]})

    add_to_tree(round_slot(number, "student"), "checkpoint", 0)
    columns = ["made from", "artifact", "digest", "rows", "taken from"]
    columns += ["cleared"] if any(row.get("cleared") for row in tree) else []
    options: dict[tuple[str, str], dict[str, Any]] = {}
    for slot in sorted(shown):
        inputs, versions = manifests[slot]["inputs"], manifests[slot]["versions"]
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


def find_damage(run: str, read: bool = True) -> list[dict[str, Any]]:
    """Every artifact that is not what its manifest says or its table has, and every manifest that cannot be read.

    Digests are computed again; without `read` sizes alone are compared.
    """
    here = open_run(run)
    found = {slot: here.find_damage(slot, read) or (here.find_misfit(slot) if read else None) for slot in here.slots()}
    return [{"artifact": slot, "problem": problem} for slot, problem in found.items() if problem]


@contextmanager
def refuse_damage(run: str, sizes_first: bool = False) -> Iterator[None]:
    """Turn what libraries raise for a damaged table into one message. With `sizes_first` a run is refused by sizes alone."""
    if sizes_first and (damages := find_damage(run, read=False)):
        raise _describe_damage(run, damages)
    try:
        yield
    except (pl.exceptions.PolarsError, pa.ArrowException, KeyError, TypeError, OSError) as error:
        if damages := find_damage(run):
            raise _describe_damage(run, damages) from error
        raise


def _describe_damage(run: str, damages: list[dict[str, Any]]) -> BadInput:
    named = "; ".join(f"{damage['artifact']}: {damage['problem']}" for damage in damages[:3])
    more = f"; and {len(damages) - 3} more" if len(damages) > 3 else ""
    return BadInput(f"{run}: damaged: {named}{more}; the `potstill run` command that made the run makes it again")


def count_artifacts(run: str) -> tuple[int, int]:
    """How many artifacts a run has, and how many more were cleared."""
    here = open_run(run)
    cleared = sum(describe_clearing(manifest) is not None for _, manifest in here.manifests())
    return len(here.slots()) - cleared, cleared


def _index_other_runs(here: Run) -> dict[str, str]:
    """By digest, the slots of artifacts of the other runs under the root."""
    index: dict[str, str] = {}
    for path in sorted(here.fs.ls(here.root, detail=False)):
        other = Run(here.uri, posixpath.basename(path.rstrip("/")))
        if other.name != here.name and other.fs.isdir(other.path):
            index |= {manifest["digest"]: f"{slot} of {other.name}" for slot, manifest in other.manifests()}
    return index


def _list_digests(inputs: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(name, digest) of every digest among a stage's inputs."""
    if isinstance(inputs, str) and DIGEST.fullmatch(inputs):
        yield name.removesuffix(".digest"), inputs
    elif isinstance(inputs, dict):
        for key, value in inputs.items():
            yield from _list_digests(value, f"{name}.{key}" if name else key)
    elif isinstance(inputs, list):
        for value in inputs:
            yield from _list_digests(value, name)

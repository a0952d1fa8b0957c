"""What a run does not keep: its content is taken away, and its manifest stays and says so.

The manifest is marked first. What a kill leaves of the content is taken away when the run is cleared next.
"""

import os
import posixpath
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from configs.errors import BadInput
from configs.schema import Recipe
from storage.lineage import files_below
from storage.receipt import restamped
from storage.store import Run

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Clearable:
    """What can be taken away of a run: its slot, the bytes that this frees, and why it is not kept."""

    slot: str
    bytes: int
    why: str
    outside: str = ""  # where it lies, if a link leads there out of the run: then it stays


def list_clearable(run: Run, slots: dict[str, str]) -> list[Clearable]:
    """What there is at `slots` (of each the reason why it is not kept), and what an interrupted clearing has left."""
    found = []
    for slot, manifest in run.manifests():
        why = manifest["cleared"]["why"] if manifest.get("cleared") else slots.get(slot)
        if why is not None and run.fs.exists(posixpath.join(run.path, manifest["path"])):
            outside = _leads_out(run, manifest["path"])
            found.append(Clearable(slot, 0 if outside else _measure(run, manifest["path"]), why, outside))
    return found


def clear(run: Run, slots: dict[str, str], log: Callable[[str], None]) -> int:
    """Clear what `list_clearable` lists. Returns the bytes that this frees.

    The caller holds the run's lock. What another run is just taking over is left for the next time.
    """
    freed, places = 0, set()
    if not (found := list_clearable(run, slots)):
        return 0
    with restamped(run), run.writing():
        for each in found:
            if each.outside:
                log(f"{each.slot}: a link leads to {each.outside}, out of the run, so it stays")
                continue
            with run.hold(each.slot, alone=True) as free:
                manifest = run.manifest(each.slot)
                if not free or manifest is None:
                    log(f"{each.slot}: another run is just taking it over, so it stays for now")
                    continue
                if not manifest.get("cleared"):
                    when = datetime.now().astimezone().isoformat(" ", "seconds")
                    manifest["cleared"] = {"when": when, "why": each.why, "bytes": each.bytes}
                    run.write_manifest(each.slot, manifest)
                run.remove(manifest["path"])
            freed += each.bytes
            places.add(f"{place_of(each.slot)} ({each.why})")
    if places:
        log(f"{run.name}: cleared {word_bytes(freed)}: {', '.join(sorted(places))}")
    return freed


def place_of(slot: str) -> str:
    """The folder that a slot lies in, if it is one shard of several, else the slot."""
    return slot.partition("/part-")[0]


def word_bytes(count: int) -> str:
    """A number of bytes for people: `1.5 MiB`."""
    power = min(max(count.bit_length() - 1, 0) // 10, len(UNITS) - 1)
    return f"{count / 1024**power:.{0 if not power else 1}f} {UNITS[power]}"


def _leads_out(run: Run, place: str) -> str:
    """The folder that a file or folder of a run lies in, if links lead to it out of the run; else nothing."""
    folder = os.path.realpath(os.path.dirname(os.path.join(run.path, place))) if run.local else ""
    return folder if folder and not Path(folder).is_relative_to(os.path.realpath(run.path)) else ""


def _measure(run: Run, place: str) -> int:
    """The bytes that go with a file or folder of a run: on a local disk without what other runs have linked."""
    path = posixpath.join(run.path, place)
    if not run.local:
        return int(run.fs.du(path))
    files = [Path(path)] if os.path.isfile(path) else files_below(Path(path))
    return sum(stat.st_size for stat in (file.stat() for file in files) if stat.st_nlink == 1)


def recipes_beside(run: Run) -> Iterator[Recipe]:
    """The recipes of the other runs under a local root, as far as they can be read."""
    for path in sorted(Path(run.root).glob("*/run.toml")) if run.local else ():
        if path.parent.name != run.name:
            with suppress(BadInput):
                if recipe := Run(run.uri, path.parent.name).frozen_recipe():
                    yield recipe

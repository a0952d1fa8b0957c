"""A run's receipt: up to which round it was last found whole, of what it was made, and the sizes and times of all that.

With it a start reads no content of what is committed: files that have not changed since need not be looked at again.
"""

import json
import os
import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath

from pydantic import TypeAdapter

from storage.damage import SUSPECTS, is_suspect
from storage.lineage import Stamp, know_digest, read_once, stamp_of
from storage.store import Run

FILE = "_receipt.json"
MANIFESTS = "_manifests"


@dataclass(frozen=True)
class Receipt:
    made_from: str  # digest of the recipe and of everything else that keys depend on, but for `inputs`
    rounds: int  # complete ones, from the first
    files: dict[str, list[int]]  # committed files and manifests of these rounds: bytes, and the time of change in ns
    inputs: dict[str, tuple[Stamp, str]]  # files that the recipe names: their stamp and digest


RECEIPT = TypeAdapter(Receipt)


def read_receipt(run: Run) -> Receipt | None:
    """The run's receipt; None where there is none, or where it cannot be read."""
    try:
        return RECEIPT.validate_json(run.read_text(FILE))
    except (FileNotFoundError, ValueError):
        return None


def write_receipt(run: Run, made_from: str, rounds: int, inputs: list[Path]) -> None:
    """Write that `rounds` rounds are complete. A file among `inputs` that was written just now is not trusted, so left out."""
    stamped = {str(path): known for path in inputs if (known := read_once(path)) is not None}
    receipt = Receipt(made_from, rounds, _stamp_files(run, rounds), stamped)
    if receipt != read_receipt(run):
        run.write_text(FILE, json.dumps(asdict(receipt)))


def trust_inputs(receipt: Receipt | None) -> None:
    """Let this process know the digests of inputs, as long as they do not change."""
    for path, (stamp, digest) in receipt.inputs.items() if receipt else ():
        know_digest(path, stamp, digest)


def inputs_hold(receipt: Receipt, inputs: list[Path]) -> bool:
    """Whether the receipt is about exactly these files, and none of them has changed since."""
    if receipt.inputs.keys() != {str(path) for path in inputs}:
        return False
    return all(stamp_of(path) == receipt.inputs[str(path)][0] for path in inputs)


def files_hold(receipt: Receipt, run: Run) -> bool:
    """Whether every committed file has the size and time that it had. One that has not is suspected, and so read before use."""
    here = _stamp_files(run, receipt.rounds)
    changed = [path for path, stamp in receipt.files.items() if here.get(path) != stamp]
    gone = tuple(manifest["path"] for _, manifest in run.manifests() if manifest.get("cleared")) if changed else ()
    altered = [path for path in changed if not path.startswith(MANIFESTS) and not _lies_in(path, gone)]
    SUSPECTS.update(posixpath.join(run.path, path) for path in altered)
    return not changed and not is_suspect(run.path)


@contextmanager
def restamped(run: Run) -> Iterator[None]:
    """Let the run's receipt hold after what is done here to its files, if it held before."""
    receipt = read_receipt(run)
    held = receipt is not None and receipt.files == _stamp_files(run, receipt.rounds)
    yield
    if receipt is not None and held:
        run.write_text(FILE, json.dumps(asdict(replace(receipt, files=_stamp_files(run, receipt.rounds)))))


def _lies_in(path: str, places: tuple[str, ...]) -> bool:
    return any(path == place or path.startswith(f"{place}/") for place in places)


def _stamp_files(run: Run, rounds: int) -> dict[str, list[int]]:
    """Bytes and time of every manifest up to a round, and of every file that they are about."""
    found = {path: stamp for path, stamp in _stamp_folder(run, MANIFESTS).items() if _round_of(path) <= rounds}
    slots = {path.removeprefix(f"{MANIFESTS}/").removesuffix(".json") for path in found}
    for top in sorted({slot.partition("/")[0] for slot in slots}):
        for path, stamp in _stamp_folder(run, top).items():
            if posixpath.splitext(path)[0] in slots or not slots.isdisjoint(map(str, PurePosixPath(path).parents)):
                found[path] = stamp
    return found


def _round_of(path: str) -> int:
    number = re.match(rf"{MANIFESTS}/round=(\d+)/", path)
    return int(number[1]) if number else 0


def _stamp_folder(run: Run, folder: str) -> dict[str, list[int]]:
    """On object storage, which tells no time that a copy keeps, the bytes alone."""
    base = posixpath.join(run.path, folder)
    if not run.local:
        found = run.fs.find(base, detail=True) if run.fs.exists(base) else {}
        return {posixpath.relpath(path, run.path): [entry["size"]] for path, entry in found.items()}
    stats = {path: os.stat(path) for place, _, names in os.walk(base) for path in (os.path.join(place, n) for n in names)}
    return {os.path.relpath(path, run.path): [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}

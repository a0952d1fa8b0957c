"""What was cut, altered or lost is made again and said so; it is never read."""

import json
import os
import re
import shutil
import uuid
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest

from configs.errors import BadInput, CannotWrite, Damaged
from storage import disk
from storage.artifacts import local_folder, read_table
from storage.damage import mend
from storage.lineage import digest_local
from storage.schemas import STEPS
from storage.store import Run
from tasks.views.trace import find_damage

SLOT = "round=0001/scores/part-00000"
FOLDERS = {"student": "round=0001/student", "trainer": "round=0001/trainer"}


def table(value: float = 1.0, rows: int = 3) -> pa.Table:
    return pa.Table.from_pylist([{"step": i, "loss": value} for i in range(rows)], STEPS)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """One bit, with the file's time put back: what a bad disk does."""
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


DAMAGE = {"cut": cut, "flipped": flip, "missing": Path.unlink, "empty": lambda path: path.write_bytes(b"")}


@pytest.fixture
def root(tmp_path) -> str:
    return str(tmp_path / "runs")


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_table_is_made_again(root, how):
    run, lines = Run(root, "a"), []
    first = run.build_table(SLOT, {"x": 1}, table, lines.append)
    DAMAGE[how](Path(first.path))
    assert run.find_damage(SLOT)
    lines.clear()

    def use() -> pa.Table:
        artifact = run.build_table(SLOT, {"x": 1}, table, lines.append)
        assert artifact == first  # the same digest: later stages stay
        return read_table(artifact)

    assert mend(use).equals(table())
    assert run.find_damage(SLOT) is None
    assert "damaged" in lines[0]
    assert SLOT in lines[0]
    assert len(lines) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', '{"key": "k"}', "\x00" * 64, "\xff\xfe"])
def test_a_manifest_that_is_none(root, text):
    run, lines = Run(root, "a"), []
    first = run.build_table(SLOT, {"x": 1}, table, lines.append)
    (Path(run.path) / "_manifests" / f"{SLOT}.json").write_text(text, encoding="latin-1")
    assert run.find(SLOT) is None
    assert list(run.manifests()) == []
    assert run.find_damage(SLOT) == "its manifest cannot be read"
    lines.clear()
    assert run.build_table(SLOT, {"x": 1}, table, lines.append) == first
    assert "its manifest cannot be read" in lines[0]


def test_a_manifest_cut_at_every_byte(root):
    run = Run(root, "a")
    first = run.build_table(SLOT, {"x": 1}, table, lambda _: None)
    path = Path(run.path) / "_manifests" / f"{SLOT}.json"
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert run.build_table(SLOT, {"x": 1}, table, lambda _: None) == first


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_folder_is_made_again(root, how):
    run, calls = Run(root, "a"), []

    def make(folder: Path) -> dict[str, int]:
        calls.append(1)
        for name in FOLDERS:
            (folder / name).mkdir()
            (folder / name / "weights").write_bytes(name.encode() * 100)
        return dict.fromkeys(FOLDERS, 1)

    first = run.build_files(FOLDERS, {"x": 1}, make, lambda _: None)
    DAMAGE[how](Path(first["trainer"].path) / "weights")

    def use() -> str:
        artifacts = run.build_files(FOLDERS, {"x": 1}, make, lambda _: None)
        assert artifacts == first
        return local_folder(artifacts["trainer"])

    assert mend(use) == first["trainer"].path
    assert len(calls) == 2
    assert all(run.find_damage(slot) is None for slot in FOLDERS.values())


def test_what_nobody_reads_is_left_to_verify(root):
    """A start compares sizes: a flipped bit in a file that no stage reads costs no look at it."""
    run = Run(root, "a")
    first = run.build_table(SLOT, {"x": 1}, table, lambda _: None)
    flip(Path(first.path))
    assert run.build_table(SLOT, {"x": 1}, lambda: pytest.fail("made again"), lambda _: None) == first
    assert run.find_damage(SLOT, read=False) is None
    assert run.find_damage(SLOT) == "its content was altered"


def test_what_is_damaged_again_and_again_ends(root):
    """A disk that loses each write: the work is done twice, and then the artifact is named."""
    run, calls = Run(root, "a"), []

    def use() -> pa.Table:
        artifact = run.build_table(SLOT, {"x": 1}, table, lambda _: None)
        calls.append(1)
        flip(Path(artifact.path))
        return read_table(artifact)

    with pytest.raises(Damaged, match=f"{SLOT}.parquet: its content was altered"):
        mend(use)
    assert len(calls) == 2
    assert mend(lambda: read_table(run.build_table(SLOT, {"x": 1}, table, lambda _: None))).equals(table())


def test_a_remake_that_differs_reaches_later_stages(root):
    """Not quietly under the old result's name: the next stage's key follows its input's digest."""
    run, made = Run(root, "a"), []

    def build(value: float) -> pa.Table:
        first = run.build_table(SLOT, {"x": 1}, lambda: table(value), lambda _: None)

        def make() -> pa.Table:
            made.append(value)
            return read_table(first)

        return read_table(run.build_table("round=0001/aligned/part-00000", {"scores": first.digest}, make, lambda _: None))

    build(1.0)
    assert build(1.0).equals(table(1.0))
    assert made == [1.0]
    cut(Path(run.find(SLOT).path))
    assert build(2.0).equals(table(2.0))  # as if another version of a library had made it
    assert made == [1.0, 2.0]


@pytest.mark.parametrize("how", ["cut", "flipped", "missing"])
def test_damage_elsewhere_is_not_taken_over(root, how):
    first = Run(root, "a").build_table(SLOT, {"x": 1}, table, lambda _: None)
    DAMAGE[how](Path(first.path))
    lines = []
    second = Run(root, "b").build_table(SLOT, {"x": 1}, table, lines.append)
    assert second.digest == first.digest
    assert read_table(second).equals(table())
    assert how == "missing" or "damaged in a; not taken over" in lines[0]
    assert "taken over from a" not in "".join(lines)


def test_damage_of_a_linked_file_is_found_on_both_sides(root):
    """A link shares its bytes: each run looks for itself, and the remake is nobody else's file."""
    first = Run(root, "a").build_table(SLOT, {"x": 1}, table, lambda _: None)
    second = Run(root, "b").build_table(SLOT, {"x": 1}, table, lambda _: None)
    flip(Path(first.path))
    assert Run(root, "a").find_damage(SLOT)
    assert Run(root, "b").find_damage(SLOT)
    mend(lambda: read_table(Run(root, "b").build_table(SLOT, {"x": 1}, table, lambda _: None)))
    assert not os.path.samefile(first.path, second.path)
    assert Run(root, "b").find_damage(SLOT) is None


def test_damage_on_a_remote_filesystem():
    run = Run(f"memory://{uuid.uuid4().hex}/runs", "a")
    first = run.build_table(SLOT, {"x": 1}, table, lambda _: None)
    fs, path = fsspec.url_to_fs(first.path)
    assert run.find_damage(SLOT) is None
    whole = fs.cat_file(path)
    fs.pipe_file(path, whole[:-1])
    assert run.find_damage(SLOT, read=False) == f"it has {len(whole) - 1} bytes, and had {len(whole)}"
    assert read_table(run.build_table(SLOT, {"x": 1}, table, lambda _: None)).equals(table())
    fs.pipe_file(path, b"x" * len(whole))
    assert run.find_damage(SLOT) == "its content was altered"


def test_a_clock_that_goes_backwards(root, monkeypatch):
    import time

    monkeypatch.setattr(time, "time", iter(range(10**9, 0, -1000)).__next__)
    run = Run(root, "a")
    first = run.build_table(SLOT, {"x": 1}, table, lambda _: None)
    os.utime(first.path, ns=(0, 0))  # older than everything it was made from
    assert run.build_table(SLOT, {"x": 1}, lambda: pytest.fail("made again"), lambda _: None) == first
    assert run.manifest(SLOT)["seconds"] >= 0


# -- what lies ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lie",
    [
        {"path": "../../secret"},
        {"path": "/etc/hostname"},
        {"path": f"{SLOT}/../part-00000.parquet"},
        {"path": ""},
        {"path": "round=0001/scores/part-00001.parquet"},
        {"seconds": "long"},
        {"seconds": float("nan")},
        {"rows": -1},
        {"bytes": "x"},
        {"inputs": [1]},
        {"versions": None},
        {"taken_from": 5},
    ],
    ids=str,
)
def test_a_manifest_that_lies(root, lie):
    """About what lies elsewhere, or in other types than are read: it is no manifest, and the work is done again."""
    run = Run(root, "a")
    first = run.build_table(SLOT, {"x": 1}, table, lambda _: None)
    path = Path(run.path) / "_manifests" / f"{SLOT}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | lie))
    assert run.find(SLOT) is None
    assert run.find_damage(SLOT) == "its manifest cannot be read"
    other = Run(root, "b").build_table(SLOT, {"x": 1}, table, lambda _: None)
    assert "taken_from" not in Run(root, "b").manifest(SLOT)
    assert (other.digest, run.build_table(SLOT, {"x": 1}, table, lambda _: None)) == (first.digest, first)


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"x": [1, 2, 3]}, "it has no column of steps"),
        ({"step": ["1", "2", "3"], "loss": [1.0] * 3}, "its column step is string, not int32"),
        ({"step": [[1], [2], [3]]}, "its column step is list<element: int64>, not int32"),
    ],
)
def test_a_table_of_another_schema(root, columns, problem):
    """With a manifest that fits it: `inspect --verify` and the views say so."""
    run = Run(root, "a")
    slot = "round=0001/steps/part-00000"
    run.build_table(slot, {"x": 1}, lambda: pa.table(columns), lambda _: None)
    assert run.find_damage(slot) is None
    assert run.find_misfit(slot) == problem
    assert find_damage(run.path) == [{"artifact": slot, "problem": problem}]
    run.build_table(slot, {"x": 2}, table, lambda _: None)
    assert find_damage(run.path) == []
    run.build_table(slot, {"x": 3}, lambda: pa.table({"step": pa.array([1], pa.int32())}), lambda _: None)
    assert find_damage(run.path) == []  # of an older version, which had fewer columns


def test_what_is_no_parquet(root):
    run = Run(root, "a")
    path = Path(run.build_table(SLOT, {"x": 1}, table, lambda _: None).path)
    path.unlink()
    path.write_text("text")
    manifest = Path(run.path) / "_manifests" / f"{SLOT}.json"
    lie = {"bytes": 4, "digest": digest_local(path)}
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | lie))
    assert run.find_damage(SLOT) == "it is no Parquet file"


def test_a_link_is_taken_over_as_the_file_that_it_leads_to(root, tmp_path):
    first = Run(root, "a").build_table(SLOT, {"x": 1}, table, lambda _: None)
    Path(first.path).rename(tmp_path / "moved.parquet")
    Path(first.path).symlink_to(os.path.relpath(tmp_path / "moved.parquet", Path(first.path).parent))
    second = Run(root, "b").build_table(SLOT, {"x": 1}, lambda: pytest.fail("made again"), lambda _: None)
    assert not Path(second.path).is_symlink()
    assert read_table(second).equals(table())


@pytest.mark.parametrize("name", ["new\nline", "\x1b[2J", "\udcff"])
def test_a_root_whose_name_nobody_can_read(tmp_path, name):
    with pytest.raises(BadInput, match=f"root: '.*{re.escape(ascii(name)[1:-1])}/a': a control character, or"):
        Run(str(tmp_path / name), "a")


@pytest.mark.parametrize("data", [b"\xff\xfe", b"\x00", b"name = "])
def test_a_recipe_that_is_none(tmp_path, data):
    (tmp_path / "run.toml").write_bytes(data)
    with pytest.raises(BadInput, match=r"run\.toml: not valid TOML"):
        Run(str(tmp_path.parent), tmp_path.name).frozen_recipe()


# -- disks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("Error while serializing: IoError(Os { code: 28, kind: StorageFull })"),
        Exception("No space left on device (os error 28)"),
        shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")]),
        OSError(30, "Read-only file system"),
    ],
)
def test_a_full_disk_in_the_words_of_every_library(root, error):
    run = Run(root, "a")
    first = run.build_table(SLOT, {"x": 1}, table, lambda _: None)

    def make() -> pa.Table:
        raise error

    with pytest.raises(CannotWrite, match=r"runs/a: cannot be written: (No space left|Read-only)") as caught:
        run.build_table("round=0001/aligned/part-00000", {"x": 1}, make, lambda _: None)
    assert "the same command goes on" in str(caught.value)
    assert run.find(SLOT) == first
    assert run.slots() == [SLOT]
    assert not (Path(run.path) / "_tmp").exists()


def test_other_errors_stay_what_they_are(root):
    for error in (RuntimeError("28 things"), FileNotFoundError(2, "no such file"), PermissionError(13, "someone else's model")):
        assert disk.explain_write_error(error, Path(root).parent) is None


def test_manifests_say_how_large_a_thing_is(root):
    run = Run(root, "a")
    first = run.build_table(SLOT, {"x": 1}, table, lambda _: None)
    path = Path(run.path) / "_manifests" / f"{SLOT}.json"
    assert json.loads(path.read_text())["bytes"] == os.path.getsize(first.path)

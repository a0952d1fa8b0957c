"""A run's receipt: what has not changed is not read, what has is read before it is used."""

import json
import os
import shutil
import uuid
from pathlib import Path

import pyarrow as pa
import pytest

from storage import damage, lineage
from storage.lineage import digest_file
from storage.receipt import FILE, files_hold, inputs_hold, read_receipt, trust_inputs, write_receipt
from storage.schemas import STEPS
from storage.store import Run

LIES = '{"made_from": "recipe", "rounds": "many", "files": [], "inputs": {"a": [1, 2]}}'
SLOTS = ("prompts/train", "round=0001/steps/part-00000", "round=0002/steps/part-00000")


@pytest.fixture
def root(tmp_path) -> str:
    return str(tmp_path / "runs")


@pytest.fixture(autouse=True)
def nothing_is_suspected():
    yield
    damage.SUSPECTS.clear()


def table() -> pa.Table:
    return pa.Table.from_pylist([{"step": i, "loss": 1.0} for i in range(3)], STEPS)


def student(folder: Path) -> dict[str, int]:
    (folder / "student").mkdir()
    (folder / "student" / "weights").write_bytes(b"w" * 1000)
    return {"student": 1}


def build(run: Run, lines: list[str] | None = None) -> list[str]:
    """Everything of the run, as a walk over its stages looks for it; what was logged."""
    lines = [] if lines is None else lines
    for slot in SLOTS:
        run.build_table(slot, {"slot": slot}, table, lines.append)
    run.build_files({"student": "round=0001/student"}, {"x": 1}, student, lines.append)
    return lines


@pytest.fixture
def run(root) -> Run:
    made = Run(root, "a")
    build(made)
    write_receipt(made, "recipe", 1, [])
    return made


def holds(run: Run) -> bool:
    receipt = read_receipt(run)
    return receipt is not None and files_hold(receipt, run)


def later(path: Path) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))


def altered(path: Path) -> None:
    """Another content of the same size."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    later(path)


def test_what_has_not_changed_holds(run):
    receipt = read_receipt(run)
    assert (receipt.made_from, receipt.rounds) == ("recipe", 1)
    assert holds(run)
    before = (Path(run.path) / FILE).stat().st_mtime_ns
    write_receipt(run, "recipe", 1, [])
    assert (Path(run.path) / FILE).stat().st_mtime_ns == before
    assert build(run) == []


@pytest.mark.parametrize("change", [later, altered, Path.unlink, lambda path: path.write_bytes(b"")], ids=str)
@pytest.mark.parametrize("place", ["prompts/train.parquet", "round=0001/student/weights", "_manifests/round=0001/student.json"])
def test_any_change_is_seen(run, place, change):
    change(Path(run.path) / place)
    assert not holds(run)


def test_a_file_of_another_time_is_read_before_it_is_used(run):
    """And kept where it is what it was, though a start does not read what has not changed."""
    weights = Path(run.path) / "round=0001/student/weights"
    later(weights)
    assert not holds(run)
    assert build(run) == []
    assert not damage.SUSPECTS
    altered(weights)
    assert not holds(run)
    lines = build(run)
    assert "round=0001/student: damaged (its content was altered); it is made again" in lines
    assert weights.read_bytes() == b"w" * 1000
    assert not damage.SUSPECTS
    write_receipt(run, "recipe", 1, [])
    assert holds(run)


def test_rounds_that_are_still_made_are_no_part_of_it(run):
    later(Path(run.path) / f"{SLOTS[2]}.parquet")
    shutil.rmtree(Path(run.path) / "_manifests/round=0002")
    assert holds(run)


def test_what_is_no_artifact_may_change(run):
    """A page beside a checkpoint, a report, a tracker's log."""
    for place in ("round=0001/README.md", "report.html", "logs/events"):
        file = Path(run.path) / place
        file.parent.mkdir(exist_ok=True)
        file.write_text("a")
        write_receipt(run, "recipe", 1, [])
        file.write_text("b" * 9)
        assert holds(run)


def test_a_copy_with_its_times_holds_and_one_without_them_is_read_once(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "with" / "a")
    assert holds(Run(str(tmp_path / "with"), "a"))
    shutil.copytree(run.path, tmp_path / "without" / "a", copy_function=shutil.copyfile)
    there = Run(str(tmp_path / "without"), "a")
    assert not holds(there)
    assert build(there) == []
    write_receipt(there, "recipe", 1, [])
    assert holds(there)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"rounds": 3}', LIES, "\x00" * 64])
def test_a_receipt_that_is_none(run, text):
    (Path(run.path) / FILE).write_text(text)
    assert read_receipt(run) is None
    write_receipt(run, "recipe", 1, [])
    assert holds(run)


def test_on_object_storage_sizes_are_compared():
    run = Run(f"memory://{uuid.uuid4().hex}/runs", "a")
    build(run)
    write_receipt(run, "recipe", 1, [])
    assert holds(run)
    path = f"{run.path}/prompts/train.parquet"
    whole = run.fs.cat_file(path)
    run.fs.pipe_file(path, b"x" * len(whole))
    assert holds(run)
    run.fs.pipe_file(path, whole[:-1])
    assert not holds(run)


# -- files that a recipe names ---------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"m" * 4096)
    return path


def test_an_input_is_known_without_a_look_at_it(run, model, monkeypatch):
    monkeypatch.setattr(lineage, "TICK", 0)
    digest = digest_file(model)
    write_receipt(run, "recipe", 1, [model])
    lineage._digest_file.cache_clear()  # as in another process
    monkeypatch.setattr(lineage, "digest_stream", lambda _: pytest.fail("read"))
    receipt = read_receipt(run)
    assert inputs_hold(receipt, [model])
    trust_inputs(receipt)
    assert digest_file(model) == digest


@pytest.mark.parametrize("kept", ["time", "nothing"])
def test_an_input_of_another_content_is_read(run, model, monkeypatch, kept):
    """Also where size and time are put back, as a copy of another model with `cp -p` does."""
    monkeypatch.setattr(lineage, "TICK", 0)
    before, stat = digest_file(model), model.stat()
    write_receipt(run, "recipe", 1, [model])
    model.write_bytes(b"n" * 4096)
    if kept == "time":
        os.utime(model, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    receipt = read_receipt(run)
    assert not inputs_hold(receipt, [model])
    trust_inputs(receipt)
    assert digest_file(model) != before


def test_inputs_more_or_fewer_are_others(run, model, tmp_path, monkeypatch):
    monkeypatch.setattr(lineage, "TICK", 0)
    write_receipt(run, "recipe", 1, [model])
    other = tmp_path / "model-2.safetensors"
    other.write_bytes(b"x")
    receipt = read_receipt(run)
    assert not inputs_hold(receipt, [])
    assert not inputs_hold(receipt, [model, other])


def test_an_input_that_was_just_written_is_not_trusted(run, model):
    """A change within one tick of the clock would leave the same stamp."""
    write_receipt(run, "recipe", 1, [model])
    receipt = read_receipt(run)
    assert receipt.inputs == {}
    assert not inputs_hold(receipt, [model])


def test_a_receipt_holds_no_content(run, model):
    assert set(json.loads((Path(run.path) / FILE).read_text())) == {"made_from", "rounds", "files", "inputs"}

"""The store: what is committed is not made again, what is not whole is not there, readers never trip."""

import json
import os
import shutil
import tempfile
import threading
import uuid
from pathlib import Path

import fsspec
import polars as pl
import pyarrow as pa
import pytest

from configs.errors import BadInput
from configs.load import load_recipe
from storage import store
from storage.artifacts import Artifact, local_folder, read_table
from storage.lineage import digest_file, digest_folder, digest_json
from storage.read import scan
from storage.schemas import STEPS
from storage.store import Run

TINY = Path(__file__).parents[1] / "recipes" / "tiny.toml"
SLOT = "round=0001/steps/part-00000"


class Maker:
    """Makes a small table or folder and counts how often it was asked to."""

    def __init__(self, value: int = 1):
        self.value, self.calls = value, 0

    def table(self) -> pa.Table:
        self.calls += 1
        return steps(self.value)

    def folders(self, folder: Path) -> dict[str, int]:
        """Two folders and a table, as a round's training makes them."""
        self.calls += 1
        for name in ("student", "trainer"):
            (folder / name).mkdir()
            (folder / name / f"{name}-{self.value}.txt").write_text(f"{name} {self.value}")
        store.write_parquet(steps(self.value), folder / "steps.parquet")
        return {"student": 1, "trainer": 1, "steps.parquet": 3}


FOLDERS = {"student": "round=0001/student", "trainer": "round=0001/trainer", "steps.parquet": SLOT}


def steps(value: int) -> pa.Table:
    return pa.Table.from_pylist([{"step": i, "round": 1, "loss": float(value)} for i in range(3)], STEPS)


def files(folder: Path | str) -> dict[str, int]:
    """Every file below a folder with its inode and time of change."""
    found = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def quiet(_: str) -> None:
    pass


@pytest.fixture
def root(tmp_path) -> str:
    return str(tmp_path / "runs")


@pytest.fixture
def remote_root() -> str:
    """A folder on fsspec's memory filesystem, which is not a local one."""
    return f"memory://{uuid.uuid4().hex}/runs"


def test_a_table_is_made_once(root):
    run, maker = Run(root, "a"), Maker()
    first = run.build_table(SLOT, {"x": 1}, maker.table, quiet)
    before = files(run.path)
    second = run.build_table(SLOT, {"x": 1}, maker.table, quiet)
    assert first == second == run.find(SLOT)
    assert maker.calls == 1
    assert files(run.path) == before
    assert set(before) == {f"{SLOT}.parquet", f"_manifests/{SLOT}.json"}


def test_the_artifact_says_what_lies_there(root):
    artifact = Run(root, "a").build_table(SLOT, {"x": 1}, Maker(5).table, quiet)
    assert artifact.path == f"{root}/a/{SLOT}.parquet"
    assert artifact.digest == digest_file(artifact.path)
    assert artifact.rows == 3
    assert read_table(artifact).equals(steps(5))
    assert read_table(artifact, ["loss"]).column_names == ["loss"]


def test_other_inputs_are_made_again(root):
    run, old, new = Run(root, "a"), Maker(1), Maker(2)
    first = run.build_table(SLOT, {"x": 1}, old.table, quiet)
    second = run.build_table(SLOT, {"x": 2}, new.table, quiet)
    assert new.calls == 1
    assert first.digest != second.digest
    assert read_table(second)["loss"].to_pylist() == [2.0] * 3
    assert run.find(SLOT, digest_json({"x": 1})) is None
    assert run.find(SLOT, digest_json({"x": 2})) == second


def test_the_order_of_inputs_does_not_matter(root):
    run, maker = Run(root, "a"), Maker()
    run.build_table(SLOT, {"x": 1, "y": {"a": 1, "b": 2}}, maker.table, quiet)
    run.build_table(SLOT, {"y": {"b": 2, "a": 1}, "x": 1}, maker.table, quiet)
    assert maker.calls == 1


def test_a_missing_file_is_made_again(root):
    run, maker = Run(root, "a"), Maker()
    first = run.build_table(SLOT, {"x": 1}, maker.table, quiet)
    os.remove(first.path)
    assert run.find(SLOT) is None
    assert run.build_table(SLOT, {"x": 1}, maker.table, quiet) == first
    assert maker.calls == 2


def test_the_manifest_says_what_it_was_made_from(root):
    run = Run(root, "a")
    artifact = run.build_table(SLOT, {"stage": "steps", "x": 1}, Maker().table, quiet)
    manifest = run.manifest(SLOT)
    assert manifest["key"] == digest_json({"stage": "steps", "x": 1})
    assert manifest["inputs"] == {"stage": "steps", "x": 1}
    assert (manifest["path"], manifest["digest"], manifest["rows"]) == (f"{SLOT}.parquet", artifact.digest, 3)
    assert manifest["seconds"] >= 0
    assert "pyarrow" in manifest["versions"]
    assert list(run.manifests()) == [(SLOT, manifest)]


def test_taken_over_from_a_sibling(root):
    """The same inputs in another run under the root: a hard link, and nothing is made."""
    first = Run(root, "a").build_table(SLOT, {"x": 1}, Maker().table, quiet)
    lines, maker = [], Maker()
    second = Run(root, "b").build_table(SLOT, {"x": 1}, maker.table, lines.append)
    assert maker.calls == 0
    assert os.path.samefile(first.path, second.path)
    assert (second.digest, second.rows) == (first.digest, first.rows)
    assert Run(root, "b").manifest(SLOT)["taken_from"] == "a"
    assert lines == [f"{SLOT}: 3 rows, taken over from a"]


def test_folders_are_taken_over_file_by_file(root):
    first = Run(root, "a").build_files(FOLDERS, {"x": 1}, Maker().folders, quiet)
    maker = Maker()
    second = Run(root, "b").build_files(FOLDERS, {"x": 1}, maker.folders, quiet)
    assert maker.calls == 0
    assert {name: artifact.digest for name, artifact in second.items()} == {n: a.digest for n, a in first.items()}
    assert os.path.samefile(f"{first['student'].path}/student-1.txt", f"{second['student'].path}/student-1.txt")


def test_nothing_is_taken_over_under_another_key_root_or_slot(root, tmp_path):
    Run(root, "a").build_table(SLOT, {"x": 1}, Maker().table, quiet)
    for run, slot, inputs in (
        (Run(root, "b"), SLOT, {"x": 2}),
        (Run(root, "b"), "round=0002/steps/part-00000", {"x": 1}),
        (Run(str(tmp_path / "elsewhere"), "a"), SLOT, {"x": 1}),
    ):
        maker = Maker()
        run.build_table(slot, inputs, maker.table, quiet)
        assert maker.calls == 1


def test_replacing_what_was_taken_over_leaves_the_original(root):
    first = Run(root, "a").build_table(SLOT, {"x": 1}, Maker(1).table, quiet)
    Run(root, "b").build_table(SLOT, {"x": 1}, Maker(1).table, quiet)
    Run(root, "b").build_table(SLOT, {"x": 2}, Maker(2).table, quiet)
    assert digest_file(first.path) == first.digest
    assert read_table(first)["loss"].to_pylist() == [1.0] * 3


def test_files_beside_the_runs_do_not_matter(root):
    """A README or a .DS_Store under the root is no run."""
    os.makedirs(root)
    (Path(root) / ".DS_Store").write_text("x")
    (Path(root) / "folder").mkdir()
    assert Run(root, "b").build_table(SLOT, {"x": 1}, Maker().table, quiet).rows == 3


def test_a_failing_make_leaves_nothing(root):
    run = Run(root, "a")

    def half(folder: Path) -> dict[str, int]:
        (folder / "student").mkdir()
        (folder / "student" / "half.txt").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        run.build_files({"student": "round=0001/student"}, {"x": 1}, half, quiet)
    with pytest.raises(ZeroDivisionError):
        run.build_table(SLOT, {"x": 1}, lambda: 1 / 0, quiet)
    assert [path for path in Path(root).rglob("*") if path != Path(run.path)] == []
    assert run.find("round=0001/student") is None


def test_a_failing_make_keeps_what_was_there(root):
    run = Run(root, "a")
    first = run.build_table(SLOT, {"x": 1}, Maker().table, quiet)
    with pytest.raises(ZeroDivisionError):
        run.build_table(SLOT, {"x": 2}, lambda: 1 / 0, quiet)
    assert run.find(SLOT, digest_json({"x": 1})) == first
    assert digest_file(first.path) == first.digest


def test_killed_between_data_and_manifest(root, monkeypatch):
    """New data under an old manifest must not pass for what the old manifest says."""
    run = Run(root, "a")
    run.build_table(SLOT, {"x": 1}, Maker(1).table, quiet)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_text", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.build_table(SLOT, {"x": 2}, Maker(2).table, quiet)
    artifact = run.build_table(SLOT, {"x": 1}, Maker(1).table, quiet)
    assert digest_file(artifact.path) == artifact.digest
    assert read_table(artifact)["loss"].to_pylist() == [1.0] * 3


def test_folders_are_replaced_whole(root):
    """A round made again: each folder holds the new files only, and nothing is left of the work."""
    run = Run(root, "a")
    old = run.build_files(FOLDERS, {"x": 1}, Maker(1).folders, quiet)
    new = run.build_files(FOLDERS, {"x": 2}, Maker(2).folders, quiet)
    assert new["student"].path == old["student"].path
    assert os.listdir(new["student"].path) == ["student-2.txt"]
    assert os.listdir(new["trainer"].path) == ["trainer-2.txt"]
    assert new["student"].digest == digest_folder(new["student"].path) != old["student"].digest
    assert not (Path(run.path) / "_tmp").exists()


def test_one_folder_is_replaced_whole(root):
    run = Run(root, "a")
    for value in (1, 2):

        def make(folder: Path, value: int = value) -> dict[str, int]:
            (folder / "model").mkdir()
            (folder / "model" / f"{value}.txt").write_text("x")
            return {"model": 1}

        artifact = run.build_files({"model": "round=0001/student"}, {"x": value}, make, quiet)["model"]
    assert os.listdir(artifact.path) == ["2.txt"]
    assert not (Path(run.path) / "_tmp").exists()


def test_data_folders_hold_parquet_only(root):
    """At every moment of the work: looked at before each rename and afterwards."""
    run, seen = Run(root, "a"), []

    def look() -> pa.Table:
        seen.extend(path.name for path in Path(run.path).glob("round=*/*/*") if path.is_file())
        return steps(1)

    for part in range(3):
        run.build_table(f"round=0001/steps/{store.part(part)}", {"part": part}, look, quiet)
    seen.extend(path.name for path in Path(run.path).glob("round=*/*/*"))
    assert set(seen) == {"part-00000.parquet", "part-00001.parquet", "part-00002.parquet"}


def test_a_reader_never_fails_while_shards_are_committed(root):
    """Polls a table, for one run and for all, while a writer adds shards: whole ones only, and ever more."""
    run = Run(root, "a")
    run.build_table(SLOT, {"part": 0}, Maker(1).table, quiet)
    done, problems, heights = threading.Event(), [], []

    def poll() -> None:
        while not done.is_set():
            try:
                heights.append(scan(f"{root}/*", "steps").collect().height)
                heights.append(scan(run.path, "steps").filter(pl.col("round") == 1).collect().height)
            except Exception as problem:
                problems.append(problem)

    reader = threading.Thread(target=poll)
    reader.start()
    try:
        for part in range(1, 40):
            run.build_table(f"round=0001/steps/{store.part(part)}", {"part": part}, Maker(part).table, quiet)
    finally:
        done.set()
        reader.join()
    assert problems == []
    assert len(heights) > 3
    assert heights == sorted(heights)
    assert all(height % 3 == 0 for height in heights)
    assert scan(run.path, "steps").collect().height == 120


def test_rounds_done(root):
    run = Run(root, "a")
    assert run.rounds_done() == 0
    for number in (0, 1, 3):
        run.build_table(f"round={number:04d}/evals/student", {"round": number}, Maker().table, quiet)
    assert run.rounds_done() == 1


# -- whose folder is it, and can it be written ---------------------------------------------------------------------------


def test_a_recipe_is_frozen_once(root):
    recipe = load_recipe(TINY, [f"root={root}"])
    run = Run(root, recipe.name)
    run.check_recipe(recipe)
    assert not Path(root).exists()  # a check writes nothing
    run.freeze(recipe)
    assert run.frozen_recipe() == recipe
    before = files(root)
    run.freeze(recipe)
    run.check_recipe(recipe)
    assert files(root) == before


def test_a_run_of_another_recipe_is_refused(root):
    recipe = load_recipe(TINY, [f"root={root}"])
    Run(root, recipe.name).freeze(recipe)
    other = load_recipe(TINY, [f"root={root}", "train.learning_rate=0.5", "objective.name=gold"])
    with pytest.raises(BadInput) as caught:
        Run(root, recipe.name).check_recipe(other)
    text = str(caught.value)
    assert "train.learning_rate is 0.001 in the run, 0.5 in this recipe" in text
    assert "objective.name is 'bytes' in the run, 'gold' in this recipe" in text
    assert "--set name=" in text


def test_a_run_that_was_moved_goes_on(root, tmp_path):
    """Where a run lies is no part of what it is: a copy under another root, or the same root by another path."""
    recipe = load_recipe(TINY, [f"root={root}"])
    Run(root, recipe.name).freeze(recipe)
    moved = tmp_path / "elsewhere"
    shutil.copytree(root, moved)
    there = load_recipe(TINY, [f"root={moved}"])
    Run(str(moved), recipe.name).check_recipe(there)
    Run(str(moved), recipe.name).freeze(there)
    assert Run(str(moved), recipe.name).frozen_recipe() == there


def test_a_folder_that_is_no_run_is_refused(root):
    recipe = load_recipe(TINY, [f"root={root}"])
    folder = Path(root) / recipe.name
    folder.mkdir(parents=True)
    Run(root, recipe.name).check_recipe(recipe)  # an empty one may be used
    (folder / "thesis.tex").write_text("precious")
    with pytest.raises(BadInput, match="not a run folder") as caught:
        Run(root, recipe.name).check_recipe(recipe)
    assert str(folder) in str(caught.value)


def test_a_run_killed_before_its_first_file_goes_on(root):
    """What a kill left under `_tmp` does not make the folder a foreign one."""
    recipe = load_recipe(TINY, [f"root={root}"])
    left = Path(root) / recipe.name / "_tmp" / "tmpabc"
    left.mkdir(parents=True)
    (left / "text").write_text("half")
    Run(root, recipe.name).check_recipe(recipe)


def test_a_frozen_recipe_broken_by_hand_is_named(root):
    recipe = load_recipe(TINY, [f"root={root}"])
    run = Run(root, recipe.name)
    run.freeze(recipe)
    (Path(run.path) / "run.toml").write_text("name = = 3")
    with pytest.raises(BadInput, match=r"run\.toml"):
        run.check_recipe(recipe)


@pytest.mark.parametrize("what", ["access", "statvfs"])
def test_a_read_only_root_is_refused(root, monkeypatch, what):
    """By permission, or because the disk is mounted read-only (where a superuser's permissions say yes)."""
    recipe = load_recipe(TINY, [f"root={root}"])
    if what == "access":
        monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    else:
        real = os.statvfs(tempfile.gettempdir())
        flags = os.statvfs_result([*real[:8], real.f_flag | os.ST_RDONLY, *real[9:]])
        monkeypatch.setattr(os, "statvfs", lambda path: flags)
    with pytest.raises(BadInput) as caught:
        Run(root, recipe.name).check_recipe(recipe)
    assert root in str(caught.value)
    assert "cannot be written" in str(caught.value)
    assert not Path(root).exists()


def test_a_file_in_place_of_the_root_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    for root in (file, file / "below"):
        recipe = load_recipe(TINY, [f"root={root}"])
        with pytest.raises(BadInput, match="cannot be written") as caught:
            Run(str(root), recipe.name).check_recipe(recipe)
        assert "read-only" not in str(caught.value)  # it is a file, and the message says so
    assert file.read_text() == "x"


# -- other filesystems -------------------------------------------------------------------------------------------------


def test_tables_on_a_remote_filesystem(remote_root):
    run, maker = Run(remote_root, "a"), Maker(4)
    assert run.find(SLOT) is None
    artifact = run.build_table(SLOT, {"x": 1}, maker.table, quiet)
    assert artifact.path.startswith("memory://")
    assert Run(remote_root, "a").build_table(SLOT, {"x": 1}, maker.table, quiet) == artifact
    assert maker.calls == 1
    assert read_table(artifact).equals(steps(4))
    assert run.find(SLOT, digest_json({"x": 2})) is None
    fs, path = fsspec.url_to_fs(remote_root)
    assert sorted(name.removeprefix(path) for name in fs.find(path)) == [f"/a/_manifests/{SLOT}.json", f"/a/{SLOT}.parquet"]


def test_taken_over_on_a_remote_filesystem(remote_root):
    first = Run(remote_root, "a").build_files(FOLDERS, {"x": 1}, Maker().folders, quiet)
    maker = Maker()
    second = Run(remote_root, "b").build_files(FOLDERS, {"x": 1}, maker.folders, quiet)
    assert maker.calls == 0
    assert second["trainer"].digest == first["trainer"].digest
    assert read_table(second["steps.parquet"]).equals(steps(1))
    assert os.listdir(local_folder(second["student"])) == ["student-1.txt"]


def test_folders_are_replaced_whole_on_a_remote_filesystem(remote_root):
    run = Run(remote_root, "a")
    run.build_files(FOLDERS, {"x": 1}, Maker(1).folders, quiet)
    artifact = run.build_files(FOLDERS, {"x": 2}, Maker(2).folders, quiet)["student"]
    fs, path = fsspec.url_to_fs(artifact.path)
    assert [name.rsplit("/", 1)[1] for name in fs.find(path)] == ["student-2.txt"]
    assert os.listdir(local_folder(artifact)) == ["student-2.txt"]


def test_two_processes_fetch_the_same_folder(remote_root, tmp_path, monkeypatch):
    """The other is done between this one's look and its rename."""
    made = Run(remote_root, "a").build_files(FOLDERS, {"x": 1}, Maker(1).folders, quiet)["student"]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    get = fsspec.filesystem("memory").__class__.get

    def get_late(self, source, target, **options):
        get(self, source, target, **options)
        other = tmp_path / f"potstill-{os.getuid()}" / made.digest
        get(self, source, str(other), **options)

    monkeypatch.setattr(fsspec.filesystem("memory").__class__, "get", get_late)
    assert os.listdir(local_folder(made)) == ["student-1.txt"]
    assert os.listdir(tmp_path / f"potstill-{os.getuid()}") == [made.digest]


def test_a_recipe_on_a_remote_filesystem(remote_root):
    recipe = load_recipe(TINY, [f"root={remote_root}"])
    run = Run(remote_root, recipe.name)
    run.check_recipe(recipe)
    run.freeze(recipe)
    assert run.frozen_recipe() == recipe
    with pytest.raises(BadInput, match="belongs to another recipe"):
        run.check_recipe(load_recipe(TINY, [f"root={remote_root}", "seed=1"]))


def test_a_local_folder_is_used_where_it_lies(tmp_path):
    assert local_folder(Artifact(str(tmp_path), digest_folder(tmp_path))) == str(tmp_path)


# -- digests -----------------------------------------------------------------------------------------------------------


def test_a_folders_digest_is_of_names_and_contents(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "a").write_text("a")
        (folder / "b").write_text("b")
    assert digest_folder(one) == digest_folder(two)
    (two / "b").write_text("c")
    os.utime(two / "b", ns=(1, 1))
    assert digest_folder(one) != digest_folder(two)
    (two / "b").rename(two / "c")
    assert digest_folder(one) != digest_folder(two)


def test_written_parquet_keeps_every_schema(tmp_path):
    """Lists of half floats and of bytes come back as they were, null rows too."""
    from storage.schemas import SCHEMAS

    for name, schema in SCHEMAS.items():
        table = pa.Table.from_pylist([{}, {}], schema)
        path = tmp_path / f"{name}.parquet"
        store.write_parquet(table, path)
        assert read_table(Artifact(str(path), "")).schema.equals(schema)
    values = pa.table({"x": pa.array([[0.5, -1.0], None, []], pa.list_(pa.float16())), "b": [b"\xff", None, b""]})
    store.write_parquet(values, tmp_path / "values.parquet")
    assert read_table(Artifact(str(tmp_path / "values.parquet"), "")).equals(values)


def test_manifests_are_json_for_people(root):
    run = Run(root, "a")
    run.build_table(SLOT, {"x": 1}, Maker().table, quiet)
    text = (Path(run.path) / "_manifests" / f"{SLOT}.json").read_text()
    assert json.loads(text)["rows"] == 3
    assert "\n" in text

"""What is cleared keeps its manifest: found as before, never called damaged, made again only where it is needed."""

import fcntl
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from configs.errors import Stopped
from configs.keep import Keep
from configs.load import validate_recipe
from flows.keep import plan_clearing
from storage import damage
from storage.artifacts import read_table
from storage.clearing import clear, list_clearable, word_bytes
from storage.damage import mend
from storage.receipt import files_hold, read_receipt, write_receipt
from storage.schemas import STEPS
from storage.store import Run, part, round_slot

SCORES, WHY = "round=0001/scores/part-00000", "keep.scores = 1"
PIECE = {"student": "round=0001/student", "trainer": "round=0001/trainer"}


@pytest.fixture(autouse=True)
def nothing_is_suspected():
    yield
    damage.SUSPECTS.clear()


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(str(tmp_path / "runs"), "a")


def table(value: float = 1.0) -> pa.Table:
    return pa.Table.from_pylist([{"step": 1, "loss": value}], STEPS)


def trained(folder: Path, text: str = "weights") -> dict[str, int]:
    for name in PIECE:
        (folder / name).mkdir()
        (folder / name / "file").write_text(text)
    return dict.fromkeys(PIECE, 1)


def never() -> pa.Table:
    raise AssertionError("made again")


def test_what_is_cleared_is_found_and_not_made_again(run):
    first, lines = run.build_table(SCORES, {"x": 1}, table), []
    size = Path(first.path).stat().st_size
    assert clear(run, {SCORES: WHY}, lines.append) == size
    assert not Path(first.path).parent.exists()
    assert lines == [f"a: cleared {word_bytes(size)}: round=0001/scores ({WHY})"]
    assert run.find(SCORES) == first
    assert run.find_damage(SCORES) is None
    assert run.build_table(SCORES, {"x": 1}, never) == first
    cleared = run.manifest(SCORES)["cleared"]
    assert (cleared["why"], cleared["bytes"]) == (WHY, size)
    assert clear(run, {SCORES: WHY}, lines.append) == 0
    assert list_clearable(run, {SCORES: WHY}) == []


def test_it_is_made_again_where_it_is_read(run):
    first, lines = run.build_table(SCORES, {"x": 1}, table), []
    clear(run, {SCORES: WHY}, lines.append)
    assert mend(lambda: read_table(run.build_table(SCORES, {"x": 1}, table, lines.append))) == table()
    assert run.find(SCORES) == first
    assert "cleared" not in run.manifest(SCORES)
    assert f"({WHY}), and needed again; it is made again" in lines[1]


def test_it_is_not_replaced_where_it_comes_out_otherwise(run):
    run.build_table(SCORES, {"x": 1}, table)
    clear(run, {SCORES: WHY}, print)
    with pytest.raises(Stopped, match="came out otherwise"):
        mend(lambda: read_table(run.build_table(SCORES, {"x": 1}, lambda: table(2.0))))
    assert run.manifest(SCORES)["cleared"]
    assert run.build_table(SCORES, {"x": 2}, lambda: table(2.0)).rows == 1  # under another key it is another thing
    assert "cleared" not in run.manifest(SCORES)


@pytest.mark.parametrize("moment", ["before", "during"])
def test_a_kill_between_mark_and_removal(run, monkeypatch, moment):
    """The mark comes first: either nothing has happened, or the next clearing takes the rest away."""
    run.build_files(PIECE, {"x": 1}, trained)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Run, "write_manifest" if moment == "before" else "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            clear(run, {PIECE["trainer"]: WHY}, print)
    assert Path(run.path, PIECE["trainer"], "file").exists()
    assert run.find_damage(PIECE["trainer"]) is None
    assert len(run.build_files(PIECE, {"x": 1}, never)) == 2
    clear(run, {} if moment == "during" else {PIECE["trainer"]: WHY}, print)
    assert not Path(run.path, PIECE["trainer"]).exists()
    assert len(run.build_files(PIECE, {"x": 1}, never)) == 2


def test_another_run_takes_over_what_is_left(run):
    """A cleared trainer's state comes with its student; a table that was cleared alone is made anew."""
    run.build_files(PIECE, {"x": 1}, trained)
    run.build_table(SCORES, {"x": 1}, table)
    clear(run, dict.fromkeys([SCORES, PIECE["trainer"]], WHY), print)
    other = Run(run.uri, "b")
    taken = other.build_files(PIECE, {"x": 1}, never)
    assert taken["trainer"].digest == run.find(PIECE["trainer"]).digest
    assert other.manifest(PIECE["trainer"])["taken_from"] == "a"
    assert other.find_damage(PIECE["trainer"]) is None
    made = []
    other.build_table(SCORES, {"x": 1}, lambda: made.append(1) or table())
    assert made == [1]


def test_what_others_have_linked_frees_nothing(run):
    run.build_table(SCORES, {"x": 1}, table)
    Run(run.uri, "b").build_table(SCORES, {"x": 1}, never)
    assert [each.bytes for each in list_clearable(run, {SCORES: WHY})] == [0]
    clear(run, {SCORES: WHY}, print)
    assert Run(run.uri, "b").find_damage(SCORES) is None


def test_what_is_being_taken_over_stays(run):
    run.build_table(SCORES, {"x": 1}, table)
    descriptor = os.open(f"{run.path}/_manifests/{SCORES}.json", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)  # as `_take_over` holds it
    lines: list[str] = []
    assert clear(run, {SCORES: WHY}, lines.append) == 0
    assert "another run is just taking it over" in lines[0]
    os.close(descriptor)
    assert run.find_damage(SCORES) is None
    assert clear(run, {SCORES: WHY}, lines.append) > 0


def test_a_receipt_holds_after_clearing(run):
    run.build_table(SCORES, {"x": 1}, table)
    write_receipt(run, "recipe", 1, [])
    clear(run, {SCORES: WHY}, print)
    assert files_hold(read_receipt(run), run)
    shutil.rmtree(f"{run.path}/_manifests/round=0001")
    assert not files_hold(read_receipt(run), run)


# -- which rounds -----------------------------------------------------------------------------------------------------


def recipe_of(name: str, **more: object):
    plain = {"model": "student", "prompts": {"source": "file", "path": "p.jsonl"}, "objective": {"name": "sft"}}
    data = {"name": name, "student": {"model": "m"}, "rollout": {"on_policy": 0.0}, "rounds": 4, **more}
    return validate_recipe({key: plain.get(key, data.get(key)) for key in (*data, "prompts", "objective")}, name)


@pytest.fixture
def five(run) -> Run:
    """Five complete rounds of a recipe of four, and a sixth that has trained."""
    for number in range(1, 7):
        slots = {name: round_slot(number, name) for name in PIECE}
        run.build_files(slots, {"round": number}, trained)
        for name in ("rollouts", "scores"):
            run.build_table(round_slot(number, name, part(0)), {"round": number}, table)
        if number < 6:
            run.build_table(round_slot(number, "evals", "student"), {"round": number}, table)
    return run


def rounds(run: Run, keep: Keep, table: str) -> set[int]:
    return {int(slot[6:10]) for slot in plan_clearing(run, recipe_of("a"), keep) if slot.split("/")[1] == table}


def test_by_default_the_newest_complete_rounds_trainer_is_kept(five):
    planned = plan_clearing(five, recipe_of("a"), Keep())
    assert planned == {round_slot(n, "trainer"): "keep.trainers = 1" for n in range(1, 5)}


def test_numbers_count_from_the_newest_complete_round(five):
    assert rounds(five, Keep(scores=2), "scores") == {1, 2, 3}
    assert rounds(five, Keep(rollouts=9), "rollouts") == set()
    assert rounds(five, Keep(trainers="all"), "trainer") == set()
    assert rounds(five, Keep(students=1), "student") == {1, 2, 3}, "the recipe's last round is what others may ask for"


def test_a_student_that_another_recipe_names_stays(five):
    other = recipe_of("b", student={"model": f"{five.path}/round=0002/student"})
    Run(five.uri, "b").freeze(other)
    assert rounds(five, Keep(students=1), "student") == {1, 3}


@pytest.mark.parametrize(("count", "words"), [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (3 << 40, "3.0 TiB")])
def test_bytes_for_people(count, words):
    assert word_bytes(count) == words

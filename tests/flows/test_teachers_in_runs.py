"""Several teachers in a run: each row is graded by one, all rows make one loss, and figures are by teacher."""

import json
import shutil
import tomllib
from ast import literal_eval
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import tomli_w
from helpers import CHECKOUT, refused

from configs.load import load_recipe
from flows.distill import distill
from storage.read import scan
from storage.store import Run
from tasks.models.reference import make_reference
from tasks.models.text import side
from tasks.preflight import examine
from tasks.rows.scorers import make_grader
from tasks.views.card import render_card
from tasks.views.inspect import show_round
from tasks.views.kinds import Kind
from tasks.views.metrics import list_metrics
from tasks.views.report import render_report
from tasks.views.rollout import show_rollout
from tasks.views.rounds import summarise_rounds, tabulate_rounds

TWO = CHECKOUT / "tests" / "recipes" / "two.toml"
LONG = {"word_len": [5, 6]}


@pytest.fixture(scope="module")
def two(tiny, tmp_path_factory) -> Path:
    """The run of tests/recipes/two.toml; the models that tiny.toml has made are taken from there."""
    root = tmp_path_factory.mktemp("two")
    for folder in tiny.parent.iterdir():
        if folder.name.startswith("test-"):
            shutil.copytree(folder, root / folder.name)
    assert distill(str(TWO), overrides=(f"root={root}",))["rounds"] == 2
    return root / "two"


@pytest.fixture
def teachers(recipe, models) -> Callable[..., Path]:
    """Writes tiny.toml with several teachers in place of its own, and with changes; its path."""

    def write(*several: dict[str, Any], **changes: Any) -> Path:
        path = recipe(teacher=None, **changes)
        data = tomllib.loads(path.read_text())
        data.pop("teacher", None)
        several = tuple({"model": str(models["teacher"]), **teacher} for teacher in several)
        data["teachers"] = [{key: value for key, value in teacher.items() if value is not None} for teacher in several]
        path.write_text(tomli_w.dumps(data))
        return path

    return write


def decoded(piece: bytes) -> str | bytes:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return piece


def words_of(run: Path) -> pl.DataFrame:
    """Each prompt with the length of its word, as the source says it."""
    prompts = scan(str(run), "prompts").select("prompt_id", "metadata").collect()
    lengths = [json.loads(metadata)["entry"]["metadata"]["word_len"] for metadata in prompts["metadata"]]
    return prompts.select("prompt_id", word_len=pl.Series(lengths))


def test_each_row_is_graded_by_the_teacher_whose_where_it_fits(two):
    words = words_of(two)
    rollouts = scan(str(two), "rollouts").collect().join(words, on="prompt_id", maintain_order="left")
    wanted = rollouts.select(
        "rollout_id", wanted=pl.when(pl.col("word_len") >= 5).then(pl.lit("long")).otherwise(pl.lit("rest"))
    )
    assert set(wanted["wanted"]) == {"long", "rest"}
    for table in ("scores", "aligned"):
        found = scan(str(two), table).collect()
        assert sorted(found["rollout_id"]) == sorted(rollouts["rollout_id"])
        assert (found.join(wanted, on="rollout_id")["teacher_name"] == found.join(wanted, on="rollout_id")["wanted"]).all()
    assert scan(str(two), "aligned").collect()["rollout_id"].to_list() == rollouts["rollout_id"].to_list()
    evals = scan(str(two), "evals").collect().join(words, on="prompt_id")
    assert (evals["teacher_name"] == pl.Series(["long" if n >= 5 else "rest" for n in evals["word_len"]])).all()
    scores = scan(str(two), "scores").collect()
    assert scores.filter(teacher_name="long", status="ok")["law_counts"].null_count() == 0
    assert scores.filter(teacher_name="rest", status="ok")["hidden"].null_count() == 0
    assert {path.stem for path in (two / "round=0001" / "scores").iterdir()} == {
        f"part-0000{n}-{name}" for n in (0, 1) for name in ("long", "rest")
    }


def test_a_row_has_the_targets_that_its_teacher_alone_would_give_it(two, recipe, models):
    """The same rollouts of round 1, all of them graded by the one teacher: its rows are equal, byte for byte."""
    data = tomllib.loads(TWO.read_text())
    (long, _), root = data.pop("teachers"), two.parent
    teacher = {"recipe": str(CHECKOUT / "tests" / "recipes" / "teacher.toml")}
    folder = two.parent / "recipes"
    folder.mkdir()
    data |= {"name": "alone", "teacher": teacher, "score": long["score"] | {"k": 256}, "root": str(root)}
    data["student"] = {"recipe": str(CHECKOUT / "tests" / "recipes" / "student.toml")}
    data["rollout"] = data["rollout"] | {"off_policy": "reference"}
    path = folder / "alone.toml"
    path.write_text(tomli_w.dumps(data))
    distill(str(path), rounds=1)
    shared = ["student_ends", "teacher_ends", "term_starts", "target_ids", "target_logprobs", "target_rest", "supervised_bytes"]
    mixed, alone = (scan(str(run), "aligned").filter(pl.col("round") == 1).collect() for run in (two, root / "alone"))
    own = scan(str(two), "rollouts").filter(pl.col("round") == 1, source="student").collect()["rollout_id"]
    mine = mixed.filter(pl.col("rollout_id").is_in(own.implode()), teacher_name="long").sort("rollout_id")
    same = alone.filter(pl.col("rollout_id").is_in(mine["rollout_id"].implode())).sort("rollout_id")
    assert len(mine) > 5
    assert mine["supervised_bytes"].sum() > 0
    assert mine.select(shared).equals(same.select(shared))
    others = mixed.filter(pl.col("rollout_id").is_in(own.implode()), teacher_name="rest").sort("rollout_id")
    theirs = alone.filter(pl.col("rollout_id").is_in(others["rollout_id"].implode())).sort("rollout_id")
    assert others["target_logprobs"].to_list() != theirs["target_logprobs"].to_list()


def test_a_new_teacher_scores_its_rows_alone(teachers, models, tmp_path):
    """What another teacher had scored, and answered for its figures, is taken over."""
    first = teachers({"name": "long", "where": {"word_len": 6}}, {"name": "rest"}, name="first")
    distill(str(first), rounds=1)
    three = {"name": "three", "where": {"word_len": [3, 4]}, "model": str(models["untrained"])}
    distill(str(teachers({"name": "long", "where": {"word_len": 6}}, three, {"name": "rest"}, name="second")), rounds=1)
    manifests = dict(Run(str(tmp_path / "runs"), "second").manifests())
    for slot in ("round=0001/rollouts/part-00000", "round=0001/scores/part-00000-long", "round=0000/evals/teacher-long"):
        assert manifests[slot].get("taken_from") == "first", slot
    for slot in ("round=0001/scores/part-00000-three", "round=0001/scores/part-00000-rest", "round=0001/aligned/part-00000"):
        assert "taken_from" not in manifests[slot], slot


def test_a_run_of_several_teachers_goes_on_and_is_left_as_it_is(two):
    before = {slot: manifest["digest"] for slot, manifest in Run(str(two.parent), "two").manifests()}
    distill(str(TWO), overrides=(f"root={two.parent}", "teachers.long.score.batch_tokens=64"))
    assert {slot: manifest["digest"] for slot, manifest in Run(str(two.parent), "two").manifests()} == before
    with pytest.raises(Exception, match=r"teachers.long.where.word_len is \[5, 6\] in the run, \[6\] in this recipe"):
        distill(str(TWO), overrides=(f"root={two.parent}", "teachers.long.where.word_len=[6]"))


def test_figures_are_by_teacher(two):
    table = tabulate_rounds(str(two))
    assert [row["rows of"] for row in table] == ["all"] * 4 + ["long"] * 4 + ["rest"] * 4
    evals = scan(str(two), "evals").filter(model="student", decoding="sampled").collect()
    for name, number in product(("long", "rest"), (0, 2)):
        own = evals.filter(pl.col("round") == number, teacher_name=name)
        (row,) = summarise_rounds(str(two), Kind(name, teacher=name)).filter(model="student", round=number).to_dicts()
        assert row["sampled"] == pytest.approx(own["correct"].mean())
        kept = own.drop_nulls("teacher_logprob")
        gap, size = (kept["logprob"] - kept["teacher_logprob"]).sum(), kept["bytes"].sum()
        assert row["divergence"] == (pytest.approx(gap / size, abs=1e-6) if size else None)
        if not number:
            continue
        aligned = scan(str(two), "aligned").filter(pl.col("round") == 2, teacher_name=name).collect()
        counts = [aligned[f"{kind}_bytes"].sum() for kind in ("supervised", "unmatched", "dropped", "tail")]
        assert row["supervised"] == pytest.approx(counts[0] / sum(counts))
    gates = scan(str(two), "gates").filter(pl.col("round") == 1).collect()
    aligned = scan(str(two), "aligned").filter(pl.col("round") == 1, teacher_name="rest").collect()
    (dropped,) = gates.filter(gate="rest: dropped")["value"]
    assert dropped == pytest.approx((aligned["status"] != "ok").mean())
    ((_, figures),) = [found for found in list_metrics(str(two), 2) if "student/long/sampled" in found[1]]
    assert (
        figures["student/long/sampled"]
        == summarise_rounds(str(two), Kind("long", teacher="long")).filter(model="student", round=2)["sampled"][0]
    )


def test_one_of_the_teachers_may_be_the_student_itself(two):
    """As it was before round 1: what it samples in round 1 has the same log-probs when it is graded."""
    some = scan(str(two), "rollouts").filter(pl.col("round") == 1, source="student").collect()
    graded = scan(str(two), "scores").filter(pl.col("round") == 1, status="ok").collect()
    both = some.join(graded, on="rollout_id", suffix="_graded").select(
        "teacher_name", gap=(pl.col("logprobs").list.sum() - pl.col("logprobs_graded").list.sum()).abs()
    )
    gaps = dict(both.group_by("teacher_name").agg(pl.col("gap").max()).iter_rows())
    assert gaps["rest"] < 1e-3
    assert gaps["long"] > 0.1


def test_everything_that_shows_a_run_names_the_teacher_of_a_row(two):
    shown = show_round(str(two), 1)
    assert {row["teacher_name"] for row in shown["Bytes of the completions"]} == {"long", "rest"}
    assert {row["rows of"] for row in shown["Tokens that match a token of the other side"]} == {"long", "rest"}
    scores = scan(str(two), "scores").filter(pl.col("round") == 1, status="ok").collect()
    for name, teacher in (("long", "test-teacher-seed0"), ("rest", "test-student-seed0")):
        row = scores.filter(teacher_name=name).row(0, named=True)
        (about,), _, lines = show_rollout(str(two), row["rollout_id"]).values()
        assert about["scored by"].endswith(f" {name}")
        checkpoint = Run(str(two.parent), teacher).find("round=0001/student")
        assert checkpoint is not None
        pieces = side(make_reference(load_recipe(TWO).student, checkpoint.path)).beta.values
        wanted = [pieces[i] for i in row["token_ids"] if pieces[i] is not None]
        written = [line["teacher"] for line in lines if line["teacher"] and not line["teacher"].startswith("<")]
        assert [literal_eval(piece) for piece in written] == [decoded(piece) for piece in wanted]
    run = Run(str(two.parent), "two")
    card = render_card(run, 2, where="student")
    assert "taught by the model that the recipe" in card
    assert " and itself" in card
    assert "teacher long" in card
    assert "(long)" in render_report(run)


def test_preflight_tries_each_teacher_on_its_rows(two):
    recipe = load_recipe(TWO, (f"root={two.parent}", "name=tried"))
    root = two.parent
    student, long = (
        make_reference(recipe.student, str(root / f"test-{role}-seed0" / "round=0001" / "student"))
        for role in ("student", "teacher")
    )
    gates = {gate.name: gate for gate in examine(recipe, 16, student=student, teachers={"long": long, "rest": student})}
    for name in ("long", "rest"):
        for gate in ("teacher: room", "student: chance", "noise", "own teacher", "supervised", "lead"):
            assert f"{name}: {gate}" in gates
    assert {"disk", "hours"} <= gates.keys()
    assert not (root / "tried").exists()
    read = [int(gates[f"{name}: teacher: kept"].detail.split()[1]) for name in ("long", "rest")]
    words = words_of(two)
    assert read == [len(words.filter(pl.col("word_len") >= 5)), len(words.filter(pl.col("word_len") < 5))]


WRONG = {
    "none takes a row": ([{"name": "long", "where": LONG}], {}, ["teachers: none takes", "(word_len = ", "without `where`"]),
    "two of one name": ([{"name": "a", "where": LONG}, {"name": "a"}], {}, ["teachers: two are called 'a'"]),
    "no such column": (
        [{"name": "a", "where": {"wordlen": 3}}, {"name": "b"}],
        {},
        ["teachers.a.where.wordlen: no row of the prompts has this column; there are ", "word_len"],
    ),
    "never reached": ([{"name": "a"}, {"name": "b", "where": LONG}], {}, ["'a' has no `where`", "'b' behind it"]),
    "empty list": (
        [{"name": "a", "where": {"word_len": []}}, {"name": "b"}],
        {},
        ["teachers", "an empty list, which no row has"],
    ),
    "a name that is no name": ([{"name": "a b"}], {}, ["teachers.0.name"]),
    "a signal that the objective cannot read": (
        [{"name": "a", "score": {"signal": "sampled"}}],
        {},
        ["objective.name = 'bytes' cannot be computed from score.signal = 'sampled'"],
    ),
    "a model that is not there": ([{"name": "a", "model": "no/where"}], {}, ["no/where"]),
    "a template that its rows cannot fill": (
        [{"name": "a", "where": LONG, "template": "{prompt} {nothing}"}, {"name": "b"}],
        {},
        ["teachers.a.template", "nothing"],
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_teachers(wrong, teachers, potstill, tmp_path):
    several, changes, parts = WRONG[wrong]
    refused(potstill("run", teachers(*several, **changes)), *parts)
    assert not (tmp_path / "runs" / "tiny").exists()


def test_both_kinds_of_teachers(teachers, potstill, models):
    path = teachers({"name": "a"})
    path.write_text(path.read_text() + f'\n[teacher]\nmodel = "{models["teacher"]}"\n')
    refused(potstill("run", path), "[teacher] and [[teachers]] are both there")
    refused(potstill("run", teachers({"name": "a"}), "--set", "teachers.b.dtype=float32"), "no teacher is called 'b'; known: a")


def test_rows_that_no_teacher_takes_can_be_left_out(teachers, tmp_path):
    """Counted by reason, as other rows that a side cannot use."""
    rows = [{"prompt": f"{kind} {n}", "reference": "x", "kind": kind} for n in range(40) for kind in ("dog", "cat", "cow")]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    several = [{"name": "a", "where": {"kind": "dog"}}, {"name": "b", "where": {"kind": ["cat"]}}]
    source = {"source": "file", "path": str(data), "eval": 8, "unusable": "leave_out"}
    result = distill(str(teachers(*several, prompts=source, rollout__prompts=16)), rounds=1)
    run = Path(result["run"])
    account = scan(str(run), "accounts").collect()
    assert account.filter(outcome="refused: no teacher takes it")["rows"].to_list() == [40]
    asked = scan(str(run), "prompts").collect()["metadata"].to_list()
    assert {json.loads(metadata)["kind"] for metadata in asked} == {"dog", "cat"}


def test_paths_give_their_rows_a_column(teachers, tmp_path):
    for kind in ("sums", "words"):
        lines = [json.dumps({"prompt": f"{kind} {n}", "reference": "x"}) + "\n" for n in range(20)]
        (tmp_path / f"{kind}.jsonl").write_text("".join(lines))
    paths = [{"path": str(tmp_path / f"{kind}.jsonl"), "add": {"task": kind}} for kind in ("sums", "words")]
    several = [{"name": "a", "where": {"task": "sums"}}, {"name": "b", "where": {"task": "words"}}]
    source = {"source": "file", "paths": paths, "eval": 8}
    run = distill(str(teachers(*several, prompts=source, rollout__prompts=16)), rounds=1)["run"]
    asked = (
        scan(run, "prompts").collect().select("prompt_id", kind=pl.col("messages").list.first().struct["content"].str.head(4))
    )
    graded = scan(run, "rollouts").collect().join(scan(run, "scores").collect(), on="rollout_id").join(asked, on="prompt_id")
    assert set(graded.select("kind", "teacher_name").iter_rows()) == {("sums", "a"), ("word", "b")}


def test_a_teacher_that_takes_no_row(teachers, potstill, tmp_path):
    """Of a file before anything is made, of a task once its prompts are."""
    several = [{"name": "a", "where": {"word_len": 99}}, {"name": "b"}]
    refused(potstill("run", teachers(*several)), "teachers.a: it takes no row of the prompts")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"dog {n}", "word_len": n}) + "\n" for n in range(40)))
    path = teachers(*several, prompts={"source": "file", "path": str(data), "eval": 8}, name="file")
    refused(potstill("run", path), "teachers.a: it takes no row of the prompts")
    assert not (tmp_path / "runs" / "file").exists()


def test_a_teacher_without_a_held_out_row(teachers, tmp_path):
    """It is not evaluated on anything, and teaches."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"dog {n}", "kind": n % 2, "reference": "x"}) + "\n" for n in range(40)))
    several = [{"name": "a", "where": {"kind": 0}}, {"name": "b"}]
    source = {"source": "file", "path": str(data), "eval": 1}
    run = Path(distill(str(teachers(*several, prompts=source, rollout__prompts=16)), rounds=1)["run"])
    evals = scan(str(run), "evals").collect()
    assert evals["teacher_name"].n_unique() == 1
    assert scan(str(run), "scores").collect()["teacher_name"].n_unique() == 2
    assert {row["rows of"] for row in tabulate_rounds(str(run))} == {"all", *evals["teacher_name"].unique()}
    assert render_report(Run(str(run.parent), run.name))


def test_a_mix_of_tasks(teachers, tmp_path):
    """reasoning-gym's `composite`: which of the tasks an item is of is a column of its row."""
    words = {"min_word_len": 3, "max_word_len": 6}
    tasks = [{"name": "spell_backward", "config": words}, {"name": "chain_sum", "config": {"max_terms": 2, "max_digits": 1}}]
    source = {"source": "reasoning-gym", "task": "composite", "options": {"datasets": tasks}, "train": 32, "eval": 8}
    source["template"] = "{source_index} {source_dataset:.5}"  # short, for a small context
    several = [{"name": "words", "where": {"source_dataset": "spell_backward"}}, {"name": "sums"}]
    run = distill(str(teachers(*several, prompts=source, rollout__prompts=16, rollout__off_policy="reference")), rounds=1)[
        "run"
    ]
    asked = scan(run, "prompts").collect()
    kinds = [json.loads(m)["entry"]["metadata"]["source_dataset"] for m in asked["metadata"]]
    table = scan(run, "rollouts").collect().join(asked.select("prompt_id", kind=pl.Series(kinds)), on="prompt_id")
    graded = table.join(scan(run, "scores").collect(), on="rollout_id")
    assert set(graded.select("kind", "teacher_name").iter_rows()) == {("spell_backward", "words"), ("chain_sum", "sums")}
    right = asked.filter(split="eval").to_dicts()[0]
    assert make_grader("task")([right["reference"]], right) == 1


def test_what_takes_one_teacher_alone(two, teachers, potstill, tmp_path):
    refused(potstill("cache", "export", two, tmp_path / "out"), "a cache is one teacher's, and this run has several")
    cached = {"name": "a", "model": None, "cache": str(tmp_path)}
    path = teachers(cached)
    refused(potstill("run", path), "teachers.a.cache: a cache teaches alone; give it as teacher.cache")

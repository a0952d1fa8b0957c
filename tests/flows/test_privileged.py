"""What the teacher alone reads of a row: templates per side, held against prompts that are written out by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from helpers import made, refused

from configs.load import load_recipe
from configs.models import describe_teacher
from configs.schema import Recipe
from flows.distill import distill
from flows.start import check_data
from storage.artifacts import read_table
from tasks.completions import make_completions
from tasks.engines.choose import get_engine, release
from tasks.evaluate import evaluate_prompts
from tasks.gates.sample import Sample
from tasks.models.reference import ModelRef, make_reference
from tasks.models.text import Side
from tasks.preflight import examine, roll_out_sample, score_sample
from tasks.prompts import make_prompts
from tasks.rows.messages import prompts_of
from tasks.rows.plan import Row
from tasks.rows.sources import split_prompts

ROWS = [{"question": f"hello {i}?", "answer": f"world {i}", "hint": f"say {i}", "level": i} for i in range(40)]
HINTED = "{prompt} Hint: {hint} ({level}), {reference}"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Two models with a tokenizer each."""
    place = tmp_path_factory.mktemp("models")
    return {
        "student": made(place / "student", 290, "hello hello world " * 5),
        "teacher": made(place / "teacher", 300, "say hello Hint: world hello world " * 5),
    }


@pytest.fixture
def recipe(models, tmp_path) -> Callable[..., Path]:
    def write(teacher: dict[str, Any], name: str = "privileged", rows: list[dict[str, Any]] = ROWS, **tables: Any) -> Path:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data: dict[str, Any] = {
            "name": name,
            "root": str(tmp_path / "runs"),
            "student": {"model": str(models["student"])},
            "teacher": {"model": str(models["teacher"]), **teacher},
            "prompts": {"source": "file", "path": "rows.jsonl", "eval": 8},
            "rollout": {"prompts": 8, "max_new_tokens": 6},
            "score": {"k": 64},
            "objective": {"name": "bytes"},
            "train": {"learning_rate": 1e-2, "batch_size": 8},
            "evaluate": {"samples": 1},
            "gates": {"truncated": 1.0, "repetition": 1.0, "supervised": 0.0, "dropped": 1.0},
        }
        path = tmp_path / f"{name}.toml"
        path.write_text(tomli_w.dumps({key: value | tables.get(key, {}) if isinstance(value, dict) else value
                                       for key, value in data.items()}))  # fmt: skip
        return path

    return write


def refs_of(recipe: Recipe) -> dict[str, ModelRef]:
    return {role: make_reference(config := getattr(recipe, role), config.model) for role in ("student", "teacher")}


def by_hand(table: Any, text: Callable[[dict[str, Any]], str]) -> Any:
    """The table of prompts with each message written out by `text`, from the row that it was read from."""
    rows = table.to_pylist()
    for row in rows:
        known = json.loads(row["metadata"]) | {"prompt": row["messages"][-1]["content"], "reference": row["reference"]}
        row["messages"] = [{"role": "user", "content": text(known)}]
    return type(table).from_pylist(rows, table.schema)


def hint(row: dict[str, Any]) -> str:
    return f"{row['prompt']} Hint: {row['hint']} ({row['level']}), {row['reference']}"


def test_what_each_side_reads(recipe):
    loaded = load_recipe(recipe({"template": HINTED}))
    refs, table = refs_of(loaded), split_prompts(loaded.prompts, 0)["train"]
    student, teacher = (Side(refs[role]) for role in ("student", "teacher"))
    for prompt, row in zip(prompts_of(table), table.to_pylist(), strict=True):
        asked = row["messages"][0]["content"]
        number = asked.removeprefix("hello ").removesuffix("?")
        assert student.show(*prompt) == f"<s><user>{asked}<end><assistant>"
        assert teacher.show(*prompt) == f"<s><user>{asked} Hint: say {number} ({number}), world {number}<end><assistant>"


def test_only_the_last_message_of_the_user_is_written(recipe):
    loaded = load_recipe(recipe({"template": "{prompt} {word}", "system": "Brief."}))
    side = Side(refs_of(loaded)["teacher"])
    roles = ("system", "user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]
    framed = side.frame(messages, {"prompt": "user 3", "word": "hello"})
    assert [m["content"] for m in framed] == ["Brief.", "user 1", "assistant 2", "user 3 hello", "assistant 4"]
    assert messages[3]["content"] == "user 3"


def test_a_task_has_its_fields_too(recipe):
    task = {"prompts": {"source": "reasoning-gym", "task": "spell_backward", "template": "{word}", "train": 8, "path": None}}
    path = recipe({"template": "{question} {word} {prompt} is {reference}"})
    data = load_recipe(path).model_dump(mode="json", exclude_none=True) | {"prompts": task["prompts"]}
    del data["prompts"]["path"]
    path.write_text(tomli_w.dumps(data))
    loaded = load_recipe(path)
    side, table = Side(refs_of(loaded)["teacher"]), split_prompts(loaded.prompts, 0)["train"]
    for prompt, row in zip(prompts_of(table), table.to_pylist(), strict=True):
        word = row["messages"][0]["content"]
        wanted = f"Spell this word backward (example: sun -> nus): {word} {word} {word} is {word[::-1]}"
        assert side.frame(prompt.messages, prompt.fields)[0]["content"] == wanted


def test_every_stage_gives_the_teacher_its_own_prompt(recipe, monkeypatch):
    """Scores, the teacher's completions and its evaluation, across tokenizers, as with prompts that hold the hints already."""
    loaded = load_recipe(recipe({"template": HINTED}))
    tables, refs = split_prompts(loaded.prompts, 0), refs_of(loaded)
    plain = make_reference(load_recipe(recipe({})).teacher, refs["teacher"].path)  # type: ignore[arg-type]
    train, held_out = (by_hand(tables[split], hint) for split in ("train", "eval"))

    sample = Sample(loaded, tables["train"].slice(0, 8), refs["student"], refs["teacher"])
    written = Sample(loaded, train.slice(0, 8), refs["student"], plain)
    rollouts = roll_out_sample(sample)
    assert score_sample(sample, rollouts, refs["teacher"]).equals(score_sample(written, rollouts, plain))
    assert not score_sample(sample, rollouts, refs["teacher"]).equals(score_sample(sample, rollouts, plain))

    engine, given = get_engine(refs["teacher"]), []
    generate = engine.generate
    monkeypatch.setattr(engine, "generate", lambda prompts, *more: given.append(prompts) or generate(prompts, *more))
    rows = [Row(i, 0, "teacher", seed=i, rollout_id=str(i)) for i in range(8)]
    assert len(make_completions(rows, tables["train"], loaded.rollout, refs["teacher"])) == 8
    assert given == [[Side(plain).render(*prompt) for prompt in prompts_of(train.slice(0, 8))]]

    ours, theirs = (
        [record["prompt_token_ids"] for record in evaluate_prompts(loaded, 0, "teacher", ref, table.to_pylist())]
        for table, ref in ((tables["eval"], refs["teacher"]), (held_out, plain))
    )
    assert ours == theirs
    release()


def test_keys_follow_what_a_side_reads(server, recipe, tmp_path):
    """Another template of the teacher's: its scores are made again, and the student's samples are not."""
    distill(str(recipe({"template": HINTED}, "first")))
    distill(str(recipe({"template": "{prompt} {hint}"}, "second")))
    distill(str(recipe({}, "third")))
    for name in ("second", "third"):
        manifests = {
            slot: json.loads((tmp_path / "runs" / name / "_manifests" / f"{slot}.json").read_text())
            for slot in ("round=0001/rollouts/part-00000", "round=0001/scores/part-00000", "round=0000/evals/student")
        }
        assert manifests["round=0001/rollouts/part-00000"]["taken_from"] == "first"
        assert "taken_from" not in manifests["round=0001/scores/part-00000"]


def test_preflight_shows_it_and_says_what_lead_compares(recipe, caplog):
    loaded = load_recipe(recipe({"template": HINTED}))
    refs = refs_of(loaded)
    gates = {gate.name: gate for gate in examine(loaded, 8, student=refs["student"], teachers={"": refs["teacher"]})}
    shown = [record.getMessage() for record in caplog.records if "what the " in record.getMessage()]
    assert "Hint: say" not in shown[0]
    assert "Hint: say" in shown[1]
    about = describe_teacher(loaded.student, loaded.teacher)
    assert about == "the teacher alone reads the row's hint, level, reference"
    if gates["lead"].value is not None:
        assert gates["lead"].detail.endswith(about)


# -- what cannot be used -----------------------------------------------------------------------------------------------


HERE = "fields here: hint, level, prompt, question, reference"
REFUSED = [
    ({"template": "{prompt} {clue}"}, ["teacher.template: '{prompt} {clue}'", "rows.jsonl: row ", "no 'clue'", HERE]),
    ({"template": "{prompt} {gold}"}, ["row 7: None is no text", "gold"]),
    ({"template": "{prompt} {"}, ["teacher.template: '{prompt} {' is no template", "Single '{'", "{{ or }}"]),
    ({"template": "Answer."}, ["teacher.template: 'Answer.' names nothing", "{prompt}"]),
    ({"template": "{} {0}"}, ["teacher.template", "names {}, {0}", "{prompt}"]),
    ({"template": ""}, ["teacher.template: '' names nothing"]),
    ({"template": 3}, ["teacher.template", "valid string", "found 3"]),
]


@pytest.mark.parametrize(("teacher", "parts"), REFUSED, ids=lambda value: str(value)[:40])
def test_templates_that_cannot_be_filled(potstill, recipe, tmp_path, teacher, parts):
    """One row of forty lacks a value; nothing is written."""
    rows = [row | {"gold": "x"} if row["level"] != 6 else row | {"gold": None} for row in ROWS]
    given = rows if "{gold}" in str(teacher) else ROWS
    refused(potstill("run", recipe(teacher, rows=given)), *parts)
    assert not (tmp_path / "runs").exists()


def test_rows_that_a_template_cannot_be_filled_with_may_be_left_out(recipe, tmp_path):
    rows = [row | {"gold": None if row["level"] in (6, 9) else "x"} for row in ROWS]
    loaded = load_recipe(recipe({"template": "{prompt} {gold}"}, rows=rows), ("prompts.unusable=leave_out",))
    check_data(loaded)
    made = make_prompts.fn(loaded, refs_of(loaded))
    assert sum(read_table(split).num_rows for split in (made.train, made.eval)) == len(ROWS) - 2


def test_a_conversation_without_a_message_of_the_users(potstill, recipe, tmp_path):
    rows = [{"messages": [{"role": "tool", "content": f"result {i}"}]} for i in range(40)]
    refused(potstill("run", recipe({"template": "{prompt}!"}, rows=rows)), "row ", "the user's last message, and there is none")
    assert not (tmp_path / "runs").exists()


def test_the_student_is_not_shown_the_answer(potstill, recipe, tmp_path):
    path = recipe({}, student={"template": "{prompt} {reference}"})
    refused(potstill("run", path), "student.template names {reference}", "teacher.template")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("student", "teacher", "right"), [("A", "A", True), ("A", "", True), ("", "A", True), ("A", "B", False)]
)
def test_an_answer_begins_in_one_way(recipe, potstill, tmp_path, student, teacher, right):
    path = recipe({"prefix": teacher}, student={"prefix": student})
    if right:
        assert load_recipe(path).student.prefix == student
        return
    refused(potstill("run", path), "student.prefix is 'A', teacher.prefix 'B'", "begins in one way")
    assert not (tmp_path / "runs").exists()

"""`inspect --rollout` and the report show the very text that each side read, and each model's own log-probs."""

import json
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import tomli_w
from helpers import made
from transformers import AutoTokenizer

from configs.load import load_recipe
from flows.distill import distill
from storage.read import scan
from storage.store import Run
from tasks.models.reference import ModelRef, make_reference
from tasks.models.text import Side
from tasks.preflight import examine
from tasks.views.compare import compare_runs
from tasks.views.readers import Readers
from tasks.views.report import write_report
from tasks.views.rollout import show_rollout
from tasks.views.rounds import summarise_rounds

SECRET = "Be <b>brief</b>; the answer is in French."
FIRST = "0001-000000-000"
SHOWN = "The prompt, as each side read it"


@pytest.fixture(scope="module")
def folder(server, tmp_path_factory) -> Path:
    """A run at temperature 0.5 whose teacher reads a system message that the student never sees."""
    folder = tmp_path_factory.mktemp("readers")
    texts = "say hello hello world in French brief " * 5
    models = {"student": made(folder / "s", 300, texts), "teacher": made(folder / "t", 310, texts + "again again")}
    rows = [{"prompt": f"say \x1b[2J <i>hello</i> {number}"} for number in range(12)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "name": "readers",
        "root": str(folder / "runs"),
        "student": {"model": str(models["student"])},
        "teacher": {"model": str(models["teacher"]), "system": SECRET},
        "prompts": {"source": "file", "path": "prompts.jsonl", "train": 8, "eval": 4},
        "rollout": {"prompts": 4, "max_new_tokens": 6, "temperature": 0.5},
        "score": {"k": 8},
        "objective": {"name": "bytes"},
        "evaluate": {"samples": 1},
        "gates": {"lead": -1.0, "truncated": 1.0, "repetition": 1.0, "supervised": 0.0, "dropped": 1.0},
    }
    (folder / "readers.toml").write_text(tomli_w.dumps(recipe))
    distill(str(folder / "readers.toml"))
    return folder


def rollout_of(folder: Path) -> tuple[dict[str, Any], str]:
    """A rollout, and the content of its prompt's message."""
    run = str(folder / "runs" / "readers")
    (row,) = scan(run, "rollouts").filter(rollout_id=FIRST).collect().to_dicts()
    (prompt,) = scan(run, "prompts").filter(prompt_id=row["prompt_id"]).collect().to_dicts()
    return row, prompt["messages"][0]["content"]


def by_hand(folder: Path, role: str, *messages: tuple[str, str]) -> str:
    """The template applied without any code of ours."""
    tokenizer = AutoTokenizer.from_pretrained(folder / role[0])
    given = [{"role": speaker, "content": content} for speaker, content in messages]
    return str(tokenizer.apply_chat_template(given, add_generation_prompt=True, tokenize=False))


def test_both_texts_are_shown(potstill, folder):
    _, asked = rollout_of(folder)
    ended = potstill("inspect", folder / "runs" / "readers", "--rollout", FIRST)
    assert (ended.status, ended.err) == (0, "")
    assert "\x1b" not in ended.out
    rows = show_rollout(str(folder / "runs" / "readers"), FIRST)[SHOWN]
    wanted = [
        {"side": "student", "text": by_hand(folder, "student", ("user", asked))},
        {"side": "teacher", "text": by_hand(folder, "teacher", ("system", SECRET), ("user", asked))},
    ]
    assert rows == [{**row, "text": row["text"].replace("\x1b", "\\x1b")} for row in wanted]
    assert wanted[1]["text"].startswith("<s><system>Be <b>brief")
    plain = "".join(ended.out.replace("│", "").split())  # cells are folded
    assert all("".join(row["text"].split()) in plain for row in rows)


def test_the_report_shows_them(folder):
    page = (folder / "runs" / "readers" / "report.html").read_text()
    assert "\x1b" not in page
    assert "<b>brief" not in page
    _, asked = rollout_of(folder)
    for text in (
        by_hand(folder, "student", ("user", asked)),
        by_hand(folder, "teacher", ("system", SECRET), ("user", asked)),
    ):
        assert text.replace("\x1b", "\\x1b") in unescape(page)


def test_texts_that_are_the_same_are_shown_once(tiny):
    (row,) = show_rollout(str(tiny), FIRST)[SHOWN]
    assert row["side"] == "both"
    assert row["text"].startswith("<s><user>")
    assert row["text"].endswith("<end><assistant>")


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_that_is_gone(potstill, folder, tmp_path, role):
    """One line says so; everything else is shown. The student's tokenizer is in the run itself, unless that is gone, too."""
    shutil.copytree(folder / "runs" / "readers", run := tmp_path / "runs" / "readers")
    toml = (run / "run.toml").read_text()
    (run / "run.toml").write_text(toml.replace(str(folder / role[0]), str(tmp_path / "gone")))
    if role == "student":
        assert [row["side"] for row in show_rollout(str(run), FIRST)[SHOWN]] == ["student", "teacher"]
        (run / "_manifests/round=0001/student.json").unlink()
    other = "student" if role == "teacher" else "teacher"
    rows = {row["side"]: row["text"] for row in show_rollout(str(run), FIRST)[SHOWN]}
    assert rows.keys() == {"student", "teacher"}
    assert rows[role].startswith(f"cannot be shown: {tmp_path / 'gone'}: no such model")
    assert rows[other].startswith("<s>")
    ended = potstill("inspect", run, "--rollout", FIRST)
    assert (ended.status, ended.err) == (0, "")
    write_report(Run(str(run.parent), "readers"))
    page = unescape((run / "report.html").read_text())
    assert f"What the {role} read cannot be shown: {tmp_path / 'gone'}: no such model" in page
    assert "Samples of round 1" in page


def test_no_code_of_a_strangers_model_is_run(folder, tmp_path, monkeypatch):
    """A run is looked at: what its recipe trusts, whoever looks need not."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    shutil.copytree(folder / "t", evil := tmp_path / "evil")
    config = json.loads((evil / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (evil / "tokenizer_config.json").write_text(json.dumps(config))
    trap = f"from pathlib import Path\nPath({str(tmp_path / 'sprung')!r}).touch()\n"
    (evil / "own.py").write_text(
        f"{trap}from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast): pass\n"
    )
    shutil.copytree(folder / "runs" / "readers", run := tmp_path / "runs" / "readers")
    toml = (run / "run.toml").read_text().replace(str(folder / "t"), str(evil))
    student, teacher = toml.split("[teacher]")
    (run / "run.toml").write_text(
        f"{student}[teacher]{teacher.replace('trust_remote_code = false', 'trust_remote_code = true')}"
    )
    assert Run(str(run.parent), "readers").frozen_recipe().teacher.trust_remote_code

    show_rollout(str(run), FIRST)
    write_report(Run(str(run.parent), "readers"))
    assert not (tmp_path / "sprung").exists()
    AutoTokenizer.from_pretrained(evil, trust_remote_code=True)
    assert (tmp_path / "sprung").exists()  # the premise


def test_a_template_that_refuses_by_now(folder, tmp_path):
    run = shutil.copytree(folder / "runs" / "readers", tmp_path / "runs" / "readers")
    teacher = shutil.copytree(folder / "t", tmp_path / "teacher")
    (teacher / "chat_template.jinja").write_text("{{ raise_exception('not today') }}")
    toml = (run / "run.toml").read_text()
    (run / "run.toml").write_text(toml.replace(str(folder / "t"), str(teacher)))
    rows = {row["side"]: row["text"] for row in show_rollout(str(run), FIRST)[SHOWN]}
    assert rows["student"].startswith("<s>")
    assert "its chat template says 'not today'" in rows["teacher"]


def test_nothing_is_loaded_before_it_is_asked_for(folder, tmp_path):
    shutil.copytree(folder / "runs" / "readers", run := tmp_path / "runs" / "readers")
    toml = (run / "run.toml").read_text()
    (run / "run.toml").write_text(toml.replace(str(folder), str(tmp_path / "gone")))
    assert Readers(Run(str(run.parent), "readers")).missing == {}


def test_log_probs_are_the_students_own(folder):
    """At temperature 0.5 those of the law that was drawn from are others: `log P_student` is the model's (MATHS.md §7)."""
    row, _ = rollout_of(folder)
    assert row["model_logprobs"] is not None
    assert row["model_logprobs"] != pytest.approx(row["logprobs"], abs=1e-3)
    lines = show_rollout(str(folder / "runs" / "readers"), FIRST)["Tokens (log-probs in nats)"]
    shown = [line["log P_student"] for line in lines if line["log P_student"] is not None]
    assert shown == pytest.approx(row["model_logprobs"], abs=1e-3)
    (aligned,) = scan(str(folder / "runs" / "readers"), "aligned").filter(rollout_id=FIRST).collect().to_dicts()
    if aligned["student_ends"]:
        assert sum(shown[: aligned["student_ends"][0]]) == pytest.approx(aligned["student_logprobs"][0], abs=1e-2)


def test_the_students_text_is_of_the_ids_it_read(folder):
    """Not rendered again: a template that changed since does not change what is shown."""
    row, _ = rollout_of(folder)
    side = Side(ModelRef(str(folder / "s"), ""))
    shown = show_rollout(str(folder / "runs" / "readers"), FIRST)[SHOWN][0]["text"]
    assert shown == side.spell(row["prompt_token_ids"])
    assert (
        pl.Series(side.tokenizer(shown.replace("\\x1b", "\x1b"), add_special_tokens=False)["input_ids"]).to_list()
        == (row["prompt_token_ids"])
    )


def test_no_accuracy_without_anything_to_grade_by(folder):
    """An empty answer would be the "reference" of a prompt that has none; the report says nothing rather than 0.000."""
    run = str(folder / "runs" / "readers")
    evals = scan(run, "evals").collect()
    assert len(evals)
    assert evals["score"].null_count() == evals["correct"].null_count() == len(evals)
    rounds = summarise_rounds(run)
    assert rounds["sampled"].null_count() == rounds["recovered"].null_count() == len(rounds)
    assert rounds.filter(model="student")["divergence"].null_count() == 0 or rounds["tokens"].null_count() == 0
    page = (folder / "runs" / "readers" / "report.html").read_text()
    assert "Accuracy on held-out prompts" not in page
    assert 'class="text wrong"' not in page
    (row,) = compare_runs({"bytes": [run]}, 1)
    assert (row["accuracy"], row["difference"]) == ("", "")


def test_the_disk_that_preflight_counts_is_what_a_run_takes(folder):
    """Rollouts, scores and what is aligned of them, by row."""
    recipe = load_recipe(folder / "readers.toml")
    assert recipe.teacher is not None
    student, teacher = (make_reference(config, str(config.model)) for config in (recipe.student, recipe.teacher))
    (gate,) = [gate for gate in examine(recipe, 4, student=student, teachers={"": teacher}) if gate.name == "disk"]
    slots = [f"round=0001/{table}/part-00000" for table in ("rollouts", "scores", "aligned")]
    tables = [manifest for slot in slots if (manifest := Run(recipe.root, "readers").manifest(slot))]
    assert len(tables) == 3
    taken = sum(table["bytes"] for table in tables) / 4
    assert float(gate.detail.split(" ")[0].replace(",", "")) == pytest.approx(taken, rel=0.1)

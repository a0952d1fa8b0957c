"""A student that is its own teacher: whose weights score, what it reads, and what follows for keys, gates and views."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import tomli_w
from helpers import files, made, refused

from configs.load import load_recipe
from configs.models import describe_teacher
from flows.distill import distill
from storage.store import Run
from tasks.engines.choose import release
from tasks.models.reference import make_reference
from tasks.preflight import examine
from tasks.views.report import render_report
from tasks.views.rollout import show_rollout
from tasks.views.rounds import summarise_rounds
from tasks.views.trace import trace_lineage

SCRATCH = {"vocab_size": 280, "layers": 1, "width": 16, "heads": 2, "feed_forward": 16, "context": 64}
MAKER: dict[str, Any] = {
    "name": "maker",
    "student": {"scratch": SCRATCH},
    "prompts": {"source": "file", "path": "rows.jsonl", "eval": 8},
    "rollout": {"on_policy": 0.0, "prompts": 8, "max_new_tokens": 6},
    "objective": {"name": "sft"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp("models") / "model", 290, "hello hello world " * 5)


@pytest.fixture
def recipe(model, tmp_path) -> Callable[..., Path]:
    def write(teacher: dict[str, Any], student: dict[str, Any] | None = None, **more: Any) -> Path:
        rows = [{"prompt": f"hello {i}?", "reference": f"world {i}"} for i in range(40)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "maker.toml").write_text(tomli_w.dumps(MAKER))
        data = {
            "name": "own",
            "root": str(tmp_path / "runs"),
            "rounds": 2,
            "student": student or {"model": str(model)},
            "teacher": {"model": "student", **teacher},
            "prompts": {"source": "file", "path": "rows.jsonl", "eval": 8},
            "rollout": {"prompts": 8, "max_new_tokens": 6},
            "score": {"k": 16},
            "objective": {"name": "gkd"},
            "train": {"learning_rate": 1e-2, "batch_size": 8},
            "evaluate": {"samples": 1},
            "gates": {"truncated": 1.0, "repetition": 1.0, "supervised": 0.0, "dropped": 1.0},
        }
        path = tmp_path / "own.toml"
        path.write_text(tomli_w.dumps(data | more))
        return path

    return write


def digests_of(run: Path) -> list[str]:
    """Digests of the student before round 1 and after each round, from the manifests of its evaluations."""
    manifests = [run / f"_manifests/round=000{n}/evals/student.json" for n in range(3)]
    return [json.loads(path.read_text())["inputs"]["model"]["digest"] for path in manifests]


def teachers_of(run: Path) -> list[str]:
    """Digests of the teacher that scored each round."""
    return [pl.read_parquet(run / f"round=000{n}/scores/*.parquet")["teacher"].unique().item() for n in (1, 2)]


@pytest.mark.parametrize(
    ("weights", "student"),
    [("start", None), ("round", None), ("round", {"recipe": "maker.toml"}), ("start", {"scratch": SCRATCH})],
    ids=["model, start", "model, round", "recipe, round", "scratch, start"],
)
def test_whose_weights_score_a_round(server, recipe, tmp_path, weights, student):
    """The start's in every round, or those that sampled the round, also where a run goes on; a second call makes nothing."""
    context = {"template": "{prompt} {reference}"}
    path = recipe(context | ({"weights": "round"} if weights == "round" else {}), student)
    distill(str(path), rounds=1)
    distill(str(path))  # which goes on from what is settled
    run = tmp_path / "runs/own"
    students = digests_of(run)
    assert len(set(students)) == 3
    assert teachers_of(run) == ([students[0]] * 2 if weights == "start" else students[:2])
    for number in range(3):  # an evaluation names the teacher as it stands then
        manifest = json.loads((run / f"_manifests/round=000{number}/evals/student.json").read_text())
        assert manifest["inputs"]["teacher"]["digest"] == students[0 if weights == "start" else number]
        assert manifest["inputs"]["teacher"]["template"] == context["template"]
        assert "template" not in manifest["inputs"]["model"]
    read = {row["side"]: row["text"] for row in show_rollout(str(run), "0001-000000-000")["The prompt, as each side read it"]}
    assert "world" in read["teacher"]
    assert "world" not in read["student"]
    rows = next(iter(trace_lineage(str(run)).values()))
    scorer = rows[next(i for i, row in enumerate(rows) if "/scores/" in row["artifact"]) + 1]
    assert scorer["made from"].strip() == "teacher"
    if weights == "round":
        assert scorer["artifact"].startswith("round=0001/student")
    scored = 1 if weights == "round" else 0
    assert summarise_rounds(str(run))["title"][0] == "teacher: student at round 0"
    shown = show_rollout(str(run), "0002-000000-000")
    assert shown["Rollout"][0]["scored by"] == f"teacher: student at round {scored}"
    read = {row["side"]: row["text"] for row in shown["The prompt, as each side read it"]}
    asked, answer = read["student"].split("?")[0], shown["Rollout"][0]["reference"]
    assert read["teacher"] == f"{asked}? {answer}<end><assistant>"
    page = render_report(Run(str(run.parent), run.name))
    assert "teaches itself (as it " in page
    assert ("at the start of each round)" if scored else "was before round 1)") in page
    before = files(run)
    distill(str(path))
    assert files(run) == before


def test_without_a_context_of_its_own_it_teaches_nothing(server, recipe, tmp_path):
    """Log-probs of both sides are the same to rounding, so no step has a loss, and its lead of 0 is no breach."""
    distill(str(recipe({"weights": "round"}, objective={"name": "opd"}, train={"learning_rate": 1e-2, "batch_size": 8})))
    run = tmp_path / "runs/own"
    aligned = pl.read_parquet(run / "round=*/aligned/*.parquet").drop_nulls("teacher_logprobs")
    apart = aligned["student_logprobs"].explode() - aligned["teacher_logprobs"].explode()
    assert apart.abs().max() < 1e-5
    assert pl.read_parquet(run / "round=*/steps/*.parquet")["loss"].abs().max() < 1e-5


def test_the_head_of_a_teacher_that_moves_is_kept_round_by_round(server, recipe, tmp_path):
    path = recipe({"weights": "round"}, score={"signal": "hidden", "k": 16})
    distill(str(path))
    run = tmp_path / "runs/own"
    assert [(run / f"round=000{n}/teacher").is_dir() for n in (1, 2)] == [True] * 2
    assert not (run / "teacher").exists()
    before = files(run)
    distill(str(path))
    assert files(run) == before


def test_it_is_the_student_in_all_that_the_recipe_does_not_say(recipe):
    student = {"model": "somewhere", "system": "Brief.", "prefix": "A", "attention": "eager", "engine": "vllm", "lora": {}}
    loaded = load_recipe(recipe({"prefix": ""}, student | {"vllm_python": "python", "chat_template_kwargs": {"think": True}}))
    teacher = loaded.teacher
    assert teacher is not None
    assert (teacher.system, teacher.prefix, teacher.attention, teacher.weights) == ("Brief.", "", "eager", "start")
    assert (teacher.engine, teacher.vllm_python, teacher.lora, teacher.model) == ("vllm", "python", None, "student")
    loaded = load_recipe(recipe({"engine": "transformers", "rendering": "plain"}, student | {"chat_template": "a.jinja"}))
    assert loaded.teacher is not None
    assert (loaded.teacher.engine, loaded.teacher.chat_template) == ("transformers", None)
    assert describe_teacher(loaded.student, loaded.teacher) == "the teacher is the student itself"
    loaded = load_recipe(recipe({}, student))
    assert describe_teacher(loaded.student, loaded.teacher) == "the teacher is the student itself, in the same context"
    loaded = load_recipe(recipe({"template": "{prompt} {reference} {hint}"}, student))
    told = "the teacher is the student itself; the teacher alone reads the row's hint, reference"
    assert describe_teacher(loaded.student, loaded.teacher) == told


def test_preflight_of_a_student_that_teaches_itself(recipe):
    loaded = load_recipe(recipe({}))
    assert loaded.teacher is not None
    student, teacher = (make_reference(config, str(loaded.student.model)) for config in (loaded.student, loaded.teacher))
    gates = {gate.name: gate for gate in examine(loaded, 8, student=student, teachers={"": teacher})}
    release()
    assert student == teacher
    assert gates["loss"].value == pytest.approx(0, abs=1e-4)
    assert gates["noise"].ok is not False
    assert gates["lead"].ok is not False


REFUSED = [
    ({"lora": {}}, ["teacher.lora: a teacher is not trained"]),
    ({"scratch": SCRATCH}, ["teacher: give exactly one of model, recipe, scratch, cache; found model, scratch"]),
    ({"recipe": "maker.toml"}, ["teacher: give exactly one of model, recipe, scratch, cache; found model, recipe"]),
    ({"engine": "server", "urls": ["http://a:1"]}, ["teacher.engine = 'server'", "'transformers' or 'vllm'"]),
    ({"weights": "end"}, ["teacher.weights", "'start' or 'round'", "found 'end'"]),
    ({"model": "./student", "weights": "round"}, ["teacher.weights is for teacher.model = 'student'", "'./student'"]),
    ({"model": "./student"}, ["./student: "]),  # a folder of that name, which is not here
]


@pytest.mark.parametrize(("teacher", "parts"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_meant(potstill, recipe, tmp_path, teacher, parts):
    refused(potstill("run", recipe(teacher)), *parts)
    assert not (tmp_path / "runs").exists()


def test_a_student_has_no_weights_to_choose(potstill, recipe, model, tmp_path):
    refused(potstill("run", recipe({}, {"model": str(model), "weights": "start"})), "student.weights", "teacher.weights")
    assert not (tmp_path / "runs").exists()

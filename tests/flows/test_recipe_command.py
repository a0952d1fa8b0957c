"""`potstill recipe`: what it writes works as it is, and what it tells is what the models say."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from helpers import CHECKOUT, made, refused

from configs.describe import FILE
from configs.load import load_recipe
from configs.objectives import Gkd
from flows.recipe import recipe as command

WORDS = ["one two three", "four five six", "and so on, until 10"]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working directory with two models, one of them with a chat template, and forty prompts."""
    monkeypatch.chdir(tmp_path)
    made(tmp_path / "small", 270, *WORDS)
    made(tmp_path / "large", 290, *WORDS)
    (tmp_path / "base").mkdir()
    for file in (tmp_path / "small").iterdir():
        if file.name != "chat_template.jinja":
            shutil.copy(file, tmp_path / "base")
    rows = [{"question": f"What is {n} and one?", "answer": str(n + 1)} for n in range(40)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def written(place: Path, **changes: str) -> Path:
    (place / "recipes").mkdir(exist_ok=True)
    out = place / "recipes" / "my bot.toml"
    command(out=out, **{"student": "small", "teacher": "large", "prompts": "prompts.jsonl", **changes})
    return out


def test_it_passes_preflight(potstill, place):
    """As it was written: nothing is breached but what models that have learnt nothing breach."""
    (place / "recipes").mkdir()
    flags = ["--student", "small", "--teacher", "large", "--prompts", "prompts.jsonl", "--out", "recipes/bot.toml"]
    ended = potstill("recipe", *flags, folder=place)
    assert ended.status == 0, ended.err
    assert ended.out == "recipes/bot.toml is written. Next: potstill preflight recipes/bot.toml\n"
    checked = potstill("preflight", "recipes/bot.toml", folder=place)
    assert checked.status in (0, 1), checked.err
    for part in ("one answer each to 36 prompts", "the teacher scores them", "both models answer 4 held-out prompts"):
        assert part in checked.err, "a long wait is no silent one"
    breached = [line.split("│")[1].strip() for line in checked.out.splitlines() if "BREACHED" in line]
    assert set(breached) <= {"student: chance", "teacher: chance", "supervised", "truncated", "lead"}
    assert "student: room" in checked.out


def test_what_it_chooses(place):
    out = written(place)
    first, *_ = text = out.read_text().splitlines()
    assert (out.parent / first.removeprefix("#:schema ")).resolve() == CHECKOUT / "configs" / FILE
    loaded = load_recipe(out)
    assert loaded.name == "my-bot"
    assert loaded.prompts.path == "prompts.jsonl"  # of the working directory, beside the recipe's folder
    assert (loaded.prompts.eval, loaded.rollout.prompts) == (4, 36)
    assert loaded.train.batch_size == 8  # the default makes one step of so few
    assert (loaded.objective.name, loaded.score.signal) == ("bytes", "bytes")
    assert loaded.rollout.max_new_tokens < 64  # what the context leaves
    assert loaded.student.rendering == loaded.teacher.rendering == "chat"
    assert loaded.gates.truncated == 0.5
    assert all(
        line.startswith(("#", "[")) or not line or "  # " in line or text[n].startswith("#") for n, line in enumerate(text[1:])
    )
    assert max(map(len, text)) <= 128


def test_every_line_that_is_commented_out_is_a_default(place):
    """Without its mark it changes nothing."""
    out = written(place)
    before = load_recipe(out)
    lines = [
        line.removeprefix("# ") if " = " in line.partition("#")[2].partition("  #")[0] else line
        for line in out.read_text().splitlines()
    ]
    assert sum(a != b for a, b in zip(lines, out.read_text().splitlines())) > 8
    out.write_text("\n".join(lines))
    assert load_recipe(out) == before


def test_a_base_model_and_one_tokenizer(place):
    loaded = load_recipe(written(place, student="base", teacher="small"))
    assert loaded.student.rendering == "plain"
    assert loaded.gates.truncated == 1.0  # it goes on until it is stopped
    assert loaded.teacher.rendering == "chat"
    assert isinstance(loaded.objective, Gkd)
    assert loaded.score.signal == "topk"


@pytest.mark.parametrize(
    ("answer", "best"), [("7", "sampled"), ("Open the settings, and there the account.", "divergence"), (None, "divergence")]
)
def test_what_the_best_round_is_by(place, answer, best):
    """Accuracy where an answer may equal its reference, else the divergence."""
    rows = [{"prompt": f"What is {n}?", "reference": answer} for n in range(40)]
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_recipe(written(place)).evaluate.best == best


def test_what_lies_elsewhere_is_named_and_left(place, potstill):
    flags = ["--student", "owner/small", "--teacher", "owner/large", "--prompts", "owner/rows", "--out", "bot.toml"]
    ended = potstill("recipe", *flags, folder=place)
    assert ended.status == 0, ended.err
    for part in ("student: not looked at: owner/small", "teacher: not looked at", "prompts: not looked at"):
        assert part in ended.err
    loaded = load_recipe(place / "bot.toml")
    assert (loaded.student.model, loaded.prompts.dataset) == ("owner/small", "owner/rows")


def test_a_task(place):
    loaded = load_recipe(written(place, prompts="spell_backward"))
    assert (loaded.prompts.source, loaded.prompts.task) == ("reasoning-gym", "spell_backward")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"prompts": "promts.jsonl"}, ["promts.jsonl: no such file"]),
        ({"prompts": "spell_backwards"}, ["no task 'spell_backwards'", "spell_backward"]),
        ({"student": "recipes"}, ["recipes: transformers cannot load this model"]),
        ({"student": "small.gguf"}, ["small.gguf"]),
        ({"out": "nowhere/bot.toml"}, ["--out nowhere/bot.toml: there is no folder nowhere"]),
        ({"out": "prompts.jsonl"}, ["--out prompts.jsonl: is there already"]),
        ({"teacher": None}, ["--teacher: missing; give it, or answer on a terminal"]),
        (
            {"explain": "train.epoch"},
            ["--explain train.epoch: no such field; did you mean train.epochs? known here: batch_size"],
        ),
        ({"explain": "microbatch"}, ["did you mean train.micro_batch_size?"]),
        ({"explain": "zebra"}, ["no such field; known here: name, root"]),
    ],
    ids=str,
)
def test_what_cannot_be(potstill, place, changes, parts):
    """One line, and nothing is written."""
    (place / "recipes").mkdir()
    given = {"student": "small", "teacher": "large", "prompts": "prompts.jsonl", "out": "recipes/bot.toml", **changes}
    before = sorted(place.rglob("*"))
    flags = [word for key, value in given.items() if value is not None for word in (f"--{key}", value)]
    refused(potstill("recipe", *flags, folder=place), *parts)
    assert sorted(place.rglob("*")) == before


def test_questions_on_a_terminal(place, monkeypatch, capsys):
    """What is not given is asked for, again where the answer is empty."""
    answers = io.StringIO("small\n\nprompts.jsonl\n")
    answers.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", answers)
    command(teacher="large", out=Path("bot.toml"))
    assert load_recipe("bot.toml").student.model == "small"
    asked = capsys.readouterr().out
    assert asked.count("Prompts (") == 2
    assert "Teacher (" not in asked


def test_explanations(capsys):
    command(explain="train.micro_batch_size")
    text = capsys.readouterr().out
    for part in ("train.micro_batch_size: integer, 1 or more", "rollouts per forward pass", "goes on with another value"):
        assert part in text
    command(explain="objective.beta")
    text = capsys.readouterr().out
    assert "objective.beta (gkd, gold, bytes, bpm): number, 0 to 1" in text
    assert "objective.beta (alm)" in text
    assert "another value needs another name" in text
    command(explain="score")
    text = capsys.readouterr().out
    assert "score: What is stored of the teacher at every token" in text
    for part in ("signal", "'topk' or 'bytes' or 'hidden'", '"topk"', "tokens scored at once"):
        assert part in text


def test_the_schema_is_printed(potstill):
    assert json.loads(potstill("recipe", "--schema").out) == json.loads((CHECKOUT / "configs" / FILE).read_text())

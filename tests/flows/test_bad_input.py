"""Bad input: exit status 2, one message that names what was wrong and what would be right, and nothing written."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from helpers import POTSTILL, TINY, Ended, files, made, refused
from transformers import AutoTokenizer

from configs.errors import BadInput
from configs.load import load_recipe
from flows.refuse import check_recipe


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp("student") / "model", 300, "olleh dlrow " * 5)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp("teacher") / "model", 290, "hello hello world " * 5)


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def recipe(student, teacher, root, tmp_path) -> Callable[..., Path]:
    """A recipe that is right, with whole tables of it replaced (None: left out)."""

    def write(**tables: Any) -> Path:
        data = {
            "name": "bad",
            "root": str(root),
            "student": {"model": str(student)},
            "teacher": {"model": str(teacher)},
            "prompts": {"source": "reasoning-gym", "task": "spell_backward", "train": 8, "eval": 4},
            "rollout": {"prompts": 4, "max_new_tokens": 4},
            "score": {"k": 8},
            "objective": {"name": "bytes"},
            **tables,
        }
        path = tmp_path / "bad.toml"
        path.write_text(tomli_w.dumps({key: value for key, value in data.items() if value is not None}))
        return path

    return write


def shell(*arguments: Any) -> Ended:
    """The command itself, as a shell runs it."""
    done = subprocess.run([POTSTILL, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)
    return Ended(done.returncode, done.stdout, done.stderr)


# -- before anything is imported: as quick as a command should be ------------------------------------------------------


def test_quick_refusals(tmp_path):
    """Through the real command; a person who mistyped does not wait for torch or a server."""
    broken = tmp_path / "broken.toml"
    broken.write_text("name = = 1\n")
    cases = [
        (("run", tmp_path / "missing.toml"), (str(tmp_path / "missing.toml"), "no such recipe", "TOML")),
        (("run", broken), (str(broken), "not valid TOML", "line 1")),
        (("run", TINY, "--set", "score.k=none"), ("score.k", "integer", "'none'")),
        (
            ("run", TINY, "--set", "objective.name=ppo"),
            ("objective.name", "'gkd', 'uld', 'gold', 'bytes', 'strict', 'alm', 'bpm', 'opd', 'sft'"),
        ),
        (("run", TINY, "--rounds", "-1"), ("--rounds -1", "0 or more")),
        (("run", TINY, "--rounds", "two"), ("--rounds", "two", "int")),
        (("run",), ("config",)),
        (("inspect",), ("run",)),
        (("destil", TINY), ("destil",)),
        (("run", TINY, "--sets", "a=b"), ("--sets",)),
    ]
    for arguments, parts in cases:
        started = time.monotonic()
        refused(shell(*arguments), *parts)
        assert time.monotonic() - started < 5, arguments
    assert files(tmp_path).keys() == {"broken.toml"}


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_missing_model(potstill, recipe, root, tmp_path, role):
    missing = tmp_path / "no" / "such" / "model"
    refused(potstill("run", recipe(**{role: {"model": str(missing)}})), str(missing), "no such model", "config.json")
    assert not root.exists()


def test_a_hub_id_that_cannot_be_reached(potstill, recipe, root):
    refused(potstill("run", recipe(teacher={"model": "someone/some-model"})), "someone/some-model", "hub id")
    assert not root.exists()


def test_a_folder_that_is_no_model(potstill, recipe, root, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    refused(potstill("run", recipe(student={"model": str(folder)})), str(folder), "tokenizer.json")
    assert not root.exists()


def test_a_folder_without_weights(potstill, recipe, root, student, tmp_path):
    """A tokenizer alone is found out before anything is written."""
    folder = tmp_path / "no-weights"
    shutil.copytree(student, folder)
    (folder / "model.safetensors").unlink()
    refused(potstill("run", recipe(student={"model": str(folder)})), str(folder), "safetensors")
    assert not root.exists()


def test_a_model_without_a_chat_template(potstill, recipe, root, student, tmp_path):
    folder = tmp_path / "no-template"
    shutil.copytree(student, folder)
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    refused(potstill("run", recipe(teacher={"model": str(folder)})), str(folder), "no chat template", "rendering = 'plain'")
    assert not root.exists()
    check_recipe(load_recipe(recipe(teacher={"model": str(folder), "rendering": "plain"})))  # the advice is right


def test_gkd_with_two_tokenizers(potstill, recipe, root, student, teacher):
    ended = potstill("run", recipe(objective={"name": "gkd"}))
    refused(ended, "objective.name = 'gkd'", str(student), str(teacher), "'bytes' or 'gold'")
    assert not root.exists()


def test_more_ids_than_the_vocabulary_has(potstill, recipe, root, teacher):
    size = len(AutoTokenizer.from_pretrained(teacher))
    ended = potstill("run", recipe(score={"k": size + 1}))
    refused(ended, f"score.k = {size + 1}", f"{size} ids", str(teacher), "at most")
    assert not root.exists()
    check_recipe(load_recipe(recipe(score={"k": size})))


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_an_unknown_task(potstill, recipe, root):
    ended = potstill("run", recipe(prompts={"source": "reasoning-gym", "task": "spell_backwards"}))
    refused(ended, "prompts.task", "'spell_backwards'", "near it:", "spell_backward")
    assert not root.exists()


def test_an_unknown_option_of_a_task(potstill, recipe, root):
    task = {"source": "reasoning-gym", "task": "spell_backward", "options": {"words": 3}}
    refused(potstill("run", recipe(prompts=task)), "prompts.options", "words")
    assert not root.exists()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ("no such file", ".jsonl, .json, .csv or .parquet")),
        ("", ("no prompts in it", "`messages` or `prompt`")),
        ("{", ("cannot be read as jsonl",)),
        ('{"text": "x"}\n', ("row 1", "chat messages: messages", "['text']")),
        ('{"prompt": "x"}\n{"prompt": "y"}\n{"text": "z"}\n', ("row 3", "['text']")),
        ('{"prompt": "the only one"}\n', ("only 1 distinct prompts", "give more")),
        ('["x"]\n', ("row 1",)),
    ],
    ids=["missing", "empty", "not JSON", "no prompt", "no prompt in row 3", "one prompt", "no object"],
)
def test_prompt_files(potstill, recipe, root, tmp_path, content, parts):
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_text(content)
    refused(potstill("run", recipe(prompts={"source": "file", "path": "prompts.jsonl"})), str(path), *parts)
    assert not root.exists()


def test_prompts_without_references_for_a_new_student(potstill, recipe, root, tmp_path):
    """A new tokenizer is trained on references: without any there is no student, which is known beforehand."""
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "q{i}"}}\n' for i in range(50)))
    scratch = {"scratch": {"vocab_size": 300, "tokenizer_text": "references"}}
    config = recipe(student=scratch, prompts={"source": "file", "path": "prompts.jsonl", "train": 8, "eval": 8})
    refused(potstill("run", config), "student.scratch", "reference")
    assert not root.exists()


# -- the run's folder --------------------------------------------------------------------------------------------------


def test_a_run_of_another_recipe(potstill, tiny):
    before = files(tiny.parent)
    ended = potstill("run", TINY, "--set", f"root={tiny.parent}", "--set", "train.batch_size=32")
    refused(ended, str(tiny), "train.batch_size is 16 in the run, 32 in this recipe", "--set name=")
    assert files(tiny.parent) == before


def test_a_folder_of_someone_else(potstill, recipe, root):
    (root / "bad").mkdir(parents=True)
    (root / "bad" / "thesis.tex").write_text("precious")
    refused(potstill("run", recipe()), str(root / "bad"), "not a run folder", "another name or root")
    assert files(root).keys() == {"bad/thesis.tex"}


def test_a_file_in_place_of_the_root(potstill, recipe, root):
    root.write_text("x")
    refused(potstill("run", recipe()), str(root), "cannot be written")
    assert root.read_text() == "x"


@pytest.mark.parametrize("root", ["/proc/runs", "/sys/runs"])
def test_a_root_where_no_folder_can_be_made(potstill, recipe, root):
    """Permissions say yes to a superuser there; only trying shows it."""
    refused(potstill("run", recipe()), root, "cannot be written", "set root")
    assert not Path(root).exists()


@pytest.mark.parametrize("what", ["access", "statvfs"])
def test_a_read_only_root(recipe, root, monkeypatch, what):
    """In this process, where the answer of the system can be replaced: no test may need a read-only disk."""
    config = load_recipe(recipe())
    if what == "access":
        monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    else:
        real = os.statvfs(tempfile.gettempdir())
        flags = os.statvfs_result([*real[:8], real.f_flag | os.ST_RDONLY, *real[9:]])
        monkeypatch.setattr(os, "statvfs", lambda path: flags)
    with pytest.raises(BadInput, match="cannot be written") as caught:
        check_recipe(config)
    assert str(root) in str(caught.value)
    assert not root.exists()


def test_an_unknown_filesystem(potstill, recipe):
    refused(potstill("run", recipe(root="nosuch://bucket/runs")), "root", "nosuch")


# -- a recipe that makes a model ---------------------------------------------------------------------------------------


def test_a_recipe_that_makes_a_model_is_checked_too(potstill, recipe, root, tmp_path):
    maker = tmp_path / "maker.toml"
    refused(potstill("run", recipe(teacher={"recipe": "maker.toml"})), str(maker), "no such recipe")
    text = (TINY.parent / "teacher.toml").read_text()
    maker.write_text(text.replace("spell_backward", "spell_backwards"))
    refused(potstill("run", recipe(teacher={"recipe": "maker.toml"})), "prompts.task", "'spell_backwards'")
    assert not root.exists()


def test_a_recipe_that_asks_for_itself(potstill, recipe, root):
    """A circle is named, not followed until the stack ends."""
    path = recipe(teacher={"recipe": "bad.toml"})
    refused(potstill("run", path), str(path))
    assert not root.exists()


# -- inspect -----------------------------------------------------------------------------------------------------------


def test_inspect_what_is_no_run(potstill, tmp_path):
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "missing", tmp_path / "folder", TINY):
        refused(potstill("inspect", place), str(place), "not a run", "runs/quickstart")


def test_inspect_an_unknown_rollout(potstill, tiny):
    refused(potstill("inspect", tiny, "--rollout", "0009-000000-000"), "no rollout '0009-000000-000'", "0001-000000-000")


@pytest.mark.parametrize("number", [0, 3, -1])
def test_inspect_an_unknown_round(potstill, tiny, number):
    refused(potstill("inspect", tiny, "--round", number), f"no round {number}", "counted from 1")


def test_inspect_a_run_that_has_only_begun(potstill, tiny, tmp_path):
    """Killed right after `run.toml`: nothing to show yet is not an error of the program."""
    run = tmp_path / "begun"
    run.mkdir()
    shutil.copy(tiny / "run.toml", run)
    refused(potstill("inspect", run, "--rollout", "0001-000000-000"), str(run), "no rollout")
    refused(potstill("inspect", run, "--round", "1"), str(run), "no round 1")
    ended = potstill("inspect", run)
    assert "Traceback" not in ended.err
    assert ended.status in (0, 2)


def test_inspect_a_round_killed_before_its_alignment(potstill, tiny, tmp_path):
    """Rollouts are there, their units are not."""
    run = tmp_path / "killed"
    shutil.copytree(tiny, run, ignore=shutil.ignore_patterns("aligned", "scores", "round=0002", "student", "trainer"))
    rollout = potstill("inspect", run, "--rollout", "0001-000000-000")
    assert "Traceback" not in rollout.err
    assert rollout.status == 0 or "not aligned" in rollout.err
    refused(potstill("inspect", run, "--round", "1"), "no round 1 with aligned rollouts")
    assert potstill("inspect", run).status == 0


def test_a_runner_without_its_packages(recipe, root, monkeypatch):
    monkeypatch.setattr("flows.compute.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"compute\.runner = 'ray' needs more packages: pip install -e '\.\[ray\]'"):
        check_recipe(load_recipe(recipe(compute={"runner": "ray"})))
    assert not root.exists()

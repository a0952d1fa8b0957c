"""What a command imports, what it says first, and when it knows that nothing is to be made."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import CHECKOUT, TINY, files
from safetensors.torch import load_file, save_file

from configs.errors import BadInput
from configs.load import load_recipe
from flows import publish, start
from flows.distill import distill
from flows.start import count_settled, find_result
from storage import lineage
from storage.damage import SUSPECTS
from storage.store import Run

HEAVY = ("torch", "transformers", "prefect", "altair", "polars", "pyarrow", "numpy")
LIBRARIES = {"torch", "transformers", "prefect"}  # of models and of flows: seconds each
READ = "import sys, flows.cli\ntry:\n    flows.cli.main()\nfinally:\n    print([n for n in {} if n in sys.modules])"


def command(*arguments: object) -> tuple[int, str, set[str]]:
    """Run the command in a new process: its status, what it wrote, and which heavy packages it imported."""
    done = subprocess.run(
        [sys.executable, "-c", READ.format(HEAVY), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
        env={**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9"},  # nothing answers there
        check=False,
    )
    *lines, imported = done.stdout.splitlines()
    return done.returncode, done.stderr + "\n".join(lines), set(json.loads(imported.replace("'", '"')))


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"], ["run"], ["run", "none.toml"]], ids=str)
def test_what_needs_no_run_imports_nothing_heavy(arguments):
    assert command(*arguments)[2] == set()


def test_a_wrong_recipe_is_refused_before_anything_heavy_is_imported(tmp_path):
    (tmp_path / "bad.toml").write_text(TINY.read_text() + "\n[rolout]\n")
    status, said, imported = command("run", tmp_path / "bad.toml")
    assert (status, imported) == (2, set())
    assert "rolout: unknown key" in said


def test_a_run_of_another_recipe_and_bad_prompts_are_refused_without_model_libraries(tiny, tmp_path):
    status, said, imported = command("run", TINY, "--set", f"root={tiny.parent}", "--set", "seed=7", "--set", "name=tiny")
    assert status == 2
    assert "belongs to another recipe" in said
    assert not imported & LIBRARIES
    changes = ('prompts={source="file", path="none.jsonl"}', f"root={tmp_path}")
    status, said, imported = command("run", TINY, *(word for change in changes for word in ("--set", change)))
    assert status == 2
    assert "no such file" in said
    assert not imported & LIBRARIES


@pytest.mark.parametrize("arguments", [[], ["--round", "1"], ["--lineage"], ["--verify"]], ids=str)
def test_inspect_imports_no_model_library_and_draws_nothing(tiny, arguments):
    status, _, imported = command("inspect", tiny, *arguments)
    assert status == 0
    assert not imported & {*LIBRARIES, "altair"}


def test_report_does_not_import_prefect(tiny, tmp_path):
    """It reads both tokenizers, to show what each side read of a prompt, so transformers is imported."""
    shutil.copytree(tiny, tmp_path / "tiny")
    status, _, imported = command("report", tmp_path / "tiny")
    assert status == 0
    assert "prefect" not in imported


@pytest.mark.parametrize("name", ["report", "recipe"])
def test_what_takes_a_while_is_said_before_model_libraries_are_imported(tiny, tmp_path, name):
    given = {"report": [tiny], "recipe": ["--student=s", "--teacher=t", "--prompts=p.jsonl", f"--out={tmp_path / 'r.toml'}"]}
    code = "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers')))\n" + READ.format(HEAVY)
    done = subprocess.run([sys.executable, "-c", code, name, *given[name]], capture_output=True, text=True, cwd=CHECKOUT)
    said = done.stderr.splitlines()
    assert {"report": "reading", "recipe": "looking at"}[name] in said[0]
    assert "ImportError" in done.stderr or "ModuleNotFoundError" in done.stderr


# -- a complete run --------------------------------------------------------------------------------------------------------


def test_a_complete_run_needs_neither_models_nor_prefect(tiny):
    before = files(tiny.parent)
    status, said, imported = command("run", TINY, "--set", f"root={tiny.parent}")
    assert status == 0
    assert f"{TINY}: 2 of 2 rounds are committed in {tiny}" in said.splitlines()[0]
    assert f"The run is in {tiny}, its last student in {tiny / 'round=0002' / 'student'}" in said
    assert "student, round 2" in said
    assert not imported & LIBRARIES
    assert files(tiny.parent) == before


@pytest.mark.parametrize(("rounds", "said"), [(1, "a new run of 1 round in "), (None, "a new run of 2 rounds in ")])
def test_a_new_run_is_told(tmp_path, caplog, rounds, said):
    with caplog.at_level("INFO", "potstill"):
        start.announce(TINY, load_recipe(TINY, (f"root={tmp_path}",)), rounds)
    assert said in caplog.text


def test_it_says_what_the_flow_says(tiny):
    recipe = load_recipe(TINY, (f"root={tiny.parent}",))
    for rounds in (None, 1, 2):
        assert find_result(recipe, rounds) == distill(str(TINY), rounds=rounds, overrides=(f"root={tiny.parent}",))
    assert find_result(recipe, 3) is None


@pytest.fixture
def copied(tiny, tmp_path) -> Path:
    """The root of a copy of the tiny run and of the runs that made its models."""
    shutil.copytree(tiny.parent, tmp_path / "copied")
    yield tmp_path / "copied"
    SUSPECTS.clear()


def test_a_round_that_was_stopped_before_its_card_gets_it(copied, monkeypatch):
    overrides, run, card = (f"root={copied}",), copied / "tiny", copied / "tiny" / "round=0002" / "README.md"
    wanted = card.read_text()
    card.unlink()
    (run / "_manifests" / "round=0002" / "evals" / "student.json").unlink()  # so that the round is evaluated, and ends, again
    with monkeypatch.context() as patched:
        patched.setattr(publish, "write_card", interrupt)
        with pytest.raises(Interrupted):
            distill(str(TINY), overrides=overrides)
    recipe = load_recipe(TINY, overrides)
    assert Run(recipe.root, recipe.name).rounds_done() == 2
    assert find_result(recipe, None) is None
    distill(str(TINY), overrides=overrides)
    assert card.read_text() == wanted
    assert find_result(recipe, None) is not None


class Interrupted(Exception):
    """What stops a run here."""


def interrupt(*_: object) -> None:
    raise Interrupted


def test_a_moved_run_is_still_complete(copied):
    assert find_result(load_recipe(TINY, (f"root={copied}",)), None)["run"] == str(copied / "tiny")


@pytest.mark.parametrize(
    "place",
    ["tiny/round=0001/scores/part-00000.parquet", "tiny/prompts/eval.parquet", "test-teacher-seed0/round=0001/student"],
)
def test_what_was_touched_is_looked_at(copied, place):
    """In the run itself and in the run that made its teacher."""
    recipe = load_recipe(TINY, (f"root={copied}",))
    assert find_result(recipe, None)
    file = copied / place
    os.utime(file / "model.safetensors" if file.is_dir() else file)
    assert find_result(recipe, None) is None


def test_other_limits_code_or_packages_are_looked_at(tiny, monkeypatch):
    told = (f"root={tiny.parent}",)
    assert count_settled(load_recipe(TINY, told)) == 2
    assert count_settled(load_recipe(TINY, (*told, "gates.lead=-0.5"))) is None
    with monkeypatch.context() as patch:
        patch.setattr(start, "digest_code", lambda: "another version")
        assert count_settled(load_recipe(TINY, told)) is None
    monkeypatch.setattr(start, "versions", lambda: {"transformers": "99"})
    assert count_settled(load_recipe(TINY, told)) is None


def test_a_damaged_checkpoint_that_is_read_is_made_again(copied, tmp_path):
    """Same size and time, so that it is found only when round 3 reads it; the run ends as one that nothing happened to."""
    recipe, told = load_recipe(TINY, (f"root={copied}",)), (f"root={copied}",)
    weights = copied / "tiny/round=0002/student/model.safetensors"
    stat, whole = weights.stat(), weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert count_settled(recipe) == 2
    result = distill(str(TINY), rounds=3, overrides=told)
    assert result["rounds"] == 3
    assert weights.read_bytes() == whole
    run = Run(str(copied), "tiny")
    assert [slot for slot in run.slots() if run.find_damage(slot)] == []
    assert count_settled(recipe) == 3


# -- models and prompts in files ------------------------------------------------------------------------------------------


@pytest.fixture
def own(recipe, models, tmp_path, monkeypatch) -> tuple[Path, dict[str, Path]]:
    """A complete run of one round whose models and prompts are files of its user."""
    monkeypatch.setattr(lineage, "TICK", 0)
    lineage._digest_file.cache_clear()  # other tests have read them within a tick after they were made
    folders = {role: tmp_path / f"the-{role}" for role in ("student", "teacher")}
    for role, folder in folders.items():
        shutil.copytree(models[role], folder)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"word {n}", "reference": str(n)}) + "\n" for n in range(60)))
    given = {role: {"model": str(folder)} for role, folder in folders.items()}
    path = recipe(rounds=1, prompts={"source": "file", "path": str(prompts), "eval": 8}, rollout__prompts=16, **given)
    distill(str(path))
    return path, {**folders, "prompts": prompts}


def test_files_that_are_as_they_were_are_not_read(own, monkeypatch):
    path, _ = own
    lineage._digest_file.cache_clear()
    monkeypatch.setattr(lineage, "digest_stream", lambda _: pytest.fail("read"))
    assert find_result(load_recipe(path), None)["rounds"] == 1


@pytest.mark.parametrize("what", ["student", "teacher", "prompts"])
def test_files_that_were_replaced_are_seen(own, what):
    path, places = own
    recipe, place = load_recipe(path), places[what]
    if what == "prompts":
        place.write_text(place.read_text().replace("word 59", "word 95"))
    else:
        weights = place / "model.safetensors"
        stat = weights.stat()
        tensors = load_file(weights)
        save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, weights, {"format": "pt"})
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert weights.stat().st_size == stat.st_size
    assert find_result(recipe, None) is None
    if what != "prompts":
        with pytest.raises(BadInput, match=f"began with another {what}"):
            distill(str(path))


def test_a_copy_of_a_model_in_its_place_is_read_once_and_the_run_stands(own):
    path, places = own
    shutil.move(places["teacher"], f"{places['teacher']}-moved")
    shutil.copytree(f"{places['teacher']}-moved", places["teacher"])
    assert find_result(load_recipe(path), None) is None
    before = files(Path(load_recipe(path).root))
    distill(str(path))
    after = files(Path(load_recipe(path).root))
    changed = {name for name in after if after[name] != before.get(name)}
    assert {Path(name).name for name in changed} == {"_receipt.json"}
    assert find_result(load_recipe(path), None)["rounds"] == 1

"""`potstill push`: what arrives at the Hub, and what stops it. The card that goes with a student."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import tomli_w
import torch
import yaml
from fake_hub import FakeHub
from helpers import Ended, made, refused
from markdown_it import MarkdownIt
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.load import dump_recipe, load_recipe, validate_recipe
from storage.lineage import digest_folder
from storage.read import scan
from storage.store import Run
from tasks.views.card import render_card
from tasks.views.rounds import find_best, format_rounds

TOKEN = "hf_t0kenOfTheTests"
# Where the Hub is, as the library read it from the environment when this process began.
COMMAND = """
import os, sys
import huggingface_hub.constants as known
known.ENDPOINT, known.HF_HUB_OFFLINE, known.HF_HUB_DISABLE_XET = sys.argv[1], sys.argv[2] == "offline", True
os.environ["HF_TOKEN"] = sys.argv[3]
sys.argv = ["potstill", "push", *sys.argv[4:]]
from flows.cli import main
main()
"""


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    started = FakeHub(TOKEN)
    yield started
    started.stop()


@pytest.fixture
def push(potstill, tiny, hub) -> Callable[..., Ended]:
    def run(*arguments: Any, run: Path = tiny, token: str = TOKEN, url: str | None = None, network: str = "online") -> Ended:
        return potstill("-c", COMMAND, url or hub.url, network, token, run, *arguments)

    return run


def parts(card: str) -> tuple[dict[str, Any], str]:
    """A card's metadata and its text."""
    _, metadata, body = card.split("---\n", 2)
    return yaml.safe_load(metadata), body


def test_what_arrives_is_the_student_byte_for_byte_with_its_card(push, hub, tiny):
    ended = push("tiny-student")
    assert (ended.status, ended.out) == (0, f"{hub.url}/me/tiny-student/commit/{'0' * 40}\n"), ended.err
    repo = hub.repos["me/tiny-student"]
    assert repo["asked"]["visibility"] == "private"
    assert repo["commits"] == ["tiny: the student of round 2"]
    card = repo["files"].pop("README.md").decode()
    student = tiny / "round=0002" / "student"
    assert repo["files"] == {path.name: path.read_bytes() for path in student.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= repo["files"].keys()
    assert 'from_pretrained("me/tiny-student")' in card
    assert "`vllm serve me/tiny-student`" in card
    assert TOKEN not in card
    assert not (student / "README.md").exists()
    assert push("team/other", "--public").status == 0
    assert hub.repos["team/other"]["asked"]["visibility"] == "public"


def test_another_round_and_the_best_one(push, hub, tiny):
    assert push("me/first", "--round", 1).status == 0
    first = (tiny / "round=0001" / "student" / "model.safetensors").read_bytes()
    assert hub.repos["me/first"]["files"]["model.safetensors"] == first
    assert push("me/best", "--best").status == 0
    evals = scan(str(tiny), "evals").filter(pl.col("round") > 0, decoding="sampled", model="student").collect()
    shares = evals.group_by("round").agg(pl.col("correct").mean()).sort("correct", "round", descending=[True, False])
    assert hub.repos["me/best"]["commits"] == [f"tiny: the student of round {shares['round'][0]}"]


def test_a_second_push_goes_to_the_same_repository(push, hub):
    assert push("me/twice").status == push("me/twice").status == 0
    assert len(hub.repos["me/twice"]["commits"]) == 2


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (("me/x",), {"token": ""}, ["HF_TOKEN is not set", "settings/tokens"]),
        (("me/x",), {"token": "hf_wrong"}, ["me/x", "does not take this token", "Invalid credentials", "HF_TOKEN"]),
        (("a b",), {}, ["a b", "not the name of a repository", "user/"]),
        (("me/x/y",), {}, ["me/x/y", "not the name of a repository"]),
        (("me/x",), {"network": "offline"}, ["HF_HUB_OFFLINE"]),
        (("me/x", "--round", 3), {}, ["--round 3", "1 to 2"]),
        (("me/x", "--round", 0), {}, ["--round 0", "1 to 2"]),
        (("me/x", "--round", 1, "--best"), {}, ["--round 1 and --best"]),
    ],
)
def test_what_the_user_can_mend_is_one_message(push, hub, arguments, options, words):
    refused(push(*arguments, **options), *words)
    assert hub.repos == {}


@pytest.mark.parametrize(
    ("status", "words", "ends"),
    [
        (403, "You don't have the rights to create a model under the namespace team", 2),
        (402, "Private storage limit reached", 2),
        (400, "Invalid metadata", 2),
        (500, "Internal Error", 1),
    ],
)
def test_what_the_hub_refuses_is_said_in_its_words(push, hub, status, words, ends):
    hub.refusal = (status, words)
    ended = push("team/x")
    assert ended.status == ends
    assert words in ended.err
    assert "Traceback" not in ended.err
    if ends == 2:
        refused(ended, "team/x", str(status))


def test_a_network_that_is_down(push):
    ended = push("me/x", url="http://127.0.0.1:9")
    assert ended.status == 1
    assert ended.err.startswith("potstill: me/x: not sent to http://127.0.0.1:9 (ConnectError")
    assert "Traceback" not in ended.err


def test_a_damaged_checkpoint_is_not_sent(push, hub, tiny, tmp_path):
    run = tmp_path / "tiny"
    shutil.copytree(tiny, run)
    weights = run / "round=0002" / "student" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    refused(push("me/x", run=run), "round=0002/student", "its content was altered", "potstill run")
    assert hub.asked == []
    assert push("me/x", "--round", 1, run=run).status == 0


def test_a_run_without_a_round_and_what_is_no_run(push, hub, tiny, tmp_path):
    (tmp_path / "begun").mkdir()
    shutil.copy(tiny / "run.toml", tmp_path / "begun")
    refused(push("me/x", run=tmp_path / "begun"), "no round is complete")
    refused(push("me/x", run=tmp_path), "not a run")
    assert hub.asked == []


def test_every_round_has_a_card_that_is_no_part_of_its_student(potstill, tiny):
    manifests = dict(Run(str(tiny.parent), tiny.name).manifests())
    for number in (1, 2):
        card = (tiny / f"round={number:04d}" / "README.md").read_text()
        student = tiny / f"round={number:04d}" / "student"
        digest = digest_folder(student)
        assert manifests[f"round={number:04d}/student"]["digest"] == digest
        assert digest in card
        assert str(tiny.parent) not in card
    assert potstill("inspect", tiny, "--verify").status == 0


def test_a_card_says_what_the_tables_say(tiny):
    metadata, body = parts((tiny / "round=0002" / "README.md").read_text())
    assert metadata["library_name"] == "transformers"
    assert {"potstill", "bytes"} <= set(metadata["tags"])
    evals = scan(str(tiny), "evals").filter(model="student", round=2, decoding="greedy").collect()
    (row,) = re.findall(r"^\| student, round 2 \|([^|]*)\|([^|]*)\|", body, re.MULTILINE)
    assert float(row[1].split()[0]) == pytest.approx(evals["correct"].mean(), abs=1e-3)
    manifests = dict(Run(str(tiny.parent), tiny.name).manifests())
    digests = {manifests[slot]["digest"] for slot in ("round=0001/student", "prompts/train", "prompts/eval")}
    assert digests <= set(re.findall(r"[0-9a-f]{64}", body))
    toml = re.search(r"```toml\n(.*?)```", body, re.DOTALL)[1]
    again, frozen = validate_recipe(tomllib.loads(toml), "card"), load_recipe(tiny / "run.toml")
    assert (again.objective, again.score, again.prompts) == (frozen.objective, frozen.score, frozen.prompts)


def test_a_card_shows_how_to_load_the_student(tiny, monkeypatch, capsys):
    monkeypatch.chdir(tiny / "round=0002")
    (code,) = re.findall(r"^```python\n(.*?)^```", Path("README.md").read_text(), re.DOTALL | re.MULTILINE)
    torch.manual_seed(0)
    exec(code, {})
    model, tokenizer = AutoModelForCausalLM.from_pretrained("student"), AutoTokenizer.from_pretrained("student")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "…"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    answer = model.generate(ids, max_new_tokens=12)[0, ids.shape[1] :]
    assert capsys.readouterr().out == tokenizer.decode(answer, skip_special_tokens=True) + "\n"


def test_licences_of_both_models_are_those_that_their_folders_name(tiny, recipe, tmp_path):
    """And a name that is Markdown stays a name."""
    free, other = made(tmp_path / "free`<b>|x", 300, "a b c"), made(tmp_path / "closed", 300, "a b c")
    (free / "README.md").write_text("---\nlicense: apache-2.0\n---\n# It\n")
    (other / "README.md").write_text(
        "---\nlicense: other\nlicense_name: gemma\nlicense_link: https://ai.google.dev/x\n---\n# It\n"
    )
    path = recipe(student={"model": str(free), "prefix": "A: ```"}, teacher={"model": str(other)})
    run = Run(str(tmp_path), "tiny")
    shutil.copytree(tiny, run.path)
    run.write_text("run.toml", path.read_text())
    metadata, body = parts(render_card(run, 1, where="me/x"))
    assert metadata["license"] == "apache-2.0"
    assert "base_model" not in metadata  # a folder is none that the Hub knows
    assert "Student: ``free`<b>|x``, licence `apache-2.0`" in body
    assert "Teacher: `closed`, licence `gemma`" in body
    assert "A teacher's licence may reach" in body
    assert "````toml" in body
    assert str(tmp_path) not in body
    path = recipe(
        student={"model": "org/base", "system": 'Be "brief".', "chat_template_kwargs": {"enable_thinking": False}},
        teacher={"model": "org/large"},
    )
    run.write_text("run.toml", path.read_text())
    metadata, body = parts(render_card(run, 1, where="me/x"))
    assert metadata["base_model"] == "org/base"
    assert "license" not in metadata
    assert "[org/large](https://huggingface.co/org/large); no licence of it is known here" in body
    assert 'return_tensors="pt", enable_thinking=False' in body
    assert '{"role": "system", "content": "Be \\"brief\\"."}' in body


def test_a_student_that_is_its_own_teacher_is_no_model_of_the_hub(tiny, recipe, tmp_path):
    """Nor is the teacher of its second round the model that it was before the first."""
    run = Run(str(tmp_path), "tiny")
    shutil.copytree(tiny, run.path)
    of_rounds = {}
    for weights in ("start", "round"):
        teacher = {"model": "student", "weights": weights, "template": "{prompt} {reference}"}
        run.write_text("run.toml", dump_recipe(load_recipe(recipe(teacher=teacher))))
        _, body = parts(render_card(run, 2, where="me/x"))
        assert "taught by itself" in body
        assert "huggingface.co/student" not in body
        assert "The teacher is the student itself; the teacher alone reads the row's reference." in body
        assert "licence may reach" not in body
        of_rounds[weights] = re.findall(r"\| (teacher|the student of round 1) \| (`\w+`)", body)
    assert [digest for _, digest in of_rounds["round"]] == 2 * [of_rounds["start"][0][1]]
    assert of_rounds["start"][0] != of_rounds["start"][1]


@pytest.mark.parametrize(
    ("figure", "values", "wanted"),
    [
        ("sampled", [0.9, 0.2, 0.7, 0.7, None], 2),
        ("greedy", [0.0, 0.1, 0.1, 0.1, 0.2], 4),
        ("divergence", [0.0, 0.5, 0.3, 0.4, None], 2),
        ("divergence", [0.0, None, None, None, None], None),
    ],
)
def test_the_best_round_is_the_first_with_the_best_figure(figure, values, wanted):
    """Round 0 is not trained, and the teacher is no student."""
    rows = [{"model": "student", "round": number, figure: value} for number, value in enumerate(values)]
    rows.append({"model": "teacher", "round": 0, figure: 1.0 if figure != "divergence" else 0.0})
    assert find_best(pl.DataFrame(rows, schema_overrides={figure: pl.Float64}), figure) == wanted


def test_a_teacher_is_not_at_a_negative_distance_from_itself():
    """Rounding leaves a figure such as −3e-9."""
    figures = dict.fromkeys(("sampled", "greedy", "recovered", "tokens", "truncated", "supervised"))
    (row,) = format_rounds(pl.DataFrame([{"title": "teacher", **figures, "divergence": -3e-9}]))
    assert row["divergence"] == "0.0000"


def test_which_figure_is_best_belongs_to_the_recipe(recipe):
    assert load_recipe(recipe()).evaluate.best == "sampled"
    assert load_recipe(recipe(evaluate__samples=0)).evaluate.best == "greedy"
    for changes, words in (
        ({"evaluate__samples": 0, "evaluate__best": "sampled"}, "needs samples"),
        ({"evaluate__best": "accuracy"}, "'sampled', 'greedy' or 'divergence'"),
    ):
        with pytest.raises(Exception, match=words):
            load_recipe(recipe(**changes))


def test_the_command_by_itself(hub, tiny, tmp_path):
    """As a shell starts it, with the Hub's address and the token in the environment alone."""
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "flows.cli", "push", str(tiny), "me/tiny"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (done.returncode, done.stdout) == (0, f"{hub.url}/me/tiny/commit/{'0' * 40}\n"), done.stderr
    assert "model.safetensors" in hub.repos["me/tiny"]["files"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_run_links_to_is_not_handed_on(push, hub, tiny, tmp_path, kind):
    """A stranger's run, whose manifest fits what its links lead to."""
    run, secret = tmp_path / "tiny", tmp_path / "secret"
    shutil.copytree(tiny, run)
    student = run / "round=0002" / "student"
    if kind == "folder":
        student.rename(secret)
        student.symlink_to(secret)
    else:
        secret.write_text("{}")
        (student / "chat.json").symlink_to(secret)
    manifest = run / "_manifests" / "round=0002" / "student.json"
    size = sum(path.stat().st_size for path in student.iterdir())
    lie = {"digest": digest_folder(student), "bytes": size}
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | lie))
    ended = push("me/x", run=run)
    refused(ended, f"out of {run}, so it is not sent; put a copy in its place")
    assert not hub.repos


def test_what_others_wrote_is_text_in_a_card(tiny, tmp_path):
    """Names, models and versions of a stranger's run: no markup, no line of their own."""
    bad = "x](javascript:alert(1)) <script> \n```\n# head"
    run = tmp_path / "[x](javascript:alert(1)) <script>"
    shutil.copytree(tiny, run)
    text = tomllib.loads((run / "run.toml").read_text())
    text["student"] = {"model": bad, "rendering": "chat", "chat_template_kwargs": {bad: bad}}
    text["teacher"] = {"model": "/home/somebody/models/qwen"}
    (run / "run.toml").write_text(tomli_w.dumps(text))
    manifest = run / "_manifests" / "round=0002" / "student.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"versions": {bad: bad}}))
    _, body = parts(render_card(Run(str(tmp_path), run.name), 2, where="me/x"))
    page = MarkdownIt("commonmark").enable("table").render(body)
    shown = re.sub(r"<code.*?</code>", "", page, flags=re.DOTALL)
    assert "javascript" not in shown
    assert "script" not in shown
    assert "# head" not in shown
    assert re.findall("<h1>(.*)</h1>", page) == ["tiny"]
    assert "/home/somebody" not in body
    assert "huggingface.co//home" not in body

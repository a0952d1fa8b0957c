"""A table of what people mistype: each ends with exit status 2 and one line that says what, where and what would be right.

Through the command, in a fork of a process that has imported everything. The folder it runs in stays empty, and so does
its root, which lies there too.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from helpers import TINY, Ended, files, made, refused

from configs.errors import BadInput
from configs.load import load_recipe
from flows.refuse import check_recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """`good.toml`, the two models it names, and files that are not what their names say."""
    folder = tmp_path_factory.mktemp("mistakes")
    made(folder / "student", 300, "olleh dlrow " * 5)
    made(folder / "teacher", 290, "hello hello world " * 5)
    data = {
        "name": "bad",
        "student": {"model": str(folder / "student")},
        "teacher": {"model": str(folder / "teacher")},
        "prompts": {"source": "reasoning-gym", "task": "spell_backward", "train": 8, "eval": 4},
        "rollout": {"max_new_tokens": 4},
        "score": {"k": 8},
        "objective": {"name": "bytes"},
    }
    (folder / "good.toml").write_text(tomli_w.dumps(data))
    (folder / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    (folder / "text.gguf").write_text("hello")
    shutil.copytree(folder / "student", folder / "pickled")
    (folder / "pickled" / "model.safetensors").rename(folder / "pickled" / "pytorch_model.bin")
    return folder


@pytest.fixture
def potstill_in_nothing(potstill, tmp_path) -> Callable[..., Ended]:
    """The command in an empty folder, which it leaves empty."""
    here = tmp_path / "here"
    here.mkdir()

    def run(*arguments: Any) -> Ended:
        ended = potstill(*arguments, folder=here)
        assert list(here.iterdir()) == []
        return ended

    return run


def test_the_recipe_is_right_otherwise(place, tmp_path, monkeypatch):
    """Or the table below would prove nothing."""
    monkeypatch.chdir(tmp_path)
    check_recipe(load_recipe(place / "good.toml"))


SERVER = "teacher.engine=server"
RAY = "compute.runner=ray"

# `{place}` is the folder above. What is set, then what the message says: the field, what was found, what would be right.
RECIPES = [
    # limits of gates
    (["gates.chance=0"], ["gates.chance", "greater than 0", "found 0"]),
    (["gates.lead=-2"], ["gates.lead", "greater than or equal to -1", "found -2"]),
    (["gates.lead=1.5"], ["gates.lead", "less than or equal to 1", "found 1.5"]),
    (["gates.length=0.5"], ["gates.length", "greater than or equal to 1", "found 0.5"]),
    (["gates.grad_norm=0"], ["gates.grad_norm", "greater than 0", "found 0"]),
    (["gates.repetition=1.5"], ["gates.repetition", "less than or equal to 1", "found 1.5"]),
    (["gates.truncated=-0.1"], ["gates.truncated", "greater than or equal to 0", "found -0.1"]),
    (["gates.engine_max=-0.1"], ["gates.engine_max", "greater than or equal to 0", "found -0.1"]),
    (["gates.supervised=nan"], ["gates.supervised", "less than or equal to 1", "found nan"]),
    (["gates.noise=low"], ["gates.noise", "valid number", "found 'low'"]),
    (["gates.coverage=0.5"], ["gates.coverage", "unknown key", "supervised, dropped, truncated"]),
    (["gates=0.5"], ["gates", "dictionary", "found 0.5"]),
    # where shards are worked on
    (["compute.runner=dask"], ["compute.runner", "'local' or 'ray'", "found 'dask'"]),
    (["compute.cpus=0"], ["compute.cpus", "greater than 0", "found 0"]),
    (["compute.cpus=inf"], ["compute.cpus", "less than or equal to 4096", "found inf"]),
    (["compute.gpus=-1"], ["compute.gpus", "greater than or equal to 0", "found -1"]),
    (["compute.gpus=one"], ["compute.gpus", "valid number", "found 'one'"]),
    (["compute.workers=2"], ["compute.workers", "known here: runner, address, cpus, gpus"]),
    (["compute.address=head:10001"], ["compute: address is for runner = 'ray'", "runner is 'local'", "set runner or leave"]),
    ([RAY, 'compute.address=""'], ["compute.address", "at least 1 character"]),
    # engines
    (["teacher.engine=vllm"], ["vllm_python: .venv-vllm/bin/python", "not a Python with vLLM", "make vllm"]),
    (["teacher.engine=vllm", "teacher.vllm_python=/nowhere/python"], ["/nowhere/python", "No such file", "make vllm"]),
    (["teacher.engine=vllm", "teacher.vllm_python={place}/good.toml"], ["good.toml", "Permission denied", "make vllm"]),
    (["teacher.engine=vllm", 'teacher.vllm_python=""'], ["teacher.vllm_python", "at least 1 character"]),
    ([SERVER, "teacher.urls=[]"], ["teacher: engine = 'server' needs urls", "http://127.0.0.1:8000"]),
    ([SERVER, "teacher.urls=http://a:1"], ["teacher.urls", "should be a list", "found 'http://a:1'"]),
    ([SERVER, "teacher.urls=[3]"], ["teacher.urls.0", "valid string", "found 3"]),
    ([SERVER, 'teacher.urls=["http://a:1", "ftp://a"]'], ["teacher.urls.1: 'ftp://a' is not an address", "http://host:8000"]),
    ([SERVER, 'teacher.urls=["http://"]'], ["teacher.urls.0: 'http://' is not an address", "http://host:8000"]),
    ([SERVER, 'teacher.urls=["http://host:port"]'], ["'http://host:port' is not an address", "http://host:8000"]),
    ([SERVER, 'teacher.urls=["http://host:99999"]'], ["'http://host:99999' is not an address", "http://host:8000"]),
    ([SERVER, 'teacher.urls=["http://ho st"]'], ["'http://ho st' is not an address", "http://host:8000"]),
    ([SERVER, 'teacher.urls=["http://[::1"]'], ["'http://[::1' is not an address", "http://host:8000"]),
    # adapters
    (["student.lora.rank=0"], ["student.lora.rank", "greater than or equal to 1", "found 0"]),
    (["student.lora.alpha=inf"], ["student.lora.alpha", "finite number", "found inf"]),
    (["student.lora.dropout=0.1"], ["student.lora.dropout", "known here: rank, alpha, targets"]),
    (["student.lora.targets=all"], ["student.lora.targets", "'all-linear' or names of layers", "found 'all'"]),
    (["student.lora.targets=[]"], ["student.lora.targets", "['q_proj', 'v_proj']", "found []"]),
    (["student.lora.targets=[3]"], ["student.lora.targets", "names of layers", "found [3]"]),
    (['student.lora.targets=["wq"]'], ["student.lora.targets = ['wq']", "no such layers", "q_proj, up_proj, v_proj"]),
    (["student.lora=true"], ["student.lora", "dictionary", "found True"]),
    (["teacher.lora.rank=4"], ["teacher.lora", "not trained", "give student.lora"]),
    (["student.lora={{}}", "train.sharding=full", "train.processes=2"], ["student.lora", "train.sharding = 'none'"]),
    # processes and devices
    (["train.processes=0"], ["train.processes", "greater than or equal to 1", "found 0"]),
    (["train.processes=2000"], ["train.processes", "less than or equal to 1024", "found 2000"]),
    (["train.processes=2.0"], ["train.processes", "valid integer", "found 2.0"]),
    (["train.sharding=zero3"], ["train.sharding", "'none' or 'full'", "found 'zero3'"]),
    (["train.gradient_checkpointing=1"], ["train.gradient_checkpointing", "valid boolean", "found 1"]),
    (["student.device=gpu"], ["student.device", "auto|cpu|mps", "found 'gpu'"]),
    (['student.device=""'], ["student.device", "auto|cpu|mps", "found ''"]),
    (["student.device=cuda:99"], ["student.device = 'cuda:99'", "this machine has", "'auto' or 'cpu'"]),
    (["teacher.device=cuda:99"], ["teacher.device = 'cuda:99'", "this machine has", "'auto' or 'cpu'"]),
    (["teacher.attention=flash"], ["teacher.attention", "'sdpa', 'eager' or 'flash_attention_2'", "found 'flash'"]),
    # models
    (["student.model=no.gguf"], ["no.gguf: no such file", ".gguf file, a model's folder or a hub id"]),
    (["student.model={place}/broken.gguf"], ["broken.gguf", "GGUF v0", "give a folder with config.json"]),
    (["teacher.model={place}/text.gguf"], ["text.gguf", "not a GGUF file", "give a folder with config.json"]),
    (["teacher.model={place}/good.toml"], ["good.toml", "not a valid JSON file", "give a folder with config.json"]),
    (["teacher.model=a b/c"], ["a b/c: no such model", "Repo id", "or a hub id"]),
    (["student.model={place}/pickled"], ["pickled: no *.safetensors in it", "give a folder with config.json, weights"]),
    (["student.trust_remote_code=yes"], ["student.trust_remote_code", "valid boolean", "found 'yes'"]),
    (["student.trust_remote=true"], ["student.trust_remote: unknown key", "trust_remote_code"]),
    (['student.stop="<end>"'], ["student.stop", "should be a list", "found '<end>'"]),
    (['student.stop=[""]'], ["student.stop.0", "at least 1 character"]),
    (['teacher.stop=["hello there"]'], ["{place}/teacher: stop: 'hello there' is ", " tokens (", "a string that is one token"]),
    # room
    (
        ["rollout.max_new_tokens=1000000"],
        ["student: room: ", "too long: 2 of 2 prompts", "at most 64 tokens", "max_new_tokens"],
    ),
    # signals against engine and objective
    (
        ["score.signal=hidden", "teacher.engine=server", 'teacher.urls=["http://a:1"]'],
        ["score.signal = 'hidden'", "found 'server'", "or score.signal = 'topk'"],
    ),
    (["score.signal=sampled", "objective.name=gkd"], ["score.signal = 'sampled'", "one of topk, hidden"]),
    (["score.signal=bytes", "objective={{name='uld'}}"], ["score.signal = 'bytes'", "'uld'", "one of topk, hidden"]),
    (["score.signal=hidden", "score.k=5000"], ["score.k = 5000", "ids of the teacher's vocabulary", "at most"]),
    # the root and the name
    (["root=gs://bucket/runs"], ["root: gs://bucket/runs cannot be used", "gcsfs"]),
    (["root=s3:bucket://x"], ["root: s3:bucket://x cannot be used", "s3://bucket/runs"]),
    (["root=3"], ["root", "valid string", "found 3"]),
    (["name=../x"], ["name", "A-Za-z0-9", "found '../x'"]),
    (["name=/tmp/x"], ["name", "A-Za-z0-9", "found '/tmp/x'"]),
    # prompts
    (["prompts.template={{answer"], ["prompts.template: '{answer'", "expected '}'", "fields here:", "word"]),
    (["prompts.template={{nothing}}"], ["prompts.template: '{nothing}'", "fields here:", "word"]),
    (["prompts.options.min_word_len=9", "prompts.options.max_word_len=3"], ["prompts.options", "max_word_len must be >="]),
    (["prompts={{source='file', path='{place}'}}"], ["prompts.path: {place}: a folder without .parquet"]),
    (["prompts={{source='file', path='https://host/a.jsonl'}}"], ["prompts.path: an address", "this machine", "'hub'"]),
    (["prompts={{source='file', paths=[{{path='s3://b/a.csv'}}]}}"], ["prompts.paths.0.path: an address", "download it"]),
    (["prompts={{source='file', path='{place}/*.csv'}}"], ["prompts.path: {place}/*.csv: matches no file", "data/*.parquet"]),
    (["prompts={{source='file'}}"], ["prompts: give prompts.path or prompts.paths: both are missing"]),
    (["prompts={{source='file', path='a', paths=[{{path='b'}}]}}"], ["prompts.path or prompts.paths: both are there"]),
    (["prompts={{source='file', paths=[{{path='b', weight=0.0}}]}}"], ["prompts.paths.0.weight", "greater than 0", "found 0"]),
    (["prompts={{source='file', paths=[{{path='b', wight=1}}]}}"], ["prompts.paths.0.wight: unknown key", "path, weight"]),
    (["prompts={{source='file', path='b', columns={{promt='c'}}}}"], ["columns.promt: unknown key", "prompt, reference"]),
    (["prompts.columns={{prompt='c'}}"], ["prompts.columns: unknown key"]),
]


@pytest.mark.parametrize(("settings", "parts"), RECIPES, ids=lambda value: " ".join(value)[:50])
def test_a_recipe(potstill_in_nothing, place, settings, parts):
    told = [word for setting in settings for word in ("--set", setting.format(place=place))]
    refused(potstill_in_nothing("run", place / "good.toml", *told), *(part.replace("{place}", str(place)) for part in parts))


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ('{"messages": [{"role": "user"}]}', ["`messages`", "{role, content}", "found [{'role': 'user'}]"]),
        ('{"messages": [{"role": "user", "content": 3}]}', ["{role, content}", "both text", "'content': 3"]),
        ('{"messages": []}', ["{role, content}", "found []"]),
        ('{"messages": "hi"}', ["{role, content}", "found 'hi'"]),
        ('{"messages": {"role": "user", "content": "hi"}}', ["a list of {role, content}", "found {'role': 'user'"]),
        ('{"messages": [{"role": "system", "content": "hi"}]}', ["no message to answer", "roles: system", "one of the user's"]),
        ('{"prompt": 3}', ["`prompt` must be text or a list of messages", "found 3"]),
        ('{"prompt": null}', ["`prompt` must be text or a list of messages", "found None"]),
        (r'{"prompt": "\ud800"}', ["`prompt` must be text or a list of messages", r"found '\ud800'"]),
        (r'{"messages": [{"role": "user", "content": "\udfff"}]}', ["both text", r"\udfff"]),
        (r'{"prompt": "a", "reference": "\ud800"}', ["`reference` must be text", r"found '\ud800'"]),
        ('{"question": "a"}', ["neither `messages` nor `prompt`", "['question']"]),
        ("3", ["is 3", "objects with `messages` or `prompt`"]),
        ("null", ["is None", "objects with `messages` or `prompt`"]),
        ('{"prompt": "a"},', ["cannot be read as jsonl", "Extra data"]),
        ('{"prompt": "a"', ["cannot be read as jsonl"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_row_of_prompts(potstill_in_nothing, place, tmp_path, row, parts):
    """The 31st of a file that is right otherwise."""
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"q{i}"}) + "\n" for i in range(30)) + row + "\n")
    ended = potstill_in_nothing("run", place / "good.toml", "--set", f"prompts={{source='file', path='{file}'}}")
    refused(ended, f"prompts.path: {file}: ", " 31", *parts)


def test_a_row_of_a_hundred_megabytes(potstill_in_nothing, place, tmp_path):
    """Its tokens would take more memory than there is; with `unusable` it is left out as any other row."""
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "x " * 50_000_000}, *({"prompt": f"q{i}"} for i in range(30))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = potstill_in_nothing("run", place / "good.toml", "--set", f"prompts={{source='file', path='{file}'}}")
    refused(ended, f"{file}: row 1: its texts have 100,000,004 characters, more than 16,000,000; leave the row out")
    config = load_recipe(
        place / "good.toml", [f"prompts={{source='file', path='{file}', unusable='leave_out', train=8, eval=4}}"]
    )
    check_recipe(config)


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.csv", "prompt,reference\na,b\nc\n", ["cannot be read as csv: row 2 has 1 cells, the header 2: prompt, reference"]),
        ("a.csv", 'prompt,reference\na,b\n"c,d\n', ["cannot be read as csv: row 2: unexpected end of data"]),
        (
            "a.jsonl",
            '{"problem": "a", "solution": "b", "answer": "c"}\n',
            ["problem and solution", "or problem and answer", 'prompts.convention = "problem-solution" or "problem-answer"'],
        ),
    ],
)
def test_a_file_of_prompts(potstill_in_nothing, place, tmp_path, name, content, parts):
    (tmp_path / name).write_text(content)
    ended = potstill_in_nothing("run", place / "good.toml", "--set", f"prompts={{source='file', path='{tmp_path / name}'}}")
    refused(ended, f"prompts.path: {tmp_path / name}: ", *parts)


@pytest.mark.parametrize("content", [b"", b"no", b"PAR1" + bytes(20) + b"PAR1", b'{"prompt": "\xff"}'])
@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_a_file_that_is_not_what_its_name_says(potstill_in_nothing, place, tmp_path, content, ending):
    file = tmp_path / f"prompts.{ending}"
    file.write_bytes(content)
    ended = potstill_in_nothing("run", place / "good.toml", "--set", f"prompts={{source='file', path='{file}'}}")
    refused(ended, f"prompts.path: {file}: ", f"cannot be read as {ending}" if content or ending == "parquet" else "no prompts")


# `{tiny}` is a run's folder, `{student}` a model.
COMMANDS = [
    (["align"], ["student"]),
    (["align", "{student}"], ["teacher"]),
    (["align", "{student}", "no/such/model"], ["no/such/model", "no such model", "hub id"]),
    (["align", "{student}", "no.gguf"], ["no.gguf: no such file", ".gguf file"]),
    (["align", "{student}", "{student}", "--file", "x.txt"], ["--file: x.txt: not a .jsonl"]),
    (["align", "{student}", "{student}", "--texts", "a"], ["--texts"]),
    (["align", "{student}", "{student}", "--out"], ["--out"]),
    (["inspect", "nowhere"], ["nowhere: not a run", "runs/quickstart"]),
    (["inspect", "s3:x://y/z"], ["s3:x", "cannot be used"]),
    (["inspect", "{tiny}", "--round", "99"], ["no round 99", "counted from 1"]),
    (["inspect", "{tiny}", "--round", "one"], ["--round", "one", "int"]),
    (["inspect", "{tiny}", "--rollout", ""], ["no rollout ''", "0001-000000-000"]),
    (["inspect", "{tiny}", "--rollout", "0001"], ["no rollout '0001'", "0001-000000-000"]),
    (["inspect", "{tiny}", "--lineage", "--round", "99"], ["no checkpoint of round 99", "1 to 2"]),
    (["inspect", "{tiny}", "--lineage", "--round", "-1"], ["no checkpoint of round -1", "1 to 2"]),
    (["inspect", "{tiny}", "--verfy"], ["--verfy"]),
    (["preflight"], ["config"]),
    (["preflight", "no.toml"], ["no.toml: no such recipe", "configs/quickstart.toml"]),
    (["preflight", "{recipe}", "--prompts", "0"], ["--prompts 0", "1 or more"]),
    (["preflight", "{recipe}", "--prompts", "many"], ["--prompts", "many", "int"]),
    (["preflight", "{recipe}", "--set", "gates.noise=-1"], ["gates.noise", "greater than or equal to 0"]),
    (["preflight", "{recipe}", "--rounds", "1"], ["--rounds"]),
    (["run", "{recipe}", "--set"], ["--set"]),
    (["run", "{recipe}", "--set", "rounds"], ["--set rounds", "field=value"]),
    (["run", "{recipe}", "--rounds", "1.5"], ["--rounds", "1.5"]),
    (["run", "{recipe}", "{recipe}"], ["tiny.toml"]),
    (["runn", "{recipe}"], ["runn", "run"]),
    (["--versoin"], ["--versoin"]),
]


@pytest.mark.parametrize(("arguments", "parts"), COMMANDS, ids=lambda value: " ".join(value)[:50])
def test_a_command(potstill_in_nothing, place, tiny, arguments, parts):
    before = files(tiny)
    told = [word.format(tiny=tiny, student=place / "student", recipe=TINY) for word in arguments]
    refused(potstill_in_nothing(*told), *parts)
    assert files(tiny) == before


@pytest.mark.parametrize("text", ["name = ", "", "name = 'tiny'\n", "surprise = 1\n", "\x00"])
def test_a_damaged_run_toml(potstill_in_nothing, tiny, tmp_path, text):
    """Whoever looks, or goes on: the file is named, and stays as it is."""
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / "run.toml").write_text(text)
    for arguments in (["inspect", run], ["inspect", run, "--verify"], ["run", TINY, "--set", f"root={run.parent}"]):
        ended = potstill_in_nothing(*arguments)
        assert ended.status == 2, ended.err
        assert "Traceback" not in ended.err
        assert str(run / "run.toml") in ended.err
    assert (run / "run.toml").read_text() == text
    assert files(tmp_path / "runs").keys() == {"tiny/run.toml"}


# -- what depends on the machine, answered here as another machine would ------------------------------------------------


@pytest.mark.parametrize(
    ("address", "why"),
    [("127.0.0.1:1", "refused"), ("ray://127.0.0.1:1", "refused"), ("head:port", "invalid literal"), ("ray://:", "invalid")],
)
def test_a_cluster_that_is_not_there(place, monkeypatch, address, why):
    monkeypatch.setattr("flows.compute.find_spec", lambda name: name)
    with pytest.raises(BadInput, match=rf"compute\.address = '{address}': nothing answers there .*{why}.*host:port"):
        check_recipe(load_recipe(place / "good.toml", [RAY, f"compute.address={address}"]))


def test_s3_without_its_package(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(BadInput, match=r"root: s3://bucket/runs cannot be used: .*pip install -e '\.\[s3\]'"):
        check_recipe(load_recipe(place / "good.toml", ["root=s3://bucket/runs"]))


def test_attention_without_its_package(place, monkeypatch):
    monkeypatch.setattr("tasks.models.reference.is_flash_attn_2_available", lambda: False)
    with pytest.raises(BadInput, match=r"teacher\.attention = 'flash_attention_2' needs the flash-attn package .*'sdpa'"):
        check_recipe(load_recipe(place / "good.toml", ["teacher.attention=flash_attention_2"]))
    monkeypatch.setattr("tasks.models.reference.is_flash_attn_2_available", lambda: True)
    with pytest.raises(BadInput, match=r"student\.attention .* trains in bfloat16 only \(found float32\); set student\.dtype"):
        check_recipe(load_recipe(place / "good.toml", ["student.attention=flash_attention_2"]))


def test_devices_are_counted(place, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(BadInput, match=r"teacher\.device = 'cuda:2': this machine has 2 such devices, counted from 0"):
        check_recipe(load_recipe(place / "good.toml", ["teacher.device=cuda:2"]))
    check_recipe(load_recipe(place / "good.toml", ["teacher.device=cuda:1"]))


@pytest.fixture
def links(tmp_path) -> Path:
    """A link to itself, and one that leads nowhere."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing" / "folder")
    return tmp_path


@pytest.mark.parametrize("name", ["loop", "nowhere"])
def test_links_that_lead_nowhere(potstill_in_nothing, place, links, name):
    """As the root, as the prompts and as a model."""
    link = links / name
    refused(
        potstill_in_nothing("run", place / "good.toml", "--set", f"root={link}"),
        f"{link}: cannot be written ({link} is a link that leads nowhere); set root to a folder of yours",
    )
    ended = potstill_in_nothing("run", place / "good.toml", "--set", f"prompts={{source='file', path='{link}'}}")
    refused(ended, f"prompts.path: {link}: no such file" if name == "loop" else "prompts.path: ", "no such file")
    refused(potstill_in_nothing("run", place / "good.toml", "--set", f"student.model={link}"), str(link), "no such model")


def test_a_recipe_that_is_nested_without_end(potstill_in_nothing, tmp_path):
    (tmp_path / "deep.toml").write_text("x = " + "[" * 100_000 + "]" * 100_000)
    refused(potstill_in_nothing("run", tmp_path / "deep.toml"), "deep.toml: not valid TOML: maximum recursion depth exceeded")


def test_a_root_whose_name_is_too_long(potstill_in_nothing, place):
    refused(potstill_in_nothing("run", place / "good.toml", "--set", f"root={'x' * 300}"), "File name too long", "set root")

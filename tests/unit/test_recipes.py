"""Recipes: what a TOML file and `--set` become, and what a person reads when a recipe cannot be used."""

import tomllib
from pathlib import Path

import pytest

from configs.errors import BadInput
from configs.load import (
    LATER,
    MACHINERY,
    OF_A_LATER_STAGE,
    dump_recipe,
    inherit_overrides,
    list_differences,
    load_recipe,
    select_content,
    validate_recipe,
)
from configs.objectives import Bytes, Gold
from configs.prompts import FilePrompts

CHECKOUT = Path(__file__).parents[2]
RECIPES = sorted(path for place in ("configs", "tests") for path in (CHECKOUT / place).rglob("*.toml"))
TINY = CHECKOUT / "tests" / "recipes" / "tiny.toml"

PLAIN = """
name = "plain"
[student]
model = "student"
[teacher]
model = "teacher"
[prompts]
source = "file"
path = "prompts.jsonl"
[objective]
name = "bytes"
"""


@pytest.fixture
def plain(tmp_path) -> Path:
    """A small recipe with models and prompts that need not exist."""
    path = tmp_path / "plain.toml"
    path.write_text(PLAIN)
    return path


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(BadInput) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_every_recipe_of_the_checkout_loads(path):
    assert load_recipe(path).name == tomllib.loads(path.read_text())["name"]


def test_there_are_recipes_to_load():
    assert {"quickstart.toml", "tiny.toml"} <= {path.name for path in RECIPES}


def test_values_and_defaults(plain):
    recipe = load_recipe(plain)
    assert (recipe.rounds, recipe.seed, recipe.root) == (1, 0, "runs")
    assert isinstance(recipe.objective, Bytes)
    assert recipe.objective.beta == 1.0
    assert recipe.train.adam_betas == (0.9, 0.999)


def test_paths_are_relative_to_the_recipe(plain, tmp_path, monkeypatch):
    prompts = load_recipe(plain).prompts
    assert isinstance(prompts, FilePrompts)
    assert prompts.path == str(tmp_path / "prompts.jsonl")
    monkeypatch.chdir(tmp_path)
    tiny = load_recipe(TINY)
    assert tiny.student.recipe == str(TINY.parent / "student.toml")
    assert tiny.teacher is not None
    assert tiny.teacher.recipe == str(TINY.parent / "teacher.toml")


def test_several_paths_are_relative_to_the_recipe(plain, tmp_path):
    paths = 'prompts={source="file", paths=[{path="a/*.parquet", weight=2}, {path="b.csv"}]}'
    prompts = load_recipe(plain, [paths]).prompts
    assert isinstance(prompts, FilePrompts)
    assert [(entry.path, entry.weight) for entry in prompts.entries] == [
        (str(tmp_path / "a/*.parquet"), 2.0),
        (str(tmp_path / "b.csv"), None),
    ]
    assert validate_recipe(tomllib.loads(dump_recipe(load_recipe(plain, [paths]))), "again") == load_recipe(plain, [paths])


def test_a_recipe_in_the_working_directory_does_not_hold_its_name(monkeypatch):
    """A checkout can be moved, or pulled elsewhere by a worker, and go on with its runs."""
    monkeypatch.chdir(TINY.parents[2])
    assert load_recipe(TINY).student.recipe == "tests/recipes/student.toml"


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("seed=7", lambda r: r.seed, 7),
        ("train.learning_rate=1e-4", lambda r: r.train.learning_rate, 1e-4),
        ("train.learning_rate = 0.5", lambda r: r.train.learning_rate, 0.5),
        ("train.adam_betas=[0.8, 0.95]", lambda r: r.train.adam_betas, (0.8, 0.95)),
        ("train.schedule=constant", lambda r: r.train.schedule, "constant"),
        ('train.schedule="linear"', lambda r: r.train.schedule, "linear"),
        ("student.trust_remote_code=true", lambda r: r.student.trust_remote_code, True),
        ("root=/data/my runs", lambda r: r.root, "/data/my runs"),
        ("root=s3://bucket/runs", lambda r: r.root, "s3://bucket/runs"),
        ("name=a.b-c_1", lambda r: r.name, "a.b-c_1"),
        ("prompts.template=Q: {question} = ?", lambda r: r.prompts.template, "Q: {question} = ?"),
        ("objective={name='gold', merge='sum'}", lambda r: r.objective, Gold(name="gold", merge="sum")),
    ],
)
def test_set(plain, override, read, value):
    """Values are TOML's; a bare word is a string, an equals sign may stand in a value."""
    found = read(load_recipe(plain, [override]))
    assert found == value
    assert type(found) is type(value)


def test_set_makes_tables_and_the_last_one_wins(plain):
    recipe = load_recipe(plain, ["rollout.samples=2", "rollout.top_k=5", "rollout.samples=3"])
    assert (recipe.rollout.samples, recipe.rollout.top_k) == (3, 5)


def test_set_reaches_deep_tables(tmp_path):
    path = CHECKOUT / "tests" / "recipes" / "student.toml"
    recipe = load_recipe(path, ["student.scratch.layers=2", "prompts.options.max_word_len=9"])
    assert recipe.student.scratch is not None
    assert recipe.student.scratch.layers == 2
    assert recipe.prompts.options == {"min_word_len": 3, "max_word_len": 9}


# What is set in a recipe that is right otherwise; the field that the message names; what it says would be right.
BAD = [
    (["nam=1"], "nam", "known here: name, root, seed"),
    (["rollot.prompts=3"], "rollot", "did you mean rollout? known here: name, root"),
    (
        ["rollout.promts=3"],
        "rollout.promts",
        "did you mean rollout.prompts? known here: on_policy, off_policy, prompts, samples",
    ),
    (["learning_rate=1"], "learning_rate", "did you mean train.learning_rate? known here"),
    (["score.batch_size=1"], "score.batch_size", "did you mean score.batch_tokens? known here"),
    (["train.top_p=1"], "train.top_p", "did you mean rollout.top_p or score.top_p? known here"),
    (["train.zebra=1"], "train.zebra", "unknown key; known here: batch_size"),
    (["prompts.pth=x"], "prompts.pth", "did you mean prompts.path? known here: train, eval"),
    (
        ['prompts={source="file", paths=[{file="x", path="y"}]}'],
        "prompts.paths.0.file",
        "unknown key; known here: path, weight",
    ),
    (["train.schedule=cosin"], "train.schedule", "'linear' or 'constant' (found 'cosin'; did you mean 'cosine'?)"),
    (["objective.name=glod"], "objective.name", "unknown 'glod'; did you mean 'gold'? one of 'gkd'"),
    (["student.scratch.depth=3"], "student.scratch.depth", "layers, width"),
    (["objective.merge=chain"], "objective.merge", "known here: name, beta"),
    (["prompts.task=spell_backward"], "prompts.task", "path"),
    (["rounds=0"], "rounds", "greater than or equal to 1"),
    (["rounds=two"], "rounds", "integer"),
    (["rounds=1.5"], "rounds", "integer"),
    (['rounds="3"'], "rounds", "integer"),
    (["rollout.samples=true"], "rollout.samples", "integer"),
    (["seed=-1"], "seed", "greater than or equal to 0"),
    (["seed=4294967296"], "seed", "less than 2147483648"),
    (["name=a/b"], "name", "A-Za-z0-9"),
    (["name=.."], "name", "A-Za-z0-9"),
    (["name=123"], "name", "string"),
    (['root=""'], "root", "at least 1 character"),
    (["student=3"], "student", "Model"),
    (["student.recipe=x.toml"], "student", "exactly one of model, recipe, scratch"),
    (["student={}"], "student", "exactly one of model, recipe, scratch"),
    (["student.rendering=html"], "student.rendering", "'chat' or 'plain'"),
    (["student.dtype=int8"], "student.dtype", "'bfloat16'"),
    (["student={scratch={width=10, heads=4}}"], "student.scratch", "divide width"),
    (["teacher={scratch={}}"], "teacher", "give teacher.model or teacher.recipe"),
    (["prompts=[]"], "prompts", "dictionary"),
    (["prompts.source=web"], "prompts.source", "'reasoning-gym', 'file', 'hub'"),
    (["prompts={train=3}"], "prompts.source", "reasoning-gym, file, hub"),
    (["prompts={source='file'}"], "prompts.path", "missing"),
    (["prompts.train=0"], "prompts.train", "greater than or equal to 1"),
    (["rollout.on_policy=1.5"], "rollout.on_policy", "less than or equal to 1"),
    (["rollout.on_policy=nan"], "rollout.on_policy", "less than or equal to 1"),
    (["rollout.off_policy=student"], "rollout.off_policy", "'reference' or 'teacher'"),
    (["rollout.temperature=0"], "rollout.temperature", "greater than 0"),
    (["score.k=40000"], "score.k", "at most 32767"),
    (["score.k=0"], "score.k", "greater than or equal to 1"),
    (["score.signal=logits"], "score.signal", "'topk', 'bytes', 'hidden' or 'sampled'"),
    (["score.signal=sampled"], "score.signal", "set score.signal to one of topk, bytes, hidden"),
    (["score.signal=bytes", 'objective={name="gold"}'], "score.signal", "one of topk, hidden"),
    (["score.top_p=2"], "score.top_p", "less than or equal to 1"),
    (["objective=gold"], "objective", "dictionary"),
    (["objective.name=ppo"], "objective.name", "'gkd', 'uld', 'gold', 'bytes', 'strict', 'alm', 'bpm', 'opd', 'sft'"),
    (["objective={beta=0.5}"], "objective.name", "gkd, uld, gold, bytes, strict, alm, bpm, opd, sft"),
    (["objective.beta=-1"], "objective.beta", "greater than or equal to 0"),
    (["objective.name=sft"], "objective.name = 'sft'", "set rollout.on_policy = 0"),
    (["train.micro_batch_size=128"], "train.micro_batch_size = 128", "larger than train.batch_size = 64"),
    (["train.sharding=full"], "train.sharding = 'full'", "train.processes to 2 or more"),
    (["train.processes=2", "train.param_dtype=bfloat16"], "train.param_dtype = 'bfloat16'", "set train.sharding = 'full'"),
    (["train.processes=2", "student.device=cuda:1"], "student.device = 'cuda:1'", "student.device = 'auto'"),
    (["train.learning_rate=fast"], "train.learning_rate", "number"),
    (["train.schedule=step"], "train.schedule", "'cosine', 'linear' or 'constant'"),
    (["train.adam_betas=[0.9]"], "train.adam_betas", "missing"),
    (["train.adam_betas=[0.9, 2.0]"], "train.adam_betas", "less than 1"),
    (["train.grad_clip=0"], "train.grad_clip", "greater than 0"),
    (["evaluate.samples=-1"], "evaluate.samples", "greater than or equal to 0"),
    (["evaluate.scorer=judge"], "evaluate.scorer", "'exact' or 'math'"),
    (["noequals"], "noequals", "field=value"),
    (["=3"], "=3", "field=value"),
    (["train..batch_size=1"], "train..batch_size", "field=value"),
    (["name.x=3"], "name", "not a table"),
]


@pytest.mark.parametrize(("overrides", "field", "right"), BAD, ids=lambda value: str(value)[:40])
def test_bad_recipes(plain, overrides, field, right):
    """Each names the field and what would be right, in one line."""
    text = message(plain, *overrides)
    assert field in text
    assert right in text
    assert "\n" not in text
    assert "pydantic" not in text


def test_every_wrong_field_is_named(plain):
    lines = message(plain, "rounds=0", "score.k=0", "wrong=1").splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"{plain}: ") for line in lines)
    assert {line.split(": ")[1] for line in lines} == {"rounds", "score.k", "wrong"}


def test_a_teacher_is_needed_but_for_sft(tmp_path):
    path = tmp_path / "alone.toml"
    path.write_text(PLAIN.replace('[teacher]\nmodel = "teacher"\n', ""))
    assert "objective.name = 'bytes' needs a [teacher]" in message(path)
    assert load_recipe(path, ["objective.name=sft", "rollout.on_policy=0"]).teacher is None
    text = message(path, "objective.name=sft", "rollout.on_policy=0", "rollout.off_policy=teacher")
    assert "rollout.off_policy = 'teacher' needs a [teacher]" in text


def test_files_that_are_no_recipes(tmp_path):
    missing = tmp_path / "missing.toml"
    assert message(missing).startswith(f"{missing}: no such recipe")
    assert "configs/quickstart.toml" in message(missing)
    assert f"{tmp_path}: cannot be read" in message(tmp_path)
    broken = tmp_path / "broken.toml"
    broken.write_text("name =\nrounds = 2\n")
    assert f"{broken}: not valid TOML" in message(broken)
    assert "line 1" in message(broken)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert f"{binary}: cannot be read" in message(binary)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_a_frozen_recipe_is_the_recipe(path):
    """What `run.toml` holds reads back as the same recipe, with every default written out."""
    recipe = load_recipe(path, ["seed=3", "rollout.top_p=0.9"])
    text = dump_recipe(recipe)
    again = validate_recipe(tomllib.loads(text), "run.toml")
    assert again == recipe
    assert list_differences(again, recipe) == []
    assert tomllib.loads(text)["train"]["weight_decay"] == 0.0


def test_differences_name_both_values(plain):
    old, new = load_recipe(plain), load_recipe(plain, ["train.batch_size=128", "objective={name='gold'}"])
    lines = list_differences(old, new)
    assert "train.batch_size is 64 in the run, 128 in this recipe" in lines
    assert "objective.name is 'bytes' in the run, 'gold' in this recipe" in lines
    assert "objective.merge is 'absent' in the run, 'chain' in this recipe" in lines
    assert len(lines) == 6  # name, merge, rest and two weights beside the batch size


def test_a_run_may_go_on_with_other_machinery(plain):
    assert (
        list_differences(
            load_recipe(plain), load_recipe(plain, ["train.processes=4", "train.sharding=full", "compute.runner=ray"])
        )
        == []
    )
    smaller = ["train.micro_batch_size=2", "train.chunk_positions=64", "rollout.batch_size=8", "score.batch_tokens=512"]
    assert (
        list_differences(load_recipe(plain), load_recipe(plain, [*smaller, "student.device=cpu", "teacher.device=cpu"])) == []
    )


def test_keys_name_all_but_machinery(plain):
    """What may change while a run goes on must leave its stages' keys as they are; what may not must change them."""
    recipe = load_recipe(plain)
    for name in ("rollout", "score", "train", "evaluate"):
        left_out = getattr(recipe, name).model_dump().keys() - select_content(recipe, name).keys()
        no_part = {field for field in MACHINERY | LATER | OF_A_LATER_STAGE if field.startswith(f"{name}.")}
        assert {f"{name}.{key}" for key in left_out} == no_part


def test_a_small_batch_needs_no_word_on_micro_batches(plain):
    assert load_recipe(plain, ["train.batch_size=10"]).train.micro_batch_size == 10
    assert load_recipe(plain, ["train.batch_size=128"]).train.micro_batch_size == 64
    assert load_recipe(plain, ["train.batch_size=10", "train.micro_batch_size=4"]).train.micro_batch_size == 4
    assert "train.batch_size" in message(plain, "train.batch_size=0")


def test_recipes_cannot_be_changed(plain):
    recipe = load_recipe(plain)
    with pytest.raises(Exception, match="frozen"):
        recipe.seed = 3


# -- engines -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["teacher.engine=server"], ["teacher", "engine = 'server' needs urls", "http://127.0.0.1:8000"]),
        (['teacher.urls=["http://a:1"]'], ["teacher", "urls is for engine = 'server', and engine is 'transformers'"]),
        (["teacher.engine=vllm", 'teacher.urls=["http://a:1"]'], ["urls is for engine = 'server', and engine is 'vllm'"]),
        (["teacher.engine=server", 'teacher.urls=["a:1"]'], ["urls.0: 'a:1' is not an address", "http://host:8000"]),
        (["teacher.vllm_python=python"], ["vllm_python is for engine = 'vllm'"]),
        (["teacher.vllm_memory=0.5"], ["vllm_memory is for engine = 'vllm'"]),
        (["teacher.engine=vllm", "teacher.vllm_memory=1.5"], ["teacher.vllm_memory", "1.5"]),
        (["teacher.engine=sglang"], ["teacher.engine", "'transformers', 'vllm', 'server' or 'auto'"]),
        (["student.engine=server", 'student.urls=["http://a:1"]'], ["student.engine = 'server'", "'vllm' or 'transformers'"]),
        (
            ["teacher.engine=server", 'teacher.urls=["http://a:1"]', "score.signal=bytes"],
            ["score.signal = 'bytes'", "or 'vllm'"],
        ),
        (
            ["teacher.engine=server", 'teacher.urls=["http://a:1"]', "score.signal=hidden"],
            ["score.signal = 'hidden'", "(found 'server')"],
        ),
    ],
)
def test_engines_that_cannot_be(plain, overrides, parts):
    text = message(plain, *overrides)
    assert len(text.splitlines()) == 1
    for part in parts:
        assert part in text


def test_engines_that_can(plain):
    recipe = load_recipe(plain, ["student.engine=vllm", "teacher.engine=server", 'teacher.urls=["http://a:1", "https://b/c"]'])
    assert recipe.student.vllm_python == ".venv-vllm/bin/python"
    assert recipe.teacher.urls == ("http://a:1", "https://b/c")
    assert validate_recipe(tomllib.loads(dump_recipe(recipe)), "run.toml") == recipe


def test_where_an_engine_is_found_may_change_in_the_middle_of_a_run(plain):
    server = ["teacher.engine=server", 'teacher.urls=["http://a:1"]']
    moved = load_recipe(plain, ["teacher.engine=server", 'teacher.urls=["http://b:2"]', "student.engine=vllm"])
    assert list_differences(load_recipe(plain, [*server, "student.engine=vllm", "student.vllm_python=python"]), moved) == []
    assert list_differences(load_recipe(plain, server), moved) == [
        "student.engine is 'transformers' in the run, 'vllm' in this recipe"
    ]


@pytest.mark.parametrize("root", ["runs", "a b", 'a"b', "a'b", r"a\b\new", "é", "a=b", "[x]", "#x"])
def test_a_recipe_that_makes_a_model_has_the_same_root_and_seed(root):
    """Whatever stands in the root's name; it was TOML's notation for another one."""
    recipe = load_recipe(CHECKOUT / "tests" / "recipes" / "tiny.toml").model_copy(update={"root": root, "seed": 3})
    maker = load_recipe(recipe.teacher.recipe, inherit_overrides(recipe, recipe.teacher.recipe))
    assert (maker.name, maker.root, maker.seed) == ("test-teacher-seed3", root, 3)

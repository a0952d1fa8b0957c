"""The JSON Schema of recipes: current, named by every recipe, and of one mind with what loads them."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from configs.describe import FILE, field_of, fields_at, list_places, nearest, recipe_schema, tables_at, word_type
from configs.load import dump_recipe, load_recipe

CHECKOUT = Path(__file__).parents[2]
SCHEMA = CHECKOUT / "configs" / FILE
RECIPES = sorted([*(CHECKOUT / "configs").rglob("*.toml"), *(CHECKOUT / "tests" / "recipes").rglob("*.toml")])
VALIDATOR = Draft7Validator(json.loads(SCHEMA.read_text()))

PLAIN = {
    "name": "plain",
    "student": {"model": "student"},
    "teacher": {"model": "teacher"},
    "prompts": {"source": "file", "path": "prompts.jsonl"},
    "objective": {"name": "bytes"},
}


def test_the_file_is_current():
    assert json.loads(SCHEMA.read_text()) == recipe_schema(), "a field has changed: make schema"


def test_the_file_is_a_schema():
    Draft7Validator.check_schema(json.loads(SCHEMA.read_text()))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_recipes_name_it_and_are_valid(path):
    """In the form that TOML editors read; also with every default written out, as a run keeps it."""
    first = path.read_text().splitlines()[0]
    assert first.startswith("#:schema ")
    assert (path.parent / first.removeprefix("#:schema ")).resolve() == SCHEMA
    VALIDATOR.validate(tomllib.loads(path.read_text()))
    VALIDATOR.validate(tomllib.loads(dump_recipe(load_recipe(path))))


@pytest.mark.parametrize(
    "wrong",
    [
        {"nam": "x"},
        {"name": 3},
        {"name": "a/b"},
        {"rounds": 0},
        {"rounds": "3"},
        {"seed": 2**31},
        {"student": "model"},
        {"student": {"modle": "x"}},
        {"student": {"model": ""}},
        {"student": {"model": "x", "engine": "sglang"}},
        {"student": {"model": "x", "lora": {"targets": 3}}},
        {"prompts": {"path": "x"}},
        {"prompts": {"source": "web"}},
        {"prompts": {"source": "file", "task": "countdown"}},
        {"prompts": {"source": "file", "paths": [{"path": "x", "weight": 0}]}},
        {"prompts": {"source": "reasoning-gym"}},
        {"objective": {"name": "ppo"}},
        {"objective": {"name": "bytes", "merge": "sum"}},
        {"train": {"adam_betas": [0.9]}},
        {"train": {"adam_betas": [0.9, 1.0]}},
        {"train": {"dropout": 1}},
        {"score": {"k": 0}},
        {"gates": {"lead": -2}},
    ],
    ids=str,
)
def test_wrong_recipes_are_not_valid(wrong: dict[str, Any]) -> None:
    VALIDATOR.validate(PLAIN)
    assert not VALIDATOR.is_valid({**PLAIN, **wrong})


def test_what_has_to_be_there() -> None:
    for field in PLAIN:
        assert VALIDATOR.is_valid({key: value for key, value in PLAIN.items() if key != field}) == (field == "teacher")


@pytest.mark.parametrize("place", sorted(list_places()))
def test_every_field_is_described(place: str) -> None:
    """An editor shows it, and so does `--explain`. What a variant's own name stands for, its table says."""
    *table, name = place.split(".")
    for _, node in fields_at(table)[name]:
        assert "const" in node or "description" in node, place
    for variant, found in tables_at(place.split(".")).items():
        assert found.get("description"), f"{place} {variant}"


def test_places() -> None:
    assert {"train.batch_size", "student.lora.targets", "prompts.paths.weight", "objective.merge"} <= set(list_places())
    assert list(tables_at(["prompts"])) == ["reasoning-gym", "file", "hub", "cache"]
    assert list(tables_at(["prompts", "file", "paths", "0"])) == [""]
    assert list(tables_at(["prompts", "columns"])) == ["file", "hub"]
    assert tables_at(["train", "batch_size"]) == tables_at(["nothing", "here"]) == {}
    assert field_of(["prompts", "file", "paths", "0", "weight"]) == "prompts.paths.0.weight"
    assert [variants for variants, _ in fields_at(["objective"])["beta"]] == [["gkd", "gold", "bytes", "bpm"], ["alm"]]
    assert list(fields_at(["objective", "gold"]))[:3] == ["name", "beta", "merge"]


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("seed", "integer, 0 or more, less than 2147483648"),
        ("rollout.on_policy", "number, 0 to 1"),
        ("train.schedule", "'cosine' or 'linear' or 'constant'"),
        ("train.adam_betas", "list of 2: number, 0 or more, less than 1"),
        ("student.lora", "table"),
        ("student.lora.targets", "list: string or string"),
        ("student.urls", "list: string"),
        ("prompts.paths", "list: table"),
        ("student.chat_template_kwargs", "table"),
        ("compute.exclusive", "boolean"),
    ],
)
def test_types_in_words(place: str, words: str) -> None:
    *table, name = place.split(".")
    assert word_type(fields_at(table)[name][0][1]) == words


def test_the_nearest() -> None:
    assert nearest("batchsize", ["batch_size", "epochs"]) == "batch_size"
    assert nearest("zebra", ["batch_size", "epochs"]) is None

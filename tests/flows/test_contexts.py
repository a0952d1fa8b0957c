"""Contexts per side: what each makes of a prompt, what it does not know, and that equal ones change nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from helpers import made, refused

from configs.load import load_recipe
from configs.models import Model
from tasks.engines.choose import release
from tasks.models.reference import CONTEXT, ModelRef, make_reference
from tasks.models.text import Side
from tasks.preflight import Sample, align_sample, roll_out_sample, score_sample
from tasks.rows.sources import split_prompts

TEMPLATE = (
    "<s>{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if not think %}ok {% endif %}{{ tone }}{% endif %}"
)
CONTEXTS: dict[str, Any] = {
    "system": "Say hello.",
    "template": "{word} world {prompt}",
    "chat_template": "other.jinja",
    "chat_template_kwargs": {"think": False, "tone": "hello"},
    "prefix": " world",
    "stop": ["<user>"],
}
MESSAGES = [{"role": "system", "content": "Hi."}, {"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp("model") / "model", 300, "hello hello world " * 5, context=128)


@pytest.fixture
def recipe(model, tmp_path) -> Callable[..., Path]:
    """A recipe whose model is its own teacher, with these contexts."""

    def write(student: dict[str, Any], teacher: dict[str, Any], objective: str = "gkd") -> Path:
        (tmp_path / "other.jinja").write_text(TEMPLATE)
        data = {
            "name": "contexts",
            "root": str(tmp_path / "runs"),
            "student": {"model": str(model), **student},
            "teacher": {"model": str(model), **teacher},
            "prompts": {"source": "reasoning-gym", "task": "spell_backward", "train": 16, "eval": 4},
            "rollout": {"prompts": 8, "max_new_tokens": 8},
            "score": {"k": 8},
            "objective": {"name": objective},
        }
        path = tmp_path / "contexts.toml"
        path.write_text(tomli_w.dumps(data))
        return path

    return write


def side_of(path: Path, role: str = "student") -> Side:
    config: Model = getattr(load_recipe(path), role)
    assert config.model is not None
    return Side(make_reference(config, config.model))


def test_what_a_side_reads(recipe):
    def read(**context: Any) -> str:
        side = side_of(recipe(context, {}))
        return side.tokenizer.decode(side.render(MESSAGES))

    assert read() == "<s><system>Hi.<end><user>hello<end><assistant>"
    assert read(system="Say it.") == "<s><system>Say it.<end><user>hello<end><assistant>"
    assert read(system="") == "<s><user>hello<end><assistant>"
    assert read(prefix=" world <end>") == "<s><system>Hi.<end><user>hello<end><assistant> world <end>"  # as text, see below
    assert read(chat_template="other.jinja") == "<s><system>Hi.<end><user>hello<end><assistant>ok "
    told = {"chat_template": "other.jinja", "chat_template_kwargs": {"think": True, "tone": "world"}}
    assert read(**told) == "<s><system>Hi.<end><user>hello<end><assistant>world"
    assert read(rendering="plain", system="A", prefix="B") == "A\nhello\nB"
    prefix = side_of(recipe({"prefix": " world <end>"}, {}))
    assert prefix.tokenizer.eos_token_id not in prefix.render(MESSAGES)[-3:]


def test_contexts_are_in_keys_only_where_they_are_set(recipe, tmp_path):
    identity = side_of(recipe({}, {})).ref.identity
    assert identity.keys() == {"digest", "rendering", "dtype", "attention"}
    assert ModelRef("a", "b").identity.keys() == identity.keys()
    for name in CONTEXT:
        other = side_of(recipe({name: CONTEXTS[name]}, {})).ref.identity
        assert other.keys() - identity.keys() == {name}
        json.dumps(other)
    assert side_of(recipe({"system": ""}, {})).ref.identity["system"] == ""
    before = side_of(recipe({"chat_template": "other.jinja"}, {})).ref.identity
    path = recipe({"chat_template": "other.jinja"}, {})
    (tmp_path / "other.jinja").write_text(TEMPLATE + " ")
    assert side_of(path).ref.identity != before  # its text, not its name


# opd and alm read log-probs, which are stored in float32: sampling and scoring round them in passes of other shapes. The
# others read the likeliest ids in half precision (MATHS.md §6).
@pytest.mark.parametrize(
    ("objective", "shared", "least", "most"),
    [
        *[("opd", True, 0, 1e-6), ("opd", False, 1e-3, 1), ("alm", True, 0, 1e-6)],
        *[("gkd", True, 0, 1e-4), ("gkd", False, 1e-3, 1)],
    ],
)
def test_equal_contexts_are_no_difference(recipe, objective, shared, least, most):
    """The student as its own teacher: the same prompts, the same scores bit for bit, and a loss of rounding."""
    path = recipe(CONTEXTS, CONTEXTS if shared else {}, objective)
    loaded = load_recipe(path)
    student, teacher = (side_of(path, role).ref for role in ("student", "teacher"))
    assert (student == teacher) == shared
    sample = Sample(loaded, split_prompts(loaded.prompts, 0)["train"].slice(0, 8), student, teacher)
    rollouts = roll_out_sample(sample)
    scores, own = (score_sample(sample, rollouts, ref) for ref in (teacher, student))
    prompts = [Side(teacher).render(*prompt) for prompt in sample.asked]
    assert (prompts == rollouts["prompt_token_ids"].to_pylist()) == shared
    assert scores.equals(own) == shared
    _, loss = align_sample(sample, rollouts, scores, teacher)
    release()
    assert least <= abs(loss) <= most


# `{file}` is a template's file.
REFUSED = [
    ({"chat_template": "nowhere.jinja"}, ["chat_template: ", "nowhere.jinja: cannot be read", "give a file"]),
    ({"chat_template": ""}, ["student.chat_template", "at least 1 character"]),
    ({"chat_template": "broken.jinja"}, ["chat_template: ", "broken.jinja: line 1 does not parse", "correct it"]),
    (
        {"chat_template_kwargs": {"thinking": True}},
        ["chat_template_kwargs: its chat template takes no thinking", "it reads none"],
    ),
    (
        {"chat_template": "other.jinja", "chat_template_kwargs": {"think": True, "thinking": True}},
        ["takes no thinking", "it reads think, tone"],
    ),
    ({"chat_template_kwargs": {"messages": []}}, ["takes no messages"]),
    ({"chat_template_kwargs": True}, ["student.chat_template_kwargs", "dictionary", "found True"]),
    ({"rendering": "plain", "chat_template": "other.jinja"}, ["chat_template is for rendering = 'chat'"]),
    ({"rendering": "plain", "chat_template_kwargs": {"a": 1}}, ["chat_template_kwargs is for rendering = 'chat'"]),
    ({"system": 3}, ["student.system", "valid string", "found 3"]),
    ({"prefix": 3}, ["student.prefix", "valid string", "found 3"]),
    ({"stop": ["\n"], "prefix": "a\nb"}, ["prefix: its tokenizer cannot spell 'a\\nb'"]),
]


@pytest.mark.parametrize(("context", "parts"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_a_side_does_not_know(potstill, recipe, tmp_path, context, parts):
    (tmp_path / "broken.jinja").write_text("{% for m in messages %}")
    refused(potstill("run", recipe(context, {})), *parts)
    assert not (tmp_path / "runs").exists()

"""The recipes in configs/: all of them load, and those for the hub's models hold on stand-ins with the same tokenizers."""

import shutil
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from helpers import CHECKOUT
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from configs.load import load_recipe
from tasks.gates.gate import prefix_name
from tasks.models.reference import ModelRef, make_reference
from tasks.preflight import examine
from tasks.rows.scorers import make_scorer
from tasks.rows.sources import split_prompts

sys.path.insert(0, str(CHECKOUT / "tests"))
import fetch

RECIPES = sorted((CHECKOUT / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_load(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert path.read_text().splitlines()[1].startswith("# ")


def stand_in(tokenizer: str, folder: Path) -> Path:
    """A model of a few thousand weights a layer with a real tokenizer and its chat template."""
    shutil.copytree(fetch.MODELS / tokenizer, folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(loaded), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=4096, eos_token_id=loaded.eos_token_id, bos_token_id=loaded.bos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "student"),
    [("countdown", "llama3"), ("gsm8k", "smollm2"), ("self-distillation", "qwen3"), ("two-teachers", "smollm2")],
)
def test_recipes_of_hub_models_on_stand_ins(tmp_path, name, student):
    """Untrained weights know nothing and stop nowhere; all that depends on tokenizers, templates, room and engines holds."""
    fetch.main(["tokenizers"])
    changes = ["rollout.max_new_tokens=24", "prompts.train=64", "prompts.eval=16", "rollout.prompts=8", f"root={tmp_path}"]
    recipe = load_recipe(CHECKOUT / "configs" / f"{name}.toml", changes)

    def ref(config: Any, tokenizer: str) -> ModelRef:
        return make_reference(config, str(stand_in(tokenizer, tmp_path / tokenizer)))

    known = "deepseek_v3" if student == "smollm2" else student  # SmolLM2 has its tokenizer with its weights: `make models`
    made = ref(recipe.student, known)
    teachers = {}
    for (of, view), tokenizer in zip(recipe.by_teacher().items(), ("qwen3", "llama3")):
        assert view.teacher is not None
        own = view.self_taught
        teachers[of] = make_reference(view.teacher, made.path) if own else ref(view.teacher, tokenizer)
    gates = {gate.name: gate for gate in examine(recipe, 8, student=made, teachers=teachers)}
    untrained = ("student: chance", "teacher: chance", "truncated")
    assert {name for name, gate in gates.items() if gate.ok is False} <= {
        prefix_name(of, gate) for of in teachers for gate in untrained
    }
    for of, role in product(teachers, ("student", "teacher")):
        assert gates[prefix_name(of, f"{role}: template")].ok
        assert gates[prefix_name(of, f"{role}: spelled")].value == 1


def test_countdown_grades_a_model_that_reasons_first():
    """Its template asks for the answer in a form that the task's own scorer finds in a text."""
    recipe = load_recipe(CHECKOUT / "configs" / "countdown.toml", ["prompts.train=2", "prompts.eval=2"])
    row = split_prompts(recipe.prompts, 0)["eval"].to_pylist()[0]
    assert "<answer>" in row["messages"][-1]["content"]
    grade = make_scorer(recipe.evaluate.scorer)
    assert grade(f"First I try a product, then 1 + 2. <answer>{row['reference']}</answer>", row) == 1
    assert grade("First I try a product, then 1 + 2. <answer>1 + 2</answer>", row) < 1


@pytest.mark.parametrize(
    ("reference", "text", "right"),
    [
        ("42", "40 + 2 = 42, so the answer is \\boxed{42}.", True),
        ("42", "#### 42", True),
        ("1234", "She has $1,234 left.", True),
        ("0.5", "\\boxed{\\frac{1}{2}}", True),
        ("42", "The answer is 41.", False),
        ("42", "", False),
        ("42", "no idea", False),
    ],
)
def test_the_math_scorer(reference, text, right):
    assert make_scorer("math")(text, {"reference": reference, "metadata": None}) == float(right)

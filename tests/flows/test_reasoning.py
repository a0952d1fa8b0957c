"""`reasoning_content` of an answer in data: a reference has it where the student's template writes it, else it is counted."""

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from helpers import made

from configs.load import validate_recipe
from configs.rollout import Rollout
from tasks.models.reference import ModelRef
from tasks.models.text import Side
from tasks.rollout import make_rollouts
from tasks.rows.plan import Row
from tasks.rows.sources import deal_prompts

THINKS = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if m['role'] == 'assistant' and m['reasoning_content'] %}"
    "{{ '[' + m['reasoning_content'] + '] ' }}{% endif %}{{ m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SILENT = THINKS.replace("and m['reasoning_content']", "and false")


def table(tmp_path: Path) -> pa.Table:
    answer = {"role": "assistant", "content": "hello", "reasoning_content": "what is it"}
    asked = [
        [{"role": "user", "content": f"what {i}"}, answer if i % 2 else {"role": "assistant", "content": "hello"}]
        for i in range(20)
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in asked))
    data = {
        "name": "r",
        "student": {"model": "s"},
        "prompts": {"source": "file", "path": str(tmp_path / "p.jsonl"), "train": 16, "eval": 4},
        "rollout": {"on_policy": 0.0},
        "objective": {"name": "sft"},
    }
    recipe = validate_recipe(data, "r")
    return deal_prompts(recipe.prompts, recipe.seed).tables()["train"]


@pytest.mark.parametrize("template", [THINKS, SILENT, None], ids=["written", "left-out", "plain"])
def test_a_reference_with_its_reasoning(tmp_path: Path, template: str | None, caplog: Any) -> None:
    folder = made(tmp_path / "model", 300, "what is it hello [] 1 2 3 " * 5)
    ref = ModelRef(str(folder), "d", rendering="chat" if template else "plain", chat_template=template)
    prompts = table(tmp_path)
    assert prompts["reference"].to_pylist() == ["hello"] * 16
    rows = [Row(i, 0, "reference", i, f"r{i}") for i in range(16)]
    with caplog.at_level(logging.WARNING):
        made_of = make_rollouts(rows, prompts, Rollout(max_new_tokens=40), 1, ref, [])
    thought = ["reasoning_content" in metadata for metadata in prompts["metadata"].to_pylist()]
    assert 0 < sum(thought) < 16
    wanted = ["[what is it] hello" if t and template == THINKS else "hello" for t in thought]
    assert made_of["text"].to_pylist() == wanted
    assert set(made_of["finish_reason"].to_pylist()) == {"stop"}
    side = Side(ref)
    for ids, text in zip(made_of["token_ids"].to_pylist(), wanted, strict=True):
        assert side.tokenizer.decode(ids) == text + "<end>"
    said = f"{sum(thought)} references have a reasoning_content"
    assert (said in caplog.text) == (template != THINKS)

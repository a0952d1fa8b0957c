"""Stops of six real tokenizers: of base and instruct variants, with and without a generation config."""

import json
from pathlib import Path

import fetch
import pytest

from tasks.models.reference import ModelRef
from tasks.models.text import Side

# What ends a text, what ends a turn: from the families' own model cards. GPT-OSS and Llama 2 come without their templates.
ENDS = {
    "qwen3": ("<|endoftext|>", "<|im_end|>"),
    "llama3": ("<|end_of_text|>", "<|eot_id|>"),
    "gemma3": ("<eos>", "<end_of_turn>"),
    "deepseek_v3": ("<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "gptoss": ("<|endoftext|>", "<|return|>"),
    "llama2": ("</s>", "</s>"),
}
TEMPLATES = {
    "gptoss": "{% for m in messages %}{% if m['role'] == 'assistant' %}<|start|>assistant<|channel|>final<|message|>"
    "{{ m['content'] }}{{ '<|return|>' if loop.last else '<|end|>' }}{% else %}<|start|>{{ m['role'] }}<|message|>"
    "{{ m['content'] }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}",
    "llama2": "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
}


@pytest.fixture(scope="module", autouse=True)
def _fetched() -> None:
    fetch.main(["tokenizers"])


def folder_of(name: str, place: Path, *, end: str, config: list[str] | None, generation: list[str] | None) -> ModelRef:
    """A tokenizer's folder with this end token, and these in config.json and generation_config.json (None: no such file)."""
    source = fetch.MODELS / name
    (place / "tokenizer.json").symlink_to((source / "tokenizer.json").resolve())
    data = json.loads((source / "tokenizer_config.json").read_text())
    data |= {"eos_token": end} | ({"chat_template": TEMPLATES[name]} if name in TEMPLATES else {})
    (place / "tokenizer_config.json").write_text(json.dumps(data))
    known = {token["content"]: token["id"] for token in json.loads((source / "tokenizer.json").read_text())["added_tokens"]}
    for file, tokens in (("config.json", config), ("generation_config.json", generation)):
        if tokens is not None:
            ids = [known[token] for token in tokens]
            (place / file).write_text(json.dumps({"model_type": "llama", "vocab_size": 300_000, "eos_token_id": ids}))
    return ModelRef(str(place), str(place))


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("named", ["nowhere", "config", "generation", "both"])
@pytest.mark.parametrize("variant", ["base", "instruct"])
def test_texts_and_turns_end(tmp_path: Path, name: str, named: str, variant: str) -> None:
    text, turn = ENDS[name]
    own = text if variant == "base" else turn
    listed = [text, turn] if named in ("config", "both") else [own]
    ref = folder_of(
        name, tmp_path, end=own, config=listed, generation=[text, turn] if named in ("generation", "both") else None
    )
    side = Side(ref)
    stops = side.tokenizer.convert_ids_to_tokens(side.stop_ids)
    assert stops[0] == own  # as today, whatever else is found
    assert set(stops) == ({text, turn} if variant == "base" or named != "nowhere" else {turn})
    assert side.tokenizer.convert_ids_to_tokens(side.turn_end) == turn
    assert {side.beta.roles[i] for i in side.stop_ids} == {"stop"}
    assert len(stops) == len(set(stops))

"""Stops and prompts of six real tokenizers: base and instruct variants, with and without a generation config."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import fetch
import jinja2
import pytest
from tokenizers import Tokenizer

from configs.errors import BadInput
from tasks.gates.rendering import find_lost
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
    "llama2": "{% if messages[0]['role'] == 'system' %}{% set asked = messages[1:] %}{% set system = '<<SYS>>\\n' + "
    "messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{% else %}{% set asked = messages %}{% set system = '' %}{% endif %}"
    "{% for m in asked %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + "
    "m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
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


SYSTEM = {"role": "system", "content": "Be as brief as you can be."}
TURNS = [
    {"role": "user", "content": "Hello, 世界! How are you today?"},
    {"role": "assistant", "content": "I am as well as ever, thank you."},
    {"role": "user", "content": "  And tomorrow?\n"},
]
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "of a city", "parameters": {"type": "object"}}}
]
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
CALLED = [
    {"role": "user", "content": "What is the weather in Oslo?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "get_weather", "content": "-3 C, and snow"},
]
# Templates that leave out what they do not know, or refuse it.
WITHOUT_TOOLS = {name: "its tools" for name in ENDS if name != "qwen3"}
WITHOUT_CALLS = dict.fromkeys(("llama3", "deepseek_v3", "gptoss", "llama2"), "the tool calls of its assistant message")
WITHOUT_CALLS["gemma3"] = "must alternate"


def chat_side(name: str, **context: object) -> Side:
    template = {"chat_template": TEMPLATES[name]} if name in TEMPLATES else {}
    return Side(ModelRef(str(fetch.MODELS / name), name, **template, **context))  # type: ignore[arg-type]


class ByHand:
    """A template applied by jinja2, and its text encoded by `tokenizers`, without Potstill and transformers."""

    def __init__(self, name: str):
        written = json.loads((fetch.MODELS / name / "tokenizer_config.json").read_text())
        self.tokens = {key: self.text_of(written.get(key)) for key in ("bos_token", "eos_token")}
        environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
        environment.globals["raise_exception"] = self.refuse
        environment.globals["strftime_now"] = lambda style: datetime.now().strftime(style)
        self.template = environment.from_string(written.get("chat_template") or TEMPLATES[name])
        self.tokenizer = Tokenizer.from_file(str(fetch.MODELS / name / "tokenizer.json"))

    @staticmethod
    def text_of(token: Any) -> str:
        return token["content"] if isinstance(token, dict) else token or ""

    @staticmethod
    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def write(self, messages: list[dict[str, Any]], **told: Any) -> str:
        return self.template.render(messages=messages, add_generation_prompt=True, **self.tokens, **told)

    def render(self, messages: list[dict[str, Any]], **told: Any) -> list[int]:
        return list(self.tokenizer.encode(self.write(messages, **told), add_special_tokens=False).ids)


@pytest.mark.parametrize("name", ENDS)
def test_prompts_are_what_the_template_says(name: str) -> None:
    """Against the template applied by hand: system, several turns, tools, a prefix; nothing of a message is lost."""
    side, hand = chat_side(name), ByHand(name)
    for messages in ([TURNS[0]], TURNS, [SYSTEM, *TURNS]):
        assert side.write(messages) == hand.write(messages)
        assert side.render(messages) == hand.render(messages)
        assert find_lost(side, messages, None) is None
        assert side.render([{**m, "tool_calls": None} for m in messages]) == hand.render(messages)  # as a table's column has it
        prefix = "<answer>\n 42"
        begun = chat_side(name, prefix=prefix).render(messages)
        assert begun[: len(hand.render(messages))] == hand.render(messages)
        assert side.beta.join(begun[len(hand.render(messages)) :]) == prefix.encode()
    assert chat_side(name, system=SYSTEM["content"]).render(TURNS) == hand.render([SYSTEM, *TURNS])
    assert chat_side(name, system="").render([SYSTEM, *TURNS]) == hand.render(TURNS)
    assert side.render(TURNS, TOOLS) == hand.render(TURNS, tools=TOOLS)
    assert chat_side(name, prefix="So:").render(TURNS, TOOLS)[: len(side.render(TURNS, TOOLS))] == side.render(TURNS, TOOLS)
    lost = find_lost(side, TURNS, TOOLS)
    assert lost is None if name not in WITHOUT_TOOLS else lost.startswith(WITHOUT_TOOLS[name])
    try:
        said = find_lost(side, CALLED, None)
        assert side.write(CALLED) == hand.write(CALLED)
    except BadInput as error:
        said = str(error)
        with pytest.raises(jinja2.TemplateError, match="alternate"):
            hand.write(CALLED)
    assert said is None if name not in WITHOUT_CALLS else WITHOUT_CALLS[name] in str(said)


def test_a_thinking_switch() -> None:
    """Qwen 3's template closes an empty thought where it is told not to think."""
    messages = [TURNS[0]]
    side = chat_side("qwen3", chat_template_kwargs='{"enable_thinking": false}')
    side.check()
    wanted = ByHand("qwen3").write(messages, enable_thinking=False)
    assert side.write(messages) == wanted
    assert wanted.endswith("<think>\n\n</think>\n\n")
    assert not chat_side("qwen3").write(messages).endswith("</think>\n\n")
    with pytest.raises(BadInput, match=r"takes no thinking; it reads .*enable_thinking"):
        chat_side("qwen3", chat_template_kwargs='{"thinking": false}').check()

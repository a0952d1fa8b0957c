"""How prompts are rendered, before anything runs: what a template refuses, drops, closes, or leaves no room for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import tomli_w
from helpers import made, refused
from transformers import AutoTokenizer

from configs.errors import BadInput
from configs.load import load_recipe, select_content
from configs.rollout import Rollout
from flows.preflight import preflight
from storage.artifacts import read_table
from storage.store import Run
from tasks.engines.choose import get_engine, release
from tasks.gates.rendering import find_lost, refuse_rendering, rendering_gates
from tasks.models.reference import ModelRef, make_reference
from tasks.models.text import Side
from tasks.prompts import make_prompts
from tasks.rollout import make_rollouts
from tasks.rows.messages import load_prompts, store_messages
from tasks.rows.plan import Row
from tasks.score import score_rows
from tasks.signals import make_signal
from tasks.tokens.markers import ONE_TOKENIZER

TURN = "{{ '<' + m['role'] + '>' + m['content'] + '<end>' }}"
OPEN = "{% if add_generation_prompt %}<assistant>{% endif %}"
RAISES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
DROPS = "{% for m in messages if m['role'] != 'system' %}" + TURN + "{% endfor %}" + OPEN
ALTERNATES = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}" + TURN + "{% endfor %}" + OPEN
)
TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{% if m['role'] == 'tool' %}"
    "{{ '<user>' + (m['content'] | tojson) + '<end>' }}{% else %}" + TURN + "{% if m['tool_calls'] %}"
    "{{ m['tool_calls'] | tojson }}{% endif %}{% endif %}{% endfor %}" + OPEN
)
CLOSED = "{% for m in messages %}" + TURN + "{% endfor %}"
ENDLESS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}" + OPEN

SYSTEM = {"role": "system", "content": "Answer in French."}
USER = {"role": "user", "content": "what is hello?"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Callable[[str], Path]:
    """A model with this chat template."""
    known: dict[str, Path] = {}

    def make(template: str) -> Path:
        if template not in known:
            known[template] = folder = made(tmp_path_factory.mktemp("model") / "model", 300, "what is hello? hello " * 5)
            if template:
                (folder / "chat_template.jinja").write_text(template)
        return known[template]

    return make


@pytest.fixture
def recipe(model, tmp_path) -> Callable[..., Path]:
    def write(rows: list[dict[str, Any]], teacher: str = "", **rollout: Any) -> Path:
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {
            "name": "rendering",
            "root": str(tmp_path / "runs"),
            "student": {"model": str(model(""))},
            "teacher": {"model": str(model(teacher))},
            "prompts": {"source": "file", "path": "prompts.jsonl", "train": 24, "eval": 8},
            "rollout": {"prompts": 4, "max_new_tokens": 4} | rollout,
            "objective": {"name": "bytes"},
        }
        path = tmp_path / "rendering.toml"
        path.write_text(tomli_w.dumps(data))
        return path

    return write


def asked(*before: dict[str, str], count: int = 200) -> list[dict[str, Any]]:
    """Enough rows that both splits are full, each a user's message behind some others."""
    return [{"messages": [*before, {"role": "user", "content": f"what is hello {i}?"}]} for i in range(count)]


# -- what a template refuses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "preflight"])
@pytest.mark.parametrize(
    ("template", "before", "parts"),
    [
        (RAISES + DROPS, [SYSTEM], ["'System role not supported'", "no system role", "first user message", "'plain'"]),
        (ALTERNATES, [USER], ["'Conversation roles must alternate user/assistant'", "in turn", "merge", "'plain'"]),
        (ALTERNATES, [{"role": "tool", "content": "3 C"}], ["no role for tools", "leave such rows out"]),
        ("{{ messages[7]['content'] }}", [], ["give messages that it takes"]),
        ("{{ messages[0]['content'] + 3 }}", [], ["give messages that it takes"]),
        ("{% for i in range(100000000) %}x{% endfor %}", [], ["give messages that it takes"]),
    ],
)
def test_what_a_template_refuses(potstill, recipe, model, tmp_path, command, template, before, parts):
    """One message, with the side, the row, what the template said and what mends it; nothing is written."""
    ended = potstill(command, recipe(asked(*before), template))
    refused(ended, "teacher, training prompt 1 ('what is hello ", f"{model(template)}: its chat template says", *parts)
    assert not (tmp_path / "runs").exists()


def test_one_row_of_many_is_found(potstill, recipe):
    rows = [*asked(count=30), {"messages": [USER, USER]}, *asked(count=60)[30:]]
    refused(
        potstill("run", recipe(rows, ALTERNATES), "--set", "prompts.train=64"),
        "prompt ",
        "('what is hello?')",
        "must alternate",
    )


# -- what a template drops ---------------------------------------------------------------------------------------------


def test_a_dropped_system_message(potstill, recipe, tmp_path):
    path = recipe(asked(SYSTEM), DROPS)
    refused(potstill("run", path), "teacher: kept: 32 prompts", "its system message is not in the text ('Answer in French.')")
    assert not (tmp_path / "runs").exists()
    gates = {row["gate"]: row for row in preflight(str(path), 4)}
    assert gates["student: kept"]["result"] == "ok"
    assert gates["teacher: kept"]["result"] == "BREACHED"
    assert "training prompt 1 ('what is hello" in gates["teacher: kept"]["detail"]


TOOL = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "get_weather"}}]}
RESULT = {"role": "tool", "content": '-3 "C", snow'}


@pytest.mark.parametrize(
    ("template", "messages", "tools", "lost"),
    [
        (TOOLS, [SYSTEM, USER, CALL, RESULT], TOOL, None),
        (TOOLS, [SYSTEM, USER], None, None),
        (TOOLS, [{"role": "system", "content": "i"}, USER], None, None),
        ("", [USER], TOOL, "its tools are not"),
        ("", [USER, CALL, RESULT], None, "the tool calls of its assistant message"),
        (DROPS, [{"role": "system", "content": "h"}, USER], None, "its system message"),  # a letter that is there anyway
        (DROPS, [{"role": "system", "content": " \n"}, USER], None, None),
        (DROPS, [USER], None, None),
        ("{{ messages[-1]['content'] }}", [USER, {"role": "assistant", "content": "yes"}, USER], None, "its user message"),
        ("{% for m in messages %}{{ m['content'].split('</think>')[-1] }}{% endfor %}",
         [USER, {"role": "assistant", "content": "<think>a long thought of it</think>yes"}, USER], None, None),
    ],
)  # fmt: skip
def test_what_a_template_drops(model, template, messages, tools, lost):
    side = Side(ModelRef(str(model(template)), ""))
    found = find_lost(side, messages, tools)
    assert (found is None) == (lost is None), found
    assert lost is None or found.startswith(lost)


def test_tools_and_calls_reach_the_template(model):
    side = Side(ModelRef(str(model(TOOLS)), ""))
    wanted = side.tokenizer.apply_chat_template([USER, CALL, RESULT], tools=TOOL, add_generation_prompt=True, tokenize=False)
    assert side.write([{**USER, "tool_calls": None}, CALL, RESULT], TOOL) == wanted
    assert side.render([USER, CALL, RESULT], TOOL) == side.tokenizer(wanted, add_special_tokens=False)["input_ids"]
    rows = [{"messages": store_messages([USER, CALL, RESULT]), "tools": json.dumps(TOOL), "split": "train"}]
    assert {gate.name: gate.ok for gate in rendering_gates("teacher", side.ref, rows, 4)}["teacher: kept"]
    plain = ModelRef(str(model(TOOLS)), "", rendering="plain")
    (kept, *_) = rendering_gates("teacher", plain, rows, 4)
    assert (kept.value, kept.ok) == (1, False)


def test_tools_and_calls_reach_what_is_sampled(model, monkeypatch):
    """The stages render a row of the table with its calls and tools, as the gates do."""
    monkeypatch.setattr("tasks.gates.rendering.context_of", lambda ref: None)  # it is longer than this small model takes
    ref = ModelRef(str(model(TOOLS)), "0")
    row = {"prompt_id": "p", "messages": store_messages([USER, CALL, RESULT]), "reference": "yes", "tools": json.dumps(TOOL)}
    rows = [Row(0, 0, "reference", 1, "r")]
    table = make_rollouts(rows, pa.Table.from_pylist([row]), Rollout(max_new_tokens=4), 1, ref, [])
    assert table["prompt_token_ids"].to_pylist() == [Side(ref).render([USER, CALL, RESULT], TOOL)]


# -- where a prompt ends -----------------------------------------------------------------------------------------------


def test_a_prompt_that_ends_in_a_stop(potstill, recipe):
    path = recipe(asked(), CLOSED)
    refused(potstill("run", path), "teacher: closed: 32 prompts", "before the answer begins", "correct its chat template")
    gates = {row["gate"]: row["result"] for row in preflight(str(path), 4)}
    assert (gates["student: closed"], gates["teacher: closed"]) == ("ok", "BREACHED")


def test_a_line_break_that_is_a_stop_closes_no_prompt(model):
    ref = ModelRef(str(model("")), "", rendering="plain", stop=("\n",))
    rows = [{"messages": [USER], "split": "train"}]
    assert {gate.name: gate.ok for gate in rendering_gates("student", ref, rows, 4)}["student: closed"]


def test_a_turn_that_never_ends(recipe):
    gates = {row["gate"]: row for row in preflight(str(recipe(asked(), ENDLESS)), 4)}
    assert gates["teacher: stops"]["result"] == "BREACHED"
    assert gates["teacher: stops"]["detail"] == "no token behind an assistant's turn in its template; it has <end>"
    assert gates["student: stops"]["result"] == "ok"
    assert gates["student: stops"]["detail"] == "<end>; a turn of its template ends in <end>"


def test_preflight_shows_what_each_side_reads(potstill, recipe):
    ended = potstill("preflight", recipe(asked({"role": "user", "content": "a\x1b[31m b"}), ENDLESS), "--prompts", 4)
    assert "what the student reads:\n<s><user>a\\x1b[31m b<end><user>what is hello " in ended.err
    assert "what the teacher reads:\nuser: a\\x1b[31m b\nuser: what is hello " in ended.err
    assert "<end><assistant>\n" in ended.err
    assert ended.err.count("reads:") == 4
    assert "\x1b" not in ended.err


# -- room --------------------------------------------------------------------------------------------------------------


def test_prompts_that_are_too_long(potstill, recipe, model, tmp_path):
    """Every prompt is looked at, not some: the longest is the last of the file."""
    rows = [*asked(count=30), {"prompt": "hello " * 90}]
    path = recipe(rows)
    ended = potstill("run", path)
    tokenizer = AutoTokenizer.from_pretrained(model(""))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello " * 90}], add_generation_prompt=True, tokenize=False
    )
    longest = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    message = ended.err[ended.err.index("potstill: ") :]
    assert ended.status == 2, ended.err
    assert f"student: room: {longest + 4} tokens (longest prompt {longest} tokens, and rollout.max_new_tokens = 4" in message
    assert "too long: 1 of " in message
    assert "at most 64 tokens is allowed; shorten the prompts, lower rollout.max_new_tokens" in message
    assert not (tmp_path / "runs").exists()


def test_prompts_that_nobody_had_time_to_look_at(model, monkeypatch):
    """Of a large file the start looks at as many prompts as ten seconds allow: the stages hold every one that they use."""
    ref = ModelRef(str(model("")), "0")
    row = {"prompt_id": "p", "messages": [{"role": "user", "content": "hello " * 90}], "reference": "yes", "split": "train"}
    monkeypatch.setattr("tasks.gates.rendering.SECONDS", -1.0)
    assert list(rendering_gates("student", ref, [row], 4)) == []
    with pytest.raises(BadInput, match=r"student: room: .* tokens .*too long: 1 of 1 prompts.* at most 64 tokens is allowed"):
        make_rollouts([Row(0, 0, "student", 1, "r")], pa.Table.from_pylist([row]), Rollout(max_new_tokens=4), 1, ref, [])
    side, prompts = Side(ref), {"p": load_prompts([row])[0]}
    ids = side.encoder.encode(["hello"])[0]
    given = [{"rollout_id": "r", "prompt_id": "p", "text": "hello", "finish_reason": "stop", "token_ids": ids}]
    with pytest.raises(BadInput, match=r"teacher: room: a prompt with its answer has \d+ tokens, and .* has room for 64"):
        score_rows(given, prompts, get_engine(ref), make_signal("sampled"), ONE_TOKENIZER, student=side, teacher=side)
    release()


# -- what is left out --------------------------------------------------------------------------------------------------

UNUSABLE: list[dict[str, Any]] = [
    {"messages": [USER, USER]},
    {"messages": [USER], "tools": TOOL},
    {"messages": [USER], "reference": ["a", "list"]},
    {"messages": "no list"},
    {"messages": [{"role": "user", "content": "hello " * 90}]},
]
WHY = {
    "refused: by a chat template": (1, "teacher: {model}: its chat template says 'Conversation roles must alternate"),
    "refused: not rendered whole": (1, "student: its tools are not in the text"),
    "refused: cannot be read": (2, "row 6: `reference` is a list"),
    "refused: too long for a context": (1, "student: "),
}


def test_rows_that_cannot_be_used_are_left_out_by_reason(potstill, recipe, model, tmp_path, caplog):
    """By default they end the command; with `leave_out` they are said, counted and stored, and the run goes on without them."""
    good = asked(count=20)
    path = recipe([*good[:3], *UNUSABLE[:3], *good[3:], *UNUSABLE[3:]], ALTERNATES)
    refused(potstill("run", path), "row 6: `reference` is a list", "; and 1 more of 25 rows cannot be read")
    assert not (tmp_path / "runs").exists()

    loaded = load_recipe(path, ("prompts.unusable=leave_out", "prompts.train=40"))
    sides = {
        role: make_reference(config, config.model) for role in ("student", "teacher") for config in [getattr(loaded, role)]
    }
    refuse_rendering(loaded, sides)
    with caplog.at_level("INFO", "potstill"):
        made = make_prompts.fn(loaded, sides)
    account = {
        row["outcome"]: row["rows"] for row in read_table(Run(loaded.root, loaded.name).find("accounts/prompts")).to_pylist()
    }
    assert {outcome: rows for outcome, rows in account.items() if outcome.startswith("refused")} == {
        outcome: rows for outcome, (rows, _) in WHY.items()
    }
    assert sum(account.values()) == 25
    used = read_table(made.train).num_rows + read_table(made.eval).num_rows
    assert used == account["to train on"] + account["held out"] == 20
    for outcome, (_, why) in WHY.items():
        (line,) = [
            r.message for r in caplog.records if r.message.startswith(f"prompts.path: {outcome}, as the first of them: ")
        ]
        assert why.format(model=model(ALTERNATES)) in line
    assert any(
        "25 rows: 17 to train on, 3 held out, 2 refused: cannot be read, 1 refused: by a" in r.message for r in caplog.records
    )


def test_nothing_is_left(potstill, recipe, tmp_path):
    path = recipe(UNUSABLE)
    ended = potstill("run", path, "--set", "prompts.unusable=leave_out")
    refused(
        ended,
        f"prompts.path: {tmp_path / 'prompts.jsonl'}: only 1 distinct prompts can be used, none of them for train",
        "row 3",
    )
    assert not (tmp_path / "runs").exists()


def test_what_is_left_out_is_in_the_key_only_where_it_is_asked_for(recipe):
    """Prompts made before there was the option are used again; with it, other models or lengths make them anew."""
    loaded = load_recipe(recipe(asked(count=20)))
    assert "unusable" not in select_content(loaded, "prompts")
    keys = []
    for changes in ((), ("prompts.unusable=leave_out",), ("prompts.unusable=leave_out", "rollout.max_new_tokens=5")):
        other = load_recipe(recipe(asked(count=20)), changes)
        sides = {"student": make_reference(other.student, str(other.student.model))}
        make_prompts.fn(other, sides)
        keys.append(Run(other.root, other.name).manifest("prompts/train")["key"])
    assert len(set(keys)) == 3

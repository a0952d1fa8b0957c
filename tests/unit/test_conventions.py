"""The conventions of data sets: how each file is read, its prompts, its references, and the account of its rows."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from configs.errors import BadInput
from configs.prompts import FilePrompts
from tasks.rows.accounts import describe_account
from tasks.rows.conventions import CONVENTIONS
from tasks.rows.messages import load_messages
from tasks.rows.scorers import make_scorer
from tasks.rows.sources import check_prompts, deal_prompts, split_prompts

NUMBERS = range(2, 10)
TERSE = {"role": "system", "content": "Answer in two words."}
TOOLS = [{"type": "function", "function": {"name": "double", "parameters": {"type": "object", "required": ["n"]}}}]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def asked(number: int) -> str:
    return f"How many wheels have {number} bicycles?"


def answered(number: int) -> str:
    return f"{2 * number} wheels."


def called(number: int, arguments: Any) -> list[dict[str, Any]]:
    """A call of a tool and its result, as the data says it."""
    call = {"id": "c1", "type": "function", "function": {"name": "double", "arguments": arguments}}
    return [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "name": "double", "content": str(2 * number)},
    ]


def called_as_stored(number: int) -> list[dict[str, Any]]:
    call, result = called(number, {"n": number})
    return [{**call, "content": ""}, result]


# name -> what it is read as; a row from (number, question, answer); the prompt that is right
CASES: dict[str, tuple[str, Any, Any]] = {
    "Potstill": ("prompts", lambda n, q, a: {"prompt": q, "reference": a}, lambda n, q: [user(q)]),
    "Potstill's messages": (
        "chat messages",
        lambda n, q, a: {"messages": [TERSE, user(q)], "reference": a},
        lambda n, q: [TERSE, user(q)],
    ),
    "chat with its answer": (
        "chat messages",
        lambda n, q, a: {"messages": [TERSE, user(q), assistant(a)]},
        lambda n, q: [TERSE, user(q)],
    ),
    "several turns": (
        "chat messages",
        lambda n, q, a: {"messages": [user(f"Hello {n}"), assistant("Yes?"), user(q), assistant(a)]},
        lambda n, q: [user(f"Hello {n}"), assistant("Yes?"), user(q)],
    ),
    "OpenAI, typed": (
        "chat messages",
        lambda n, q, a: {
            "messages": [
                {"role": role, "content": [{"type": "text", "text": t}]} for role, t in (("user", q), ("assistant", a))
            ]
        },
        lambda n, q: [user(q)],
    ),
    "OpenAI, tools": (
        "chat messages",
        lambda n, q, a: {"tools": TOOLS, "messages": [user(q), *called(n, json.dumps({"n": n})), assistant(a)]},
        lambda n, q: [user(q), *called_as_stored(n)],
    ),
    "TRL, text": ("TRL", lambda n, q, a: {"prompt": q, "completion": a}, lambda n, q: [user(q)]),
    "TRL, conversational": (
        "TRL",
        lambda n, q, a: {"prompt": [TERSE, user(q)], "completion": [assistant(a)]},
        lambda n, q: [TERSE, user(q)],
    ),
    "TRL, turns in the completion": (
        "TRL",
        lambda n, q, a: {"prompt": [user(q)], "completion": [*called(n, {"n": n}), assistant(a)]},
        lambda n, q: [user(q), *called_as_stored(n)],
    ),
    "verl": (
        "verl",
        lambda n, q, a: {
            "data_source": "bicycles",
            "prompt": [user(q)],
            "reward_model": {"style": "rule", "ground_truth": a},
            "extra_info": {"index": n},
        },
        lambda n, q: [user(q)],
    ),
    "ShareGPT": (
        "ShareGPT",
        lambda n, q, a: {
            "id": str(n),
            "conversations": [
                {"from": "system", "value": TERSE["content"]},
                {"from": "human", "value": q},
                {"from": "gpt", "value": a},
            ],
        },
        lambda n, q: [TERSE, user(q)],
    ),
    "ShareGPT, its system beside it": (
        "ShareGPT",
        lambda n, q, a: {
            "system": TERSE["content"],
            "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}],
        },
        lambda n, q: [TERSE, user(q)],
    ),
    "question and answer": ("question and answer", lambda n, q, a: {"question": q, "answer": a}, lambda n, q: [user(q)]),
    "Alpaca": (
        "Alpaca",
        lambda n, q, a: {"instruction": "Count.", "input": q, "output": a},
        lambda n, q: [user(f"Count.\n\n{q}")],
    ),
    "Alpaca, no input": ("Alpaca", lambda n, q, a: {"instruction": q, "input": "", "output": a}, lambda n, q: [user(q)]),
    # public shapes beyond the usual ones
    "Dolly": (
        "Dolly",
        lambda n, q, a: {"instruction": q, "context": "Bicycles have two.", "response": a, "category": "closed_qa"},
        lambda n, q: [user(f"{q}\n\nBicycles have two.")],
    ),
    "OpenOrca": (
        "OpenOrca",
        lambda n, q, a: {"id": f"flan.{n}", "system_prompt": TERSE["content"], "question": q, "response": a},
        lambda n, q: [TERSE, user(q)],
    ),
    "MATH": (
        "problem and solution",
        lambda n, q, a: {"problem": q, "level": "Level 1", "type": "Algebra", "solution": a},
        lambda n, q: [user(q)],
    ),
    "HelpSteer": (
        "prompt and response",
        lambda n, q, a: {"prompt": q, "response": a, "helpfulness": 4, "verbosity": 1},
        lambda n, q: [user(q)],
    ),
    "Nemotron": (
        "input and output",
        lambda n, q, a: {
            "input": [user(q)],
            "output": a,
            "category": "math",
            "license": "cc-by-4.0",
            "reasoning": "on",
            "generator": "DeepSeek-R1",
            "used_in_training": ["Ultra"],
            "version": "v1",
            "system_prompt": TERSE["content"],
        },
        lambda n, q: [TERSE, user(q)],
    ),
    "MetaMathQA": (
        "query and response",
        lambda n, q, a: {"type": "GSM_Rephrased", "query": q, "original_question": "Bicycles?", "response": a},
        lambda n, q: [user(q)],
    ),
    "UltraChat 200k": (
        "chat messages",
        lambda n, q, a: {
            "prompt": q,
            "prompt_id": f"{n:064d}",
            "messages": [user(q), assistant("Two?"), user("No."), assistant(a)],
        },
        lambda n, q: [user(q), assistant("Two?"), user("No.")],
    ),
    "UltraFeedback": (
        "preferences",
        lambda n, q, a: {
            "prompt": q,
            "chosen": [user(q), assistant(a)],
            "rejected": [user(q), assistant("None.")],
            "score_chosen": 8.5,
        },
        lambda n, q: [user(q)],
    ),
    "TRL, preferences": (
        "preferences",
        lambda n, q, a: {"prompt": [user(q)], "chosen": [assistant(a)], "rejected": [assistant("None.")]},
        lambda n, q: [user(q)],
    ),
}


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def from_file(path: Path, **changes: Any) -> FilePrompts:
    return FilePrompts(source="file", path=str(path), **{"eval": 2, **changes})


def read(path: Path, **changes: Any) -> list[dict[str, Any]]:
    tables = split_prompts(from_file(path, **changes), 0)
    return [row for table in tables.values() for row in table.to_pylist()]


def read_row(tmp_path: Path, row: Any, **changes: Any) -> dict[str, Any]:
    """How a row is read that another one, of the same columns, stands beside."""
    other = json.loads(json.dumps(row).replace("UNLIKE", "like"))
    rows = read(lines(tmp_path / "rows.jsonl", [row, other]), **changes)
    return next(found for found in rows if "UNLIKE" in str(found["messages"]))


def refuse(path: Path, **changes: Any) -> str:
    """What the check says; the stage must not disagree."""
    config = from_file(path, **changes)
    with pytest.raises(BadInput) as caught:
        check_prompts(config, 0)
    with pytest.raises(BadInput) as again:
        split_prompts(config, 0)
    assert str(again.value) == str(caught.value)
    return str(caught.value)


def refuse_row(tmp_path: Path, row: Any, **changes: Any) -> str:
    """What is said of a file that the row ends."""
    good = {"messages": [user("Fine?")]}
    return refuse(lines(tmp_path / "rows.jsonl", [good, row]), **changes)


# -- each convention ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", CASES)
def test_a_convention(tmp_path: Path, name: str, ending: str) -> None:
    title, row_of, prompt_of = CASES[name]
    rows = [row_of(n, asked(n), answered(n)) for n in NUMBERS]
    path = tmp_path / f"rows.{ending}"
    lines(path, rows) if ending == "jsonl" else pl.DataFrame(rows).write_parquet(path)
    split = deal_prompts(from_file(path), 0)
    told = describe_account("prompts.path", split.account().to_pylist())
    assert told == [f"prompts.path: {path}: read as {title}: 8 rows: 6 to train on, 2 held out"]

    found = {row.reference: row for row in (*split.train, *split.eval)}
    assert set(found) == {answered(n) for n in NUMBERS}
    for number in NUMBERS:
        assert found[answered(number)].messages == prompt_of(number, asked(number))
    stored = [row for table in split.tables().values() for row in table.to_pylist()]
    assert {row["reference"]: load_messages([row["messages"]])[0] for row in stored} == {
        answered(n): prompt_of(n, asked(n)) for n in NUMBERS
    }


def test_every_convention_has_a_case() -> None:
    titles = {title for title, _, _ in CASES.values()} | {"problem and answer", "prompt and answer", "prompt and solution"}
    assert titles == {convention.title for convention in CONVENTIONS}
    assert len({convention.name for convention in CONVENTIONS}) == len(CONVENTIONS)


def test_other_columns_are_metadata(tmp_path: Path) -> None:
    row = CASES["verl"][1](3, "UNLIKE", "a")
    assert json.loads(read_row(tmp_path, row)["metadata"]) == {"data_source": "bicycles", "extra_info": {"index": 3}}


def test_columns_of_tools_are_there_only_where_a_source_has_them(tmp_path: Path) -> None:
    plain = read_row(tmp_path, {"prompt": "UNLIKE"})
    assert set(plain) == {"prompt_id", "messages", "reference", "metadata", "split"}
    assert set(plain["messages"][0]) == {"role", "content"}
    row = read_row(tmp_path, CASES["OpenAI, tools"][1](3, "UNLIKE", "a"))
    assert json.loads(row["tools"]) == TOOLS
    assert json.loads(row["messages"][1]["tool_calls"])[0]["function"] == {"name": "double", "arguments": {"n": 3}}


def test_rows_that_differ_in_tools_alone_are_two(tmp_path: Path) -> None:
    rows = [{"messages": [user("Which?")], "tools": tools} for tools in (None, TOOLS, json.dumps(TOOLS), [*TOOLS, *TOOLS])]
    split = deal_prompts(from_file(lines(tmp_path / "rows.jsonl", rows)), 0)
    assert sorted(row["rows"] for row in split.account().to_pylist()) == [1, 1, 2]  # the third is the second, as text
    assert len(split.train) + len(split.eval) == 3


def test_an_answer_that_calls_a_tool_is_no_reference(tmp_path: Path) -> None:
    row = read_row(tmp_path, {"messages": [user("UNLIKE"), called(3, {"n": 3})[0]]})
    assert (row["reference"], row["messages"]) == (None, [user("UNLIKE")])


def test_thoughts_of_earlier_turns_are_kept(tmp_path: Path) -> None:
    turn = {"role": "assistant", "content": "b", "reasoning_content": "hm"}
    row = read_row(tmp_path, {"messages": [user("UNLIKE"), turn, user("c")]})
    assert load_messages([row["messages"]])[0][1] == turn


# -- what the recipe may say -------------------------------------------------------------------------------------------


def test_columns_that_are_named(tmp_path: Path) -> None:
    row = {"text": "UNLIKE", "gold": {"label": 3}, "topic": "x"}
    named = {"prompt": "text", "reference": "gold.label"}
    found = read_row(tmp_path, row, columns=named)
    assert (found["messages"], found["reference"]) == ([user("UNLIKE")], "3")
    conversation = {"talk": [user("UNLIKE"), assistant("b")]}
    assert read_row(tmp_path, conversation, columns={"prompt": "talk"})["reference"] == "b"
    assert read_row(tmp_path, {"prompt": "UNLIKE", "gold": 1.0}, columns={"reference": "gold"})["reference"] == "1"


def test_a_template_names_any_column(tmp_path: Path) -> None:
    row = {"title": "UNLIKE", "stars": 4, "reference": "good"}
    found = read_row(tmp_path, row, template="{title}: {stars} of 5?")
    assert (found["messages"], found["reference"]) == ([user("UNLIKE: 4 of 5?")], "good")
    found = read_row(tmp_path, {"question": "UNLIKE", "answer": "b", "unit": "cm"}, template="{question} In {unit}.")
    assert (found["messages"], found["reference"]) == ([user("UNLIKE In cm.")], "b")


def test_a_template_writes_the_last_message_of_the_user(tmp_path: Path) -> None:
    row = {"messages": [TERSE, user("a"), assistant("b"), user("UNLIKE"), assistant("d")]}
    found = read_row(tmp_path, row, template="{question} Think.")
    assert found["messages"] == [TERSE, user("a"), assistant("b"), user("UNLIKE Think.")]
    assert found["reference"] == "d"


@pytest.mark.parametrize("value", [None, ["a"], {"b": 1}])
def test_a_template_takes_texts_and_numbers(tmp_path: Path, value: Any) -> None:
    """A row without one is left out or ends the command, as any row that cannot be read."""
    rows = [{"prompt": "a", "unit": "cm"}, {"prompt": "b", "unit": value}, {"prompt": "c", "unit": "m"}]
    path = lines(tmp_path / "rows.jsonl", rows)
    told = refuse(path, template="{question} in {unit}")
    assert f"{path}: row 2: prompts.template: '{{question}} in {{unit}}' cannot be filled: " in told
    assert "fields here: prompt, question, unit" in told
    kept = read(path, template="{question} in {unit}", unusable="leave_out")
    assert {row["messages"][0]["content"] for row in kept} == {"a in cm", "c in m"}


def test_two_conventions_fit(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", [{"problem": f"q{i}", "solution": "2 + 2 = 4", "answer": "4"} for i in range(4)])
    told = refuse(path)
    assert "problem and solution (problem, solution) or problem and answer (answer, problem)" in told
    assert 'prompts.convention = "problem-solution" or "problem-answer"' in told
    assert {row["reference"] for row in read(path, convention="problem-answer")} == {"4"}
    assert {row["reference"] for row in read(path, columns={"prompt": "problem", "reference": "answer"})} == {"4"}


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"prompt": "a", "completion": "b", "reference": "c"}, ["prompts (prompt, reference)", "TRL (completion, prompt)"]),
        ({"prompt": "a", "messages": [user("a")], "chosen": "b", "rejected": "c"}, ["chat messages", "preferences"]),
        ({"conversations": [], "messages": [user("a")]}, ["chat messages", "ShareGPT"]),
        ({"question": "a", "answer": "b", "response": "c"}, ["question and answer", "OpenOrca"]),
        ({"prompt": "a", "answer": "b", "solution": "c"}, ["prompt and answer", "prompt and solution"]),
    ],
)
def test_columns_of_two_conventions(tmp_path: Path, row: dict, names: list[str]) -> None:
    told = refuse(lines(tmp_path / "rows.jsonl", [row]))
    assert all(name in told for name in names)
    assert "say which: prompts.convention = " in told


def test_messages_go_before_a_prompt(tmp_path: Path) -> None:
    """As it was before there were others; `prompt` is often the first message alone."""
    assert read_row(tmp_path, {"prompt": "a", "messages": [user("UNLIKE")]})["messages"] == [user("UNLIKE")]
    assert read_row(tmp_path, {"prompt": "UNLIKE", "messages": None})["messages"] == [user("UNLIKE")]


def test_an_answer_and_another_reference(tmp_path: Path) -> None:
    row = {"messages": [user("UNLIKE"), assistant("b")], "reference": "c"}
    told = refuse_row(tmp_path, row)
    assert "row 2: `messages` end with an answer of the assistant, and `reference` is another, 'c'" in told
    found = read_row(tmp_path, row, columns={"prompt": "messages", "reference": "reference"})
    assert (found["messages"], found["reference"]) == ([user("UNLIKE")], "c")
    assert read_row(tmp_path, {**row, "reference": "b"})["reference"] == "b"


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"convention": "sharegtp"}, ["prompts.convention = 'sharegtp' is not known; one of messages, prompt, trl"]),
        ({"convention": "verl"}, ["prompts.convention = 'verl' needs the columns prompt, reward_model", "['prompt']"]),
        ({"columns": {"prompt": "text"}}, ["prompts.columns.prompt = 'text': there is no such column", "['prompt']"]),
        ({"columns": {"reference": "a.b"}}, ["prompts.columns.reference = 'a.b': there is no such column"]),
    ],
)
def test_names_of_nothing(tmp_path: Path, changes: dict, parts: list[str]) -> None:
    path = lines(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    told = refuse(path, **changes)
    assert told.startswith(f"prompts.path: {path}: prompts.c")
    assert all(part in told for part in parts)


# -- references --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("four", "four"), (4, "4"), (-4, "-4"), (21.0, "21"), (0.5, "0.5"), (1e300, "1e+300"), (2**70, str(2**70)),
        (True, "true"), (False, "false"), (None, None), ("", None), (float("nan"), None),
    ],
)  # fmt: skip
def test_references_and_their_text(tmp_path: Path, value: Any, text: str | None) -> None:
    assert read_row(tmp_path, {"prompt": "UNLIKE", "reference": value})["reference"] == text
    assert read_row(tmp_path, {"question": "UNLIKE", "answer": value}, convention="question-answer")["reference"] == text


@pytest.mark.parametrize(
    ("value", "kind"),
    [(["1"], "a list, ['1']"), ([], "a list"), ({"wheels": 4}, "an object, {'wheels': 4}"), ([["a"], ["b"]], "a list")],
)
def test_references_that_are_none(tmp_path: Path, value: Any, kind: str) -> None:
    told = refuse(lines(tmp_path / "rows.jsonl", [{"prompt": "a", "reference": "b"}, {"prompt": "c", "reference": value}]))
    assert f"row 2: `reference` is {kind}" in told
    assert "a reference is text, a number, or true or false" in told
    assert "prompts.columns.reference" in told


def test_references_of_parquet(tmp_path: Path) -> None:
    """Types that JSON has not: decimals and short floats as they are written, binary data and dates refused."""
    path = tmp_path / "rows.parquet"
    texts = {
        "decimal": ("1.50", pl.Decimal(10, 2), "1.50"),
        "short": (0.1, pl.Float32, "0.1"),
        "cat": ("a", pl.Categorical, "a"),
    }
    for given, kind, text in texts.values():
        pl.DataFrame({"prompt": ["a", "b"], "reference": pl.Series([given] * 2).cast(kind)}).write_parquet(path)
        assert {row["reference"] for row in read(path)} == {text}
    pl.DataFrame({"prompt": ["a"], "reference": [b"four"]}).write_parquet(path)
    assert "row 1: `reference` is binary data, b'four'" in refuse(path)


# -- rows that cannot be read ------------------------------------------------------------------------------------------

CONVERSATION = "must be a list of {role, content}, both text"
BAD: list[tuple[Any, str]] = [
    ({"messages": "hello"}, CONVERSATION),
    ({"messages": []}, CONVERSATION),
    ({"messages": [TERSE]}, "`messages` has no message to answer before the answer (roles: system)"),
    ({"messages": [TERSE, assistant("b")]}, "`messages` has no message to answer"),
    ({"messages": [assistant("b")]}, "`messages` has no message to answer before the answer (roles: none)"),
    ({"messages": [user("  ")]}, "`messages` is empty"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "of type 'image_url'"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, CONVERSATION),
    ({"messages": [{"from": "narrator", "value": "x"}]}, "from 'narrator'; known: human, user, gpt"),
    ({"messages": [{"from": "human", "value": None}]}, "must be a list of {from, value}, both text"),
    ({"messages": [user("a"), {**assistant("b"), "tool_calls": "x"}]}, "tool calls that are no list of objects"),
    ({"messages": [user("a"), {**assistant("b"), "tool_calls": [{}]}]}, "a tool call without a function's name"),
    ({"messages": [{**user("a"), "name": 3}]}, "`messages.name` must be text, found 3"),
    ({"messages": [user("a")], "tools": "hammer"}, "`tools` must be a list of objects, or its JSON text"),
    ({"messages": [user("a")], "tools": ["hammer"]}, "`tools` must be a list of objects"),
]


@pytest.mark.parametrize(("row", "part"), BAD, ids=[json.dumps(row)[:60] for row, _ in BAD])
def test_a_row_that_cannot_be_read(tmp_path: Path, row: Any, part: str) -> None:
    told = refuse_row(tmp_path, row)
    assert f"prompts.path: {tmp_path}/rows.jsonl: row 2: " in told
    assert part in told


def test_rows_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "reference": value} for value in ("b", ["c"], {"d": 1}, 5, [])]
    told = refuse(lines(tmp_path / "rows.jsonl", rows))
    assert "row 2: `reference` is a list" in told
    assert told.endswith("; and 2 more of 5 rows cannot be read")


def test_a_column_of_the_name_that_tasks_use_is_no_task(tmp_path: Path) -> None:
    row = read_row(tmp_path, {"prompt": "UNLIKE", "reference": "b", "entry": "x"})
    assert make_scorer("task")("b", row) == 1.0


def test_columns_of_no_convention(tmp_path: Path) -> None:
    """Texts to go on from are no prompts: what is there, what was tried, and the two ways out are named."""
    told = refuse(lines(tmp_path / "rows.jsonl", [{"text": "Once upon a time", "url": "x"}]))
    assert "row 1: its columns ['text', 'url'] are of no convention that is known" in told
    assert "TRL: prompt, completion; verl: prompt, reward_model; ShareGPT: conversations" in told
    assert 'prompts.columns = { prompt = "…", reference = "…" }, or a prompts.template' in told


# Public data sets whose questions have parts in other columns: read without them, a question about nothing is left.
PARTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "MMLU": ({"question": "UNLIKE", "subject": "anatomy", "choices": ["a", "b"], "answer": 1}, "choices", "{choices[1]}"),
    "MMLU-Pro": ({"question": "UNLIKE", "options": ["a", "b"], "answer": "B", "answer_index": 1}, "options", "{options[1]}"),
    "BoolQ": ({"question": "UNLIKE", "passage": "b", "answer": True}, "passage", "{passage}"),
    "HotpotQA": ({"question": "UNLIKE", "answer": "yes", "context": {"title": ["b"]}}, "context", "{context[title][0]}"),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_question_is_not_parted_from_what_it_is_about(tmp_path: Path, name: str) -> None:
    row, column, field = PARTS[name]
    told = refuse(lines(tmp_path / "rows.jsonl", [row]))
    assert f"row 1: it has `{column}` beside `question`, and question and answer leaves that out" in told
    assert f'prompts.template = "{{question}} {{{column}}}"' in told
    assert 'prompts.convention = "question-answer"' in told
    found = read_row(tmp_path, row, template=f"{{question}} {field}")  # both ways out are ways out
    assert found["messages"] == [user("UNLIKE b")]
    assert read_row(tmp_path, row, convention="question-answer")["messages"] == [user("UNLIKE")]


# Public data sets in no convention of ours, as their cards have them, and what can be done.
@pytest.mark.parametrize(
    ("row", "part", "way_out"),
    [
        ({"id": "0", "data": ["How?", "So.", "Why?", "Thus."]}, "its columns ['data', 'id'] are of no convention", None),
        (
            {"message_id": "m", "parent_id": None, "text": "UNLIKE", "role": "prompter", "lang": "en", "message_tree_id": "m"},
            "'parent_id', 'role', 'text'] are of no convention",
            {"columns": {"prompt": "text"}},
        ),
        ({"prompt": {"text": "Hi", "role": "prompter", "replies": []}}, "`prompt` must be text or a list of messages", None),
        ({"source": "Airoboros", "conversation": [{"input": "How?", "output": "So."}]}, "of no convention", None),
        (
            {"conversation_id": "c", "model": "vicuna", "conversation": [user("UNLIKE"), assistant("So.")], "turn": 1},
            "'conversation', 'conversation_id'",
            {"columns": {"prompt": "conversation"}},
        ),
        (
            {"id": "1", "title": "t", "context": "c", "question": "UNLIKE", "answers": {"text": ["So."], "answer_start": [1]}},
            "'context', 'id', 'question', 'title'] are of no convention",
            {"template": "{context} {question}", "columns": {"prompt": "question"}},
        ),
    ],
    ids=["UltraChat", "OpenAssistant", "OpenAssistant's trees", "Capybara", "LMSYS-Chat-1M", "SQuAD"],
)
def test_a_public_shape_that_is_refused(tmp_path: Path, row: dict, part: str, way_out: dict[str, Any] | None) -> None:
    told = refuse(lines(tmp_path / "rows.jsonl", [row]))
    assert ": row 1: " in told
    assert part in told
    if way_out is not None:
        assert "UNLIKE" in read_row(tmp_path, row, **way_out)["messages"][-1]["content"]


def test_an_answer_without_its_prompt(tmp_path: Path) -> None:
    row = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: No"}
    assert "row 1: `chosen` is an answer without its prompt" in refuse(lines(tmp_path / "rows.jsonl", [row]))

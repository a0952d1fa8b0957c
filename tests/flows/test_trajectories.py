"""Conversations read turn by turn: each of the assistant's answers is a row, whose prompt is all that came before it."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from helpers import refused

from configs.prompts import FilePrompts
from flows.distill import distill
from storage.read import scan
from tasks.rows.sources import deal_prompts
from tasks.views.kinds import Kind
from tasks.views.rounds import summarise_rounds, tabulate_rounds

WORDS = ["dog", "log", "cat", "sun", "hat", "pot", "rat", "tap", "pin", "net", "bus", "cup"]


def conversation(n: int, turns: int) -> list[dict[str, str]]:
    messages = []
    for turn in range(turns):
        word = WORDS[(n + turn) % len(WORDS)]
        messages += [{"role": "user", "content": f"{word} {n}"}, {"role": "assistant", "content": word[::-1]}]
    return messages


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def chats(tmp_path) -> Path:
    return write(tmp_path / "chats.jsonl", [{"messages": conversation(n, 1 + n % 3)} for n in range(30)])


def by_hand(chats: Path) -> list[dict[str, Any]]:
    """One row a turn, made without our code."""
    rows = []
    for line in chats.read_text().splitlines():
        messages = json.loads(line)["messages"]
        rows += [
            {"messages": messages[:at], "reference": message["content"]}
            for at, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
    return rows


def settings(path: Path, **more: Any) -> dict[str, Any]:
    return {"source": "file", "path": str(path), "eval": 8, **more}


def test_a_conversation_is_a_row_a_turn(chats):
    split = deal_prompts(FilePrompts(**settings(chats, turns="all")), 0)
    rows = [*split.train, *split.eval]
    found = sorted((json.dumps(row.messages), row.reference) for row in rows)
    assert found == sorted((json.dumps(row["messages"]), row["reference"]) for row in by_hand(chats))
    turns: dict[str, list[int]] = {}
    for row in rows:
        assert row.trajectory is not None
        turns.setdefault(row.trajectory.id, []).append(row.trajectory.turn)
        assert row.trajectory.turn == sum(message["role"] == "assistant" for message in row.messages)
    assert sorted(sorted(numbers) for numbers in turns.values()) == sorted(list(range(1 + n % 3)) for n in range(30))
    # what is held out is in no prompt that is trained on
    assert not {row.trajectory.id for row in split.train if row.trajectory} & {
        r.trajectory.id for r in split.eval if r.trajectory
    }
    assert len(split.eval) >= 8


def test_the_last_turn_alone_is_what_is_read_otherwise(chats):
    split = deal_prompts(FilePrompts(**settings(chats)), 0)
    assert len(split.train) + len(split.eval) == 30
    assert all(row.trajectory is None for row in (*split.train, *split.eval))


def test_turns_without_a_text_or_a_question(tmp_path):
    """A greeting that nobody asked for is no answer; a call of a tool has no text to learn from."""
    call = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
    messages = [
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "what is 1 and 1"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "2"},
    ]
    other = {"messages": conversation(1, 1)}
    split = deal_prompts(
        FilePrompts(**settings(write(tmp_path / "a.jsonl", [{"messages": messages}, other]), turns="all", eval=1)), 0
    )
    rows = [row for row in (*split.train, *split.eval) if len(row.messages) > 1]
    assert sorted((len(row.messages), row.reference) for row in rows) == [(2, None), (4, "2")]


def test_a_trajectory_has_the_targets_of_its_turns_made_by_hand(chats, recipe, tmp_path):
    """MATHS.md §11: the terms of each turn are those of a row that was written out, and only the answer's bytes are in them."""
    more = {
        "rollout__on_policy": 0.0,
        "rollout__off_policy": "reference",
        "rollout__prompts": 48,
        "student__rendering": "plain",
    }
    more |= {"teacher__rendering": "plain", "gates__boundary": 0.0}
    whole = settings(chats, turns="all")
    made = settings(write(tmp_path / "made.jsonl", by_hand(chats)))
    tables = []
    for name, source in (("whole", whole), ("made", made)):
        run = distill(str(recipe(name=name, prompts=source, **more)), rounds=1)["run"]
        rollouts, aligned = (scan(run, table).collect() for table in ("rollouts", "aligned"))
        tables.append(rollouts.join(aligned, on="rollout_id").unique("prompt_id").sort("prompt_id"))
    turns = scan(str(tmp_path / "runs" / "whole"), "prompts").collect()
    assert tables[0].join(turns, on="prompt_id").select((pl.col("turn") == pl.col("turn_right")).all()).item()
    assert "trajectory_id" not in tables[1].columns
    shared = sorted(set(tables[0]["prompt_id"]) & set(tables[1]["prompt_id"]))
    assert len(shared) > 20
    columns = ["text", "prompt_token_ids", "token_ids", "term_starts", "target_ids", "target_logprobs", "supervised_bytes"]
    left, right = (table.filter(pl.col("prompt_id").is_in(shared)).select(columns) for table in tables)
    assert left.equals(right)
    account = (
        tables[0].select(pl.sum_horizontal("supervised_bytes", "unmatched_bytes", "dropped_bytes", "tail_bytes")).to_series()
    )
    assert account.to_list() == [len(text.encode()) for text in tables[0]["text"]]


def test_the_account_counts_turns(chats, potstill, recipe):
    ended = potstill("run", recipe(prompts=settings(chats, turns="all")), "--rounds", "0")
    assert "read as chat messages, turn by turn: 60 rows" in ended.err


def test_turns_of_what_has_none(recipe, potstill):
    refused(potstill("run", recipe(), "--set", "prompts.turns=all"), "prompts.turns: unknown key")


def test_figures_are_by_turn(chats, recipe):
    run = distill(str(recipe(prompts=settings(chats, turns="all"), rollout__prompts=48)), rounds=1)["run"]
    table = tabulate_rounds(run)
    kinds = list(dict.fromkeys(row["rows of"] for row in table))
    assert kinds == ["all", "turn 0", "turn 1", "turn 2"][: len(kinds)]
    turns = scan(run, "prompts").select("prompt_id", "turn").collect()
    evals = scan(run, "evals").filter(pl.col("round") == 1).collect().join(turns, on="prompt_id")
    aligned = scan(run, "aligned").collect().join(scan(run, "rollouts").collect(), on="rollout_id")
    for turn in (0, 1):
        (row,) = summarise_rounds(run, Kind("", turn=turn)).filter(model="student", round=1).to_dicts()
        own = evals.filter(turn=turn, decoding="sampled")
        assert row["tokens"] == pytest.approx(own["tokens"].mean())
        counts = [aligned.filter(turn=turn)[f"{name}_bytes"].sum() for name in ("supervised", "unmatched", "dropped", "tail")]
        assert row["supervised"] == pytest.approx(counts[0] / sum(counts))

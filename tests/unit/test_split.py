"""How rows are split: the numbers are kept, more rows move as little as can be, and every row is accounted for."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.prompts import FilePrompts, GymPrompts
from storage.schemas import ACCOUNTS
from tasks.rows.accounts import describe_account, summarise_account
from tasks.rows.messages import Refused
from tasks.rows.sources import deal_prompts
from tasks.rows.split import OUTCOMES, SourceRow, Split, share_counts, split_table


def row(name: object, reference: str | None = "a", source: str = "p", weight: float | None = None) -> SourceRow:
    return SourceRow(source, "prompts", [{"role": "user", "content": str(name)}], reference, "{}", None, weight)


def contents(rows: list[SourceRow]) -> list[str]:
    return [r.messages[0]["content"] for r in rows]


def totals(split: Split) -> Counter:
    counts: Counter = Counter()
    for (_, _, outcome), rows in split.rows.items():
        counts[outcome] += rows
    return counts


numbers = st.lists(st.integers(0, 60), min_size=2, max_size=80).filter(lambda found: len(set(found)) > 1)
sizes = st.integers(1, 40)


# -- the counts --------------------------------------------------------------------------------------------------------


def test_the_counts_are_those_asked_for():
    """30 prompts in the proportion of 20 to 6: it is not left to chance how many a side has."""
    for seed in range(50):
        split = split_table([row(f"{seed}-{i}") for i in range(30)], 20, 6)
        assert (len(split.train), len(split.eval)) == (20, 6)
        assert totals(split)["left over"] == 4


@settings(deadline=None)  # cores are shared
@given(numbers, st.one_of(st.none(), sizes), sizes)
def test_counts(found, train, held_out):
    """As many as asked for where there are enough; otherwise shared in proportion, at least one on each side."""
    split, distinct = split_table(map(row, found), train, held_out), len(set(found))
    if train is None:
        assert len(split.eval) == max(1, min(held_out, distinct // 2))
        assert len(split.train) == distinct - len(split.eval)
    elif distinct >= train + held_out:
        assert (len(split.train), len(split.eval)) == (train, held_out)
    else:
        assert len(split.eval) == max(1, distinct * held_out // (train + held_out))
        assert len(split.train) == min(train, distinct - len(split.eval))


@settings(deadline=None)  # cores are shared
@given(numbers, st.one_of(st.none(), sizes), sizes)
def test_every_row_has_one_outcome(found, train, held_out):
    split = split_table([row(number, str(at % 2)) for at, number in enumerate(found)], train, held_out)
    counts = totals(split)
    assert set(counts) <= set(OUTCOMES)
    assert sum(counts.values()) == len(found)
    assert counts["to train on"] == len(split.train)
    assert counts["held out"] == len(split.eval)
    first = {number: at % 2 for at, number in reversed(list(enumerate(found)))}
    other = sum(first[number] != at % 2 for at, number in enumerate(found))
    assert counts["duplicates with another reference"] == other
    assert counts["duplicates"] == len(found) - len(set(found)) - other


@settings(deadline=None)  # cores are shared
@given(numbers, sizes, sizes)
def test_sides_are_distinct_and_in_the_order_of_the_rows(found, train, held_out):
    split = split_table(map(row, found), train, held_out)
    sides = [[int(name) for name in contents(side)] for side in (split.train, split.eval)]
    assert not set(sides[0]) & set(sides[1])
    order = list(dict.fromkeys(found))
    for side in sides:
        assert side == sorted(side, key=order.index)


def test_one_prompt_is_too_few():
    with pytest.raises(Refused, match="only 1 distinct prompts, none of them for train; give more"):
        split_table([row("a"), row("a")], 5, 5)


# -- what more rows change ---------------------------------------------------------------------------------------------


@settings(deadline=None)  # cores are shared
@given(st.sets(st.integers(0, 200), min_size=20, max_size=60), st.sets(st.integers(0, 200), max_size=60), st.randoms())
def test_more_rows_move_as_little_as_can_be(there, more, random):
    """Whatever comes, in whatever order: no prompt that was trained on is held out later; one that was held out stays so
    unless a new one takes its place, and is not trained on while others are left over."""
    before = split_table(map(row, sorted(there)), 12, 8)
    later = sorted(there | more)
    random.shuffle(later)
    after = split_table(map(row, later), 12, 8)
    held, now = set(contents(before.eval)), set(contents(after.eval))
    assert not set(contents(before.train)) & now
    displaced = held - now
    assert len(displaced) == len(now - held) <= len(more - there)
    if totals(after)["left over"] >= len(displaced):
        assert not displaced & set(contents(after.train))


@settings(deadline=None)  # cores are shared
@given(numbers, sizes, sizes)
def test_the_order_of_rows_moves_none(found, train, held_out):
    one, two = (split_table(map(row, rows), train, held_out) for rows in (found, found[::-1]))
    assert set(contents(one.train)) == set(contents(two.train))
    assert set(contents(one.eval)) == set(contents(two.eval))


# -- shares ------------------------------------------------------------------------------------------------------------

parts = st.lists(st.tuples(st.floats(0.01, 100), st.integers(1, 500)), min_size=1, max_size=5)


@settings(deadline=None)  # cores are shared
@given(parts, st.one_of(st.none(), st.integers(1, 1000)))
def test_shares(sources, most):
    """Never more than there are; each within one of its exact share of their sum; no larger sum has these shares."""
    weights, there = [weight for weight, _ in sources], [count for _, count in sources]
    counts = share_counts(weights, there, most)
    total = sum(counts)
    assert all(0 <= count <= limit for count, limit in zip(counts, there))
    assert most is None or total <= most
    for count, weight in zip(counts, weights):
        assert abs(count - total * weight / sum(weights)) <= 1 + 1e-6
    if most is None or total < most:
        grown = [(total + 2) * weight / sum(weights) for weight in weights]
        assert any(exact > limit for exact, limit in zip(grown, there))


def test_shares_of_sources():
    rows = [row(f"a{i}", source="a", weight=1.0) for i in range(50)]
    rows += [row(f"b{i}", source="b", weight=3.0) for i in range(500)]
    split = split_table(rows, 100, 50)
    assert Counter(r.source for r in split.train) == {"a": 25, "b": 75}
    assert len(split.eval) == 50


# -- the account -------------------------------------------------------------------------------------------------------


def test_the_account_of_a_file(tmp_path: Path):
    path = tmp_path / "p.jsonl"
    rows = [{"prompt": f"q{i}", "reference": "a" if i % 2 else None} for i in range(20)]
    rows += [rows[1], {**rows[1], "reference": "b"}, rows[2]]
    path.write_text("".join(json.dumps(given) + "\n" for given in rows))
    split = deal_prompts(FilePrompts(source="file", path=str(path), train=10, eval=5), 0)
    table = split.account()
    assert table.schema.equals(ACCOUNTS)
    (summary,) = summarise_account(table.to_pylist())
    lacking = sum(given.reference is None for given in (*split.train, *split.eval))
    assert summary == {
        "source": str(path), "read as": "prompts", "rows": 23, "to train on": 10, "held out": 5, "left over": 5,
        "duplicates": 2, "duplicates with another reference": 1, "used without a reference": lacking,
    }  # fmt: skip
    assert describe_account("prompts.path", table.to_pylist()) == [
        f"prompts.path: {path}: read as prompts: 23 rows: 10 to train on, 5 held out, 5 left over, 2 duplicates, "
        f"1 duplicate with another reference; {lacking} of the prompts used have no reference"
    ]


def test_all_prompts_are_used_where_train_is_left_out(tmp_path: Path):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{i}"}) + "\n" for i in range(5000)))
    split = deal_prompts(FilePrompts(source="file", path=str(path)), 0)
    assert totals(split) == {"to train on": 4872, "held out": 128}


def test_the_account_of_a_task():
    config = GymPrompts(source="reasoning-gym", task="spell_backward", train=50, eval=10)
    split = deal_prompts(config, 0)
    (summary,) = summarise_account(split.account().to_pylist())
    assert (summary["to train on"], summary["held out"], summary["read as"]) == (50, 10, "reasoning-gym")
    assert config.train == 50
    assert GymPrompts(source="reasoning-gym", task="spell_backward").train == 1024

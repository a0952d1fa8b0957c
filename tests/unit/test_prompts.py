"""Prompts: where they come from, how they are dealt to train and eval, and what a bad file is told."""

import json
from pathlib import Path

import polars as pl
import pytest

from configs.errors import BadInput
from configs.prompts import FilePrompts, GymPrompts
from storage.schemas import PROMPTS
from tasks.rows.sources import check_prompts, deal_prompts, split_prompts, warn_of_few

OPTIONS = {"min_word_len": 3, "max_word_len": 6}


def gym(**changes) -> GymPrompts:
    given = {"task": "spell_backward", "options": OPTIONS, "train": 100, "eval": 20, **changes}
    return GymPrompts(source="reasoning-gym", **given)


def from_file(path: Path, **changes) -> FilePrompts:
    return FilePrompts(source="file", path=str(path), **{"train": 100, "eval": 100, **changes})


def jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def contents(table) -> list[str]:
    return [messages[0]["content"] for messages in table["messages"].to_pylist()]


def refused(config) -> str:
    """What both the check and the stage say; they must not disagree."""
    with pytest.raises(BadInput) as caught:
        check_prompts(config, 0)
    with pytest.raises(BadInput):
        split_prompts(config, 0)
    return str(caught.value)


# -- the split ---------------------------------------------------------------------------------------------------------


def test_counts_and_columns():
    tables = split_prompts(gym(), seed=0)
    assert {split: len(table) for split, table in tables.items()} == {"train": 100, "eval": 20}
    for split, table in tables.items():
        assert table.schema.equals(PROMPTS)
        assert set(table["split"].to_pylist()) == {split}
        assert table["reference"].null_count == 0


def test_train_and_eval_are_disjoint_and_distinct():
    """A small supply of words repeats itself; no prompt is there twice."""
    tables = split_prompts(gym(options={"min_word_len": 3, "max_word_len": 3}, template="{word}"), seed=0)
    train, held_out = (contents(tables[split]) for split in ("train", "eval"))
    assert len(set(train)) == len(train)
    assert len(set(held_out)) == len(held_out)
    assert not set(train) & set(held_out)
    ids = tables["train"]["prompt_id"].to_pylist() + tables["eval"]["prompt_id"].to_pylist()
    assert len(set(ids)) == len(ids)


def test_the_split_is_stable():
    first, second = split_prompts(gym(), seed=3), split_prompts(gym(), seed=3)
    assert all(first[split].equals(second[split]) for split in ("train", "eval"))
    assert not split_prompts(gym(), seed=4)["train"].equals(first["train"])


def test_a_prompt_stays_on_its_side(tmp_path):
    """More rows, or another order of them, move no prompt from eval to train or back, while there are enough."""
    rows = [{"prompt": f"question {i}"} for i in range(130)]
    few = split_prompts(from_file(jsonl(tmp_path / "few.jsonl", rows[:120]), train=80, eval=20), 0)
    more = split_prompts(from_file(jsonl(tmp_path / "more.jsonl", rows[::-1]), train=80, eval=20), 1)
    assert not set(contents(few["eval"])) & set(contents(more["train"]))
    assert not set(contents(few["train"])) & set(contents(more["eval"]))
    assert {split: len(table) for split, table in more.items()} == {"train": 80, "eval": 20}


def test_the_split_has_the_shares_asked_for(tmp_path):
    rows = [{"prompt": f"question {i}"} for i in range(2000)]
    tables = split_prompts(from_file(jsonl(tmp_path / "p.jsonl", rows), train=3000, eval=1000), 0)
    assert {split: len(table) for split, table in tables.items()} == {"train": 1500, "eval": 500}


def test_fewer_prompts_than_asked_for_is_said(tmp_path, caplog):
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": f"question {i}"} for i in range(40)])
    split = deal_prompts(from_file(path), 0)
    with caplog.at_level("WARNING", logger="potstill"):
        warn_of_few(from_file(path), split)
    assert (len(split.train), len(split.eval)) == (20, 20)
    assert "prompts.train asks for 100" in caplog.text


def test_no_prompt_for_one_side_is_an_error(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "the only one"}] * 5)
    text = refused(from_file(path))
    assert f"{path}: only 1 distinct prompts, none of them for" in text


# -- what a row may hold -----------------------------------------------------------------------------------------------

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
ROWS = [
    {"prompt": "What is 1 + 1?", "reference": "2", "topic": "sums", "level": 1},
    {"prompt": "naïve café 👩‍🚀", "reference": "ü", "topic": "words", "level": 2},
    {"prompt": "no reference", "topic": None, "level": 3},
]


def rows_of(config: FilePrompts) -> dict[str, dict]:
    """Both splits' rows by the content of their last message."""
    tables = split_prompts(config, 0)
    rows = [row for table in tables.values() for row in table.to_pylist()]
    return {row["messages"][-1]["content"]: row for row in rows}


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_prompts_references_and_other_columns(tmp_path, ending):
    path = tmp_path / f"p.{ending}"
    more = [{"prompt": f"filler {i}"} for i in range(20)]
    jsonl(path, ROWS + more) if ending == "jsonl" else pl.DataFrame(ROWS + more).write_parquet(path)
    rows = rows_of(from_file(path))
    assert len(rows) == 23
    assert rows["What is 1 + 1?"]["messages"] == [{"role": "user", "content": "What is 1 + 1?"}]
    assert rows["What is 1 + 1?"]["reference"] == "2"
    assert json.loads(rows["What is 1 + 1?"]["metadata"])["topic"] == "sums"
    assert json.loads(rows["What is 1 + 1?"]["metadata"])["level"] == 1
    assert rows["naïve café 👩‍🚀"]["reference"] == "ü"
    assert rows["no reference"]["reference"] is None


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_messages(tmp_path, ending):
    path = tmp_path / f"p.{ending}"
    rows = [{"messages": [CHAT[0], {"role": "user", "content": f"q{i}"}], "reference": i} for i in range(20)]
    jsonl(path, rows) if ending == "jsonl" else pl.DataFrame(rows).write_parquet(path)
    found = rows_of(from_file(path))
    assert found["q3"]["messages"] == rows[3]["messages"]
    assert found["q3"]["reference"] == "3"
    assert len(found) == 20


def test_blank_lines_and_line_ends_of_all_kinds(tmp_path):
    """JSON allows U+2028, U+0085 and their like within a text; only a line feed ends a row."""
    path = tmp_path / "p.jsonl"
    texts = ["a\u2028b", "c\u0085d", *(f"q{i}" for i in range(20))]
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    path.write_bytes(("\r\n".join(lines) + "\n\n  \n").encode())
    assert set(rows_of(from_file(path))) == set(texts)


def test_template_fields(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": f"q{i}", "unit": "cm"} for i in range(20)])
    rows = rows_of(from_file(path, template="{question} in {unit}, {prompt}; {{braces}}"))
    assert "q7 in cm, q7; {braces}" in rows
    words = contents(split_prompts(gym(template="Spell {word} backwards"), 0)["train"])
    assert all(text.startswith("Spell ") and text.endswith(" backwards") for text in words)


@pytest.mark.parametrize("template", ["{wrod}", "{0}", "{", "{word.nothing}", "{word[nothing]}", "{word:d}"])
def test_templates_that_cannot_be_filled(template):
    text = refused(gym(template=template))
    assert "prompts.template" in text
    assert template in text
    assert "word" in text.split("fields here:")[1]


def test_the_answer_of_a_task_is_its_reference():
    table = split_prompts(gym(template="{word}"), 0)["train"]
    assert all(text[::-1] == reference for text, reference in zip(contents(table), table["reference"].to_pylist(), strict=True))


# -- what cannot be used -----------------------------------------------------------------------------------------------


def test_a_missing_file(tmp_path):
    text = refused(from_file(tmp_path / "missing.jsonl"))
    assert text.startswith(f"prompts.path: {tmp_path / 'missing.jsonl'}: no such file")
    assert ".jsonl, .json, .csv or .parquet" in text


def test_a_folder_in_place_of_a_file(tmp_path):
    (tmp_path / "p.jsonl").mkdir()
    assert "a folder without .parquet, .jsonl, .csv files" in refused(from_file(tmp_path / "p.jsonl"))


@pytest.mark.parametrize("ending", ["tsv", "txt", "parquet.gz"])
def test_a_wrong_ending(tmp_path, ending):
    path = tmp_path / f"p.{ending}"
    path.write_text("prompt\nx\n")
    assert "not a .jsonl, .json, .csv or .parquet file" in refused(from_file(path))


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file(tmp_path, content):
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    text = refused(from_file(path))
    assert f"prompts.path: {path}: no prompts in it" in text
    assert "`messages` or `prompt`" in text


def test_an_empty_table(tmp_path):
    path = tmp_path / "p.parquet"
    pl.DataFrame({"prompt": []}, schema={"prompt": pl.String}).write_parquet(path)
    assert "no prompts in it" in refused(from_file(path))


def test_not_json(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n{"prompt": \n')
    text = refused(from_file(path))
    assert f"prompts.path: {path}: cannot be read as jsonl" in text
    assert "2" in text.split("cannot be read as jsonl")[1]  # the line to look at


def test_not_text_and_not_parquet(tmp_path):
    binary, wrong = tmp_path / "p.jsonl", tmp_path / "p.parquet"
    binary.write_bytes(b"\xff\xfe{}")
    wrong.write_text("not parquet")
    assert "cannot be read as jsonl" in refused(from_file(binary))
    assert "cannot be read as parquet" in refused(from_file(wrong))


BAD_ROWS = [
    ({"text": "x"}, "its columns ['text'] are of no convention that is known"),
    ({"prompt": None}, "`prompt` must be text or a list of messages, found None"),
    ({"prompt": 3}, "`prompt` must be text or a list of messages, found 3"),
    ({"messages": []}, "`messages` must be a list"),
    ({"messages": "hello"}, "`messages` must be a list"),
    ({"messages": 3}, "`messages` must be a list"),
    ({"messages": [{"role": "user"}]}, "`messages` must be a list"),
    ({"messages": [{"role": "user", "content": None}]}, "`messages` must be a list"),
    ({"messages": [{"role": "user", "content": ["parts"]}]}, "`messages` must be a list"),
    ({"messages": [{"role": 1, "content": "x"}]}, "`messages` must be a list"),
    (["a", "list"], ""),
    ("a string", ""),
    (3, ""),
]


@pytest.mark.parametrize(("row", "right"), BAD_ROWS, ids=lambda value: json.dumps(value)[:40])
def test_rows_without_a_prompt(tmp_path, row, right):
    text = refused(from_file(jsonl(tmp_path / "p.jsonl", [row])))
    assert "prompts.path" in text
    assert "row 1" in text
    assert right in text


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_bad_row_is_found_wherever_it_stands(tmp_path, ending):
    """The check before a run sees the whole file, so that nothing is written for a file with a bad row in it."""
    path, rows = tmp_path / f"p.{ending}", [{"prompt": "a"}, {"prompt": "b"}, {"prompt": None}, {"prompt": "c"}]
    jsonl(path, rows) if ending == "jsonl" else pl.DataFrame(rows).write_parquet(path)
    assert "row 3: `prompt` must be text or a list of messages, found None" in refused(from_file(path))


def test_the_columns_of_a_wrong_row_are_listed(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, {"title": "x", "body": "y"}])
    assert "row 2: it has neither `messages` nor `prompt`; it has ['body', 'title']" in refused(from_file(path))


def test_unknown_tasks_come_with_suggestions():
    text = refused(gym(task="spell_backwards"))
    assert "prompts.task: reasoning-gym has no task 'spell_backwards'" in text
    assert "spell_backward" in text.split("near it:")[1]
    assert len(refused(gym(task="zzz")).split("near it:")[1].split(",")) > 3


@pytest.mark.parametrize(
    "options",
    [
        {"min_word_length": 3},
        {"min_word_len": 9, "max_word_len": 3},
        {"min_word_len": "three"},
        {"min_word_len": 0},
        {"seed": 1},
        {"size": 3},
    ],
)
def test_wrong_options_of_a_task(options):
    text = refused(gym(options=options))
    assert "prompts.options: spell_backward does not take" in text
    assert next(iter(options)) in text

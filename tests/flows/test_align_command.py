"""`potstill align`: two tokenizers on a text or a file, without weights."""

import polars as pl
import pytest

from tasks.models import tokenizer_of
from tasks.texts import VISIBLE

TEXT = "reward  drawer\nstressed desserts, " * 8


def test_a_text_as_two_rows(potstill, models):
    """Both rows spell the text, with unit borders at the same columns, within the width of a log file."""
    ended = potstill("align", models["student"], models["teacher"], "--text", TEXT)
    assert ended.status == 0, ended.err
    lines = {
        role: [ln.split("  ", 1)[1] for ln in ended.out.splitlines() if ln.startswith(role)] for role in ("student", "teacher")
    }
    assert len(lines["student"]) == len(lines["teacher"]) > 1
    for above, below in zip(lines["student"], lines["teacher"], strict=True):
        assert [i for i, c in enumerate(above) if c == "┃"] == [i for i, c in enumerate(below) if c == "┃"]
        assert len(above) <= 140
    for role in lines:
        units = [unit.strip() for line in lines[role] for unit in line.strip("┃").split("┃")]
        assert "".join(units).replace("|", "") == TEXT.translate(VISIBLE)


def test_a_file_of_texts(potstill, models, tmp_path):
    """Every row's ends are the common byte ends of both encodings, computed here with sets."""
    texts = ["abc", "", "stressed desserts", "naïve ☕", "\t\n"]
    pl.DataFrame({"text": texts, "rollout_id": [f"r{i}" for i in range(len(texts))]}).write_parquet(tmp_path / "in.parquet")
    ended = potstill(
        "align", models["student"], models["teacher"], "--file", tmp_path / "in.parquet", "--out", tmp_path / "out.parquet"
    )
    assert ended.status == 0, ended.err
    table = pl.read_parquet(tmp_path / "out.parquet")
    assert table["rollout_id"].to_list() == [f"r{i}" for i in range(len(texts))]
    sides = [tokenizer_of(str(models[role])) for role in ("student", "teacher")]
    for text, ends in zip(texts, table["byte_ends"].to_list(), strict=True):
        common = set.intersection(*(byte_ends(side, text) for side in sides))
        assert ends == sorted(common)
    assert table["supervised_bytes"].sum() + table["dropped_bytes"].sum() == sum(len(text.encode()) for text in texts)


def byte_ends(side, text: str) -> set[int]:
    total, ends = 0, set()
    for i in side.encoder.encode([text])[0]:
        total += len(side.beta.values[i])
        ends.add(total)
    return ends


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--file", "none.jsonl"], "no such file"),
        (["--file", "numbers.jsonl"], "row 2 has no `text`"),
        (["--out", "out.parquet"], "--file"),
        (["--file", "good.jsonl", "--out", "missing/out.parquet"], "cannot be written"),
    ],
)
def test_mistakes(potstill, models, tmp_path, arguments, says):
    (tmp_path / "numbers.jsonl").write_text('{"text": "a"}\n{"text": 1}\n')
    (tmp_path / "good.jsonl").write_text('{"text": "a"}\n')
    before = sorted(tmp_path.iterdir())
    ended = potstill("align", models["student"], models["teacher"], *arguments, folder=tmp_path)
    assert ended.status == 2
    assert says in ended.err
    assert len(ended.err.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before

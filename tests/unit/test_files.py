"""Files of rows: every ending, compressed or not, folders, patterns; and what each broken one is told."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

from configs.errors import BadInput
from configs.prompts import FilePrompts
from storage.lineage import digest_file
from tasks.rows.files import find_files, read_file
from tasks.rows.sources import check_prompts, deal_prompts, digest_source, split_prompts

ROWS = [{"prompt": f"naïve {i} 👩", "reference": str(i)} for i in range(6)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = "prompt,reference\r\n" + "".join(f'"{row["prompt"]}",{row["reference"]}\r\n' for row in ROWS)
PACK = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
    "lz4": lambda data: pa.compress(data, codec="lz4", asbytes=True),
}


def rows_of(path: Path) -> list[Any]:
    return [row for _, row in read_file(path)]


def refuse(path: Path | str, **changes: Any) -> str:
    config = FilePrompts(source="file", path=str(path), **changes)
    with pytest.raises(BadInput) as caught:
        check_prompts(config, 0)
    return str(caught.value)


# -- what can be read --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "text"),
    [
        ("jsonl", LINES),
        ("jsonl", LINES.replace("\n", "\r\n\r\n")),
        ("json", json.dumps(ROWS, indent=1)),
        ("json", LINES),
        ("csv", CSV),
        ("csv", CSV.replace("\r\n", "\n")),
    ],
    ids=["jsonl", "jsonl with CRLF", "json", "lines named json", "csv", "csv with LF"],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "byte order mark"])
def test_text_files(tmp_path: Path, ending: str, text: str, mark: str) -> None:
    path = tmp_path / f"p.{ending}"
    path.write_bytes((mark + text).encode())
    assert rows_of(path) == ROWS


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize(("ending", "text"), [("jsonl", "\ufeff" + LINES), ("json", json.dumps(ROWS)), ("csv", CSV)])
def test_compressed_files(tmp_path: Path, packed: str, ending: str, text: str) -> None:
    path = tmp_path / f"p.{ending}.{packed}"
    path.write_bytes(PACK[packed](text.encode()))
    assert rows_of(path) == ROWS


@pytest.mark.parametrize("packed", ["gz", "bz2", "xz", "zst"])
def test_files_that_were_compressed_in_parts(tmp_path: Path, packed: str) -> None:
    path, half = tmp_path / f"p.jsonl.{packed}", len(LINES.encode()) // 2
    path.write_bytes(PACK[packed](LINES.encode()[:half]) + PACK[packed](LINES.encode()[half:]))
    assert rows_of(path) == ROWS


def test_cells_of_csv_are_texts(tmp_path: Path) -> None:
    """Zeros at both ends stay; quotes, commas and line ends within a cell too; an empty cell is null."""
    path = tmp_path / "p.csv"
    path.write_text('prompt,reference,note\n007,1.50,"a ""b"", c\nd"\n\nx,,\n')
    assert read_file(path) == [
        (1, {"prompt": "007", "reference": "1.50", "note": 'a "b", c\nd'}),
        (2, {"prompt": "x", "reference": None, "note": None}),
    ]
    path.write_text("prompt\n" + "x" * 200_000 + "\n")
    assert len(rows_of(path)[0]["prompt"]) == 200_000


def test_lines_are_numbered_as_an_editor_does(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('\n{"prompt": "a"}\n\n{"prompt": 3}\n')
    assert [number for number, _ in read_file(path)] == [2, 4]
    assert "row 4: `prompt` must be text" in refuse(path)


def test_fields_that_parquet_fills_with_null_are_absent(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    rows = [{"m": [{"a": 1}]}, {"m": [{"b": {"c": 2}}]}]
    pl.DataFrame(rows, infer_schema_length=None).write_parquet(path)
    assert rows_of(path) == rows


# -- folders, patterns, several paths ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two Parquet files at different depths, beside what such folders hold."""
    place = tmp_path / "data[1]"
    (place / "part=b").mkdir(parents=True)
    (place / ".cache").mkdir()
    pl.DataFrame(ROWS[:4]).write_parquet(place / "a.parquet")
    pl.DataFrame(ROWS[4:]).write_parquet(place / "part=b" / "0.parquet")
    (place / ".cache" / "c.jsonl").write_text("x")
    (place / "_SUCCESS").write_text("")
    (place / "README.md").write_text("x")
    (place / "dataset_info.json").write_text("{}")
    (place / "more.jsonl").write_text(LINES)
    return place


def test_a_folder(folder: Path) -> None:
    assert [file.name for file in find_files(str(folder), "prompts.path")] == ["a.parquet", "0.parquet"]
    split = deal_prompts(FilePrompts(source="file", path=str(folder), eval=2), 0)
    assert (len(split.train), len(split.eval)) == (4, 2)
    assert {row["source"] for row in split.account().to_pylist()} == {str(folder)}


def test_a_folder_without_parquet(folder: Path) -> None:
    for file in folder.rglob("*.parquet"):
        file.unlink()
    (folder / "part=b" / "more.jsonl.gz").write_bytes(gzip.compress(LINES.encode(), mtime=0))
    assert [file.name for file in find_files(str(folder), "x")] == ["more.jsonl", "more.jsonl.gz"]


def test_patterns(folder: Path) -> None:
    where = str(folder).replace("[", "[[]")  # a pattern for the folder itself
    assert [file.name for file in find_files(f"{where}/*.parquet", "x")] == ["a.parquet"]
    assert [file.name for file in find_files(f"{where}/**/*.parquet", "x")] == ["a.parquet", "0.parquet"]


def test_a_name_that_looks_like_a_pattern(tmp_path: Path) -> None:
    path = tmp_path / "p[1].jsonl"
    path.write_text(LINES)
    assert find_files(str(path), "x") == [path]


def test_every_file_is_in_the_key(folder: Path) -> None:
    """A file that changes, comes or goes makes the prompts anew."""
    config = FilePrompts(source="file", path=str(folder))
    before = digest_source(config)
    assert before == [digest_file(folder / "a.parquet"), digest_file(folder / "part=b" / "0.parquet")]
    pl.DataFrame(ROWS[3:]).write_parquet(folder / "part=b" / "0.parquet")
    after = digest_source(config)
    assert (after[0], after[1] == before[1]) == (before[0], False)
    pl.DataFrame(ROWS).write_parquet(folder / "z.parquet")
    assert len(digest_source(config)) == 3


def test_several_paths_in_several_conventions(tmp_path: Path) -> None:
    one, two = tmp_path / "one.csv", tmp_path / "two.jsonl"
    one.write_text("question,answer\n" + "".join(f"q{i},a\n" for i in range(10)))
    two.write_text("".join(json.dumps({"instruction": f"do {i}", "output": "a"}) + "\n" for i in range(30)))
    given = [{"path": str(one)}, {"path": str(two), "weight": 3.0}]
    config = FilePrompts(source="file", paths=given, train=16, eval=8)
    account = deal_prompts(config, 0).account().to_pylist()
    assert {(row["source"], row["read_as"]) for row in account} == {(str(one), "question and answer"), (str(two), "Alpaca")}
    assert {row["source"]: row["rows"] for row in account if row["outcome"] == "to train on"} == {str(one): 4, str(two): 12}


def test_shares_hold_where_a_path_has_too_few(tmp_path: Path) -> None:
    """Half and half, with 5 prompts of one: 10 at most, and the account has the others as left over."""
    for name, count in (("a", 7), ("b", 100)):
        (tmp_path / f"{name}.csv").write_text("prompt\n" + "".join(f"{name}{i}\n" for i in range(count)))
    given = [{"path": str(tmp_path / f"{name}.csv"), "weight": 0.5} for name in "ab"]
    split = deal_prompts(FilePrompts(source="file", paths=given, eval=10), 0)
    rows = {(row["source"][-5], row["outcome"]): row["rows"] for row in split.account().to_pylist()}
    assert rows["a", "to train on"] == rows["b", "to train on"] == 7 - rows.get(("a", "held out"), 0)
    assert sum(rows.values()) == 107


# -- what cannot -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("p.csv", b"prompt,reference\na,b\nc\n", ["cannot be read as csv: row 2 has 1 cells, the header 2: prompt, reference"]),
        ("p.csv", b"prompt,reference\na,b\nc,d,e\n", ["row 2 has 3 cells"]),
        ("p.csv", b'prompt\na\n"b\n', ["cannot be read as csv: row 2: unexpected end of data"]),
        ("p.csv", b'prompt\n"a" b\n', ["cannot be read as csv: row 1", "expected after"]),
        ("p.csv", b"a,a\nb,c\n", ["two columns have one name: a, a"]),
        ("p.csv", b"", ["no prompts in it"]),
        ("p.csv", b"prompt\n", ["no prompts in it"]),
        ("p.csv", b"prompt\n\xff\n", ["cannot be read as csv", "utf-8"]),
        ("p.json", b"[]", ["no prompts in it"]),
        ("p.json", b'[{"prompt": "a"}', ["cannot be read as json"]),
        ("p.json", b'{"prompt":\n"a"}', ["cannot be read as json: line 1"]),
        ("p.json", b'["a"]', ["row 1 is 'a'; give objects"]),
        ("p.json", b"[" * 200_000, ["cannot be read as json"]),
        ("p.jsonl.gz", b"no", ["cannot be read as jsonl", "gzip"]),
        ("p.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-9], ["cannot be read as jsonl", "ended before"]),
        ("p.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:20] + bytes(30), ["cannot be read as jsonl"]),
        ("p.jsonl.zst", b"no", ["cannot be read as jsonl"]),
        ("p.jsonl.zst", PACK["zst"](LINES.encode())[:-9], ["cannot be read as jsonl"]),
        ("p.jsonl.xz", b"no", ["cannot be read as jsonl"]),
        ("p.jsonl.bz2", b"no", ["cannot be read as jsonl"]),
        ("p.parquet", b"no", ["cannot be read as parquet"]),
        ("p.xlsx", b"no", ["not a .jsonl, .json, .csv or .parquet file, nor one of these compressed"]),
    ],
)
def test_a_broken_file(tmp_path: Path, name: str, content: bytes, parts: list[str]) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    told = refuse(path)
    assert told.startswith(f"prompts.path: {path}: ")
    assert "\n" not in told
    assert all(part in told for part in parts), told


def test_places_without_files(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no such file; give a .jsonl, .json, .csv or .parquet file" in refuse(tmp_path / "p.jsonl")
    assert f"{tmp_path}/*.csv: matches no file; give a pattern that does" in refuse(f"{tmp_path}/*.csv")
    assert "a folder without .parquet, .jsonl, .csv files; give a file or a pattern" in refuse(tmp_path / "empty")


def test_the_file_of_a_bad_row_is_named(folder: Path) -> None:
    pl.DataFrame({"prompt": ["a", None]}).write_parquet(folder / "part=b" / "1.parquet")
    assert refuse(folder).startswith(f"prompts.path: {folder}/part=b/1.parquet: row 2: `prompt` must be text")


def test_what_was_found_right_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command checks a recipe before its flow does; a file that changed is another."""
    path = tmp_path / "p.jsonl"
    path.write_text(LINES)
    config = FilePrompts(source="file", path=str(path), eval=2)
    check_prompts(config, 0)
    path.write_text(LINES + "3\n")
    with pytest.raises(BadInput, match="row 7 is 3"):
        check_prompts(config, 0)
    path.write_text(LINES)
    with monkeypatch.context() as patched:
        patched.setattr("tasks.rows.sources.read_file", None)
        check_prompts(config, 0)
        with pytest.raises(TypeError):
            split_prompts(config, 0)

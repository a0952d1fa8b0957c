"""What a notebook reads: tables of one run or of many, and the flat top-k as lists."""

import random
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from storage.artifacts import write_parquet
from storage.read import scan, unpack_laws, unpack_topk
from storage.schemas import EVALS, PROMPTS, SCHEMAS, SCORES, VOCAB


def put(run: Path, place: str, rows: list[dict], schema: pa.Schema) -> None:
    path = run / f"{place}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_parquet(pa.Table.from_pylist(rows, schema), path)


@pytest.fixture
def root(tmp_path) -> Path:
    """Two runs: `a` with rounds 0 to 2, `b` with round 0 alone."""
    for run, rounds in (("a", 3), ("b", 1)):
        for number in range(rounds):
            rows = [{"round": number, "prompt_id": f"{run}{number}{i}", "score": float(i)} for i in range(2)]
            put(tmp_path / run, f"round={number:04d}/evals/student", rows, EVALS)
        put(tmp_path / run, "vocab/student", [{"token_id": 0, "bytes": b"a"}], VOCAB)
        put(tmp_path / run, "vocab/teacher", [{"token_id": 0, "bytes": None}], VOCAB)
        for split in ("train", "eval"):
            put(tmp_path / run, f"prompts/{split}", [{"prompt_id": split, "split": split}], PROMPTS)
    return tmp_path


def test_one_run(root):
    frame = scan(f"{root}/a", "evals").collect()
    assert sorted(frame["round"].to_list()) == [0, 0, 1, 1, 2, 2]
    assert set(frame["prompt_id"]) == {f"a{number}{i}" for number in range(3) for i in range(2)}
    assert all(row["prompt_id"][1] == str(row["round"]) for row in frame.to_dicts())
    assert "run" not in frame.columns


def test_a_slash_at_the_end_does_not_matter(root):
    assert scan(f"{root}/a/", "evals").collect().equals(scan(f"{root}/a", "evals").collect())


def test_the_columns_are_the_schemas(root):
    frame = scan(f"{root}/a", "evals").collect()
    assert set(frame.columns) == set(EVALS.names)
    assert frame.schema["round"] == pl.Int32
    vocab = scan(f"{root}/a", "vocab").collect()
    assert set(vocab.columns) == {*VOCAB.names, "side", "teacher_name"}
    assert set(vocab["side"]) <= {"student", "teacher"}


def test_many_runs(root):
    frame = scan(f"{root}/*", "evals").collect()
    assert frame.height == 8
    assert all(row["run"] == row["prompt_id"][0] for row in frame.to_dicts())
    assert scan(f"{root}/[b]", "evals").collect()["run"].to_list() == ["b", "b"]


def test_many_runs_tables_without_rounds(root):
    frame = scan(f"{root}/*", "prompts").collect()
    assert sorted(zip(frame["run"], frame["split"], strict=True)) == [
        ("a", "eval"), ("a", "train"), ("b", "eval"), ("b", "train"),
    ]  # fmt: skip
    assert "round" not in frame.columns


def test_rounds_can_be_chosen(root):
    assert scan(f"{root}/a", "evals").filter(pl.col("round") >= 1).select(pl.len()).collect().item() == 4


def test_a_column_that_came_later_is_null_in_older_files(root):
    """Columns may be added: files of an older version are read together with newer ones."""
    older = pa.schema([field for field in EVALS if field.name != "bytes"])
    put(root / "a", "round=0003/evals/student", [{"round": 3, "prompt_id": "old"}], older)
    frame = scan(f"{root}/a", "evals").collect()
    assert frame.filter(pl.col("prompt_id") == "old")["bytes"].to_list() == [None]
    assert frame.height == 7


def test_unknown_table(root):
    with pytest.raises(ValueError, match="unknown table 'rollout'; give one of") as caught:
        scan(f"{root}/a", "rollout")
    assert all(name in str(caught.value) for name in SCHEMAS)


# -- top-k -------------------------------------------------------------------------------------------------------------


def scores(run: Path, number: int, ids: list[str], seed: int) -> list[dict]:
    """Rows as the score stage writes them: ragged counts, rows that were not scored, flat entries."""
    pick, rows = random.Random(seed), []
    for name in ids:
        if pick.random() < 0.3:
            rows.append({"rollout_id": name, "status": "lossy_text"})
            continue
        n = pick.randint(1, 5)
        counts = [pick.randint(1, 4) for _ in range(n)]
        rows.append(
            {
                "rollout_id": name,
                "token_ids": [pick.randrange(100) for _ in range(n)],
                "logprobs": [-pick.random() for _ in range(n)],
                "top_ids": [pick.randrange(100) for _ in range(sum(counts))],
                "top_logprobs": [np.float16(-pick.randrange(64) / 8) for _ in range(sum(counts))],
                "top_counts": counts,
                "rest": [-pick.random() for _ in range(n)],
                "status": "ok",
            }
        )
    put(run, f"round={number:04d}/scores/part-00000", rows, SCORES)
    return rows


def naive(rows: list[dict], **keys) -> list[dict]:
    """The same by loops over Python lists."""
    unpacked = []
    for row in rows:
        if row["status"] != "ok":
            continue
        used = 0
        for position, count in enumerate(row["top_counts"]):
            unpacked.append(
                {
                    **keys,
                    "rollout_id": row["rollout_id"],
                    "position": position,
                    "token_id": row["token_ids"][position],
                    "logprob": float(np.float32(row["logprobs"][position])),
                    "rest": float(np.float32(row["rest"][position])),
                    "ids": row["top_ids"][used : used + count],
                    "logprobs": [float(value) for value in row["top_logprobs"][used : used + count]],
                }
            )
            used += count
    return unpacked


def test_unpack_topk(tmp_path):
    rows = scores(tmp_path / "a", 1, [f"r{i}" for i in range(40)], seed=1)
    more = scores(tmp_path / "a", 2, [f"s{i}" for i in range(10)], seed=2)
    frame = unpack_topk(scan(f"{tmp_path}/a", "scores")).sort("round", "rollout_id", "position").collect()
    expected = naive(rows, round=1) + naive(more, round=2)
    assert frame.to_dicts() == sorted(expected, key=lambda row: (row["round"], row["rollout_id"], row["position"]))


def test_unpack_topk_keeps_runs_apart(tmp_path):
    """The same rollout ids in two runs: each token keeps its own run's entries."""
    expected = []
    for seed, run in enumerate(("a", "b")):
        expected += naive(scores(tmp_path / run, 1, ["r0", "r1", "r2"], seed), run=run, round=1)
    frame = unpack_topk(scan(f"{tmp_path}/*", "scores")).sort("run", "rollout_id", "position").collect()
    assert frame.to_dicts() == expected


def test_unpack_topk_is_lazy_and_can_be_filtered(tmp_path):
    rows = scores(tmp_path / "a", 1, [f"r{i}" for i in range(20)], seed=3)
    frame = unpack_topk(scan(f"{tmp_path}/a", "scores").filter(pl.col("rollout_id") == "r3"))
    expected = [row for row in naive(rows, round=1) if row["rollout_id"] == "r3"]
    assert expected
    assert frame.collect().to_dicts() == expected
    assert frame.filter(pl.col("position") == 0).select("ids").collect().to_dicts() == [{"ids": expected[0]["ids"]}]


def test_unpack_topk_of_nothing(tmp_path):
    put(tmp_path / "a", "round=0001/scores/part-00000", [{"rollout_id": "r", "status": "empty"}], SCORES)
    frame = unpack_topk(scan(f"{tmp_path}/a", "scores")).collect()
    assert frame.height == 0
    assert frame.columns == ["round", "rollout_id", "position", "token_id", "logprob", "rest", "ids", "logprobs"]


def test_unpack_laws(tmp_path):
    """Laws of bytes are laid out as top ids are, under their own names."""
    rows = scores(tmp_path / "a", 1, [f"r{i}" for i in range(20)], seed=4)
    renamed = {"top_ids": "law_classes", "top_logprobs": "law_logprobs", "top_counts": "law_counts"}
    laws = [{renamed.get(name, name): value for name, value in row.items()} for row in rows]
    put(tmp_path / "a", "round=0001/scores/part-00000", laws, SCORES)
    frame = unpack_laws(scan(f"{tmp_path}/a", "scores")).rename({"classes": "ids"})
    assert frame.collect().to_dicts() == naive(rows, round=1)


@pytest.mark.parametrize("name", ["br[ack]et", "st*r", "q?", "{a,b}", "round=0007", "lr=0.1", "model=x", "a b", "日本", "5%25"])
def test_a_root_of_any_name(root, tmp_path, name):
    """Brackets and stars in the name of a folder are no pattern, and `name=value` above a run is no column of its tables."""
    wanted = {table: scan(str(root / "a"), table).collect() for table in ("evals", "vocab")}
    (tmp_path / "br").mkdir()
    (tmp_path / "bra").symlink_to(root / "b")  # what the name would match as a pattern
    place = tmp_path / name
    place.mkdir()
    (root / "a").rename(place / "a")
    for table, rows in wanted.items():
        assert scan(str(place / "a"), table).collect().select(rows.columns).equals(rows)
    assert scan(str(place / "a"), "evals").filter(pl.col("round") == 1).collect()["prompt_id"].to_list() == ["a10", "a11"]

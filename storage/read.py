"""A run's tables as polars frames, for notebooks and for the views."""

from glob import escape, has_magic

import numpy as np
import polars as pl
import pyarrow as pa

from storage.filesystems import filesystem
from storage.schemas import SCHEMAS

FOLDERS = {"vocab", "prompts", "accounts"}


def scan(run: str, table: str) -> pl.LazyFrame:
    """Scan a table of a run, or of several (`runs/*`), as a LazyFrame.

    `run` is a run's folder or URI. Tables of rounds get a `round` column, and `vocab` gets a `side` column (and `teacher_name`,
    which is empty where a recipe has one teacher). With a pattern
    for `run`, a `run` column names each row's run; a folder of that very name is no pattern. Raises ValueError for an unknown
    table.
    """
    if table not in SCHEMAS:
        raise ValueError(f"unknown table '{table}'; give one of {', '.join(SCHEMAS)}")
    run = run.rstrip("/")
    per_round = table not in FOLDERS
    if several := has_magic(run):
        fs, path = filesystem(run)
        several = not fs.exists(path)
        run = run if several else escape(run)
    hive = per_round and "=" not in run  # polars makes a column of every `name=value` in a path, above the run, too
    frame = pl.scan_parquet(
        f"{run}/round=*/{table}/*.parquet" if per_round else f"{run}/{table}/*.parquet",
        hive_partitioning=hive,
        hive_schema={"round": pl.Int32} if hive else None,
        include_file_paths="file",
        missing_columns="insert",
        extra_columns="ignore",
        cast_options=pl.ScanCastOptions(missing_struct_fields="insert", extra_struct_fields="ignore"),
    )
    if per_round and not hive:
        frame = frame.with_columns(round=pl.col("file").str.extract(r"/round=(\d+)/[^/]+/[^/]+$").cast(pl.Int32))
    if several:
        levels = 4 if per_round else 3
        frame = frame.with_columns(run=pl.col("file").str.split("/").list.get(-levels))
    if table == "vocab":
        parts = pl.col("file").str.extract_groups(r"/(?<side>[^/-]+)(?:-(?<teacher_name>[^/]+))?\.parquet$")
        frame = frame.with_columns(
            side=parts.struct.field("side"), teacher_name=parts.struct.field("teacher_name").fill_null("")
        )
    return frame.drop("file")


def unpack_topk(scores: pl.LazyFrame) -> pl.LazyFrame:
    """`scores` with one row per teacher token: `position`, `token_id`, `logprob`, `rest`, and lists `ids`, `logprobs`.

    Log-probs and the log mass `rest` are float32, in nats.
    """
    return _unpack(scores, "top", {"ids": ("top_ids", pl.Int32), "logprobs": ("top_logprobs", pl.Float32)})


def unpack_laws(scores: pl.LazyFrame) -> pl.LazyFrame:
    """As `unpack_topk`, for `score.signal = "bytes"`: lists `classes` (the next byte, 256 for the stop) and `logprobs`."""
    return _unpack(scores, "law", {"classes": ("law_classes", pl.Int32), "logprobs": ("law_logprobs", pl.Float32)})


def _unpack(scores: pl.LazyFrame, signal: str, cut: dict[str, tuple[str, type[pl.DataType]]]) -> pl.LazyFrame:
    columns = scores.collect_schema()
    keys = [name for name in ("run", "round", "rollout_id") if name in columns]

    def unpack(rows: pl.DataFrame) -> pl.DataFrame:
        tokens = rows.select(
            *keys,
            pl.int_ranges(pl.col("token_ids").list.len()).alias("position"),
            pl.col("token_ids").alias("token_id"),
            pl.col("logprobs").alias("logprob"),
            "rest",
        ).explode("position", "token_id", "logprob", "rest")
        # The entries of all tokens lie one after another, in the tokens' order; the counts say where each token's entries end.
        offsets = np.append(0, rows[f"{signal}_counts"].explode().to_numpy().cumsum(dtype=np.int64))
        for name, (column, kind) in cut.items():
            entries = rows[column].explode().cast(kind).to_arrow()
            tokens = tokens.with_columns(pl.Series(name, pa.LargeListArray.from_arrays(offsets, entries)))
        return tokens

    schema = {name: columns[name] for name in keys}
    schema |= {"position": pl.Int64(), "token_id": pl.Int32(), "logprob": pl.Float32(), "rest": pl.Float32()}
    schema |= {name: pl.List(kind) for name, (_, kind) in cut.items()}
    return scores.filter(pl.col("status") == "ok").map_batches(unpack, schema=pl.Schema(schema), streamable=True)

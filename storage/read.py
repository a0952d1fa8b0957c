"""What a notebook imports: a run's tables as polars frames."""

from glob import has_magic

import polars as pl

from storage.schemas import SCHEMAS

FOLDERS = {"vocab": "vocab", "prompts": "prompts"}


def scan(run: str, table: str) -> pl.LazyFrame:
    """A table of a run (or of several: `runs/*`) as a LazyFrame.

    `run` is a run's folder or URI. Tables of rounds have a `round` column; with a pattern for `run`, a `run` column
    says where a row is from. Raises ValueError for an unknown table.
    """
    if table not in SCHEMAS:
        raise ValueError(f"unknown table '{table}'; one of {', '.join(SCHEMAS)}")
    run = run.rstrip("/")
    per_round = table not in FOLDERS
    frame = pl.scan_parquet(
        f"{run}/round=*/{table}/*.parquet" if per_round else f"{run}/{table}/*.parquet",
        hive_partitioning=per_round,
        hive_schema={"round": pl.Int32} if per_round else None,
        include_file_paths="file",
        missing_columns="insert",
        extra_columns="ignore",
    )
    if has_magic(run):
        levels = 4 if per_round else 3
        frame = frame.with_columns(run=pl.col("file").str.split("/").list.get(-levels))
    return frame.drop("file")


def unpack_topk(scores: pl.LazyFrame) -> pl.LazyFrame:
    """`scores` with one row a teacher token: `position`, `token_id`, `logprob`, `rest`, and lists `ids`, `logprobs`."""
    tokens = (
        scores.filter(pl.col("status") == "ok")
        .select("round", "rollout_id", "token_ids", "logprobs", "rest", "top_counts")
        .with_columns(position=pl.int_ranges(pl.col("token_ids").list.len()))
        .explode("token_ids", "logprobs", "rest", "top_counts", "position")
        .rename({"token_ids": "token_id", "logprobs": "logprob"})
    )
    entries = (
        scores.filter(pl.col("status") == "ok")
        .select(
            "round",
            "rollout_id",
            pl.col("top_ids"),
            pl.col("top_logprobs").list.eval(pl.element().cast(pl.Float32)),
            position=pl.int_ranges(pl.col("top_counts").list.len()).list.eval(pl.element()),
            counts="top_counts",
        )
        .with_columns(
            position=pl.struct("position", "counts").map_elements(
                lambda row: [p for p, n in zip(row["position"], row["counts"], strict=True) for _ in range(n)],
                return_dtype=pl.List(pl.Int64),
            )
        )
        .explode("top_ids", "top_logprobs", "position")
        .group_by("round", "rollout_id", "position", maintain_order=True)
        .agg(ids="top_ids", logprobs="top_logprobs")
    )
    return tokens.join(entries, on=["round", "rollout_id", "position"], how="left").drop("top_counts")

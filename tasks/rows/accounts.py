"""The account of prompts, as people read it: what became of every row of each source."""

from typing import Any

from tasks.rows.split import EVAL, OUTCOMES, TRAIN


def summarise_account(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a source from rows of `accounts`: how many were read, then how many had each outcome."""
    sources: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records:
        key = (record["source"], record["read_as"])
        row = sources.setdefault(
            key, {"source": key[0], "read as": key[1], "rows": 0, **dict.fromkeys(OUTCOMES, 0), "without a reference": 0}
        )
        row["rows"] += record["rows"]
        row[record["outcome"]] += record["rows"]
        if record["outcome"] in (TRAIN, EVAL):
            row["without a reference"] += record["without_reference"]
    return list(sources.values())


def describe_account(field: str, records: list[dict[str, Any]]) -> list[str]:
    """`prompts.path: a.jsonl: read as ShareGPT: 1,200 rows: 1,000 to train on, 128 held out, 72 duplicates`."""
    lines = []
    for row in summarise_account(records):
        parts = [f"{row[outcome]:,} {outcome}" for outcome in OUTCOMES if row[outcome]]
        missing = row["without a reference"]
        lack = f"; {missing:,} of the {row[TRAIN] + row[EVAL]:,} that are used have no reference" if missing else ""
        told = f"{field}: {row['source']}: read as {row['read as']}: {row['rows']:,} rows: {', '.join(parts)}"
        lines.append(told + lack)
    return lines

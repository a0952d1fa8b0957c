"""The account of prompts, as people read it: what became of every row of each source."""

from typing import Any

from tasks.rows.split import EVAL, OUTCOMES, TRAIN

LACKING = "used without a reference"


def summarise_account(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a source from rows of `accounts`: how many were read, then how many had each outcome that there is."""
    outcomes = [name for name in OUTCOMES if any(record["outcome"] == name for record in records)]
    sources: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records:
        key = (record["source"], record["read_as"])
        new = {"source": key[0], "read as": key[1], "rows": 0, **dict.fromkeys(outcomes, 0), LACKING: 0}
        row = sources.setdefault(key, new)
        row["rows"] += record["rows"]
        row[record["outcome"]] += record["rows"]
        row[LACKING] += record["without_reference"] * (record["outcome"] in (TRAIN, EVAL))
    return list(sources.values())


def describe_account(field: str, records: list[dict[str, Any]]) -> list[str]:
    """`prompts.path: a.jsonl: read as ShareGPT: 1,200 rows: 1,000 to train on, 128 held out, 72 duplicates`."""
    lines = []
    for row in summarise_account(records):
        counts = {outcome: row[outcome] for outcome in OUTCOMES if row.get(outcome)}
        parts = [f"{n:,} {outcome.replace('duplicates', 'duplicate') if n == 1 else outcome}" for outcome, n in counts.items()]
        lack = f"; {row[LACKING]:,} of the prompts used have no reference" if row[LACKING] else ""
        told = f"{field}: {row['source']}: read as {row['read as']}: {row['rows']:,} rows: {', '.join(parts)}"
        lines.append(told + lack)
    return lines

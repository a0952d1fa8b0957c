"""Markdown from rows and texts. What a model or a person wrote stands in it as text: it is never obeyed."""

import re
from typing import Any

MEANING = (
    "sampled, greedy: accuracy on held-out prompts, with 95% intervals. recovered: the share of the teacher's lead that the "
    "student has gained. divergence: from the teacher, in nats per byte, on the student's samples (of a cache: on held-out "
    "texts). tokens: mean length of the answers. truncated: the share of answers cut at the length limit. supervised: the "
    "share of completion bytes that a term of the loss covers."
)


def format_table(rows: list[dict[str, Any]]) -> str:
    """Rows that have the same columns as a table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += [
        "| " + " | ".join("" if value is None else _fit_cell(str(value)) for value in row.values()) + " |" for row in rows
    ]
    return "\n".join(lines)


def _fit_cell(text: str) -> str:
    text = re.sub(r"\\(?=\|)", r"\\ ", re.sub(r"\s+", " ", text))  # a backslash before it would free the bar again
    return text.replace("|", "\\|")


def quote(text: str) -> str:
    """A text as code inside a line: its line breaks are `⏎`."""
    text = re.sub(r"\r\n|\r|\n", "⏎", text)
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") or not text.strip() else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def fence(text: str, language: str = "") -> str:
    """A text as a block of code."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"

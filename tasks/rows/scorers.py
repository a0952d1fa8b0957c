"""What a completion is worth: 1 is a right answer."""

import json
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from configs.errors import BadInput
from configs.evaluate import Evaluate
from tasks.rows.messages import is_of_task
from tasks.rows.sources import load_gym_dataset

SECONDS = 5  # for a formula of a model's making; only a main thread can be interrupted

Scorer = Callable[[str, dict[str, Any]], float]


def check_scorer(config: Evaluate) -> None:
    """BadInput where the scorer's package is missing."""
    make_scorer(config.scorer)


def make_scorer(kind: str) -> Scorer:
    """`score(text, prompt row) -> float`, of a kind that `evaluate.scorer` names."""
    return {"task": _task, "exact": lambda: score_exact, "math": _math}[kind]()


def make_grader(kind: str) -> Callable[[Sequence[str], dict[str, Any]], float | None]:
    """`grade(spellings, prompt row)`: the best score of an answer's spellings; None where there is nothing to grade by."""
    score = make_scorer(kind)
    return lambda texts, row: max(score(text, row) for text in texts) if is_graded(kind, row) else None


def is_graded(kind: str, row: dict[str, Any]) -> bool:
    """Whether there is anything to grade an answer to this prompt by: a reference, or a task's own scorer."""
    return row["reference"] is not None or (kind == "task" and is_of_task(json.loads(row["metadata"] or "{}")))


def score_exact(text: str, row: dict[str, Any]) -> float:
    """Whether the text is the reference."""
    return float(text.strip() == (row["reference"] or "").strip())


def _task() -> Scorer:
    """The task's own scorer where the prompt knows its task, else exact match."""
    datasets: dict[str, Any] = {}

    def score(text: str, row: dict[str, Any]) -> float:
        metadata = json.loads(row["metadata"] or "{}")
        if not is_of_task(metadata):
            return score_exact(text, row)
        from reasoning_gym.utils import extract_answer

        name = json.dumps([metadata["task"], metadata["options"]])
        dataset = datasets.get(name) or datasets.setdefault(name, load_gym_dataset(metadata["task"], metadata["options"]))
        return float(dataset.score_answer(extract_answer(text) or text.strip(), metadata["entry"]))

    return score


def _math() -> Scorer:
    """Whether the number or formula that a text ends with equals the reference's (boxed, behind ####, or last)."""
    try:
        from math_verify import parse, verify
    except ImportError:
        raise BadInput("evaluate.scorer = 'math' needs one more package: pip install -e '.[math]'") from None
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # what cannot be parsed is wrong, and no news

    def score(text: str, row: dict[str, Any]) -> float:
        limit = SECONDS if threading.current_thread() is threading.main_thread() else None
        wanted, given = (parse(t, parsing_timeout=limit) for t in (row["reference"] or "", text))
        return float(verify(wanted, given, timeout_seconds=limit))

    return score

"""Markers between real tokenizers (MATHS.md §3): the teacher's sequence is what its own tokenizer makes of its own spelling."""

from functools import cache
from typing import Any

import fetch
import numpy as np
import pytest
from toys import rollouts_table, scores_of, topk_scores

from configs.errors import BadInput
from configs.load import validate_recipe
from configs.objectives import Alm
from tasks import objectives
from tasks.align import align_rollouts
from tasks.engines.base import TokenScores
from tasks.models.pair import make_markers, student_ids, teacher_ids
from tasks.models.text import Side, tokenizer_of
from tasks.tokens.align import Kind
from tasks.tokens.markers import Markers

THINK = [
    ["<think>\n", "<|channel|>analysis<|message|>"],
    ["</think>\n\n", "<|end|><|start|>assistant<|channel|>final<|message|>"],
]
TURNED = [[other, own] for own, other in THINK]
ANSWERS = ["{0}Let me see: 12 + 30.\n{1}The answer is 42.", "{0}{1}42", "{0}\n{1}é 👩‍👩‍👧‍👦 x", "plain 42", "{0}cut in thought"]


@pytest.fixture(scope="module", autouse=True)
def _fetched() -> None:
    fetch.main(["tokenizers"])


@cache
def known(name: str) -> Side:
    return tokenizer_of(str(fetch.MODELS / name))


def markers_of(student: Side, teacher: Side, pairs: Any, unpaired: str = "end") -> Markers:
    data = {
        "name": "m",
        "student": {"model": student.ref.path},
        "teacher": {"model": teacher.ref.path, "markers": pairs, "unpaired": unpaired},
        "prompts": {"source": "file", "path": "p.jsonl"},
        "objective": {"name": "alm"},
    }
    return make_markers(validate_recipe(data, "r"), student=student, teacher=teacher)


def own_ids(text_side: Side, text: str) -> list[int]:
    """What a tokenizer itself makes of a text in which its special tokens are spelled out."""
    ids: list[int] = text_side.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def row_of(text_side: Side, text: str, stopped: bool = True) -> dict[str, Any]:
    ids = own_ids(text_side, text)
    text = text_side.beta.join(ids).decode()
    finish = "stop" if stopped else "length"
    return {"token_ids": ids + text_side.stop_ids[:1] * stopped, "text": text, "finish_reason": finish}


def sampled_scores(path: np.ndarray) -> TokenScores:
    """Scores with these log-probs of the actual tokens, and one event each."""
    n, rest = len(path), np.log1p(-np.exp(path))
    zeros, ones = np.zeros(n, np.int32), np.ones(n, np.int16)
    return topk_scores(path.astype(np.float32), zeros, path.astype(np.float16), ones, rest.astype(np.float32))


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [("qwen3", "gptoss", THINK), ("gptoss", "qwen3", TURNED), ("llama3", "gptoss", THINK), ("deepseek_v3", "gptoss", THINK)],
    ids=str,
)
def test_both_sides_write_markers_of_their_own(student: str, teacher: str, pairs: list[list[str]]) -> None:
    """Qwen's `<think>` is an added token with bytes, Llama's several tokens of text, GPT-OSS' channels three to six tokens."""
    own, other = known(student), known(teacher)
    markers = markers_of(own, other, pairs)
    mine, theirs = ([answer.format(*[pair[side] for pair in pairs]) for answer in ANSWERS] for side in (0, 1))
    rows = [row_of(own, text) for text in mine]
    graded = teacher_ids(rows, student=own, teacher=other, markers=markers)
    assert [ids[-1] for ids in graded if ids] == other.stop_ids[:1] * len(ANSWERS)
    assert [other.tokenizer.decode(ids[:-1], skip_special_tokens=False) for ids in graded if ids] == theirs
    if teacher == "gptoss":  # whose markers end in special tokens, so that its own encoding splits there, too
        assert [ids[:-1] for ids in graded if ids] == [own_ids(other, text) for text in theirs]
    # The teacher's own completion becomes the student's.
    written = [row_of(other, text, stopped=False) for text in theirs]
    got = student_ids(written, student=own, teacher=other, markers=markers)
    assert [whole for _, whole in got] == [True] * len(ANSWERS)
    for (ids, _), text in zip(got, mine, strict=True):
        assert ids is not None
        assert own.tokenizer.decode(ids, skip_special_tokens=False) == text

    rng = np.random.default_rng(0)
    paths = [-rng.random(len(ids or [])) for ids in graded]
    results = [sampled_scores(p) for p in paths]
    behaviour = [-rng.random(len(row["token_ids"])) for row in rows]
    rollouts = rollouts_table(
        [[0]] * len(rows), [row["token_ids"] for row in rows], own, [row["text"] for row in rows], behaviour
    )
    module = objectives.build(Alm(name="alm"), student=own.vocabulary, teacher=other.vocabulary)
    table = align_rollouts(rollouts, scores_of(results, graded), module, markers=markers, student=own, teacher=other)
    for row, given, z, path, sampled in zip(table.to_pylist(), rows, graded, paths, behaviour, strict=True):
        assert row["status"] == "ok"
        assert row["tail_bytes"] == row["unmatched_bytes"] == row["dropped_bytes"] == row["unpaired"] == 0
        assert row["supervised_bytes"] == len(given["text"].encode())
        assert row["canonical"]
        assert row["kind"][-1] == Kind.STOP
        assert (row["student_ends"][-1], row["teacher_ends"][-1]) == (len(given["token_ids"]), len(z or []))
        # All of both paths is in the units, and each unit has its own part of it.
        assert row["teacher_logprobs"] == pytest.approx(parts(path, row["teacher_ends"]), abs=1e-4)
        assert row["student_logprobs"] == pytest.approx(parts(sampled, row["student_ends"]), abs=1e-4)
        assert row["kind"].count(Kind.MARKER) == sum(own_text in given_spelling(own, given) for own_text, _ in pairs)
        bounds = [0, *row["teacher_ends"]]
        spans = [(z or [])[a:b] for a, b, kind in zip(bounds, bounds[1:], row["kind"]) if kind == Kind.MARKER]
        wanted = [other_text for own_text, other_text in pairs if own_text in given_spelling(own, given)]
        for span, text in zip(spans, wanted, strict=True):
            assert text in other.tokenizer.decode(span, skip_special_tokens=False)


def given_spelling(text_side: Side, row: dict[str, Any]) -> str:
    return str(text_side.tokenizer.decode(row["token_ids"], skip_special_tokens=False))


def parts(values: np.ndarray, ends: list[int]) -> list[float]:
    return [float(values[a:b].sum()) for a, b in zip([0, *ends], ends)]


@pytest.mark.parametrize(("unpaired", "text", "count"), [("end", "thought ", 1), ("skip", "thought answer", 4)])
def test_unpaired_channels_of_gpt_oss(unpaired: str, text: str, count: int) -> None:
    own, other = known("gptoss"), known("qwen3")
    markers = markers_of(own, other, [], unpaired)
    row = row_of(own, "thought <|channel|><|message|>answer<|end|><|start|>")
    (ids,) = teacher_ids([row], student=own, teacher=other, markers=markers)
    assert ids is not None
    assert other.beta.join(ids[:-1]).decode() == text
    rollouts = rollouts_table([[0]], [row["token_ids"]], own, [row["text"]])
    result = sampled_scores(np.full(len(ids), -1.0))
    module = objectives.build(Alm(name="alm"), student=own.vocabulary, teacher=other.vocabulary)
    table = align_rollouts(rollouts, scores_of([result], [ids]), module, markers=markers, student=own, teacher=other)
    (aligned,) = table.to_pylist()
    assert aligned["unpaired"] == count
    assert aligned["supervised_bytes"] == len(text)
    assert aligned["tail_bytes"] == len("thought answer") - len(text)


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([["<think>", "x<|return|>"]], "which ends its answers"),
        ([["<think>", "a"], ["<think>", "b"]], "is paired twice"),
    ],
)
def test_markers_that_cannot_be(pairs: list[list[str]], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        markers_of(known("qwen3"), known("gptoss"), pairs)

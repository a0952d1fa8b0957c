"""Answers with control tokens through the stages of a round: on-policy, the teacher's completions, evaluations, preflight."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import tomli_w
import torch
from helpers import refused

from configs.load import load_recipe
from configs.models import Scratch
from flows.preflight import preflight
from storage.artifacts import read_table
from tasks import align, completions, evaluate, prompts, rollout, score, train, vocab
from tasks.gates.expected import find_open_tag
from tasks.models.reference import make_reference
from tasks.models.text import side
from tasks.rows.round import Pair, Round, Shard
from tasks.scratch import init_model, train_tokenizer
from tasks.tokens.align import Kind

TEXTS = ["one two three four five", "what is hello? hello", "think then answer, answer then think"]
TOKENS = [["<user>", "<system>"], ["<system>", "<assistant>"]]
PAIRS = [["<user>", "<system>then "], ["<system>", "<assistant>"]]


def writer(folder: Path, size: int, often: dict[str, float], seed: int) -> Path:
    """A model that writes lower-case words and, as often as said, some of its special tokens."""
    shape = Scratch(vocab_size=size, layers=1, width=16, heads=2, feed_forward=16, context=96)
    tokenizer = train_tokenizer(shape, TEXTS)
    model = init_model(shape, tokenizer, seed)
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    bias = [often.get(piece, 0.0 if piece.isascii() and piece.islower() and "<" not in piece else -12.0) for piece in pieces]
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(len(tokenizer), 16))
    with torch.no_grad():  # the first column of all embeddings is large, so that of the last hidden state is 4
        model.get_input_embeddings().weight.mul_(0.1)[:, 0] = 40.0
        model.lm_head.weight[:, 0] = torch.tensor(bias) / 4
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def writers(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("writers")
    often = {"<end>": 1.0, "<user>": 1.5, "<system>": 1.5}
    return {
        "student": writer(folder / "student", 290, often, 0),
        "teacher": writer(folder / "teacher", 310, {"<end>": 1.0, "<system>": 1.5, "<assistant>": 1.5}, 1),
        "plain": writer(folder / "plain", 310, {"<end>": 1.0}, 2),
        "silent": writer(folder / "silent", 290, {"<end>": 1.0}, 3),
        "thinking": writer(folder / "thinking", 290, {"<end>": 1.0, "<user>": 6.0}, 4),
        "thinker": writer(folder / "thinker", 310, {"<end>": 1.0, "<system>": 6.0}, 5),
    }


@pytest.fixture
def recipe(writers, tmp_path) -> Callable[..., Path]:
    def write(own: str = "student", other: str = "teacher", objective: str = "bytes", **tables: Any) -> Path:
        rows = [{"prompt": f"what is hello? {i}", "reference": "hello"} for i in range(40)]
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data: dict[str, Any] = {
            "name": "thinking",
            "root": str(tmp_path / "runs"),
            "student": {"model": str(writers[own])},
            "teacher": {"model": str(writers[other])},
            "prompts": {"source": "file", "path": "prompts.jsonl", "train": 24, "eval": 8},
            "rollout": {"prompts": 12, "max_new_tokens": 24},
            "score": {"k": 290},
            "objective": {"name": objective},
            "train": {"batch_size": 8, "learning_rate": 1e-3},
            "evaluate": {"samples": 1},
        }
        path = tmp_path / "thinking.toml"
        path.write_text(tomli_w.dumps({name: data[name] | tables[name] if name in tables else data[name] for name in data}))
        return path

    return write


def run_round(path: Path) -> dict[str, pl.DataFrame]:
    """The tables of one round, by the stages' own functions."""
    given = load_recipe(path)
    student, teacher = (make_reference(config, config.model or "") for config in (given.student, given.teacher) if config)
    split = prompts.make_prompts.fn(given)
    words = vocab.match_vocabularies.fn(given, student=student, teacher=teacher)
    pair = Pair(name="", recipe=given, teacher=teacher, vocabularies=words)
    round = Round(recipe=given, number=1, student=student, pairs=(pair,), start=student, prompts=split.train)
    shard = Shard(0)
    if given.rollout.on_policy < 1:
        shard = completions.complete_shard.fn(round, shard)
    shard = align.align_shard.fn(round, score.score_shard.fn(round, rollout.roll_out.fn(round, shard)))
    train.train_round.fn(round, (shard,))
    artifacts = {name: getattr(shard, name) for name in ("rollouts", "aligned")}
    artifacts |= {name: next(iter(getattr(shard, name)), None) for name in ("completions", "scores")}
    evaluate_student = partial(evaluate.evaluate_model.fn, given, 1, "student", split.eval)
    artifacts["evals"] = evaluate_student(model=student, teachers={"": teacher} if teacher else {})
    tables = {name: pl.from_arrow(read_table(artifact)) for name, artifact in artifacts.items() if artifact}
    return tables | {"steps": pl.read_parquet(Path(given.root) / given.name / "round=0001/steps/*.parquet")}  # type: ignore[dict-item]


def check_accounts(tables: dict[str, pl.DataFrame], path: Path) -> None:
    lengths = side(make_reference(load_recipe(path).student, load_recipe(path).student.model or "")).beta.lengths
    sizes = [int(lengths[ids].sum()) for ids in tables["rollouts"]["token_ids"].to_list()]
    counts = tables["aligned"].select(pl.sum_horizontal(pl.col("^.*_bytes$"))).to_series().to_list()
    assert counts == sizes
    assert tables["steps"]["loss"].is_finite().all()


@pytest.mark.parametrize("objective", ["bytes", "opd"])
def test_on_policy_with_markers(recipe, objective: str) -> None:
    """The teacher reads its own tokens, each marker is a unit, and no row ends at one."""
    path = recipe(objective=objective, teacher={"markers": PAIRS})
    tables = run_round(path)
    check_accounts(tables, path)
    own, other = (side(make_reference(c, c.model)) for c in (load_recipe(path).student, load_recipe(path).teacher))  # type: ignore[union-attr, arg-type]
    marks = {own.tokenizer.convert_tokens_to_ids(mine): theirs for mine, theirs in PAIRS}
    joined = tables["rollouts"].join(tables["scores"], on="rollout_id", suffix="_t").join(tables["aligned"], on="rollout_id")
    seen = 0
    for row in joined.iter_rows(named=True):
        wanted = "".join(marks.get(i, own.beta.pieces[i].decode()) for i in row["token_ids"])
        assert other.tokenizer.decode(row["token_ids_t"], skip_special_tokens=False).removesuffix("<end>") == wanted
        markers = sum(i in marks for i in row["token_ids"])
        assert row["kind"].count(Kind.MARKER) == markers
        assert row["status"] == "ok"
        assert row["tail_bytes"] == row["unpaired"] == 0
        seen += markers
    assert seen > 10
    assert tables["evals"]["teacher_logprob"].null_count() == 0  # both sides' log-probs are of the whole answer


@pytest.mark.parametrize(("unpaired", "whole"), [("end", False), ("skip", True)])
def test_without_markers_control_tokens_are_counted(recipe, unpaired: str, whole: bool) -> None:
    path = recipe(teacher={"unpaired": unpaired})
    tables = run_round(path)
    check_accounts(tables, path)
    aligned = tables["aligned"]
    assert aligned["unpaired"].sum() > 5
    assert (aligned["tail_bytes"].sum() == 0) == whole
    assert (aligned["kind"].explode() == Kind.SKIPPED).any() == whole


@pytest.mark.parametrize("markers", [True, False])
def test_the_teachers_completions_keep_their_markers(recipe, markers: bool) -> None:
    """In the student's ids a completion has the student's own markers; without pairs it ends at the first control token."""
    more = {"markers": TOKENS} if markers else {}
    path = recipe(teacher=more, rollout={"on_policy": 0.0, "off_policy": "teacher"})
    tables = run_round(path)
    check_accounts(tables, path)
    own, other = (side(make_reference(c, c.model)) for c in (load_recipe(path).student, load_recipe(path).teacher))  # type: ignore[union-attr, arg-type]
    joined = tables["rollouts"].join(tables["completions"], on="rollout_id", suffix="_t")
    ended = 0
    for row in joined.join(tables["aligned"], on="rollout_id").iter_rows(named=True):
        written = other.tokenizer.decode(row["token_ids_t"], skip_special_tokens=False).removesuffix("<end>")
        first = min((at for name in ("<system>", "<assistant>") if (at := written.find(name)) >= 0), default=len(written))
        ended += first < len(written)
        if markers:
            written = written.replace("<system>", "<user>").replace("<assistant>", "<system>")
        else:
            written = written[:first]
        got = own.tokenizer.decode(row["token_ids"], skip_special_tokens=False).removesuffix("<end>")
        assert written.startswith(got)
        assert got == written or len(row["token_ids"]) == 24
        assert row["unpaired"] == 0
    assert ended > 3


def test_with_one_tokenizer_nothing_is_lost(recipe) -> None:
    for rollout_table in ({}, {"on_policy": 0.0, "off_policy": "teacher"}):
        path = recipe(other="student", objective="gkd", rollout=rollout_table)
        tables = run_round(path)
        check_accounts(tables, path)
        assert tables["aligned"]["tail_bytes"].sum() == tables["aligned"]["dropped_bytes"].sum() == 0
        assert (tables["aligned"]["units"] == tables["rollouts"]["token_ids"].list.len()).all()
        assert tables["evals"]["teacher_logprob"].null_count() == 0


# -- what both sides expect ------------------------------------------------------------------------------------------------


def expected(path: Path) -> dict[str, str]:
    (row,) = [row for row in preflight(str(path), prompts=4) if row["gate"] == "expected"]
    return row


def test_a_teacher_that_thinks_alone_is_a_breach(recipe, server) -> None:
    alone = expected(recipe(own="silent", other="thinker"))
    assert alone["result"] == "BREACHED"
    assert "<system> (teacher's)" in alone["detail"]
    assert "enable_thinking" in alone["advice"]
    assert "teacher.markers" in alone["advice"]
    assert expected(recipe(own="silent", other="plain"))["result"] == "ok"
    assert expected(recipe(own="thinking", other="thinker", teacher={"markers": TOKENS}))["result"] == "ok"
    assert expected(recipe(own="thinking", other="thinker"))["result"] == "BREACHED"  # each by a token that the other lacks


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        ("<u>2 + 2<a>\n<think>\n", "<think>"),
        ("<u>2 + 2<a>\n<think>\n\n</think>\n\n", None),
        ("<u>2 + 2<a>\n", None),
        ("<think>x<u>2 + 2<a>\n", None),  # before the last message
        ("<u>2 + 2<a>[THINK]", "[THINK]"),
        ("<u>2 + 2<a><|think|>", "<|think|>"),
    ],
)
def test_a_prompt_that_opens_a_block_of_thought(text: str, tag: str | None) -> None:
    assert find_open_tag(text, "2 + 2") == tag


# -- what a recipe may say -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tables", "parts"),
    [
        ({"student": {"markers": PAIRS}}, ["student.markers", "teacher.markers"]),
        ({"teacher": {"markers": [["<user>"]]}}, ["teacher.markers"]),
        ({"teacher": {"markers": [["<user>", "<end>"]]}}, ["<end>", "ends its answers"]),
        ({"teacher": {"unpaired": "drop"}}, ["teacher.unpaired", "'end' or 'skip'"]),
    ],
)
def test_markers_that_cannot_be_meant(recipe, potstill, tables: dict[str, Any], parts: list[str]) -> None:
    refused(potstill("run", recipe(**tables)), *parts)


@pytest.mark.parametrize("line", ['markers = [["<user>", "<user>"]]', 'unpaired = "skip"'])
def test_what_one_tokenizer_has_no_use_for_is_refused(recipe, potstill, line: str) -> None:
    path = recipe(other="student", objective="gkd")
    path.write_text(path.read_text().replace("[prompts]", f"{line}\n\n[prompts]", 1))
    refused(potstill("run", path), f"teacher.{line.split()[0]}", "have one")

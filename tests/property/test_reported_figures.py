"""Figures that are reported hold whatever law samples are drawn by (MATHS.md §7), and in the state that trains."""

from functools import cache
from typing import Any

import pyarrow as pa
import pytest
import torch
from toys import TEXTS, byte_level, full_logprobs, saved, student_ref
from transformers import GPT2Config, GPT2LMHeadModel

from configs.load import select_content, validate_recipe
from configs.schema import Recipe
from tasks import objectives
from tasks.align import align_rollouts
from tasks.engines.transformers import TransformersEngine
from tasks.evaluate import _add_teacher_logprobs, evaluate_prompts
from tasks.models.reference import ModelRef
from tasks.models.text import side
from tasks.models.weights import load_weights
from tasks.rollout import make_rollouts
from tasks.rows.plan import Row
from tasks.score import score_rows
from tasks.signals import make_signal
from tasks.signals.base import Signal
from tasks.tokens.markers import ONE_TOKENIZER
from tasks.tokens.token_bytes import TokenBytes, spell_answer
from tasks.training.student import load_for_training, mean_loss

LAWS = [{}, {"temperature": 0.5}, {"temperature": 1.3}, {"top_p": 0.5}, {"top_k": 3}]
ASKED = [*TEXTS, *map(str, range(10))]
PROMPTS = [
    {"prompt_id": f"p{i:02}", "messages": [{"role": "user", "content": text}], "reference": "x"} for i, text in enumerate(ASKED)
]


@cache
def writing_ref(stops: int) -> ModelRef:
    """A model that writes ASCII: other ids, but for its stops, have an embedding of 0."""
    ref = student_ref()
    text_side, model = side(ref), load_weights(ref)
    ids = [text_side.tokenizer.eos_token_id, *text_side.tokenizer.convert_tokens_to_ids(["<user>", "<system>"])][:stops]
    keep = [value is not None and value.isascii() and value.isalnum() for value in text_side.beta.values]
    with torch.no_grad():
        for i, kept in enumerate(keep):
            if not kept and i not in ids:
                model.get_output_embeddings().weight[i] = 0
    return saved(f"writing-{stops}", model, text_side.tokenizer, ids)  # type: ignore[arg-type]


def score_itself(ref: ModelRef, rollouts: pa.Table, messages: dict[str, Any], signal: Signal) -> pa.Table:
    """A model's scores of its own rollouts."""
    rows, own = rollouts.to_pylist(), side(ref)
    return score_rows(rows, messages, TransformersEngine(ref), signal, ONE_TOKENIZER, student=own, teacher=own)


def recipe_of(ref: ModelRef, objective: str = "gkd", **rollout: float) -> Recipe:
    model = {"model": ref.path}
    data = {
        "name": "figures",
        "student": model,
        "teacher": model,
        "prompts": {"source": "file", "path": "prompts.jsonl"},
        "rollout": {"max_new_tokens": 8, **rollout},
        "score": {"k": 200},
        "objective": {"name": objective},
        "evaluate": {"samples": 2, "scorer": "exact"},
    }
    return validate_recipe(data, "figures")


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("stops", [1, 3])
def test_an_evaluated_model_is_at_no_distance_from_itself(stops: int, law: dict[str, float]) -> None:
    """Greedy and sampled; each log-prob is that of a plain forward pass at temperature 1, the stop being one event."""
    ref = writing_ref(stops)
    text_side, model, size = side(ref), load_weights(ref), len(side(ref).beta.values)
    rows = [{**row, "metadata": None} for row in PROMPTS]
    recipe = recipe_of(ref, **law)
    records = evaluate_prompts(recipe, 0, "student", ref, rows)
    _add_teacher_logprobs(recipe, records, {row["prompt_id"]: (row["messages"], None) for row in rows}, model=ref, teacher=ref)
    compared = [record for record in records if "divergence" in record]
    assert {record["decoding"] for record in compared} == {"greedy", "sampled"}
    for record in compared:
        prompt, ids = record["prompt_token_ids"], record["token_ids"]
        table = full_logprobs(model, prompt + ids, size)[len(prompt) - 1 : -1]
        stopped = ids[-1] in text_side.stop_ids
        path = [float(table[i, token]) for i, token in enumerate(ids)]
        if stopped:
            path[-1] = float(table[-1, text_side.stop_ids].logsumexp(-1))
        assert record["logprob"] == pytest.approx(sum(path), abs=1e-3)
        assert record["divergence"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_aligned_units_compare_both_models_own_laws(law: dict[str, float]) -> None:
    """A model as its own teacher: `student_logprobs` are `teacher_logprobs`; the policy's stay what they were drawn by."""
    ref = writing_ref(1)
    prompts = pa.Table.from_pylist(PROMPTS)
    rows = [Row(i, 0, "student", 100 + i, f"r{i}") for i in range(len(PROMPTS))]
    recipe = recipe_of(ref, **law)
    rollouts = make_rollouts(rows, prompts, recipe.rollout, 1, ref, [])
    messages = {row["prompt_id"]: (row["messages"], None) for row in PROMPTS}
    scores = score_itself(ref, rollouts, messages, make_signal("sampled"))
    vocabulary = side(ref).vocabulary
    objective = objectives.build(recipe_of(ref, "opd").objective, student=vocabulary, teacher=vocabulary)
    table = align_rollouts(rollouts, scores, objective, make_signal("sampled"), student=side(ref), teacher=side(ref))
    assert table["status"].to_pylist().count("ok") >= 3
    for row, drawn in zip(table.to_pylist(), rollouts.to_pylist(), strict=True):
        if row["status"] == "ok" and row["student_ends"][-1] == len(drawn["token_ids"]):
            assert row["student_logprobs"] == pytest.approx(row["teacher_logprobs"], abs=1e-4)
            assert sum(row["term_behaviour"]) == pytest.approx(sum(drawn["logprobs"]), abs=1e-3)
    assert ("model_logprobs" in rollouts.column_names) == bool(law), "a table of samples at temperature 1 has no other column"


@cache
def dropping_ref() -> ModelRef:
    """GPT-2's defaults: a dropout of 0.1 in three places."""
    torch.manual_seed(0)
    tokenizer = byte_level()
    shape = {"n_positions": 128, "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": len(tokenizer)}
    return saved("dropping", GPT2LMHeadModel(GPT2Config(**shape)), tokenizer, [tokenizer.eos_token_id])  # type: ignore[arg-type]


@pytest.mark.parametrize("dropout", [False, True])
def test_dropout_is_used_where_it_is_asked_for(dropout: bool) -> None:
    model, ids = load_for_training(dropping_ref(), dropout), torch.tensor([[5, 6, 7, 8]])
    assert model.training
    with torch.no_grad():
        once, again = (model(input_ids=ids).logits for _ in range(2))
        plain = load_weights(dropping_ref(), torch.float32).eval()(input_ids=ids).logits
    assert torch.equal(once, again) == torch.equal(once, plain) == (not dropout)
    assert model.config.resid_pdrop == 0.1, "a checkpoint keeps the config of its model"


@pytest.mark.parametrize("dropout", [False, True])
def test_the_loss_of_a_students_own_teacher_is_measured_in_the_state_that_trains(dropout: bool) -> None:
    ref = dropping_ref()
    recipe = validate_recipe({**recipe_of(ref).model_dump(exclude_none=True), "train": {"dropout": dropout}}, "figures")
    prompts = pa.Table.from_pylist(PROMPTS)
    rows = [Row(i, 0, "student", 100 + i, f"r{i}") for i in range(len(PROMPTS))]
    rollouts = make_rollouts(rows, prompts, recipe.rollout, 1, ref, [])
    messages = {row["prompt_id"]: (row["messages"], None) for row in PROMPTS}
    signal = make_signal("topk", 10**6)
    scores = score_itself(ref, rollouts, messages, signal)
    vocabulary = side(ref).vocabulary
    objective = objectives.build(recipe.objective, student=vocabulary, teacher=vocabulary)
    aligned = align_rollouts(rollouts, scores, objective, signal, student=side(ref), teacher=side(ref))
    torch.manual_seed(1)
    loss = mean_loss(recipe, rollouts, aligned, student=ref, teacher=ref)
    assert (loss > 1e-4) == dropout


def test_a_field_that_came_later_is_in_a_key_only_when_it_is_set() -> None:
    """Runs from before it existed go on under the keys that they have."""
    recipe = recipe_of(student_ref())
    assert "dropout" not in select_content(recipe, "train")
    data = {**recipe.model_dump(exclude_none=True), "train": {"dropout": True}}
    assert select_content(validate_recipe(data, "figures"), "train")["dropout"] is True


@pytest.mark.parametrize(
    ("ids", "whole", "answer"),
    [
        ([1, 2], "ab", "ab"),
        ([1, 2, 9], "ab", "ab"),  # the stop is no part of it
        ([8, 1, 8, 2, 9], "ab", "b"),  # <think> a </think> b
        ([8, 1, 8], "a", ""),
        ([1, 3], "a", "a"),  # half a character
        ([8, 1, 8, 3, 2], "a", ""),
        ([], "", ""),
    ],
)
def test_what_is_graded_of_an_answer(ids: list[int], whole: str, answer: str) -> None:
    """All of it without control tokens, or what stands behind the last of them; never what stands before the first alone."""
    values = [b"-", b"a", b"b", "é".encode()[:1], None, None, None, None, None, None]
    beta = TokenBytes(values, ["text"] * 4 + ["control"] * 5 + ["stop"])
    assert spell_answer(beta, ids, {9}) == (whole, answer)

"""The plan of a round's rollouts, and completions that the student did not sample."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from configs.models import Scratch
from configs.rollout import Rollout
from storage.schemas import PROMPTS, ROLLOUTS, TURNS
from tasks.completions import make_completions
from tasks.engines.base import Completion, Sampling
from tasks.engines.choose import get_engine
from tasks.models.reference import ModelRef
from tasks.models.text import Side, side
from tasks.rollout import make_rollouts, translate_completions
from tasks.rows.plan import Row, count_shards, plan_rows
from tasks.scratch import init_model, train_tokenizer
from tasks.tokens.markers import NO_MARKERS
from tasks.tokens.token_bytes import split_completion

PROMPT_IDS = [f"p{i}" for i in range(37)]


def config(**changes) -> Rollout:
    return Rollout(**{"prompts": 20, "samples": 3, "shard_rows": 7, **changes})


def round_rows(rollout: Rollout, number: int, seed: int = 0, prompt_ids: list[str] = PROMPT_IDS) -> list[Row]:
    return [row for part in range(count_shards(rollout)) for row in plan_rows(rollout, seed, number, part, prompt_ids)]


# -- the plan ----------------------------------------------------------------------------------------------------------


def test_shards():
    assert [count_shards(config(shard_rows=rows)) for rows in (1, 7, 59, 60, 61)] == [60, 9, 2, 1, 1]
    sizes = [len(plan_rows(config(), 0, 1, part, PROMPT_IDS)) for part in range(9)]
    assert sizes == [7] * 8 + [4]


@pytest.mark.parametrize("shard_rows", [1, 7, 13, 60, 1000])
def test_the_plan_does_not_depend_on_the_shards(shard_rows):
    assert round_rows(config(shard_rows=shard_rows), 2) == round_rows(config(), 2)


def test_every_prompt_has_its_samples():
    rows = round_rows(config(), 1)
    assert set(Counter(row.prompt for row in rows).values()) == {3}
    assert {tuple(row.sample for row in rows if row.prompt == prompt) for prompt in {r.prompt for r in rows}} == {(0, 1, 2)}


def test_prompts_are_gone_through_epoch_by_epoch():
    """Over the rounds every prompt comes once before any comes again, each epoch in another order."""
    rollout = config(samples=1)
    order = [row.prompt for number in range(1, 38) for row in round_rows(rollout, number)]
    epochs = [order[start : start + 37] for start in range(0, len(order), 37)]
    assert len(epochs) == 20
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 20


def test_more_prompts_a_round_than_there_are():
    rows = round_rows(config(prompts=100, samples=1), 1)
    assert len(rows) == 100
    assert set(Counter(row.prompt for row in rows).values()) == {2, 3}


def test_ids_and_seeds_are_unique_over_a_run():
    """A prompt that comes twice in a round is sampled twice, not copied."""
    rows = [row for number in (1, 2, 3) for row in round_rows(config(prompts=80), number)]
    assert len({row.rollout_id for row in rows}) == len(rows) == 720
    assert len({row.seed for row in rows}) == len(rows)
    assert all(0 <= row.seed < 2**62 for row in rows)


def test_the_plan_is_a_function_of_the_seed():
    assert round_rows(config(), 2, seed=5) == round_rows(config(), 2, seed=5)
    one, other = round_rows(config(), 2, seed=5), round_rows(config(), 2, seed=6)
    assert [row.prompt for row in one] != [row.prompt for row in other]
    assert not {row.seed for row in one} & {row.seed for row in other}


@pytest.mark.parametrize("share", [0.0, 0.25, 0.75, 1.0])
def test_lambda_is_the_share_of_own_samples(share):
    """Within four standard deviations of a fair draw a row, and the same each time."""
    rollout = config(prompts=1000, samples=4, shard_rows=4096, on_policy=share)
    sources = [row.source for row in round_rows(rollout, 1)]
    own = sources.count("student")
    assert abs(own - 4000 * share) <= 4 * math.sqrt(4000 * share * (1 - share))
    assert set(sources) <= {"student", "reference"}
    assert sources == [row.source for row in round_rows(rollout, 1)]


def test_lambda_is_drawn_a_row_not_a_prompt():
    rows = round_rows(config(prompts=500, samples=2, on_policy=0.5), 1)
    pairs = Counter(tuple(row.source for row in rows[at : at + 2]) for at in range(0, len(rows), 2))
    assert len(pairs) == 4
    assert min(pairs.values()) > 80  # 125 expected of each


def test_more_own_samples_with_a_larger_lambda():
    """A row that is on-policy at a small λ is so at a larger one: recipes that differ in λ share those rows."""
    small, large = (round_rows(config(on_policy=share), 1) for share in (0.3, 0.6))
    for one, other in zip(small, large, strict=True):
        assert one.source == "reference" or other.source == "student"
        assert one.seed == other.seed


def test_the_other_rows_come_from_where_the_recipe_says():
    sources = {row.source for row in round_rows(config(on_policy=0.5, off_policy="teacher"), 1)}
    assert sources == {"student", "teacher"}


# -- completions -------------------------------------------------------------------------------------------------------

REFERENCES = ["cba", "olleh dlrow", "ü 👩‍🚀", "", None, "a very long reference that does not fit the limit at all"]


def model(folder: Path, texts: list[str], size: int) -> ModelRef:
    shape = Scratch(vocab_size=size, layers=1, width=16, heads=2, feed_forward=16, context=64)
    tokenizer = train_tokenizer(shape, texts)
    tokenizer.save_pretrained(folder)
    init_model(shape, tokenizer, 0).save_pretrained(folder)
    return ModelRef(str(folder), folder.name)


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> ModelRef:
    return model(tmp_path_factory.mktemp("models") / "student", ["olleh dlrow", "abc"] * 5, 300)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> ModelRef:
    return model(tmp_path_factory.mktemp("models") / "teacher", ["reference that does"] * 5, 290)


@pytest.fixture(scope="module")
def prompts() -> pa.Table:
    rows = [
        {"prompt_id": f"p{i}", "messages": [{"role": "user", "content": f"q{i}"}], "reference": reference, "split": "train"}
        for i, reference in enumerate(REFERENCES)
    ]
    return pa.Table.from_pylist(rows, PROMPTS)


def rows_from(source: str) -> list[Row]:
    return [Row(i, 0, source, 1000 + i, f"0001-{i:06d}-000") for i in range(len(REFERENCES))]


def ids_of(text_side: Side, text: str) -> list[int]:
    """The tokenizer's own ids of a text, without what it adds for special tokens."""
    return text_side.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def test_references_get_the_students_ids_and_its_stop(student, prompts):
    rollout = Rollout(max_new_tokens=24)
    table = make_rollouts(rows_from("reference"), prompts, rollout, 1, student, [])
    assert table.schema.names == [name for name in ROLLOUTS.names if name not in ("model_logprobs", *TURNS)]
    text_side = side(student)
    stop = text_side.tokenizer.convert_tokens_to_ids("<end>")
    for row, reference in zip(table.to_pylist()[:4], REFERENCES[:4], strict=True):
        assert row["token_ids"] == [*ids_of(text_side, reference), stop]
        assert row["text"] == reference
        assert row["finish_reason"] == "stop"
        assert row["logprobs"] is None
        assert (row["source"], row["policy"], row["engine"]) == ("reference", "", "")


def test_a_long_reference_is_cut_like_a_sample(student, prompts):
    table = make_rollouts(rows_from("reference"), prompts, Rollout(max_new_tokens=8), 1, student, [])
    row, text_side = table.to_pylist()[5], side(student)
    assert row["token_ids"] == ids_of(text_side, REFERENCES[5])[:8]
    assert row["finish_reason"] == "length"
    assert row["text"] == REFERENCES[5][: len(row["text"])]
    assert split_completion(text_side.beta, row["token_ids"], set())[0] == row["text"]


def test_a_reference_that_just_fits_is_cut_before_its_stop(student, prompts):
    limit = len(ids_of(side(student), "olleh dlrow"))
    row = make_rollouts(rows_from("reference")[1:2], prompts, Rollout(max_new_tokens=limit), 1, student, []).to_pylist()[0]
    assert row["finish_reason"] == "length"
    assert len(row["token_ids"]) == limit
    assert row["text"] == "olleh dlrow"


def test_own_samples(student, prompts):
    """Ids as sampled with their log-probs, a stop last or the limit reached, and the text that they spell."""
    table = make_rollouts(rows_from("student"), prompts, Rollout(max_new_tokens=6), 3, student, [])
    text_side = side(student)
    stop = text_side.tokenizer.convert_tokens_to_ids("<end>")
    for i, row in enumerate(table.to_pylist()):
        assert (row["round"], row["source"], row["policy"], row["seed"]) == (3, "student", "student", 1000 + i)
        assert row["prompt_id"] == f"p{i}"
        assert len(row["logprobs"]) == len(row["token_ids"]) <= 6
        assert all(np.array(row["logprobs"]) < 0)
        assert (row["finish_reason"] == "stop") == (row["token_ids"][-1] == stop)
        assert stop not in row["token_ids"][:-1]
        assert row["finish_reason"] == "stop" or len(row["token_ids"]) == 6
        decoded = text_side.tokenizer.decode(row["token_ids"], skip_special_tokens=True)
        assert decoded.startswith(row["text"])
        assert row["engine"].startswith("transformers-")


def test_samples_do_not_depend_on_the_batch(student, prompts):
    rows = rows_from("student")
    together = make_rollouts(rows, prompts, Rollout(max_new_tokens=6), 1, student, [])["token_ids"].to_pylist()
    in_pairs = make_rollouts(rows, prompts, Rollout(max_new_tokens=6, batch_size=2), 1, student, [])
    alone = [make_rollouts([row], prompts, Rollout(max_new_tokens=6), 1, student, []) for row in rows]
    assert in_pairs["token_ids"].to_pylist() == together
    assert [table["token_ids"].to_pylist()[0] for table in alone] == together


@pytest.fixture(scope="module")
def from_teacher(student, teacher, prompts) -> list[tuple[dict, Completion]]:
    """Many short rollouts by the teacher, each with what the teacher sampled for its prompt and seed."""
    rows = [Row(0, 0, "teacher", seed, f"0001-{seed:06d}-000") for seed in range(200)]
    written = make_completions(rows, prompts, Rollout(max_new_tokens=3, batch_size=64), teacher).to_pylist()
    written = translate_completions(written, student=side(student), teacher=side(teacher), markers=NO_MARKERS)
    table = make_rollouts(rows, prompts, Rollout(max_new_tokens=3), 1, student, written)
    prompt = side(teacher).render(prompts["messages"].to_pylist()[0])
    sampled = get_engine(teacher).generate([prompt] * 200, list(range(200)), Sampling(3))
    return list(zip(table.to_pylist(), sampled, strict=True))


def test_the_teachers_completions_are_in_the_students_ids(student, teacher, from_teacher):
    text_side, beta = side(student), side(teacher).beta
    assert sum(bool(row["text"]) for row, _ in from_teacher) > 40
    for row, completion in from_teacher:
        assert (row["source"], row["policy"], row["logprobs"]) == ("teacher", "teacher", None)
        body = row["token_ids"][:-1] if row["finish_reason"] == "stop" else row["token_ids"]
        written = longest_text(beta.join(completion.ids))
        assert body == ids_of(text_side, written)[: len(body)]
        assert written.startswith(row["text"])


def longest_text(data: bytes) -> str:
    """What comes before the first bytes that are no text."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start].decode()


def test_a_teachers_completion_that_was_cut_gets_no_stop(student, teacher, from_teacher):
    """A text that ends at the length limit, or at bytes that are no text, is not one that the teacher ended."""
    end = side(teacher).tokenizer.convert_tokens_to_ids("<end>")
    own_end = side(student).tokenizer.convert_tokens_to_ids("<end>")
    cut = [row for row, completion in from_teacher if end not in completion.ids]
    assert len(cut) > 100
    assert {row["finish_reason"] for row in cut} == {"length"}
    assert not any(own_end in row["token_ids"] for row in cut)

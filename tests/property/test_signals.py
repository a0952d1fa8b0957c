"""The teacher's signals (MATHS.md §6): what each stores, and that objectives read the same from all of them."""

from functools import cache

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import law_at
from toys import SEEDS, TEXTS, full_logprobs, random_split, rollouts_table, student_ref, teacher_ref

from configs.objectives import Alm, Bpm, Bytes, Gold, Objective, Opd, Strict, Uld
from configs.score import Score
from storage.schemas import ALIGNED, without_teacher
from tasks import objectives
from tasks.align import align_rollouts
from tasks.engines import states
from tasks.engines.base import TokenScores
from tasks.engines.transformers import TransformersEngine
from tasks.models.text import side
from tasks.models.weights import apply_logit_scale, logit_scale_of
from tasks.score import score_rows
from tasks.signals import make_signal
from tasks.signals.head import Head
from tasks.tokens.byte_laws import CLASSES, REST
from tasks.tokens.markers import NO_MARKERS

PROMPT = [{"role": "user", "content": "say it"}]
SHORT = ["the cat sat", "a naïve 👩", "", "  x", "then he added that"]
EVERYTHING = 10**6


@cache
def engine() -> TransformersEngine:
    return TransformersEngine(teacher_ref())


def teacher_head() -> Head:
    layer = engine().model.get_output_embeddings()
    return Head(layer.weight[: engine().size].detach(), None, logit_scale_of(engine().model))


def rollouts(seed: int = 0) -> pa.Table:
    """Texts of the student in segmentations of its own, some with a stop."""
    own, rng = side(student_ref()), np.random.default_rng(seed)
    ids = [
        random_split(rng, own.vocabulary, text.encode()) + own.stop_ids[: rng.integers(0, 2)] for text in [*SHORT, *TEXTS[:2]]
    ]
    ids = [row for row in ids if row]
    behaviour = [-rng.random(len(row)) for row in ids]
    return rollouts_table([[1, 2]] * len(ids), ids, own, logprobs=behaviour)


def scores(rows: pa.Table, config: Score) -> pa.Table:
    records = [{**row, "prompt_id": "p"} for row in rows.to_pylist()]
    return score_rows(
        records,
        {"p": (PROMPT, None)},
        engine(),
        make_signal(config.signal, config.k, config.top_p),
        NO_MARKERS,
        student=side(student_ref()),
        teacher=side(teacher_ref()),
    )


def projected(rows: pa.Table, objective: Objective, config: Score) -> pa.Table:
    own, other = side(student_ref()), side(teacher_ref())
    module = objectives.build(objective, student=own.vocabulary, teacher=other.vocabulary)
    head = teacher_head() if config.signal == "hidden" else None
    return align_rollouts(
        rows, scores(rows, config), module, make_signal(config.signal, config.k, config.top_p), head, student=own, teacher=other
    )


def dense(scored: TokenScores, classes: int) -> np.ndarray:
    """[tokens, classes] of masses that a sparse signal names."""
    laws = np.zeros((len(scored.logprobs), classes))
    laws[np.repeat(np.arange(len(laws)), scored.columns["law_counts"]), scored.columns["law_classes"]] = np.exp(
        scored.columns["law_logprobs"].astype(float)
    )
    return laws


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.integers(1, 7))
def test_the_bytes_signal_is_the_law_of_the_definition(seed: int, chunk: int) -> None:
    """§5's loops over the vocabulary, from a plain forward pass, before every token and the stop; the rest is what is left."""
    rng = np.random.default_rng(seed)
    text_side, prompt = side(teacher_ref()), side(teacher_ref()).render(PROMPT)
    completions = [random_split(rng, text_side.vocabulary, text.encode()) + text_side.stop_ids[-1:] for text in SHORT]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(states, "SCORE_CHUNK", chunk)  # laws reach back over the edges of chunks
        scored = engine().score([prompt] * len(completions), completions, make_signal("bytes", EVERYTHING))
    for ids, got in zip(completions, scored, strict=True):
        table = full_logprobs(engine().model, prompt + ids, engine().size)[len(prompt) - 1 : -1].exp().numpy()
        wanted = np.array([law_at(text_side.vocabulary, table, ids, j, 0) for j in range(len(ids))])
        assert dense(got, CLASSES)[:, :REST] == pytest.approx(wanted[:, :REST], rel=1e-2, abs=1e-6)
        assert np.exp(got.columns["rest"]) == pytest.approx(wanted[:, REST], rel=1e-2, abs=1e-6)
        assert (got.columns["law_classes"] < REST).all()


def test_an_adaptive_law_keeps_the_likeliest_bytes() -> None:
    """As few as reach the mass, never more than k, and what they leave is in the rest."""
    (ids,) = side(teacher_ref()).encoder.encode([TEXTS[0]])
    prompt = side(teacher_ref()).render(PROMPT)
    (full,) = engine().score([prompt], [ids], make_signal("bytes", EVERYTHING))
    (cut,) = engine().score([prompt], [ids], make_signal("bytes", 5, 0.7))
    laws, kept = dense(full, CLASSES), dense(cut, CLASSES)
    for law, few, count, rest in zip(laws, kept, cut.columns["law_counts"], cut.columns["rest"], strict=True):
        best = np.sort(law)[::-1]
        wanted = min(5, int((best.cumsum() < 0.7).sum()) + 1)
        assert count == wanted
        assert np.sort(few)[::-1][:count] == pytest.approx(best[:count], rel=1e-2)
        assert np.exp(rest) == pytest.approx(1 - best[:count].sum(), rel=2e-2, abs=1e-3)


@pytest.mark.parametrize(("scale", "scaling", "cap"), [(None, None, None), (0.5, None, 3.0), (None, 4.0, None)])
def test_hidden_states_and_the_head_are_the_whole_distribution(scale, scaling, cap) -> None:
    """Stored in half precision, they give back the model's own laws; what it does behind its head is done to them."""
    config = engine().model.config
    extra = {"logit_scale": scale, "logits_scaling": scaling, "final_logit_softcapping": cap}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in extra.items():
            patch.setattr(config, name, value, raising=False)
        (ids,) = side(teacher_ref()).encoder.encode([TEXTS[0]])
        (scored,) = engine().score([[1, 2]], [ids], make_signal("hidden"))
        got = teacher_head().logits(torch.from_numpy(scored.columns["hidden"])).log_softmax(-1).numpy()
    with torch.no_grad():
        logits = engine().model(input_ids=torch.tensor([[1, 2, *ids]])).logits[0, 1:-1, : engine().size].double()
    logits = logits * (scale or 1) / (scaling or 1)
    logits = torch.tanh(logits / cap) * cap if cap else logits
    assert scored.columns["hidden"].dtype == np.float16
    assert got == pytest.approx(logits.log_softmax(-1).numpy(), abs=0.02)
    assert apply_logit_scale(torch.tensor([2.0]), (1.0, 0.0)).tolist() == [2.0]


@pytest.mark.parametrize("objective", [Gold(name="gold"), Uld(name="uld"), Strict(name="strict"), Bpm(name="bpm")], ids=str)
def test_hidden_states_give_what_topk_gives(objective: Objective) -> None:
    """The same terms and targets, for a cut signal and for the whole vocabulary, up to the rounding of either."""
    rows = rollouts()
    for k in (8, engine().size):
        one, other = (projected(rows, objective, Score(signal=name, k=k)) for name in ("topk", "hidden"))
        assert_same_targets(one, other, objective)


@pytest.mark.parametrize("k", [5, 258])
def test_bytes_from_hidden_states_and_from_laws(k: int) -> None:
    """The same laws, whether they were taken when the teacher scored or from its hidden states later."""
    rows, objective = rollouts(1), Bytes(name="bytes")
    one, other = (projected(rows, objective, Score(signal=name, k=k)) for name in ("bytes", "hidden"))
    assert_same_targets(one, other, objective)


def test_bytes_from_all_ids_and_from_laws() -> None:
    """With every id stored, `topk` gives the same laws as `bytes`."""
    rows, objective = rollouts(2), Bytes(name="bytes")
    one = projected(rows, objective, Score(signal="topk", k=engine().size))
    assert_same_targets(one, projected(rows, objective, Score(signal="bytes", k=258)), objective)


@pytest.mark.parametrize("signal", ["sampled", "bytes", "hidden"])
@pytest.mark.parametrize("objective", [Alm(name="alm"), Opd(name="opd")], ids=str)
def test_objectives_that_read_the_actual_tokens_alone(objective: Objective, signal: str) -> None:
    """Need no more than `sampled`, and get the same from every signal."""
    rows = rollouts(3)
    one, other = (projected(rows, objective, Score(signal=name)) for name in ("topk", signal))
    assert_same_targets(one, other, objective)


def assert_same_targets(one: pa.Table, other: pa.Table, objective: Objective) -> None:
    """Terms are equal, and masses up to rounding."""
    rounded = {"target_rest", "teacher_logprobs", "term_behaviour", "student_logprobs"}
    events = {"target_ids", "target_counts", "target_logprobs", "unmatched_counts", "unmatched_logprobs"}
    for name in without_teacher(ALIGNED).names:
        left, right = one[name].to_pylist(), other[name].to_pylist()
        if name in rounded:
            for a, b in zip(left, right, strict=True):
                assert (a is None) == (b is None)
                assert np.exp(a or []) == pytest.approx(np.exp(b or []), abs=5e-3)
        elif name not in events:
            assert left == right, name
    for row in range(len(one)):
        left, right = masses(one, row), masses(other, row)
        keys = sorted(left.keys() | right.keys())
        assert keys or not one["units"][row].as_py()
        assert [left.get(key, 0) for key in keys] == pytest.approx([right.get(key, 0) for key in keys], abs=5e-3)


def masses(table: pa.Table, row: int) -> dict[tuple[int, int], float]:
    """(term, event) → mass, of targets above the rounding."""
    found: dict[tuple[int, int], float] = {}
    at = 0
    values = {name: table[name][row].as_py() or [] for name in ("target_counts", "target_ids", "target_logprobs")}
    for term, count in enumerate(values["target_counts"]):
        for i in range(at, at + count):
            mass = float(np.exp(values["target_logprobs"][i]))
            if mass > 0:
                found[term, values["target_ids"][i]] = mass
        at += count
    return found


def test_a_scores_table_has_the_columns_of_its_signal_alone() -> None:
    rows = rollouts(4)
    kept = {
        "topk": {"top_ids", "top_logprobs", "top_counts", "rest"},
        "bytes": {"law_classes", "law_logprobs", "law_counts", "rest"},
        "hidden": {"hidden"},
        "sampled": set(),
    }
    all_columns = set().union(*kept.values())
    for signal, columns in kept.items():
        table = scores(rows, Score(signal=signal))
        assert {name for name in all_columns if table[name].null_count < len(table)} == columns

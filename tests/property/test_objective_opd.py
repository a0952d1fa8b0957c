"""`opd` (MATHS.md §5 and §7; properties 12, 14, 18 and 19), against exact enumeration and autograd of the plain formula."""

import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import losses_of, naive_units, pair, path, stop_sum, two_sides, unit_bytes
from toys import (
    SEEDS,
    Rows,
    ToySide,
    losses,
    path_logprobs,
    random_bytes,
    random_logprobs,
    random_split,
    random_vocabulary,
    rollouts_table,
    scores_of,
    topk_scores,
)
from toys import vocabulary as toy_vocabulary

from configs.objectives import Opd
from storage.schemas import SCORES
from tasks import objectives
from tasks.align import align_rollouts
from tasks.tokens.vocabulary import Vocabulary
from tasks.training.batches import collate


def frozen(rows: Rows, config: Opd, s: torch.Tensor) -> torch.Tensor:
    """-w·A·log P_S of each unit, naively: A and w are numbers, made of the rows' own distributions.

    The stop is one event in A and P_S; w is of the ids that were sampled (§7).
    """
    values, at = [], 0
    for row, ids in enumerate(rows.student_ids):
        behaviour = rows.behaviour[row]
        if behaviour is not None:
            for (s0, s1), (t0, t1) in naive_units(rows, row):
                log_s = math.log(path(rows.student, rows.s[row], ids, s0, s1))
                log_t = math.log(path(rows.teacher, rows.t[row], rows.teacher_ids[row], t0, t1))
                now = path_logprobs(rows.s[row], ids)[s0:s1].sum()
                weight = min(math.exp(now - behaviour[s0:s1].sum()), config.clip)
                events = [rows.student.stop_ids if i in rows.student.stop_ids else [i] for i in ids]
                tokens = [s[at + i, events[i]].exp().sum().log() for i in range(s0, s1)]
                values.append(-weight * (log_t - log_s) * sum(tokens))
        at += len(ids)
    return torch.stack(values)


def surrogate_gradient(rows: Rows, config: Opd, weights: torch.Tensor | None = None) -> torch.Tensor:
    """The product's gradient of the (weighted) sum of terms with respect to the logits of all positions."""
    logits = torch.from_numpy(np.concatenate(rows.s)).requires_grad_()
    values = losses(objectives.build(config, student=rows.student, teacher=rows.teacher), rows, s=logits.log_softmax(-1))
    (gradient,) = torch.autograd.grad((values if weights is None else values * weights).sum(), logits)
    return gradient


def with_some_rows_given(rows: Rows, seed: int) -> Rows:
    """Some rows, but not all, were not sampled by the student."""
    rng = np.random.default_rng(seed)
    given = rng.permutation(len(rows.stops))[: rng.integers(0, len(rows.stops))]
    return replace(rows, behaviour=[None if row in given else b for row, b in enumerate(rows.behaviour)])


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.sampled_from([1.0, 2.0, 5.0]))
def test_opd_descends_the_frozen_surrogate(seed: int, clip: float) -> None:
    """Its gradient is that of -w·A·log P_S with w = min(P_S/P_behaviour, C) and A as numbers: by autograd of the naive
    formula, and by finite differences of it (property 14). No gradient comes through either."""
    rows, config = with_some_rows_given(two_sides(seed), seed), Opd(name="opd", clip=clip)
    logits = torch.from_numpy(np.concatenate(rows.s)).requires_grad_()
    (wanted,) = torch.autograd.grad(frozen(rows, config, logits.log_softmax(-1)).sum(), logits)
    gradient = surrogate_gradient(rows, config)
    scale = float(wanted.abs().max())
    assert torch.allclose(gradient, wanted, rtol=1e-4, atol=1e-5 * scale + 1e-6)
    rng = np.random.default_rng(seed)
    direction, step = torch.from_numpy(rng.normal(size=tuple(logits.shape))), 1e-6
    with torch.no_grad():
        ends = [frozen(rows, config, (logits + sign * step * direction).log_softmax(-1)).sum() for sign in (1, -1)]
    slope = float(ends[0] - ends[1]) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-4 * scale + 1e-5)


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_the_value_of_opd_is_the_log_ratio(seed: int) -> None:
    """log P_S - log P_T of each unit of the student's own rows, whatever the weight: a sample of the reverse KL."""
    rows = with_some_rows_given(two_sides(seed), seed)
    wanted = [
        math.log(path(rows.student, rows.s[row], rows.student_ids[row], s0, s1))
        - math.log(path(rows.teacher, rows.t[row], rows.teacher_ids[row], t0, t1))
        for row in range(len(rows.stops))
        if rows.behaviour[row] is not None
        for (s0, s1), (t0, t1) in naive_units(rows, row)
    ]
    for clip in (1.0, 4.0):
        assert losses_of(rows, Opd(name="opd", clip=clip)) == pytest.approx(wanted, abs=2e-5)


def every_token(rng: np.random.Generator, stops: int, teacher: Vocabulary | None = None) -> tuple[Rows, np.ndarray]:
    """One row for each token that a toy student may sample at one position, and log P_T of what each does.

    Without a teacher both have one vocabulary. (No byte-fallback duplicates: a path is a token's, §3, not a class's.)
    """
    values: list[bytes | None] = [b"a", b"b", b"c", b"ab", b"cab", *[None] * stops]
    student = toy_vocabulary(values, list(range(5, 5 + stops)))
    grader = teacher or student
    s = random_logprobs(rng, 1, student.size)
    first = random_logprobs(rng, 1, grader.size)
    student_ids = [[i] for i in range(student.size)]
    stopped = [i in student.stop_ids for i in range(student.size)]
    teacher_ids, t, log_t = [], [], []
    for i, stop in enumerate(stopped):
        if stop:
            ids = [int(rng.choice(grader.stop_ids))]
        else:
            ids = [i] if teacher is None else random_split(rng, grader, values[i] or b"")
        table = np.concatenate([first, random_logprobs(rng, len(ids), grader.size)])[: len(ids)]
        teacher_ids.append(ids)
        t.append(table)
        log_t.append(math.log(path(grader, table, ids, 0, len(ids))))
    behaviour: list[np.ndarray | None] = [s[0, [i]] for i in range(student.size)]
    rows = Rows(student, grader, student_ids, teacher_ids, stopped, [s] * student.size, t, behaviour)
    return rows, np.array(log_t)


def expected_gradient(rows: Rows, config: Opd) -> torch.Tensor:
    """Σ over the tokens that the policy may sample of its probability of each and the surrogate's gradient there."""
    policy = torch.tensor([float(np.exp(b.sum())) for b in rows.behaviour])
    return surrogate_gradient(rows, config, policy).sum(0)


def exact_gradient(rows: Rows, log_t: np.ndarray) -> torch.Tensor:
    """Of Σ_event P_S(event)·(log P_S(event) - log P_T(event)), the stop being one event, by autograd."""
    logits = torch.from_numpy(rows.s[0][0]).requires_grad_()
    law, stops = logits.softmax(-1), rows.student.stop_ids
    text = [i for i in range(rows.student.size) if i not in stops]
    events = torch.cat([law[text], law[stops].sum()[None]])
    reverse = (events * (events.log() - torch.from_numpy(np.append(log_t[text], log_t[stops[0]])))).sum()
    (gradient,) = torch.autograd.grad(reverse, logits)
    return gradient


@pytest.mark.parametrize("stops", [1, 3])
@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, same=st.booleans())
def test_opd_descends_the_reverse_kl(stops: int, seed: int, same: bool) -> None:
    """Over all tokens of a position, weighted as the student samples them, the gradient is that of KL(S‖T): exactly, at
    w = 1, with one vocabulary and with a teacher that spells the student's tokens in several (property 12)."""
    rng = np.random.default_rng(seed)
    other = toy_vocabulary([b"b", None, b"a", b"c", b"ca", None], [1, 5])
    rows, log_t = every_token(rng, stops, None if same else other)
    wanted = exact_gradient(rows, log_t)
    assert torch.allclose(expected_gradient(rows, Opd(name="opd", clip=1.0)), wanted, atol=1e-5)
    assert wanted.abs().max() > 1e-3


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_opd_over_units_of_two_tokens(seed: int) -> None:
    """Where the teacher has one token for any two of the student's, all pairs together: the gradient of the KL of pairs,
    at both positions and behind every first token (property 12)."""
    rng = np.random.default_rng(seed)
    letters = [b"a", b"b", b"c"]
    student = toy_vocabulary([*letters, None], [3])
    teacher = toy_vocabulary([*[x + y for x in letters for y in letters], *letters, None], [12])
    tables = np.concatenate([random_logprobs(rng, 4, 3), np.full((4, 1), -60.0)], 1)  # at the start, behind a, b, c
    t = random_logprobs(rng, 1, teacher.size)
    pairs = [(x, y) for x in range(3) for y in range(3)]
    rows = Rows(
        student,
        teacher,
        [[x, y] for x, y in pairs],
        [[3 * x + y] for x, y in pairs],
        [False] * 9,
        [tables[[0, x + 1]] for x, _ in pairs],
        [t] * 9,
        [tables[[0, x + 1], [x, y]] for x, y in pairs],
    )
    policy = torch.tensor([float(np.exp(b.sum())) for b in rows.behaviour])
    by_row = surrogate_gradient(rows, Opd(name="opd", clip=1.0), policy).reshape(9, 2, 4)
    got = torch.zeros(4, 4, dtype=torch.float64)
    for (x, _), gradient in zip(pairs, by_row, strict=True):
        got[0] += gradient[0]
        got[x + 1] += gradient[1]
    logits = torch.from_numpy(tables).requires_grad_()
    law = logits.log_softmax(-1)
    joint = torch.stack([law[0, x] + law[x + 1, y] for x, y in pairs])
    (wanted,) = torch.autograd.grad((joint.exp() * (joint - torch.from_numpy(t[0, :9]))).sum(), logits)
    assert torch.allclose(got, wanted, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.sampled_from([1.0, 1.5, 4.0, 1e6]))
def test_opd_corrects_for_another_policy(seed: int, clip: float) -> None:
    """Sampled by another policy b, the expected gradient is Σ min(s, C·b)·(log s - log t)·∇log s: that of the reverse KL
    where no weight is above C, and smaller where one is."""
    rng = np.random.default_rng(seed)
    rows, log_t = every_token(rng, 1)
    s, b = rows.s[0][0], random_logprobs(rng, 1, rows.student.size)[0]
    rows = replace(rows, behaviour=[b[[i]] for i in range(rows.student.size)])
    logits = torch.from_numpy(s).requires_grad_()
    numbers = np.minimum(np.exp(s), clip * np.exp(b)) * (s - log_t)
    (wanted,) = torch.autograd.grad((torch.from_numpy(numbers) * logits.log_softmax(-1)).sum(), logits)
    got = expected_gradient(rows, Opd(name="opd", clip=clip))
    assert torch.allclose(got, wanted, atol=2e-5)
    if clip == 1e6:
        assert torch.allclose(got, exact_gradient(rows, log_t), atol=2e-5)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.floats(0.1, 3))
def test_an_advantage_that_is_the_same_for_all_has_no_gradient(seed: int, constant: float) -> None:
    """T = S·e^-c for every token, the rest on a control id: no expected gradient, though each sample has one (12)."""
    rng = np.random.default_rng(seed)
    rows, _ = every_token(rng, 1)
    size = rows.student.size
    teacher = toy_vocabulary([*rows.student.beta.values, None], rows.student.stop_ids)
    t = np.append(rows.s[0][0] - constant, math.log(-math.expm1(-constant)))[None]
    rows = replace(rows, teacher=teacher, t=[t] * size)
    assert losses_of(rows, Opd(name="opd")) == pytest.approx([constant] * size, abs=1e-5)
    assert expected_gradient(rows, Opd(name="opd")).abs().max() < 1e-6
    assert surrogate_gradient(rows, Opd(name="opd")).abs().max() > 1e-3


def test_golden_truncation() -> None:
    """P_S = .2 (two tokens), P_T = .6, P_behaviour .05 or .4: a weight of 4, cut to C, or .5, on A = log 3."""
    for behaviour, clip, weight in ((0.05, 2.0, 2.0), (0.05, 1.0, 1.0), (0.05, 10.0, 4.0), (0.4, 2.0, 0.5)):
        rows = replace(pair(0.6), behaviour=[np.log([behaviour, 1.0])])
        gradient = surrogate_gradient(rows, Opd(name="opd", clip=clip))
        scale = -weight * math.log(3)
        wanted = scale * (np.array([[1, 0, 0], [0, 1, 0]]) - np.exp(rows.s[0]))
        assert gradient.numpy() == pytest.approx(wanted, rel=1e-4)
        assert losses_of(rows, Opd(name="opd", clip=clip)) == pytest.approx([-math.log(3)], abs=1e-6)


# -- rows that were not sampled, and texts that a control token ends -------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_rows_that_the_student_did_not_sample(seed: int) -> None:
    """By way of the rollouts table: they have no term, and their bytes are unmatched; the others have the terms and the
    behaviour that they would have alone (property 19)."""
    rng = np.random.default_rng(seed)
    rows = with_some_rows_given(two_sides(seed), seed)
    own, other = ToySide(rows.student), ToySide(rows.teacher)
    results = [
        topk_scores(
            np.array([math.log(stop_sum(rows.teacher, np.exp(p), i)) for p, i in zip(t, ids)], np.float32),
            np.argmax(t, 1).astype(np.int32),
            t.max(1).astype(np.float16),
            np.ones(len(ids), np.int16),
            np.log1p(-np.exp(t.max(1))).astype(np.float32),
        )
        for t, ids in zip(rows.t, rows.teacher_ids, strict=True)
    ]
    module = objectives.build(Opd(name="opd"), student=rows.student, teacher=rows.teacher)
    order = rng.permutation(len(rows.stops))
    rollouts = rollouts_table(
        [[0]] * len(order),
        [rows.student_ids[r] for r in order],
        own,  # type: ignore[arg-type]
        logprobs=[rows.behaviour[r] for r in order],
    )
    scores = scores_of([results[r] for r in order], [rows.teacher_ids[r] for r in order])
    table = align_rollouts(rollouts, scores, module, student=own, teacher=other).to_pylist()  # type: ignore[arg-type]
    for record, r in zip(table, order, strict=True):
        units, size, behaviour = naive_units(rows, r), sum(unit_bytes(rows, r)), rows.behaviour[r]
        assert record["status"] == "ok"
        assert record["dropped_bytes"] == record["tail_bytes"] == 0
        if behaviour is None:
            assert record["units"] == record["supervised_bytes"] == 0
            assert record["unmatched_bytes"] == size
            assert record["term_starts"] == record["term_behaviour"] == record["target_logprobs"] == []
            assert record["student_logprobs"] is None
            continue
        wanted = [float(behaviour[s0:s1].sum()) for (s0, s1), _ in units]
        graded = [math.log(path(rows.teacher, rows.t[r], rows.teacher_ids[r], t0, t1)) for _, (t0, t1) in units]
        assert record["units"] == len(units)
        assert record["supervised_bytes"] == size
        assert list(zip(record["term_starts"], record["term_ends"], strict=True)) == [student for student, _ in units]
        assert record["term_behaviour"] == pytest.approx(wanted, abs=1e-4)
        assert record["student_logprobs"] == pytest.approx(wanted, abs=1e-4)
        assert record["target_logprobs"] == pytest.approx(graded, abs=1e-4)
        assert record["teacher_logprobs"] == pytest.approx(graded, abs=1e-4)


@pytest.mark.parametrize("same", [False, True], ids=["two-vocabularies", "one-vocabulary"])
@settings(max_examples=60, deadline=None)
@given(seed=SEEDS)
def test_opd_grades_the_control_token_that_ends_a_text(seed: int, same: bool) -> None:
    """Across tokenizers an unpaired control token is in no unit, and yet a student must not leave its text there for free
    (property 18): it is a term, impossible to a teacher that does not know it. With one tokenizer it is a unit."""
    rng = np.random.default_rng(seed)
    student = random_vocabulary(rng, stops=1, controls=2)
    teacher = student if same else random_vocabulary(rng, stops=2)
    controls = [i for i, role in enumerate(student.beta.roles) if role == "control"]
    s_rows, t_rows, results, behaviours, wanted = [], [], [], [], []
    for _ in range(6):
        text = random_bytes(rng, int(rng.integers(0, 5)))
        ids = random_split(rng, student, text)
        given_row, escapes = rng.random() < 0.2, rng.random() < 0.6
        escape = len(ids)
        tail = [int(rng.choice(controls)), *random_split(rng, student, random_bytes(rng, 2))] if escapes else []
        ids += tail + student.stop_ids[:1] * int(rng.random() < 0.5)
        graded = ids if same else random_split(rng, teacher, text) + teacher.stop_ids[:1] * (ids[-1:] == student.stop_ids[:1])
        behaviours.append(None if given_row or not ids else -rng.gamma(2.0, size=len(ids)))
        s_rows.append(ids)
        t_rows.append(graded)
        table = random_logprobs(rng, len(graded), teacher.size)
        results.append(
            topk_scores(
                table[np.arange(len(graded)), graded].astype(np.float32),
                np.zeros(len(graded), np.int32),
                table[:, 0].astype(np.float16),
                np.ones(len(graded), np.int16),
                np.log1p(-np.exp(table[:, 0])).astype(np.float32),
            )
        )
        last = None
        if escapes and not given_row and not same:
            last = (escape, escape + 1, float(behaviours[-1][escape]), -20.0)
        wanted.append(last)
    own, other = ToySide(student), ToySide(teacher)
    module = objectives.build(Opd(name="opd"), student=student, teacher=teacher)
    rollouts = rollouts_table([[0]] * len(s_rows), s_rows, own, logprobs=behaviours)  # type: ignore[arg-type]
    scores = scores_of(results, t_rows).to_pylist()
    for row in scores:
        row["status"] = "ok" if row["token_ids"] else "empty"  # as the scoring stage has it
    aligned = align_rollouts(rollouts, pa.Table.from_pylist(scores, SCORES), module, student=own, teacher=other)  # type: ignore[arg-type]
    for row, last, ids in zip(aligned.to_pylist(), wanted, s_rows, strict=True):
        assert sum(row[f"{kind}_bytes"] for kind in ("supervised", "unmatched", "dropped", "tail")) == sum(
            len(student.beta.values[i] or b"") for i in ids
        )
        units = len(row["student_ends"]) if row["student_logprobs"] is not None else 0
        assert row["units"] == units + (last is not None)
        if last is not None:
            start, end, policy, grade = last
            assert row["status"] == "ok"
            assert (row["term_starts"][-1], row["term_ends"][-1]) == (start, end)
            assert row["term_behaviour"][-1] == pytest.approx(policy, abs=1e-5)
            assert row["target_logprobs"][-1] == pytest.approx(grade, abs=1e-5)


def test_opd_makes_an_escape_less_likely() -> None:
    """One step down the gradient takes mass from the control token that was sampled."""
    student = toy_vocabulary([b"a", b"b", None, None], [3])
    teacher = toy_vocabulary([b"a", b"b", b"ab", None], [3])
    own, other = ToySide(student), ToySide(teacher)
    ids = [0, 2]
    rollouts = rollouts_table([[0]], [ids], own, logprobs=[np.log([0.5, 0.25])])  # type: ignore[arg-type]
    half = np.log(0.5)
    result = topk_scores(
        np.array([half], np.float32),
        np.zeros(1, np.int32),
        np.array([half], np.float16),
        np.ones(1, np.int16),
        np.array([half], np.float32),
    )
    module = objectives.build(Opd(name="opd"), student=student, teacher=teacher)
    table = align_rollouts(rollouts, scores_of([result], [[0]]), module, student=own, teacher=other)  # type: ignore[arg-type]
    batch = collate(
        table.append_column("token_ids", rollouts["token_ids"]).append_column("prompt_token_ids", rollouts["prompt_token_ids"]),
        0,
        torch.device("cpu"),
    )
    logits = torch.zeros(len(ids), student.size, requires_grad=True)
    chunk, *more = batch.chunks(100)
    at, terms = chunk.at, chunk.terms
    assert not more
    module(logits[at], terms).sum().backward()
    assert logits.grad is not None
    assert logits.grad[1, 2] > 1  # and a step goes against the gradient
    assert logits.grad[1, [0, 1, 3]].max() < 0

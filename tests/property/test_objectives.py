"""What holds for every objective (MATHS.md §5; properties 3, 4, 13, 14 and 18): ids, gradients, extremes, other rows."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import MERGES, SMALL, SMALL_S, SMALL_T, losses_of, named, pair, projected, two_sides
from toys import (
    SEEDS,
    Rows,
    losses,
    pairing,
    random_bytes,
    random_logprobs,
    random_rows,
    random_split,
    random_vocabulary,
    terms_of,
    with_student,
)
from toys import vocabulary as toy_vocabulary

from configs.objectives import Alm, Bpm, Bytes, Gkd, Gold, Objective, Opd, Sft, Strict, Uld
from tasks import objectives
from tasks.tokens.vocabulary import Vocabulary

ALL: list[Objective] = [
    Gkd(name="gkd", beta=0.5),
    *(Gold(name="gold", beta=0.0, merge=merge) for merge in MERGES),
    Gold(name="gold", beta=1.0, unmatched_weight=0.3),
    Gold(name="gold", beta=0.5, rest="renormalise"),
    Uld(name="uld", cross_entropy=0.1),
    Bytes(name="bytes", beta=0.0),
    Bytes(name="bytes", beta=1.0),
    Strict(name="strict", top=3),
    Alm(name="alm", beta=0.5, temperature=2.0),
    Bpm(name="bpm", beta=1.0),
    Bpm(name="bpm", beta=0.5),
    Opd(name="opd"),
    Sft(name="sft"),
]
FOUR: list[Objective] = [
    Strict(name="strict"),
    Strict(name="strict", top=2),
    *(Alm(name="alm", beta=beta, temperature=tau) for beta in (0.0, 0.5, 1.0) for tau in (1.0, 50.0)),
    *(Bpm(name="bpm", beta=beta) for beta in (0.0, 0.5, 1.0)),
    Opd(name="opd"),
]


def label(objective: Objective) -> str:
    return "-".join(map(str, objective.model_dump().values()))


def relabelled(rng: np.random.Generator, toy: Vocabulary) -> tuple[Vocabulary, np.ndarray]:
    """The same vocabulary with other ids, and the new id of each old one."""
    new = rng.permutation(toy.size)
    values: list[bytes | None] = [None] * toy.size
    for old, i in enumerate(new):
        values[i] = toy.beta.values[old]
    return toy_vocabulary(values, [int(new[i]) for i in toy.stop_ids]), new


@pytest.mark.parametrize("objective", ALL, ids=named)
@settings(max_examples=15, deadline=None)
@given(seed=SEEDS)
def test_ids_are_only_names(objective: Objective, seed: int) -> None:
    """A permutation of ids, on either side, leaves every loss unchanged (property 3)."""
    rng = np.random.default_rng(seed)
    same = objective.name in ("gkd", "sft")
    student = random_vocabulary(rng, stops=2)
    rows = random_rows(rng, student, student if same else random_vocabulary(rng, stops=2), same_ids=same)
    new_student, s_new = relabelled(rng, student)
    new_teacher, t_new = (new_student, s_new) if same else relabelled(rng, rows.teacher)
    moved = replace(
        rows,
        student=new_student,
        teacher=new_teacher,
        student_ids=[[int(s_new[i]) for i in ids] for ids in rows.student_ids],
        teacher_ids=[[int(t_new[i]) for i in ids] for ids in rows.teacher_ids],
        s=[s[:, np.argsort(s_new)] for s in rows.s],
        t=[t[:, np.argsort(t_new)] for t in rows.t],
    )
    for k in (None, 5):
        assert losses_of(moved, objective, k) == pytest.approx(losses_of(rows, objective, k), abs=2e-5)


@pytest.mark.parametrize("objective", [o for o in ALL if o.name != "opd"], ids=named)  # its value is not what it descends
@settings(max_examples=8, deadline=None)
@given(seed=SEEDS, k=st.sampled_from([None, 4]))
def test_gradients_are_finite_differences(objective: Objective, seed: int, k: int | None) -> None:
    """Of the summed loss, with respect to the student's logits, in random directions (property 14)."""
    rng = np.random.default_rng(seed)
    student = random_vocabulary(rng, stops=2)
    same = objective.name in ("gkd", "sft")
    rows = random_rows(rng, student, student if same else random_vocabulary(rng), rows=2, same_ids=same)
    module = objectives.build(objective, student=rows.student, teacher=rows.teacher)
    span, terms = terms_of(module, rows, k)
    logits = torch.from_numpy(np.concatenate(rows.s)).requires_grad_()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return module(x.log_softmax(-1)[span], terms).sum()

    (gradient,) = torch.autograd.grad(loss(logits), logits)
    for _ in range(3):
        direction = torch.from_numpy(rng.normal(size=tuple(logits.shape)))
        step = 1e-6
        with torch.no_grad():
            slope = (loss(logits + step * direction) - loss(logits - step * direction)) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("objective", ALL, ids=named)
def test_autocast_does_not_reach_the_loss(objective: Objective) -> None:
    """Under the student's half precision the same values and gradients: no objective sums masses in bfloat16."""
    rng = np.random.default_rng(11)
    student = random_vocabulary(rng, stops=2)
    same = objective.name in ("gkd", "sft")
    rows = random_rows(rng, student, student if same else random_vocabulary(rng, letters=b"abcd"), same_ids=same)
    module = objectives.build(objective, student=rows.student, teacher=rows.teacher)
    found = []
    for enabled in (False, True):
        logits = torch.from_numpy(np.concatenate(rows.s)).float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            values = losses(module, rows, s=logits)
        found.append((values.detach(), torch.autograd.grad(values.sum(), logits)[0]))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize(
    "objective",
    [Gold(name="gold", beta=beta, merge=merge) for beta in (0.0, 0.5, 1.0) for merge in MERGES]
    + [kind(name=name, beta=beta) for kind, name in ((Bytes, "bytes"), (Bpm, "bpm")) for beta in (0.0, 0.5, 1.0)],
    ids=named,
)
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_mass_that_the_teacher_cannot_express_costs(objective: Objective, seed: int) -> None:
    """It is in the rest: the more of the student goes to such ids, the larger every term (property 18)."""
    rng = np.random.default_rng(seed)
    student = toy_vocabulary([b"a", b"b", b"c", b"ab", b"d", b"dab", None, None], [7])
    teacher = toy_vocabulary([b"b", b"a", None, b"ab", b"c"], [2])
    to_student = {0: 1, 1: 0, 2: 7, 3: 3, 4: 2}
    data = random_bytes(rng, 5)
    teacher_ids = [*random_split(rng, teacher, data), 2]
    ids = [to_student[i] for i in teacher_ids]
    s = np.exp(random_logprobs(rng, len(ids), student.size, scale=1.0))
    s[:, [4, 5, 6]] *= 0.01  # hardly any mass there, to begin with
    s /= s.sum(1, keepdims=True)
    rows = Rows(
        student, teacher, [ids], [teacher_ids], [True], [np.log(s)], [random_logprobs(rng, len(ids), teacher.size, 1.0)]
    )
    for foreign in (4, 5, 6):  # a byte that the teacher has not, a token that begins with it, a control token
        values = [losses_of(rows, objective)]
        for share in (0.05, 0.2, 0.5):
            moved = (1 - share) * s
            moved[:, foreign] += share
            values.append(losses_of(with_student(rows, [np.log(moved)]), objective))
        for low, high in pairwise(values):
            assert all(after > before + 1e-4 for before, after in zip(low, high, strict=True))


@pytest.mark.parametrize("objective", FOUR, ids=label)
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_a_constant_on_the_logits_changes_nothing(objective: Objective, seed: int) -> None:
    """Another constant at each position: the same values, and the same gradients (property 4)."""
    rng = np.random.default_rng(seed)
    rows = two_sides(seed)
    module = objectives.build(objective, student=rows.student, teacher=rows.teacher)
    if not len(module.project(pairing(rows)).starts):
        return
    logits = torch.from_numpy(np.concatenate(rows.s))
    found = []
    for shift in (0.0, torch.from_numpy(rng.normal(size=(len(logits), 1)) * 20)):
        x = (logits + shift).requires_grad_()
        values = losses(module, rows, s=x.log_softmax(-1))
        found.append((values.detach(), torch.autograd.grad(values.sum(), x)[0]))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-9)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-7)


@pytest.mark.parametrize("objective", [o for o in FOUR if o.name != "opd"], ids=label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_student_that_is_its_teacher_has_no_loss(objective: Objective, dtype: torch.dtype) -> None:
    """One tokenizer, equal distributions: no loss and no gradient; for `opd` that holds in expectation, and of the value."""
    rng = np.random.default_rng(7)
    toy = random_vocabulary(rng, stops=1, controls=2)
    rows = random_rows(rng, toy, toy, same_ids=True)
    rows = with_student(rows, rows.t)
    logits = torch.from_numpy(np.concatenate(rows.s)).to(dtype).requires_grad_()
    values = losses(objectives.build(objective, student=toy, teacher=toy), rows, s=logits.log_softmax(-1))
    assert values.abs().max() < 1e-5
    assert torch.autograd.grad(values.sum(), logits)[0].abs().max() < 1e-4
    assert losses_of(rows, Opd(name="opd")) == pytest.approx([0] * len(values), abs=1e-5)


def extreme(i: int, size: int, height: float) -> np.ndarray:
    """log-softmax of one logit at `height` and the others at 0, as a model in float32 has it."""
    logits = np.zeros((1, size))
    logits[0, i] = height
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


@pytest.mark.parametrize("objective", FOUR, ids=label)
@pytest.mark.parametrize("k", [None, 1])
def test_extreme_distributions(objective: Objective, k: int | None) -> None:
    """Either side as sure as a number can be, of the unit, of another matched token, the stop, or an id that the other side
    has not (all is in the rest): finite losses and gradients in float32, none far below zero but for `opd`."""
    module = objectives.build(objective, student=SMALL_S, teacher=SMALL_T)
    for s_id in range(5):
        for t_id in range(5):
            for height in (30.0, 1e4):
                t = extreme(t_id, 5, height)
                rows = replace(SMALL, t=[t], behaviour=[np.array([-1.0])])
                logits = torch.zeros(1, 5)
                logits[0, s_id] = height
                logits.requires_grad_()
                values = losses(module, rows, k, s=logits.log_softmax(-1))
                (gradient,) = torch.autograd.grad(values.sum(), logits)
                assert torch.isfinite(values).all()
                assert torch.isfinite(gradient).all()
                assert values.min() > -1e-5 or objective.name == "opd"


@pytest.mark.parametrize("objective", FOUR, ids=label)
def test_extremes_of_spanning_units(objective: Objective) -> None:
    """P(unit) = 1 on both sides, on one, and on none, over several tokens: finite, and zero where both agree."""
    for p, first in ((1.0, 1.0), (1.0, 1e-12), (1e-12, 1.0), (1e-12, 1e-12)):
        rows = pair(p, first, 1.0 if first == 1 else 1e-12)
        with_zeros = torch.from_numpy(np.maximum(np.concatenate(rows.s), -60.0)).float().requires_grad_()
        rows = replace(rows, behaviour=[np.maximum(b, -60.0) for b in rows.behaviour])
        module = objectives.build(objective, student=rows.student, teacher=rows.teacher)
        if not len(module.project(pairing(rows)).starts):
            assert objective.name == "strict"
            continue
        values = losses(module, rows, s=with_zeros.log_softmax(-1))
        (gradient,) = torch.autograd.grad(values.sum(), with_zeros)
        assert torch.isfinite(values).all()
        assert torch.isfinite(gradient).all()
        if p == first == 1:
            assert values.abs().max() < 1e-4


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_units_do_not_depend_on_the_rows_beside_them(seed: int) -> None:
    """A shard's terms are those of its rows alone, one after another, in any order (property 13)."""
    rng = np.random.default_rng(seed)
    rows = two_sides(seed)
    order = rng.permutation(len(rows.stops)).tolist()

    def pick(chosen: list[int]) -> Rows:
        def of(column: list) -> list:
            return [column[r] for r in chosen]

        return Rows(
            rows.student, rows.teacher, of(rows.student_ids), of(rows.teacher_ids), of(rows.stops), of(rows.s), of(rows.t),
            of(rows.behaviour),
        )  # fmt: skip

    for objective in FOUR:
        together = projected(pick(order), objective, 3)
        alone = [projected(pick([r]), objective, 3) for r in order]
        for name in ("starts", "ends", "counts", "ids", "logprobs", "rest", "supervised"):
            parts = np.concatenate([getattr(one, name) for one in alone])
            assert getattr(together, name) == pytest.approx(parts, abs=1e-9), (objective.name, name)

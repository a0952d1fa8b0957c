"""`alm` (MATHS.md §5; property 18): two coins a unit, by definition, with golden numbers, symmetries and gradients."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import BETAS, PAIR_S, PAIR_T, SMALL, losses_of, naive_units, pair, path, two_sides
from toys import SEEDS, Rows, path_logprobs, random_logprobs, random_vocabulary, terms_of

from configs.objectives import Alm, Opd
from tasks import objectives


def coins(p: float, q: float, beta: float) -> float:
    """JSD_β of (p, 1 - p), the teacher's, and (q, 1 - q), by definition; 0·log 0 = 0."""

    def kl(x: tuple[float, ...], y: tuple[float, ...]) -> float:
        return sum(a * math.log(a / b) for a, b in zip(x, y, strict=True) if a > 0)

    t, s = (p, 1 - p), (q, 1 - q)
    if beta in (0, 1):
        return kl(t, s) if beta == 0 else kl(s, t)
    m = tuple(beta * a + (1 - beta) * b for a, b in zip(t, s, strict=True))
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


def naive_alm(rows: Rows, config: Alm) -> list[float]:
    power = 1 / config.temperature
    return [
        coins(
            path(rows.teacher, rows.t[row], rows.teacher_ids[row], t0, t1) ** power,
            path(rows.student, rows.s[row], rows.student_ids[row], s0, s1) ** power,
            config.beta,
        )
        for row in range(len(rows.stops))
        for (s0, s1), (t0, t1) in naive_units(rows, row)
    ]


@settings(max_examples=60, deadline=None)
@given(SEEDS, BETAS, st.sampled_from([0.5, 1.0, 3.0, 100.0]))
def test_alm_is_its_definition(seed: int, beta: float, temperature: float) -> None:
    """Two coins a unit, of the chain rule's probabilities to the power 1/τ; it never needs the top k; never negative."""
    rows = two_sides(seed)
    config = Alm(name="alm", beta=beta, temperature=temperature)
    wanted = naive_alm(rows, config)
    for k in (None, 1):
        got = losses_of(rows, config, k)
        assert got == pytest.approx(wanted, rel=1e-4, abs=2e-5)
        assert min(got) >= -1e-6


@pytest.mark.parametrize("kind", [Alm(name="alm"), Opd(name="opd")], ids=["alm", "opd"])
@settings(max_examples=30, deadline=None)
@given(seed=SEEDS)
def test_the_stop_is_one_event_on_both_sides(kind: Alm | Opd, seed: int) -> None:
    """Whichever of the student's stop ids was sampled, its side of the unit is their sum, as the teacher's is (§0)."""
    rng = np.random.default_rng(seed)
    student, teacher = random_vocabulary(rng, stops=3), random_vocabulary(rng, stops=2)
    s, t = random_logprobs(rng, 1, student.size), random_logprobs(rng, 1, teacher.size)
    rows = Rows(student, teacher, [[i] for i in student.stop_ids], [[teacher.stop_ids[0]]] * 3, [True] * 3, [s] * 3, [t] * 3)
    rows = replace(rows, behaviour=[path_logprobs(s, ids) for ids in rows.student_ids])
    p, q = float(np.exp(t[0, teacher.stop_ids]).sum()), float(np.exp(s[0, student.stop_ids]).sum())
    wanted = coins(p, q, 0.0) if isinstance(kind, Alm) else math.log(q) - math.log(p)
    assert losses_of(rows, kind) == pytest.approx([wanted] * 3, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("beta", "temperature", "wanted"),
    [
        (0.0, 1.0, 0.6 * math.log(3) + 0.4 * math.log(0.5)),  # T = (.6, .4), S = (.2, .8)
        (1.0, 1.0, 0.2 * math.log(1 / 3) + 0.8 * math.log(2)),
        # M = (.4, .6)
        (0.5, 1.0, 0.5 * (0.6 * math.log(1.5) + 0.4 * math.log(2 / 3) + 0.2 * math.log(0.5) + 0.8 * math.log(4 / 3))),
        (0.0, 0.5, 0.36 * math.log(9) + 0.64 * math.log(0.64 / 0.96)),  # squares: .36 and .04
    ],
)
def test_golden_alm(beta: float, temperature: float, wanted: float) -> None:
    assert losses_of(pair(0.6), Alm(name="alm", beta=beta, temperature=temperature)) == pytest.approx([wanted], abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.02, 0.98), st.floats(0.02, 0.98), st.floats(0.02, 0.98), BETAS, st.sampled_from([0.5, 1.0, 10.0]))
def test_alm_symmetries(p: float, first: float, second: float, beta: float, temperature: float) -> None:
    """Sides changed: JSD_{1-β}. Zero where both sides give the unit the same, whatever the tokens, and only there."""
    config = Alm(name="alm", beta=beta, temperature=temperature)
    rows = pair(p, first, second)
    (value,) = losses_of(rows, config)
    changed = Rows(PAIR_T, PAIR_S, rows.teacher_ids, rows.student_ids, rows.stops, rows.t, rows.s)
    (other,) = losses_of(changed, config.model_copy(update={"beta": 1 - beta}))
    assert other == pytest.approx(value, rel=1e-3, abs=2e-6)
    assert losses_of(pair(first * second, first, second), config) == pytest.approx([0], abs=2e-6)
    if abs(p ** (1 / temperature) - (first * second) ** (1 / temperature)) > 0.02:
        assert value > 1e-5


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.floats(0.02, 0.6), st.sampled_from([0.0, 0.5, 1.0]))
def test_alm_pays_for_mass_that_leaves_the_unit(seed: int, share: float, beta: float) -> None:
    """Where the student gives a unit less than the teacher, moving mass to what the teacher has no word for costs (18)."""
    rng = np.random.default_rng(seed)
    s = np.exp(random_logprobs(rng, 1, 5))
    rows = replace(SMALL, s=[np.log(s)], t=[np.log(np.array([[0.02, 0.02, 0.92, 0.02, 0.02]]))])
    s = s * 0.9 if s[0, 0] > 0.9 else s
    s[0, 3] += 1 - s.sum()
    moved = (1 - share) * s
    moved[0, 3] += share
    low, high = (losses_of(replace(rows, s=[np.log(p)]), Alm(name="alm", beta=beta)) for p in (s, moved))
    assert high[0] > low[0] + 1e-6


def test_alm_reaches_units_that_the_student_finds_unlikely() -> None:
    """With forward KL the gradient of a unit's log-prob is P_S·(1 - P_T)/(1 - P_S) - P_T, however small P_S (§5)."""
    for logprob in (-2.0, -10.0, -19.0, -25.0, -60.0):
        for temperature in (1.0, 2.0):
            ((span, terms),) = [terms_of(objectives.build(Alm(name="alm"), student=PAIR_S, teacher=PAIR_T), pair(0.6))]
            laws = pair(0.6, first := math.exp(-1), second := math.exp(logprob + 1)).s[0]
            x = torch.from_numpy(laws).requires_grad_()
            module = objectives.build(Alm(name="alm", temperature=temperature), student=PAIR_S, teacher=PAIR_T)
            (gradient,) = torch.autograd.grad(module(x[span], terms).sum(), x)
            p, q = 0.6 ** (1 / temperature), math.exp(logprob / temperature)
            wanted = (q * (1 - p) / (1 - q) - p) / temperature
            by_logprob = [float(gradient[0, 0]) / (1 - first), float(gradient[1, 1]) / (1 - second)]
            assert by_logprob == pytest.approx([wanted, wanted], rel=1e-4)

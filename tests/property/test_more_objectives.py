"""`strict`, `alm`, `bpm` and `opd` (MATHS.md §5; properties 10, 12, 14, 18 and 19), against loops over dictionaries, exact
enumeration, and autograd of the plain formula. What they share with the others is in test_objectives and test_training."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_objectives import BETAS, Event, by_event, event_of, gold_losses, naive_gkd, naive_units
from toys import (
    SEEDS,
    Rows,
    ToySide,
    floored_jsd,
    losses,
    pairing,
    path_logprobs,
    random_bytes,
    random_logprobs,
    random_rows,
    random_split,
    random_vocabulary,
    rollouts_table,
    scores_of,
    terms_of,
    with_student,
)
from toys import vocabulary as toy_vocabulary

from configs.objectives import Alm, Bpm, Gkd, Objective, Opd, Strict
from storage.schemas import SCORES
from tasks import objectives
from tasks.align import aligned_table
from tasks.batches import collate
from tasks.engines.base import TokenScores
from tasks.objectives.base import Projection
from tasks.tokens.vocabulary import Vocabulary

KS = st.sampled_from([None, 1, 2, 3, 5])


def two_sides(seed: int) -> Rows:
    """Different vocabularies with duplicates, several stops and a control id on each side, units of every kind."""
    rng = np.random.default_rng(seed)
    student = random_vocabulary(rng, stops=2)
    return random_rows(rng, student, random_vocabulary(rng, stops=3, letters=b"abcd"), rows=4)


def projected(rows: Rows, objective: Objective, k: int | None = None) -> Projection:
    return objectives.build(objective, rows.student, rows.teacher).project(pairing(rows, k))


def targets(projection: Projection) -> list[dict[int, float]]:
    """The masses of each term's events."""
    found, at = [], 0
    for count in projection.counts:
        span = slice(at, at + int(count))
        found.append(dict(zip(projection.ids[span].tolist(), np.exp(projection.logprobs[span]).tolist(), strict=True)))
        at += int(count)
    assert at == len(projection.ids)
    return found


def unit_bytes(rows: Rows, row: int) -> list[int]:
    """The bytes of each unit of a row."""
    ids = rows.student_ids[row]
    return [sum(len(rows.student.beta.values[i] or b"") for i in ids[s0:s1]) for (s0, s1), _ in naive_units(rows, row)]


def kept(logprobs: np.ndarray, k: int | None) -> dict[int, float]:
    """The masses of a teacher's top k."""
    return {int(i): float(np.exp(logprobs[i])) for i in np.argsort(-logprobs, kind="stable")[:k]}


def stop_sum(toy: Vocabulary, law: np.ndarray, i: int) -> float:
    """The probability of what id i does: the completion ends, or this token."""
    return float(law[toy.stop_ids].sum()) if i in toy.stop_ids else float(law[i])


def path(toy: Vocabulary, table: np.ndarray, ids: list[int], start: int, end: int) -> float:
    """P(unit): the chain rule along the tokens, the stop being one event however many ids it has (MATHS.md §0, §3)."""
    return math.prod(stop_sum(toy, np.exp(table[i]), ids[i]) for i in range(start, end))


# -- strict ----------------------------------------------------------------------------------------------------------------


def naive_strict(rows: Rows, top: int, k: int | None = None, same: bool = False) -> list[float]:
    """One-to-one units and the stop: reverse KL of both laws on common events, renormalised: on the `top` likeliest of
    either side that the teacher names; the rest in one bucket."""
    student, teacher = rows.student, rows.teacher
    sides = ("same", "same") if same else ("S", "T")
    common = {event_of(student, i, sides[0]) for i in range(student.size)}
    common &= {event_of(teacher, i, sides[1]) for i in range(teacher.size)}
    values = []
    for row in range(len(rows.stops)):
        for (s0, s1), (t0, t1) in naive_units(rows, row):
            if (s1 - s0, t1 - t0) != (1, 1):
                continue
            s = by_event(student, dict(enumerate(np.exp(rows.s[row][s0]))), sides[0])
            s = {event: mass for event, mass in s.items() if event in common}
            s = {event: mass / sum(s.values()) for event, mass in s.items()}
            named = kept(rows.t[row][t0], k)
            t = by_event(teacher, named, sides[1])
            t = {event: mass for event, mass in t.items() if event in common}
            total = sum(t.values()) + max(1 - sum(named.values()), 0)
            best = {event for law in (s, t) for event in sorted(law, key=lambda event: -law[event])[:top]}
            support = [event for event in t if event in best]
            a, b = [t[event] / total for event in support], [s[event] for event in support]
            values.append(floored_jsd([*a, max(1 - sum(a), 0)], [*b, max(1 - sum(b), 1e-15)], 1))
    return values


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.sampled_from([1, 2, 4, 16, 1000]), KS)
def test_strict_is_its_definition(seed: int, top: int, k: int | None) -> None:
    """Two vocabularies with duplicates, several stops, control ids; a top beyond the vocabulary; a truncated signal."""
    rows = two_sides(seed)
    wanted = naive_strict(rows, top, k)
    if wanted:
        assert gold_losses(rows, Strict(name="strict", top=top), k) == pytest.approx(wanted, abs=2e-5)


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_strict_reads_one_to_one_units_and_stops_alone(seed: int) -> None:
    """Each such unit is a term at its student token, no other unit is, and their bytes are the supervised ones (19)."""
    rows = two_sides(seed)
    projection = projected(rows, Strict(name="strict"))
    for row in range(len(rows.stops)):
        units = list(zip(naive_units(rows, row), unit_bytes(rows, row), strict=True))
        single = [(s0, s1, size) for ((s0, s1), (t0, t1)), size in units if s1 - s0 == t1 - t0 == 1]
        at = slice(projection.offsets[row], projection.offsets[row + 1])
        assert list(zip(projection.starts[at], projection.ends[at], strict=True)) == [(s0, s1) for s0, s1, _ in single]
        assert projection.supervised[row] == sum(size for _, _, size in single)


@pytest.mark.parametrize("controls", [0, 2])
@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, top=st.sampled_from([2, 5]))
def test_strict_with_one_tokenizer(controls: int, seed: int, top: int) -> None:
    """Every position, and every event: with a top that holds them all it is gkd's reverse KL."""
    rng = np.random.default_rng(seed)
    toy = random_vocabulary(rng, stops=2, controls=controls)
    rows = random_rows(rng, toy, toy, same_ids=True)
    assert gold_losses(rows, Strict(name="strict", top=1000)) == pytest.approx(naive_gkd(rows, 1.0), abs=2e-5)
    assert gold_losses(rows, Strict(name="strict", top=top)) == pytest.approx(naive_strict(rows, top, same=True), abs=2e-5)


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_a_larger_top_never_lowers_strict(seed: int) -> None:
    """Never negative, non-decreasing in `top` (nested supports; property 11)."""
    rows = two_sides(seed)
    if not naive_strict(rows, 1):
        return
    values = [gold_losses(rows, Strict(name="strict", top=top)) for top in (1, 2, 3, 5, 8, 1000)]
    assert min(values[0]) >= -1e-5
    assert all(a <= b + 2e-5 for low, high in pairwise(values) for a, b in zip(low, high, strict=True))


SMALL_S = toy_vocabulary([b"a", b"b", b"c", b"d", None], [4])
SMALL_T = toy_vocabulary([b"c", b"b", b"a", None, b"e"], [3])
S = np.array([[0.3, 0.2, 0.05, 0.4, 0.05]])  # of a, b, c, stop: (.5, 1/3, 1/12, 1/12)
T = np.array([[0.1, 0.2, 0.4, 0.1, 0.2]])  # (.5, .25, .125, .125)
SMALL = Rows(SMALL_S, SMALL_T, [[0]], [[2]], [False], [np.log(S)], [np.log(T)])


def test_golden_strict() -> None:
    """d and e are the other side's unknown; the student's top 2 are a and b, and c and the stop are the rest."""
    third, twelfth = 1 / 3, 1 / 12
    every = 0.5 * math.log(0.5 / 0.5) + third * math.log(third / 0.25) + 2 * twelfth * math.log(twelfth / 0.125)
    two = third * math.log(third / 0.25) + 2 * twelfth * math.log(2 * twelfth / 0.25)
    one = 0.0  # a: .5 against .5
    for top, wanted in ((1, one), (2, two), (4, every), (16, every)):
        assert gold_losses(SMALL, Strict(name="strict", top=top)) == pytest.approx([wanted], abs=1e-6)
    # The teacher's top 2 are a and one of b, e (both .2; the lower id comes first): a of .4/(.4 + .2 + .4), b of .2.
    truncated = 0.5 * math.log(0.5 / 0.4) + third * math.log(third / 0.2) + 2 * twelfth * math.log(2 * twelfth / 0.4)
    assert gold_losses(SMALL, Strict(name="strict"), 2) == pytest.approx([truncated], abs=1e-6)


def test_strict_where_the_likeliest_of_both_sides_differ() -> None:
    """The student is sure of b, and the teacher names a alone: a loss of the two coins (a or not), and a gradient to a."""
    s = np.array([[0.01, 0.9, 0.02, 0.02, 0.05]])
    for t_a, rest in ((0.9, math.log(0.1)), (1.0, -20.0)):  # the floor, where the teacher has nothing else
        t = np.array([[0.0, 0.0, t_a, 1 - t_a, 0.0]])
        with np.errstate(divide="ignore"):
            rows = replace(SMALL, s=[np.log(s)], t=[np.log(t)])
        module = objectives.build(Strict(name="strict", top=1), SMALL_S, SMALL_T)
        logits = torch.from_numpy(rows.s[0]).requires_grad_()
        value = losses(module, rows, 1, s=logits)
        p = 0.01 / 0.98  # d is the student's alone
        assert value.tolist() == pytest.approx([p * math.log(p / t_a) + (1 - p) * (math.log(1 - p) - rest)], abs=1e-6)
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert gradient[0, 0] < -1e-3
        assert gradient[0, 1] > 0


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.floats(0.05, 0.9))
def test_strict_does_not_see_mass_on_unmatched_ids(seed: int, share: float) -> None:
    """The named exception to property 18: both laws are renormalised, so what leaves in proportion costs nothing."""
    rng = np.random.default_rng(seed)
    rows = replace(SMALL, s=[random_logprobs(rng, 1, 5)], t=[random_logprobs(rng, 1, 5)])
    before = gold_losses(rows, Strict(name="strict"))
    moved_s, moved_t = (1 - share) * np.exp(rows.s[0]), (1 - share) * np.exp(rows.t[0])
    moved_s[:, 3] += share
    moved_t[:, 4] += share
    for moved in (replace(rows, s=[np.log(moved_s)]), replace(rows, t=[np.log(moved_t)])):
        assert gold_losses(moved, Strict(name="strict")) == pytest.approx(before, abs=1e-5)


# -- alm -------------------------------------------------------------------------------------------------------------------


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
        got = gold_losses(rows, config, k)
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
    assert gold_losses(rows, kind) == pytest.approx([wanted] * 3, rel=1e-4, abs=1e-5)


# A teacher token for both of the student's: P_S(ab) = .5 · .4 = .2, P_T(ab) = .6 or whatever is given.
PAIR_S, PAIR_T = toy_vocabulary([b"a", b"b", None], [2]), toy_vocabulary([b"ab", b"a", None], [2])


def pair(p: float, first: float = 0.5, second: float = 0.4) -> Rows:
    s = np.array([[first, 0.6 * (1 - first), 0.4 * (1 - first)], [0.5 * (1 - second), second, 0.5 * (1 - second)]])
    t = np.array([[p, 0.5 * (1 - p), 0.5 * (1 - p)]])
    with np.errstate(divide="ignore"):
        return Rows(PAIR_S, PAIR_T, [[0, 1]], [[0]], [False], [np.log(s)], [np.log(t)], [np.log(s[[0, 1], [0, 1]])])


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
    assert gold_losses(pair(0.6), Alm(name="alm", beta=beta, temperature=temperature)) == pytest.approx([wanted], abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.02, 0.98), st.floats(0.02, 0.98), st.floats(0.02, 0.98), BETAS, st.sampled_from([0.5, 1.0, 10.0]))
def test_alm_symmetries(p: float, first: float, second: float, beta: float, temperature: float) -> None:
    """Sides changed: JSD_{1-β}. Zero where both sides give the unit the same, whatever the tokens, and only there."""
    config = Alm(name="alm", beta=beta, temperature=temperature)
    rows = pair(p, first, second)
    (value,) = gold_losses(rows, config)
    changed = Rows(PAIR_T, PAIR_S, rows.teacher_ids, rows.student_ids, rows.stops, rows.t, rows.s)
    (other,) = gold_losses(changed, config.model_copy(update={"beta": 1 - beta}))
    assert other == pytest.approx(value, rel=1e-3, abs=2e-6)
    assert gold_losses(pair(first * second, first, second), config) == pytest.approx([0], abs=2e-6)
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
    low, high = (gold_losses(replace(rows, s=[np.log(p)]), Alm(name="alm", beta=beta)) for p in (s, moved))
    assert high[0] > low[0] + 1e-6


def test_alm_reaches_units_that_the_student_finds_unlikely() -> None:
    """With forward KL the gradient of a unit's log-prob is P_S·(1 - P_T)/(1 - P_S) - P_T, however small P_S (§5)."""
    for logprob in (-2.0, -10.0, -19.0, -25.0, -60.0):
        for temperature in (1.0, 2.0):
            ((span, terms),) = [terms_of(objectives.build(Alm(name="alm"), PAIR_S, PAIR_T), pair(0.6))]
            laws = pair(0.6, first := math.exp(-1), second := math.exp(logprob + 1)).s[0]
            x = torch.from_numpy(laws).requires_grad_()
            module = objectives.build(Alm(name="alm", temperature=temperature), PAIR_S, PAIR_T)
            (gradient,) = torch.autograd.grad(module(x[span], terms).sum(), x)
            p, q = 0.6 ** (1 / temperature), math.exp(logprob / temperature)
            wanted = (q * (1 - p) / (1 - q) - p) / temperature
            by_logprob = [float(gradient[0, 0]) / (1 - first), float(gradient[1, 1]) / (1 - second)]
            assert by_logprob == pytest.approx([wanted, wanted], rel=1e-4)


# -- bpm -------------------------------------------------------------------------------------------------------------------


def carried(student: Vocabulary, teacher: Vocabulary, i: int, same: bool) -> Event | None:
    """φ: the longest student token that begins the teacher's, found by trying all; the stop; None: none does."""
    if same:
        return event_of(teacher, i, "same")
    if i in teacher.stop_ids:
        return "stop"
    value = teacher.beta.values[i]
    fitting = [own for own in student.beta.values if own and value and value.startswith(own)]
    return max(fitting, key=len) if fitting else None


def naive_cells(rows: Rows, k: int | None = None, same: bool = False) -> list[tuple[dict[Event, float], float]]:
    """Each unit's cells and its rest: the teacher's mass at the unit's start, carried; a spanning token has its joint."""
    student, teacher, found = rows.student, rows.teacher, []
    for row in range(len(rows.stops)):
        t, s_ids, t_ids = rows.t[row], rows.student_ids[row], rows.teacher_ids[row]
        for (s0, s1), (t0, t1) in naive_units(rows, row):
            cells: dict[Event, float] = {}
            named, rest = kept(t[t0], k), 1.0
            for i, mass in named.items():
                event = carried(student, teacher, i, same)
                if event is not None:
                    cells[event] = cells.get(event, 0.0) + mass
                    rest -= mass
            if s1 - s0 == 1 and t1 - t0 > 1:
                joint = path(teacher, t, t_ids, t0, t1)
                source = carried(student, teacher, t_ids[t0], same) if t_ids[t0] in named else None
                if source is None:
                    rest -= joint
                else:
                    cells[source] -= joint
                whole = event_of(student, s_ids[s0], "S")
                cells[whole] = cells.get(whole, 0.0) + joint
            found.append((cells, max(rest, 0.0)))
    return found


def naive_bpm(rows: Rows, beta: float, k: int | None = None, same: bool = False) -> list[float]:
    values, every = [], iter(naive_cells(rows, k, same))
    for row in range(len(rows.stops)):
        for (s0, _), _ in naive_units(rows, row):
            cells, rest = next(every)
            s = by_event(rows.student, dict(enumerate(np.exp(rows.s[row][s0]))), "same" if same else "S")
            support = [event for event, mass in cells.items() if mass > 0]
            b = [s[event] for event in support]
            values.append(floored_jsd([*(cells[e] for e in support), rest], [*b, max(1 - sum(b), 1e-15)], beta))
    return values


@settings(max_examples=60, deadline=None)
@given(SEEDS, BETAS, KS)
def test_bpm_is_its_definition(seed: int, beta: float, k: int | None) -> None:
    """Units of every kind, duplicates, several stops, control ids, a signal so short that it may lack the first token."""
    rows = two_sides(seed)
    assert gold_losses(rows, Bpm(name="bpm", beta=beta), k) == pytest.approx(naive_bpm(rows, beta, k), abs=3e-5)


@settings(max_examples=60, deadline=None)
@given(SEEDS, KS)
def test_bpm_cells_sum_to_one(seed: int, k: int | None) -> None:
    """Cells, the stop among them, and the rest are 1, none below 0, each where the loops put it (property 10)."""
    rows = two_sides(seed)
    projection = projected(rows, Bpm(name="bpm"), k)
    for cells, rest, (naive, naive_rest) in zip(
        targets(projection), np.exp(projection.rest), naive_cells(rows, k), strict=True
    ):
        assert sum(cells.values()) + rest == pytest.approx(1, abs=1e-9)
        assert min([*cells.values(), rest]) >= 0
        assert rest == pytest.approx(naive_rest, abs=1e-9)
        assert {event_of(rows.student, i, "S"): mass for i, mass in cells.items()} == pytest.approx(naive, abs=1e-9)


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("controls", [0, 2])
@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, beta=BETAS)
def test_bpm_with_one_tokenizer(controls: int, k: int | None, seed: int, beta: float) -> None:
    """The identity where vocabularies match: gkd at every position (property 10)."""
    rng = np.random.default_rng(seed)
    toy = random_vocabulary(rng, stops=2, controls=controls)
    rows = random_rows(rng, toy, toy, same_ids=True)
    wanted = naive_gkd(rows, beta, k)
    assert gold_losses(rows, Bpm(name="bpm", beta=beta), k) == pytest.approx(wanted, abs=2e-5)
    assert gold_losses(rows, Gkd(name="gkd", beta=beta), k) == pytest.approx(wanted, abs=2e-5)


@settings(max_examples=25, deadline=None)
@given(SEEDS, BETAS)
def test_bpm_with_one_vocabulary_under_other_ids(seed: int, beta: float) -> None:
    """The same tokens in another order are the same tokens: still the identity, at every position."""
    rng = np.random.default_rng(seed)
    values: list[bytes | None] = [b"a", b"b", b"c", b"ab", b"abc", b"ca", None]
    new = rng.permutation(len(values))
    shuffled: list[bytes | None] = [None] * len(values)
    for i, value in enumerate(values):
        shuffled[new[i]] = value
    student, teacher = toy_vocabulary(values, [6]), toy_vocabulary(shuffled, [int(new[6])])
    rows = random_rows(rng, student, student, same_ids=True)
    wanted = naive_gkd(rows, beta)
    rows = replace(
        rows,
        teacher=teacher,
        teacher_ids=[[int(new[i]) for i in ids] for ids in rows.student_ids],
        t=[t[:, np.argsort(new)] for t in rows.t],
    )
    assert gold_losses(rows, Bpm(name="bpm", beta=beta)) == pytest.approx(wanted, abs=2e-5)


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_bpm_is_the_marginal_within_one_token(seed: int) -> None:
    """Where the student reads one token's bytes greedily, the cell of v is P(the teacher's next token makes it choose v):
    the sum over teacher tokens that begin with v and with no longer student token (property 10)."""
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, random_vocabulary(rng), random_vocabulary(rng, letters=b"abcd"), rows=4)
    student, teacher, at = rows.student, rows.teacher, 0
    cells = targets(projected(rows, Bpm(name="bpm")))
    for row in range(len(rows.stops)):
        for (s0, s1), (t0, t1) in naive_units(rows, row):
            law = np.exp(rows.t[row][t0])
            if not (s1 - s0 == 1 and t1 - t0 > 1):  # no spanning token
                for i, mass in cells[at].items():
                    own = student.beta.values[i]
                    if own is None:
                        assert mass == pytest.approx(law[teacher.stop_ids].sum())
                        continue
                    longer = [v for v in student.beta.values if v and v.startswith(own) and v != own]
                    begins = [
                        law[j]
                        for j, w in enumerate(teacher.beta.values)
                        if w and w.startswith(own) and not any(w.startswith(v) for v in longer)
                    ]
                    assert mass == pytest.approx(sum(begins))
            at += 1
    assert at == len(cells)


SPAN_S = toy_vocabulary([b"a", b"b", b"abb", b"ab", None], [4])
SPAN_T = toy_vocabulary([b"b", b"a", None, b"abc"], [2])


def test_golden_bpm() -> None:
    """`ab` in one student token and two of the teacher's: T(a)·T(b|a) = .5 · .4 = .2 is taken from a's .5.

    `abc` goes to `ab`, its longest beginning: .2 + .3 = .5.
    """
    s = np.array([[0.1, 0.2, 0.3, 0.3, 0.1]])
    t = np.array([[0.1, 0.5, 0.1, 0.3], [0.4, 0.3, 0.2, 0.1]])
    rows = Rows(SPAN_S, SPAN_T, [[3]], [[1, 0]], [False], [np.log(s)], [np.log(t)])
    projection = projected(rows, Bpm(name="bpm"))
    assert targets(projection)[0] == pytest.approx({0: 0.3, 1: 0.1, 3: 0.5, 4: 0.1})
    assert np.exp(projection.rest) == pytest.approx([0], abs=1e-9)
    wanted = floored_jsd([0.3, 0.1, 0.5, 0.1, 0], [0.1, 0.2, 0.3, 0.1, 0.3], 1)
    assert gold_losses(rows, Bpm(name="bpm")) == pytest.approx([wanted], abs=1e-5)
    assert projection.supervised.tolist() == [2]


def test_golden_bpm_with_the_first_token_outside_the_top() -> None:
    """Top 1 is `abc` (.6): ab has .6 + T(a)·T(b|a) = .6 + .2 · .4, which comes out of the rest of .4."""
    s = np.array([[0.1, 0.2, 0.3, 0.3, 0.1]])
    t = np.array([[0.1, 0.2, 0.1, 0.6], [0.4, 0.3, 0.2, 0.1]])
    rows = Rows(SPAN_S, SPAN_T, [[3]], [[1, 0]], [False], [np.log(s)], [np.log(t)])
    projection = projected(rows, Bpm(name="bpm"), 1)
    assert targets(projection)[0] == pytest.approx({3: 0.68})
    assert np.exp(projection.rest) == pytest.approx([0.32])
    wanted = floored_jsd([0.68, 0.32], [0.3, 0.7], 0)
    assert gold_losses(rows, Bpm(name="bpm", beta=0.0), 1) == pytest.approx([wanted], abs=1e-6)


def test_a_spanning_token_with_a_duplicate() -> None:
    """Whichever id of `ab` was sampled, the class has the joint, and the student's mass on both counts (§1)."""
    student = toy_vocabulary([b"a", b"b", b"ab", b"ab", None], [4])
    s, t = np.array([[0.1, 0.2, 0.3, 0.3, 0.1]]), np.array([[0.1, 0.5, 0.1, 0.3], [0.4, 0.3, 0.2, 0.1]])
    for sampled in (2, 3):
        rows = Rows(student, SPAN_T, [[sampled]], [[1, 0]], [False], [np.log(s)], [np.log(t)])
        assert targets(projected(rows, Bpm(name="bpm")))[0] == pytest.approx({0: 0.3, 1: 0.1, 2: 0.5, 4: 0.1})
        wanted = floored_jsd([0.3, 0.1, 0.5, 0.1], [0.1, 0.2, 0.6, 0.1], 1)
        assert gold_losses(rows, Bpm(name="bpm")) == pytest.approx([wanted], abs=1e-5)


def test_golden_bpm_without_a_beginning() -> None:
    """No student token begins the teacher's `a`: what the spanning token gets comes out of the rest there too."""
    student = toy_vocabulary([b"ab", b"b", None], [2])
    t = np.array([[0.1, 0.5, 0.1, 0.3], [0.4, 0.3, 0.2, 0.1]])
    rows = Rows(student, SPAN_T, [[0]], [[1, 0]], [False], [np.log([[0.5, 0.3, 0.2]])], [np.log(t)])
    projection = projected(rows, Bpm(name="bpm"))
    assert targets(projection)[0] == pytest.approx({0: 0.3 + 0.5 * 0.4, 1: 0.1, 2: 0.1})
    assert np.exp(projection.rest) == pytest.approx([0.3])


@settings(max_examples=30, deadline=None)
@given(SEEDS, KS)
def test_bytes_that_bpm_and_alm_speak_of(seed: int, k: int | None) -> None:
    """`alm` of all bytes in units, `bpm` of those of units with a cell (property 19)."""
    rows = two_sides(seed)
    alm, bpm = (projected(rows, objective, k) for objective in (Alm(name="alm"), Bpm(name="bpm")))
    cells = iter(naive_cells(rows, k))
    for row in range(len(rows.stops)):
        sizes = unit_bytes(rows, row)
        assert alm.supervised[row] == sum(sizes)
        assert bpm.supervised[row] == sum(size for size in sizes if next(cells)[0])


# -- opd -------------------------------------------------------------------------------------------------------------------


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
    values = losses(objectives.build(config, rows.student, rows.teacher), rows, s=logits.log_softmax(-1))
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
        assert gold_losses(rows, Opd(name="opd", clip=clip)) == pytest.approx(wanted, abs=2e-5)


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
    assert gold_losses(rows, Opd(name="opd")) == pytest.approx([constant] * size, abs=1e-5)
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
        assert gold_losses(rows, Opd(name="opd", clip=clip)) == pytest.approx([-math.log(3)], abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_rows_that_the_student_did_not_sample(seed: int) -> None:
    """By way of the rollouts table: they have no term, and their bytes are unmatched; the others have the terms and the
    behaviour that they would have alone (property 19)."""
    rng = np.random.default_rng(seed)
    rows = with_some_rows_given(two_sides(seed), seed)
    own, other = ToySide(rows.student), ToySide(rows.teacher)
    results = [
        TokenScores(
            np.array([math.log(stop_sum(rows.teacher, np.exp(p), i)) for p, i in zip(t, ids)], np.float32),
            np.argmax(t, 1).astype(np.int32),
            t.max(1).astype(np.float16),
            np.ones(len(ids), np.int16),
            np.log1p(-np.exp(t.max(1))).astype(np.float32),
        )
        for t, ids in zip(rows.t, rows.teacher_ids, strict=True)
    ]
    module = objectives.build(Opd(name="opd"), rows.student, rows.teacher)
    order = rng.permutation(len(rows.stops))
    rollouts = rollouts_table(
        [[0]] * len(order),
        [rows.student_ids[r] for r in order],
        own,  # type: ignore[arg-type]
        logprobs=[rows.behaviour[r] for r in order],
    )
    scores = scores_of([results[r] for r in order], [rows.teacher_ids[r] for r in order])
    table = aligned_table(rollouts, scores, own, other, module).to_pylist()  # type: ignore[arg-type]
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
    """A control token spells nothing, so no unit holds it, and yet a student must not leave its text there for free
    (property 18): it is a term, impossible to a teacher that does not know it, as likely as it says to one that does."""
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
            TokenScores(
                table[np.arange(len(graded)), graded].astype(np.float32),
                np.zeros(len(graded), np.int32),
                table[:, 0].astype(np.float16),
                np.ones(len(graded), np.int16),
                np.log1p(-np.exp(table[:, 0])).astype(np.float32),
            )
        )
        last = None
        if escapes and not given_row:
            grade = max(float(results[-1].logprobs[escape]), -20.0) if same else -20.0
            last = (escape, escape + 1, float(behaviours[-1][escape]), grade)
        wanted.append(last)
    own, other = ToySide(student), ToySide(teacher)
    module = objectives.build(Opd(name="opd"), student, teacher)
    rollouts = rollouts_table([[0]] * len(s_rows), s_rows, own, logprobs=behaviours)  # type: ignore[arg-type]
    scores = scores_of(results, t_rows).to_pylist()
    for row in scores:
        row["status"] = "ok" if row["token_ids"] else "empty"  # as the scoring stage has it
    aligned = aligned_table(rollouts, pa.Table.from_pylist(scores, SCORES), own, other, module)  # type: ignore[arg-type]
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
    result = TokenScores(
        np.array([half], np.float32),
        np.zeros(1, np.int32),
        np.array([half], np.float16),
        np.ones(1, np.int16),
        np.array([half], np.float32),
    )
    module = objectives.build(Opd(name="opd"), student, teacher)
    table = aligned_table(rollouts, scores_of([result], [[0]]), own, other, module)  # type: ignore[arg-type]
    batch = collate(
        table.append_column("token_ids", rollouts["token_ids"]).append_column("prompt_token_ids", rollouts["prompt_token_ids"]),
        0,
        torch.device("cpu"),
    )
    logits = torch.zeros(len(ids), student.size, requires_grad=True)
    (at, terms), *more = batch.chunks(100)
    assert not more
    module(logits[at], terms).sum().backward()
    assert logits.grad is not None
    assert logits.grad[1, 2] > 1  # and a step goes against the gradient
    assert logits.grad[1, [0, 1, 3]].max() < 0


# -- all four --------------------------------------------------------------------------------------------------------------

FOUR: list[Objective] = [
    Strict(name="strict"),
    Strict(name="strict", top=2),
    *(Alm(name="alm", beta=beta, temperature=tau) for beta in (0.0, 0.5, 1.0) for tau in (1.0, 50.0)),
    *(Bpm(name="bpm", beta=beta) for beta in (0.0, 0.5, 1.0)),
    Opd(name="opd"),
]


def label(objective: Objective) -> str:
    return "-".join(map(str, objective.model_dump().values()))


@pytest.mark.parametrize("objective", FOUR, ids=label)
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_a_constant_on_the_logits_changes_nothing(objective: Objective, seed: int) -> None:
    """Another constant at each position: the same values, and the same gradients (property 4)."""
    rng = np.random.default_rng(seed)
    rows = two_sides(seed)
    module = objectives.build(objective, rows.student, rows.teacher)
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
    values = losses(objectives.build(objective, toy, toy), rows, s=logits.log_softmax(-1))
    assert values.abs().max() < 1e-5
    assert torch.autograd.grad(values.sum(), logits)[0].abs().max() < 1e-4
    assert gold_losses(rows, Opd(name="opd")) == pytest.approx([0] * len(values), abs=1e-5)


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
    module = objectives.build(objective, SMALL_S, SMALL_T)
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
        module = objectives.build(objective, rows.student, rows.teacher)
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

"""`strict` (MATHS.md §5; properties 11, 18 and 19), against loops over dictionaries and golden numbers."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import (
    KS,
    SMALL,
    SMALL_S,
    SMALL_T,
    by_event,
    event_of,
    kept,
    losses_of,
    naive_gkd,
    naive_units,
    projected,
    two_sides,
    unit_bytes,
)
from toys import SEEDS, Rows, floored_jsd, losses, random_logprobs, random_rows, random_vocabulary

from configs.objectives import Strict
from tasks import objectives


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
        assert losses_of(rows, Strict(name="strict", top=top), k) == pytest.approx(wanted, abs=2e-5)


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
    assert losses_of(rows, Strict(name="strict", top=1000)) == pytest.approx(naive_gkd(rows, 1.0), abs=2e-5)
    assert losses_of(rows, Strict(name="strict", top=top)) == pytest.approx(naive_strict(rows, top, same=True), abs=2e-5)


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_a_larger_top_never_lowers_strict(seed: int) -> None:
    """Never negative, non-decreasing in `top` (nested supports; property 11)."""
    rows = two_sides(seed)
    if not naive_strict(rows, 1):
        return
    values = [losses_of(rows, Strict(name="strict", top=top)) for top in (1, 2, 3, 5, 8, 1000)]
    assert min(values[0]) >= -1e-5
    assert all(a <= b + 2e-5 for low, high in pairwise(values) for a, b in zip(low, high, strict=True))


def test_golden_strict() -> None:
    """d and e are the other side's unknown; the student's top 2 are a and b, and c and the stop are the rest."""
    third, twelfth = 1 / 3, 1 / 12
    every = 0.5 * math.log(0.5 / 0.5) + third * math.log(third / 0.25) + 2 * twelfth * math.log(twelfth / 0.125)
    two = third * math.log(third / 0.25) + 2 * twelfth * math.log(2 * twelfth / 0.25)
    one = 0.0  # a: .5 against .5
    for top, wanted in ((1, one), (2, two), (4, every), (16, every)):
        assert losses_of(SMALL, Strict(name="strict", top=top)) == pytest.approx([wanted], abs=1e-6)
    # The teacher's top 2 are a and one of b, e (both .2; the lower id comes first): a of .4/(.4 + .2 + .4), b of .2.
    truncated = 0.5 * math.log(0.5 / 0.4) + third * math.log(third / 0.2) + 2 * twelfth * math.log(2 * twelfth / 0.4)
    assert losses_of(SMALL, Strict(name="strict"), 2) == pytest.approx([truncated], abs=1e-6)


def test_strict_where_the_likeliest_of_both_sides_differ() -> None:
    """The student is sure of b, and the teacher names a alone: a loss of the two coins (a or not), and a gradient to a."""
    s = np.array([[0.01, 0.9, 0.02, 0.02, 0.05]])
    for t_a, rest in ((0.9, math.log(0.1)), (1.0, -20.0)):  # the floor, where the teacher has nothing else
        t = np.array([[0.0, 0.0, t_a, 1 - t_a, 0.0]])
        with np.errstate(divide="ignore"):
            rows = replace(SMALL, s=[np.log(s)], t=[np.log(t)])
        module = objectives.build(Strict(name="strict", top=1), student=SMALL_S, teacher=SMALL_T)
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
    before = losses_of(rows, Strict(name="strict"))
    moved_s, moved_t = (1 - share) * np.exp(rows.s[0]), (1 - share) * np.exp(rows.t[0])
    moved_s[:, 3] += share
    moved_t[:, 4] += share
    for moved in (replace(rows, s=[np.log(moved_s)]), replace(rows, t=[np.log(moved_t)])):
        assert losses_of(moved, Strict(name="strict")) == pytest.approx(before, abs=1e-5)

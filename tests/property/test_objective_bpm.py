"""`bpm` (MATHS.md §5; properties 10 and 19), against loops over dictionaries and exact enumeration."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from naive import (
    BETAS,
    KS,
    Event,
    by_event,
    event_of,
    kept,
    losses_of,
    naive_gkd,
    naive_units,
    path,
    projected,
    targets,
    two_sides,
    unit_bytes,
)
from toys import SEEDS, Rows, floored_jsd, random_rows, random_vocabulary
from toys import vocabulary as toy_vocabulary

from configs.objectives import Alm, Bpm, Gkd
from tasks.tokens.vocabulary import Vocabulary


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
    assert losses_of(rows, Bpm(name="bpm", beta=beta), k) == pytest.approx(naive_bpm(rows, beta, k), abs=3e-5)


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
    assert losses_of(rows, Bpm(name="bpm", beta=beta), k) == pytest.approx(wanted, abs=2e-5)
    assert losses_of(rows, Gkd(name="gkd", beta=beta), k) == pytest.approx(wanted, abs=2e-5)


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
    assert losses_of(rows, Bpm(name="bpm", beta=beta)) == pytest.approx(wanted, abs=2e-5)


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
    assert losses_of(rows, Bpm(name="bpm")) == pytest.approx([wanted], abs=1e-5)
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
    assert losses_of(rows, Bpm(name="bpm", beta=0.0), 1) == pytest.approx([wanted], abs=1e-6)


def test_a_spanning_token_with_a_duplicate() -> None:
    """Whichever id of `ab` was sampled, the class has the joint, and the student's mass on both counts (§1)."""
    student = toy_vocabulary([b"a", b"b", b"ab", b"ab", None], [4])
    s, t = np.array([[0.1, 0.2, 0.3, 0.3, 0.1]]), np.array([[0.1, 0.5, 0.1, 0.3], [0.4, 0.3, 0.2, 0.1]])
    for sampled in (2, 3):
        rows = Rows(student, SPAN_T, [[sampled]], [[1, 0]], [False], [np.log(s)], [np.log(t)])
        assert targets(projected(rows, Bpm(name="bpm")))[0] == pytest.approx({0: 0.3, 1: 0.1, 2: 0.5, 4: 0.1})
        wanted = floored_jsd([0.3, 0.1, 0.5, 0.1], [0.1, 0.2, 0.6, 0.1], 1)
        assert losses_of(rows, Bpm(name="bpm")) == pytest.approx([wanted], abs=1e-5)


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

"""Oracles that the tests of objectives share: loops over dictionaries of events, and small rows with known masses."""

import math
from itertools import pairwise

import numpy as np
from hypothesis import strategies as st
from toys import Rows, floored_jsd, losses, pairing, random_rows, random_vocabulary
from toys import vocabulary as toy_vocabulary

from configs.objectives import Objective
from tasks import objectives
from tasks.objectives.base import Projection
from tasks.tokens.vocabulary import Vocabulary

BETAS = st.sampled_from([0.0, 0.3, 0.5, 1.0])
MERGES = ["chain", "observed", "sum"]
KS = st.sampled_from([None, 1, 2, 3, 5])
Event = bytes | str | tuple[str, int]


def named(objective: Objective) -> str:
    """What sets an objective apart, for the name of a test."""
    return "-".join(str(v) for v in objective.model_dump(exclude_defaults=True).values())


def event_of(toy: Vocabulary, i: int, side: str) -> Event:
    """What an id means: its bytes, the stop, or (a control id) something that only this side knows."""
    if i in toy.stop_ids:
        return "stop"
    return toy.beta.values[i] or (side, i)


def by_event(toy: Vocabulary, masses: dict[int, float], side: str) -> dict[Event, float]:
    total: dict[Event, float] = {}
    for i, mass in masses.items():
        total[event_of(toy, i, side)] = total.get(event_of(toy, i, side), 0.0) + mass
    return total


def naive_units(rows: Rows, row: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The spans of a row's units on both sides, which end where both sides have spelled the same bytes, or stopped."""

    def ends(toy: Vocabulary, ids: list[int]) -> dict[int, int]:
        at, found = 0, {}
        for i, token in enumerate(ids):
            at += len(toy.beta.values[token] or b"")
            found[at if token not in toy.stop_ids else -1] = i + 1
        return found

    s_ends, t_ends = ends(rows.student, rows.student_ids[row]), ends(rows.teacher, rows.teacher_ids[row])
    common = sorted(set(s_ends) & set(t_ends), key=lambda end: end if end >= 0 else 10**9)
    bounds = [(0, 0), *((s_ends[end], t_ends[end]) for end in common)]
    return [((s0, s1), (t0, t1)) for (s0, t0), (s1, t1) in pairwise(bounds)]


def losses_of(rows: Rows, config: Objective, k: int | None = None) -> list[float]:
    """The loss of each term under an objective as a recipe names it, with the teacher's top `k`."""
    return losses(objectives.build(config, student=rows.student, teacher=rows.teacher), rows, k).tolist()


def naive_gkd(rows: Rows, beta: float, k: int | None = None) -> list[float]:
    """JSD_β(t_i, s_i) at every position, ids with the same bytes and stops summed; the rest of a top k in one bucket."""
    values = []
    for s_table, t_table in zip(rows.s, rows.t, strict=True):
        for s, t in zip(np.exp(s_table), np.exp(t_table), strict=True):
            s_mass = by_event(rows.student, dict(enumerate(s)), "same")
            kept = np.argsort(-t, kind="stable")[:k]
            t_mass = by_event(rows.student, {int(i): t[i] for i in kept}, "same")
            t_in, s_in = list(t_mass.values()), [s_mass[event] for event in t_mass]
            values.append(floored_jsd([*t_in, max(1 - sum(t_in), 0)], [*s_in, max(1 - sum(s_in), 1e-15)], beta))
    return values


def two_sides(seed: int) -> Rows:
    """Different vocabularies with duplicates, several stops and a control id on each side, units of every kind."""
    rng = np.random.default_rng(seed)
    student = random_vocabulary(rng, stops=2)
    return random_rows(rng, student, random_vocabulary(rng, stops=3, letters=b"abcd"), rows=4)


def projected(rows: Rows, objective: Objective, k: int | None = None) -> Projection:
    return objectives.build(objective, student=rows.student, teacher=rows.teacher).project(pairing(rows, k))


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


SMALL_S = toy_vocabulary([b"a", b"b", b"c", b"d", None], [4])
SMALL_T = toy_vocabulary([b"c", b"b", b"a", None, b"e"], [3])
S = np.array([[0.3, 0.2, 0.05, 0.4, 0.05]])  # of a, b, c, stop: (.5, 1/3, 1/12, 1/12)
T = np.array([[0.1, 0.2, 0.4, 0.1, 0.2]])  # (.5, .25, .125, .125)
SMALL = Rows(SMALL_S, SMALL_T, [[0]], [[2]], [False], [np.log(S)], [np.log(T)])
# A teacher token for both of the student's: P_S(ab) = .5 · .4 = .2, P_T(ab) = .6 or whatever is given.
PAIR_S, PAIR_T = toy_vocabulary([b"a", b"b", None], [2]), toy_vocabulary([b"ab", b"a", None], [2])


def pair(p: float, first: float = 0.5, second: float = 0.4) -> Rows:
    s = np.array([[first, 0.6 * (1 - first), 0.4 * (1 - first)], [0.5 * (1 - second), second, 0.5 * (1 - second)]])
    t = np.array([[p, 0.5 * (1 - p), 0.5 * (1 - p)]])
    with np.errstate(divide="ignore"):
        return Rows(PAIR_S, PAIR_T, [[0, 1]], [[0]], [False], [np.log(s)], [np.log(t)], [np.log(s[[0, 1], [0, 1]])])

"""`gold` (MATHS.md §5), against naive implementations with dictionaries of events; one tokenizer is in test_objective_gkd."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import BETAS, MERGES, by_event, event_of, losses_of, naive_units
from toys import SEEDS, Rows, floored_jsd, pairing, random_rows, random_vocabulary
from toys import vocabulary as toy_vocabulary

from configs.objectives import Gold
from tasks import objectives


def merged(table: np.ndarray, path: list[float], start: int, end: int, merge: str) -> np.ndarray:
    """The masses of one unit's ids: `table` has distributions, `path` the probabilities of the actual tokens."""
    if merge == "sum":
        product = table[start:end].prod(0)
        return product / product.sum()
    if merge == "chain":
        return np.prod(path[start : end - 1]) * table[end - 1]
    return table[start] * np.prod(path[start + 1 : end])


def naive_gold(rows: Rows, config: Gold, k: int | None = None) -> list[float]:
    """GOLD by MATHS.md §5, unit by unit: a divergence on matched events and the rest, sorted L1 on the unmatched."""
    values = []
    student, teacher = rows.student, rows.teacher
    common = {event_of(student, i, "S") for i in range(student.size)} & {event_of(teacher, i, "T") for i in range(teacher.size)}
    for row in range(len(rows.stops)):
        s, t = np.exp(rows.s[row]), np.exp(rows.t[row])
        s_ids, t_ids = rows.student_ids[row], rows.teacher_ids[row]
        s_path = [s[i, token] for i, token in enumerate(s_ids)]
        t_path = [t[j, token] for j, token in enumerate(t_ids)]
        for (s0, s1), (t0, t1) in naive_units(rows, row):
            s_mass = by_event(student, dict(enumerate(merged(s, s_path, s0, s1, config.merge))), "S")
            law = merged(t, t_path, t0, t1, config.merge)
            kept = np.argsort(-t[t0 if config.merge == "observed" else t1 - 1], kind="stable")[:k]
            t_mass = by_event(teacher, {int(i): law[i] for i in kept}, "T")
            support = [event for event in t_mass if event in common]
            t_in, s_in = [t_mass[event] for event in support], [s_mass[event] for event in support]
            loss = floored_jsd([*t_in, max(1 - sum(t_in), 0)], [*s_in, max(1 - sum(s_in), 1e-15)], config.beta)
            own = sorted((mass for event, mass in s_mass.items() if event not in common), reverse=True)
            other = sorted((mass for event, mass in t_mass.items() if event not in common), reverse=True)
            longest = max(len(own), len(other))
            own, other = own + [0.0] * (longest - len(own)), other + [0.0] * (longest - len(other))
            apart = sum(abs(a - b) for a, b in zip(own, other, strict=True))
            unmatched = (
                config.unmatched_weight if any(event_of(student, i, "S") not in common for i in range(student.size)) else 0
            )
            values.append(config.matched_weight * loss + unmatched * apart)
    return values


@pytest.mark.parametrize("merge", MERGES)
@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, beta=BETAS, unmatched=st.sampled_from([0.0, 1.0]))
def test_gold_over_the_whole_vocabulary(merge: str, seed: int, beta: float, unmatched: float) -> None:
    """Different vocabularies, several stops, byte-fallback ids, control ids, units of every kind."""
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, random_vocabulary(rng, stops=2), random_vocabulary(rng, stops=3, letters=b"abcd"))
    config = Gold(name="gold", beta=beta, merge=merge, unmatched_weight=unmatched, matched_weight=0.7)
    assert losses_of(rows, config) == pytest.approx(naive_gold(rows, config), abs=2e-5)


@pytest.mark.parametrize("merge", ["chain", "observed"])
@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, beta=BETAS, k=st.integers(1, 9))
def test_gold_with_a_truncated_signal(merge: str, seed: int, beta: float, k: int) -> None:
    """With the teacher's top k only, what is outside goes to the rest on both sides."""
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, random_vocabulary(rng, stops=2), random_vocabulary(rng, stops=2))
    config = Gold(name="gold", beta=beta, merge=merge)
    assert losses_of(rows, config, k) == pytest.approx(naive_gold(rows, config, k), abs=2e-5)


def test_duplicate_ids_of_the_teacher_are_one_class() -> None:
    """Two ids with the same bytes are one event also where the student has none for it (MATHS.md §1)."""
    student = toy_vocabulary([b"a", b"b", b"bb", None], [3])
    teacher = toy_vocabulary([b"a", b"c", b"c", None], [3], ["a", "c", "<0x63>", "stop"])
    s, t = np.array([[0.3, 0.1, 0.5, 0.1]]), np.array([[0.4, 0.25, 0.25, 0.1]])
    rows = Rows(student, teacher, [[0]], [[0]], [False], [np.log(s)], [np.log(t)])
    config = Gold(name="gold", beta=0.5)
    # Unmatched: {b: .1, bb: .5} against {c: .5}.
    assert naive_gold(rows, config)[0] == pytest.approx(floored_jsd([0.4, 0.1, 0.5], [0.3, 0.1, 0.6], 0.5) + 0.1)
    assert losses_of(rows, config) == pytest.approx(naive_gold(rows, config), abs=1e-6)


MATRIX = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]])
GOLDEN = {"chain": [0.12, 0.30, 0.18], "observed": [0.30, 0.15, 0.05]}


@pytest.mark.parametrize("merge", ["chain", "observed"])
def test_golden_merges(merge: str) -> None:
    """Two tokens merged on the teacher's side, and on the student's; ids [0, 1] were the actual ones."""
    short, long = toy_vocabulary([b"a", b"b", None], [2]), toy_vocabulary([b"a", b"b", None, b"ab"], [2])
    config = Gold(name="gold", beta=0.0, merge=merge, unmatched_weight=0)
    other = np.array([[0.2, 0.3, 0.4, 0.1]])
    rows = Rows(long, short, [[3]], [[0, 1]], [False], [np.log(other)], [np.log(MATRIX)])
    projection = objectives.build(config, student=long, teacher=short).project(pairing(rows))
    assert projection.ids.tolist() == [0, 1, 2]
    assert np.exp(projection.logprobs) == pytest.approx(GOLDEN[merge])
    assert np.exp(projection.rest) == pytest.approx([1 - sum(GOLDEN[merge])])
    rows = Rows(short, long, [[0, 1]], [[3]], [False], [np.log(MATRIX)], [np.log(other)])
    wanted = floored_jsd([0.2, 0.3, 0.4, 0.1], [*GOLDEN[merge], 1 - sum(GOLDEN[merge])], 0)
    assert losses_of(rows, config) == pytest.approx([wanted], abs=1e-6)


def test_the_sum_merge_is_a_product_of_experts() -> None:
    """softmax(Σ log p): (.12, .15, .03) / .30."""
    short, long = toy_vocabulary([b"a", b"b", None], [2]), toy_vocabulary([b"a", b"b", None, b"ab"], [2])
    rows = Rows(long, short, [[3]], [[0, 1]], [False], [np.log([[0.2, 0.3, 0.4, 0.1]])], [np.log(MATRIX)])
    projection = objectives.build(Gold(name="gold", merge="sum"), student=long, teacher=short).project(pairing(rows))
    assert np.exp(projection.logprobs) == pytest.approx([0.4, 0.5, 0.1])

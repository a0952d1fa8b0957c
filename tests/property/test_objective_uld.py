"""`uld` (MATHS.md §5; property 3): its definition, golden numbers, and what it does not see."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import losses_of
from toys import SEEDS, Rows, random_logprobs, random_rows, random_vocabulary
from toys import vocabulary as toy_vocabulary

from configs.objectives import Uld


def test_golden_uld() -> None:
    """S = (.7, .2, .1), T = (.1, .5, .2, .2): |.7-.5| + |.2-.2| + |.1-.2| + |0-.1| = .4."""
    student = toy_vocabulary([b"a", b"b", None], [2])
    teacher = toy_vocabulary([b"a", b"b", b"c", None], [3])
    s, t = np.log([[0.7, 0.2, 0.1]]), np.log([[0.1, 0.5, 0.2, 0.2]])
    assert losses_of(Rows(student, teacher, [[0]], [[0]], [False], [s], [t]), Uld(name="uld")) == pytest.approx([0.4])
    assert losses_of(Rows(teacher, student, [[0]], [[0]], [False], [t], [s]), Uld(name="uld")) == pytest.approx([0.4])


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.sampled_from([0.0, 0.5]))
def test_uld_is_its_definition(seed: int, weight: float) -> None:
    """Positions paired up to min(n, m); sorted, zero-padded L1; cross-entropy on the student's own tokens; at most 2."""
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, random_vocabulary(rng), random_vocabulary(rng, letters=b"abcd"))
    wanted = []
    for s, t, ids in zip(rows.s, rows.t, rows.student_ids, strict=True):
        for i in range(min(len(s), len(t))):
            own, other = sorted(np.exp(s[i]), reverse=True), sorted(np.exp(t[i]), reverse=True)
            longest = max(len(own), len(other))
            own, other = np.pad(own, (0, longest - len(own))), np.pad(other, (0, longest - len(other)))
            wanted.append(abs(own - other).sum() - weight * s[i, ids[i]])
            assert abs(own - other).sum() <= 2
    assert losses_of(rows, Uld(name="uld", cross_entropy=weight)) == pytest.approx(wanted, abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(1, 8))
def test_uld_is_blind_to_ids(seed: int, k: int) -> None:
    """Unchanged under separate permutations of both sides, so zero for different distributions; at most 2 (property 3)."""
    rng = np.random.default_rng(seed)
    toy = random_vocabulary(rng)
    rows = random_rows(rng, toy, random_vocabulary(rng))
    shuffled = Rows(
        rows.student,
        rows.teacher,
        rows.student_ids,
        rows.teacher_ids,
        rows.stops,
        [rng.permuted(s, axis=1) for s in rows.s],
        [rng.permuted(t, axis=1) for t in rows.t],
    )
    values = losses_of(rows, Uld(name="uld"), k)
    assert losses_of(shuffled, Uld(name="uld"), k) == pytest.approx(values, abs=1e-5)
    assert max(values) <= 2 + 1e-6
    opposite = Rows(toy, toy, [[0]], [[0]], [False], [random_logprobs(rng, 1, toy.size)], [])
    opposite.t.append(opposite.s[0][:, ::-1])
    assert losses_of(opposite, Uld(name="uld")) == pytest.approx([0], abs=1e-6)
    assert abs(np.exp(opposite.s[0]) - np.exp(opposite.t[0])).sum() > 0.01

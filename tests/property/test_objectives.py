"""Objectives (MATHS.md §5; properties 1, 3, 11, 14 and 18), against naive implementations with dictionaries of events."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import (
    SEEDS,
    Rows,
    floored_jsd,
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

BETAS = st.sampled_from([0.0, 0.3, 0.5, 1.0])
MERGES = ["chain", "observed", "sum"]
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


def named(objective: Objective) -> str:
    return "-".join(str(v) for v in objective.model_dump(exclude_defaults=True).values())


Event = bytes | str | tuple[str, int]


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


def naive_units(rows: Rows, row: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
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


def gold_losses(rows: Rows, config: Objective, k: int | None = None) -> list[float]:
    return losses(objectives.build(config, rows.student, rows.teacher), rows, k).tolist()


@pytest.mark.parametrize("merge", MERGES)
@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, beta=BETAS, unmatched=st.sampled_from([0.0, 1.0]))
def test_gold_over_the_whole_vocabulary(merge: str, seed: int, beta: float, unmatched: float) -> None:
    """Different vocabularies, several stops, byte-fallback ids, control ids, units of every kind."""
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, random_vocabulary(rng, stops=2), random_vocabulary(rng, stops=3, letters=b"abcd"))
    config = Gold(name="gold", beta=beta, merge=merge, unmatched_weight=unmatched, matched_weight=0.7)
    assert gold_losses(rows, config) == pytest.approx(naive_gold(rows, config), abs=2e-5)


@pytest.mark.parametrize("merge", ["chain", "observed"])
@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, beta=BETAS, k=st.integers(1, 9))
def test_gold_with_a_truncated_signal(merge: str, seed: int, beta: float, k: int) -> None:
    """With the teacher's top k only, what is outside goes to the rest on both sides."""
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, random_vocabulary(rng, stops=2), random_vocabulary(rng, stops=2))
    config = Gold(name="gold", beta=beta, merge=merge)
    assert gold_losses(rows, config, k) == pytest.approx(naive_gold(rows, config, k), abs=2e-5)


def test_duplicate_ids_of_the_teacher_are_one_class() -> None:
    """Two ids with the same bytes are one event also where the student has none for it (MATHS.md §1)."""
    student = toy_vocabulary([b"a", b"b", b"bb", None], [3])
    teacher = toy_vocabulary([b"a", b"c", b"c", None], [3], ["a", "c", "<0x63>", "stop"])
    s, t = np.array([[0.3, 0.1, 0.5, 0.1]]), np.array([[0.4, 0.25, 0.25, 0.1]])
    rows = Rows(student, teacher, [[0]], [[0]], [False], [np.log(s)], [np.log(t)])
    config = Gold(name="gold", beta=0.5)
    # Unmatched: {b: .1, bb: .5} against {c: .5}.
    assert naive_gold(rows, config)[0] == pytest.approx(floored_jsd([0.4, 0.1, 0.5], [0.3, 0.1, 0.6], 0.5) + 0.1)
    assert gold_losses(rows, config) == pytest.approx(naive_gold(rows, config), abs=1e-6)


MATRIX = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]])
GOLDEN = {"chain": [0.12, 0.30, 0.18], "observed": [0.30, 0.15, 0.05]}


@pytest.mark.parametrize("merge", ["chain", "observed"])
def test_golden_merges(merge: str) -> None:
    """Two tokens merged on the teacher's side, and on the student's; ids [0, 1] were the actual ones."""
    short, long = toy_vocabulary([b"a", b"b", None], [2]), toy_vocabulary([b"a", b"b", None, b"ab"], [2])
    config = Gold(name="gold", beta=0.0, merge=merge, unmatched_weight=0)
    other = np.array([[0.2, 0.3, 0.4, 0.1]])
    rows = Rows(long, short, [[3]], [[0, 1]], [False], [np.log(other)], [np.log(MATRIX)])
    projection = objectives.build(config, long, short).project(pairing(rows))
    assert projection.ids.tolist() == [0, 1, 2]
    assert np.exp(projection.logprobs) == pytest.approx(GOLDEN[merge])
    assert np.exp(projection.rest) == pytest.approx([1 - sum(GOLDEN[merge])])
    rows = Rows(short, long, [[0, 1]], [[3]], [False], [np.log(MATRIX)], [np.log(other)])
    wanted = floored_jsd([0.2, 0.3, 0.4, 0.1], [*GOLDEN[merge], 1 - sum(GOLDEN[merge])], 0)
    assert gold_losses(rows, config) == pytest.approx([wanted], abs=1e-6)


def test_the_sum_merge_is_a_product_of_experts() -> None:
    """softmax(Σ log p): (.12, .15, .03) / .30."""
    short, long = toy_vocabulary([b"a", b"b", None], [2]), toy_vocabulary([b"a", b"b", None, b"ab"], [2])
    rows = Rows(long, short, [[3]], [[0, 1]], [False], [np.log([[0.2, 0.3, 0.4, 0.1]])], [np.log(MATRIX)])
    projection = objectives.build(Gold(name="gold", merge="sum"), long, short).project(pairing(rows))
    assert np.exp(projection.logprobs) == pytest.approx([0.4, 0.5, 0.1])


# -- one tokenizer ---------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("k", [None, 4])
@pytest.mark.parametrize("controls", [0, 2])
@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, beta=BETAS)
def test_one_tokenizer(controls: int, k: int | None, seed: int, beta: float) -> None:
    """gkd, and gold with every merge, are JSD_β(t_i, s_i) at every position, stop and control ids included (property 1)."""
    rng = np.random.default_rng(seed)
    toy = random_vocabulary(rng, stops=2, controls=controls)
    rows = random_rows(rng, toy, toy, same_ids=True)
    wanted = naive_gkd(rows, beta, k)
    assert gold_losses(rows, Gkd(name="gkd", beta=beta), k) == pytest.approx(wanted, abs=2e-5)
    for merge in MERGES:
        assert gold_losses(rows, Gold(name="gold", beta=beta, merge=merge), k) == pytest.approx(wanted, abs=2e-5)


@pytest.mark.parametrize("merge", MERGES)
def test_a_student_that_is_its_teacher_has_no_loss(merge: str) -> None:
    rng = np.random.default_rng(5)
    toy = random_vocabulary(rng, stops=2, controls=2)
    rows = random_rows(rng, toy, toy, same_ids=True)
    rows = with_student(rows, rows.t)
    for beta in (0.0, 0.5, 1.0):
        assert gold_losses(rows, Gold(name="gold", beta=beta, merge=merge)) == pytest.approx(
            [0] * sum(map(len, rows.s)), abs=1e-5
        )
        assert gold_losses(rows, Bytes(name="bytes", beta=beta)) == pytest.approx([0] * sum(map(len, rows.s)), abs=1e-5)
    assert gold_losses(rows, Uld(name="uld")) == pytest.approx([0] * sum(map(len, rows.s)), abs=1e-5)


# -- uld and sft -----------------------------------------------------------------------------------------------------------


def test_golden_uld() -> None:
    """S = (.7, .2, .1), T = (.1, .5, .2, .2): |.7-.5| + |.2-.2| + |.1-.2| + |0-.1| = .4."""
    student = toy_vocabulary([b"a", b"b", None], [2])
    teacher = toy_vocabulary([b"a", b"b", b"c", None], [3])
    s, t = np.log([[0.7, 0.2, 0.1]]), np.log([[0.1, 0.5, 0.2, 0.2]])
    assert gold_losses(Rows(student, teacher, [[0]], [[0]], [False], [s], [t]), Uld(name="uld")) == pytest.approx([0.4])
    assert gold_losses(Rows(teacher, student, [[0]], [[0]], [False], [t], [s]), Uld(name="uld")) == pytest.approx([0.4])


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
    assert gold_losses(rows, Uld(name="uld", cross_entropy=weight)) == pytest.approx(wanted, abs=1e-5)


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
    values = gold_losses(rows, Uld(name="uld"), k)
    assert gold_losses(shuffled, Uld(name="uld"), k) == pytest.approx(values, abs=1e-5)
    assert max(values) <= 2 + 1e-6
    opposite = Rows(toy, toy, [[0]], [[0]], [False], [random_logprobs(rng, 1, toy.size)], [])
    opposite.t.append(opposite.s[0][:, ::-1])
    assert gold_losses(opposite, Uld(name="uld")) == pytest.approx([0], abs=1e-6)
    assert abs(np.exp(opposite.s[0]) - np.exp(opposite.t[0])).sum() > 0.01


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_sft_is_cross_entropy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    toy = random_vocabulary(rng, stops=2)
    rows = random_rows(rng, toy, toy, same_ids=True)
    logits = torch.from_numpy(np.concatenate(rows.s) + 3.0)
    labels = torch.tensor([i for ids in rows.student_ids for i in ids])
    wanted = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert torch.allclose(losses(objectives.build(Sft(name="sft"), toy, toy), rows), wanted)


# -- what holds for every objective ----------------------------------------------------------------------------------------


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
        assert gold_losses(moved, objective, k) == pytest.approx(gold_losses(rows, objective, k), abs=2e-5)


@pytest.mark.parametrize("objective", [o for o in ALL if o.name != "opd"], ids=named)  # its value is not what it descends
@settings(max_examples=8, deadline=None)
@given(seed=SEEDS, k=st.sampled_from([None, 4]))
def test_gradients_are_finite_differences(objective: Objective, seed: int, k: int | None) -> None:
    """Of the summed loss, with respect to the student's logits, in random directions (property 14)."""
    rng = np.random.default_rng(seed)
    student = random_vocabulary(rng, stops=2)
    same = objective.name in ("gkd", "sft")
    rows = random_rows(rng, student, student if same else random_vocabulary(rng), rows=2, same_ids=same)
    module = objectives.build(objective, rows.student, rows.teacher)
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
    module = objectives.build(objective, rows.student, rows.teacher)
    found = []
    for enabled in (False, True):
        logits = torch.from_numpy(np.concatenate(rows.s)).float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            values = losses(module, rows, s=logits)
        found.append((values.detach(), torch.autograd.grad(values.sum(), logits)[0]))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_forward_kl_has_gradient_s_minus_t(seed: int) -> None:
    """At every position, for one tokenizer and the whole vocabulary (property 14)."""
    rng = np.random.default_rng(seed)
    toy = toy_vocabulary([b"a", b"b", b"c", b"ab", b"bca", None], [5])
    rows = random_rows(rng, toy, toy, same_ids=True)
    logits = torch.from_numpy(np.concatenate(rows.s)).requires_grad_()
    module = objectives.build(Gkd(name="gkd", beta=0.0), toy, toy)
    (gradient,) = torch.autograd.grad(losses(module, rows, s=logits.log_softmax(-1)).sum(), logits)
    wanted = np.exp(np.concatenate(rows.s)) - np.exp(np.concatenate(rows.t))
    assert gradient.numpy() == pytest.approx(wanted, abs=1e-6)


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
        values = [gold_losses(rows, objective)]
        for share in (0.05, 0.2, 0.5):
            moved = (1 - share) * s
            moved[:, foreign] += share
            values.append(gold_losses(with_student(rows, [np.log(moved)]), objective))
        for low, high in pairwise(values):
            assert all(after > before + 1e-4 for before, after in zip(low, high, strict=True))


@settings(max_examples=25, deadline=None)
@given(SEEDS, BETAS)
def test_a_larger_top_k_never_lowers_the_loss(seed: int, beta: float) -> None:
    """The truncated divergence grows with k to the full one, at every position (property 11)."""
    rng = np.random.default_rng(seed)
    toy = toy_vocabulary([b"a", b"b", b"c", b"ab", b"bca", None], [5])
    rows = random_rows(rng, toy, toy, same_ids=True)
    values = [gold_losses(rows, Gkd(name="gkd", beta=beta), k) for k in range(1, toy.size + 1)]
    assert all(a <= b + 1e-5 for low, high in pairwise(values) for a, b in zip(low, high, strict=True))
    assert values[-1] == pytest.approx(naive_gkd(rows, beta), abs=2e-5)
    assert min(values[0]) >= -1e-6

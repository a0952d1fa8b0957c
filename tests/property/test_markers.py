"""Control tokens inside an answer (MATHS.md §3): their units, what each objective does with them, and the accounts of bytes.

The oracle knows an answer as the parts that it was made of. It compares places (part, offset) as sets.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import SEEDS, ToySide, floored_jsd, random_logprobs, random_split, rollouts_table, scores_of, topk_scores
from toys import vocabulary as toy_vocabulary

from configs.objectives import Alm, Bpm, Bytes, Gold, Objective, Opd, Strict, Uld
from tasks import objectives
from tasks.align import align_rollouts
from tasks.models.pair import hide_ids, student_ids, teacher_ids
from tasks.tokens.align import Kind
from tasks.tokens.markers import NO_MARKERS, Markers, Path, spell
from tasks.training.batches import collate

S_VALUES = [b"a", b"b", b"c", b"ab", b"bc", b"caa", b"x", b"y", b"xy", b"ax", b"yb", None, None, None, None]
STUDENT = toy_vocabulary(S_VALUES, [14])
C0, C1, ALONE = 11, 12, 13  # controls; no marker pairs the last
T_VALUES = [b"a", b"b", b"c", b"abc", b"cb", b"ba", b"z", None, None, None, None]
TEACHER = toy_vocabulary(T_VALUES, [10])
K0, K1, K2 = 7, 8, 9
# What the student writes and what the teacher writes: token for token; tokens and text for several; text for a token.
PAIRS = [([C0], [K0]), ([C1, 0, 1], [K1, 2, K2]), ([6, 7], [K2, 6])]
MARKERS = tuple((Path(spell(STUDENT.beta, s), tuple(s)), Path(spell(TEACHER.beta, t), tuple(t))) for s, t in PAIRS)
KINDS: list[Objective] = [Gold(name="gold"), Bytes(name="bytes"), Alm(name="alm"), Opd(name="opd"), Bpm(name="bpm")]
KINDS += [Strict(name="strict"), Uld(name="uld"), Gold(name="gold", merge="observed"), Gold(name="gold", merge="sum")]


@dataclass
class Made:
    """An answer: its parts (text, or the number of a pair, or None for the unpaired control token), and both sides' ids."""

    parts: list[Any]
    student: list[int]
    teacher: list[int]
    units: list[tuple[tuple[int, int], tuple[int, int], int]]  # spans on both sides, and the kind
    size: int


def make_answer(rng: np.random.Generator, skip: bool, unpaired: float = 0.15) -> Made:
    parts: list[Any] = []
    for _ in range(int(rng.integers(1, 6))):
        text = "".join(rng.choice(list("abc"), int(rng.integers(1, 5))))
        choices: list[Any] = [text, 0, 1, 2, None]
        chance = (1 - unpaired) / 4
        part = choices[int(rng.choice(5, p=[chance] * 4 + [unpaired]))]
        if not (isinstance(part, str) and parts and isinstance(parts[-1], str)):
            parts.append(part)
    stopped = rng.random() < 0.7
    student: list[int] = []
    s_places: list[Any] = []  # where each token ends
    letters: list[tuple[Any, bytes]] = []  # what is still to be split: (place behind it, byte)

    def flush() -> None:
        at = 0
        for token in random_split(rng, STUDENT, b"".join(byte for _, byte in letters)):
            at += int(STUDENT.lengths[token])
            student.append(token)
            s_places.append(letters[at - 1][0])
        letters.clear()

    teacher: list[int] = []
    t_places: list[Any] = []
    ended = False
    for n, part in enumerate(parts):
        if isinstance(part, str):
            letters.extend(((n, i + 1) if i + 1 < len(part) else (n + 1, 0), bytes([b])) for i, b in enumerate(part.encode()))
            at = 0
            for token in random_split(rng, TEACHER, part.encode()) if not ended else []:
                at += int(TEACHER.lengths[token])
                teacher.append(token)
                t_places.append((n, at) if at < len(part) else (n + 1, 0))
            continue
        path = [ALONE] if part is None else PAIRS[part][0]
        for i, token in enumerate(path):
            place = (n + 1, 0) if i + 1 == len(path) else ("student", n, i)
            if STUDENT.lengths[token]:
                letters.append((place, STUDENT.beta.values[token] or b""))
            else:
                flush()
                student.append(token)
                s_places.append(place)
        if part is None:
            ended |= not skip
        elif not ended:
            for i, token in enumerate(PAIRS[part][1]):
                teacher.append(token)
                t_places.append((n + 1, 0) if i + 1 == len(PAIRS[part][1]) else ("teacher", n, i))
    flush()
    first = next((i for i, token in enumerate(student) if token == ALONE), len(student)) if not skip else len(student)
    if stopped:
        student.append(14)
        teacher.append(10)
    skipped = {i for i, token in enumerate(student) if token == ALONE} if skip else set()

    # A place behind a skipped token is the one before it, on the side that does not read it.
    def read(place: Any) -> Any:
        while place[1] == 0 and skip and place[0] > 0 and parts[place[0] - 1] is None:
            place = (place[0] - 1, 0)
        return place

    s_ends = {read(p): i + 1 for i, p in enumerate(s_places) if i < first and i not in skipped and p[0] != "student"}
    t_ends = {read(p): i + 1 for i, p in enumerate(t_places) if p[0] != "teacher"}
    common = sorted((s_ends[p], t_ends[p]) for p in s_ends.keys() & t_ends.keys())
    units, s_at, t_at = [], 0, 0
    for s_end, t_end in common:
        while s_at in skipped:
            units.append(((s_at, s_at + 1), (t_at, t_at), int(Kind.SKIPPED)))
            s_at += 1
        units.append(((s_at, s_end), (t_at, t_end), kind_of(parts, s_places, s_at, s_end, t_end - t_at)))
        s_at, t_at = s_end, t_end
    if stopped and first >= len(s_places):
        while s_at in skipped:
            units.append(((s_at, s_at + 1), (t_at, t_at), int(Kind.SKIPPED)))
            s_at += 1
        units.append(((s_at, s_at + 1), (t_at, t_at + 1), int(Kind.STOP)))
    return Made(parts, student, teacher, units, int(STUDENT.lengths[student].sum()))


def kind_of(parts: list[Any], places: list[Any], start: int, end: int, theirs: int) -> int:
    """A unit is a marker's where a part between its places is one."""

    def part_before(place: Any) -> int:
        return place[1] if place[0] == "student" else place[0] if place[1] else place[0] - 1

    first = 0 if start == 0 else (places[start - 1][0] if places[start - 1][0] != "student" else places[start - 1][1])
    span = parts[first : part_before(places[end - 1]) + 1]
    if any(isinstance(part, int) for part in span):
        return int(Kind.MARKER)
    return int(Kind.ONE_TO_ONE + (end - start > 1) + 2 * (theirs > 1))


@dataclass
class Shard:
    made: list[Made]
    s: list[np.ndarray]  # log-probs [tokens, V] a row
    t: list[np.ndarray]
    behaviour: list[np.ndarray]
    rollouts: pa.Table
    scores: pa.Table


def make_shard(seed: int, skip: bool, rows: int = 4) -> Shard:
    rng = np.random.default_rng(seed)
    made = [make_answer(rng, skip) for _ in range(rows)]
    s = [random_logprobs(rng, len(m.student), STUDENT.size) for m in made]
    t = [random_logprobs(rng, len(m.teacher), TEACHER.size) for m in made]
    behaviour = [p[np.arange(len(m.student)), m.student] for p, m in zip(s, made, strict=True)]
    results = [
        topk_scores(
            p[np.arange(len(m.teacher)), m.teacher].astype(np.float32),
            np.argsort(-p, 1).ravel().astype(np.int32),
            np.sort(p, 1)[:, ::-1].ravel().astype(np.float16),
            np.full(len(m.teacher), TEACHER.size, np.int16),
            np.full(len(m.teacher), -np.inf, np.float32),
        )
        for p, m in zip(t, made, strict=True)
        if m.teacher
    ]
    texts = [STUDENT.beta.join(m.student).decode() for m in made]
    own = ToySide(STUDENT)
    rollouts = rollouts_table([[0]] * rows, [m.student for m in made], own, texts, behaviour)  # type: ignore[arg-type]
    scores = scores_of(results, [m.teacher or None for m in made]).to_pylist()
    for row in scores:
        row["status"] = "ok" if row["token_ids"] else "empty"
    return Shard(made, s, t, behaviour, rollouts, pa.Table.from_pylist(scores, scores_of([], []).schema))


def aligned(shard: Shard, config: Objective, skip: bool) -> pa.Table:
    module = objectives.build(config, student=STUDENT, teacher=TEACHER)
    own, other = ToySide(STUDENT), ToySide(TEACHER)
    markers = Markers(MARKERS, skip)
    return align_rollouts(shard.rollouts, shard.scores, module, markers=markers, student=own, teacher=other)  # type: ignore[arg-type]


def path(table: np.ndarray, ids: list[int], span: tuple[int, int]) -> float:
    return float(sum(table[i, ids[i]] for i in range(*span)))


@pytest.mark.parametrize("skip", [False, True], ids=["end", "skip"])
@settings(max_examples=120, deadline=None)
@given(seed=SEEDS)
def test_units_of_answers_with_markers(skip: bool, seed: int) -> None:
    """A marker is one unit (with the text that a token joins to it), whose log P is that of its path on each side; behind it
    supervision goes on. An unpaired token ends it, or is passed over by itself and belongs to no term."""
    shard = make_shard(seed, skip)
    table = aligned(shard, Alm(name="alm"), skip).to_pylist()
    for row, made, s, t in zip(table, shard.made, shard.s, shard.t, strict=True):
        ends = list(zip(row["student_ends"], row["teacher_ends"], row["kind"], strict=True))
        assert ends == [(s1, t1, kind) for (_, s1), (_, t1), kind in made.units]
        terms = [unit for unit in made.units if unit[2] != Kind.SKIPPED]
        if row["status"] == "ok":
            assert list(zip(row["term_starts"], row["term_ends"], strict=True)) == [own for own, _, _ in terms]
            graded = [path(t, made.teacher, other) for _, other, _ in terms]
            assert row["target_logprobs"] == pytest.approx(graded, abs=1e-4)
            sampled = [0 if kind == Kind.SKIPPED else path(s, made.student, own) for own, _, kind in made.units]
            assert row["student_logprobs"] == pytest.approx(sampled, abs=1e-4)
        count = made.student.count(ALONE)
        assert row["unpaired"] == (count if skip else min(count, 1))


@pytest.mark.parametrize("skip", [False, True], ids=["end", "skip"])
@pytest.mark.parametrize("objective", KINDS, ids=lambda o: f"{o.name}-{getattr(o, 'merge', '')}")
@settings(max_examples=30, deadline=None)
@given(seed=SEEDS)
def test_bytes_add_up_around_markers(objective: Objective, skip: bool, seed: int) -> None:
    """Property 19; and no term reads a skipped token's distribution as its own event."""
    shard = make_shard(seed, skip)
    for row, made in zip(aligned(shard, objective, skip).to_pylist(), shard.made, strict=True):
        parts = [row[f"{kind}_bytes"] for kind in ("supervised", "unmatched", "dropped", "tail")]
        assert sum(parts) == made.size
        assert min(parts) >= 0, parts
        if objective.name in ("alm", "gold", "uld", "strict"):
            held = [i for start, end in zip(row["term_starts"] or [], row["term_ends"] or []) for i in range(start, end)]
            assert not skip or all(made.student[i] != ALONE for i in held)


def losses_of(shard: Shard, table: pa.Table, config: Objective) -> tuple[list[dict[str, Any]], torch.Tensor, torch.Tensor]:
    """Each term's row, span and inside; its loss; and the gradient of their sum to the log-probs `[all tokens, V]`."""
    module = objectives.build(config, student=STUDENT, teacher=TEACHER)
    for name in ("token_ids", "prompt_token_ids"):
        table = table.append_column(name, shard.rollouts[name])
    rows = [n for n, status in enumerate(table["status"].to_pylist()) if status == "ok"]
    chunk, *more = collate(table.take(rows), 0, torch.device("cpu")).chunks(10**9)
    span, terms = chunk.at, chunk.terms
    assert not more
    logits = torch.tensor(np.concatenate([shard.s[n] for n in rows]), dtype=torch.float32, requires_grad=True)
    losses = module(logits[span], terms)
    losses.sum().backward()
    found = [
        {"row": n, "span": (start, end), "inside": inside}
        for n in rows
        for row in [table.slice(n, 1).to_pylist()[0]]
        for start, end, inside in zip(
            row["term_starts"], row["term_ends"], row["term_inside"] or [0] * len(row["term_starts"]), strict=True
        )
    ]
    assert logits.grad is not None
    return found, losses.detach(), logits.grad


@pytest.mark.parametrize("config", KINDS[:4] + KINDS[7:8], ids=lambda o: f"{o.name}-{getattr(o, 'merge', '')}")
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_a_marker_is_one_event(config: Objective, beta: float, seed: int) -> None:
    """`gold`, `bytes` and `alm` compare (P_T, 1 - P_T) of its path with (P_S, 1 - P_S), `opd` takes their log-ratio."""
    if "beta" in type(config).model_fields:
        config = config.model_copy(update={"beta": beta})
    shard = make_shard(seed, skip=True, rows=3)
    table = aligned(shard, config, skip=True)
    if not any(row["status"] == "ok" and row["units"] for row in table.to_pylist()):
        return
    terms, losses, _ = losses_of(shard, table, config)
    spans = {(term["row"], term["span"]): float(loss) for term, loss in zip(terms, losses, strict=True)}
    for n, (made, row) in enumerate(zip(shard.made, table.to_pylist(), strict=True)):
        for own, other, kind in made.units:
            if kind != Kind.MARKER or row["status"] != "ok":
                continue
            log_s, log_t = path(shard.s[n], made.student, own), path(shard.t[n], made.teacher, other)
            if config.name == "opd":
                wanted = log_s - log_t
            else:
                p_s, p_t = math.exp(log_s), math.exp(log_t)
                wanted = floored_jsd([p_t, 1 - p_t], [p_s, 1 - p_s], beta)
                if config.name == "alm" and max(p_t, p_s) < 1e-7:
                    continue
            assert spans[n, own] == pytest.approx(wanted, rel=2e-3, abs=2e-5), (own, made)


def test_the_gradient_of_a_marker() -> None:
    """That of the coin of its path, by autograd of the plain formula; every token of the path takes part."""
    made = Made([1], [C1, 0, 1], [K1, 2, K2], [], 2)
    rng = np.random.default_rng(0)
    s, t = random_logprobs(rng, 3, STUDENT.size, 0.3), random_logprobs(rng, 3, TEACHER.size, 0.3)
    p_t = math.exp(path(t, made.teacher, (0, 3)))
    for config in (Bytes(name="bytes"), Gold(name="gold"), Gold(name="gold", merge="observed"), Alm(name="alm", beta=1.0)):
        result = topk_scores(
            t[np.arange(3), made.teacher].astype(np.float32),
            np.argsort(-t, 1).ravel().astype(np.int32),
            np.sort(t, 1)[:, ::-1].ravel().astype(np.float16),
            np.full(3, TEACHER.size, np.int16),
            np.full(3, -np.inf, np.float32),
        )
        rollouts = rollouts_table([[0]], [made.student], ToySide(STUDENT), ["ab"], [s[np.arange(3), made.student]])  # type: ignore[arg-type]
        shard = Shard([made], [s], [t], [], rollouts, scores_of([result], [made.teacher]))
        _, (loss,), gradient = losses_of(shard, aligned(shard, config, skip=False), config)
        logits = torch.tensor(s, requires_grad=True)
        p = logits.log_softmax(-1)[range(3), made.student].sum().exp()
        coin = p * (p.log() - math.log(p_t)) + (1 - p) * ((1 - p).log() - math.log1p(-p_t))
        coin.backward()
        assert loss.item() == pytest.approx(coin.item(), rel=1e-3)
        assert logits.grad is not None
        assert torch.allclose(gradient.double(), logits.grad, atol=1e-5)
        assert (gradient.abs().max(1).values > 1e-4).all()


@pytest.mark.parametrize(("config", "supervised"), [(Strict(name="strict"), 0), (Gold(name="gold", merge="sum"), 0)])
def test_objectives_that_have_no_event_for_a_marker(config: Objective, supervised: int) -> None:
    made = Made([1], [C1, 0, 1], [K1, 2, K2], [], 2)
    shard = make_shard(0, skip=False, rows=1)
    t = random_logprobs(np.random.default_rng(1), 3, TEACHER.size)
    shard.rollouts = rollouts_table([[0]], [made.student], ToySide(STUDENT), ["ab"])  # type: ignore[arg-type]
    result = topk_scores(
        t[np.arange(3), made.teacher].astype(np.float32),
        np.argmax(t, 1).astype(np.int32),
        t.max(1).astype(np.float16),
        np.ones(3, np.int16),
        np.log1p(-np.exp(t.max(1))).astype(np.float32),
    )
    shard.scores = scores_of([result], [made.teacher])
    row = aligned(shard, config, skip=False).to_pylist()[0]
    assert row["kind"] == [Kind.MARKER]
    assert (row["supervised_bytes"], row["unmatched_bytes"]) == (supervised, 2)


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_bpm_gives_the_markers_probability_to_its_first_token(seed: int) -> None:
    """Where the student's first token is a control token, nothing else goes there: its mass is P_T of the path."""
    shard = make_shard(seed, skip=True)
    for n, (row, made) in enumerate(zip(aligned(shard, Bpm(name="bpm"), True).to_pylist(), shard.made, strict=True)):
        if row["status"] != "ok":
            continue
        bounds = [0, *np.cumsum(row["target_counts"]).tolist()]
        cells = [dict(zip(row["target_ids"][a:b], row["target_logprobs"][a:b], strict=True)) for a, b in pairwise(bounds)]
        terms = [unit for unit in made.units if unit[2] != Kind.SKIPPED]
        for cell, (own, other, kind) in zip(cells, terms, strict=True):
            if kind == Kind.MARKER and made.student[own[0]] in (C0, C1):
                assert cell[made.student[own[0]]] == pytest.approx(path(shard.t[n], made.teacher, other), abs=1e-3)


# -- one tokenizer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", KINDS, ids=lambda o: f"{o.name}-{getattr(o, 'merge', '')}")
@settings(max_examples=30, deadline=None)
@given(seed=SEEDS)
def test_with_one_tokenizer_control_tokens_are_tokens(objective: Objective, seed: int) -> None:
    """Each token of an answer is a unit with a term of its own, whichever it is; nothing is left behind a control token."""
    rng = np.random.default_rng(seed)
    own = ToySide(STUDENT)
    ids = [int(i) for i in rng.integers(0, 14, int(rng.integers(1, 8)))] + [14] * int(rng.random() < 0.5)
    t = random_logprobs(rng, len(ids), STUDENT.size)
    result = topk_scores(
        t[np.arange(len(ids)), ids].astype(np.float32),
        np.argsort(-t, 1).ravel().astype(np.int32),
        np.sort(t, 1)[:, ::-1].ravel().astype(np.float16),
        np.full(len(ids), STUDENT.size, np.int16),
        np.full(len(ids), -np.inf, np.float32),
    )
    text = STUDENT.beta.join(ids).decode()
    rollouts = rollouts_table([[0]], [ids], own, [text], [t[np.arange(len(ids)), ids]])  # type: ignore[arg-type]
    module = objectives.build(objective, student=STUDENT, teacher=STUDENT)
    row = align_rollouts(rollouts, scores_of([result], [ids]), module, student=own, teacher=own).to_pylist()[0]  # type: ignore[arg-type]
    assert row["status"] == "ok"
    assert row["student_ends"] == row["teacher_ends"] == list(range(1, len(ids) + 1))
    assert row["kind"] == [Kind.STOP if i == 14 else Kind.ONE_TO_ONE for i in ids]
    assert row["units"] == len(ids)
    assert row["tail_bytes"] == row["dropped_bytes"] == row["unpaired"] == 0
    shard = Shard([], [t], [t], [], rollouts, scores_of([result], [ids]))
    losses = one_tokenizer_losses(shard, objective)
    assert losses.abs().max() < 5e-3  # the model is its own teacher: half precision is all that is left


def one_tokenizer_losses(shard: Shard, config: Objective) -> torch.Tensor:
    module = objectives.build(config, student=STUDENT, teacher=STUDENT)
    own = ToySide(STUDENT)
    table = align_rollouts(shard.rollouts, shard.scores, module, student=own, teacher=own)  # type: ignore[arg-type]
    for name in ("token_ids", "prompt_token_ids"):
        table = table.append_column(name, shard.rollouts[name])
    (chunk,) = collate(table, 0, torch.device("cpu")).chunks(10**9)
    span, terms = chunk.at, chunk.terms
    losses: torch.Tensor = module(torch.tensor(np.concatenate(shard.s), dtype=torch.float32)[span], terms)
    return losses


# -- what the other side reads ---------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.booleans())
def test_the_teacher_reads_markers_of_its_own(seed: int, skip: bool) -> None:
    """Its sequence is that of the parts, one after another, up to where an unpaired token ends it."""
    rng = np.random.default_rng(seed)
    made = [make_answer(rng, skip) for _ in range(3)]
    own, other, markers = ToySide(STUDENT), ToySide(TEACHER), Markers(MARKERS, skip)
    rows = [
        {
            "token_ids": m.student,
            "text": STUDENT.beta.join(m.student).decode(),
            "finish_reason": "stop" if m.student[-1:] == [14] else "length",
        }
        for m in made
    ]
    got = teacher_ids(rows, student=own, teacher=other, markers=markers)  # type: ignore[arg-type]
    for m, ids in zip(made, got, strict=True):
        wanted: list[int] = []
        for part in m.parts:
            if part is None and not skip:
                break
            if part is not None:
                wanted += other.encoder.encode([part])[0] if isinstance(part, str) else PAIRS[part][1]
        assert ids == wanted + [10] * (m.student[-1:] == [14])
    # What a key is made of: ids where an answer is more than its text.
    table = pa.Table.from_pylist(rows)
    hidden = hide_ids(table, own, markers)  # type: ignore[arg-type]
    more = [any(not isinstance(part, str) for part in m.parts) for m in made]
    assert ("token_ids" in hidden.column_names) == any(more)
    if any(more):
        assert [row is not None for row in hidden["token_ids"].to_pylist()] == more
    assert teacher_ids(hidden.to_pylist(), student=own, teacher=other, markers=markers) == got  # type: ignore[arg-type]


def test_a_teachers_completion_in_the_students_ids() -> None:
    own, other = ToySide(STUDENT), ToySide(TEACHER)
    rows = [{"token_ids": [K0, 0, 3, K1, 2, K2, 2, 10], "text": "aabccc"}, {"token_ids": [0, K0, 1, K1, 0], "text": "aba"}]
    got = student_ids(rows, student=own, teacher=other, markers=Markers(MARKERS))  # type: ignore[arg-type]
    assert got == [([C0, 0, 0, 1, 2, C1, 0, 1, 2], True), ([0, C0, 1], False)]
    skipping = student_ids(rows, student=own, teacher=other, markers=Markers(MARKERS, skip=True))  # type: ignore[arg-type]
    assert skipping == [([C0, 0, 0, 1, 2, C1, 0, 1, 2], True), ([0, C0, 1, 0], True)]
    assert student_ids(rows, student=own, teacher=other, markers=NO_MARKERS) == [([], False), ([0], False)]  # type: ignore[arg-type]

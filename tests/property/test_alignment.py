"""Alignment into units and the byte accounts (MATHS.md §3; properties 5 to 8 and 19)."""

from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import (
    SEEDS,
    TEXTS,
    StubEncoder,
    ToySide,
    byte_level,
    full_logprobs,
    random_bytes,
    random_logprobs,
    random_split,
    random_vocabulary,
    rollouts_table,
    scores_of,
    sentencepiece_bpe,
    sentencepiece_unigram,
    spelled,
    student_ref,
    teacher_ref,
    topk_scores,
    unicode_texts,
    valid_prefix,
)
from toys import vocabulary as toy_vocabulary

from configs.objectives import Alm, Bpm, Bytes, Gold, Objective, Opd, Sft, Strict, Uld
from tasks import objectives
from tasks.align import align_rollouts
from tasks.engines.base import TokenScores
from tasks.engines.transformers import TransformersEngine
from tasks.models.pair import teacher_ids
from tasks.models.text import side
from tasks.signals import make_signal
from tasks.tokens.align import Kind, align, unit_starts
from tasks.tokens.markers import NO_MARKERS
from tasks.tokens.ragged import offsets_of
from tasks.tokens.token_bytes import Encoder, token_bytes
from tasks.tokens.vocabulary import Vocabulary

LENGTHS = st.lists(st.integers(1, 4), max_size=8)
OBJECTIVES: list[Objective] = [
    Gold(name="gold"),
    Gold(name="gold", merge="observed"),
    Gold(name="gold", merge="sum"),
    Uld(name="uld"),
    Bytes(name="bytes"),
    Strict(name="strict"),
    Alm(name="alm"),
    Bpm(name="bpm"),
    Opd(name="opd"),
]


# -- units -----------------------------------------------------------------------------------------------------------------


def units_by_sets(student: list[int], teacher: list[int], stop: bool) -> list[tuple[int, int, int, Kind]]:
    """(student end, teacher end, byte end, kind) of each unit, from the sets of cumulative ends."""
    s_ends, t_ends = list(accumulate(student)), list(accumulate(teacher))
    units, s_at, t_at = [], 0, 0
    for end in sorted(set(s_ends) & set(t_ends)):
        s_to, t_to = s_ends.index(end) + 1, t_ends.index(end) + 1
        many = (s_to - s_at > 1, t_to - t_at > 1)
        kinds = {
            (False, False): Kind.ONE_TO_ONE,
            (True, False): Kind.MANY_TO_ONE,
            (False, True): Kind.ONE_TO_MANY,
            (True, True): Kind.MANY_TO_MANY,
        }
        units.append((s_to, t_to, end, kinds[many]))
        s_at, t_at = s_to, t_to
    if stop:
        units.append((len(student) + 1, len(teacher) + 1, sum(student), Kind.STOP))
    return units


def aligned_rows(rows: list[tuple[list[int], list[int], bool]]) -> list[list[tuple[int, int, int, Kind]]]:
    """The product's units of the rows, each row's as `units_by_sets` gives them."""
    sides = []
    for at in (0, 1):
        sides += [
            np.array([n for row in rows for n in row[at]], np.int32),
            offsets_of(np.array([len(row[at]) for row in rows])),
        ]
    units = align(*sides, np.array([row[2] for row in rows], bool))
    flat = list(zip(units.student_ends, units.teacher_ends, units.byte_ends, units.kind, strict=True))
    return [flat[units.offsets[r] : units.offsets[r + 1]] for r in range(len(rows))]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=5))
def test_units_end_at_the_common_ends(pairs: list[tuple[list[int], list[int]]]) -> None:
    """Ends are exactly E_S ∩ E_T, row by row; a stop, where both sides are equally long, is one more unit."""
    rows = [(s, t, sum(s) == sum(t)) for s, t in pairs]
    assert aligned_rows(rows) == [units_by_sets(*row) for row in rows]


def test_starts_leave_their_ends_alone() -> None:
    """Arrays that come from Arrow cannot be written to, empty ones neither."""
    for ends, offsets, starts in (([2, 3, 1], [0, 2, 2, 3], [0, 2, 0]), ([], [0, 0], [])):
        given = np.array(ends, np.int32)
        given.flags.writeable = False
        assert unit_starts(given, np.array(offsets)).tolist() == starts


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(SEEDS, st.integers(0, 12), st.booleans()), min_size=1, max_size=5))
def test_units_partition_the_bytes(rows: list[tuple[int, int, bool]]) -> None:
    """Ordered, disjoint, complete, with identical bytes on both sides and no common end inside (non-canonical ids too)."""
    rng = np.random.default_rng(rows[0][0])
    student, teacher = random_vocabulary(rng), random_vocabulary(rng)
    texts = [random_bytes(np.random.default_rng(seed), length) for seed, length, _ in rows]
    split = [(random_split(rng, student, text), random_split(rng, teacher, text)) for text in texts]
    lengths = [(student.lengths[s].tolist(), teacher.lengths[t].tolist(), stop) for (s, t), (_, _, stop) in zip(split, rows)]
    for (s_ids, t_ids), text, (_, _, stop), units in zip(split, texts, rows, aligned_rows(lengths), strict=True):
        s_at = t_at = byte_at = 0
        for s_end, t_end, byte_end, kind in units[: len(units) - stop]:
            assert s_end > s_at
            assert t_end > t_at
            s_bytes, t_bytes = spelled(student, s_ids[s_at:s_end]), spelled(teacher, t_ids[t_at:t_end])
            assert s_bytes == t_bytes == text[byte_at:byte_end]
            inner_s = {len(spelled(student, s_ids[s_at:i])) for i in range(s_at + 1, s_end)}
            inner_t = {len(spelled(teacher, t_ids[t_at:i])) for i in range(t_at + 1, t_end)}
            assert not inner_s & inner_t
            assert kind != Kind.STOP
            s_at, t_at, byte_at = s_end, t_end, byte_end
        assert (s_at, t_at, byte_at) == (len(s_ids), len(t_ids), len(text))
        if stop:
            assert units[-1] == (len(s_ids) + 1, len(t_ids) + 1, len(text), Kind.STOP)


def _encoder(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer, token_bytes(tokenizer, [tokenizer.eos_token_id]))


@settings(max_examples=60, deadline=None)
@given(unicode_texts(exclude="▁"))
def test_unicode_across_tokenizer_families(text: str) -> None:
    """Units of byte-level against SentencePiece tokenizers hold the same bytes, also inside code points (property 6)."""
    student = _encoder(byte_level())
    for tokenizer in (byte_level(290, other=True), sentencepiece_bpe(prepend=False), sentencepiece_unigram()):
        teacher = _encoder(tokenizer)
        s_ids, t_ids = student.encode([text])[0], teacher.encode([text])[0]
        if t_ids is None:  # the one way: a Unigram model reads a literal <0x41> or <unk> as that piece
            assert tokenizer is sentencepiece_unigram()
            assert "<" in text
            continue
        assert s_ids is not None
        s_lengths, t_lengths = student.beta.lengths[s_ids].tolist(), teacher.beta.lengths[t_ids].tolist()
        (units,) = aligned_rows([(s_lengths, t_lengths, True)])
        assert units == units_by_sets(s_lengths, t_lengths, True)
        s_at = t_at = 0
        for s_end, t_end, _, _ in units[:-1]:
            assert student.beta.join(s_ids[s_at:s_end]) == teacher.beta.join(t_ids[t_at:t_end])
            s_at, t_at = s_end, t_end
        assert units[-1][2] == len(text.encode())


# -- the aligned table -----------------------------------------------------------------------------------------------------


def toy_scores(rng: np.random.Generator, toy: Vocabulary, ids: list[int], k: int = 5) -> TokenScores:
    """A random teacher's scores of the ids."""
    table, k = random_logprobs(rng, len(ids), toy.size), min(k, toy.size - 1)
    best = np.argsort(-table, axis=1)[:, :k]
    top = np.take_along_axis(table, best, 1)
    return topk_scores(
        table[np.arange(len(ids)), ids].astype(np.float32),
        best.ravel().astype(np.int32),
        top.ravel().astype(np.float16),
        np.full(len(ids), k, np.int16),
        np.log(1 - np.exp(top).sum(1)).astype(np.float32),
    )


def aligned_toys(
    rng: np.random.Generator,
    student: Vocabulary,
    teacher: Vocabulary,
    s_rows: list[list[int]],
    t_rows: list[list[int] | None],
    objective: Objective,
) -> list[dict[str, Any]]:
    own, other = ToySide(student), ToySide(teacher)
    sampled = [-rng.gamma(2.0, size=len(ids)) for ids in s_rows]
    rollouts = rollouts_table([[0]] * len(s_rows), s_rows, own, logprobs=sampled)  # type: ignore[arg-type]
    scores = scores_of([toy_scores(rng, teacher, ids) for ids in t_rows if ids is not None], t_rows)
    table = align_rollouts(
        rollouts, scores, objectives.build(objective, student=student, teacher=teacher), student=own, teacher=other
    )  # type: ignore[arg-type]
    return table.to_pylist()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o.name}-{getattr(o, 'merge', '')}")
@settings(max_examples=25, deadline=None)
@given(seed=SEEDS)
def test_non_canonical_ids_align(objective: Objective, seed: int) -> None:
    """Sampled ids are used as they are: units of any segmentation are those of the sets, and drift is told (property 7)."""
    rng = np.random.default_rng(seed)
    student, teacher = random_vocabulary(rng, stops=2), random_vocabulary(rng)
    stops = rng.random(4) < 0.6
    texts = [random_bytes(rng, int(rng.integers(0 if stop else 1, 9))) for stop in stops]
    bodies = [random_split(rng, student, text) for text in texts]
    t_bodies = [random_split(rng, teacher, text) for text in texts]
    s_rows = [ids + [int(rng.choice(student.stop_ids))] * bool(stop) for ids, stop in zip(bodies, stops)]
    t_rows = [ids + [teacher.stop_ids[0]] * bool(stop) for ids, stop in zip(t_bodies, stops)]
    for row, s_ids, t_ids, stop in zip(
        aligned_toys(rng, student, teacher, s_rows, t_rows, objective), bodies, t_bodies, stops, strict=True
    ):
        wanted = units_by_sets(student.lengths[s_ids].tolist(), teacher.lengths[t_ids].tolist(), bool(stop))
        got = zip(row["student_ends"], row["teacher_ends"], row["byte_ends"], row["kind"], strict=True)
        assert list(got) == wanted
        assert row["status"] == "ok"
        assert row["canonical"] == (s_ids == StubEncoder(student).encode([spelled(student, s_ids).decode()])[0])


def check_accounts(row: dict[str, Any], completion_bytes: int) -> None:
    parts = [row[f"{kind}_bytes"] for kind in ("supervised", "unmatched", "dropped", "tail")]
    assert sum(parts) == completion_bytes
    assert min(parts) >= 0, parts


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o.name}-{getattr(o, 'merge', '')}")
@settings(max_examples=30, deadline=None)
@given(seed=SEEDS)
def test_bytes_add_up(objective: Objective, seed: int) -> None:
    """Supervised, unmatched, dropped and tail bytes are the completion's, none below zero: with rows that the teacher
    cannot spell, cut characters, sampled control tokens, empty completions (property 19)."""
    rng = np.random.default_rng(seed)
    letters = b"ab" + "é👩".encode()
    values = [bytes([byte]) for byte in sorted(set(letters))] + [b"ab", b"ba", b"a\xc3", b"b\xf0", b"ab\xf0", b"\x9f\x91"]
    student = toy_vocabulary([*values, None, None], [len(values) + 1])
    control, stop_id = len(values), len(values) + 1
    teacher = toy_vocabulary([*values[:-5], "é".encode(), "👩".encode(), b"aa", None], [len(values) - 2])
    s_rows, t_rows = [], []
    for _ in range(5):
        text = "".join(rng.choice(["a", "b", "é", "👩"], rng.integers(0, 6)))
        data = text.encode()
        stopped = rng.random() < 0.4
        if not stopped:
            data = data[: rng.integers(0, len(data) + 1)]  # may cut a character
        ids = random_split(rng, student, data)
        if rng.random() < 0.2:
            ids.insert(int(rng.integers(0, len(ids) + 1)), control)
        s_rows.append(ids + [stop_id] * stopped)
        graded = random_split(rng, teacher, valid_prefix(spelled(student, ids)).encode()) + [teacher.stop_ids[0]] * stopped
        t_rows.append(graded if graded and rng.random() > 0.15 else None)
    rows = aligned_toys(rng, student, teacher, s_rows, t_rows, objective)
    for row, s_ids, t_ids in zip(rows, s_rows, t_rows, strict=True):
        check_accounts(row, sum(len(student.beta.values[i] or b"") for i in s_ids))
        if t_ids is None:
            assert row["units"] == row["supervised_bytes"] == 0
        if t_ids is not None and row["status"] == "ok":
            reached = len(valid_prefix(spelled(student, s_ids)).encode())
            assert row["supervised_bytes"] + row["unmatched_bytes"] <= reached  # the tail is not supervised
            assert all(end <= len(s_ids) for end in row["term_ends"])


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS)
def test_bytes_that_are_supervised(seed: int) -> None:
    """`gold` speaks of the bytes of units with a matched event, `bytes` of those that begin a teacher token, `sft` of all."""
    rng = np.random.default_rng(seed)
    student, teacher = random_vocabulary(rng), random_vocabulary(rng)
    data = random_bytes(rng, int(rng.integers(1, 10)))
    s_ids = [*random_split(rng, student, data), student.stop_ids[0]]
    t_ids = [*random_split(rng, teacher, data), teacher.stop_ids[0]]
    kinds: list[Objective] = [Gold(name="gold"), Bytes(name="bytes")]
    gold, by_bytes = (aligned_toys(rng, student, teacher, [s_ids], [t_ids], kind)[0] for kind in kinds)
    ends = [0, *gold["byte_ends"]]
    per_unit = [end - start for start, end in pairwise(ends)]
    assert gold["supervised_bytes"] == sum(n for n, events in zip(per_unit, gold["target_counts"], strict=True) if events)
    assert by_bytes["supervised_bytes"] == len(t_ids) - 1
    own = ToySide(student)
    rollouts = rollouts_table([[0]], [s_ids], own)  # type: ignore[arg-type]
    table = align_rollouts(
        rollouts, None, objectives.build(Sft(name="sft"), student=student, teacher=student), student=own, teacher=own
    )  # type: ignore[arg-type]
    assert table["supervised_bytes"].to_pylist() == [len(data)]


def test_a_cut_character_is_a_tail() -> None:
    """The aligned part ends at the last valid character; what the student sampled behind it is counted (§3)."""
    student = toy_vocabulary([b"a", b"b", b"ab", b"\xf0", b"\x9f", None], [5])
    teacher = toy_vocabulary([b"a", b"b", None], [2])
    rng = np.random.default_rng(0)
    for objective in OBJECTIVES:
        (row,) = aligned_toys(rng, student, teacher, [[0, 2, 3, 4]], [[0, 0, 1]], objective)
        assert row["byte_ends"] == [1, 3]
        assert row["tail_bytes"] == 2
        check_accounts(row, 5)
        assert max(row["term_ends"]) <= 2, objective  # no term reads a token of the tail


def test_a_token_that_begins_a_cut_character() -> None:
    """The accounts hold where the last valid character and the first bytes of a cut one are one student token."""
    student = toy_vocabulary([b"a", b"ab\xf0", None], [2])
    teacher = toy_vocabulary([b"a", b"b", None], [2])
    rng = np.random.default_rng(0)
    for objective in OBJECTIVES:
        (row,) = aligned_toys(rng, student, teacher, [[0, 1]], [[0, 0, 1]], objective)
        assert row["byte_ends"] == [1]
        check_accounts(row, 4)


# -- the chain rule --------------------------------------------------------------------------------------------------------

PROMPTS = [[1, 4, 40, 50, 2, 5], [1, 4, 70, 2, 5], [1, 4, 2, 5]]


def unit_sums(logprobs: np.ndarray, ends: list[int]) -> np.ndarray:
    return np.array([logprobs[start:end].sum() for start, end in zip([0, *ends], ends)])


def test_unit_logprobs_are_the_chain_rule_on_shifted_logits() -> None:
    """Both sides' unit log-probs equal naive sums over a plain forward pass; a shift by one position would not (property 8)."""
    own, other = side(student_ref()), side(teacher_ref())
    student, teacher = TransformersEngine(student_ref()), TransformersEngine(teacher_ref())
    completions = [own.encoder.encode([text])[0] for text in TEXTS[:3]]
    completions = [ids + own.stop_ids for ids in completions if ids]
    rollouts = rollouts_table(PROMPTS, completions, own)
    prompts = [[1, 4, 33, 2, 5, 7], [1, 4, 2, 5], [1, 5]]
    graded = teacher_ids(rollouts.to_pylist(), student=own, teacher=other, markers=NO_MARKERS)
    scores = scores_of(teacher.score(prompts, graded, make_signal(k=16)), graded)  # type: ignore[arg-type]
    behaviour = student.score(PROMPTS, completions, make_signal(k=4))
    column = pa.array([s.logprobs for s in behaviour], rollouts.schema.field("logprobs").type)
    rollouts = rollouts.set_column(rollouts.schema.get_field_index("logprobs"), "logprobs", column)
    objective = objectives.build(Gold(name="gold"), student=own.vocabulary, teacher=other.vocabulary)
    table = align_rollouts(rollouts, scores, objective, student=own, teacher=other).to_pylist()
    for model, contexts, sequences, text_side, name in (
        (student.model, PROMPTS, completions, own, "student"),
        (teacher.model, prompts, graded, other, "teacher"),
    ):
        for row, prompt, ids in zip(table, contexts, sequences, strict=True):
            full = full_logprobs(model, prompt + ids, len(text_side.beta.values)).exp().numpy()

            def realised(shift: int, full=full, prompt=prompt, ids=ids, stops=text_side.stop_ids) -> np.ndarray:
                rows = [full[len(prompt) + t - 1 + shift] for t in range(len(ids))]
                return np.log([p[stops].sum() if i in stops else p[i] for i, p in zip(ids, rows, strict=True)])

            ends = row[f"{name}_ends"]
            assert ends[-1] == len(ids)
            assert len(ends) < len(ids) or name == "student"  # some units have several tokens
            got = np.array(row[f"{name}_logprobs"])
            assert np.allclose(got, unit_sums(realised(0), ends), atol=1e-4)
            for shift in (-1, 1):
                assert not np.allclose(got, unit_sums(realised(shift), ends), atol=0.1)

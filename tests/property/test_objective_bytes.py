"""`bytes` (MATHS.md §5; property 17): its next-byte law against loops over the vocabulary and brute force."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import CLASSES, REST, STOP, first_law, law_at, places
from toys import LETTERS, SEEDS, Rows, floored_jsd, losses, pairing, random_bytes, random_rows, random_vocabulary, terms_of
from toys import vocabulary as toy_vocabulary

from configs.objectives import Bytes
from tasks import objectives
from tasks.objectives.base import Terms
from tasks.objectives.bytes import BytesObjective
from tasks.tokens.vocabulary import Vocabulary


def module_for(student: Vocabulary, teacher: Vocabulary, beta: float = 1.0) -> BytesObjective:
    module = objectives.build(Bytes(name="bytes", beta=beta), student=student, teacher=teacher)
    assert isinstance(module, BytesObjective)
    return module


def teacher_laws(rows: Rows, k: int | None = None) -> np.ndarray:
    """The product's laws before every teacher token, dense."""
    counts, classes, masses = module_for(rows.student, rows.teacher).teacher_laws(pairing(rows, k))
    dense = np.zeros((len(counts), CLASSES))
    dense[np.repeat(np.arange(len(counts)), counts), classes] = masses
    return dense


def student_laws(module: BytesObjective, logprobs: torch.Tensor, terms: Terms) -> torch.Tensor:
    return module.laws(logprobs, terms.actual, terms.start, terms.end, terms.inside)[0]


def two_sides(seed: int) -> Rows:
    rng = np.random.default_rng(seed)
    student = random_vocabulary(rng, stops=2, controls=2)
    return random_rows(rng, student, random_vocabulary(rng, stops=int(rng.integers(1, 4)), letters=b"abcd"))


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_teacher_laws(seed: int) -> None:
    """Equal to the loops of §5 before every token, the stop included, for any segmentation; they sum to 1."""
    rows = two_sides(seed)
    wanted = [
        law_at(rows.teacher, np.exp(table), ids, j, 0)
        for ids, table in zip(rows.teacher_ids, rows.t, strict=True)
        for j in range(len(ids))
    ]
    laws = teacher_laws(rows)
    assert laws == pytest.approx(np.array(wanted), abs=1e-9)
    assert laws.sum(1) == pytest.approx(np.ones(len(laws)))


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 6))
def test_teacher_laws_of_a_truncated_signal(seed: int, k: int) -> None:
    """They sum to 1, and no byte has more than the mass that the full law and the missing mass allow."""
    rows = two_sides(seed)
    laws = teacher_laws(rows, k)
    assert laws.sum(1) == pytest.approx(np.ones(len(laws)))
    assert laws.min() >= 0
    first = np.concatenate([[True] + [False] * (len(ids) - 1) for ids in rows.teacher_ids])
    assert (laws[first, :REST] <= teacher_laws(rows)[first, :REST] + 1e-9).all()


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_student_laws(seed: int) -> None:
    """Equal to the loops of §5, on boundaries and inside tokens; they sum to 1."""
    rows = two_sides(seed)
    module = module_for(rows.student, rows.teacher)
    span, terms = terms_of(module, rows)
    laws = student_laws(module, torch.from_numpy(np.concatenate(rows.s))[span], terms).numpy()
    wanted = []
    for s, s_ids, t_ids in zip(rows.s, rows.student_ids, rows.teacher_ids, strict=True):
        held = places(rows.student, s_ids)
        wanted += [
            law_at(rows.student, np.exp(s), s_ids, *held[at]) for at, (_, r) in places(rows.teacher, t_ids).items() if r == 0
        ]
    assert laws == pytest.approx(np.array(wanted), abs=1e-9)
    assert laws.sum(1) == pytest.approx(np.ones(len(laws)))


def crowded_vocabulary(rng: np.random.Generator) -> Vocabulary:
    """Hundreds of tokens behind `a`, dozens behind `ab`, byte-fallback duplicates, two stops, a control id."""
    letters = [bytes([byte]) for byte in range(ord("a"), ord("a") + 20)]
    values: list[bytes | None] = [*letters, b"a", b"b", None, None, None]
    values += [b"a" + x + y for x in letters for y in letters]
    values += [b"ab" + x + y for x in letters[:3] for y in letters] + [b"bc", b"ca", b"cab"]
    values = [values[i] for i in rng.permutation(len(values))]
    empty = [i for i, value in enumerate(values) if value is None]
    return toy_vocabulary(values, empty[:2])


def summed(toy: Vocabulary, q: bytes) -> torch.Tensor:
    """`[classes, V]`: which ids go on behind `q` with which byte; behind nothing also the stop and the rest."""
    matrix = torch.zeros(CLASSES, toy.size, dtype=torch.float64)
    for i, value in enumerate(toy.beta.values):
        if value is not None and value.startswith(q) and value != q:
            matrix[value[len(q)], i] = 1
        elif value is None and not q:
            matrix[STOP if i in toy.stop_ids else REST, i] = 1
    return matrix


def plain_law(toy: Vocabulary, p: torch.Tensor, ids: list[int], token: int, inside: int) -> torch.Tensor:
    """`law_at` as products with matrices, for autograd."""
    if inside:
        law = summed(toy, toy.beta.values[ids[token]][:inside]) @ p[token]
    else:
        law = summed(toy, b"") @ p[token]
        if token:
            q = toy.beta.values[ids[token - 1]]
            same = [i for i, value in enumerate(toy.beta.values) if value == q]
            law = summed(toy, q) @ p[token - 1] + p[token - 1, same].sum() * law
    return law / law.sum()


@pytest.mark.parametrize("make", [crowded_vocabulary, lambda rng: random_vocabulary(rng, stops=2)], ids=["crowded", "small"])
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_student_laws_and_their_gradients(make, seed: int) -> None:
    """Those of plain products, in both precisions (property 14)."""
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, make(rng), random_vocabulary(rng), rows=2)
    module = module_for(rows.student, rows.teacher)
    span, terms = terms_of(module, rows)
    logits = torch.from_numpy(np.concatenate(rows.s) + rng.normal(size=(sum(map(len, rows.s)), 1)))
    exact = logits.clone().requires_grad_()
    wanted = []
    for p, s_ids, t_ids in zip(
        exact.softmax(-1).split([len(s) for s in rows.s]), rows.student_ids, rows.teacher_ids, strict=True
    ):
        held = places(rows.student, s_ids)
        wanted += [plain_law(rows.student, p, s_ids, *held[at]) for at, (_, r) in places(rows.teacher, t_ids).items() if r == 0]
    weights = torch.from_numpy(rng.normal(size=(len(wanted), CLASSES)))
    (slope,) = torch.autograd.grad((weights * torch.stack(wanted)).sum(), exact)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        given_logits = logits.to(dtype).requires_grad_()
        laws = student_laws(module, given_logits[span], terms)
        (gradient,) = torch.autograd.grad((weights.to(dtype) * laws).sum(), given_logits)
        assert torch.allclose(laws.double(), torch.stack(wanted), atol=tolerance)
        assert torch.allclose(gradient.double(), slope, atol=tolerance)


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.sampled_from([0.0, 0.4, 1.0]))
def test_the_loss(seed: int, beta: float) -> None:
    """JSD_β of the two laws wherever the teacher stands on a boundary; inside a student token, without the teacher's stop."""
    rows, wanted = two_sides(seed), []
    for s, t, s_ids, t_ids in zip(rows.s, rows.t, rows.student_ids, rows.teacher_ids, strict=True):
        held = places(rows.student, s_ids)
        for at, (j, r) in places(rows.teacher, t_ids).items():
            if r:
                continue
            i, inside = held[at]
            teacher = law_at(rows.teacher, np.exp(t), t_ids, j, 0)
            student = law_at(rows.student, np.exp(s), s_ids, i, inside)
            if inside:
                teacher[STOP] = 0
                teacher /= teacher.sum()
            known = [c for c in range(REST) if teacher[c] > 0]
            a, b = np.append(teacher[known], max(1 - teacher[known].sum(), 0)), np.append(student[known], 0)
            b[-1] = max(1 - b.sum(), 0)
            wanted.append(floored_jsd(a, b, beta))
    got = losses(module_for(rows.student, rows.teacher, beta), rows)
    assert got.numpy() == pytest.approx(np.array(wanted), abs=1e-4)


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_a_token_without_mass_changes_nothing(seed: int) -> None:
    """Added to either vocabulary, whether it extends other tokens or begins with a byte that no other has."""
    rows = two_sides(seed)
    before = losses(module_for(rows.student, rows.teacher), rows)
    extra: list[bytes | None] = [b"aa", b"abcab", b"e", None]

    def larger(toy: Vocabulary) -> Vocabulary:
        return toy_vocabulary([*toy.beta.values, *extra], toy.stop_ids)

    def padded(tables: list[np.ndarray]) -> list[np.ndarray]:
        return [np.pad(table, ((0, 0), (0, len(extra))), constant_values=-np.inf) for table in tables]

    grown = Rows(
        larger(rows.student),
        larger(rows.teacher),
        rows.student_ids,
        rows.teacher_ids,
        rows.stops,
        padded(rows.s),
        padded(rows.t),
    )
    after = losses(module_for(grown.student, grown.teacher), grown)
    assert after.numpy() == pytest.approx(before.numpy(), abs=1e-5)


# -- models whose byte law is known by brute force --------------------------------------------------------------------------


class TokenModel:
    """A toy language model: the next token's distribution depends on the last token only (index V: at the start)."""

    def __init__(self, rng: np.random.Generator, toy: Vocabulary, keep: float):
        """Each transition is possible with probability `keep`; a stop always is."""
        self.toy = toy
        weights = rng.gamma(0.7, size=(toy.size + 1, toy.size)) * (rng.random((toy.size + 1, toy.size)) < keep)
        weights[:, toy.stop_ids] += 0.2
        self.p = weights / weights.sum(1, keepdims=True)

    def sample(self, rng: np.random.Generator, longest: int) -> list[int]:
        ids: list[int] = []
        while len(ids) < longest:
            ids.append(int(rng.choice(self.toy.size, p=self.p[ids[-1] if ids else -1])))
            if self.toy.beta.values[ids[-1]] is None:
                break
        return ids

    def table(self, ids: list[int]) -> np.ndarray:
        """The distribution before each of the ids."""
        return self.p[[-1, *ids[:-1]]]

    def covers(self, data: bytes) -> set[tuple[int, ...]]:
        """All token paths with mass whose bytes begin with `data` and whose last token is needed for that."""
        found: set[tuple[int, ...]] = set()

        def walk(path: tuple[int, ...], at: int) -> None:
            if at >= len(data):
                found.add(path)
                return
            for i, value in enumerate(self.toy.beta.values):
                if value and self.p[path[-1] if path else -1, i] > 0:
                    left = data[at:]
                    if left.startswith(value) or value.startswith(left):
                        walk((*path, i), at + len(value))

        walk((), 0)
        return found

    def mass(self, path: tuple[int, ...]) -> float:
        return float(np.prod([self.p[a, b] for a, b in zip((-1, *path), path)]))

    def law(self, data: bytes) -> np.ndarray:
        """The exact law of what follows `data`, summed over all token paths."""
        law = np.zeros(CLASSES)
        for path in self.covers(data):
            spelled = b"".join(self.toy.beta.values[i] or b"" for i in path)
            if len(spelled) > len(data):
                law[spelled[len(data)]] += self.mass(path)
            else:
                law += self.mass(path) * first_law(self.toy, self.p[path[-1] if path else -1])
        return law / law.sum()


def boundaries(model: TokenModel, ids: list[int]) -> list[tuple[bytes, tuple[int, ...]]]:
    """The text up to each token and the path that spells it."""
    return [(b"".join(model.toy.beta.values[i] or b"" for i in ids[:j]), tuple(ids[:j])) for j in range(len(ids))]


def own_laws(model: TokenModel, ids: list[int]) -> np.ndarray:
    """The product's laws of the model along its own path: as a teacher, and as a student, which must agree."""
    stops = [ids[-1] in model.toy.stop_ids]
    with np.errstate(divide="ignore"):
        table = np.log(model.table(ids))
    rows = Rows(model.toy, model.toy, [ids], [ids], stops, [table], [table])
    laws = teacher_laws(rows)
    module = module_for(model.toy, model.toy)
    span, terms = terms_of(module, rows)
    assert student_laws(module, torch.from_numpy(table)[span], terms).numpy() == pytest.approx(laws, abs=1e-9)
    return laws


def sampled_paths(seed: int, keep: float) -> tuple[TokenModel, list[int]]:
    """A random toy model and a path that it sampled; a control token at its end is left out, as the align stage does."""
    rng = np.random.default_rng(seed)
    model = TokenModel(rng, random_vocabulary(rng, controls=1), keep)
    ids = model.sample(rng, 7)
    if model.toy.beta.values[ids[-1]] is None and ids[-1] not in model.toy.stop_ids:
        ids.pop()
    return model, ids


def split_by_covers(model: TokenModel, ids: list[int]) -> list[bool]:
    """Whether, at each boundary, no segmentation has mass but the path itself and longer tokens in its last place."""
    exact = []
    values = model.toy.beta.values
    for data, path in boundaries(model, ids):
        last = values[path[-1]] if path else None
        longer = {i for i, value in enumerate(values) if value and last and value.startswith(last) and value != last}
        exact.append(model.covers(data) <= {path, *((*path[:-1], i) for i in longer)})
    return exact


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_exact_where_no_other_segmentation_has_mass(seed: int) -> None:
    """On boundaries the cover-corrected law is the brute-force law over all token paths."""
    model, ids = sampled_paths(seed, keep=0.35)
    if not ids:
        return
    laws = own_laws(model, ids)
    exact = split_by_covers(model, ids)
    assert exact[0]  # nothing precedes the first token
    for (data, _), law, certain in zip(boundaries(model, ids), laws, exact, strict=True):
        if certain:
            assert law == pytest.approx(model.law(data), abs=1e-9)


def test_nearer_than_without_covers_elsewhere() -> None:
    """Where other segmentations have mass the law is inexact, but covers bring it nearer to the brute-force law on average."""
    corrected, uncorrected, certain = [], [], 0
    for seed in range(100):
        model, ids = sampled_paths(seed, keep=0.8)
        if not ids:
            continue
        laws, table = own_laws(model, ids), model.table(ids)
        for j, (exact, (data, _)) in enumerate(zip(split_by_covers(model, ids), boundaries(model, ids), strict=True)):
            certain += exact
            if not exact:
                truth = model.law(data)
                corrected.append(abs(laws[j] - truth).sum() / 2)
                uncorrected.append(abs(first_law(model.toy, table[j]) - truth).sum() / 2)
    assert certain > 100
    assert len(corrected) > 100
    assert max(corrected) > 1e-3  # it is not exact there
    assert np.mean(corrected) < 0.6 * np.mean(uncorrected)
    assert np.mean(np.array(corrected) <= np.array(uncorrected) + 1e-12) > 0.9


class ByteSource:
    """Independent bytes and a stop: a known law, and its exact next-token model under greedy tokens of at most two bytes."""

    def __init__(self, rng: np.random.Generator):
        *letters, self.stop = rng.dirichlet(np.full(len(LETTERS) + 1, 4.0))
        self.p = dict(zip(LETTERS, letters, strict=True))
        self.law = np.zeros(CLASSES)
        self.law[list(self.p)], self.law[STOP] = letters, self.stop

    def goes_on(self, toy: Vocabulary, token: bytes) -> set[int]:
        """Bytes that would have made `token` longer."""
        return {value[-1] for value in toy.beta.values if value and len(value) == len(token) + 1 and value.startswith(token)}

    def next_token(self, toy: Vocabulary, last: bytes) -> np.ndarray:
        """The exact distribution of the next greedy token behind the token `last` (empty: at the start)."""
        excluded = self.goes_on(toy, last) if len(last) == 1 else set()
        p = np.zeros(toy.size)
        for i, value in enumerate(toy.beta.values):
            if i in toy.stop_ids:
                p[i] = self.stop
            elif value and value[0] not in excluded:
                p[i] = np.prod([self.p[byte] for byte in value])
                if len(value) == 1:
                    p[i] *= 1 - sum(self.p[byte] for byte in self.goes_on(toy, value))
        assert p.sum() == pytest.approx(1 - sum(self.p[byte] for byte in excluded))
        return p / p.sum()

    def encode(self, toy: Vocabulary, data: bytes) -> list[int]:
        ids, at = [], 0
        while at < len(data):
            value = max((v for v in toy.beta.values if v and data.startswith(v, at)), key=len)
            ids.append(toy.beta.values.index(value))
            at += len(value)
        return [*ids, toy.stop_ids[0]]

    def logprobs(self, toy: Vocabulary, ids: list[int]) -> np.ndarray:
        last = [b"", *(toy.beta.values[i] or b"" for i in ids[:-1])]
        with np.errstate(divide="ignore"):
            return np.log([self.next_token(toy, value) for value in last])


@cache
def two_tokenizers() -> tuple[Vocabulary, Vocabulary]:
    student = toy_vocabulary([b"a", b"b", b"c", b"ab", b"bc", b"ca", b"cc", None], [7])
    return student, toy_vocabulary([None, b"ba", b"c", b"b", b"ac", b"a", b"bc"], [0])


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_one_byte_law_and_two_tokenizers(seed: int) -> None:
    """The loss is zero on common boundaries. Inside a student token of which `q` has been read the remainder is exactly
    -log P(a byte that makes `q` longer | no stop), the price of the law given that the token goes on."""
    rng = np.random.default_rng(seed)
    source = ByteSource(rng)
    student, teacher = two_tokenizers()
    data = random_bytes(rng, int(rng.integers(1, 12)))
    s_ids, t_ids = source.encode(student, data), source.encode(teacher, data)
    rows = Rows(
        student, teacher, [s_ids], [t_ids], [True], [source.logprobs(student, s_ids)], [source.logprobs(teacher, t_ids)]
    )
    assert teacher_laws(rows) == pytest.approx(np.tile(source.law, (len(t_ids), 1)), abs=1e-9)
    wanted, held = [], places(student, s_ids)
    for at, (_, r) in places(teacher, t_ids).items():
        if r == 0:
            i, inside = held[at]
            q = (student.beta.values[s_ids[i]] or b"")[:inside]
            longer = sum(source.p[byte] for byte in source.goes_on(student, q))
            wanted.append(np.log((1 - source.stop) / longer) if inside else 0.0)
    assert losses(module_for(student, teacher), rows).numpy() == pytest.approx(np.array(wanted), abs=1e-5)

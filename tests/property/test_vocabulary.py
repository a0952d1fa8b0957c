"""Vocabulary matching and the byte order (MATHS.md §2), against naive scans of the whole vocabulary."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import SEEDS, byte_level, random_vocabulary, sentencepiece_bpe, sentencepiece_unigram
from toys import vocabulary as toy_vocabulary
from transformers import PreTrainedTokenizerFast

from tasks.tokens.token_bytes import Encoder, token_bytes
from tasks.tokens.vocabulary import Vocabulary, describe_overlap, match
from tasks.vocab import make_vocab_table

# Any bytes an id (also none, also the same twice), any of the ids stops.
SHARED = st.sampled_from([b"a", b"aa", b"ab", b"abc", b"\xff"])
ENTRIES = st.lists(st.none() | st.binary(min_size=1, max_size=4) | SHARED, min_size=2, max_size=25)


def real(tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    stops = [tokenizer.eos_token_id]
    beta = token_bytes(tokenizer, stops)
    return Vocabulary(beta, stops, tokenizer.convert_ids_to_tokens(list(range(len(beta.values)))))


def from_entries(entries: list[bytes | None]) -> Vocabulary:
    """The entries, two stops behind them, and byte-fallback pieces for every second single byte."""
    seen: set[bytes] = set()
    pieces = []
    for i, value in enumerate(entries):
        again = value is not None and len(value) == 1 and (value in seen or i % 2 == 0)
        pieces.append(f"<0x{value[0]:02X}>" if again and value else f"piece{i}")
        seen |= {value} if value else set()
    size = len(entries)
    return toy_vocabulary([*entries, None, None], [size + 1, size], [*pieces, "stop", "stop2"])


@settings(max_examples=60, deadline=None)
@given(ENTRIES)
def test_order_and_ranks(entries: list[bytes | None]) -> None:
    """`order` holds each id that has bytes once, sorted by them; `rank` is its inverse; `flat` is all bytes in a row."""
    toy = from_entries(entries)
    values = toy.beta.values
    assert sorted(toy.order) == [i for i, value in enumerate(values) if value is not None]
    in_order = [values[i] for i in toy.order]
    assert in_order == sorted(in_order)
    assert all(toy.rank[i] == place for place, i in enumerate(toy.order))
    assert all(toy.rank[i] == -1 for i, value in enumerate(values) if value is None)
    assert all(toy.flat[toy.starts[i] :][: toy.lengths[i]].tobytes() == (value or b"") for i, value in enumerate(values))


def check_prefix_ranges(toy: Vocabulary, ids: list[int]) -> None:
    values = toy.beta.values
    for i in ids:
        for count in range(1, len(values[i]) + 1):
            prefix = values[i][:count]
            low, equal, high = (int(bound) for bound in toy.prefix_range(np.array(i), np.array(count)))
            assert set(toy.order[low:equal]) == {j for j, value in enumerate(values) if value == prefix}
            longer = {j for j, value in enumerate(values) if value and value.startswith(prefix) and value != prefix}
            assert set(toy.order[equal:high]) == longer
            assert high - low == len(set(toy.order[low:high]))


@settings(max_examples=60, deadline=None)
@given(ENTRIES)
def test_prefix_ranges(entries: list[bytes | None]) -> None:
    """For every id and prefix length: the tokens that are the prefix and those that go on, as a naive scan finds them."""
    toy = from_entries(entries)
    check_prefix_ranges(toy, [i for i, value in enumerate(toy.beta.values) if value is not None])


def test_prefix_ranges_of_real_tokenizers() -> None:
    """With byte-fallback ids that spell what another id spells."""
    for tokenizer in (byte_level(), sentencepiece_bpe(), sentencepiece_unigram()):
        toy = real(tokenizer)
        check_prefix_ranges(toy, [i for i, value in enumerate(toy.beta.values) if value is not None][::5])
    assert len(real(sentencepiece_bpe()).duplicates) > 10  # the premise


@settings(max_examples=60, deadline=None)
@given(ENTRIES)
def test_classes(entries: list[bytes | None]) -> None:
    """Ids with the same bytes are one class, ids without bytes stand alone, and all stops are one class."""
    toy = from_entries(entries)
    values, stops = toy.beta.values, toy.stop_ids
    for i in range(toy.size):
        if i in stops:
            members = set(stops)
        elif values[i] is None:
            members = {i}
        else:
            members = {j for j in range(toy.size) if values[j] == values[i]}
        assert {j for j in range(toy.size) if toy.representative[j] == toy.representative[i]} == members
        assert toy.representative[i] in members
    assert set(toy.duplicates) == {i for i in range(toy.size) if toy.representative[i] != i}


def test_the_representative_is_the_id_that_encode_produces() -> None:
    """`A` stands for `<0x41>`, and a byte that has no other piece stands for itself."""
    for tokenizer in (sentencepiece_bpe(), sentencepiece_unigram()):
        toy = real(tokenizer)
        encoder = Encoder(tokenizer, toy.beta)
        for text in ("A", "t", "é", "ü", "\x07", "cat A"):
            ids = encoder.encode([text])[0]
            assert ids is not None
            assert all(toy.representative[i] == i for i in ids)
        letter, byte = tokenizer.convert_tokens_to_ids(["A", "<0x41>"])
        assert toy.representative[byte] == toy.representative[letter] == letter


def check_matching(own: Vocabulary, other: Vocabulary) -> None:
    matching = match(own, other)
    theirs = other.beta.values
    for i, value in enumerate(own.beta.values):
        if i in own.stop_ids:
            assert matching.ids[i] in other.stop_ids
            assert matching.prefix[i] == -1
        elif value is None:
            assert (matching.ids[i], matching.prefix[i]) == (-1, -1)
        else:
            same = [j for j, theirs_j in enumerate(theirs) if theirs_j == value]
            assert (matching.ids[i] in same) if same else (matching.ids[i] == -1)
            begins = [theirs_j for theirs_j in theirs if theirs_j and value.startswith(theirs_j)]
            assert (theirs[matching.prefix[i]] == max(begins, key=len)) if begins else (matching.prefix[i] == -1)
        if matching.ids[i] >= 0:
            assert other.representative[matching.ids[i]] == matching.ids[i]


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_matching(seed: int) -> None:
    """v_S ↔ v_T iff their bytes are equal or both are stops; φ is the longest token that begins the bytes; both ways."""
    rng = np.random.default_rng(seed)
    student, teacher = random_vocabulary(rng, stops=2), random_vocabulary(rng, stops=1, letters=b"bcd")
    check_matching(student, teacher)
    check_matching(teacher, student)


def test_strings_are_never_compared() -> None:
    """`Ġthe` of byte-level BPE and `▁the` of SentencePiece are one; what merely looks alike is not."""
    ours, theirs = byte_level(), sentencepiece_bpe()
    own, other = real(ours), real(theirs)
    check_matching(own, other)
    check_matching(other, own)
    matching = match(other, own)
    the, looks_alike = theirs.convert_tokens_to_ids("▁the"), theirs.convert_tokens_to_ids("é")
    assert ours.convert_ids_to_tokens(int(matching.ids[the])) == "Ġthe"
    assert matching.ids[looks_alike] != ours.convert_tokens_to_ids("é")  # the byte-level piece `é` is the byte E9
    assert own.beta.values[ours.convert_tokens_to_ids("é")] == b"\xe9"


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_vocab_table_and_its_description(seed: int) -> None:
    """The vocab table's rows are the ids in order; the Jaccard similarity is that of the two sets of byte strings."""
    rng = np.random.default_rng(seed)
    student, teacher = random_vocabulary(rng), random_vocabulary(rng)
    table = make_vocab_table(student, teacher).to_pylist()
    assert [row["token_id"] for row in table] == list(range(student.size))
    assert [row["bytes"] for row in table] == student.beta.values
    mine, theirs = (set(toy.beta.values) - {None} for toy in (student, teacher))
    for row in table:
        assert (row["match_id"] >= 0) == (row["role"] == "stop" or row["bytes"] in theirs)
    text = describe_overlap(student=student, teacher=teacher)
    assert f"{len(mine & theirs)} tokens shared" in text
    assert f"Jaccard {len(mine & theirs) / len(mine | theirs):.3f}" in text


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_same_as(seed: int) -> None:
    """Two vocabularies are the same only with the same bytes, roles and stops at the same ids."""
    first, second = (random_vocabulary(np.random.default_rng(seed)) for _ in range(2))
    assert first.same_as(second)
    values = list(first.beta.values)
    a, b = np.flatnonzero(first.lengths)[:2]
    values[a], values[b] = values[b], values[a]
    assert first.same_as(toy_vocabulary(values, first.stop_ids)) == (values == first.beta.values)
    assert not first.same_as(toy_vocabulary([*first.beta.values, None], [*first.stop_ids, first.size]))

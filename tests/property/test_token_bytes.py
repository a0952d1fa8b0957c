"""Token bytes (MATHS.md §1; property 6): ids spell exactly the bytes of their text, whatever Unicode does."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from toys import (
    HARD_TEXTS,
    SEEDS,
    TEXTS,
    byte_level,
    sentencepiece_bpe,
    sentencepiece_unigram,
    unicode_texts,
    valid_prefix,
)
from toys import vocabulary as toy_vocabulary
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from configs.errors import BadInput
from tasks.tokens.token_bytes import Encoder, split_completion, token_bytes

SENTENCEPIECE = [sentencepiece_bpe, lambda: sentencepiece_bpe(prepend=False), sentencepiece_unigram]
NAMES = ["bpe-with-dummy-space", "bpe-without", "unigram"]


def encoder(tokenizer: PreTrainedTokenizerFast) -> Encoder:
    return Encoder(tokenizer, token_bytes(tokenizer, [tokenizer.eos_token_id], "toy"))


def test_byte_level_pieces_are_gpt2s_alphabet() -> None:
    """β of every id is GPT-2's published table (as transformers has it) inverted, and all 256 bytes have an id."""
    tokenizer = byte_level()
    inverse = {char: byte for byte, char in bytes_to_unicode().items()}
    beta = token_bytes(tokenizer, [tokenizer.eos_token_id])
    specials = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for i, value in enumerate(beta.values):
        piece = tokenizer.convert_ids_to_tokens(i)
        assert value == (None if i in specials else bytes(inverse[char] for char in piece))
    assert {bytes([byte]) for byte in range(256)} <= set(beta.values)


@pytest.mark.parametrize("make", SENTENCEPIECE, ids=NAMES)
def test_sentencepiece_pieces(make) -> None:
    """β of a byte piece is that byte; of any other, what the tokenizer's own decoder makes of it behind a word."""
    tokenizer = make()
    beta = token_bytes(tokenizer, [tokenizer.eos_token_id])
    word = tokenizer.convert_tokens_to_ids("A")
    for i, value in enumerate(beta.values):
        piece = tokenizer.convert_ids_to_tokens(i)
        if i in tokenizer.all_special_ids:
            assert value is None
        elif piece.startswith("<0x"):
            assert value == bytes.fromhex(piece[3:5])
        else:
            assert b"A" + value == tokenizer.backend_tokenizer.decode([word, i]).encode()


@settings(max_examples=60, deadline=None)
@given(unicode_texts())
def test_byte_level_spells_every_text(text: str) -> None:
    """No text is lost or changed; the tokenizer's own decoder says the same."""
    ids = encoder(byte_level()).encode([text])[0]
    assert ids is not None
    beta = token_bytes(byte_level(), [byte_level().eos_token_id])
    assert b"".join(beta.values[i] for i in ids) == text.encode()
    assert byte_level().backend_tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("make", SENTENCEPIECE, ids=NAMES)
@settings(max_examples=60, deadline=None)
@given(text=unicode_texts(exclude="▁<"))
def test_sentencepiece_spells_every_text(make, text: str) -> None:
    """With byte fallback no text is lost or changed either (but one that has `▁` in it), line ends in front included."""
    tokenizer = make()
    asked = encoder(tokenizer)
    if "<" in text and make is sentencepiece_unigram:
        text = text.replace("<", "(")  # a Unigram model reads a literal <0x41> as that byte
    ids = asked.encode([text])[0]
    assert ids is not None
    beta = token_bytes(tokenizer, [tokenizer.eos_token_id])
    assert b"".join(beta.values[i] for i in ids) == text.encode()
    word = tokenizer.convert_tokens_to_ids("A")  # in front, since the decoder strips one leading space
    assert tokenizer.backend_tokenizer.decode([word, *ids], skip_special_tokens=False) == "A" + text


@pytest.mark.parametrize("text", ["\n\nx", "\n", "\n\n\n", ":x", "::", "a\n:"])
def test_a_text_that_begins_like_the_anchor(text: str) -> None:
    """Where a dummy space is avoided behind an anchor, a text whose first bytes merge with the anchor is not lost."""
    tokenizer = sentencepiece_bpe(line_ends=True)
    ids = encoder(tokenizer).encode([text])[0]
    assert ids is not None
    assert spelled_by(tokenizer, ids) == text.encode()


def spelled_by(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> bytes:
    pieces = tokenizer.convert_ids_to_tokens(ids)
    return b"".join(bytes.fromhex(p[3:5]) if p.startswith("<0x") else p.replace("▁", " ").encode() for p in pieces)


@settings(max_examples=25, deadline=None)
@given(st.lists(unicode_texts(exclude="▁<"), max_size=5))
def test_encoding_many_is_encoding_each(texts: list[str]) -> None:
    """A text's ids do not depend on its neighbours in the batch."""
    for tokenizer in (byte_level(), sentencepiece_bpe()):
        asked = encoder(tokenizer)
        assert asked.encode(texts) == [asked.encode([text])[0] for text in texts]


@pytest.mark.parametrize("text", ["<end>", "<s>a</s>", "x<pad><user>", "</s>", "<unk>"])
@pytest.mark.parametrize("make", [byte_level, sentencepiece_bpe])
def test_special_tokens_spelled_out_are_text(make, text: str) -> None:
    """Literal special-token text never becomes the special token."""
    tokenizer = make()
    ids = encoder(tokenizer).encode([text])[0]
    assert ids is not None
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert not set(ids) & {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def test_bos_on_one_side_only() -> None:
    """A tokenizer that adds a BOS by itself does not put it into a completion."""
    tokenizer = Tokenizer.from_str(byte_level().backend_tokenizer.to_str())
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    with_bos = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<end>", pad_token="<pad>")
    assert with_bos("a")["input_ids"][0] == with_bos.bos_token_id  # the premise
    assert encoder(with_bos).encode(TEXTS) == encoder(byte_level()).encode(TEXTS)


def test_added_tokens_that_are_not_special_are_their_literal_bytes() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(byte_level().backend_tokenizer.to_str()))
    tokenizer.add_tokens(["<tool>", "smörgås", " ▁ "])
    beta = token_bytes(tokenizer, [2])
    for literal in ("<tool>", "smörgås", " ▁ "):
        i = tokenizer.convert_tokens_to_ids(literal)
        assert (beta.values[i], beta.roles[i]) == (literal.encode(), "text")
    text = "en smörgås ▁ <tool>!"
    ids = Encoder(tokenizer, beta).encode([text])[0]
    assert tokenizer.convert_tokens_to_ids("smörgås") in ids
    assert b"".join(beta.values[i] for i in ids) == text.encode()


def test_roles() -> None:
    """Special ids have a role and no bytes; every stop id is a stop, also where it is the padding token too."""
    tokenizer = byte_level()
    named = {piece: tokenizer.convert_tokens_to_ids(piece) for piece in ("<pad>", "<s>", "<end>", "<user>", "<system>")}
    beta = token_bytes(tokenizer, [named["<end>"], named["<user>"]])
    roles = {piece: beta.roles[i] for piece, i in named.items()}
    assert roles == {"<pad>": "pad", "<s>": "bos", "<end>": "stop", "<user>": "stop", "<system>": "control"}
    assert all(beta.values[i] is None for i in named.values())
    assert all((role == "text") == bool(value) for role, value in zip(beta.roles, beta.values, strict=True))
    assert token_bytes(tokenizer, [named["<pad>"]]).roles[named["<pad>"]] == "stop"


def normalising(*parts: normalizers.Normalizer) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer.from_str(byte_level().backend_tokenizer.to_str())
    tokenizer.normalizer = normalizers.Sequence(list(parts))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@settings(max_examples=40, deadline=None)
@given(unicode_texts())
def test_a_normalising_tokenizer_loses_exactly_the_texts_it_changes(text: str) -> None:
    """NFC and lower-casing: a row is None iff normalising changes the text."""
    for parts in ([normalizers.NFC()], [normalizers.Lowercase()]):
        changed = normalizers.Sequence(parts).normalize_str(text) != text
        assert (encoder(normalising(*parts)).encode([text])[0] is None) == changed


def test_lossy_tokenizers_are_refused_by_name() -> None:
    """With the text that broke it; one without exact bytes at all is refused at once."""
    with pytest.raises(BadInput, match=r"(?s)small-caps.*The quick"):
        encoder(normalising(normalizers.Lowercase())).check("small-caps")
    encoder(byte_level()).check("good")
    pieces = {piece: i for i, piece in enumerate(["[UNK]", "a", "##b"])}
    wordpiece = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    wordpiece.pre_tokenizer, wordpiece.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    with pytest.raises(BadInput, match="bert-like"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=wordpiece), [], "bert-like")


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.lists(st.sampled_from(HARD_TEXTS), max_size=3).map("".join), st.booleans(), st.booleans())
def test_a_completions_text_is_its_longest_valid_prefix(seed: int, text: str, stop: bool, cut: bool) -> None:
    """Bytes in any segmentation, cut anywhere: the text ends where they are no text. Control tokens are no part of it."""
    rng = np.random.default_rng(seed)
    toy = toy_vocabulary([bytes([byte]) for byte in range(256)] + [b"\xf0\x9f", b" \xf0", b"th", None, None], [259])
    control, stop_id = 260, 259
    data = text.encode()
    data = data[: rng.integers(0, len(data) + 1)] if cut else data
    ids = list(data)
    if rng.random() < 0.3:
        ids.insert(int(rng.integers(0, len(ids) + 1)), control)
    got, whole = split_completion(toy.beta, ids + [stop_id] * stop, {stop_id})
    wanted = valid_prefix(data)
    assert got == wanted
    assert whole == (wanted.encode() == data)

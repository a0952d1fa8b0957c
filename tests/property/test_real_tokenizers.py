"""Six real tokenizers in seven pairs (properties 5, 6, 7, 19): token bytes, matching and alignment of hard texts.

The oracles know the tokenizers by their own decoders and offsets only. `POTSTILL_FUZZ=100000` sets the texts a pair.
"""

import os
import re
from collections import Counter, defaultdict
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import fetch
import numpy as np
import pyarrow as pa
import pytest
from toys import rollouts_table, valid_prefix
from transformers.convert_slow_tokenizer import bytes_to_unicode

from configs.objectives import Alm
from storage.schemas import SCORES
from tasks import objectives
from tasks.align import align_rollouts
from tasks.models.pair import teacher_ids
from tasks.models.text import Side, tokenizer_of
from tasks.tokens.align import Kind
from tasks.tokens.markers import NO_MARKERS
from tasks.tokens.token_bytes import split_completion
from tasks.tokens.vocabulary import match

LONG = os.environ.get("POTSTILL_FUZZ")
TEXTS = int(LONG or 2000)
BLOCK = 2000
NAMES = [*fetch.TOKENIZERS, *(["smollm2"] if LONG and (fetch.MODELS / "smollm2").is_dir() else [])]
PAIRS = [
    ("llama3", "qwen3"),
    ("gemma3", "qwen3"),
    ("llama3", "gemma3"),
    ("llama2", "deepseek_v3"),
    ("gptoss", "llama2"),
    ("gemma3", "llama2"),
    ("qwen3", "gptoss"),
    *([("smollm2", "gemma3")] if "smollm2" in NAMES else []),
]


@dataclass(frozen=True)
class Known:
    """A tokenizer as the product has it, and as its own decoder says it is."""

    side: Side

    @cached_property
    def backend(self) -> Any:
        return self.side.tokenizer.backend_tokenizer

    @cached_property
    def byte_level(self) -> bool:
        return type(self.backend.decoder).__name__ == "ByteLevel"

    @cached_property
    def word(self) -> list[int]:
        """Ids of an `a` to put in front, since some decoders strip one leading space."""
        return [] if self.byte_level else [self.backend.token_to_id("a")]

    @cached_property
    def values(self) -> list[bytes | None]:
        """The bytes of every id: GPT-2's published alphabet inverted, or what decoding it behind a word adds."""
        added = self.backend.get_added_tokens_decoder()
        pieces = [self.backend.id_to_token(i) for i in range(self.backend.get_vocab_size())]
        if self.byte_level:
            inverse = {char: byte for byte, char in bytes_to_unicode().items()}
            values = [p.encode() if i in added else bytes(map(inverse.__getitem__, p)) for i, p in enumerate(pieces)]
        else:
            texts = self.decode([[i] for i in range(len(pieces))])
            values = [bytes.fromhex(p[3:5]) if re.fullmatch("<0x..>", p) else t.encode() for p, t in zip(pieces, texts)]
        return [None if i in added and added[i].special else value for i, value in enumerate(values)]

    @cached_property
    def ids_of(self) -> dict[bytes, list[int]]:
        """All ids that spell these bytes."""
        found = defaultdict(list)
        for i, value in enumerate(self.values):
            if value is not None:
                found[value].append(i)
        return found

    @cached_property
    def alphabet(self) -> set[int]:
        """Bytes that an id of their own spells: SmolLM2 lacks some, among them the first byte of planes 4 to 11."""
        return {value[0] for value in self.ids_of if len(value) == 1}

    @cached_property
    def controls(self) -> list[int]:
        return [i for i, value in enumerate(self.values) if value is None and i not in self.side.stop_ids]

    def decode(self, rows: list[list[int]]) -> list[str]:
        """By the tokenizer's own decoder."""
        texts = self.backend.decode_batch([self.word + ids for ids in rows], skip_special_tokens=False)
        assert all(text.startswith("a" * len(self.word)) for text in texts)
        return [text[len(self.word) :] for text in texts]

    def lossy(self, text: str) -> str | None:
        """Why the tokenizer cannot spell a text: the reasons that there are."""
        # By the tokenizer's own table: it knows 50 combining characters fewer than Python's, and leaves them as they are.
        if str(self.backend.normalizer) == "NFC()" and self.backend.normalizer.normalize_str(text) != text:
            return "NFC changes it"
        if not self.byte_level and "▁" in text:
            return "it has a ▁"  # SentencePiece's sign for a space
        return None if set(text.encode()) <= self.alphabet else "no id has a byte of it"

    def spelling(self, rng: np.random.Generator, data: bytes) -> list[int]:
        """Any ids that spell the bytes, but for bytes that no id has."""
        ids: list[int] = []
        while data:
            lengths = [n for n in range(1, min(len(data), 12) + 1) if data[:n] in self.ids_of]
            length = lengths[rng.integers(len(lengths))] if lengths else 1
            if same := self.ids_of.get(data[:length]):
                ids.append(same[rng.integers(len(same))])
            data = data[length:]
        return ids

    def spelled(self, ids: list[int]) -> bytes:
        return b"".join(self.values[i] or b"" for i in ids)


@pytest.fixture(scope="session")
def known() -> dict[str, Known]:
    """All tokenizers; a fresh machine fetches them."""
    fetch.main(["tokenizers"])
    return {name: Known(tokenizer_of(str(fetch.MODELS / name))) for name in NAMES}


# -- hard texts ------------------------------------------------------------------------------------------------------------

FAMILIES = [
    ["the", " The", " quick", " brown fox", "isn't", "WE'LL", "naïve", " café", "straße", " İstanbul", "hello",
     ", ", ". ", "…"],
    ["Привет", " мир", "Ελλάδα", "你好", "世界，", "こんにちは", "カタカナ", "안녕하세요", "שלום", " مرحبا", "हिन्दी", "ไทย",
     "தமிழ்", "ქართული", "አማርኛ", "ខ្មែរ", "བོད་སྐད", "ꦧꦱꦗꦮ", "𐎠𐎼", "𝒳𝓎", "ḥ", "Tiếng Việt"],
    ["def f(x):\n", "    return x", "if (a[0] != b) {", "}\n\n", ";\n", "//", "/* ", "#include <a>", "->", "::", "&&", "\\n",
     "print(\"", "'''", "x_1", "fooBar", "<div class='x'>", "</div>", "SELECT *", "{{ }}", "=====", "------", "$", "`", "..."],
    ["0", "1", "12", "123", "1234", "1000000", "3.14159", "-1e-9", "٣٤", "Ⅳ", "½", "²", "１２", "0x1F", "1,000"],
    [" ", "  ", "   ", "    ", " " * 17, "\t", "\t\t", "\n", "\n\n", "\n\n\n", "\r\n", "\r\n\r\n", "\r", "\v", "\f", "\x85",
     "\u00a0", "\u2003", "\u2009", "\u3000", "\u2028", "\u2029", " a", "a ", " \n", "\n "],
    ["e\u0301", "é", "\u0301", "n\u0303", "A\u030a", "\u212b", "Å", "\u1100\u1161\u11a8", "각", "ﬁ", "\u0344", "\u0958",
     "\u0374", "q\u0323\u0307", "q\u0307\u0323", "\u2126", "Z\u0351\u036b\u0343", "か\u3099", "が", "\ufb1d",
     "\u0f43", "o\u0302\u0301"],
    ["👩‍👩‍👧‍👦", "🏳️‍🌈", "🇸🇪", "🇺🇳🇯🇵", "👍🏽", "❤️", "☃", "1️⃣", "🫠", "🙂", "👩\u200d", "\ufe0f", "🏴󠁧󠁢󠁳󠁣󠁴󠁿"],
    ["\ufffd", "\ue000", "\U000f0000", "\U0010ffff", "\x00", "\x01", "\x1b[0m", "\x7f", "\ufeff", "\u200b", "\u200d", "\u202e",
     "\u00ad", "\ufffe", "\uffff", "\ufdd0", "\U0001fffe"],
    ["<|endoftext|>", "<s>", "</s>", "<unk>", "<pad>", "<bos>", "<eos>", "<mask>", "<|im_start|>", "<|im_end|>", "<|eot_id|>",
     "<start_of_turn>", "<end_of_turn>", "<unused7>", "<think>", "</tool_call>", "<|fim_prefix|>", "<｜User｜>", "[INST]",
     "<｜end▁of▁sentence｜>", "<｜fim▁hole｜>", "<|begin_of_text|>", "<|return|>", "<0x41>", "<0xE2>", "<0x0A>",
     "<table>", "<", "|>"],
    ["▁", "▁▁", "▁the", "Ġ", "Ġthe", "Ċ", "ĉ", "Â", "Ã©", "Ń", "ł", "##ing", "</w>", "@@", "a▁"],
]  # fmt: skip
WEIGHTS = np.array([3, 3, 3, 2, 3, 1, 2, 2, 2, 0.5, 1, 2])  # of these, random characters, pieces of vocabularies


def hard_texts(rng: np.random.Generator, count: int, pieces: list[str]) -> list[str]:
    """Texts of 0 to 120 characters, each of fragments from a few families."""
    texts = []
    for _ in range(count):
        families = rng.choice(len(WEIGHTS), rng.integers(1, 5), p=WEIGHTS / WEIGHTS.sum())
        parts = []
        for family, at in zip(families[rng.integers(0, len(families), 16)], rng.integers(0, 2**31, 16)):
            if family < len(FAMILIES):
                parts.append(FAMILIES[family][at % len(FAMILIES[family])])
            elif family == len(FAMILIES):
                parts.append(character(at))
            else:
                parts.append(pieces[at % len(pieces)])
        texts.append("".join(parts[: rng.integers(0, 17)])[: rng.integers(1, 121)])
    return texts


def character(at: int) -> str:
    """A code point, no surrogate: as often of the first 0x3000 or of a plane of pictures as of all."""
    kind, at = at % 3, at // 3
    point = at % 0x3000 if kind == 0 else 0x1F000 + at % 0x1000 if kind == 1 else at % (0x110000 - 0x800)
    return chr(point if point < 0xD800 else point + 0x800)


def vocabulary_words(known: dict[str, Known]) -> list[str]:
    """Some pieces of every tokenizer that are text: what its own training found worth a token."""
    rng = np.random.default_rng(0)
    words = [k.values[i] or b"" for k in known.values() for i in rng.integers(0, len(k.values), 500)]
    return sorted({word.decode(errors="ignore")[:40] for word in words})


@dataclass(frozen=True)
class Sample:
    """What a student sampled."""

    ids: list[int]
    text: str  # what it is made from
    plain: bool  # the ids spell that text, with or without a stop behind them
    canonical: bool | None  # whether they are the text's encoding; None: not known


def samples(rng: np.random.Generator, student: Known, texts: list[str]) -> list[Sample]:
    """One a text: canonical ids or others, some cut, some with noise or a control token in them, most with a stop."""
    encode = student.side.encoder.encode
    canonical = encode(texts)
    at = [int(rng.integers(0, len(text) + 1)) for text in texts]
    left, right = encode([text[:n] for text, n in zip(texts, at)]), encode([text[n:] for text, n in zip(texts, at)])
    made = []
    for text, whole, first, second in zip(texts, canonical, left, right, strict=True):
        kind, fate, where = rng.random(), rng.random(), rng.random()
        body = whole if kind < 0.4 else first + second if first is not None and second is not None else None
        if body is None:
            body = student.spelling(rng, text.encode())
        elif kind > 0.7:
            again = rng.random(len(body)) < 0.4
            body = [j for i, new in zip(body, again) for j in (student.spelling(rng, student.values[i]) if new else [i])]
        place = int(where * (len(body) + 1))
        if fate < 0.25:
            ids = body[:place]
        elif fate < 0.3:
            ids = [*body[:place], student.ids_of[bytes([128 + int(where * 64)])][0], *body[place:]]
        elif fate < 0.35:
            ids = [*body[:place], student.controls[int(rng.integers(len(student.controls)))], *body[place:]]
        else:
            ids = body
        plain = ids == body and student.spelled(ids) == text.encode()
        stops = not ids or rng.random() < (0.2 if fate < 0.25 else 0.8)
        made.append(Sample(ids + student.side.stop_ids[:stops], text, plain, ids == whole if plain else None))
    return made


# -- the fuzz --------------------------------------------------------------------------------------------------------------


def scores_table(rng: np.random.Generator, completions: list[list[int] | None]) -> pa.Table:
    """Scores with made-up log-probs and no top ids."""
    records = []
    for number, ids in enumerate(completions):
        row = {"rollout_id": f"r{number}", "status": "lossy_text" if ids is None else "ok" if ids else "empty"}
        if ids:
            nothing = np.zeros(len(ids), np.int16)
            row |= {"token_ids": ids, "logprobs": -rng.random(len(ids)), "top_counts": nothing, "rest": nothing}
            row |= {"top_ids": [], "top_logprobs": []}
        records.append(row)
    return pa.Table.from_pylist(records, SCORES)


def check_offsets(known: Known, encoded: list[tuple[str, list[int]]]) -> None:
    """Canonical ids end where the tokenizer's own offsets say, wherever the next token starts at a character."""
    left = [(text, ids) for text, ids in encoded if ids]
    for anchor in ("", "\n", ":"):  # a dummy space stands in front of a text, or its first token merges with an anchor
        pairs, left = left, []
        encodings = known.backend.encode_batch([anchor + text for text, _ in pairs], add_special_tokens=False)
        for (text, ids), encoding in zip(pairs, encodings, strict=True):
            start = len(encoding.ids) - len(ids)
            before = encoding.offsets[start - 1][1] if start > 0 else 0
            if start < 0 or encoding.ids[start:] != ids or before != len(anchor):
                left.append((text, ids))
                continue
            byte_at = list(accumulate((len(char.encode()) for char in text), initial=0))
            spans = [*encoding.offsets[start:], (len(anchor + text), 0)]
            ours = accumulate(len(known.values[i] or b"") for i in ids)
            told = [
                (at, byte_at[end - len(anchor)]) for at, (_, end), (after, _) in zip(ours, spans, spans[1:]) if after >= end
            ]
            assert all(at == wanted for at, wanted in told), (text, ids)
            assert told[-1][0] == byte_at[-1]
    assert not left, left[:3]


def check_row(row: dict[str, Any], sample: Sample, text: str, z: list[int] | None, own: Known, other: Known) -> None:
    """One aligned row against the sets of cumulative ends, and the byte accounts against the ids' own bytes."""
    total = len(own.spelled(sample.ids))
    stopped = sample.ids[-1] in own.side.stop_ids
    y = sample.ids[: len(sample.ids) - stopped]
    trouble = next((n for n, i in enumerate(y) if own.values[i] is None), None)
    s = [own.values[i] for i in y[:trouble]]
    t = [other.values[i] for i in z or [] if i not in other.side.stop_ids]
    s_ends, t_ends = list(accumulate(map(len, s))), list(accumulate(map(len, t)))
    ends = sorted(set(s_ends) & set(t_ends))
    stop = stopped and bool(z) and trouble is None and b"".join(s) == text.encode()
    status = "lossy_text" if z is None else "empty" if not z else "ok" if ends or stop else "no_unit"
    assert row["status"] == status
    assert row["byte_ends"] == ends + [len(text.encode())] * stop
    data, s_at, t_at, at = text.encode(), 0, 0, 0
    for s_to, t_to, to, kind in zip(row["student_ends"], row["teacher_ends"], row["byte_ends"], row["kind"], strict=True):
        if to > at:
            assert b"".join(s[s_at:s_to]) == b"".join(t[t_at:t_to]) == data[at:to]
            assert kind == 1 + (s_to - s_at > 1) + 2 * (t_to - t_at > 1)
        else:
            assert (s_to, t_to, kind) == (len(s) + 1, len(t) + 1, Kind.STOP)
        s_at, t_at, at = s_to, t_to, to
    accounts = [row[f"{name}_bytes"] for name in ("supervised", "unmatched", "dropped", "tail")]
    assert accounts == ([at, 0, 0, total - at] if status == "ok" else [0, 0, total, 0])
    if sample.canonical is not None:
        assert row["canonical"] == sample.canonical


def check_texts(sampled: list[Sample], split: list[tuple[str, bool]], own: Known) -> None:
    """A completion's text is the longest valid one that its ids spell, control tokens left out; decoder and offsets agree."""
    exact = []
    for sample, (text, whole) in zip(sampled, split, strict=True):
        body = sample.ids[:-1] if sample.ids[-1] in own.side.stop_ids else sample.ids
        data = own.spelled(body)
        assert text == valid_prefix(data)
        assert whole == (text.encode() == data)
        if sample.plain:
            assert text == sample.text
            exact.append((text, body, sample.canonical))
    assert own.decode([body for _, body, _ in exact]) == [text for text, _, _ in exact]
    check_offsets(own, [(text, body) for text, body, canonical in exact if canonical])


def text_before_control(ids: list[int], own: Known) -> str:
    """What another tokenizer reads of a completion: the longest valid text up to its first control token, which has no pair."""
    body = ids[:-1] if ids[-1] in own.side.stop_ids else ids
    return valid_prefix(own.spelled(body[: next((n for n, i in enumerate(body) if own.values[i] is None), None)]))


def check_teacher(texts: list[str], sampled: list[Sample], graded: list[list[int] | None], own: Known, other: Known) -> None:
    """The teacher's ids are its encoding of what it reads, behind which its first stop stands wherever the student stopped."""
    exact = []
    for text, sample, ids in zip(texts, sampled, graded, strict=True):
        if ids is not None:
            stopped = sample.ids[-1] in own.side.stop_ids
            assert ids[len(ids) - stopped :] == other.side.stop_ids[:stopped]
            exact.append((text, ids[: len(ids) - stopped]))
    assert other.decode([body for _, body in exact]) == [text for text, _ in exact]
    check_offsets(other, exact)


def refusals(known: Known, role: str, texts: list[str], encoded: list[list[int] | None]) -> Counter[str]:
    """Texts refused by reason; one is refused where there is a reason, and only there."""
    reasons = [known.lossy(text) for text in texts]
    odd = [(t, reason) for t, reason, ids in zip(texts, reasons, encoded, strict=True) if (ids is None) == (reason is None)]
    assert not odd, (role, odd[:3])
    return Counter(f"{role}: {reason}" for reason in reasons if reason)


def check_block(rng: np.random.Generator, own: Known, other: Known, texts: list[str]) -> Counter[str]:
    """Texts through split_completion, teacher_ids and aligned_table; the refused ones by reason."""
    sampled, stops = samples(rng, own, texts), set(own.side.stop_ids)
    ids = [sample.ids for sample in sampled]
    split = [split_completion(own.side.beta, row, stops) for row in ids]
    check_texts(sampled, split, own)

    completions, read = [text for text, _ in split], [text_before_control(row, own) for row in ids]
    rollouts = rollouts_table([[0]] * len(ids), ids, own.side, completions, [-rng.random(len(row)) for row in ids])
    graded = teacher_ids(rollouts.to_pylist(), student=own.side, teacher=other.side, markers=NO_MARKERS)
    check_teacher(read, sampled, graded, own, other)

    objective = objectives.build(Alm(name="alm"), student=own.side.vocabulary, teacher=other.side.vocabulary)
    table = align_rollouts(rollouts, scores_table(rng, graded), objective, student=own.side, teacher=other.side)
    for row, sample, text, z in zip(table.to_pylist(), sampled, read, graded, strict=True):
        check_row(row, sample, text, z, own, other)
    mine = refusals(own, "student", texts, own.side.encoder.encode(texts))
    return mine + refusals(other, "teacher", read, graded)


@pytest.mark.parametrize(("student", "teacher"), PAIRS, ids=lambda name: name)
def test_hard_texts_align(known: dict[str, Known], student: str, teacher: str) -> None:
    """Whatever is sampled: ids spell their text, units end at the common ends, all bytes are counted; no refusal is odd."""
    reasons, pieces = Counter(), vocabulary_words(known)
    for start in range(0, TEXTS, BLOCK):
        rng = np.random.default_rng([PAIRS.index((student, teacher)), start])
        texts = hard_texts(rng, min(BLOCK, TEXTS - start), pieces)
        reasons += check_block(rng, known[student], known[teacher], texts)
    told = ", ".join(f"{reason} {count} ({count / TEXTS:.2%})" for reason, count in reasons.items())
    print(f"\n{student} -> {teacher}: {TEXTS} texts, refused: {told or 'none'}")


# -- whole vocabularies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_every_id(known: dict[str, Known], name: str) -> None:
    """β of every id is what the tokenizer's own decoder adds for it, and nothing for exactly the special ids."""
    mine, theirs = known[name].side.beta.values, known[name].values
    assert len(mine) == len(theirs)
    wrong = [(i, ours, given) for i, (ours, given) in enumerate(zip(mine, theirs)) if ours != given]
    assert not wrong, wrong[:5]


@pytest.mark.parametrize(("own", "other"), [("qwen3", "gemma3"), ("gemma3", "qwen3")])
def test_matching_by_bytes(known: dict[str, Known], own: str, other: str) -> None:
    """match and φ of every id against a dictionary of what the other's decoder says, byte pieces included."""
    ours, theirs = known[own], known[other]
    matching = match(ours.side.vocabulary, theirs.side.vocabulary)
    for i, value in enumerate(ours.values):
        if value is None:
            assert matching.ids[i] == (theirs.side.stop_ids[0] if i in ours.side.stop_ids else -1)
            assert matching.prefix[i] == -1
            continue
        assert matching.ids[i] in theirs.ids_of.get(value, [-1])
        begins = [value[:n] for n in range(1, len(value) + 1) if value[:n] in theirs.ids_of]
        assert matching.prefix[i] in (theirs.ids_of[begins[-1]] if begins else [-1])
    assert 0.2 < np.mean(matching.ids >= 0) < 0.9  # the premise


@pytest.mark.parametrize("name", ["llama3", "qwen3", "gemma3", "deepseek_v3"])
def test_prompts_keep_their_special_tokens(known: dict[str, Known], name: str) -> None:
    """Completions are encoded without special tokens; a chat rendered behind them by the same tokenizer has all its own."""
    text_side = copy(known[name].side)
    text_side.ref = replace(text_side.ref, rendering="chat")
    messages = [{"role": "user", "content": "Hello, 世界"}]
    added = known[name].backend.get_added_tokens_decoder()
    special = {i: token.content for i, token in added.items() if token.special}
    written = text_side.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    wanted = re.findall("|".join(map(re.escape, special.values())), written)
    assert len(wanted) > 0
    for _ in range(2):
        ids = text_side.encoder.encode([written])[0]
        assert ids
        assert not special.keys() & set(ids)
        assert [special[i] for i in text_side.render(messages) if i in special] == wanted

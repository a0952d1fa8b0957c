"""The exact bytes that each token id adds to a text (MATHS.md §1), from the tokenizer's own data."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from configs.errors import BadInput

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Spaces, cases, digits, accents, scripts, an emoji of several code points, line ends: what tokenizers treat specially.
PROBES = (
    "The quick  brown fox, isn't it? 3.14159 + 1000000 = x\n\tif (a[0] != b) { return; }\r\n\r\n",
    " leading and trailing  ",
    "naïve café ÅÄÖ ß Ω Привет, мир! 你好,世界 こんにちは 안녕 שלום مرحبا ไทย",
    "👩‍👩‍👧‍👦🏳️‍🌈 \u00a0\u200b\ufffd «»",  # in NFC: a tokenizer that normalises is lossy only on texts that it changes
)


def _byte_alphabet() -> dict[int, int]:
    """A `str.translate` table from GPT-2's characters to Latin-1, whose code points are the bytes they stand for.

    Printable Latin-1 stands for itself, the other bytes from U+0100 on. Latin-1 that stands for nothing goes where
    Latin-1 does not reach, so that a piece with it cannot pass for bytes.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return dict.fromkeys(others, 0xFFFF) | {0x100 + i: byte for i, byte in enumerate(others)}


@dataclass(frozen=True)
class TokenBytes:
    """β of a whole vocabulary.

    `values[i]` is β(i), or None for ids without bytes; `roles[i]` is text, stop, bos, pad or control.
    """

    values: list[bytes | None]
    roles: list[str]

    @cached_property
    def pieces(self) -> list[bytes]:
        """β with empty bytes for ids without bytes."""
        return [value or b"" for value in self.values]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Bytes of each id, int32 `[V]`; 0 for ids without bytes."""
        return np.fromiter(map(len, self.pieces), np.int32, len(self.values))

    def join(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` spell."""
        return b"".join(map(self.pieces.__getitem__, ids))


def token_bytes(tokenizer: PreTrainedTokenizerFast, stop_ids: Sequence[int] = (), name: str = "") -> TokenBytes:
    """β of every id that `tokenizer` knows.

    `stop_ids` are the ids that end a completion. Raises BadInput, by `name`, for a tokenizer that is neither
    byte-level BPE nor SentencePiece-like.
    """
    backend = tokenizer.backend_tokenizer
    to_bytes = _choose_decoder(backend, name or tokenizer.name_or_path)
    pieces, added = backend.get_vocab(with_added_tokens=False), backend.get_added_tokens_decoder()
    size = max(*pieces.values(), *added, 0) + 1  # ids may have holes
    values: list[bytes | None] = [None] * size
    roles = ["control"] * size
    for piece, i in pieces.items():
        values[i] = to_bytes(piece)
        roles[i] = "text"
    for i, token in added.items():
        if token.special:
            values[i], roles[i] = None, "control"
        elif values[i] is None:  # Gemma's `▁▁` is also a piece of the model, and means two spaces
            values[i], roles[i] = token.content.encode(), "text"
    for role, ids in (("pad", [tokenizer.pad_token_id]), ("bos", [tokenizer.bos_token_id]), ("stop", stop_ids)):
        for i in ids:
            if i is not None:
                values[i], roles[i] = None, role
    for i, value in enumerate(values):
        if roles[i] == "text" and not value:
            values[i], roles[i] = None, "control"  # an empty piece adds nothing, as a special token does
    return TokenBytes(values, roles)


def read_token_bytes(vocab: pa.Table) -> TokenBytes:
    """β from a table `vocab`: one row per id, in order."""
    return TokenBytes(vocab["bytes"].to_pylist(), vocab["role"].to_pylist())


def name_byte_tokens(beta: TokenBytes) -> list[str]:
    """Pieces of a vocabulary whose tokenizer is not there, as far as they matter: `<0x41>` for byte tokens, else empty.

    SentencePiece has all 256 of them in order, one behind the other, beside other tokens with these bytes.
    """
    pieces, values, whole = [""] * len(beta.values), beta.values, [bytes([byte]) for byte in range(256)]
    for start in (i for i, value in enumerate(values) if value == whole[0]):
        if values[start : start + 256] == whole:
            pieces[start : start + 256] = [f"<0x{byte:02X}>" for byte in range(256)]
    return pieces


def _choose_decoder(backend: Tokenizer, name: str) -> Callable[[str], bytes]:
    parts = [part for part in (backend.decoder, backend.pre_tokenizer, backend.normalizer) if part is not None]
    kinds = {kind for part in parts for kind in _kinds_of(json.loads(part.__getstate__()))}
    if "ByteLevel" in kinds:
        alphabet = _byte_alphabet()

        def decode_byte_level(piece: str) -> bytes:
            try:
                return piece.translate(alphabet).encode("latin-1")
            except UnicodeEncodeError:
                return piece.encode()  # a literal piece that never went through the byte alphabet

        return decode_byte_level
    if kinds & {"Metaspace", "ByteFallback"}:

        def decode_sentencepiece(piece: str) -> bytes:
            byte = BYTE_TOKEN.fullmatch(piece)
            return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()

        return decode_sentencepiece
    raise BadInput(
        f"{name}: the tokenizer is neither byte-level BPE nor SentencePiece-like ({type(backend.model).__name__}), "
        "so its tokens have no exact bytes; choose a model with such a tokenizer"
    )


def _kinds_of(component: dict[str, Any]) -> set[str]:
    """The types of a normaliser, pre-tokeniser or decoder and of all its parts."""
    parts = (component[key] for key in ("decoders", "pretokenizers", "normalizers") if key in component)
    return {component["type"]}.union(*map(_kinds_of, next(parts, [])))


class Encoder:
    """Encodes text that follows a prompt, so that the ids' bytes are the text's bytes.

    A tokenizer that puts a dummy space before a text encodes it behind an anchor, whose ids are then cut off. Special tokens
    that are spelled out in a text are encoded as text.
    """

    ANCHORS = ("\n", "a\n", ":")

    def __init__(self, tokenizer: PreTrainedTokenizerFast, beta: TokenBytes):
        self.backend, self.beta = tokenizer.backend_tokenizer, beta
        self.anchors: list[tuple[str, list[int]]] = [("", [])]
        if beta.join(self._ids(["a"])[0]) != b"a":
            self.anchors = [(a, ids) for a in self.ANCHORS if (ids := self._encode_anchor(a))] or self.anchors

    def encode(self, texts: Sequence[str]) -> list[list[int] | None]:
        """The ids of each text; None where no ids spell it byte for byte, as with a normalising tokenizer."""
        result: list[list[int] | None] = [None] * len(texts)
        for anchor, anchor_ids in self.anchors:  # a text may merge with one anchor, and not with the next
            missing = [i for i, ids in enumerate(result) if ids is None]
            for i, ids in zip(missing, self._ids([anchor + texts[i] for i in missing]), strict=True):
                cut = len(anchor_ids)
                if ids[:cut] == anchor_ids and self.beta.join(ids[cut:]) == texts[i].encode():
                    result[i] = ids[cut:]
        return result

    def check(self, name: str, probes: Sequence[str] = PROBES) -> None:
        """Raise BadInput, by `name` and with the first such text, where β does not reproduce one of `probes`."""
        for text, ids in zip(probes, self.encode(probes), strict=True):
            if ids is None:
                anchor, anchor_ids = self.anchors[0]
                decoded = self.beta.join(self._ids([anchor + text])[0][len(anchor_ids) :])
                raise BadInput(
                    f"{name}: the tokenizer does not keep the bytes of a text: {text!r} comes back as "
                    f"{decoded.decode(errors='replace')!r}; choose a model with a lossless tokenizer"
                )

    def _encode_anchor(self, anchor: str) -> list[int]:
        alone, followed = self._ids([anchor, anchor + "a"])
        return alone if followed[: len(alone)] == alone and self.beta.join(followed[len(alone) :]) == b"a" else []

    def _ids(self, texts: list[str]) -> list[list[int]]:
        self.backend.encode_special_tokens = True  # set at each call: other users of the tokenizer change these settings
        self.backend.no_padding()
        self.backend.no_truncation()
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]


def split_completion(beta: TokenBytes, ids: Sequence[int], stop_ids: set[int]) -> tuple[str, bool]:
    """The text that sampled `ids` spell, and whether it has all of their bytes: it ends before bytes that are not valid UTF-8.

    Control tokens, and the stop at the end, are no part of the text.
    """
    data = beta.join(ids[:-1] if ids and ids[-1] in stop_ids else ids)
    text = decode_valid(data)
    return text, len(text.encode()) == len(data)


def spell_answer(beta: TokenBytes, ids: Sequence[int], stop_ids: set[int]) -> tuple[str, str]:
    """What an evaluation grades of sampled `ids`: all of the text, and the text behind the last control token.

    Control tokens inside an answer (of thinking, of channels) are left out; the stop at the end is no part of it. Both texts
    end before bytes that are not valid UTF-8.
    """
    body = list(ids[:-1] if ids and ids[-1] in stop_ids else ids)
    last = max((i + 1 for i, token in enumerate(body) if beta.values[token] is None), default=0)
    return decode_valid(beta.join(body)), decode_valid(beta.join(body[last:]))


def decode_valid(data: bytes) -> str:
    """The text of bytes, up to the first that are not valid UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start].decode()

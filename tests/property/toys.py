"""Toy vocabularies, tokenizers, models and rows: small enough for brute force, made in milliseconds."""

import atexit
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from configs.models import Scratch
from storage.schemas import ALIGNED, ROLLOUTS, SCORES
from tasks.engines.base import TokenScores
from tasks.models.reference import ModelRef
from tasks.models.text import Side
from tasks.objectives.base import ObjectiveModule, Pairing, Terms
from tasks.scratch import init_model, train_tokenizer
from tasks.tokens.align import Units, align
from tasks.tokens.ragged import offsets_of
from tasks.tokens.token_bytes import TokenBytes
from tasks.tokens.vocabulary import Vocabulary
from tasks.training.batches import collate

SEEDS = st.integers(0, 2**32 - 1)
LETTERS = b"abc"
TEXTS = [
    "the cat sat on the mat; the dog sat on the log",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 22))  # 23",
    "naïve café, Привет мир, 你好世界, 👩‍👩‍👧‍👦 and 🏳️‍🌈",
    "  leading spaces,\ttabs\r\nand line ends   ",
]
OTHER_TEXTS = ["then he added that a cat and a dog sat there", "return the naïve result in 1 2 3 steps, мир 世界"]
HARD_TEXTS = [
    "", " ", "  a", "a ", "\n", "\n\nx", "\r\n\r\n", "\t\tif x:\n", "👩‍👩‍👧‍👦", "🏳️‍🌈🏳️‍🌈", "e\u0301 é", "Å A\u030a \u212b",
    "\ufffd", "\u00a0\u200b\u2028", "<end>", "a<s>b<pad><unk></s>", "<0x41>", "שלום مرحبا ไทย", "안녕하세요",
    "\U0010ffff\x00\x7f", "ﬁ ½ Ⅳ", " the", "The", "the the  the",
]  # fmt: skip


def unicode_texts(exclude: str = "") -> st.SearchStrategy[str]:
    """Any text, often made of the pieces that tokenizers treat specially."""
    hard = st.lists(st.sampled_from(HARD_TEXTS), max_size=4).map("".join)
    plain = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=exclude), max_size=12)
    return hard | plain | st.tuples(plain, hard, plain).map("".join)


# -- toy vocabularies: bytes without a tokenizer ---------------------------------------------------------------------------


def vocabulary(values: Sequence[bytes | None], stop_ids: Sequence[int], pieces: Sequence[str] | None = None) -> Vocabulary:
    """A vocabulary with these bytes an id; None for stops and control ids."""
    roles = ["stop" if i in stop_ids else "control" if v is None else "text" for i, v in enumerate(values)]
    return Vocabulary(
        TokenBytes(list(values), roles), list(stop_ids), list(pieces or [f"piece{i}" for i in range(len(values))])
    )


def random_vocabulary(rng: np.random.Generator, stops: int = 1, controls: int = 1, letters: bytes = LETTERS) -> Vocabulary:
    """All single letters, some longer tokens, a few byte-fallback duplicates, stops and controls, in a random order."""
    singles = [bytes([letter]) for letter in letters]
    longer = {bytes(rng.choice(list(letters), rng.integers(2, 5)).tolist()) for _ in range(rng.integers(2, 9))}
    entries = [(value, f"piece{value!r}") for value in [*singles, *sorted(longer)]]
    entries += [(value, f"<0x{value[0]:02X}>") for value in singles[: rng.integers(0, len(LETTERS) + 1)]]
    entries += [(None, f"stop{i}") for i in range(stops)] + [(None, f"control{i}") for i in range(controls)]
    entries = [entries[i] for i in rng.permutation(len(entries))]
    stop_ids = [i for i, (_, piece) in enumerate(entries) if piece.startswith("stop")]
    return vocabulary([value for value, _ in entries], stop_ids, [piece for _, piece in entries])


def random_bytes(rng: np.random.Generator, length: int, letters: bytes = LETTERS) -> bytes:
    return bytes(rng.choice(list(letters), length).tolist())


def random_split(rng: np.random.Generator, toy: Vocabulary, data: bytes) -> list[int]:
    """Any ids of `toy` that spell `data`: hardly ever the canonical ones."""
    ids, at = [], 0
    while at < len(data):
        fitting = [i for i, value in enumerate(toy.beta.values) if value and data.startswith(value, at)]
        ids.append(int(rng.choice(fitting)))
        at += toy.lengths[ids[-1]]
    return ids


def random_logprobs(rng: np.random.Generator, positions: int, size: int, scale: float = 1.5) -> np.ndarray:
    """float64 `[positions, size]`, each row a distribution."""
    logits = rng.normal(size=(positions, size)) * scale
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


@dataclass(frozen=True)
class Rows:
    """Rows of a shard on both sides (stops included, last), with a full distribution before every token."""

    student: Vocabulary
    teacher: Vocabulary
    student_ids: list[list[int]]
    teacher_ids: list[list[int]]
    stops: list[bool]
    s: list[np.ndarray]  # log-probs [tokens, V_S] a row
    t: list[np.ndarray]
    behaviour: list[np.ndarray | None] | None = None  # log-probs [tokens] a row, of the policy that sampled it


def random_rows(
    rng: np.random.Generator, student: Vocabulary, teacher: Vocabulary, rows: int = 3, same_ids: bool = False
) -> Rows:
    """Random completions, each split at random on either side, with random models' distributions."""
    stops = [bool(rng.random() < 0.6) for _ in range(rows)]
    texts = [random_bytes(rng, int(rng.integers(0 if stop else 1, 9))) for stop in stops]
    student_ids = [
        random_split(rng, student, text) + [int(rng.choice(student.stop_ids))] * stop for text, stop in zip(texts, stops)
    ]
    teacher_ids = student_ids if same_ids else [
        random_split(rng, teacher, text) + [int(rng.choice(teacher.stop_ids))] * stop for text, stop in zip(texts, stops)
    ]  # fmt: skip
    s = [random_logprobs(rng, len(ids), student.size) for ids in student_ids]
    t = [random_logprobs(rng, len(ids), teacher.size) for ids in teacher_ids]
    behaviour: list[np.ndarray | None] = [
        np.minimum(path_logprobs(p, ids) + rng.normal(size=len(ids)), 0) for p, ids in zip(s, student_ids)
    ]
    return Rows(student, teacher, student_ids, teacher_ids, stops, s, t, behaviour)


def path_logprobs(logprobs: np.ndarray, ids: list[int]) -> np.ndarray:
    """The log-probs of these ids, from the distributions `[tokens, V]` before them."""
    return logprobs[np.arange(len(ids)), ids]


def pairing(rows: Rows, k: int | None = None) -> Pairing:
    """The rows as objectives read them, with the teacher's top `k` (all of its ids, when None)."""
    top_ids, top_logprobs, rest, actual = [], [], [], []
    k = min(k or rows.teacher.size, rows.teacher.size)
    for ids, table in zip(rows.teacher_ids, rows.t, strict=True):
        for i, logprobs in zip(ids, table, strict=True):
            best = np.argsort(-logprobs, kind="stable")
            top_ids.append(best[:k])
            top_logprobs.append(logprobs[best[:k]])
            rest.append(np.logaddexp.reduce(logprobs[best[k:]]) if k < len(best) else -np.inf)
            event = rows.teacher.stop_ids if i in rows.teacher.stop_ids else [i]
            actual.append(np.logaddexp.reduce(logprobs[event]))
    tokens = len(top_ids)
    sides = []
    for toy, ids in ((rows.student, rows.student_ids), (rows.teacher, rows.teacher_ids)):
        bodies = [row[: len(row) - stop] for row, stop in zip(ids, rows.stops, strict=True)]
        flat = np.array([i for row in bodies for i in row], np.int64)
        sides += [toy.lengths[flat], offsets_of(np.array([len(row) for row in bodies]))]
    stops = np.array(rows.stops)
    units = align(*sides, stops)
    return Pairing(
        np.array([i for row in rows.student_ids for i in row], np.int64),
        offsets_of(np.array([len(row) for row in rows.student_ids])),
        np.array([i for row in rows.teacher_ids for i in row], np.int64),
        offsets_of(np.array([len(row) for row in rows.teacher_ids])),
        stops,
        np.array(actual),
        np.concatenate(top_ids),
        np.concatenate(top_logprobs),
        np.arange(tokens + 1) * k,
        np.array(rest, np.float64),
        units,
        np.concatenate([unit_sums(units, row, given) for row, given in enumerate(rows.behaviour or [None] * len(stops))]),
    )


def unit_sums(units: Units, row: int, logprobs: np.ndarray | None) -> np.ndarray:
    """Σ of the log-probs of each of a row's units in student tokens; NaN where there are none."""
    ends = units.student_ends[units.offsets[row] : units.offsets[row + 1]].tolist()
    bounds = pairwise([0, *ends])
    return np.array([np.nan if logprobs is None else logprobs[start:end].sum() for start, end in bounds])


def training_table(objective: ObjectiveModule, paired: Pairing, rows: Rows) -> pa.Table:
    """What `tasks.training.batches` reads of the rows: aligned columns beside the rollouts' ids."""
    columns = {
        **objective.project(paired).columns(),
        "prompt_token_ids": pa.array([[0]] * paired.rows, ROLLOUTS.field("prompt_token_ids").type),
        "token_ids": pa.array(rows.student_ids, ROLLOUTS.field("token_ids").type),
    }
    for name in ("term_inside", "term_behaviour", "unmatched_counts", "unmatched_logprobs"):
        columns.setdefault(name, pa.nulls(paired.rows, ALIGNED.field(name).type))
    return pa.table(columns)


def terms_of(objective: ObjectiveModule, rows: Rows, k: int | None = None) -> tuple[slice, Terms]:
    """All terms of the rows as one chunk, and the student's positions that it reads."""
    batch = collate(training_table(objective, pairing(rows, k), rows), 0, torch.device("cpu"))
    (found,) = batch.chunks(10**9)
    return found.at, found.terms


def losses(objective: ObjectiveModule, rows: Rows, k: int | None = None, s: torch.Tensor | None = None) -> torch.Tensor:
    """Loss of every term, from the rows' own distributions or from log-probs `s` `[all tokens, V_S]`."""
    span, terms = terms_of(objective, rows, k)
    return objective((torch.from_numpy(np.concatenate(rows.s)) if s is None else s)[span], terms)


class StubEncoder:
    """Stands for a tokenizer whose canonical encoding is one letter a token."""

    def __init__(self, toy: Vocabulary):
        self.by_letter = {value: i for i, value in reversed(list(enumerate(toy.beta.values))) if value and len(value) == 1}

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [[self.by_letter.get(bytes([byte]), -1) for byte in text.encode()] for text in texts]


@dataclass
class ToySide:
    """A model's text side as the align stage uses it, around a toy vocabulary."""

    vocabulary: Vocabulary

    @property
    def stop_ids(self) -> list[int]:
        return self.vocabulary.stop_ids

    @property
    def beta(self) -> TokenBytes:
        return self.vocabulary.beta

    @property
    def encoder(self) -> StubEncoder:
        return StubEncoder(self.vocabulary)


def floored_jsd(t: Sequence[float] | np.ndarray, s: Sequence[float] | np.ndarray, beta: float) -> float:
    """JSD_β by its definition, from masses; what one side calls impossible costs the other 20 nats, not infinity."""
    masses_t, masses_s = np.asarray(t, float), np.asarray(s, float)
    floor = np.exp(-20)

    def kl(p: np.ndarray, q: np.ndarray) -> float:
        return float((p * (np.log(np.maximum(p, floor)) - np.log(np.maximum(q, floor)))).sum())

    if beta in (0, 1):
        return kl(masses_t, masses_s) if beta == 0 else kl(masses_s, masses_t)
    mixture = beta * masses_t + (1 - beta) * masses_s
    return beta * kl(masses_t, mixture) + (1 - beta) * kl(masses_s, mixture)


def with_student(rows: Rows, logprobs: list[np.ndarray]) -> Rows:
    return replace(rows, s=logprobs)


# -- small real tokenizers -------------------------------------------------------------------------------------------------


@cache
def byte_level(vocab_size: int = 330, other: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as for a new student."""
    return train_tokenizer(Scratch(vocab_size=vocab_size), OTHER_TEXTS if other else TEXTS)


MERGES = [
    ("▁", "t"), ("h", "e"), ("▁t", "he"), ("a", "t"), ("▁", "a"), ("▁", "▁"), ("▁", "c"), ("▁c", "at"), ("i", "n"), ("s", "at"),
    ("\n", "▁"), ("é", "e"), ("o", "n"), ("▁", "the"), ("r", "e"), ("c", "af"), ("▁", "é"),
]  # fmt: skip
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIALS = ["<unk>", "<s>", "</s>"]


def _finished(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in SPECIALS])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@cache
def sentencepiece_bpe(prepend: bool = True, line_ends: bool = False) -> PreTrainedTokenizerFast:
    """As Llama 2's: `▁` for a space, a dummy one in front (when `prepend`), bytes for unknown characters."""
    merges = [pair for pair in MERGES if pair[0] in ("▁", "h", "a", "i", "s", "o", "r", "▁t", "▁c", "\n", "é")]
    merges += [("\n", "\n"), (":", ":")] * line_ends
    pieces = [*SPECIALS, *BYTE_PIECES, *dict.fromkeys("▁thecasinorfd.,:é\nA")]
    pieces += [left + right for left, right in merges if left + right not in pieces]
    merges = [(left, right) for left, right in merges if left in pieces and right in pieces]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prepend else spaces
    return _finished(tokenizer)


@cache
def sentencepiece_unigram() -> PreTrainedTokenizerFast:
    """As T5's or XLM's, with byte fallback: Metaspace in front of a Unigram model."""
    words = ["▁the", "▁", "he", "▁a", "▁cat", "at", "sat", "in", "▁▁", "é", "A", *"thecasinorfd.,:"]
    scores = [(piece, 0.0) for piece in SPECIALS] + [(piece, -20.0) for piece in BYTE_PIECES]
    scores += [(piece, -1.0 - 0.3 * i - 4.0 * (len(piece) == 1)) for i, piece in enumerate(dict.fromkeys(words))]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    return _finished(tokenizer)


# -- small real models, in folders as a run has them -----------------------------------------------------------------------

STUDENT_SHAPE = Scratch(vocab_size=320, layers=1, width=16, heads=2, feed_forward=32, context=160)
TEACHER_SHAPE = Scratch(vocab_size=300, layers=2, width=24, heads=2, feed_forward=32, context=160)


@cache
def _folder() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="potstill-property-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def saved(name: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, stop_ids: list[int]) -> ModelRef:
    """The model in a folder of its own, and the reference that stages use it by."""
    model.generation_config = GenerationConfig(eos_token_id=stop_ids)
    model.save_pretrained(_folder() / name)
    tokenizer.save_pretrained(_folder() / name)
    return ModelRef(str(_folder() / name), digest=name, dtype="float32", device="cpu")


def sharp_model(shape: Scratch, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Fresh weights, scaled so that its distributions are far from uniform."""
    model = init_model(shape, tokenizer, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(20 if parameter.shape[0] == len(tokenizer) else 5)
    return model.eval()


@cache
def student_ref() -> ModelRef:
    tokenizer = train_tokenizer(STUDENT_SHAPE, TEXTS)
    return saved("student", sharp_model(STUDENT_SHAPE, tokenizer, 1), tokenizer, [tokenizer.eos_token_id])


@cache
def teacher_ref() -> ModelRef:
    """Another tokenizer, and several ids that end a completion."""
    tokenizer = train_tokenizer(TEACHER_SHAPE, OTHER_TEXTS)
    stops = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["<user>", "<system>"])]
    return saved("teacher", sharp_model(TEACHER_SHAPE, tokenizer, 2), tokenizer, stops)


@cache
def twin_ref() -> ModelRef:
    """A teacher with the student's tokenizer, and a head padded with seven rows that are no ids."""
    tokenizer = train_tokenizer(STUDENT_SHAPE, TEXTS)
    model = sharp_model(STUDENT_SHAPE, tokenizer, 3)
    model.resize_token_embeddings(len(tokenizer) + 7, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[-7:] = 2.0  # were they ids, they would have mass
    return saved("twin", model, tokenizer, [tokenizer.eos_token_id])


def full_logprobs(model: LlamaForCausalLM, ids: list[int], size: int) -> torch.Tensor:
    """float64 `[tokens, size]` of one unpadded sequence, by a plain forward pass: row i is the law of token i + 1."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, :, :size].double().log_softmax(-1)


def rollouts_table(
    prompts: list[list[int]],
    completions: list[list[int]],
    own: Side,
    texts: list[str] | None = None,
    logprobs: Sequence[np.ndarray | None] | None = None,
) -> pa.Table:
    """Rollouts with these ids; the texts are the longest valid ones that the ids spell, unless given.

    `logprobs` are those of the ids under the policy that sampled them; None: it did not.
    """
    stops = set(own.stop_ids)
    records = []
    for number, (prompt, ids) in enumerate(zip(prompts, completions, strict=True)):
        stopped = bool(ids) and ids[-1] in stops
        text = valid_prefix(spelled(own.vocabulary, ids)) if texts is None else texts[number]
        records.append(
            {
                "rollout_id": f"r{number}",
                "prompt_id": "p",
                "prompt_token_ids": prompt,
                "token_ids": ids,
                "logprobs": None if logprobs is None else logprobs[number],
                "text": text,
                "finish_reason": "stop" if stopped else "length",
            }
        )
    return pa.Table.from_pylist(records, ROLLOUTS)


def spelled(toy: Vocabulary, ids: Sequence[int]) -> bytes:
    """The bytes of ids up to the first id that has none (a stop or a control token)."""
    data = b""
    for i in ids:
        if toy.beta.values[i] is None:
            break
        data += toy.beta.values[i]
    return data


def valid_prefix(data: bytes) -> str:
    """The longest prefix that is valid UTF-8, found by trying them all."""
    for end in range(len(data), -1, -1):
        try:
            return data[:end].decode()
        except UnicodeDecodeError:
            continue
    raise AssertionError("the empty prefix is valid")


def scores_of(results: list, completions: list[list[int] | None]) -> pa.Table:
    """A scores table from an engine's results, in order; rows with None for ids are dropped ones."""
    records = []
    for number, ids in enumerate(completions):
        if ids is None:
            records.append({"rollout_id": f"r{number}", "status": "lossy_text"})
            continue
        s = results.pop(0)
        records.append(
            {
                "rollout_id": f"r{number}",
                "token_ids": ids,
                "logprobs": s.logprobs,
                **{name: values.reshape(-1) for name, values in s.columns.items()},
                "status": "ok",
            }
        )
    return pa.Table.from_pylist(records, SCORES)


def topk_scores(logprobs: np.ndarray, ids: np.ndarray, top: np.ndarray, counts: np.ndarray, rest: np.ndarray) -> TokenScores:
    """What an engine gives for the signal `topk`: `counts[j]` of the flat `ids` and their log-probs `top` for token j."""
    return TokenScores(logprobs, {"top_ids": ids, "top_logprobs": top, "top_counts": counts, "rest": rest})

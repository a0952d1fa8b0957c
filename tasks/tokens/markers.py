"""Control tokens inside an answer, and what the other side has in their place (MATHS.md §3).

A *spelling* is a text with one character per byte (Latin-1) and one per id without bytes. So a marker, which may be tokens,
text or both, is a part of it, and is found however the text around it was split.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np

from tasks.tokens.ragged import Flat, rows_of
from tasks.tokens.token_bytes import Encoder, TokenBytes, decode_valid

CONTROL = 256  # ids without bytes are the characters from here on


def spell(beta: TokenBytes, ids: Iterable[int]) -> str:
    """The spelling of ids."""
    return "".join(piece.decode("latin-1") if (piece := beta.pieces[i]) else chr(CONTROL + i) for i in ids)


class Part(IntEnum):
    """What a part of an answer is."""

    TEXT = 0
    MARKER = 1
    SKIPPED = 2  # an unpaired control token, which the other side does not read


@dataclass(frozen=True)
class Answer:
    """An answer in parts, one after another, as far as the other side reads it."""

    kinds: list[Part]
    spelled: list[str]  # each part, on its own side
    other: list[str]  # and on the other
    ids: list[list[int]]  # of markers on the other side, else empty
    limit: int  # characters up to the control token that ended it, or to the end
    whole: bool  # whether its parts are all of it

    @property
    def paired(self) -> bool:
        """Whether the other side reads all of it."""
        return self.whole and Part.SKIPPED not in self.kinds

    def places(self, ends: np.ndarray, *, other: bool) -> np.ndarray:
        """Where tokens end in a measure that both sides share, int64 `[tokens]`; `ends` are theirs in their side's spelling.

        Text counts by its bytes. A marker is longer than on either side, and inside it the ends of both sides never meet.
        """
        own, theirs = (np.array([len(text) for text in side], np.int64) for side in (self.spelled, self.other))
        text = np.array(self.kinds, np.int64) == Part.TEXT
        widths = np.where(text, own, own + theirs) * (theirs > 0)
        lengths = theirs if other else own
        # One more part: what a cut character leaves of its text, which the other side does not have.
        lengths, widths = np.append(lengths, np.iinfo(np.int32).max), np.append(widths, np.iinfo(np.int32).max)
        stops = np.cumsum(lengths)
        part = np.searchsorted(stops, ends, side="left")
        inside = ends - (stops - lengths)[part]
        shift = np.append(np.where(text, 0, own - 1), 0) if other else np.zeros(len(lengths), np.int64)
        begins = np.cumsum(widths) - widths
        where: np.ndarray = begins[part] + np.where(inside == lengths[part], widths[part], inside + shift[part])
        return where

    def holds(self, starts: np.ndarray, ends: np.ndarray, kind: Part) -> np.ndarray:
        """bool `[tokens]`: whether a token, from `starts` to `ends` in its own side's spelling, has to do with such a part."""
        stops = np.cumsum([len(text) for text in self.spelled], dtype=np.int64)
        mine = np.append(0, np.cumsum([part == kind for part in self.kinds]))  # parts of this kind before each part
        first = np.searchsorted(stops, starts, side="right")
        last = np.minimum(np.searchsorted(stops, ends, side="left") + 1, len(self.kinds))
        found: np.ndarray = mine[np.maximum(last, first)] > mine[first]
        return found


@dataclass(frozen=True)
class Path:
    """A marker on one side."""

    spelling: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Markers:
    """The markers that a recipe pairs, read on one side, and what becomes of other control tokens.

    With one tokenizer on both sides (`same`) every control token is its own counterpart.
    """

    pairs: tuple[tuple[Path, Path], ...] = ()  # as they are read, and on the other side
    skip: bool = False
    same: bool = False

    def turned(self) -> "Markers":
        """The same pairs, read on the other side."""
        return Markers(tuple((other, own) for own, other in self.pairs), self.skip, self.same)

    @cached_property
    def texts(self) -> list[str]:
        """The markers that are text alone."""
        texts = (own.spelling for own, _ in self.pairs if max(own.spelling) < chr(CONTROL))
        return [text.encode("latin-1").decode() for text in texts]

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        """Any marker, the longest first, or any other control token."""
        longest = sorted((own.spelling for own, _ in self.pairs), key=len, reverse=True)
        return re.compile("|".join([*map(re.escape, longest), f"[^\x00-{chr(CONTROL - 1)}]"]))

    def read(self, spelling: str) -> Answer:
        """Cut an answer, without its stop, into parts."""
        known = {own.spelling: other for own, other in self.pairs}
        kinds, own, other, ids = list[Part](), list[str](), list[str](), list[list[int]]()

        def add(kind: Part, mine: str, theirs: str, path: Iterable[int] = ()) -> None:
            kinds.append(kind)
            own.append(mine)
            other.append(theirs)
            ids.append(list(path))

        at = 0
        for found in [*self._pattern.finditer(spelling), None]:
            limit = len(spelling) if found is None else found.start()
            text = spelling[at:limit]
            if valid := decode_valid(text.encode("latin-1")).encode().decode("latin-1"):
                add(Part.TEXT, valid, valid)
            if valid != text or found is None:
                return Answer(kinds, own, other, ids, limit, found is None and valid == text)
            token, at = found[0], found.end()
            if token in known:
                add(Part.MARKER, token, known[token].spelling, known[token].ids)
            elif self.same:
                add(Part.MARKER, token, token, [ord(token) - CONTROL])
            elif self.skip:
                add(Part.SKIPPED, token, "")
            else:
                return Answer(kinds, own, other, ids, limit, False)
        raise AssertionError("the last part returns")

    def find(self, texts: Sequence[str], ids: Flat, beta: TokenBytes, stop_ids: Sequence[int]) -> dict[int, Answer]:
        """By row, the answers with markers or control tokens. Of the others `texts` has all that can be read.

        `ids` are those of all rows; a stop at a row's end is no part of its answer.
        """
        values, offsets = ids
        bounds, row = offsets[1:].copy(), rows_of(offsets)
        some = np.diff(offsets) > 0
        bounds[some] -= np.isin(values[bounds[some] - 1], stop_ids)
        control = (beta.lengths[values] == 0) & (np.arange(len(values)) < bounds[row])
        rows = {*row[control].tolist()}
        if self.texts:
            rows |= {n for n in np.flatnonzero(some).tolist() if any(marker in texts[n] for marker in self.texts)}
        return {n: self.read(spell(beta, values[offsets[n] : bounds[n]].tolist())) for n in sorted(rows)}


NO_MARKERS = Markers()
ONE_TOKENIZER = Markers(same=True)


def translate(answers: Sequence[Answer], encoder: Encoder) -> list[list[int] | None]:
    """Each answer in the ids of the other side, by its `encoder`: text between markers by itself, markers by their own ids.

    None where a text cannot be spelled there.
    """
    texts = [[bytes_of(text) for text, kind in zip(a.other, a.kinds, strict=True) if kind == Part.TEXT] for a in answers]
    encoded = iter(encoder.encode([text for row in texts for text in row]))
    result: list[list[int] | None] = []
    for answer in answers:
        parts = [next(encoded) if k == Part.TEXT else ids for k, ids in zip(answer.kinds, answer.ids, strict=True)]
        result.append(None if None in parts else [i for part in parts if part is not None for i in part])
    return result


def bytes_of(spelling: str) -> str:
    """The text of a part that is text."""
    return spelling.encode("latin-1").decode()

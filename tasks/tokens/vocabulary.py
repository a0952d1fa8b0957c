"""Two vocabularies side by side: which ids mean the same bytes, and the byte-sorted order (MATHS.md §2)."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tasks.tokens.token_bytes import BYTE_TOKEN, TokenBytes


class Vocabulary:
    """A vocabulary's bytes, the classes of ids that share them, and the ids sorted by bytes.

    In byte order the tokens that start with a given prefix are one range `[low, high)`, and those that equal it
    come first in the range.
    """

    def __init__(self, beta: TokenBytes, stop_ids: list[int], pieces: list[str]):
        self.beta, self.stop_ids, self.size = beta, sorted(stop_ids), len(beta.values)
        self.lengths = beta.lengths
        self.representative = self._representatives(pieces)

    def same_as(self, other: "Vocabulary") -> bool:
        """Whether both use the same ids for the same bytes and roles, so that ids can be passed on as they are."""
        return self.beta == other.beta and self.stop_ids == other.stop_ids

    def _representatives(self, pieces: list[str]) -> np.ndarray:
        """int32 `[V]`: the id that stands for each id's class. Stop ids are one class; ids without bytes stand alone."""
        representative = np.arange(self.size, dtype=np.int32)
        first: dict[bytes, int] = {}
        # `A` stands for `<0x41>`: byte tokens come last, and otherwise the lower id wins.
        for i in sorted(range(self.size), key=lambda i: (BYTE_TOKEN.fullmatch(pieces[i]) is not None, i)):
            value = self.beta.values[i]
            if value is not None:
                representative[i] = first.setdefault(value, i)
        representative[self.stop_ids] = self.stop_ids[0]
        self.by_bytes = first
        return representative

    @cached_property
    def duplicates(self) -> np.ndarray:
        """Ids that another id stands for, int64."""
        return np.flatnonzero(self.representative != np.arange(self.size))

    @cached_property
    def order(self) -> np.ndarray:
        """Ids with bytes, sorted by them; int64."""
        return np.array([i for _, i in sorted((v, i) for i, v in enumerate(self.beta.values) if v is not None)], np.int64)

    @cached_property
    def flat(self) -> np.ndarray:
        """All tokens' bytes one after another, uint8; `starts[i]` is where id i's begin."""
        return np.frombuffer(b"".join(self.beta.pieces), np.uint8)

    @cached_property
    def starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])[:-1]

    @cached_property
    def rank(self) -> np.ndarray:
        """Place of each id in `order`, int64 `[V]`; -1 for ids without bytes."""
        rank = np.full(self.size, -1, np.int64)
        rank[self.order] = np.arange(len(self.order))
        return rank

    @cached_property
    def prefix_ranges(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For byte r of id i, at `starts[i] + r`: the range of tokens that share i's first r + 1 bytes."""
        low, equal, high = (np.zeros(len(self.flat), np.int64) for _ in range(3))
        lengths = self.lengths[self.order]
        members = np.arange(len(self.order))  # places in `order` of the tokens longer than r
        fresh = np.zeros(len(members), bool)  # does a member differ from the one before it in its first r bytes?
        for r in range(int(lengths.max(initial=0))):
            keep = lengths[members] > r
            groups = np.maximum.accumulate(np.where(fresh, np.arange(len(members)), -1))  # by the first r bytes
            members, group = members[keep], groups[keep]
            at = self.starts[self.order[members]] + r
            byte = self.flat[at]
            fresh = np.ones(len(members), bool)
            fresh[1:] = (group[1:] != group[:-1]) | (byte[1:] != byte[:-1])
            first = np.flatnonzero(fresh)
            sizes = np.diff(np.append(first, len(members)))
            exact = np.add.reduceat(lengths[members] == r + 1, first) if len(first) else first
            low[at] = np.repeat(members[first], sizes)
            high[at] = np.repeat(members[first] + sizes, sizes)
            equal[at] = np.repeat(members[first] + exact, sizes)
        return low, equal, high

    def prefix_range(self, ids: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where, in `order`, the tokens lie that start with the first `count` (>= 1) bytes of `ids`.

        Returns low, equal, high: `[low, equal)` are those bytes exactly, `[equal, high)` go on.
        """
        low, equal, high = self.prefix_ranges
        at = self.starts[ids] + count - 1
        return low[at], equal[at], high[at]

    def byte_at(self, ids: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Byte `index` of each id, uint8; the caller knows that the ids are that long."""
        byte: np.ndarray = self.flat[self.starts[ids] + index]
        return byte


@dataclass(frozen=True)
class Matching:
    """`ids[i]`: the id of the other vocabulary that stands for the same class as i, or -1; `prefix[i]`: φ(i), or -1."""

    ids: np.ndarray
    prefix: np.ndarray


def match(vocabulary: Vocabulary, other: Vocabulary) -> Matching:
    """For each id of `vocabulary`: the same bytes (or the stop) in `other`, and the longest token of `other` that begins it."""
    ids = np.full(vocabulary.size, -1, np.int32)
    prefix = np.full(vocabulary.size, -1, np.int32)
    for i, value in enumerate(vocabulary.beta.values):
        if value is None:
            continue
        ids[i] = other.by_bytes.get(value, -1)
        for length in range(len(value), 0, -1):
            if (found := other.by_bytes.get(value[:length])) is not None:
                prefix[i] = found
                break
    ids[vocabulary.stop_ids] = other.stop_ids[0]
    return Matching(ids, prefix)


def match_to_student(*, student: Vocabulary, teacher: Vocabulary) -> np.ndarray:
    """int32 `[V_T]`: the student id that stands for each teacher id's class, or -1. Every stop id goes to the one stop.

    With one vocabulary ids without bytes stand for themselves, too.
    """
    return student.representative if student.same_as(teacher) else match(teacher, student).ids


@dataclass(frozen=True)
class Overlap:
    """How many byte strings are tokens of each vocabulary, and of both."""

    student: int
    teacher: int
    shared: int

    @property
    def jaccard(self) -> float:
        return self.shared / (self.student + self.teacher - self.shared)


def count_overlap(*, student: Vocabulary, teacher: Vocabulary) -> Overlap:
    return Overlap(len(student.by_bytes), len(teacher.by_bytes), len(student.by_bytes.keys() & teacher.by_bytes.keys()))


def describe_overlap(*, student: Vocabulary, teacher: Vocabulary) -> str:
    both = count_overlap(student=student, teacher=teacher)
    return (
        f"{both.shared} tokens shared by bytes: {both.shared / both.student:.1%} of the student's {both.student}, "
        f"{both.shared / both.teacher:.1%} of the teacher's {both.teacher} (Jaccard {both.jaccard:.3f})"
    )

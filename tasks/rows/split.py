"""How rows are split into training and held-out prompts, and the account of what became of each of them."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import floor, inf
from typing import Any

import pyarrow as pa

from storage.lineage import digest_json
from storage.schemas import ACCOUNTS, prompts_schema
from tasks.models.template import Message
from tasks.rows.messages import MORE, Fields, Refused, store_messages
from tasks.rows.trajectories import Trajectory

TRAIN, EVAL, LEFT, TWICE, OTHER = "to train on", "held out", "left over", "duplicates", "duplicates with another reference"
UNREAD, UNTAKEN, BARRED, LOST, CLOSED, TOO_LONG = (
    f"refused: {reason}"
    for reason in (
        "cannot be read", "no teacher takes it", "by a chat template", "not rendered whole", "ends in a stop",
        "too long for a context",
    )
)  # fmt: skip
OUTCOMES = (TRAIN, EVAL, LEFT, TWICE, OTHER, UNREAD, UNTAKEN, BARRED, LOST, CLOSED, TOO_LONG)


@dataclass(frozen=True)
class SourceRow:
    """One row as it was read."""

    source: str  # a path of the recipe, a dataset, a task
    read_as: str
    messages: list[Message]
    reference: str | None
    metadata: str  # JSON
    tools: str | None = None  # JSON
    weight: float | None = None  # of its source
    place: str = ""  # where it stands, for messages about it
    trajectory: Trajectory | None = None  # where a row is one turn of a conversation

    @property
    def fields(self) -> Fields:
        """What a side's template may name."""
        return Fields(self.messages, self.reference, self.metadata)

    @cached_property
    def prompt_id(self) -> str:
        """What the prompt is, whatever its answer."""
        asked: Any = self.messages if self.tools is None else [self.messages, self.tools]
        return digest_json(asked)[:16]


@dataclass(frozen=True)
class Refusal:
    """Why a row is left out."""

    outcome: str
    why: str  # with its place


@dataclass(frozen=True)
class RefusedRow:
    """A row that could not be read."""

    source: str
    read_as: str
    refusal: Refusal


Judge = Callable[[SourceRow], Refusal | None]  # whether the models of a recipe can use a row


def accept_all(_: SourceRow) -> None:
    return None


@dataclass
class Split:
    """Training and held-out prompts, each in the order in which they were read, and the outcome of every row."""

    train: list[SourceRow] = field(default_factory=list)
    eval: list[SourceRow] = field(default_factory=list)
    rows: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    without: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    refusals: dict[str, str] = field(default_factory=dict)  # by outcome, why the first row was refused

    def refuse(self, source: str, read_as: str, refusal: Refusal) -> None:
        self.rows[source, read_as, refusal.outcome] += 1
        self.refusals.setdefault(refusal.outcome, refusal.why)

    def count(self, row: SourceRow, outcome: str) -> None:
        key = (row.source, row.read_as, outcome)
        self.rows[key] += 1
        self.without[key] += row.reference is None

    def tables(self) -> dict[str, pa.Table]:
        both = {"train": self.train, "eval": self.eval}
        fields = {key for rows in both.values() for row in rows for message in row.messages for key in message}
        every = [row for rows in both.values() for row in rows]
        tools, turns = any(row.tools is not None for row in every), any(row.trajectory is not None for row in every)
        schema = prompts_schema(tuple(name for name in MORE if name in fields), tools, turns)
        return {split: pa.Table.from_pylist([record_of(row, split) for row in rows], schema) for split, rows in both.items()}

    def account(self) -> pa.Table:
        columns = [
            {"source": source, "read_as": read_as, "outcome": outcome, "rows": rows, "without_reference": self.without[key]}
            for key, rows in sorted(self.rows.items(), key=lambda item: OUTCOMES.index(item[0][2]))
            for source, read_as, outcome in [key]
        ]
        return pa.Table.from_pylist(columns, ACCOUNTS)


def split_stream(rows: Iterable[SourceRow], train: int, held_out: int) -> Split:
    """Of an endless supply: each prompt goes to the side that its hash says, until both sides are full."""
    split, seen, share = Split(), set(), held_out / (held_out + train)
    for row in rows:
        identity = row.prompt_id
        if identity in seen:
            split.count(row, TWICE)
            continue
        seen.add(identity)
        outcome = EVAL if int(identity, 16) / 16**16 < share else TRAIN
        side, wanted = (split.eval, held_out) if outcome == EVAL else (split.train, train)
        if len(side) < wanted:
            side.append(row)
            split.count(row, outcome)
        elif len(split.eval) == held_out and len(split.train) == train:
            break
        else:
            split.count(row, LEFT)
    return _whole(split, len(seen))


def split_table(rows: Iterable[SourceRow | RefusedRow], train: int | None, held_out: int, judge: Judge = accept_all) -> Split:
    """Of a table: the hash of a prompt gives its place in an order, the numbers cut it; what `judge` refuses has no place.

    The turns of a conversation have one place, so that what is held out is in no prompt that is trained on. The first are held
    out and the last trained on, so that a prompt which later rows push out of the held-out ones is left over before it is
    trained on. Where there are fewer than both numbers, they are shared in that proportion; with
    `train` left out at most half are held out.
    """
    split = Split()
    found: dict[str, SourceRow] = {}
    for row in rows:
        if isinstance(row, RefusedRow):
            split.refuse(row.source, row.read_as, row.refusal)
            continue
        first = found.setdefault(row.prompt_id, row)
        if first is not row:
            split.count(row, TWICE if row.reference == first.reference else OTHER)
    for identity, row in list(found.items()):
        if refusal := judge(row):
            split.refuse(row.source, row.read_as, refusal)
            del found[identity]
    places = {identity: row.trajectory.id if row.trajectory else identity for identity, row in found.items()}
    order = sorted(found, key=lambda identity: (places[identity], identity))
    cut = min(held_out, max(1, len(order) * held_out // (held_out + (train or held_out))))
    while 0 < cut < len(order) and places[order[cut]] == places[order[cut - 1]]:
        cut += 1
    rest = [found[identity] for identity in reversed(order[cut:])]
    outcomes = dict.fromkeys(order, LEFT) | dict.fromkeys(order[:cut], EVAL)
    outcomes |= {row.prompt_id: TRAIN for row in _choose(rest, train)}
    for identity, row in found.items():
        split.count(row, outcomes[identity])
        if outcomes[identity] != LEFT:
            (split.eval if outcomes[identity] == EVAL else split.train).append(row)
    return _whole(split, len(order))


def _choose(rows: list[SourceRow], train: int | None) -> list[SourceRow]:
    """The first `train` rows; where sources have weights, as many as these shares leave, each source's first ones."""
    if all(row.weight is None for row in rows):
        return rows[:train]
    sources: dict[str, list[SourceRow]] = {}
    for row in rows:
        sources.setdefault(row.source, []).append(row)
    weights = [1.0 if given[0].weight is None else given[0].weight for given in sources.values()]
    counts = share_counts(weights, [len(given) for given in sources.values()], train)
    return [row for given, count in zip(sources.values(), counts, strict=True) for row in given[:count]]


def share_counts(weights: Sequence[float], there: Sequence[int], most: int | None) -> list[int]:
    """The largest counts in proportion to the weights, of so many that are there, that add up to `most` at most."""
    whole = sum(weights)
    total = min(inf if most is None else most, *(floor(n * whole / weight + 1e-9) for n, weight in zip(there, weights)))
    exact = [total * weight / whole for weight in weights]
    counts = [floor(part + 1e-9) for part in exact]
    nearest = sorted(range(len(counts)), key=lambda i: counts[i] - exact[i])
    for i in nearest[: int(total) - sum(counts)]:
        counts[i] += counts[i] < there[i]
    return counts


def _whole(split: Split, distinct: int) -> Split:
    for name, rows in (("train", split.train), ("eval", split.eval)):
        if not rows:
            first = "".join(f"; {why}" for why in list(split.refusals.values())[:1])
            raise Refused(
                f"only {distinct} distinct prompts{' can be used' * bool(first)}, none of them for {name}; give more{first}"
            )
    return split


def record_of(row: SourceRow, split: str) -> dict[str, Any]:
    """A row of the table `prompts`."""
    given: dict[str, Any] = {"reference": row.reference, "metadata": row.metadata, "tools": row.tools}
    if row.trajectory is not None:
        given |= {"trajectory_id": row.trajectory.id, "turn": row.trajectory.turn}
    return {"prompt_id": row.prompt_id, "messages": store_messages(row.messages), "split": split, **given}

"""Batches of tensors from committed shards: rows in a seeded order, one shard in memory at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from storage.artifacts import Artifact, read_table
from storage.schemas import TEACHER
from tasks.objectives.base import Terms
from tasks.tokens.ragged import expand, flat, offsets_of, rows_of
from tasks.training import rewarded
from tasks.training.rewarded import Rewarded, read_kept

ROLLOUT_COLUMNS = ["prompt_token_ids", "token_ids"]
ALIGNED_COLUMNS = [
    "status", "units", "term_starts", "term_ends", "term_inside", "term_behaviour",
    "target_counts", "target_ids", "target_logprobs", "target_rest", "unmatched_counts", "unmatched_logprobs",
]  # fmt: skip


def optimizer_batches(
    shards: Sequence[tuple[Artifact, Artifact]],
    size: int,
    seed: int,
    rewards: Artifact | None = None,
    teachers: Sequence[str] = (),
) -> Iterator[pa.Table]:
    """Batches of `size` supervised rows (the last may be smaller) from (rollouts, aligned) shards.

    Shards come in a random order, and so do the rows within each. Rows without a term of the loss are left out; where `rewards`
    teach, an advantage is one. `teachers` are the names of several.
    """
    worth = read_kept(rewards) if rewards else None
    columns, of_aligned = ROLLOUT_COLUMNS + (rewarded.COLUMNS if rewards else []), ALIGNED_COLUMNS + [TEACHER] * bool(teachers)
    random = np.random.default_rng(seed)
    left: pa.Table | None = None
    for index in random.permutation(len(shards)):
        rollouts, aligned = shards[index]
        table = rows_to_train(read_table(rollouts, columns), read_table(aligned, of_aligned), worth, teachers)
        table = table.take(random.permutation(len(table)))
        if left is not None:
            table = pa.concat_tables([left, table])
        whole = len(table) // size * size
        for start in range(0, whole, size):
            yield table.slice(start, size)
        left = table.slice(whole)
    if left is not None and len(left):
        yield left


def rows_to_train(
    rollouts: pa.Table, aligned: pa.Table, rewards: pa.Table | None = None, teachers: Sequence[str] = ()
) -> pa.Table:
    """The rows of a shard that have a term of the loss, or an advantage by `rewards`, with the columns that `collate` reads.

    Of several `teachers`, the column `teacher` is the place of the row's own among their names.
    """
    table = aligned.select(ALIGNED_COLUMNS)
    if teachers:
        table = table.append_column("teacher", pc.index_in(aligned[TEACHER], pa.array(teachers, pa.string())))
    for name in ROLLOUT_COLUMNS:
        table = table.append_column(name, rollouts[name])
    taught = pc.greater(table["units"], 0)
    if rewards is not None:
        table = rewarded.add_advantages(table, rollouts, rewards)
        taught = pc.or_(taught, pc.not_equal(table["advantage"], 0))
    return table.filter(pc.and_(pc.equal(table["status"], "ok"), taught))


def row_lengths(table: pa.Table) -> np.ndarray:
    """Tokens of each row, prompt and completion, int64 `[rows]`."""
    prompts, tokens = (pc.list_value_length(table[name]).to_numpy() for name in ROLLOUT_COLUMNS)
    lengths: np.ndarray = prompts.astype(np.int64) + tokens
    return lengths


@dataclass(frozen=True)
class Chunk:
    """Terms that are read together."""

    at: slice  # their positions
    teacher: int  # which of several graded them all
    terms: Terms


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Rows of one forward pass. Positions are the completion tokens of all rows, flat; terms index into them."""

    ids: torch.Tensor  # [rows, time], padded on the right
    row: torch.Tensor  # [positions]
    time: torch.Tensor  # [positions]: where in `ids` the token stands; its distribution is one earlier
    actual: torch.Tensor  # [positions]
    tokens: int  # without padding
    teacher: np.ndarray  # [terms]: which of several teachers graded its row; terms of one teacher stand together
    starts: np.ndarray  # [terms], in positions
    ends: np.ndarray
    inside: np.ndarray
    counts: np.ndarray
    target_ids: np.ndarray
    target_logprobs: np.ndarray
    rest: np.ndarray
    behaviour: np.ndarray
    unmatched_counts: np.ndarray
    unmatched_logprobs: np.ndarray
    rewarded: Rewarded | None = None
    split: dict[int, list[Chunk]] = field(default_factory=dict)  # chunks that are made, by their positions

    def chunks(self, positions: int) -> list[Chunk]:
        """Split the terms into chunks of one teacher each that read at most `positions` positions, or one longer term."""
        if positions not in self.split:
            self.split[positions] = list(self._make_chunks(positions))
        return self.split[positions]

    def pinned(self) -> "MicroBatch":
        """The same, with the chunks that are made, where a GPU can copy it from while it computes."""
        return self._moved(torch.Tensor.pin_memory)

    def on(self, device: torch.device) -> "MicroBatch":
        """The same on a device; the host does not wait for a copy from pinned memory."""
        return self if device == self.ids.device else self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def _moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "MicroBatch":
        def moved(terms: Terms) -> Terms:
            return Terms(**{part.name: move(getattr(terms, part.name)) for part in fields(terms)})

        whole: dict[str, Any] = {name: move(getattr(self, name)) for name in ("ids", "row", "time", "actual")}
        chunks = {
            positions: [replace(chunk, terms=moved(chunk.terms)) for chunk in made] for positions, made in self.split.items()
        }
        return replace(self, **whole, split=chunks, rewarded=self.rewarded.moved(move) if self.rewarded else None)

    def _make_chunks(self, positions: int) -> Iterator[Chunk]:
        events, unmatched = offsets_of(self.counts), offsets_of(self.unmatched_counts)
        borders = [*(np.flatnonzero(np.diff(self.teacher)) + 1), len(self.starts)]
        first = 0
        while first < len(self.starts):
            begin = int(self.starts[first])
            last = max(first + 1, int(np.searchsorted(self.ends, begin + positions, side="right")))
            last = min(last, next(border for border in borders if border > first))
            end = int(self.ends[last - 1])
            span = slice(first, last)
            yield Chunk(
                slice(begin, end),
                int(self.teacher[first]),
                Terms(
                    actual=self.actual[begin:end],
                    start=self._tensor(self.starts[span] - begin),
                    end=self._tensor(self.ends[span] - begin),
                    inside=self._tensor(self.inside[span]),
                    ids=self._padded(self.target_ids, events[first : last + 1], 0),
                    logprobs=self._padded(self.target_logprobs, events[first : last + 1], -np.inf),
                    rest=self._tensor(self.rest[span]),
                    behaviour=self._tensor(self.behaviour[span]),
                    unmatched=self._padded(self.unmatched_logprobs, unmatched[first : last + 1], -np.inf),
                ),
            )
            first = last

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        kind = torch.float32 if values.dtype.kind == "f" else torch.long
        return torch.tensor(values, dtype=kind, device=self.ids.device)

    def _padded(self, values: np.ndarray, bounds: np.ndarray, fill: float) -> torch.Tensor:
        counts = np.diff(bounds)
        padded = np.full((len(counts), max(int(counts.max(initial=0)), 1)), fill, values.dtype)
        places, owner = expand(np.zeros(len(counts), np.int64), counts)
        padded[owner, places] = values[bounds[0] : bounds[-1]]
        return self._tensor(padded)


def collate(table: pa.Table, pad_id: int, device: torch.device) -> MicroBatch:
    """Rows of an optimizer batch as one forward pass. Its input is the column `input_ids` if there is one, else `token_ids`."""
    several = "teacher" in table.column_names
    if several:
        table = table.take(pc.sort_indices(table["teacher"]))
    prompts, prompt_offsets = flat(table["prompt_token_ids"])
    tokens, token_offsets = flat(table["token_ids"])
    prompt_lengths, lengths = np.diff(prompt_offsets), np.diff(token_offsets)
    ids = np.full((len(table), int((prompt_lengths + lengths).max())), pad_id, np.int64)
    place, row = expand(np.zeros_like(prompt_lengths), prompt_lengths)
    ids[row, place] = prompts
    place, row = expand(prompt_lengths, prompt_lengths + lengths)
    ids[row, place] = flat(table["input_ids"])[0] if "input_ids" in table.column_names else tokens

    starts, term_offsets = flat(table["term_starts"])
    shift = token_offsets[rows_of(term_offsets)]
    none, zeros = np.zeros(0, np.float32), np.zeros(len(starts), np.int64)
    has_unmatched = table["unmatched_counts"].null_count == 0
    inside, behaviour = table["term_inside"], table["term_behaviour"]
    teacher = table["teacher"].to_numpy()[rows_of(term_offsets)] if several else zeros
    return MicroBatch(
        teacher=teacher,
        ids=torch.from_numpy(ids).to(device),
        row=torch.from_numpy(row).to(device),
        time=torch.from_numpy(place).to(device),
        actual=torch.tensor(tokens, dtype=torch.long, device=device),
        tokens=len(prompts) + len(tokens),
        starts=starts + shift,
        ends=flat(table["term_ends"])[0] + shift,
        inside=flat(inside)[0] if inside.null_count == 0 else zeros,
        counts=flat(table["target_counts"])[0].astype(np.int64),
        target_ids=flat(table["target_ids"])[0],
        target_logprobs=flat(table["target_logprobs"])[0],
        rest=flat(table["target_rest"])[0],
        behaviour=flat(behaviour)[0] if behaviour.null_count == 0 else np.zeros(len(starts), np.float32),
        unmatched_counts=flat(table["unmatched_counts"])[0].astype(np.int64) if has_unmatched else zeros,
        unmatched_logprobs=flat(table["unmatched_logprobs"])[0] if has_unmatched else none,
        rewarded=rewarded.collate_rewarded(table, device),
    )

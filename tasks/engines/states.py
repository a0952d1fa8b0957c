"""Scores from last hidden states: what every engine that has them shares. The model's head gives whole distributions."""

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch

from tasks.engines.base import TokenScores
from tasks.models.text import Side
from tasks.signals.base import SCORE_CHUNK, Chunk, Signal, copy_to_host, join_chunks, split_columns
from tasks.tokens.byte_laws import ByteLaws
from tasks.tokens.ragged import index_in_row, offsets_of


class StateScorer:
    """The head of a model, over states that its layers have made."""

    def __init__(self, side: Side, device: torch.device, head: Callable[[torch.Tensor], torch.Tensor]):
        """`head` gives logits `[positions, V]` of states `[positions, width]` on `device`, without padded rows."""
        self.side, self.device, self.head = side, device, head

    def score(self, hidden: torch.Tensor, completions: Sequence[Sequence[int]], signal: Signal) -> list[TokenScores]:
        """Scores of completions. `hidden`, `[tokens, width]`, has the states before each token of the one after the other."""
        ids = np.array([i for completion in completions for i in completion], np.int64)
        offsets = offsets_of(np.array([len(completion) for completion in completions]))
        actual, first = (torch.from_numpy(values).to(self.device) for values in (ids, index_in_row(offsets) == 0))
        columns = self._columns(hidden, actual, first, signal)
        logprobs = np.split(columns.pop("logprobs"), offsets[1:-1])
        return [TokenScores(*parts) for parts in zip(logprobs, split_columns(signal, columns, offsets[1:]), strict=True)]

    @torch.inference_mode()
    def _columns(
        self, hidden: torch.Tensor, actual: torch.Tensor, first: torch.Tensor, signal: Signal
    ) -> dict[str, np.ndarray]:
        """The signal's columns at flat positions, and `logprobs`, float32, in chunks; `first` marks a completion's first token.

        `hidden` is `[positions, width]`; `actual` (int64) and `first` (bool) are `[positions]`.
        """
        stops = torch.tensor(self.side.stop_ids, device=self.device)
        stopped = torch.isin(actual, stops)
        chunks = []
        for start in range(0, len(actual), SCORE_CHUNK):
            lead = min(start, 1)
            window, here = slice(start - lead, start + SCORE_CHUNK), slice(start, start + SCORE_CHUNK)
            chunk = Chunk(
                hidden=hidden[here],
                logits=self.head(hidden[window]),
                actual=actual[window],
                first=first[window],
                lead=lead,
                laws=lambda: self.laws,
                model=self.side.ref.path,
            )
            logits = chunk.logits[lead:]
            path = logits.gather(1, actual[here, None])[:, 0].float()
            path = torch.where(stopped[here], logits[:, stops].float().logsumexp(-1), path) - chunk.norm[lead:]
            chunks.append(copy_to_host({"logprobs": path, **signal.store(chunk)}))
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)  # the copies end
        return join_chunks(signal, chunks)

    @cached_property
    def laws(self) -> ByteLaws:
        """The module of next-byte laws of this model's vocabulary, on its device."""
        return ByteLaws(self.side.vocabulary).to(self.device)

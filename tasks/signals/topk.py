"""`topk`: the likeliest ids of the teacher, and the mass of the rest."""

import numpy as np
import pyarrow as pa
import torch

from tasks.signals.base import Chunk, Events, Reading, Signal, Top, keep_enough, read_events
from tasks.tokens.masses import find_likeliest

COLUMNS = ("top_ids", "top_logprobs", "top_counts")
SMALLEST_REST = 1e-7  # probability: mass that rounding can hide where float32 log-probs sum to 1


class TopkSignal(Signal):
    events = COLUMNS[:2]
    counts = COLUMNS[2]

    @property
    def top(self) -> int:  # type: ignore[override]
        return self.k

    def store(self, chunk: Chunk) -> dict[str, torch.Tensor]:
        logits, norm = chunk.logits[chunk.lead :], chunk.norm[chunk.lead :, None]
        top, ids = find_likeliest(logits, self.k)
        sparse = keep_enough(top - norm, ids, chunk.mass[chunk.lead :], self.top_p)
        return dict(zip((*COLUMNS, "rest"), sparse, strict=True))

    def store_top(self, top: Top, size: int, rows: int) -> dict[str, np.ndarray]:
        """Keep ids until `top_p` is reached; padded rows of the head are in the rest.

        The rest is what the returned ids leave of 1. It is at most the number of the other ids times the smallest returned
        probability.
        """
        returned = np.exp(top.logprobs.astype(np.float64))
        p = np.where(top.ids < size, returned, 0.0)
        keep = (np.cumsum(p, 1) - p < self.top_p) & (p > 0)
        most = (rows - top.ids.shape[1]) * returned[:, -1]
        outside = np.minimum(np.maximum(1 - returned.sum(1), SMALLEST_REST), most)
        with np.errstate(divide="ignore"):
            rest = np.log(np.where(keep, 0.0, returned).sum(1) + outside)
        return {
            "top_ids": top.ids[keep].astype(np.int32),
            "top_logprobs": top.logprobs[keep].astype(np.float16),
            "top_counts": keep.sum(1).astype(np.int16),
            "rest": rest.astype(np.float32),
        }

    def read(self, scores: pa.Table, reading: Reading) -> Events:
        return read_events(scores, reading.tokens, COLUMNS)

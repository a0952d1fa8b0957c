"""`bytes`: the teacher's next-byte law at its token boundaries, covers applied. It fits any student's tokenizer."""

import pyarrow as pa
import torch

from tasks.signals.base import Chunk, Events, Reading, Signal, keep_likeliest, read_events
from tasks.tokens.byte_laws import REST, boundary_laws

COLUMNS = ("law_classes", "law_logprobs", "law_counts")


class BytesSignal(Signal):
    events = COLUMNS[:2]
    counts = COLUMNS[2]

    def store(self, chunk: Chunk) -> dict[str, torch.Tensor]:
        laws = boundary_laws(chunk.laws(), chunk.mass, chunk.actual, chunk.first)[chunk.lead :]
        return dict(zip((*COLUMNS, "rest"), keep_likeliest(laws.log(), self.k, self.top_p, events=REST), strict=True))

    def read(self, scores: pa.Table, reading: Reading) -> Events:
        return read_events(scores, reading.tokens, COLUMNS, laws=True)

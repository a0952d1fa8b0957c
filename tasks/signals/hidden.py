"""`hidden`: the last hidden states in float16. With the teacher's head they give whole distributions."""

from functools import cache

import numpy as np
import pyarrow as pa
import torch

from configs.errors import BadInput
from tasks.signals.base import SCORE_CHUNK, Chunk, Events, Reading, Signal, join_chunks
from tasks.signals.bytes import BytesSignal
from tasks.signals.topk import TopkSignal
from tasks.tokens.byte_laws import ByteLaws
from tasks.tokens.ragged import flat, index_in_row


class HiddenSignal(Signal):
    """`k` and `top_p` decide what is read, not what is stored."""

    def store(self, chunk: Chunk) -> dict[str, torch.Tensor]:
        """float16 `[positions, width]`. Raises BadInput where a state is too large for it."""
        if float(chunk.hidden.abs().max()) > torch.finfo(torch.float16).max:
            raise BadInput(f"{chunk.model}: its hidden states do not fit into float16; set score.signal = 'topk'")
        return {"hidden": chunk.hidden.to(torch.float16)}

    @torch.inference_mode()
    def read(self, scores: pa.Table, reading: Reading) -> Events:
        """The events that `topk` would have stored, or `bytes` where laws are read."""
        head = reading.head
        assert head is not None
        device = head.weight.device
        hidden = torch.from_numpy(flat(scores["hidden"])[0].reshape(-1, head.weight.shape[1])[reading.tokens])
        ids = torch.from_numpy(flat(scores["token_ids"])[0][reading.tokens].astype(np.int64)).to(device)
        first = torch.from_numpy(index_in_row(reading.offsets) == 0).to(device)
        laws = cache(lambda: ByteLaws(reading.vocabulary).to(device))
        signal: Signal = (BytesSignal if reading.laws else TopkSignal)(self.k, self.top_p)
        chunks = []
        for start in range(0, len(ids), SCORE_CHUNK):
            lead = min(start, 1)
            window = slice(start - lead, start + SCORE_CHUNK)
            chunk = Chunk(
                hidden=hidden[start : start + SCORE_CHUNK],
                logits=head.logits(hidden[window]),
                actual=ids[window],
                first=first[window],
                lead=lead,
                laws=laws,
                model="",
            )
            chunks.append({name: column.cpu() for name, column in signal.store(chunk).items()})
        if not chunks:
            none = np.zeros(0, np.int64)
            return Events(none, np.zeros(0), none, np.zeros(0), reading.laws)
        found = join_chunks(signal, chunks)
        events, logprobs, counts = (found[name] for name in (*signal.events, signal.counts))
        return Events(events, logprobs.astype(np.float64), counts, found["rest"].astype(np.float64), reading.laws)

"""The embedded engine: a transformers model in this process, on the CPU or one GPU."""

from functools import cached_property

import numpy as np
import torch

from tasks.engines.base import Advance, Completion, Sampling, TokenScores, ignore_progress
from tasks.engines.decoding import Decoder
from tasks.engines.sampling import Sampler
from tasks.models.reference import ModelRef, device_of
from tasks.models.text import side
from tasks.models.weights import check_head, head_logits, hidden_states, load_weights, logits_of
from tasks.signals.base import SCORE_CHUNK, Chunk, Signal, copy_to_host, join_chunks, split_columns
from tasks.tokens.byte_laws import ByteLaws
from tasks.tokens.ragged import expand


class TransformersEngine:
    """A transformers model that this process holds. Its samples depend on prompt and seed only."""

    def __init__(self, ref: ModelRef, batch_size: int = 256, batch_tokens: int = 16_384):
        """`batch_size` sequences are generated at once; `batch_tokens`, padding included, are scored at once."""
        self.side, self.batch_size, self.batch_tokens = side(ref), batch_size, batch_tokens
        self.device = device_of(ref)
        self.check_every = 1 if self.device.type == "cpu" else 8  # tokens; the host waits for the device to count ended rows
        self.model = load_weights(ref).eval().to(self.device)
        self.size = len(self.side.beta.values)
        check_head(self.model, ref.path, self.size)

    @torch.inference_mode()
    def generate(
        self, prompts: list[list[int]], seeds: list[int], sampling: Sampling, advance: Advance = ignore_progress
    ) -> list[Completion]:
        results: list[Completion | None] = [None] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            made = self._sample([prompts[i] for i in rows], [seeds[i] for i in rows], sampling)
            for i, completion in zip(rows, made, strict=True):
                results[i] = completion
            advance(len(rows))
        return [result for result in results if result is not None]

    def _sample(self, prompts: list[list[int]], seeds: list[int], sampling: Sampling) -> list[Completion]:
        decoder = Decoder(self.model, prompts, self.side.pad_id)
        sampler = Sampler(seeds, sampling, self.device)
        stops = torch.tensor(self.side.stop_ids, device=self.device)
        ids = torch.zeros(len(prompts), sampling.max_new_tokens, dtype=torch.long, device=self.device)
        logprobs = torch.zeros(ids.shape, device=self.device)
        rows = torch.arange(len(prompts), device=self.device)  # those that still go on, and some that have ended
        going = torch.ones_like(rows, dtype=torch.bool)
        for position in range(sampling.max_new_tokens):
            chosen, chosen_logprobs = sampler.draw(logits_of(self.model, decoder.hidden, self.size), position)
            ids[rows, position], logprobs[rows, position] = chosen, chosen_logprobs
            going &= ~torch.isin(chosen, stops)
            if (position + 1) % self.check_every == 0:
                left = int(going.sum())
                if not left:
                    break
                if 2 * left <= len(rows):
                    kept = going.nonzero()[:, 0]
                    rows, going, chosen = rows[kept], going[kept], chosen[kept]
                    sampler.keep(kept)
                    decoder.keep(kept)
            if position + 1 < sampling.max_new_tokens:
                decoder.step(chosen)
        stopped = torch.isin(ids, stops).cpu().numpy()
        lengths = np.where(stopped.any(1), stopped.argmax(1) + 1, ids.shape[1])
        paths = zip(ids.tolist(), logprobs.tolist(), lengths, strict=True)
        return [Completion(path[:n], of_path[:n]) for path, of_path, n in paths]

    @torch.inference_mode()
    def score(self, prompts: list[list[int]], completions: list[list[int]], signal: Signal) -> list[TokenScores]:
        results: list[TokenScores | None] = [None] * len(prompts)
        lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
        for rows in length_batches(lengths, self.batch_tokens):
            ids = np.full((len(rows), max(lengths[i] for i in rows)), self.side.pad_id)
            for row, i in enumerate(rows):
                ids[row, : lengths[i]] = prompts[i] + completions[i]
            starts, ends = np.array([len(prompts[i]) for i in rows]), np.array([lengths[i] for i in rows])
            time, row_of = expand(starts, ends)
            whole, at, before = (self._tensor(values) for values in (ids, row_of, time - 1))
            hidden = hidden_states(self.model, whole)[at, before]
            actual, first = self._tensor(ids[row_of, time]), self._tensor(time == starts[row_of])
            columns = self._scores(hidden, actual, first, signal)
            logprobs, bounds = columns.pop("logprobs"), np.cumsum(ends - starts)
            parts = zip(rows, np.split(logprobs, bounds[:-1]), split_columns(signal, columns, bounds), strict=True)
            for i, path, part in parts:
                results[i] = TokenScores(path, part)
        return [result for result in results if result is not None]

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device)

    def _scores(self, hidden: torch.Tensor, actual: torch.Tensor, first: torch.Tensor, signal: Signal) -> dict[str, np.ndarray]:
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
                logits=head_logits(self.model, hidden[window], self.size),
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

    def close(self) -> None:
        del self.model
        self.__dict__.pop("laws", None)


def length_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Rows in batches of similar length, each at most `budget` tokens with padding; a longer row is a batch of its own."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[i] <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches

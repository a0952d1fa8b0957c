"""The embedded engine: a transformers model in this process, on the CPU or one GPU."""

from functools import cached_property

import numpy as np
import torch

from tasks.engines.base import Advance, Completion, Sampling, TokenScores, ignore_progress
from tasks.engines.decoding import Decoder
from tasks.engines.sampling import Sampler
from tasks.models.reference import ModelRef, device_of
from tasks.models.text import side
from tasks.models.weights import check_head, hidden_states, load_weights, logits_of
from tasks.signals.base import SCORE_CHUNK, Chunk, Signal, join_chunks, split_columns
from tasks.tokens.byte_laws import ByteLaws


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
            width = max(lengths[i] for i in rows)
            pad = self.side.pad_id
            ids = torch.tensor([prompts[i] + completions[i] + [pad] * (width - lengths[i]) for i in rows], device=self.device)
            hidden = hidden_states(self.model, ids)
            row = torch.tensor([r for r, i in enumerate(rows) for _ in completions[i]], device=self.device)
            time = torch.tensor([len(prompts[i]) + t for i in rows for t in range(len(completions[i]))], device=self.device)
            first = torch.tensor([t == 0 for i in rows for t in range(len(completions[i]))], device=self.device)
            logprobs, columns = self._scores(hidden[row, time - 1], ids[row, time], first, signal)
            ends = np.cumsum([len(completions[i]) for i in rows])
            parts = zip(rows, np.split(logprobs, ends[:-1]), split_columns(signal, columns, ends), strict=True)
            for i, path, part in parts:
                results[i] = TokenScores(path, part)
        return [result for result in results if result is not None]

    def _scores(
        self, hidden: torch.Tensor, actual: torch.Tensor, first: torch.Tensor, signal: Signal
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Log-probs and the signal's columns at flat positions, in chunks; `first` marks each completion's first token.

        `hidden` is `[positions, width]`; `actual` (int64) and `first` (bool) are `[positions]`, as are the float32 log-probs.
        """
        stops = torch.tensor(self.side.stop_ids, device=self.device)
        chosen, chunks = [], []
        for at in torch.split(torch.arange(len(actual), device=self.device), SCORE_CHUNK):
            lead = int(at[0] > 0)
            window = torch.cat([at[:lead] - 1, at])
            logprobs = logits_of(self.model, hidden[window], self.size).log_softmax(-1)
            here = logprobs[lead:]
            path = here.gather(1, actual[at][:, None])[:, 0]
            chosen.append(torch.where(torch.isin(actual[at], stops), here[:, stops].logsumexp(-1), path).cpu().numpy())
            chunk = Chunk(
                hidden=hidden[at],
                logprobs=logprobs,
                actual=actual[window],
                first=first[window],
                lead=lead,
                laws=lambda: self.laws,
                model=self.side.ref.path,
            )
            chunks.append(signal.store(chunk))
        return np.concatenate(chosen), join_chunks(chunks)

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

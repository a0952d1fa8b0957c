"""The embedded engine: a transformers model in this process, on the CPU or one GPU."""

from functools import cached_property

import numpy as np
import torch
from transformers import DynamicCache, GenerationConfig

from tasks.engines.base import Advance, Completion, Sampling, TokenScores, ignore_progress
from tasks.engines.sampling import SeededSampler
from tasks.models.reference import ModelRef, device_of
from tasks.models.text import side
from tasks.models.weights import check_head, hidden_states, load_weights, logits_of
from tasks.signals.base import SCORE_CHUNK, Chunk, Signal, join_chunks, split_columns
from tasks.tokens.byte_laws import ByteLaws


class TransformersEngine:
    def __init__(self, ref: ModelRef, batch_size: int = 256, batch_tokens: int = 16_384):
        """`batch_size` sequences are generated at once; `batch_tokens`, padding included, are scored at once."""
        self.side, self.batch_size, self.batch_tokens = side(ref), batch_size, batch_tokens
        self.device = device_of(ref)
        self.model = load_weights(ref).eval().to(self.device)
        self.model.generation_config = GenerationConfig()  # a model's own top_k and penalties are not the recipe's
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
            width = max(len(prompts[i]) for i in rows)
            pad = self.side.pad_id
            ids = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in rows], device=self.device)
            mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in rows], device=self.device)
            shared = self._prefill(ids, mask)
            sampler = SeededSampler(torch.tensor([seeds[i] for i in rows], device=self.device), sampling, self.size)
            config = GenerationConfig(
                max_new_tokens=sampling.max_new_tokens, do_sample=False, eos_token_id=self.side.stop_ids, pad_token_id=pad
            )
            output = self.model.generate(
                ids, attention_mask=mask, generation_config=config, logits_processor=[sampler], past_key_values=shared
            )
            sampled = output[:, width:].cpu().numpy()
            logprobs = torch.stack(sampler.logprobs, 1).cpu().numpy()
            stopped = np.isin(sampled, self.side.stop_ids)
            lengths = np.where(stopped.any(1), stopped.argmax(1) + 1, sampled.shape[1])
            for row, i in enumerate(rows):
                n = lengths[row]
                results[i] = Completion(sampled[row, :n].tolist(), logprobs[row, :n].tolist())
            advance(len(rows))
        return [result for result in results if result is not None]

    def _prefill(self, ids: torch.Tensor, mask: torch.Tensor) -> DynamicCache | None:
        """Keys and values of left-padded prompts up to their last token, each prompt computed once; None where all differ."""
        # The mask belongs to a prompt: padding may be an id that another prompt begins with.
        alone, copies = torch.unique_consecutive(torch.cat([ids, mask], 1), dim=0, return_inverse=True)
        alone, seen = alone[:, : ids.shape[1] - 1], alone[:, ids.shape[1] : -1]
        if len(alone) == len(ids) or ids.shape[1] == 1:
            return None
        cache = DynamicCache(config=self.model.config)
        places = (seen.cumsum(-1) - 1).clamp(min=0)
        self.model.base_model(input_ids=alone, attention_mask=seen, position_ids=places, past_key_values=cache, use_cache=True)
        cache.reorder_cache(copies)  # which layers of every kind have, those with a recurrent state too
        return cache

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
        """Log-probs and the signal's columns at flat positions, in chunks; `first` marks each completion's first token."""
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
        return ByteLaws(self.side.vocabulary).to(self.device)

    def close(self) -> None:
        del self.model
        self.__dict__.pop("laws", None)


def length_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Rows in batches of similar length, each at most `budget` tokens with padding (a longer row stands alone)."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[i] <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches

"""The embedded engine: a transformers model in this process, on the CPU or one GPU."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from tasks.engines.base import Advance, Completion, Sampling, TokenScores, ignore_progress
from tasks.engines.decoding import Decoder
from tasks.engines.pool import drop, hold, make_room
from tasks.engines.sampling import Sampler
from tasks.engines.states import StateScorer
from tasks.models.reference import ModelRef, device_of, dtype_of
from tasks.models.text import side
from tasks.models.weights import check_head, count_weights, head_logits, hidden_states, load_weights, logits_of
from tasks.running.memory import Room, room_of
from tasks.signals.base import Signal
from tasks.signals.head import Head, head_of
from tasks.tokens.ragged import expand, length_batches

MEND = "lower rollout.max_new_tokens, take shorter prompts, or set the model's dtype = 'bfloat16'"


class TransformersEngine:
    """A transformers model that this process holds. Its samples depend on prompt and seed only."""

    def __init__(self, ref: ModelRef, batch_size: int = 256, batch_tokens: int = 16_384):
        """`batch_size` sequences are generated at once; `batch_tokens`, padding included, are scored at once."""
        self.batch_size, self.batch_tokens = batch_size, batch_tokens
        self.device = device_of(ref)
        self.check_every = 1 if self.device.type == "cpu" else 8  # tokens; the host waits for the device to count ended rows
        self._model: PreTrainedModel | None = None
        self._refer(ref)
        self.load()

    def _refer(self, ref: ModelRef) -> None:
        self.ref, self.side = ref, side(ref)
        self.size = len(self.side.beta.values)
        self.states = StateScorer(self.side, self.device, lambda hidden: head_logits(self.model, hidden, self.size))

    def load(self) -> None:
        """Load the model where it is not, once there is room for it. It counts as used now."""
        if self._model is None:
            make_room(self.device, count_weights(self.ref) * dtype_of(self.ref).itemsize)
            model = load_weights(self.ref, device=self.device).eval()
            check_head(model, self.ref.path, self.size)
            self._model = model
        hold(self)

    @property
    def model(self) -> PreTrainedModel:
        """The model, loaded."""
        if self._model is None:
            self.load()
        assert self._model is not None
        return self._model

    @property
    def head(self) -> Head:
        """The model's last layer alone."""
        return head_of(self.model, self.size)

    def renew(self, ref: ModelRef) -> None:
        """Go on with other weights of the same shape, in place where the model is loaded."""
        self._refer(ref)
        if self._model is not None:
            with torch.no_grad():
                mine = self._model.state_dict()
                for name, weight in load_weights(ref).state_dict().items():
                    mine[name].copy_(weight)

    @torch.inference_mode()
    def generate(
        self, prompts: list[list[int]], seeds: list[int], sampling: Sampling, advance: Advance = ignore_progress
    ) -> list[Completion]:
        results: list[Completion | None] = [None] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        lengths, room = [len(prompt) + sampling.max_new_tokens for prompt in prompts], self._room("generation")

        def sample(rows: Sequence[int]) -> list[Completion]:
            return self._sample([prompts[i] for i in rows], [seeds[i] for i in rows], sampling)

        for start in range(0, len(order), self.batch_size):
            for rows, made in room.run(order[start : start + self.batch_size], lengths, sample):
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

        def score_batch(rows: Sequence[int]) -> None:
            ids = np.full((len(rows), max(lengths[i] for i in rows)), self.side.pad_id)
            for row, i in enumerate(rows):
                ids[row, : lengths[i]] = prompts[i] + completions[i]
            starts, ends = np.array([len(prompts[i]) for i in rows]), np.array([lengths[i] for i in rows])
            time, row_of = expand(starts, ends)
            whole, at, before = (self._tensor(values) for values in (ids, row_of, time - 1))
            hidden = hidden_states(self.model, whole)[at, before]
            for i, scores in zip(rows, self.states.score(hidden, [completions[i] for i in rows], signal), strict=True):
                results[i] = scores

        room = self._room("scoring")
        for batch in length_batches(lengths, self.batch_tokens):
            for _ in room.run(batch, lengths, score_batch):
                pass
        return [result for result in results if result is not None]

    def _room(self, what: str) -> Room:
        """What is known of memory for models of this size on this device: a student has new weights each round."""
        return room_of(what, MEND, str(self.device), count_weights(self.ref))

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device)

    def close(self) -> None:
        drop(self)
        self.give_back()

    def give_back(self) -> None:
        self._model = None
        self.states.__dict__.pop("laws", None)

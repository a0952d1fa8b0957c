"""Reading one token after the other: what a model remembers of some rows, and its next hidden states."""

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

ROOM = 256  # tokens
MASK = 2**26  # entries of an attention mask, which is [rows, tokens that are read, tokens so far]


class GrowingLayer(DynamicLayer):
    """Keys and values in buffers with room for more tokens: a DynamicLayer copies all of them each step, this one none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.buffers: list[torch.Tensor] = []

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [key_states[..., :0, :], value_states[..., :0, :]]
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        for index, new in enumerate((key_states, value_states)):
            if self.buffers[index].shape[-2] < end:
                buffer = new.new_empty(*new.shape[:-2], end + ROOM, new.shape[-1])
                buffer[..., :start, :] = self.buffers[index][..., :start, :]
                self.buffers[index] = buffer
            self.buffers[index][..., start:end, :] = new
        self.keys, self.values = (buffer[..., :end, :] for buffer in self.buffers)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        start = self.get_seq_length()
        self.buffers = [buffer[..., :start, :].index_select(0, beam_idx) for buffer in self.buffers]
        self.keys, self.values = self.buffers


IN_PARTS = {GrowingLayer, DynamicSlidingWindowLayer}  # layers that read several tokens behind others


class Decoder:
    """A model with the state of some rows. Each distinct prompt is computed once, whatever the number of its rows."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int):
        """`hidden`, `[rows, width]`, are then the states behind the last token of each prompt."""
        self.model, device = model, model.device
        self.names = set(signature(model.base_model.forward).parameters)
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        self.width = max(map(len, distinct))
        gaps = [self.width - len(prompt) for prompt in distinct]
        ids = torch.tensor([[pad_id] * gap + list(prompt) for gap, prompt in zip(gaps, distinct, strict=True)], device=device)
        self.mask = self.places = None  # without padding the fast kernels need no mask
        if any(gaps):
            self.mask = (torch.arange(self.width, device=device) >= torch.tensor(gaps, device=device)[:, None]).long()
            self.places = (self.mask.cumsum(-1) - 1).clamp(min=0)
        self.cache = DynamicCache(config=model.config)
        self.cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in self.cache.layers]
        self.hidden = self._read_prompts(ids)
        if len(distinct) < len(prompts):
            index = {prompt: i for i, prompt in enumerate(distinct)}
            self.keep(torch.tensor([index[tuple(prompt)] for prompt in prompts], device=device))

    def step(self, ids: torch.Tensor) -> None:
        """Read one more token of each row, int64 `[rows]`."""
        if self.mask is not None and self.places is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), 1)], 1)
            self.places = self.places[:, -1:] + 1
        self.hidden = self._read(ids[:, None], self.mask, self.places)

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows, int64; a row may be named several times."""
        self.cache.reorder_cache(rows)  # type: ignore[arg-type]  # every kind of layer has this, recurrent ones too
        self.hidden = self.hidden[rows]
        if self.mask is not None and self.places is not None:
            self.mask, self.places = self.mask[rows], self.places[rows]

    def _read_prompts(self, ids: torch.Tensor) -> torch.Tensor:
        """Read prompts, in parts where the mask of the whole would be large. A recurrent state takes the whole alone."""
        if self.mask is None or self.places is None:
            return self._read(ids, None, None)
        whole = not {type(layer) for layer in self.cache.layers} <= IN_PARTS
        by = self.width if whole else max(MASK // ids.numel(), 1)
        for start in range(0, self.width, by):
            part = slice(start, start + by)
            hidden = self._read(ids[:, part], self.mask[:, : part.stop], self.places[:, part])
        return hidden

    def _read(self, ids: torch.Tensor, mask: torch.Tensor | None, places: torch.Tensor | None) -> torch.Tensor:
        given = {
            "attention_mask": mask,
            "position_ids": places,
            "past_key_values": self.cache,
            "cache_params": self.cache,  # what Mamba calls it
        }
        given = {name: value for name, value in given.items() if name in self.names}
        hidden: torch.Tensor = self.model.base_model(input_ids=ids, use_cache=True, **given).last_hidden_state
        return hidden[:, -1]

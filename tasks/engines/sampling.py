"""Sampling that depends on a seed and a position only, not on the batch."""

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tasks.engines.base import Sampling

MASK32 = 0xFFFFFFFF


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Murmur3's 32-bit finaliser on int64 tensors that hold 32-bit values."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK32
    return x ^ (x >> 16)


def gumbel(seeds: torch.Tensor, position: int, size: int) -> torch.Tensor:
    """Standard Gumbel noise, float32 `[rows, size]`: a function of (seed, position, id). `seeds`: int64 `[rows]`."""
    row = _mix(_mix(seeds & MASK32) ^ ((seeds >> 32) & MASK32)) + 0x9E3779B9 * (position + 1)
    ids = torch.arange(size, device=seeds.device) * 0x85EBCA77
    bits = _mix(_mix((row & MASK32)[:, None] ^ (ids & MASK32)[None, :]) + (row & MASK32)[:, None] & MASK32)
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23  # never 0 or 1
    return -torch.log(-torch.log(uniform))


def warpers(sampling: Sampling) -> LogitsProcessorList:
    """The processors that turn a model's logits into those that tokens are drawn from; none for greedy decoding."""
    processors = LogitsProcessorList()
    if sampling.temperature not in (0, 1):
        processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.temperature and sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.temperature and sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    return processors


class SeededSampler(LogitsProcessor):
    """Makes greedy search sample: it adds Gumbel noise to each row, and the maximum is then a sample (Gumbel-max).

    It keeps the log-prob of every token that it chose, float32 `[rows]` per step. `size` is the vocabulary without padded
    rows of the head.
    """

    def __init__(self, seeds: torch.Tensor, sampling: Sampling, size: int):
        self.seeds, self.greedy, self.size = seeds, sampling.temperature == 0, size
        self.warpers = warpers(sampling)
        self.logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        logprobs = self.warpers(input_ids, scores[:, : self.size].float()).log_softmax(-1)
        noisy = logprobs if self.greedy else logprobs + gumbel(self.seeds, len(self.logprobs), self.size)
        chosen = noisy.argmax(-1, keepdim=True)
        self.logprobs.append(logprobs.gather(1, chosen)[:, 0])
        # Greedy search takes the maximum of this.
        return scores.fill_(-torch.inf).scatter_(1, chosen, 0.0)  # type: ignore[return-value]

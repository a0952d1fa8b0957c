"""Sampling that depends on a seed and a position only, not on the batch."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tasks.engines.base import Sampling

BLOCK = 256  # ids whose mass is summed first: the draw finds a block, and then an id in it
SCALE = 2.0**44  # whole numbers for the mass of the likeliest id; 2^18 such ids still fit into int64


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014), on uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


def uniforms(seeds: Sequence[int], positions: int) -> np.ndarray:
    """Uniform numbers in (0, 1), float64 `[rows, positions]`, in steps of 2^-52: a function of (seed, position)."""
    steps = np.arange(1, positions + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits = _mix(_mix(np.array(seeds, np.uint64))[:, None] + steps)
    return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


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


class Sampler:
    """Draws the next token of each row. A row's draw is a function of its logits, its seed and the position alone."""

    def __init__(self, seeds: Sequence[int], sampling: Sampling, device: torch.device):
        self.greedy, self.warpers = sampling.temperature == 0, warpers(sampling)
        self.uniforms = torch.from_numpy(uniforms(seeds, sampling.max_new_tokens)).to(device)
        self.masses = torch.zeros(0, dtype=torch.long, device=device)

    def draw(self, logits: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids, int64 `[rows]`, and log-probs, float32 `[rows]`, from logits, float32 `[rows, V]`, which it may overwrite."""
        if self.greedy:
            logprobs, ids = logits.log_softmax(-1).max(-1)
            return ids, logprobs
        return self._invert(self.warpers(None, logits), self.uniforms[:, position])  # type: ignore[arg-type]

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone, int64."""
        self.uniforms = self.uniforms[rows]

    def _invert(self, logits: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The id at which the cumulated mass passes the share `uniform` of the whole.

        Masses are whole numbers, whose sums are exact in any order: float32 sums of 262k masses would lose the tail.
        """
        rows, size = logits.shape
        mass = logits.sub_(logits.amax(-1, keepdim=True)).exp_().mul_(SCALE)
        if len(self.masses) < rows:  # the padding behind the last id stays 0
            self.masses = self.masses.new_zeros(rows, -(-size // BLOCK) * BLOCK)
        masses = self.masses[:rows]
        masses[:, :size] = mass
        blocks = masses.view(rows, -1, BLOCK)
        ends = blocks.sum(-1).cumsum(-1)
        total = ends[:, -1:]
        target = torch.minimum((uniform[:, None] * total).long(), total - 1)
        block = torch.searchsorted(ends, target, right=True).clamp(max=blocks.shape[1] - 1)  # a row of NaN passes nowhere
        inner = blocks[torch.arange(rows, device=block.device), block[:, 0]].cumsum(-1)
        inner += ends.gather(1, block) - inner[:, -1:]
        ids = block * BLOCK + torch.searchsorted(inner, target, right=True)
        ids.clamp_(max=size - 1)
        return ids[:, 0], (mass.gather(1, ids).double() / total).log().float()[:, 0]

"""The gap between an engine's log-probs and the trainer's on the same tokens."""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedModel

from tasks.engines.base import Sampling
from tasks.engines.sampling import warpers
from tasks.models.reference import ModelRef
from tasks.models.text import side
from tasks.models.weights import hidden_states, logits_of
from tasks.tokens.ragged import expand, length_batches, offsets_of

TOKENS = 1024  # of a forward pass, padding included; a longer row is a pass of its own
POSITIONS = 256  # positions whose logits exist at once
EDGE = 0.5  # nats: what rounding may change in the odds of two ids, or of two sets of ids, between two dtypes


@dataclass(frozen=True)
class Gap:
    """Distance of two lists of log-probs of the same tokens, in nats; None where there are no tokens."""

    mean: float | None
    largest: float | None

    @classmethod
    def between(cls, left: np.ndarray, right: np.ndarray) -> "Gap":
        """The gap of two arrays of log-probs `[tokens]`. NaN counts as infinitely far."""
        distance = np.nan_to_num(np.abs(left.astype(np.float64) - right), nan=np.inf)
        return cls(float(distance.mean()), float(distance.max())) if len(distance) else cls(None, None)


def trainer_logprobs(ref: ModelRef, model: PreTrainedModel, rollouts: pa.Table, sampling: Sampling) -> np.ndarray:
    """Each sampled token's log-prob under the distribution that `sampling` draws from: float32, flat, in nats.

    The forward pass is the trainer's, in float32, over rows of like length without a cache. It shares nothing with the
    engine's.
    """
    own, prompts, completions = side(ref), *(rollouts[name].to_pylist() for name in ("prompt_token_ids", "token_ids"))
    lengths = [len(prompt) + len(ids) for prompt, ids in zip(prompts, completions, strict=True)]
    found = np.zeros(sum(map(len, completions)), np.float32)
    offsets = offsets_of(np.array([len(ids) for ids in completions]))
    for batch in length_batches(lengths, TOKENS):
        ids = np.full((len(batch), lengths[batch[-1]]), own.pad_id)
        for row, i in enumerate(batch):
            ids[row, : lengths[i]] = prompts[i] + completions[i]
        time, row_of = expand(np.array([len(prompts[i]) for i in batch]), np.array([lengths[i] for i in batch]))
        whole, rows, times = (torch.from_numpy(values).to(model.device) for values in (ids, row_of, time))
        hidden, actual = hidden_states(model, whole)[rows, times - 1], whole[rows, times]
        places, _ = expand(offsets[:-1][batch], offsets[1:][batch])
        for at in (slice(start, start + POSITIONS) for start in range(0, len(places), POSITIONS)):
            logits = logits_of(model, hidden[at], len(own.beta.values))
            found[places[at]] = drawn_logprobs(logits, actual[at], sampling).cpu().numpy()
    return found


def drawn_logprobs(logits: torch.Tensor, actual: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Log-probs `[positions]` of the ids `actual` under the law that is drawn from where `logits` are `[positions, V]`."""
    warp, chosen = warpers(sampling), actual[:, None]
    if sampling.top_p < 1 or sampling.top_k:
        likeliest = warpers(replace(sampling, top_p=1.0))(actual, logits)  # type: ignore[arg-type]
        sampled = logits.gather(1, chosen) / (sampling.temperature or 1.0)
        kept = may_keep(likeliest, sampled, sampling.top_p)
        warped = warp(actual, logits)  # type: ignore[arg-type]
        warped = warped.scatter(1, chosen, torch.where(kept, sampled, warped.gather(1, chosen)))
    else:
        warped = warp(actual, logits)  # type: ignore[arg-type]
    return warped.gather(1, chosen)[:, 0] - warped.logsumexp(-1)


def may_keep(likeliest: torch.Tensor, sampled: torch.Tensor, top_p: float) -> torch.Tensor:
    """Whether sampling in another dtype may have kept an id, bool `[positions, 1]`.

    `likeliest` are logits `[positions, V]` behind temperature and top_k, and `sampled`, `[positions, 1]`, the id's own.
    Rounding changes the order of ids that are less than EDGE apart, and by as much the odds of those that are surely likelier.
    """
    least = likeliest.masked_fill(likeliest == -torch.inf, torch.inf).amin(-1, keepdim=True)
    likelier = likeliest > sampled + EDGE
    above, others = (likeliest.masked_fill(out, -torch.inf).logsumexp(-1, keepdim=True) for out in (~likelier, likelier))
    limit = torch.tensor(top_p, dtype=torch.float64).logit().item() + EDGE
    return (sampled > least - EDGE) & (above - others < limit)

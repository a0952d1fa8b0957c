"""The gap between an engine's log-probs and the trainer's on the same tokens."""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedModel

from tasks.engines.base import Sampling
from tasks.engines.sampling import warpers
from tasks.models.reference import ModelRef, device_of
from tasks.models.text import side
from tasks.models.weights import hidden_states, logits_of

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

    The forward pass is the trainer's, in float32, without padding or a cache, one row at a time. It shares nothing with the
    engine's.
    """
    model, size = model.to(device_of(ref)), len(side(ref).beta.values)  # type: ignore[arg-type]
    warp, likeliest, logprobs = warpers(sampling), warpers(replace(sampling, top_p=1.0)), []
    for row in rollouts.select(["prompt_token_ids", "token_ids"]).to_pylist():
        ids = torch.tensor([row["prompt_token_ids"] + row["token_ids"]], device=model.device)
        hidden = hidden_states(model, ids)[0, len(row["prompt_token_ids"]) - 1 : -1]
        actual = ids[0, len(row["prompt_token_ids"]) :]
        for at in torch.arange(len(actual), device=model.device).split(POSITIONS):
            logits, chosen = logits_of(model, hidden[at], size), actual[at][:, None]
            sampled = logits.gather(1, chosen) / (sampling.temperature or 1.0)
            kept = may_keep(likeliest(ids, logits), sampled, sampling.top_p)  # type: ignore[arg-type]
            warped = warp(ids, logits)  # type: ignore[arg-type]
            sampled = torch.where(kept, sampled, warped.gather(1, chosen))
            logprobs.append(warped.scatter(1, chosen, sampled).log_softmax(-1).gather(1, chosen)[:, 0].cpu())
    return torch.cat(logprobs).numpy() if logprobs else np.zeros(0, np.float32)


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

"""Rewards beside the objective: advantages of rows, and the student's loss on their tokens (MATHS.md §10)."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from storage.artifacts import Artifact, read_table
from tasks.tokens.ragged import expand, flat

COLUMNS = ["rollout_id", "logprobs"]  # of rollouts


@dataclass(frozen=True, kw_only=True)
class Rewarded:
    """The completion tokens of a pass whose rows have an advantage, flat."""

    at: torch.Tensor  # int64 [tokens], among the pass's positions
    advantage: torch.Tensor  # float32 [tokens], of the token's row, as a share of the step's loss
    behaviour: torch.Tensor  # float32 [tokens], log-prob under the policy that sampled it, in nats

    def split(self, size: int) -> list["Rewarded"]:
        """At most `size` tokens each; none where there are none."""
        parts = [torch.split(getattr(self, part.name), size) for part in fields(self)]
        return [
            Rewarded(at=at, advantage=advantage, behaviour=behaviour) for at, advantage, behaviour in zip(*parts) if len(at)
        ]

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "Rewarded":
        """The same, with each tensor moved."""
        return Rewarded(**{part.name: move(getattr(self, part.name)) for part in fields(self)})


def read_kept(rewards: Artifact) -> pa.Table:
    """`rollout_id` and `advantage` of the samples that `rollout.keep` lets go on."""
    return read_table(rewards).filter(pc.field("kept")).select(["rollout_id", "advantage"])


def add_advantages(rows: pa.Table, rollouts: pa.Table, rewards: pa.Table) -> pa.Table:
    """`rows` with `advantage` (0 where the student did not sample the row, or its group is all alike) and `logprobs`."""
    found = pc.index_in(rollouts["rollout_id"], rewards["rollout_id"].combine_chunks())
    advantage = pc.fill_null(rewards["advantage"].take(found), 0.0)
    return rows.append_column("advantage", advantage).append_column("logprobs", rollouts["logprobs"])


def share_advantages(step: pa.Table, units: int) -> pa.Table:
    """The rows of an optimizer step, each advantage as a share of its loss: by the completion tokens of the whole step.

    The step's loss is a sum that is divided by `units`, or where it has none is taken as it is.
    """
    if "advantage" not in step.column_names:
        return step
    tokens = pc.sum(pc.list_value_length(step["token_ids"])).as_py()
    shared = pc.multiply(step["advantage"], pa.scalar(max(units, 1) / tokens, pa.float32()))
    return step.set_column(step.column_names.index("advantage"), "advantage", shared)


def collate_rewarded(table: pa.Table, device: torch.device) -> Rewarded | None:
    """The tokens of the rows of a pass that have an advantage; None where rewards do not teach."""
    if "advantage" not in table.column_names:
        return None
    advantage = table["advantage"].to_numpy()
    _, offsets = flat(table["token_ids"])
    rows = np.flatnonzero(advantage)
    at, row = expand(offsets[rows], offsets[rows + 1])
    return Rewarded(
        at=torch.tensor(at, dtype=torch.long, device=device),
        advantage=torch.tensor(advantage[rows][row], dtype=torch.float32, device=device),
        behaviour=torch.tensor(flat(table["logprobs"].take(pa.array(rows)))[0], dtype=torch.float32, device=device),
    )


def reward_losses(logits: torch.Tensor, actual: torch.Tensor, rewarded: Rewarded, clip: float) -> torch.Tensor:
    """`[tokens]`: −a · min(P_S(y) / P_behaviour(y), C) of MATHS.md §10, from logits `[tokens, V]` and the tokens `actual`."""
    logprobs = logits.gather(1, actual[:, None])[:, 0] - logits.logsumexp(-1)
    return -rewarded.advantage * (logprobs - rewarded.behaviour).exp().clamp(max=clip)

"""`opd`: policy gradient on a unit's log-ratio (Thinking Machines, "On-Policy Distillation")."""

from dataclasses import replace

import numpy as np
import torch

from configs.objectives import Opd
from tasks.objectives.base import ObjectiveModule, Pairing, Projection, Terms, project_units, unit_logprobs
from tasks.objectives.divergences import FLOOR
from tasks.tokens.vocabulary import Vocabulary


class OpdObjective(ObjectiveModule):
    """Policy gradient with the log-ratio of a unit as its advantage."""

    config: Opd
    stops: torch.Tensor

    def __init__(self, config: Opd, *, student: Vocabulary, teacher: Vocabulary):
        super().__init__(config)
        self.register_buffer("stops", torch.tensor(student.stop_ids), persistent=False)

    def project(self, pairing: Pairing) -> Projection:
        """Units of the student's samples as terms. A row without behaviour log-probs was not sampled by a policy and has none.

        An unpaired control token behind the last unit is a term of its own. It is in no unit; without the term the student
        could leave a text there at no cost.
        """
        units = project_units(pairing, only=~np.isnan(pairing.behaviour))
        return units if pairing.escapes is None else _add_escapes(units, pairing, pairing.escapes)

    def forward(self, logits: torch.Tensor, terms: Terms) -> torch.Tensor:
        """A surrogate `[terms]` with the gradient -w·A·∇log P_S, where A = log P_T - log P_S and w = min(P_S / P_behaviour, C).

        Its value is -A in nats, one sample of the reverse KL per unit, so that the logged loss has a meaning.
        """
        logprobs = logits.log_softmax(-1)
        path = unit_logprobs(logprobs, terms, self.stops)
        advantage = (terms.logprobs[:, 0] - path).detach()
        sampled = unit_logprobs(logprobs.detach(), terms)  # of the sampled ids, as in `behaviour`: a stop is not the event here
        weight = (sampled - terms.behaviour).exp().clamp(max=self.config.clip)
        return -advantage - weight * advantage * (path - path.detach())


def _add_escapes(units: Projection, pairing: Pairing, behaviour: np.ndarray) -> Projection:
    """`units` and, last in each row that has one, the term of its control token, which covers no byte.

    `behaviour` `[rows]` is the token's log-prob under its policy (NaN: none). For the teacher it is impossible: the floor.
    """
    row = np.flatnonzero(~np.isnan(behaviour))
    at, kept = units.offsets[row + 1], np.diff(pairing.student_offsets)[row]
    more = np.zeros(len(units.offsets), np.int64)
    more[row + 1] = 1
    return replace(
        units,
        offsets=units.offsets + np.cumsum(more),
        starts=np.insert(units.starts, at, kept),
        ends=np.insert(units.ends, at, kept + 1),
        counts=np.insert(units.counts, at, 1),
        ids=np.insert(units.ids, at, 0),
        logprobs=np.insert(units.logprobs, at, FLOOR),
        rest=np.insert(units.rest, at, np.log(-np.expm1(FLOOR))),
        behaviour=np.insert(units.behaviour, at, behaviour[row]),  # type: ignore[arg-type]
    )

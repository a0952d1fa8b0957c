"""`opd`: policy gradient on a unit's log-ratio (Thinking Machines, "On-Policy Distillation")."""

import numpy as np
import torch

from configs.schema import Opd
from tasks.objectives.base import ObjectiveModule, Pairing, Projection, Terms, project_units, unit_logprobs
from tasks.tokens.vocabulary import Vocabulary


class OpdObjective(ObjectiveModule):
    stops: torch.Tensor

    def __init__(self, config: Opd, student: Vocabulary):
        super().__init__()
        self.config = config
        self.register_buffer("stops", torch.tensor(student.stop_ids), persistent=False)

    def project(self, pairing: Pairing) -> Projection:
        """Units of the student's own samples: a row without behaviour log-probs has no policy to take the gradient of."""
        return project_units(pairing, only=~np.isnan(pairing.behaviour))

    def forward(self, logits: torch.Tensor, terms: Terms) -> torch.Tensor:
        """A surrogate whose gradient is -w·A·∇log P_S, with A = log P_T - log P_S and w = min(P_S / P_behaviour, C).

        Its value is -A, one sample of the reverse KL a unit, so that the loss that is logged means something.
        """
        logprobs = logits.log_softmax(-1)
        path = unit_logprobs(logprobs, terms, self.stops)
        advantage = (terms.logprobs[:, 0] - path).detach()
        sampled = unit_logprobs(logprobs.detach(), terms)  # of the very ids, as the behaviour's are
        weight = (sampled - terms.behaviour).exp().clamp(max=self.config.clip)
        return -advantage - weight * advantage * (path - path.detach())

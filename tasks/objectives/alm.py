"""`alm`: both models' probabilities of a unit, compared as coins (Approximate Likelihood Matching, arXiv 2503.20083)."""

import torch

from configs.objectives import Alm
from tasks.objectives.base import ObjectiveModule, Pairing, Projection, Terms, project_units, unit_logprobs
from tasks.objectives.divergences import jsd, log_rest
from tasks.tokens.vocabulary import Vocabulary

UNBOUNDED = -1e4  # nats: a long unit may be far less likely than e⁻²⁰, and must still have a gradient


class AlmObjective(ObjectiveModule):
    """JSD of a unit's probability on both sides."""

    config: Alm
    stops: torch.Tensor

    def __init__(self, config: Alm, *, student: Vocabulary, teacher: Vocabulary):
        super().__init__(config)
        self.register_buffer("stops", torch.tensor(student.stop_ids), persistent=False)

    def project(self, pairing: Pairing) -> Projection:
        return project_units(pairing)

    def forward(self, logits: torch.Tensor, terms: Terms) -> torch.Tensor:
        """JSD_β between (p, 1 - p) of the two sides, with p = P(unit)^(1/τ): `[terms]`, in nats."""
        teacher = terms.logprobs[:, :1] / self.config.temperature
        student = unit_logprobs(logits.log_softmax(-1), terms, self.stops)[:, None] / self.config.temperature
        t, s = (torch.cat([side, log_rest(side)], -1) for side in (teacher, student))
        return jsd(t, s, self.config.beta, floor=UNBOUNDED)

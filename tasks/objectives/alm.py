"""`alm`: the probabilities that both sides give to a unit, as two coins (Approximate Likelihood Matching, arXiv 2503.20083)."""

import torch

from configs.schema import Alm
from tasks.objectives.base import ObjectiveModule, Pairing, Projection, Terms, project_units, unit_logprobs
from tasks.objectives.divergences import jsd, log_rest


class AlmObjective(ObjectiveModule):
    def __init__(self, config: Alm):
        super().__init__()
        self.config = config

    def project(self, pairing: Pairing) -> Projection:
        return project_units(pairing)

    def forward(self, logprobs: torch.Tensor, terms: Terms) -> torch.Tensor:
        """JSD_β between (p, 1 - p) of the two sides, with p = P(unit)^(1/τ)."""
        teacher = terms.logprobs[:, :1] / self.config.temperature
        student = unit_logprobs(logprobs, terms)[:, None] / self.config.temperature
        t, s = (torch.cat([side, log_rest(side)], -1) for side in (teacher, student))
        return jsd(t, s, self.config.beta)

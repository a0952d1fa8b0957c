"""`gkd`: the divergence at every position, for one tokenizer on both sides (GKD, arXiv 2306.13649)."""

from configs.objectives import Gkd, Gold
from tasks.objectives.gold import GoldObjective
from tasks.tokens.vocabulary import Vocabulary


class GkdObjective(GoldObjective):
    """With one tokenizer every unit has one token on both sides, and `gold` is `gkd` exactly (MATHS.md §9, property 1)."""

    def __init__(self, config: Gkd, *, student: Vocabulary, teacher: Vocabulary):
        super().__init__(Gold(name="gold", beta=config.beta, rest=config.rest), student=student, teacher=teacher)

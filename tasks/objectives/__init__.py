"""Objectives: how a teacher's scores become targets, and how far the student is from them."""

from configs.schema import Bytes, Gkd, Gold, Objective, Sft, Uld
from tasks.objectives.base import ObjectiveModule
from tasks.objectives.bytes import BytesObjective
from tasks.objectives.gold import GoldObjective
from tasks.objectives.sft import SftObjective
from tasks.objectives.uld import UldObjective
from tasks.tokens.vocabulary import Vocabulary


def build(config: Objective, student: Vocabulary, teacher: Vocabulary) -> ObjectiveModule:
    """The objective that a recipe names, for a pair of vocabularies (the student's own twice where there is no teacher)."""
    match config:
        case Gkd():
            return GoldObjective(Gold(name="gold", beta=config.beta, rest=config.rest), student, teacher)
        case Gold():
            return GoldObjective(config, student, teacher)
        case Uld():
            return UldObjective(config, student)
        case Bytes():
            return BytesObjective(config, student, teacher)
        case Sft():
            return SftObjective(student)

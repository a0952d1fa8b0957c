"""Objectives: how a teacher's scores become targets, and how far the student is from them."""

from configs.objectives import Alm, Bpm, Bytes, Gkd, Gold, Objective, Opd, Sft, Strict, Uld
from tasks.objectives.alm import AlmObjective
from tasks.objectives.base import ObjectiveModule
from tasks.objectives.bpm import BpmObjective
from tasks.objectives.bytes import BytesObjective
from tasks.objectives.gold import GoldObjective
from tasks.objectives.opd import OpdObjective
from tasks.objectives.sft import SftObjective
from tasks.objectives.strict import StrictObjective
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
        case Strict():
            return StrictObjective(config, student, teacher)
        case Alm():
            return AlmObjective(config, student)
        case Bpm():
            return BpmObjective(config, student, teacher)
        case Opd():
            return OpdObjective(config, student)
        case Sft():
            return SftObjective(student)

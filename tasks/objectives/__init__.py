"""Objectives, one per file: how a teacher's scores become targets, and the student's loss on them (MATHS.md §5)."""

from importlib import import_module

from configs.objectives import ObjectiveConfig
from tasks.objectives.base import ObjectiveModule
from tasks.tokens.vocabulary import Vocabulary


def build(config: ObjectiveConfig, *, student: Vocabulary, teacher: Vocabulary) -> ObjectiveModule:
    """Build the objective that a recipe names, for a pair of vocabularies; without a teacher the student's is both.

    Its class is `<Config>Objective` in the file of its name, where `<Config>` is its class in configs/objectives.py.
    """
    module = import_module(f"tasks.objectives.{config.name}")
    objective: ObjectiveModule = getattr(module, f"{type(config).__name__}Objective")(config, student=student, teacher=teacher)
    return objective

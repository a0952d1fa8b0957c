"""Objectives, one a file: how a teacher's scores become targets, and how far the student is from them (MATHS.md §5)."""

from importlib import import_module

from configs.objectives import ObjectiveConfig
from tasks.objectives.base import ObjectiveModule
from tasks.tokens.vocabulary import Vocabulary


def build(config: ObjectiveConfig, *, student: Vocabulary, teacher: Vocabulary) -> ObjectiveModule:
    """The objective that a recipe names, for a pair of vocabularies (the student's own twice where there is no teacher).

    It is `<Config>Objective` in the file of its name, where `<Config>` is its class in configs/objectives.py.
    """
    module = import_module(f"tasks.objectives.{config.name}")
    objective: ObjectiveModule = getattr(module, f"{type(config).__name__}Objective")(config, student=student, teacher=teacher)
    return objective

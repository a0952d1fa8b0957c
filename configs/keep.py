"""`[keep]` of a recipe: what of a run's complete rounds stays on the disk. It changes no result."""

from typing import Annotated

from pydantic import Field

from configs.fields import Table, words_or_count

ALL, BEST = "all", "best"

ROUNDS = "of how many rounds"

Kept = Annotated[int | str, *words_or_count(ALL, counted=ROUNDS)]
KeptStudents = Annotated[int | str, *words_or_count(ALL, BEST, counted=ROUNDS)]


class Keep(Table):
    """Of which complete rounds what is kept: of all, or of the newest so many. What the next round needs always stays."""

    students: KeptStudents = Field(
        ALL, description="trained students; best: the round that evaluate.best names. The newest, and the recipe's last, stay"
    )
    trainers: Kept = Field(
        1, description="optimizer states (and float32 weights, of a student in bfloat16): the next round needs the newest alone"
    )
    rollouts: Kept = Field(ALL, description="the completions that were trained on; their alignment stays")
    scores: Kept = Field(ALL, description="what is stored of the teacher at every token; the alignment made of it stays")


# What lies in a round's folder, by the field that says how long.
CLEARED = {
    "students": ("student",),
    "trainers": ("trainer",),
    "rollouts": ("rollouts",),
    "scores": ("scores", "teacher"),  # with the head of a teacher that moves, which reads hidden states
}

"""`[reward]` of a recipe: the scorer's figure of the student's own samples, as a teacher beside the teacher."""

from pydantic import Field

from configs.fields import Float, Table


class Reward(Table):
    """Policy gradient on the scores of each prompt's samples (evaluate.scorer), beside the objective's loss."""

    weight: Float = Field(0.0, ge=0, le=1000, description="α: how much beside the objective; 0: not at all")
    clip: Float = Field(2.0, ge=1, description="C: largest importance weight of a token")

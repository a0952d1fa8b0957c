"""`[evaluate]` of a recipe: answers to held-out prompts."""

from typing import Literal

from pydantic import Field

from configs.fields import Int, Table


class Evaluate(Table):
    """How answers to held-out prompts are made and graded."""

    samples: Int = Field(4, ge=0, le=1024, description="sampled completions an eval prompt, beside the greedy one")
    scorer: Literal["task", "exact", "math"] = Field(
        "task",
        description="task: the source's own scorer (reasoning-gym), else exact match; exact: match with the reference; "
        "math: the last number or formula equals the reference's (needs the `math` extra)",
    )
    best: Literal["sampled", "greedy", "divergence"] = Field(
        default_factory=lambda evaluate: "sampled" if evaluate.get("samples", 4) else "greedy",
        description="what the best round has most of: accuracy of samples, greedy accuracy; or least of: divergence from the "
        "teacher. Left out: sampled where there are samples. It changes no result",
    )

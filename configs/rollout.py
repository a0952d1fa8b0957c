"""`[rollout]` of a recipe: where the rows of a round come from."""

from typing import Annotated, Literal

from pydantic import Field

from configs.fields import Float, Int, Table, words_or_count

Chosen = Annotated[int | str, *words_or_count("all", "right", "wrong", counted="how many samples a prompt")]


class Rollout(Table):
    """Completions: sampled by the current student, or taken from elsewhere by λ."""

    on_policy: Float = Field(1.0, ge=0, le=1, description="GKD's λ: probability that a row is the student's own sample")
    off_policy: Literal["reference", "teacher"] = Field("reference", description="where the other rows come from")
    prompts: Int = Field(1024, ge=1, description="prompts per round")
    samples: Int = Field(1, ge=1, le=1024, description="completions per prompt")
    keep: Chosen = Field(
        "all",
        description="which of the student's samples go on to scoring and training, by evaluate.scorer: all; right; wrong; or "
        "a number: so many a prompt, those of the best score",
    )
    shard_rows: Int = Field(4096, ge=1, description="rollouts per file, which is the unit of work and of resuming")
    max_new_tokens: Int = Field(256, ge=1, description="longest completion, in student tokens, stop included")
    temperature: Float = Field(1.0, gt=0, le=10, description="divides the logits before the softmax")
    top_p: Float = Field(1.0, gt=0, le=1, description="sample from the likeliest tokens that have this mass; 1: from all")
    top_k: Int = Field(0, ge=0, description="0: all tokens")
    batch_size: Int = Field(256, ge=1, description="sequences generated at once")

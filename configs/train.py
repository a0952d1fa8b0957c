"""`[train]` of a recipe: the optimizer, and how a step is split."""

from typing import Annotated, Literal

from pydantic import Field

from configs.fields import Bool, Float, Int, Table

Beta = Annotated[Float, Field(ge=0, lt=1)]


class Train(Table):
    """How a round's rollouts become the next student."""

    batch_size: Int = Field(64, ge=1, description="rollouts per optimizer step")
    micro_batch_tokens: Int | None = Field(
        None, ge=1, description="most tokens per forward pass, padding included; a longer rollout is a pass of its own"
    )
    micro_batch_size: Int = Field(
        default_factory=lambda train: min(2**31 if train.get("micro_batch_tokens") else 64, train.get("batch_size", 64)),
        ge=1,
        description="rollouts per forward pass; left out: 64, or the whole of a smaller batch, or of one that is limited by "
        "micro_batch_tokens",
    )
    epochs: Int = Field(1, ge=1, description="passes over a round's rollouts")
    learning_rate: Float = Field(1e-5, gt=0, le=1, description="its largest value; AdamW")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="over all rounds of the recipe")
    warmup_steps: Int = Field(0, ge=0, description="optimizer steps in which the learning rate rises to its largest value")
    weight_decay: Float = Field(0.0, ge=0, le=1, description="AdamW's, on matrices alone")
    adam_betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="AdamW's decay rates of both moments")
    grad_clip: Float = Field(1.0, gt=0, description="largest norm of the gradient")
    param_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="weights in the forward pass. float32: cast where they are used, if student.dtype is bfloat16; bfloat16: "
        "kept so, beside float32 master weights in the optimizer",
    )
    chunk_positions: Int = Field(1024, ge=1, description="positions whose logits exist at once")
    dropout: Bool = Field(False, description="use the dropout of the model's config; else there is none in training")
    gradient_checkpointing: Bool = Field(False, description="less memory: layers are computed again in the backward pass")
    processes: Int = Field(1, ge=1, le=1024, description="that share each batch: one a GPU, or a part of the CPU's cores")
    sharding: Literal["none", "full"] = Field(
        "none",
        description="none: each process holds the whole student (DDP); full: a part of it, gathered layer by layer (FSDP)",
    )

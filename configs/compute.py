"""`[compute]` of a recipe: where its stages are worked on."""

from typing import Literal

from pydantic import Field, model_validator

from configs.fields import Bool, Float, Table


class Compute(Table):
    """Where and how long the stages of a run are worked on; changes no result but its rounding."""

    runner: Literal["local", "ray"] = Field("local", description="local: one after another; ray (needs the `ray` extra): many")
    address: str | None = Field(
        None, min_length=1, description="of a Ray cluster, such as head:6379; left out: one is started on this machine"
    )
    cpus: Float = Field(1.0, gt=0, le=4096, description="cores that a shard takes: a cluster works on as many as have room")
    gpus: Float = Field(
        0.0,
        ge=0,
        le=4096,
        description="GPUs that a shard takes; 1 where models are on GPUs, or two shards share one",
    )
    task_timeout: Float | None = Field(
        None, gt=0, description="seconds that a shard, an evaluation or a round's training may take; left out: no limit"
    )
    exclusive: Bool = Field(True, description="wait while another run of yours computes on a GPU that this one would use")

    @model_validator(mode="after")
    def _an_address_is_read(self) -> "Compute":
        if self.address is not None and self.runner != "ray":
            raise ValueError(f"address is for runner = 'ray', and runner is '{self.runner}'; set runner or leave address out")
        return self

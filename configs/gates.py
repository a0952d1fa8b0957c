"""`[gates]` of a recipe: limits."""

from pydantic import Field

from configs.fields import Float, Table


class Gates(Table):
    """Limits; what breaches one stops the run (or `preflight`) with the figures. They may change while a run goes on."""

    spelled: Float = Field(0.9, ge=0, le=1, description="least share of texts that a tokenizer gives back byte for byte")
    boundary: Float = Field(0.9, ge=0, le=1, description="least share of prompts that end where a token of their text ends")
    chance: Float = Field(0.9, gt=0, description="most nats per token of known text, as a share of a uniform guess's")
    expected: Float = Field(
        0.5, ge=0, le=1, description="most that both sides differ in whether an answer begins with thinking or a control token"
    )
    matched: Float = Field(0.5, ge=0, le=1, description="least share of sampled tokens that the teacher has, too")
    one_to_one: Float = Field(0.5, ge=0, le=1, description="least share of units of one token on both sides: gold and strict")
    engine_mean: Float = Field(0.05, ge=0, description="mean gap between an engine's log-probs and those of training, nats")
    engine_max: Float = Field(1.0, ge=0, description="largest such gap, nats per token")
    noise: Float = Field(0.1, ge=0, description="most of the signal that changes when the teacher scores again")
    own_teacher: Float = Field(0.05, ge=0, description="largest loss of a student that is its own teacher, nats per term")
    lead: Float = Field(0.0, ge=-1, le=1, description="least lead of the teacher in accuracy; stops where it is surely below")
    supervised: Float = Field(
        0.1,
        ge=0,
        le=1,
        description="least share of completion bytes that the loss covers; 'bytes' covers one per teacher token",
    )
    dropped: Float = Field(0.2, ge=0, le=1, description="largest share of rollouts that cannot be aligned")
    truncated: Float = Field(0.5, ge=0, le=1, description="largest share of samples cut at rollout.max_new_tokens")
    repetition: Float = Field(0.5, ge=0, le=1, description="largest share of a sample's four-token runs seen in it before")
    length: Float = Field(4.0, ge=1, description="most that the mean length of samples may change since round 1, as a factor")
    grad_norm: Float = Field(1000.0, gt=0, description="largest norm of a gradient, before clipping")

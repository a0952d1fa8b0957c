"""What a recipe may say. Each field states its unit and its limits; unknown keys are refused."""

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import pydantic
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MOST = 32_767  # events a token in a scores file
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"

Int = Annotated[int, pydantic.Strict()]  # TOML knows its types: neither "3" nor true is a number
Float = Annotated[float, pydantic.Strict()]


class Table(BaseModel):
    """A TOML table: immutable, and a key that nothing reads is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Scratch(Table):
    """A new Llama-shaped model with its own byte-level BPE tokenizer, to be trained by an `sft` recipe."""

    vocab_size: Int = Field(384, ge=264, le=200_000, description="tokens, the 256 bytes and 6 special ones included")
    tokenizer_text: Literal["all", "references"] = Field(
        "all", description="what the tokenizer is trained on: prompts and references, or references alone"
    )
    layers: Int = Field(3, ge=1, le=200)
    width: Int = Field(96, ge=8, le=65_536, description="hidden size")
    heads: Int = Field(4, ge=1, le=512, description="attention heads; divides the width")
    feed_forward: Int = Field(256, ge=8, le=262_144, description="inner size of the MLP")
    context: Int = Field(256, ge=8, le=1_048_576, description="longest sequence, in tokens")

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> "Scratch":
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"heads = {self.heads} must divide width = {self.width} into even parts")
        return self


class Model(Table):
    """Where a model comes from (exactly one of `model`, `recipe`, `scratch`) and how it is used."""

    model: str | None = Field(None, min_length=1, description="hub id or local folder (safetensors)")
    recipe: str | None = Field(
        None, min_length=1, description="a recipe, beside this file, whose last checkpoint it is; run first"
    )
    scratch: Scratch | None = None
    rendering: Literal["chat", "plain"] = Field(
        "chat", description="how messages become a prompt: the tokenizer's chat template, or contents joined by newlines"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="weights outside training; auto: bfloat16 on a GPU that has it, else float32"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> "Model":
        given = [key for key in ("model", "recipe", "scratch") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of model, recipe, scratch; found {', '.join(given) or 'none'}")
        return self


class PromptSource(Table):
    train: Int = Field(1024, ge=1, description="training prompts")
    eval: Int = Field(128, ge=1, description="held-out prompts, disjoint from the training ones")
    template: str = Field(
        "{question}", min_length=1, description="the user message; names a row's fields in braces, {question} the plain one"
    )


class GymPrompts(PromptSource):
    """Procedural tasks with scorers."""

    source: Literal["reasoning-gym"]
    task: str = Field(min_length=1, description="name of a reasoning-gym dataset")
    options: dict[str, Any] = Field(default_factory=dict, description="options of that dataset")


class FilePrompts(PromptSource):
    """Rows with `messages` or `prompt`, and optionally `reference`; other columns are kept as metadata."""

    source: Literal["file"]
    path: str = Field(min_length=1, description=".jsonl or .parquet, relative to the recipe")


class HubPrompts(PromptSource):
    """A Hugging Face dataset (needs the `hub` extra); columns as for `file`."""

    source: Literal["hub"]
    dataset: str = Field(min_length=1, description="hub id or local folder")
    subset: str | None = None
    hub_split: str = Field("train", min_length=1, description="the dataset's split to read from")


Prompts = Annotated[GymPrompts | FilePrompts | HubPrompts, Field(discriminator="source")]


class Rollout(Table):
    """Completions: sampled by the current student, or taken from elsewhere by λ."""

    on_policy: Float = Field(1.0, ge=0, le=1, description="GKD's λ: probability that a row is the student's own sample")
    off_policy: Literal["reference", "teacher"] = Field("reference", description="where the other rows come from")
    prompts: Int = Field(1024, ge=1, description="prompts a round")
    samples: Int = Field(1, ge=1, le=1024, description="completions a prompt")
    shard_rows: Int = Field(4096, ge=1, description="rollouts a file: the unit of work and resume")
    max_new_tokens: Int = Field(256, ge=1, description="longest completion, in student tokens, stop included")
    temperature: Float = Field(1.0, gt=0, le=10, description="divides the logits before the softmax")
    top_p: Float = Field(1.0, gt=0, le=1)
    top_k: Int = Field(0, ge=0, description="0: all tokens")
    batch_size: Int = Field(256, ge=1, description="sequences generated at once")


class Score(Table):
    """What is stored of the teacher at every token, beside the log-prob of the token itself."""

    signal: Literal["topk", "bytes", "hidden", "sampled"] = Field(
        "topk",
        description="topk: the likeliest ids and the mass of the rest; bytes: the law of the next byte, for any student; "
        "hidden: the last hidden state, from which everything can be computed later; sampled: nothing more",
    )
    k: Int = Field(
        64, ge=1, description="most ids (or bytes) a token; with signal = 'hidden' taken at alignment, so that it can change"
    )
    top_p: Float = Field(1.0, gt=0, le=1, description="stop below k once this mass is reached")
    batch_tokens: Int = Field(16_384, ge=1, description="tokens scored at once, padding included")


class Divergence(Table):
    beta: Float = Field(1.0, ge=0, le=1, description="JSD's β: 0 forward KL(T‖S), 1 reverse KL(S‖T)")


class Gkd(Divergence):
    """Same tokenizer: the divergence at every position."""

    name: Literal["gkd"]
    rest: Literal["bucket", "drop", "renormalise"] = Field("bucket", description="what becomes of mass outside the top k")


class Uld(Table):
    """Sorted L1 over positions paired by index."""

    name: Literal["uld"]
    cross_entropy: Float = Field(0.0, ge=0, description="weight of cross-entropy on the rollout's own tokens")


class Gold(Divergence):
    """Units merged on both sides; a divergence on matched entries, sorted L1 on unmatched ones."""

    name: Literal["gold"]
    merge: Literal["chain", "sum", "observed"] = "chain"
    matched_weight: Float = Field(1.0, ge=0)
    unmatched_weight: Float = Field(1.0, ge=0)
    rest: Literal["bucket", "drop", "renormalise"] = "bucket"


class Bytes(Divergence):
    """The divergence of both models' next-byte laws where the teacher stands on a boundary."""

    name: Literal["bytes"]


class Strict(Table):
    """One-to-one units and the stop; both laws on matched ids alone, reverse KL on the likeliest."""

    name: Literal["strict"]
    top: Int = Field(16, ge=1, le=1024, description="likeliest ids of either side that are compared")


class Alm(Table):
    """A unit's probability on both sides, as two coins."""

    name: Literal["alm"]
    beta: Float = Field(0.0, ge=0, le=1, description="JSD's β: 0 forward KL(T‖S), 1 reverse KL(S‖T)")
    temperature: Float = Field(1.0, gt=0, le=1000, description="τ: probabilities are taken to the power 1/τ")


class Bpm(Divergence):
    """The teacher's mass at a unit's start, carried onto student tokens by their bytes."""

    name: Literal["bpm"]


class Opd(Table):
    """Policy gradient on the log-ratio of a unit; on-policy rows only."""

    name: Literal["opd"]
    clip: Float = Field(2.0, ge=1, description="C: largest importance weight")


class Sft(Table):
    """Cross-entropy on the rows' own tokens; no teacher signal."""

    name: Literal["sft"]
    corrupt_rows: Float = Field(0.0, ge=0, le=1, description="share of rows whose input is corrupted")
    corrupt_tokens: Float = Field(
        0.3, ge=0, le=1, description="share of completion tokens replaced in such a row's input; the labels stay"
    )


# What each objective can be computed from.
SIGNALS = {
    **dict.fromkeys(("gkd", "uld", "gold", "strict", "bpm"), ("topk", "hidden")),
    "bytes": ("topk", "bytes", "hidden"),
    **dict.fromkeys(("alm", "opd", "sft"), ("topk", "bytes", "hidden", "sampled")),
}

Objective = Annotated[Gkd | Uld | Gold | Bytes | Strict | Alm | Bpm | Opd | Sft, Field(discriminator="name")]


Beta = Annotated[Float, Field(ge=0, lt=1)]


class Train(Table):
    batch_size: Int = Field(64, ge=1, description="rollouts an optimizer step")
    micro_batch_size: Int = Field(64, ge=1, description="rollouts a forward pass")
    epochs: Int = Field(1, ge=1, description="passes over a round's rollouts")
    learning_rate: Float = Field(1e-5, gt=0, le=1)
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="over all rounds of the recipe")
    warmup_steps: Int = Field(0, ge=0)
    weight_decay: Float = Field(0.0, ge=0, le=1)
    adam_betas: tuple[Beta, Beta] = (0.9, 0.999)
    grad_clip: Float = Field(1.0, gt=0, description="largest norm of the gradient")
    chunk_positions: Int = Field(1024, ge=1, description="positions whose logits exist at once")


class Evaluate(Table):
    samples: Int = Field(4, ge=0, le=1024, description="sampled completions an eval prompt, beside the greedy one")
    scorer: Literal["task", "exact"] = Field(
        "task", description="task: the source's own scorer (reasoning-gym), else exact match; exact: match with the reference"
    )


class Recipe(Table):
    """One run, from prompts to the last round's student."""

    name: str = Field(pattern=NAME, description="the run's folder under root; letters, digits, . _ -")
    root: str = Field("runs", min_length=1, description="folder or URI that holds the runs")
    seed: Int = Field(0, ge=0, lt=2**31)
    rounds: Int = Field(1, ge=1, le=9999, description="rounds of a complete run; the learning rate's horizon")
    student: Model
    teacher: Model | None = None
    prompts: Prompts
    rollout: Rollout = Rollout()
    score: Score = Score()
    objective: Objective
    train: Train = Train()
    evaluate: Evaluate = Evaluate()

    @field_validator("root")
    @classmethod
    def _no_secrets(cls, root: str) -> str:
        if "@" in urlsplit(root).netloc:  # the recipe is frozen to disk; the message must not repeat it either
            raise ValueError("a user or key in the URI would be written to disk; give it in the environment instead")
        return root

    @model_validator(mode="after")
    def _combinations(self) -> "Recipe":
        if self.objective.name != "sft" and self.teacher is None:
            raise ValueError(f"objective.name = '{self.objective.name}' needs a [teacher]")
        if self.teacher is not None and self.teacher.scratch is not None:
            raise ValueError("teacher.scratch: a teacher cannot be a new model; give teacher.model or teacher.recipe")
        if self.objective.name == "sft" and self.rollout.on_policy > 0:
            raise ValueError(
                f"objective.name = 'sft' learns from given text: set rollout.on_policy = 0 (found {self.rollout.on_policy})"
            )
        if self.rollout.off_policy == "teacher" and self.rollout.on_policy < 1 and self.teacher is None:
            raise ValueError("rollout.off_policy = 'teacher' needs a [teacher]")
        if self.score.signal not in SIGNALS[self.objective.name]:
            raise ValueError(
                f"objective.name = '{self.objective.name}' cannot be computed from score.signal = '{self.score.signal}'; "
                f"set score.signal to one of {', '.join(SIGNALS[self.objective.name])}"
            )
        if self.score.signal == "topk" and self.score.k > MOST:
            raise ValueError(f"score.k = {self.score.k} is more than a scores file can count; set it to at most {MOST}")
        if self.train.micro_batch_size > self.train.batch_size:
            raise ValueError(
                f"train.micro_batch_size = {self.train.micro_batch_size} "
                f"is larger than train.batch_size = {self.train.batch_size}"
            )
        return self

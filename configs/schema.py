"""What a recipe may say. Each field states its unit and its limits; unknown keys are refused."""

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from configs.cache import check_cache
from configs.fields import Bool, Float, Int, Table, words_or_count
from configs.keep import Keep
from configs.models import STUDENT, Model, check_contexts, teach_itself
from configs.objectives import Objective
from configs.prompts import Prompts
from configs.reward import Reward
from configs.signals import SIGNALS, SignalName, signals_for
from configs.track import Track

MOST = 32_767  # events per token in a scores file
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"

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


class Score(Table):
    """What is stored of the teacher at every token, beside the log-prob of the token itself."""

    signal: SignalName = Field(
        "topk",
        description="topk: the likeliest ids and the mass of the rest; bytes: the law of the next byte, for any student; "
        "hidden: the last hidden state, from which everything can be computed later; sampled: nothing more",
    )
    k: Int = Field(
        64, ge=1, description="most ids (or bytes) a token; with signal = 'hidden' taken at alignment, so that it can change"
    )
    top_p: Float = Field(1.0, gt=0, le=1, description="stop below k once this mass is reached")
    batch_tokens: Int = Field(16_384, ge=1, description="tokens scored at once, padding included")


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


class Recipe(Table):
    """One run, from prompts to the last round's student."""

    name: str = Field(pattern=NAME, description="the run's folder under root; letters, digits, . _ -")
    root: str = Field("runs", min_length=1, description="folder or URI that holds the runs")
    seed: Int = Field(0, ge=0, lt=2**31, description="everything random derives from it")
    rounds: Int = Field(1, ge=1, le=9999, description="rounds of a complete run; the learning rate's horizon")
    student: Model
    teacher: Model | None = None
    prompts: Prompts = Field(description="where prompts come from")
    rollout: Rollout = Rollout()
    score: Score = Score()
    objective: Objective = Field(description="what training makes small")
    reward: Reward = Reward()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    gates: Gates = Gates()
    keep: Keep = Keep()
    compute: Compute = Compute()
    track: Track = Track()

    @field_validator("root")
    @classmethod
    def _no_secrets(cls, root: str) -> str:
        # The recipe is frozen to disk; the message must not repeat it either.
        if "@" in urlsplit(root).netloc or ("://" in root and "?" in root):
            raise ValueError("a user or key in the URI would be written to disk; give it in the environment instead")
        return root

    @model_validator(mode="before")
    @classmethod
    def _teach_itself(cls, data: Any) -> Any:
        student, teacher = (data.get(role) if isinstance(data, dict) else None for role in ("student", "teacher"))
        if isinstance(student, dict) and isinstance(teacher, dict) and teacher.get("model") == STUDENT:
            return data | {"teacher": teach_itself(student, teacher)}
        return data

    @property
    def graded(self) -> bool:
        """Whether the student's samples are graded in each round: they are chosen by it, or it teaches."""
        return self.rollout.keep != "all" or self.reward.weight > 0

    @property
    def self_taught(self) -> bool:
        """Whether the student is its own teacher."""
        return self.teacher is not None and self.teacher.model == STUDENT

    @model_validator(mode="after")
    def _contexts(self) -> "Recipe":
        check_contexts(self.student, self.teacher)
        check_cache(self.student, self.teacher, self.rollout, self.score)
        return self

    @model_validator(mode="after")
    def _combinations(self) -> "Recipe":
        signal = SIGNALS[self.score.signal]
        if self.objective.needs_teacher and self.teacher is None:
            raise ValueError(f"objective.name = '{self.objective.name}' needs a [teacher]")
        if self.teacher is not None and self.teacher.scratch is not None:
            raise ValueError("teacher.scratch: a teacher cannot be a new model; give teacher.model or teacher.recipe")
        if self.student.engine == "server":
            raise ValueError(
                "student.engine = 'server': a student has new weights each round, and a server would go on with the old ones; "
                "set student.engine to 'vllm' or 'transformers'"
            )
        if self.teacher is not None and self.teacher.engine == "server" and signal.whole:
            raise ValueError(
                f"score.signal = '{self.score.signal}' needs the teacher's whole distributions, which a server does not give: "
                "set teacher.engine = 'transformers' or 'vllm' (found 'server'), or score.signal = 'topk'"
            )
        if self.teacher is not None and self.teacher.lora is not None:
            raise ValueError("teacher.lora: a teacher is not trained; give student.lora")
        for key in ("markers", "unpaired"):
            if getattr(self.student, key) != type(self.student).model_fields[key].default:
                raise ValueError(f"student.{key}: it says how a teacher reads the student's answers; give teacher.{key}")
        if self.student.lora is not None and self.train.sharding == "full":
            raise ValueError("student.lora trains few weights: set train.sharding = 'none'")
        if self.objective.given_text and self.rollout.on_policy > 0:
            raise ValueError(
                f"objective.name = '{self.objective.name}' learns from given text: set rollout.on_policy = 0 "
                f"(found {self.rollout.on_policy})"
            )
        if self.rollout.keep != "all" and self.rollout.on_policy == 0:
            raise ValueError(
                f"rollout.keep = {self.rollout.keep!r} chooses among the student's own samples, and "
                "rollout.on_policy = 0 makes none; leave rollout.keep out, or raise rollout.on_policy"
            )
        if self.objective.name == "reward" and (not self.reward.weight or self.rollout.on_policy < 1):
            raise ValueError(
                "objective.name = 'reward' trains on rewards alone: set reward.weight above 0 and rollout.on_policy = 1 (found "
                f"{self.reward.weight} and {self.rollout.on_policy})"
            )
        if self.reward.weight and self.rollout.on_policy == 0:
            raise ValueError(
                f"reward.weight = {self.reward.weight} teaches by the student's own samples, and rollout.on_policy = 0 makes "
                "none; leave reward.weight out, or raise rollout.on_policy"
            )
        if self.reward.weight and self.rollout.samples < 2:
            raise ValueError(
                f"reward.weight = {self.reward.weight} compares the samples of a prompt: set rollout.samples to 2 or more "
                f"(found {self.rollout.samples})"
            )
        if self.rollout.off_policy == "teacher" and self.rollout.on_policy < 1 and self.teacher is None:
            raise ValueError("rollout.off_policy = 'teacher' needs a [teacher]")
        if not signal.gives & self.objective.reads:
            raise ValueError(
                f"objective.name = '{self.objective.name}' cannot be computed from score.signal = '{self.score.signal}'; "
                f"set score.signal to one of {', '.join(signals_for(self.objective.reads))}"
            )
        if signal.cut and signal.counts_ids and self.score.k > MOST:
            raise ValueError(f"score.k = {self.score.k} is more than a scores file can count; set it to at most {MOST}")
        if self.train.sharding == "full" and self.train.processes == 1:
            raise ValueError("train.sharding = 'full' parts the student among processes: set train.processes to 2 or more")
        if self.train.param_dtype == "bfloat16" and self.train.processes > 1 and self.train.sharding == "none":
            raise ValueError(
                "train.param_dtype = 'bfloat16' keeps float32 weights in one process, or parted among several: set "
                "train.sharding = 'full'"
            )
        if self.train.processes > 1 and ":" in self.student.device:
            raise ValueError(
                f"student.device = '{self.student.device}' is one device, but train.processes = {self.train.processes} "
                "use one each; set student.device = 'auto'"
            )
        if self.evaluate.best == "sampled" and not self.evaluate.samples:
            raise ValueError("evaluate.best = 'sampled' needs samples: set evaluate.samples to 1 or more, or best to 'greedy'")
        if self.evaluate.best == "divergence" and self.teacher is None:
            raise ValueError("evaluate.best = 'divergence' needs a [teacher]; set it to 'sampled' or 'greedy'")
        if self.train.micro_batch_size > self.train.batch_size:
            raise ValueError(
                f"train.micro_batch_size = {self.train.micro_batch_size} "
                f"is larger than train.batch_size = {self.train.batch_size}"
            )
        return self

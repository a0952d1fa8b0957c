"""What the fields of a recipe must be together. Each check raises ValueError with what would be right."""

from configs.evaluate import Evaluate
from configs.models import Model, check_contexts
from configs.objectives import ObjectiveConfig
from configs.reward import Reward
from configs.rollout import Rollout
from configs.score import Score
from configs.signals import SIGNALS, signals_for
from configs.teachers import role_of
from configs.train import Train

MOST = 32_767  # events per token in a scores file


def check_student(student: Model) -> None:
    """What `[student]` cannot be."""
    if student.engine == "server":
        raise ValueError(
            "student.engine = 'server': a student has new weights each round, and a server would go on with the old ones; "
            "set student.engine to 'vllm' or 'transformers'"
        )
    for key in ("markers", "unpaired"):
        if getattr(student, key) != type(student).model_fields[key].default:
            raise ValueError(f"student.{key}: it says how a teacher reads the student's answers; give teacher.{key}")


def check_teacher(student: Model, teacher: Model | None, score: Score) -> None:
    """What a teacher cannot be, beside the student and with what is stored of it."""
    role = role_of(teacher)
    check_contexts(student, teacher, role)
    if teacher is None:
        return
    if teacher.scratch is not None:
        raise ValueError(f"{role}.scratch: a teacher cannot be a new model; give {role}.model or {role}.recipe")
    if teacher.engine == "server" and SIGNALS[score.signal].whole:
        raise ValueError(
            f"score.signal = '{score.signal}' needs the teacher's whole distributions, which a server does not give: "
            f"set {role}.engine = 'transformers' or 'vllm' (found 'server'), or score.signal = 'topk'"
        )
    if teacher.lora is not None:
        raise ValueError(f"{role}.lora: a teacher is not trained; give student.lora")


def check_signal(objective: ObjectiveConfig, score: Score) -> None:
    """Whether the objective can be computed from what is stored of a teacher."""
    signal = SIGNALS[score.signal]
    if not signal.gives & objective.reads:
        raise ValueError(
            f"objective.name = '{objective.name}' cannot be computed from score.signal = '{score.signal}'; "
            f"set score.signal to one of {', '.join(signals_for(objective.reads))}"
        )
    if signal.cut and signal.counts_ids and score.k > MOST:
        raise ValueError(f"score.k = {score.k} is more than a scores file can count; set it to at most {MOST}")


def check_sources(objective: ObjectiveConfig, rollout: Rollout, *, taught: bool) -> None:
    """Whether the rows that a round has are those that its objective can use, with a teacher or without."""
    if objective.needs_teacher and not taught:
        raise ValueError(f"objective.name = '{objective.name}' needs a [teacher]")
    if objective.given_text and rollout.on_policy > 0:
        raise ValueError(
            f"objective.name = '{objective.name}' learns from given text: set rollout.on_policy = 0 (found {rollout.on_policy})"
        )
    if rollout.off_policy == "teacher" and rollout.on_policy < 1 and not taught:
        raise ValueError("rollout.off_policy = 'teacher' needs a [teacher]")


def check_rewards(objective: ObjectiveConfig, rollout: Rollout, reward: Reward) -> None:
    """Whether there is something to choose from, or to compare, where rewards choose or teach."""
    weight = reward.weight
    if rollout.keep != "all" and rollout.on_policy == 0:
        raise ValueError(
            f"rollout.keep = {rollout.keep!r} chooses among the student's own samples, and "
            "rollout.on_policy = 0 makes none; leave rollout.keep out, or raise rollout.on_policy"
        )
    if objective.name == "reward" and (not weight or rollout.on_policy < 1):
        raise ValueError(
            "objective.name = 'reward' trains on rewards alone: set reward.weight above 0 and rollout.on_policy = 1 (found "
            f"{weight} and {rollout.on_policy})"
        )
    if weight and rollout.on_policy == 0:
        raise ValueError(
            f"reward.weight = {weight} teaches by the student's own samples, and rollout.on_policy = 0 makes "
            "none; leave reward.weight out, or raise rollout.on_policy"
        )
    if weight and rollout.samples < 2:
        raise ValueError(
            f"reward.weight = {weight} compares the samples of a prompt: set rollout.samples to 2 or more "
            f"(found {rollout.samples})"
        )


def check_training(train: Train, student: Model) -> None:
    """Whether the student can be held, and parted, as `[train]` says."""
    if student.lora is not None and train.sharding == "full":
        raise ValueError("student.lora trains few weights: set train.sharding = 'none'")
    if train.sharding == "full" and train.processes == 1:
        raise ValueError("train.sharding = 'full' parts the student among processes: set train.processes to 2 or more")
    if train.param_dtype == "bfloat16" and train.processes > 1 and train.sharding == "none":
        raise ValueError(
            "train.param_dtype = 'bfloat16' keeps float32 weights in one process, or parted among several: set "
            "train.sharding = 'full'"
        )
    if train.processes > 1 and ":" in student.device:
        raise ValueError(
            f"student.device = '{student.device}' is one device, but train.processes = {train.processes} "
            "use one each; set student.device = 'auto'"
        )
    if train.micro_batch_size > train.batch_size:
        raise ValueError(
            f"train.micro_batch_size = {train.micro_batch_size} is larger than train.batch_size = {train.batch_size}"
        )


def check_figures(evaluate: Evaluate, *, taught: bool) -> None:
    """Whether the best round has a figure to be chosen by."""
    best = evaluate.best
    if best == "sampled" and not evaluate.samples:
        raise ValueError("evaluate.best = 'sampled' needs samples: set evaluate.samples to 1 or more, or best to 'greedy'")
    if best == "divergence" and not taught:
        raise ValueError("evaluate.best = 'divergence' needs a [teacher]; set it to 'sampled' or 'greedy'")

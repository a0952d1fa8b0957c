"""Gates: a figure, its limit, and what to do about a breach. Each kind of gate is declared once."""

from dataclasses import dataclass
from typing import Any

from configs.errors import Stopped
from configs.gates import Gates

SHARE = "%"
CHANGE = "limits are in the recipe's [gates]; they may change, and the same command then goes on"


@dataclass(frozen=True)
class GateKind:
    """The declaration of a gate: the unit of its figure, and what to do about a breach."""

    unit: str  # SHARE, or a word behind the number
    advice: str = ""
    least: bool = False  # whether the limit is a lower one
    field: str = ""  # the limit's field in [gates], where it has another name than the gate


AGREE = "engine and trainer disagree on the same tokens: compare temperature, dtype and attention of both"
KINDS = {
    "prompts": GateKind("prompts"),
    "spelled": GateKind(SHARE, "the tokenizer changes some texts: choose another model, or clean the prompts", least=True),
    "template": GateKind(
        "prompts", "correct chat_template in the model's tokenizer_config.json, or set rendering = 'plain' for this model"
    ),
    "kept": GateKind(
        "prompts",
        "its chat template leaves that out: put it into the user message, give the model a template that has it, or set "
        "rendering = 'plain' for it",
    ),
    "closed": GateKind(
        "prompts",
        "the prompt ends in a token that ends answers, before the answer begins: correct its chat template, or leave that "
        "token out of its stops",
    ),
    "stops": GateKind(
        "tokens",
        "nothing ends a turn in its chat template, so its answers run on: name the token in stop, or correct the template",
        least=True,
    ),
    "boundary": GateKind(
        SHARE,
        "the last token of the prompt merges with the start of the answer: let the template end with a line break",
        least=True,
    ),
    "room": GateKind("tokens", "shorten the prompts, lower rollout.max_new_tokens, or take a model with a longer context"),
    "chance": GateKind(
        SHARE, "the model predicts text hardly better than a uniform guess: the tokenizer does not belong to the weights"
    ),
    "expected": GateKind(
        SHARE,
        "one side begins with thinking or a control token where the other does not: switch it off with "
        "chat_template_kwargs = { enable_thinking = false } where its template reads that, else close it with prefix; where "
        "both are to think, pair their tokens in teacher.markers",
    ),
    "matched": GateKind(
        SHARE, "the vocabularies have little in common: choose objective.name = 'bytes', which needs no match", least=True
    ),
    "one to one": GateKind(SHARE, "units of several tokens mislead a chain merge: choose objective.name = 'bytes'", least=True),
    "engine, mean": GateKind("nats per token", AGREE, field="engine_mean"),
    "engine, largest": GateKind("nats per token", AGREE, field="engine_max"),
    "teacher's engine": GateKind(
        "nats per token", "the engine scores its samples with other log-probs than it drew them: they may be one token off"
    ),
    "noise": GateKind(
        SHARE, "the teacher's scores change from call to call, by too much against its distance from the student: use float32"
    ),
    "own teacher": GateKind(
        "nats per unit", "the student has a loss against itself: raise score.k to keep more of the teacher's distribution"
    ),
    "loss": GateKind("nats per unit"),
    "lead": GateKind(
        "", "the teacher is no better than the student on these prompts: choose a better teacher, or other prompts", True
    ),
    "disk": GateKind("GiB", "free some space, store less of the teacher (score.k, score.signal), or run fewer rounds"),
    "memory": GateKind("GiB", "take smaller models, bfloat16, or a device with more memory"),
    "hours": GateKind("hours"),
    "supervised": GateKind(
        SHARE, "the loss covers too few bytes: see `potstill inspect` for what is unmatched or dropped", least=True
    ),
    "dropped": GateKind(SHARE, "the prompts or a tokenizer do not fit: see the `status` column of the aligned table"),
    "truncated": GateKind(SHARE, "raise rollout.max_new_tokens, or begin with a student that knows how to stop"),
    "repetition": GateKind(
        SHARE, "the student repeats itself: lower train.learning_rate, or mix in references (rollout.on_policy below 1)"
    ),
    "tokens": GateKind("tokens"),
    "length": GateKind(
        "times", "the student's answers grow or shrink too much: lower train.learning_rate, or change the objective"
    ),
}


@dataclass(frozen=True)
class Gate:
    """One figure and its limit. The value is None where there was nothing to measure; without a limit the gate only informs.

    Its name is that of its kind, after the model or device that it concerns, if any: `student: spelled`.
    """

    name: str
    value: float | None
    limit: float | None = None
    detail: str = ""

    @property
    def kind(self) -> GateKind:
        """The declaration of this gate."""
        return KINDS[self.name.rpartition(": ")[2]]

    @property
    def ok(self) -> bool | None:
        """Whether the figure keeps the limit; None without a limit or a figure. NaN never does."""
        if self.value is None or self.limit is None:
            return None
        return bool(self.value >= self.limit if self.kind.least else self.value <= self.limit)  # also of numpy's numbers

    def bound(self) -> str:
        """The limit in words, such as `at most 0.05 nats per token`; empty without a limit."""
        if self.limit is None:
            return ""
        return f"{'at least' if self.kind.least else 'at most'} {format_figure(self.limit, self.kind.unit)}"

    def record(self) -> dict[str, Any]:
        """The gate as a row for people, all values as text."""
        result = {True: "ok", False: "BREACHED", None: "" if self.limit is None else "nothing to measure"}[self.ok]
        return {
            "gate": self.name,
            "value": "" if self.value is None else format_figure(self.value, self.kind.unit),
            "limit": self.bound(),
            "result": result,
            "detail": self.detail,
            "advice": self.kind.advice if self.ok is False else "",
        }

    def complaint(self) -> str:
        """A breach and what to do about it, in one line."""
        record, detail = self.record(), f" ({self.detail})" if self.detail else ""
        return f"{self.name}: {record['value']}{detail}, {record['limit']} is allowed; {self.kind.advice}"


def format_figure(value: float, unit: str) -> str:
    """A number with its unit: `93.1%`, `0.0312 nats per token`, `7,000 prompts`."""
    if unit == SHARE:
        return f"{value:.1%}"
    return f"{value:,.0f} {unit}".strip() if abs(value) >= 1000 else f"{value:.3g} {unit}".strip()


def limit_figure(name: str, value: float | None, limits: Gates, detail: str = "") -> Gate:
    """A figure of a round, with its limit if it has one. Behind a teacher's name it has the limit of its kind."""
    kind = name.rpartition(": ")[2]
    return Gate(name, value, getattr(limits, KINDS[kind].field or kind, None), detail)


def prefix_name(teacher: str, name: str) -> str:
    """The name of a gate that concerns one of several teachers' rows: `math: dropped`."""
    return f"{teacher}: {name}" if teacher else name


def require(gates: list[Gate], where: str) -> None:
    """Raise Stopped with every breached gate of `gates`; `where` names the run and round."""
    if breached := [gate.complaint() for gate in gates if gate.ok is False]:
        raise Stopped(f"{where}: " + "\n  ".join(["stopped by a gate", *breached, CHANGE]))

"""A figure, its limit, and what to do about a breach. Each kind of gate is declared once."""

from dataclasses import dataclass
from typing import Any

from configs.errors import Stopped
from configs.schema import Gates

SHARE = "%"


@dataclass(frozen=True)
class GateKind:
    """What is said of a gate in one place: the unit of its figure, and what to do about a breach."""

    unit: str  # SHARE, or a word behind the number
    advice: str = ""
    least: bool = False  # its limit is the least that will do, not the most
    field: str = ""  # its limit in [gates], where it is not called as the gate is


AGREE = "engine and trainer disagree on the same tokens: compare temperature, dtype and attention of both"
KINDS = {
    "prompts": GateKind("prompts"),
    "spelled": GateKind(SHARE, "its tokenizer changes these texts: choose another model, or clean the prompts", least=True),
    "template": GateKind(
        "prompts", "correct chat_template in the model's tokenizer_config.json, or set rendering = 'plain' for it"
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
        "the last token of the prompt swallows the beginning of the answer: let the template end in a line break",
        least=True,
    ),
    "room": GateKind("tokens", "shorten the prompts, lower rollout.max_new_tokens, or take a model with a longer context"),
    "chance": GateKind(SHARE, "it does not know text in these ids: the tokenizer does not belong to the weights"),
    "matched": GateKind(
        SHARE, "the vocabularies have little in common: choose objective.name = 'bytes', which needs no match", least=True
    ),
    "one to one": GateKind(SHARE, "units of several tokens mislead a chain merge: choose objective.name = 'bytes'", least=True),
    "engine, mean": GateKind("nats per token", AGREE, field="engine_mean"),
    "engine, largest": GateKind("nats per token", AGREE, field="engine_max"),
    "teacher's engine": GateKind(
        "nats per token", "it scores what it sampled differently: its log-probs stand at the wrong tokens"
    ),
    "noise": GateKind(
        SHARE, "the teacher's scores change from one call to the next by too much of what there is to learn: use float32"
    ),
    "own teacher": GateKind(
        "nats per unit", "the student has a loss against itself: a larger score.k keeps more of the teacher's distribution"
    ),
    "loss": GateKind("nats per unit"),
    "lead": GateKind(
        "", "the student has nothing to learn from this teacher here: choose a better one, or other prompts", True
    ),
    "disk": GateKind("GiB", "free some space, keep less of the teacher (score.k, score.signal), or run fewer rounds"),
    "memory": GateKind("GiB", "take smaller models, bfloat16, or a device with more memory"),
    "hours": GateKind("hours"),
    "supervised": GateKind(
        SHARE, "most of the text teaches nothing: see `potstill inspect` for what is unmatched or dropped", least=True
    ),
    "dropped": GateKind(SHARE, "see the `status` column of the aligned table for why; the prompts or a tokenizer do not fit"),
    "truncated": GateKind(SHARE, "raise rollout.max_new_tokens, or begin with a student that knows how to stop"),
    "repetition": GateKind(
        SHARE, "the student loops: lower train.learning_rate, or mix in references (rollout.on_policy below 1)"
    ),
    "tokens": GateKind("tokens"),
    "length": GateKind(
        "times", "the student's answers run away or collapse: lower train.learning_rate, or change the objective"
    ),
}


@dataclass(frozen=True)
class Gate:
    """One figure and its limit. Without a value there was nothing to measure; without a limit it only informs.

    Its kind is its name, behind the model or device that it is of: `student: spelled`.
    """

    name: str
    value: float | None
    limit: float | None = None
    detail: str = ""

    @property
    def kind(self) -> GateKind:
        return KINDS[self.name.rpartition(": ")[2]]

    @property
    def ok(self) -> bool | None:
        """Whether the limit holds; None where there is none, or nothing to compare. NaN never holds."""
        if self.value is None or self.limit is None:
            return None
        return bool(self.value >= self.limit if self.kind.least else self.value <= self.limit)  # also of numpy's numbers

    def bound(self) -> str:
        """`at most 0.05 nats per token`; empty without a limit."""
        if self.limit is None:
            return ""
        return f"{'at least' if self.kind.least else 'at most'} {format_figure(self.limit, self.kind.unit)}"

    def record(self) -> dict[str, Any]:
        """The gate as people read it."""
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
        """What a breach means and what to do, in one line."""
        record, detail = self.record(), f" ({self.detail})" if self.detail else ""
        return f"{self.name}: {record['value']}{detail}, {record['limit']} is allowed; {self.kind.advice}"


def format_figure(value: float, unit: str) -> str:
    """A number with its unit: `93.1%`, `0.0312 nats per token`, `7,000 prompts`."""
    if unit == SHARE:
        return f"{value:.1%}"
    return f"{value:,.0f} {unit}".strip() if abs(value) >= 1000 else f"{value:.3g} {unit}".strip()


def limit_figure(name: str, value: float | None, limits: Gates, detail: str = "") -> Gate:
    """A figure of a round, with its limit if it has one."""
    return Gate(name, value, getattr(limits, KINDS[name].field or name, None), detail)


def require(gates: list[Gate], where: str) -> None:
    """Raise Stopped with every breached gate of `gates`; `where` says what was looked at."""
    if breached := [gate.complaint() for gate in gates if gate.ok is False]:
        raise Stopped(f"{where}: " + "\n  ".join(["stopped by a gate", *breached, "limits are in the recipe's [gates]"]))

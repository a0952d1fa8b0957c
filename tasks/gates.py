"""Gates: figures with a limit. What breaches one stops the run, with the reason and the numbers (DESIGN.md §7)."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import torch
from prefect import task
from prefect.cache_policies import NO_CACHE

from configs.errors import Stopped
from configs.schema import Gates, Recipe
from storage.artifacts import Artifact, read_table
from storage.schemas import GATES
from storage.store import Run, part, round_slot
from tasks.agreement import Gap, trainer_logprobs
from tasks.engines.base import Sampling
from tasks.engines.choose import release
from tasks.models import ModelRef, float32_model, side
from tasks.progress import logger
from tasks.ragged import flat, rows_of, within

CODE = 1
COMPARED = 32  # of a round's samples, how many are run through the trainer's model
FIELDS = {"engine, mean": "engine_mean", "engine, largest": "engine_max"}  # limits under another name than their figure's
RUN = 4  # tokens: what counts as a repetition

# What to do about a breach, by gate.
ADVICE = {
    "spelled": "its tokenizer changes these texts: choose another model, or clean the prompts",
    "template": "correct chat_template in the model's tokenizer_config.json, or set rendering = 'plain' for it",
    "boundary": "the last token of the prompt swallows the beginning of the answer: let the template end in a line break",
    "room": "shorten the prompts, lower rollout.max_new_tokens, or take a model with a longer context",
    "chance": "it does not know text in these ids: the tokenizer does not belong to the weights",
    "matched": "the vocabularies have little in common: choose objective.name = 'bytes', which needs no match",
    "one to one": "units of several tokens mislead a chain merge: choose objective.name = 'bytes'",
    "engine, mean": "engine and trainer disagree on the same tokens: compare temperature, dtype and attention of both",
    "engine, largest": "engine and trainer disagree on the same tokens: compare temperature, dtype and attention of both",
    "teacher's engine": "it scores what it sampled differently: its log-probs stand at the wrong tokens",
    "noise": "the teacher's scores change from one call to the next by too much of what there is to learn: use float32",
    "own teacher": "the student has a loss against itself: a larger score.k keeps more of the teacher's distribution",
    "lead": "the student has nothing to learn from this teacher here: choose a better one, or other prompts",
    "disk": "free some space, keep less of the teacher (score.k, score.signal), or run fewer rounds",
    "memory": "take smaller models, bfloat16, or a device with more memory",
    "supervised": "most of the text teaches nothing: see `potstill inspect` for what is unmatched or dropped",
    "dropped": "see the `status` column of the aligned table for why; the prompts or a tokenizer do not fit",
    "truncated": "raise rollout.max_new_tokens, or begin with a student that knows how to stop",
    "repetition": "the student loops: lower train.learning_rate, or mix in references (rollout.on_policy below 1)",
    "length": "the student's answers run away or collapse: lower train.learning_rate, or change the objective",
}


@dataclass(frozen=True)
class Gate:
    """One figure and its limit. Without a value there was nothing to measure; without a limit it only informs."""

    name: str
    value: float | None
    limit: float | None = None
    least: bool = False  # the limit is the least that will do, not the most
    detail: str = ""

    @property
    def ok(self) -> bool | None:
        """Whether the limit holds; None where there is none, or nothing to compare. NaN never holds."""
        if self.value is None or self.limit is None:
            return None
        return bool(self.value >= self.limit if self.least else self.value <= self.limit)  # also of numpy's numbers

    @property
    def bound(self) -> str:
        return "at least" if self.least else "at most"

    def shown(self, number: float | None) -> str:
        return "" if number is None else f"{number:.3g}"

    def record(self) -> dict[str, Any]:
        """The gate as people read it."""
        verdict = {True: "ok", False: "BREACHED", None: "" if self.limit is None else "nothing to measure"}[self.ok]
        limit = "" if self.limit is None else f"{self.bound} {self.shown(self.limit)}"
        return {
            "gate": self.name,
            "found": self.shown(self.value),
            "limit": limit,
            "verdict": verdict,
            "detail": self.detail,
            "advice": self.advice if self.ok is False else "",
        }

    @property
    def advice(self) -> str:
        return ADVICE[self.name.rpartition(": ")[2]]

    def complaint(self) -> str:
        bound = f"{self.bound} {self.shown(self.limit)} is allowed"
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.name}: {self.shown(self.value)}{detail}, {bound}; {self.advice}"


def hold(gates: list[Gate], where: str) -> None:
    """Raise Stopped with every breached gate of `gates`; `where` says what was looked at."""
    if breached := [gate.complaint() for gate in gates if gate.ok is False]:
        raise Stopped(f"{where}: " + "\n  ".join(["stopped by a gate", *breached, "limits are in the recipe's [gates]"]))


def check_lead(recipe: Recipe, teacher: Artifact, student: Artifact) -> None:
    """Raise Stopped where the evaluations before any training say that the teacher surely lacks the lead it should have."""
    hold([lead(read_table(teacher), read_table(student), recipe.gates)], f"{Run(recipe.root, recipe.name).path}, round 0")


def lead(teacher: pa.Table, student: pa.Table, limits: Gates) -> Gate:
    """The teacher's accuracy less the student's on the same prompts, sampled where there are samples.

    The figure that is held against the limit is the upper end of its 95% interval: chance stops no run.
    """
    shares = []
    for table in (teacher, student):
        frame = pl.from_arrow(table)
        assert isinstance(frame, pl.DataFrame)
        kind = "sampled" if (frame["decoding"] == "sampled").any() else "greedy"
        own = frame.filter(pl.col("decoding") == kind)
        shares.append(own.group_by("prompt_id").agg(pl.col("correct").mean()).sort("prompt_id")["correct"].to_numpy())
    apart = shares[0] - shares[1]
    spread = 1.96 * float(apart.std(ddof=1)) / len(apart) ** 0.5 if len(apart) > 1 else 1.0
    detail = f"teacher {shares[0].mean():.3f}, student {shares[1].mean():.3f}; the lead is at most the figure, with 97.5%"
    if not shares[0].any() and not shares[1].any():
        return Gate("lead", None, limits.lead, least=True, detail="no answer of either is right")
    return Gate("lead", float(apart.mean()) + spread, limits.lead, least=True, detail=detail)


@task(name="gates", task_run_name="gates-{number}", cache_policy=NO_CACHE)
def check_round(recipe: Recipe, number: int, student: ModelRef, rollouts: list[Artifact], aligned: list[Artifact]) -> Artifact:
    """`round=…/gates/part-00000`: what a round's rollouts look like before they are trained on. Raises Stopped."""
    run, limits = Run(recipe.root, recipe.name), recipe.gates
    inputs = {
        "stage": "gates",
        "code": CODE,
        "policy": student.identity,
        "rollouts": [artifact.digest for artifact in rollouts],
        "aligned": [artifact.digest for artifact in aligned],
        "sampling": recipe.rollout.model_dump(include={"temperature", "top_p", "top_k"}),
    }
    first = run.find(round_slot(1, "gates", part(0))) if number > 1 else None
    inputs["first"] = first.digest if first else None

    def make() -> pa.Table:
        before = dict(zip(*(read_table(first, ["gate", "value"]).to_pydict().values()), strict=True)) if first else {}
        gates = round_gates(rollouts, aligned, side(student).vocabulary.size, limits, before.get("tokens"))
        release()  # the model below takes its place
        sampled = read_table(rollouts[0], ["prompt_token_ids", "token_ids", "logprobs"])
        gates += engine_gates(student, sampled, Sampling.of(recipe.rollout), limits)
        release()
        return pa.Table.from_pylist([{**asdict(gate), "gate": gate.name, "round": number} for gate in gates], GATES)

    artifact = run.build_table(round_slot(number, "gates", part(0)), inputs, make, logger.info)
    hold(stored(read_table(artifact), limits), f"{run.path}, round {number}")
    return artifact


def stored(table: pa.Table, limits: Gates) -> list[Gate]:
    """The figures of a `gates` table under these limits, which may have changed since it was made."""
    rows = table.select(["gate", "value", "detail"]).to_pylist()
    return [_limited(row["gate"], row["value"], limits, row["detail"]) for row in rows]


def _limited(name: str, value: float | None, limits: Gates, detail: str = "") -> Gate:
    """A figure of a round, with its limit if it has one."""
    return Gate(name, value, getattr(limits, FIELDS.get(name, name), None), least=name == "supervised", detail=detail)


def round_gates(
    rollouts: list[Artifact], aligned: list[Artifact], size: int, limits: Gates, tokens_before: float | None
) -> list[Gate]:
    """Coverage of all rows; truncation, repetition and length of the student's own. One shard is read at a time.

    `size` is the student's vocabulary, `tokens_before` the mean length of the first round's samples.
    """
    counts = ["supervised_bytes", "unmatched_bytes", "dropped_bytes", "tail_bytes"]
    supervised = total = dropped = rows = cut = samples = tokens = 0
    repeated = 0.0
    for artifact in aligned:
        table = pl.from_arrow(read_table(artifact, ["status", *counts]))
        assert isinstance(table, pl.DataFrame)
        supervised += int(table[counts[0]].sum())
        total += sum(int(table[name].sum()) for name in counts)
        dropped += int((table["status"] != "ok").sum())
        rows += len(table)
    for artifact in rollouts:
        table = read_table(artifact, ["source", "finish_reason", "token_ids"])
        table = table.filter(pc.equal(table["source"], "student"))
        cut += pc.sum(pc.equal(table["finish_reason"], "length")).as_py() or 0
        samples += len(table)
        ids, offsets = flat(table["token_ids"])
        tokens += len(ids)
        repeated += float(repetition(ids, offsets, size).sum())
    mean = tokens / samples if samples else None
    drift = max(mean / tokens_before, tokens_before / mean) if mean and tokens_before else None
    return [
        _limited("supervised", supervised / total if total else None, limits),
        _limited("dropped", dropped / rows if rows else None, limits, f"{dropped} of {rows} rollouts"),
        _limited("truncated", cut / samples if samples else None, limits, f"{cut} of {samples} samples"),
        _limited("repetition", repeated / samples if samples else None, limits),
        _limited("tokens", mean, limits, "mean length of the student's samples"),
        _limited("length", drift, limits, f"{mean or 0:.1f} tokens now, {tokens_before or 0:.1f} in round 1"),
    ]


def repetition(ids: np.ndarray, offsets: np.ndarray, size: int) -> np.ndarray:
    """Of each row's runs of four tokens, the share that stood in it before; 0 for shorter rows. `size` is the vocabulary."""
    counts = np.maximum(np.diff(offsets) - RUN + 1, 0)
    begins = np.flatnonzero(np.repeat(np.diff(offsets), np.diff(offsets)) - within(offsets) >= RUN)
    key = np.zeros(len(begins), np.uint64)
    for step in range(RUN):
        key = key * np.uint64(size) + ids[begins + step].astype(np.uint64)  # wraps around for large vocabularies: a hash
    row = rows_of(offsets)[begins]
    order = np.lexsort((key, row))
    again = (np.diff(key[order]) == 0) & (np.diff(row[order]) == 0)
    return np.bincount(row[order][1:][again], minlength=len(counts)) / np.maximum(counts, 1)


def engine_gates(student: ModelRef, rollouts: pa.Table, sampling: Sampling, limits: Gates) -> list[Gate]:
    """How far the log-probs of the engine that sampled are from the trainer's, on the first of a shard's own samples."""
    own = rollouts.filter(pc.is_valid(rollouts["logprobs"])).slice(0, COMPARED)
    gap = Gap(None, None)
    if len(own):
        with torch.inference_mode():
            mine = trainer_logprobs(student, float32_model(student).eval(), own, sampling)
        gap = Gap.between(mine, flat(own["logprobs"])[0])
    detail = f"log-probs of {len(own)} samples against the trainer's"
    return [
        _limited("engine, mean", gap.mean, limits, detail),
        _limited("engine, largest", gap.largest, limits, detail),
    ]

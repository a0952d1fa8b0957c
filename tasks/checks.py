"""What `potstill preflight` looks at: prompts, tokenizers, engines and signal, on a few prompts and in memory alone."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from transformers import AutoConfig

from configs.schema import Recipe
from storage.artifacts import parquet_bytes
from storage.store import Run
from tasks import objectives
from tasks.agreement import Gap
from tasks.align import aligned_table
from tasks.engines.base import Engine, Sampling, Signal
from tasks.engines.choose import engine, release
from tasks.evaluate import completions
from tasks.gates import Gate, engine_gates, lead
from tasks.models import ModelRef, Side, device_of, dtype_of, empty_model, side
from tasks.prompts import split_prompts
from tasks.ragged import flat
from tasks.rollout import Row, rollouts_table
from tasks.score import scores_table
from tasks.seeds import derive
from tasks.signals import head_of
from tasks.student import mean_loss
from tasks.tokens.align import Kind

GIB = 2**30
TRAINED = 16  # bytes a weight in training: float32 weight, gradient, and AdamW's two moments
FROZEN = 4  # of a weight beside which adapters are trained


@dataclass(frozen=True)
class Sample:
    """A few prompts and what student and teacher make of them."""

    recipe: Recipe
    prompts: pa.Table
    student: ModelRef
    teacher: ModelRef | None

    @property
    def messages(self) -> list[list[dict[str, str]]]:
        return self.prompts["messages"].to_pylist()

    def sides(self) -> dict[str, ModelRef]:
        return {"student": self.student} | ({"teacher": self.teacher} if self.teacher else {})

    def loaded(self, ref: ModelRef, batch_tokens: int | None = None) -> Engine:
        return engine(ref, self.recipe.rollout.batch_size, batch_tokens or self.recipe.score.batch_tokens)


# -- without weights ---------------------------------------------------------------------------------------------------


def text_gates(sample: Sample) -> Iterator[Gate]:
    """Both tokenizers and templates on the prompts."""
    limits = sample.recipe.gates
    texts = [m["content"] for messages in sample.messages for m in messages]
    texts += [text for text in sample.prompts["reference"].to_pylist() if text]
    for role, ref in sample.sides().items():
        text_side = side(ref)
        spelled = [ids is not None for ids in text_side.encoder.encode(texts)]
        detail = f"of {len(texts)} texts" if all(spelled) else f"not: {texts[spelled.index(False)]!r:.60}"
        yield Gate(f"{role}: spelled", sum(spelled) / len(texts), limits.spelled, least=True, detail=detail)
        rendered = [text_side.render(messages) for messages in sample.messages]
        yield template_gate(role, text_side, rendered)
        yield Gate(f"{role}: boundary", on_boundary(text_side, sample.prompts, rendered), limits.boundary, least=True)
        longest = max(map(len, rendered))
        if context := context_of(ref):
            needed = longest + sample.recipe.rollout.max_new_tokens
            detail = f"longest prompt {longest} tokens, and rollout.max_new_tokens"
            yield Gate(f"{role}: room", needed, context, detail=detail)


def template_gate(role: str, text_side: Side, rendered: list[list[int]]) -> Gate:
    """BOS at the start of a prompt: exactly one where the tokenizer itself writes one, never two."""
    bos = text_side.tokenizer.bos_token_id
    wanted = int(bos is not None and text_side.tokenizer("a")["input_ids"][:1] == [bos])
    counts = [next((i for i, token in enumerate(ids) if token != bos), len(ids)) for ids in rendered]
    wrong = sum(count > 1 or count < wanted for count in counts)
    detail = f"{counts[0]} BOS at the start, {wanted} expected; prompts that begin otherwise are counted"
    return Gate(f"{role}: template", wrong, 0, detail=detail)


def on_boundary(text_side: Side, prompts: pa.Table, rendered: list[list[int]]) -> float | None:
    """Share of prompts whose tokens stay as they are when their reference follows; None without references."""
    tokenizer, kept = text_side.tokenizer, []
    for ids, reference in zip(rendered, prompts["reference"].to_pylist(), strict=True):
        if reference:
            text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            alone, followed = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, text + reference))
            kept.append(followed[: len(alone)] == alone)
    return sum(kept) / len(kept) if kept else None


def context_of(ref: ModelRef) -> int | None:
    """The longest sequence that a model's positions allow; None where its config does not say."""
    config = AutoConfig.from_pretrained(ref.local, trust_remote_code=ref.trust_remote_code).get_text_config()
    return getattr(config, "max_position_embeddings", None)


# -- with weights ------------------------------------------------------------------------------------------------------


def chance_gate(sample: Sample, role: str, ref: ModelRef) -> Gate:
    """Nats a token over ln V of what the model knows better: references behind their prompts, or the prompts themselves."""
    text_side, loaded = side(ref), sample.loaded(ref)
    prompts = [text_side.render(messages) for messages in sample.messages]
    known = text_side.encoder.encode([text or "" for text in sample.prompts["reference"].to_pylist()])
    texts = {
        "references": [(prompt, ids) for prompt, ids in zip(prompts, known, strict=True) if ids],
        "prompts": [(prompt[:1], prompt[1:]) for prompt in prompts if len(prompt) > 1],
    }
    found = []
    for what, pairs in texts.items():
        if pairs:
            scores = loaded.score([p for p, _ in pairs], [c for _, c in pairs], Signal("sampled"))
            found.append((-float(np.concatenate([s.logprobs for s in scores]).mean()), what))
    if not found:
        return Gate(f"{role}: chance", None, sample.recipe.gates.chance)
    nats, what = min(found)
    share = nats / float(np.log(text_side.vocabulary.size))
    return Gate(f"{role}: chance", share, sample.recipe.gates.chance, detail=f"{nats:.2f} nats a token of {what}")


def student_rollouts(sample: Sample) -> pa.Table:
    """One completion a prompt, as round 1 would sample them."""
    seeds = [derive(sample.recipe.seed, "preflight", number) for number in range(len(sample.prompts))]
    rows = [Row(number, 0, "student", seed, f"preflight-{number:05d}") for number, seed in enumerate(seeds)]
    return rollouts_table(rows, sample.prompts, sample.recipe.rollout, 1, sample.student, [])


def scored(sample: Sample, rollouts: pa.Table, teacher: ModelRef, batch_tokens: int | None = None) -> pa.Table:
    """A teacher's scores of the rollouts, in the recipe's batches or in others."""
    rows = rollouts.select(["rollout_id", "prompt_id", "text", "finish_reason", "token_ids"]).to_pylist()
    messages = dict(zip(sample.prompts["prompt_id"].to_pylist(), sample.messages, strict=True))
    same = side(sample.student).vocabulary.same_as(side(teacher).vocabulary)
    grader = sample.loaded(teacher, batch_tokens)
    return scores_table(rows, messages, grader, side(teacher), sample.recipe.score, same)


def noise_gate(sample: Sample, rollouts: pa.Table, once: pa.Table, teacher: ModelRef) -> Gate:
    """How far the teacher's scores of a row are from those of the row alone, over how far they are from the student's."""
    again = scored(sample, rollouts, teacher, batch_tokens=1)
    rows = [i for i, status in enumerate(once["status"].to_pylist()) if status == "ok"]
    first, second, own = (_row_sums(table["logprobs"])[rows] for table in (once, again, rollouts))
    if not rows or not (signal := float(np.abs(first - own).mean())):
        return Gate("noise", None, sample.recipe.gates.noise, detail="teacher and student agree on everything")
    noise = float(np.abs(first - second).mean())
    detail = f"{noise:.2g} of {signal:.3g} nats a completion"
    return Gate("noise", noise / signal, sample.recipe.gates.noise, detail=detail)


def teacher_engine_gate(sample: Sample, teacher: ModelRef) -> Gate:
    """The teacher's own samples: their log-probs as they were drawn against those that scoring gives, stops apart."""
    text_side, loaded = side(teacher), sample.loaded(teacher)
    prompts = [text_side.render(messages) for messages in sample.messages]
    seeds = [derive(sample.recipe.seed, "preflight teacher", number) for number in range(len(prompts))]
    written = loaded.generate(prompts, seeds, Sampling(sample.recipe.rollout.max_new_tokens))
    scores = loaded.score(prompts, [completion.ids for completion in written], Signal("sampled"))
    ids = np.concatenate([completion.ids for completion in written])
    text = ~np.isin(ids, text_side.stop_ids)  # a stop is scored as the event, whichever id it is
    drawn = np.concatenate([completion.logprobs for completion in written])[text]
    gap = Gap.between(drawn, np.concatenate([s.logprobs for s in scores])[text])
    detail = f"mean; largest {gap.largest or 0:.2g}; its own samples, drawn and scored"
    return Gate("teacher's engine", gap.mean, sample.recipe.gates.engine_mean, detail=detail)


def objective_gates(sample: Sample, rollouts: pa.Table, scores: pa.Table, teacher: ModelRef) -> Iterator[Gate]:
    """What the objective makes of the signal: the student as its own teacher, then the teacher."""
    recipe, own, other = sample.recipe, side(sample.student), side(teacher)
    itself = replace(sample.student, engine="transformers", urls=())  # whichever the signal, this engine gives it
    for ref, table in ((itself, scored(sample, rollouts, itself)), (teacher, scores)):
        head = head_of(sample.loaded(ref)) if recipe.score.signal == "hidden" else None
        objective = objectives.build(recipe.objective, own.vocabulary, side(ref).vocabulary)
        aligned = aligned_table(rollouts, table, own, side(ref), objective, recipe.score, head)
        loss = mean_loss(recipe, sample.student, ref, rollouts, aligned)
        if ref is itself:
            yield Gate("own teacher", loss, recipe.gates.own_teacher, detail="nats a unit")
            continue
        yield Gate("loss", loss, detail="nats a unit, before training")
        counts = {name: pc.sum(aligned[f"{name}_bytes"]).as_py() for name in ("supervised", "unmatched", "dropped", "tail")}
        share = counts["supervised"] / max(sum(counts.values()), 1)
        detail = ", ".join(f"{name} {count} bytes" for name, count in counts.items())
        yield Gate("supervised", share, recipe.gates.supervised, least=True, detail=detail)
        kinds = flat(aligned["kind"])[0]
        limit = recipe.gates.one_to_one if recipe.objective.name in ("gold", "strict") else None
        single = float(np.isin(kinds, [Kind.ONE_TO_ONE, Kind.STOP]).mean()) if len(kinds) else None
        yield Gate("one to one", single, limit, least=True, detail="units of one token on both sides")
    known = np.array([bool(b) and b in other.vocabulary.by_bytes for b in own.beta.values])
    ids = flat(rollouts["token_ids"])[0]
    text = ids[own.vocabulary.lengths[ids] > 0]
    limit = recipe.gates.matched if recipe.objective.name not in ("bytes", "alm", "opd") else None
    yield Gate("matched", float(known[text].mean()) if len(text) else None, limit, least=True, detail="of the sampled tokens")


def lead_gate(sample: Sample, evals: pa.Table, teacher: ModelRef) -> Gate:
    """Accuracy on eval prompts, as round 0 would measure it."""
    rows = evals.to_pylist()
    tables = []
    for role, ref in (("teacher", teacher), ("student", sample.student)):
        tables.append(pa.Table.from_pylist(completions(sample.recipe, 0, role, ref, rows)))
    return lead(tables[0], tables[1], sample.recipe.gates)


# -- what it will cost -------------------------------------------------------------------------------------------------


def cost_gates(sample: Sample, tables: list[pa.Table], seconds: float) -> Iterator[Gate]:
    """Disk, memory and hours of the whole run, from the `tables` that the sample made in `seconds`."""
    recipe, rows = sample.recipe, len(tables[0])
    total = recipe.rounds * recipe.rollout.prompts * recipe.rollout.samples
    weights = {role: weights_of(ref) for role, ref in sample.sides().items()}
    per_row = sum(map(parquet_bytes, tables)) / rows
    disk = (total * per_row + recipe.rounds * 12 * weights["student"]) / GIB  # float32 weights, and two moments
    free = Run(recipe.root, recipe.name).free()
    yield Gate(
        "disk",
        disk,
        free and free / GIB,
        detail=f"GiB: {per_row:.0f} bytes a rollout, and a checkpoint a round; limit: what is free",
    )
    for device, need in memory_needs(sample, weights).items():
        detail = "GiB for weights and optimizer; activations come on top"
        yield Gate(f"{device}: memory", need / GIB, memory_of(device), detail=detail)
    yield Gate(
        "hours", total * seconds / rows / 3600, detail="sampling and scoring at this sample's speed; training comes on top"
    )


def memory_needs(sample: Sample, weights: dict[str, int]) -> dict[torch.device, float]:
    """Bytes that each device of this machine needs at one time: one model is loaded after the other."""
    train, needs = sample.recipe.train, dict[torch.device, float]()
    for role, ref in sample.sides().items():
        device, each = device_of(ref), float(dtype_of(ref).itemsize)
        if ref.engine == "server":
            continue  # its weights lie elsewhere
        if role == "student":
            trained = TRAINED if sample.recipe.student.lora is None else FROZEN
            parts = train.processes if train.sharding == "full" else 1
            copies = train.processes if device.type == "cpu" else 1  # of processes, in one memory
            each = max(each, trained * copies / parts)
        needs[device] = max(needs.get(device, 0), each * weights[role])
    return needs


def weights_of(ref: ModelRef) -> int:
    """How many weights a model has."""
    return sum(p.numel() for p in empty_model(ref).parameters())


def memory_of(device: torch.device) -> float:
    """GiB that a device has in all."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1] / GIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def _row_sums(column: pa.ChunkedArray) -> np.ndarray:
    return np.array([sum(row or []) for row in column.to_pylist()])


# -- all of it ---------------------------------------------------------------------------------------------------------


def examine(recipe: Recipe, student: ModelRef | None, teacher: ModelRef | None, count: int) -> list[Gate]:
    """The gates of a recipe on `count` of its prompts; writes nothing. A student that is new has none yet."""
    tables = split_prompts(recipe.prompts, recipe.seed)
    gates = [Gate("prompts", len(tables["train"]), detail=f"to train on; {len(tables['eval'])} to evaluate on")]
    if student is None:
        return gates
    sample = Sample(recipe, tables["train"].slice(0, count), student, teacher)
    gates += text_gates(sample)
    if any(gate.ok is False for gate in gates if gate.name.endswith("room")):
        return gates  # the models cannot be run on such prompts
    started = time.monotonic()
    rollouts = student_rollouts(sample)
    made = [rollouts]
    if teacher is not None:
        made.append(scored(sample, rollouts, teacher))
    seconds = time.monotonic() - started
    gates += [chance_gate(sample, role, ref) for role, ref in sample.sides().items()]
    release()
    gates += engine_gates(student, rollouts, Sampling.of(recipe.rollout), recipe.gates)
    if teacher is not None:
        gates += [teacher_engine_gate(sample, teacher), noise_gate(sample, rollouts, made[1], teacher)]
        gates += objective_gates(sample, rollouts, made[1], teacher)
        gates.append(lead_gate(sample, tables["eval"].slice(0, count), teacher))
    release()
    return [*gates, *cost_gates(sample, made, seconds)]

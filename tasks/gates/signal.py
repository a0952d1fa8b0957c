"""Gates of preflight on the models: known text, the teacher's engine and noise, and the objective on the teacher's signal."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks.engines.base import Sampling
from tasks.gates.agreement import Gap
from tasks.gates.gate import Gate
from tasks.gates.sample import Sample
from tasks.models.reference import ModelRef
from tasks.models.text import side
from tasks.running.seeds import derive_seed
from tasks.signals import make_signal
from tasks.tokens.align import Kind
from tasks.tokens.ragged import flat


def chance_gate(sample: Sample, role: str, ref: ModelRef) -> Gate:
    """Nats per token over ln V, on references given their prompts or on the prompts, whichever the model predicts better."""
    text_side, engine = side(ref), sample.engine(ref)
    prompts = [text_side.render(*prompt) for prompt in sample.asked]
    known = text_side.encoder.encode([text or "" for text in sample.prompts["reference"].to_pylist()])
    texts = {
        "references": [(prompt, ids) for prompt, ids in zip(prompts, known, strict=True) if ids],
        "prompts": [(prompt[:1], prompt[1:]) for prompt in prompts if len(prompt) > 1],
    }
    means = []
    for what, pairs in texts.items():
        if pairs:
            scores = engine.score([p for p, _ in pairs], [c for _, c in pairs], make_signal("sampled"))
            means.append((-float(np.concatenate([s.logprobs for s in scores]).mean()), what))
    if not means:
        return Gate(f"{role}: chance", None, sample.recipe.gates.chance)
    nats, what = min(means)
    share = nats / float(np.log(text_side.vocabulary.size))
    detail = f"{nats:.2f} nats per token of {what}, as a share of a uniform guess's"
    return Gate(f"{role}: chance", share, sample.recipe.gates.chance, detail)


def teacher_engine_gate(sample: Sample, teacher: ModelRef) -> Gate:
    """The gap between the log-probs of the teacher's samples as drawn and as scored, without stops."""
    text_side = side(teacher)
    prompts = [text_side.render(*prompt) for prompt in sample.asked]
    seeds = [derive_seed(sample.recipe.seed, "preflight teacher", number) for number in range(len(prompts))]
    drawer = sample.engine(teacher, use="sample")
    completions = drawer.generate(prompts, seeds, Sampling(sample.recipe.rollout.max_new_tokens))
    scores = sample.engine(teacher).score(prompts, [completion.ids for completion in completions], make_signal("sampled"))
    ids = np.concatenate([completion.ids for completion in completions])
    text = ~np.isin(ids, text_side.stop_ids)  # a stop is scored as the event, whichever id it is
    drawn = np.concatenate([completion.logprobs for completion in completions])[text]
    gap = Gap.between(drawn, np.concatenate([s.logprobs for s in scores])[text])
    detail = f"mean gap of the teacher's samples, as drawn and as scored; the largest is {gap.largest or 0:.2g}"
    return Gate("teacher's engine", gap.mean, sample.recipe.gates.engine_mean, detail=detail)


def noise_gate(sample: Sample, once: pa.Table, *, alone: pa.Table, own: pa.Table) -> Gate:
    """The change of the teacher's scores between a batch and a row alone, over their distance from the student's `own`."""
    columns = [table["status"].to_pylist() for table in (once, own)]
    rows = [i for i, statuses in enumerate(zip(*columns, strict=True)) if set(statuses) == {"ok"}]
    first, second, student = (_row_sums(table["logprobs"])[rows] for table in (once, alone, own))
    if not rows or not (signal := float(np.abs(first - student).mean())):
        return Gate("noise", None, sample.recipe.gates.noise, detail="teacher and student agree on every token")
    noise = float(np.abs(first - second).mean())
    detail = f"{noise:.2g} of {signal:.3g} nats per completion"
    return Gate("noise", noise / signal, sample.recipe.gates.noise, detail=detail)


def objective_gates(sample: Sample, rollouts: pa.Table, aligned: pa.Table, loss: float, teacher: ModelRef) -> Iterator[Gate]:
    """The objective on the teacher's signal: its loss, the bytes that it covers, one-to-one units and matched tokens."""
    limits, objective = sample.recipe.gates, sample.recipe.objective
    yield Gate("loss", loss, detail="before training")
    counts = {name: pc.sum(aligned[f"{name}_bytes"]).as_py() for name in ("supervised", "unmatched", "dropped", "tail")}
    share = counts["supervised"] / max(sum(counts.values()), 1)
    detail = ", ".join(f"{name} {count} bytes" for name, count in counts.items())
    if unpaired := pc.sum(aligned["unpaired"]).as_py():
        detail += f"; control tokens without a counterpart: {unpaired} (see teacher.markers)"
    yield Gate("supervised", share, limits.supervised, detail=detail)
    kinds = flat(aligned["kind"])[0]
    limit = limits.one_to_one if objective.needs_one_to_one else None
    kinds = kinds[kinds < Kind.MARKER]
    single = float(np.isin(kinds, [Kind.ONE_TO_ONE, Kind.STOP]).mean()) if len(kinds) else None
    yield Gate("one to one", single, limit, detail="units of one token on both sides")
    s_vocabulary, t_vocabulary = side(sample.student).vocabulary, side(teacher).vocabulary
    known = np.array([bool(value) and value in t_vocabulary.by_bytes for value in s_vocabulary.beta.values])
    ids = flat(rollouts["token_ids"])[0]
    text = ids[s_vocabulary.lengths[ids] > 0]
    limit = limits.matched if objective.needs_matches else None
    yield Gate("matched", float(known[text].mean()) if len(text) else None, limit, detail="of the completions' tokens")


def _row_sums(column: pa.ChunkedArray) -> np.ndarray:
    return np.array([sum(row or []) for row in column.to_pylist()])

"""Rows that a toy student trains on, graded by a toy teacher and aligned; the loss and the gradient of a batch of them."""

from functools import cache

import numpy as np
import pyarrow as pa
import torch
from toys import TEXTS, full_logprobs, path_logprobs, random_split, rollouts_table, scores_of, student_ref, teacher_ref

from configs.objectives import Alm, Bpm, Bytes, Gold, Objective, Opd, Sft, Strict, Uld
from tasks import objectives
from tasks.align import align_rollouts
from tasks.engines.transformers import TransformersEngine
from tasks.models.pair import teacher_ids
from tasks.models.reference import ModelRef
from tasks.models.text import side
from tasks.models.weights import load_weights
from tasks.signals import make_signal
from tasks.tokens.markers import NO_MARKERS, ONE_TOKENIZER
from tasks.training.batches import ALIGNED_COLUMNS, ROLLOUT_COLUMNS, MicroBatch
from tasks.training.student import Student

CPU = torch.device("cpu")
OBJECTIVES: list[Objective] = [
    Gold(name="gold", beta=1.0),
    Gold(name="gold", beta=0.5, merge="observed"),
    Gold(name="gold", beta=0.0, merge="sum"),
    Uld(name="uld"),
    Bytes(name="bytes", beta=1.0),
    Strict(name="strict"),
    Alm(name="alm", temperature=20.0),
    Bpm(name="bpm", beta=0.5),
    Opd(name="opd"),
    Sft(name="sft"),
]
PLAIN = [*TEXTS, "hi", "the cat, the dog", ""]


@cache
def teacher_engine(ref: ModelRef) -> TransformersEngine:
    return TransformersEngine(ref)


def trainable_rows(objective: Objective, teacher: ModelRef, completions: list[list[int]], k: int = 24) -> pa.Table:
    """These completions of the toy student, graded by the teacher and aligned, as training reads them.

    The policy that sampled them was nearly the student.
    """
    own, other = side(student_ref()), side(teacher)
    rng = np.random.default_rng(0)
    prompts = [[1, *rng.integers(6, 280, rng.integers(1, 9)).tolist()] for _ in completions]
    policy = [
        full_logprobs(load_weights(student_ref()), prompt + ids, own.vocabulary.size)[len(prompt) - 1 : -1].numpy()
        for prompt, ids in zip(prompts, completions, strict=True)
    ]
    sampled = [path_logprobs(p, ids) + rng.normal(size=len(ids)) * 0.3 for p, ids in zip(policy, completions, strict=True)]
    rollouts, scores = rollouts_table(prompts, completions, own, logprobs=sampled), None
    if objective.name != "sft":
        same = own.vocabulary.same_as(other.vocabulary)
        markers = ONE_TOKENIZER if same else NO_MARKERS
        graded = teacher_ids(rollouts.to_pylist(), student=own, teacher=other, markers=markers)
        able = [ids for ids in graded if ids]
        asked = [[1, 40, 50, 60][: 1 + r % 4] for r in range(len(able))]
        results = teacher_engine(teacher).score(asked, able, make_signal(k=k, top_p=2.0))
        scores = scores_of(results, [ids or None for ids in graded])
    module = objectives.build(objective, student=own.vocabulary, teacher=other.vocabulary)
    table = align_rollouts(rollouts, scores, module, student=own, teacher=other).select(ALIGNED_COLUMNS)
    for name in ROLLOUT_COLUMNS:
        table = table.append_column(name, rollouts[name])
    return table.filter(pa.compute.and_(pa.compute.equal(table["status"], "ok"), pa.compute.greater(table["units"], 0)))


def completions_of(texts: list[str], canonical: bool = False) -> list[list[int]]:
    """Ids with a stop behind them, split at random unless `canonical`."""
    own, rng = side(student_ref()), np.random.default_rng(1)
    if canonical:
        return [ids + own.stop_ids for ids in own.encoder.encode(texts) if ids is not None]
    return [random_split(rng, own.vocabulary, text.encode()) + own.stop_ids for text in texts]


@cache
def plain_rows(objective: Objective) -> pa.Table:
    return trainable_rows(objective, teacher_ref(), completions_of(PLAIN))


def student_module(objective: Objective, teacher: ModelRef | None = None, chunk_positions: int = 10**6) -> Student:
    own, other = side(student_ref()), side(teacher or teacher_ref())
    module = objectives.build(objective, student=own.vocabulary, teacher=other.vocabulary)
    return Student(load_weights(student_ref(), torch.float32).train(), [module], len(own.beta.values), chunk_positions)


def loss_and_gradient(module: Student, batch: MicroBatch, ids: torch.Tensor | None = None) -> tuple[float, torch.Tensor]:
    """Sum of the batch's terms, and the gradient of all weights in one row."""
    module.zero_grad()
    loss = module(batch.ids if ids is None else ids, batch)
    loss.backward()
    return float(loss.detach()), torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])

"""Long prompts and completions: no array of length × vocabulary, and none of length × length, in any stage."""

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toys import rollouts_table, scores_of, student_ref, teacher_ref
from training import student_module
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from configs.objectives import Bytes, Gold, Objective, Opd, Uld
from configs.signals import SIGNALS
from tasks import objectives
from tasks.align import align_rollouts
from tasks.engines import decoding, states
from tasks.engines.base import Sampling
from tasks.engines.transformers import TransformersEngine
from tasks.gates import agreement
from tasks.models.pair import teacher_ids
from tasks.models.reference import ModelRef
from tasks.models.text import side
from tasks.models.weights import load_weights
from tasks.signals import hidden, make_signal
from tasks.signals.head import Head
from tasks.tokens.markers import NO_MARKERS
from tasks.training.batches import ALIGNED_COLUMNS, ROLLOUT_COLUMNS, collate

LONG = 512  # tokens of a prompt, and of a completion
CHUNK = 32  # positions whose logits exist at once
# One completion's logits are 148,000 numbers, and the mask of one prompt 262,000. What is linear (both rows' 1,024 tokens in
# the widest layer) are 65,536, and a chunk's laws with all that is made of them are less.
MOST = 100_000
OBJECTIVES: dict[str, Objective] = {
    "bytes": Bytes(name="bytes"),
    "topk": Gold(name="gold"),
    "hidden": Uld(name="uld"),
    "sampled": Opd(name="opd"),
}


class Largest(TorchDispatchMode):
    """Notes the most numbers that a tensor has."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.shape, self.by = 0, torch.Size(), ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.numel() > self.numbers and 0 not in tensor.stride():
                self.numbers, self.shape, self.by = tensor.numel(), tensor.shape, str(func)
        return made


@contextmanager
def no_large_tensor() -> Iterator[None]:
    with Largest() as largest:
        yield
    assert largest.numbers <= MOST, (largest.shape, largest.by)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch) -> None:
    for module, name in ((states, "SCORE_CHUNK"), (hidden, "SCORE_CHUNK"), (agreement, "POSITIONS")):
        monkeypatch.setattr(module, name, CHUNK)
    monkeypatch.setattr(decoding, "MASK", 2**15)


def words(length: int, seed: int = 0, ref: ModelRef | None = None) -> list[int]:
    """Ids that spell ASCII; the student's unless another is named."""
    values = side(ref or student_ref()).beta.values
    letters = [i for i, value in enumerate(values) if value and value.isascii()]
    return np.random.default_rng(seed).choice(letters, length).tolist()


PROMPTS = [words(LONG), words(LONG - 40, 1)]
COMPLETIONS = [words(LONG, 2), words(LONG - 9, 3)]


def test_sampling(monkeypatch) -> None:
    engine = TransformersEngine(student_ref())
    monkeypatch.setattr(engine.side, "stop_ids", [-1])
    with no_large_tensor():
        made = engine.generate(PROMPTS, [1, 2], Sampling(LONG))
    assert [len(completion.ids) for completion in made] == [LONG, LONG]
    alone = engine.generate(PROMPTS[1:], [2], Sampling(LONG))
    assert alone[0].ids == made[1].ids


@pytest.mark.parametrize("kind", SIGNALS)
def test_scoring(kind: str) -> None:
    engine, (first, second) = TransformersEngine(teacher_ref()), (words(2 * LONG, seed, teacher_ref()) for seed in (0, 1))
    with no_large_tensor():
        engine.score([first[:LONG], second[:9]], [first[LONG:], second[:LONG]], make_signal(kind, 8, 0.9))


@pytest.mark.parametrize("sampling", [Sampling(9), Sampling(9, top_p=0.9)], ids=str)
def test_the_check(sampling: Sampling) -> None:
    rollouts = rollouts_table(PROMPTS, COMPLETIONS, side(student_ref()))
    with no_large_tensor(), torch.inference_mode():
        agreement.trainer_logprobs(student_ref(), load_weights(student_ref()).eval(), rollouts, sampling)


def aligned_rows(kind: str, length: int) -> tuple[Callable[[], pa.Table], pa.Table]:
    """What aligns rollouts of `length` tokens with scores of this kind, and the rollouts."""
    own, other = side(student_ref()), side(teacher_ref())
    engine, signal = TransformersEngine(teacher_ref()), make_signal(kind, 8, 0.9)
    completions = [words(length, 2), words(length - 9, 3)]
    rollouts = rollouts_table(PROMPTS, completions, own, logprobs=[np.full(len(ids), -1.0) for ids in completions])
    ids = teacher_ids(rollouts.to_pylist(), student=own, teacher=other, markers=NO_MARKERS)
    scores = scores_of(engine.score([[1], [1]], [each or [] for each in ids], signal), ids)
    module = objectives.build(OBJECTIVES[kind], student=own.vocabulary, teacher=other.vocabulary)
    head: Head | None = engine.head if kind == "hidden" else None
    return lambda: align_rollouts(rollouts, scores, module, signal, head, student=own, teacher=other), rollouts


@pytest.mark.parametrize("kind", SIGNALS)
def test_alignment_and_training(kind: str) -> None:
    align, rollouts = aligned_rows(kind, LONG)
    with no_large_tensor():
        aligned = align()
    assert aligned["status"].to_pylist() == ["ok", "ok"]
    table = aligned.select(ALIGNED_COLUMNS)
    for name in ROLLOUT_COLUMNS:
        table = table.append_column(name, rollouts[name])
    module = student_module(OBJECTIVES[kind], chunk_positions=CHUNK)
    with no_large_tensor():
        batch = collate(table, 0, torch.device("cpu"))
        module(batch.ids, batch).backward()


@pytest.mark.parametrize("kind", SIGNALS)
def test_alignment_takes_memory_by_length(kind: str) -> None:
    """Of arrays and lists outside torch: four times the length, four times the peak."""
    peaks = []
    for length in (1000, 4000):
        align, _ = aligned_rows(kind, length)
        align()
        tracemalloc.start()
        align()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 4.5 * peaks[0]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_prompts_are_read_in_parts_to_the_same_end(family: str, tmp_path, monkeypatch) -> None:
    """With attention to everything, and with a window that is shorter than a part, as long, and longer."""
    ref = student_ref()
    if family == "gemma3":
        text_side = side(ref)
        torch.manual_seed(0)
        config = Gemma3TextConfig(
            vocab_size=len(text_side.beta.values), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=16, sliding_window=8, eos_token_id=text_side.stop_ids[0],
            layer_types=["sliding_attention", "full_attention"],
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        text_side.tokenizer.save_pretrained(tmp_path)
        ref = ModelRef(str(tmp_path), family, device="cpu")
    engine, sampling = TransformersEngine(ref), Sampling(12)
    prompts, widths = [words(40), words(33, 1), words(7, 2)], []
    whole = engine.generate(prompts, [1, 2, 3], sampling)
    engine.model.get_input_embeddings().register_forward_hook(lambda _, given, __: widths.append(given[0].shape[1]))
    for part in (3, 8, 13, 39):
        widths.clear()
        monkeypatch.setattr(decoding, "MASK", part * 3 * 40)
        made = engine.generate(prompts, [1, 2, 3], sampling)
        assert [completion.ids for completion in made] == [completion.ids for completion in whole]
        for one, other in zip(made, whole, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert widths[0] == part
        assert sum(widths[: -(-40 // part)]) == 40

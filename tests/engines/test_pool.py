"""What is loaded stays loaded: room, in place renewal, and the rounds of a run with one start of vLLM."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toys import student_ref, teacher_ref, twin_ref
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.engines import pool
from tasks.engines.base import Sampling
from tasks.engines.choose import get_engine, release
from tasks.engines.names import engine_for
from tasks.engines.pool import hold, make_room
from tasks.engines.transformers import TransformersEngine
from tasks.models.reference import ModelRef
from tasks.signals import make_signal

CPU = torch.device("cpu")


class Block:
    """Takes `size` bytes of a pretended memory until it gives them back."""

    def __init__(self, memory: dict[torch.device, int], device: torch.device, size: int):
        self.memory, self.device, self.size, self.given = memory, device, size, 0
        memory[device] -= size
        hold(self)

    def give_back(self) -> None:
        self.memory[self.device] += self.size
        self.given += 1


@pytest.fixture
def memory(monkeypatch) -> dict[torch.device, int]:
    """Three devices of 100 bytes."""
    release()
    free = {torch.device(name): 100 for name in ("cpu", "cuda:0", "cuda:1")}
    monkeypatch.setattr(pool, "_held", {})
    monkeypatch.setattr(pool, "free_memory", free.__getitem__)
    monkeypatch.setattr(pool, "total_memory", lambda device: 100)
    return free


def test_the_oldest_gives_its_memory_back_first_and_no_more_than_is_needed(memory) -> None:
    gpu, other = torch.device("cuda:0"), torch.device("cuda:1")
    first, second, third = (Block(memory, gpu, 25) for _ in range(3))
    elsewhere, on_the_host = Block(memory, other, 90), Block(memory, CPU, 90)
    hold(first)  # used again
    make_room(gpu, 25, spare=0)
    assert [each.given for each in (first, second, third)] == [0, 0, 0]
    make_room(gpu, 50, spare=0)
    assert [each.given for each in (first, second, third)] == [0, 1, 0]
    make_room(gpu, 50, spare=0.25)  # some for what is computed with it
    assert [each.given for each in (first, second, third)] == [0, 1, 1]
    make_room(gpu, 500)  # an estimate: it is tried
    assert [each.given for each in (first, second, third)] == [1, 1, 1]
    assert elsewhere.given == on_the_host.given == 0


def trained(ref: ModelRef, folder: Path) -> ModelRef:
    """A student that follows on `ref`: other weights of its shape, as a round commits them."""
    model = AutoModelForCausalLM.from_pretrained(ref.path, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ref.path).save_pretrained(folder)
    return replace(ref, path=str(folder), digest=folder.name)


def test_new_weights_of_a_student_are_taken_in_place(tmp_path, monkeypatch) -> None:
    """Samples and scores are those of a fresh engine, to the bit; the teacher stays; and back to the old ones."""
    monkeypatch.setattr(pool, "free_memory", lambda device: 2**50)
    before, teacher = replace(student_ref(), moves="student"), teacher_ref()
    after = trained(before, tmp_path / "after")
    engine, other = get_engine(before), get_engine(teacher)
    assert isinstance(engine, TransformersEngine)
    old = engine.generate([[9]] * 4, [0, 1, 2, 3], Sampling(8))
    model = engine.model
    assert get_engine(after) is engine
    assert engine.model is model
    assert get_engine(teacher) is other
    fresh = TransformersEngine(after)
    for each in (engine, fresh):
        each.made = each.generate([[9]] * 4, [0, 1, 2, 3], Sampling(8)), each.score([[9]], [[8, 7]], make_signal("sampled"))
    assert engine.made[0] == fresh.made[0] != old
    assert engine.made[1][0].logprobs.tolist() == fresh.made[1][0].logprobs.tolist()
    assert get_engine(before).generate([[9]] * 4, [0, 1, 2, 3], Sampling(8)) == old  # (another run, from the start)
    release()


def test_weights_of_another_shape_or_in_other_use_are_not_overwritten(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(pool, "free_memory", lambda device: 2**50)
    student = replace(student_ref(), moves="student")
    engine = get_engine(student)
    assert get_engine(replace(twin_ref(), moves="student")) is not engine  # another shape
    release()
    engine = get_engine(student)
    assert get_engine(replace(student, moves="teacher")) is engine  # both of them are the same weights now
    after = trained(student, tmp_path / "after")
    assert get_engine(after) is not engine
    assert get_engine(replace(student, moves="teacher")) is engine
    assert get_engine(replace(after, prefix="A")) is not engine  # another use of it
    release()


def test_an_engine_that_gave_its_memory_back_loads_again() -> None:
    engine = TransformersEngine(student_ref())
    made = engine.generate([[9]], [0], Sampling(8))
    model = engine.model
    engine.give_back()
    assert engine.generate([[9]], [0], Sampling(8)) == made
    assert engine.model is not model
    engine.close()


def test_auto_samples_with_vllm_on_a_gpu_and_scores_with_transformers(monkeypatch, tmp_path) -> None:
    """Where vLLM is installed; without a GPU or vLLM transformers does both. What is named is used."""
    python = tmp_path / "python"
    python.touch()
    auto = ModelRef("", "", engine="auto", vllm_python=str(python))
    for gpu, ref, wanted in (
        (True, auto, ("vllm", "transformers")),
        (True, replace(auto, device="cuda:1"), ("vllm", "transformers")),
        (True, replace(auto, device="cpu"), ("transformers", "transformers")),
        (True, replace(auto, vllm_python="none"), ("transformers", "transformers")),
        (False, auto, ("transformers", "transformers")),
        (False, replace(auto, engine="vllm"), ("vllm", "vllm")),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert (engine_for(ref, "sample"), engine_for(ref, "score")) == wanted

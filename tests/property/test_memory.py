"""Out of memory: the batch is halved in generation, scoring and training, said once, and nothing comes out otherwise."""

import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from test_training import optimize, step, trainer
from toys import student_ref, teacher_ref
from training import plain_rows
from transformers import AutoConfig, AutoModelForCausalLM

from configs.errors import Stopped
from configs.objectives import Bytes, Sft
from tasks.engines.base import Sampling
from tasks.engines.transformers import TransformersEngine
from tasks.running import memory
from tasks.running.memory import is_out_of_memory, room_of
from tasks.signals import make_signal

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to …")
ERRORS = pytest.mark.parametrize("error", [CUDA, CPU], ids=["cuda", "cpu"])


@pytest.fixture(autouse=True)
def forgotten() -> None:
    room_of.cache_clear()


@contextmanager
def room_for(model: torch.nn.Module, tokens: int, error: Exception) -> Iterator[list[int]]:
    """A model that has no memory for more than `tokens` at once, padding included; yields the size of each forward pass."""
    sizes: list[int] = []

    def look(_: object, args: tuple, kwargs: dict) -> None:
        sizes.append(kwargs["input_ids"].numel())
        if sizes[-1] > tokens:
            raise error

    handle = model.base_model.register_forward_pre_hook(look, with_kwargs=True)
    yield sizes
    handle.remove()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]


PROMPTS = [[1, *range(40, 40 + n)] for n in (1, 2, 5, 3, 9, 4, 7)]


@ERRORS
def test_generation(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "potstill")
    engine, seeds, sampling = TransformersEngine(student_ref()), [*range(7)], Sampling(6)
    wanted = engine.generate(PROMPTS, seeds, sampling)
    with room_for(engine.model, 20, error) as sizes:
        got = engine.generate(PROMPTS, seeds, sampling)
        assert [c.ids for c in got] == [c.ids for c in wanted]
        assert [x for c in got for x in c.logprobs] == pytest.approx([x for c in wanted for x in c.logprobs], abs=1e-5)
        assert max(sizes) > 20
        sizes.clear()
        engine.generate(PROMPTS, seeds, sampling)  # remembered
        assert max(sizes) <= 20
    assert len(said(caplog)) == 1
    assert said(caplog)[0].startswith("generation: out of memory; from here on at most ")


@ERRORS
def test_scoring(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "potstill")
    engine, signal = TransformersEngine(teacher_ref()), make_signal(k=5, top_p=2.0)
    completions = [[40, 41, 42][: 1 + i % 3] for i in range(7)]
    wanted = engine.score(PROMPTS, completions, signal)
    with room_for(engine.model, 20, error) as sizes:
        got = engine.score(PROMPTS, completions, signal)
        assert max(sizes) > 20
        sizes.clear()
        engine.score(PROMPTS, completions, signal)
        assert max(sizes) <= 20
    for one, other in zip(got, wanted, strict=True):
        assert np.allclose(one.logprobs, other.logprobs, atol=1e-5)
        assert np.array_equal(one.columns["top_ids"], other.columns["top_ids"])
    assert len(said(caplog)) == 1


@ERRORS
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_training(error: Exception, backward: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Also where it runs out in the backward pass, when the gradients of later layers are added already."""
    caplog.set_level(logging.INFO, "potstill")
    objective = Bytes(name="bytes")
    table = plain_rows(objective)
    record, gradient = step(objective, table)
    made, seen = trainer(objective), []
    most, failed = 170, []
    go, base = made.optimizer.step, made.module.model.base_model

    def refuse(ids: torch.Tensor) -> None:
        if ids.numel() > most:
            failed.append(ids.numel())
            raise error

    def look(_: object, args: tuple, kwargs: dict, output: object) -> None:
        ids = kwargs["input_ids"]
        if not backward:
            refuse(ids)
        elif ids.numel() > most:
            kept[0].register_hook(lambda _: refuse(ids))

    kept: list[torch.Tensor] = []
    base.layers[0].register_forward_hook(lambda _, __, output: kept.__setitem__(slice(None), [output]))
    base.register_forward_hook(look, with_kwargs=True)

    def look_and_step() -> None:
        seen.append(torch.cat([p.grad.flatten() for p in made.module.parameters()]))
        go()

    made.optimizer.step = look_and_step
    got = optimize(made, table)
    assert failed
    assert got["loss"] == pytest.approx(record["loss"], rel=1e-4)
    assert (got["tokens"], got["units"], got["rows"]) == (record["tokens"], record["units"], record["rows"])
    assert torch.allclose(seen[0], gradient, atol=1e-4 * float(gradient.abs().max()) + 1e-6)
    failed.clear()
    optimize(made, table)
    assert not failed  # remembered
    assert len(said(caplog)) == 1


def test_one_sequence_that_does_not_fit_is_one_message() -> None:
    engine = TransformersEngine(student_ref())
    with room_for(engine.model, 3, CUDA), pytest.raises(Stopped, match=r"^generation: out of memory with a single sequence of"):
        engine.generate(PROMPTS, [0] * 7, Sampling(6))
    made = trainer(Sft(name="sft"))
    with (
        room_for(made.module.model, 3, CPU),
        pytest.raises(Stopped, match=r"^training: out of memory with a single sequence .* train.gradient_checkpointing"),
    ):
        optimize(made, plain_rows(Sft(name="sft")))


def test_other_errors_are_not_taken_for_it() -> None:
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))
    with pytest.raises(Stopped, match=r"^a; b$"), memory.insist("a", "b"):
        raise CUDA
    with pytest.raises(RuntimeError, match="shape"), memory.insist("a", "b"):
        raise RuntimeError("shape")


LOADING = """
import sys
from resource import RLIMIT_AS, RLIM_INFINITY, getpagesize, setrlimit
from pathlib import Path
import tasks.training.trainer
from configs.errors import Stopped
from tasks.engines.transformers import TransformersEngine
from tasks.models.reference import ModelRef
from tasks.models.text import side
from tasks.training.student import load_for_training

small, large = (ModelRef(path, path) for path in sys.argv[1:])
side(large).check()  # a tokenizer has no share in it
TransformersEngine(small).close()
load_for_training(small, False)
for work in (TransformersEngine, lambda ref: load_for_training(ref, False)):
    for more in range(0, 600, 40):
        now = int(Path("/proc/self/statm").read_text().split()[0]) * getpagesize()
        setrlimit(RLIMIT_AS, (now + more * 2**20, RLIM_INFINITY))
        try:
            work(large)
        except Stopped as stopped:
            print(stopped)
        else:
            print("loaded")
            break
        finally:
            setrlimit(RLIMIT_AS, (RLIM_INFINITY, RLIM_INFINITY))
"""


def test_no_memory_to_load_a_model_is_one_message(tmp_path) -> None:
    """Wherever in the loading it runs out: the process may take a little more each time, until the model is loaded."""
    shutil.copytree(student_ref().path, tmp_path / "large")
    config = AutoConfig.from_pretrained(tmp_path / "large")
    config.intermediate_size, config.num_hidden_layers = 2**18, 2  # 100 MB a layer
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "large")
    ended = subprocess.run(
        [sys.executable, "-c", LOADING, student_ref().path, tmp_path / "large"], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    lines = ended.stdout.splitlines()
    message = f"{tmp_path / 'large'}: out of memory while its weights are loaded in float32; take a smaller model, another "
    assert lines.count("loaded") == 2
    assert lines[0].startswith(message)
    assert all(line == "loaded" or line.startswith(message) for line in lines)
    assert len(lines) > 6

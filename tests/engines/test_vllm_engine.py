"""The vLLM engine and its child script, under an interpreter whose vLLM is a fake one: exchange, faults, ends."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from toys import student_ref, teacher_ref, twin_ref

from configs.errors import BadInput, Unavailable
from tasks.engines import pool, vllm_child
from tasks.engines import vllm as parent
from tasks.engines.base import Sampling
from tasks.engines.choose import get_engine, release
from tasks.engines.names import engine_name
from tasks.engines.vllm import VllmEngine
from tasks.models.reference import ModelRef
from tasks.models.text import side
from tasks.signals import make_signal

FAKES = Path(__file__).parent / "fakes"


@pytest.fixture
def python(tmp_path) -> str:
    """An interpreter as `vllm_python` names one: this one, with the fake vLLM; its arguments are -I SCRIPT …"""
    return interpreter(
        tmp_path,
        f"import runpy; sys.path.insert(0, {str(FAKES)!r}); sys.argv = sys.argv[2:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')",
    )


def interpreter(folder: Path, code: str) -> str:
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\nimport sys\nassert sys.argv[1] == '-I'\n{code}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def start(python, tmp_path) -> Iterator[Callable[..., VllmEngine]]:
    """An engine for a copy of a toy model (so that a fault can be put beside it)."""
    made: list[VllmEngine] = []

    def make(ref: ModelRef) -> VllmEngine:
        folder = tmp_path / "model"
        shutil.copytree(ref.path, folder, dirs_exist_ok=True)
        made.append(VllmEngine(replace(ref, path=str(folder), engine="vllm", vllm_python=python)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def fake_of(of: VllmEngine, what: str) -> np.ndarray:
    """The table `bigrams` or `states` of the fake for this model."""
    sys.path.insert(0, str(FAKES))
    try:
        import vllm

        table: np.ndarray = getattr(vllm, what)(Path(of.ref.path))
        return table
    finally:
        sys.path.remove(str(FAKES))
        sys.modules.pop("vllm", None)


def law(of: VllmEngine) -> np.ndarray:
    """Log-probs `[rows, rows]` that it samples from."""
    return fake_of(of, "bigrams")


def law_read(of: VllmEngine) -> np.ndarray:
    """Log-probs `[rows, size]` by which it scores: the head, as it lies in the model's folder, over the fake's states."""
    tensors = load_file(Path(of.ref.path) / "model.safetensors")
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])[: of.size]
    logits = fake_of(of, "states").astype(float) @ head.astype(float).T
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def fault(of: VllmEngine, kind: str) -> None:
    path = Path(of.ref.path) / "fault"
    path.write_text(kind) if kind else path.unlink()


# -- what comes back -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ref", [student_ref, teacher_ref, twin_ref], ids=["plain", "several-stops", "padded-head"])
@pytest.mark.parametrize(("k", "top_p"), [(1, 1.0), (20, 0.6), (1000, 2.0)], ids=["1", "adaptive", "all"])
def test_scores(start, ref, k: int, top_p: float) -> None:
    """Actual tokens, likeliest ids, rest and stop event, against the head over the states themselves."""
    grader = start(ref())
    table, stops = law_read(grader), side(ref()).stop_ids
    rng = np.random.default_rng(1)
    prompts = [rng.integers(6, 280, rng.integers(1, 9)).tolist() for _ in range(8)]
    completions = [[*rng.integers(6, 280, rng.integers(1, 9)).tolist(), stops[i % len(stops)]] for i in range(8)]
    for prompt, ids, scored in zip(
        prompts, completions, grader.score(prompts, completions, make_signal("topk", k, top_p)), strict=True
    ):
        ends = np.cumsum(scored.columns["top_counts"])
        for t, (before, actual) in enumerate(zip([prompt[-1], *ids], ids)):
            row = table[before]
            wanted = np.logaddexp.reduce(row[stops]) if actual in stops else row[actual]
            assert scored.logprobs[t] == pytest.approx(wanted, abs=1e-4)
            best = np.argsort(-row)[:k].tolist()
            mass = np.cumsum(np.exp(row[best]))
            best = best[: int((mass < top_p).sum()) + 1]
            found = scored.columns["top_ids"][ends[t] - scored.columns["top_counts"][t] : ends[t]]
            assert row[found] == pytest.approx(row[best], abs=1e-5)  # (two may be as likely)
            assert np.exp(scored.columns["rest"][t]) == pytest.approx(1 - np.exp(row[best]).sum(), abs=1e-5)


def test_rows_in_parts() -> None:
    """Every row once and in order; a part as long as it may be, a longer row alone."""
    lengths = [3, 3, 9, 1, 1]
    assert vllm_child.split_rows(lengths, 1) == [slice(i, i + 1) for i in range(5)]
    assert vllm_child.split_rows(lengths, 17) == [slice(0, 5)]
    assert vllm_child.split_rows(lengths, 6) == [slice(0, 2), slice(2, 3), slice(3, 5)]


def test_completions(start) -> None:
    """From seeds, in order, under the distribution drawn from; padded rows of the head are never drawn."""
    generator = start(twin_ref())
    prompts, seeds = [[9 + i % 5] for i in range(40)], list(range(2**62, 2**62 + 40))
    made = generator.generate(prompts, seeds, Sampling(6, 0.5))
    backward = generator.generate(prompts[::-1], seeds[::-1], Sampling(6, 0.5))[::-1]
    assert [c.ids for c in made] == [c.ids for c in backward]
    assert len({tuple(c.ids) for c in made}) > 30
    cold = law(generator)[:, : generator.size] * 2
    cold -= np.log(np.exp(cold).sum(1, keepdims=True))
    for prompt, completion in zip(prompts, made, strict=True):
        assert max(completion.ids) < generator.size < generator.rows
        wanted = [cold[before, i] for before, i in zip([prompt[-1], *completion.ids], completion.ids)]
        assert completion.logprobs == pytest.approx(wanted, abs=1e-4)
    greedy = generator.generate([[9]], [0], Sampling(1, temperature=0))[0]
    raw = law(generator)[9]
    assert greedy.ids == [int(raw[: generator.size].argmax())]
    assert generator.generate([], [], Sampling(6)) == []


@pytest.mark.parametrize(
    ("device", "seen", "wanted"),
    [
        ("auto", "4,5", "4,5"),
        ("cuda", None, None),
        ("cuda:1", None, "1"),
        ("cuda:1", "4,5", "5"),
        ("cuda:0", "GPU-abc", "GPU-abc"),
        ("cpu", "4,5", ""),
    ],
)
def test_the_child_sees_the_device_of_the_recipe_alone(monkeypatch, device, seen, wanted) -> None:
    if seen is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    assert parent.environment(device).get("CUDA_VISIBLE_DEVICES") == wanted
    assert parent.environment(device)["PATH"] == os.environ["PATH"]


# -- faults ----------------------------------------------------------------------------------------------------------------


def test_a_child_that_does_not_start(start) -> None:
    broken = start(student_ref())
    fault(broken, "start")
    with pytest.raises(Unavailable, match=r"(?s)ended with status 1; its last output:.*RuntimeError: no room for the model"):
        broken.score([[9]], [[8]], make_signal(k=2))
    fault(broken, "")
    assert len(broken.score([[9]], [[8]], make_signal(k=2))) == 1


def test_a_child_that_is_interrupted_while_it_loads_is_ended(start, tmp_path, monkeypatch) -> None:
    """A time-out strikes before the first reply: no process is left that holds the GPU."""
    slow = start(student_ref())
    slow.ref = replace(slow.ref, vllm_python=interpreter(tmp_path, "import time; time.sleep(60)"))
    started: list[subprocess.Popen] = []
    real = subprocess.Popen
    monkeypatch.setattr(parent.subprocess, "Popen", lambda *a, **k: started.append(real(*a, **k)) or started[-1])

    def late(*_: object) -> None:
        raise TimeoutError("late")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        with pytest.raises(TimeoutError, match="late"):
            slow.score([[9]], [[8]], make_signal(k=2))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert [process.poll() for process in started] == [-signal.SIGKILL]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("memory", r"(?s)ended with status 1.*RuntimeError: out of memory in the middle of a shard"),
        ("killed", r"(?s)was killed \(SIGKILL\).*the last words before the kill"),
    ],
)
def test_a_child_that_dies_in_a_shard(start, kind: str, words: str) -> None:
    """Its last words are told, nothing of it is left, and the next request starts another one."""
    broken = start(student_ref())
    wanted = broken.score([[9]], [[8]], make_signal(k=2))
    process, folder = broken.children["states"].process, Path(broken.children["states"].folder.name)
    fault(broken, kind)
    with pytest.raises(Unavailable, match=words) as caught:
        broken.score([[9]], [[8]], make_signal(k=2))
    assert broken.ref.path in str(caught.value)
    assert process.poll() is not None
    assert not folder.exists()
    fault(broken, "")
    again = broken.score([[9]], [[8]], make_signal(k=2))
    assert again[0].logprobs.tolist() == wanted[0].logprobs.tolist()
    assert broken.children["states"].process.pid != process.pid


def test_a_child_killed_between_two_shards(start) -> None:
    broken = start(student_ref())
    broken.score([[9]], [[8]], make_signal(k=2))
    broken.children["states"].process.kill()
    broken.children["states"].process.wait()
    with pytest.raises(Unavailable, match=r"was killed \(SIGKILL\)"):
        broken.score([[9]], [[8]], make_signal(k=2))


def test_garbage_is_no_reply(tmp_path) -> None:
    """From a program that is no child of ours."""
    python = interpreter(tmp_path, "print('Hello! How can I help?', flush=True); sys.stdin.read()")
    broken = VllmEngine(replace(student_ref(), engine="vllm", vllm_python=python))
    with pytest.raises(Unavailable, match=r"answered 'Hello! How can I help\?', which is not a reply"):
        broken.score([[9]], [[8]], make_signal())
    assert not broken.children


def test_a_refused_request_leaves_the_child_alive(start) -> None:
    """What vLLM cannot do is the recipe's fault, not the child's."""
    grader = start(student_ref())
    with pytest.raises(BadInput, match=r"vLLM refuses a request: the prompt of 70 tokens is longer than the context of 60"):
        grader.score([[9] * 70], [[8]], make_signal(k=2))
    process = grader.children["states"].process
    grader.score([[9]], [[8]], make_signal(k=2))
    assert grader.children["states"].process is process


@pytest.mark.parametrize("code", ["sys.exit('no module named vllm')", None], ids=["without vLLM", "missing"])
def test_an_interpreter_without_vllm(tmp_path, code: str | None) -> None:
    path = str(tmp_path / "none") if code is None else interpreter(tmp_path, code)
    with pytest.raises(BadInput, match=rf"vllm_python: {path} is not a Python with vLLM .*run `make vllm`"):
        engine_name(replace(student_ref(), engine="vllm", vllm_python=path), "sample")


# -- its end ---------------------------------------------------------------------------------------------------------------


def test_children_stay_and_none_after_release(start, python, monkeypatch) -> None:
    """The shards of a stage share a child, and another model leaves it where there is room."""
    monkeypatch.setattr(pool, "free_memory", lambda device: 2**50)
    ref = start(student_ref()).ref
    assert engine_name(ref, "sample") == "vllm-0.0.1"
    first = get_engine(ref)
    first.score([[9]], [[8]], make_signal(k=2))
    process = first.children["states"].process
    assert get_engine(ref, 1, 2) is first
    first.score([[9]], [[8]], make_signal(k=2))
    assert first.children["states"].process is process
    other = get_engine(replace(twin_ref(), engine="vllm", vllm_python=python))
    other.score([[9]], [[8]], make_signal(k=2))
    children = [one.children["states"] for one in (first, other)]
    assert [child.process.poll() for child in children] == [None, None]
    release()
    assert None not in [child.process.poll() for child in children]
    assert not any(os.path.exists(child.folder.name) for child in children)


def test_a_child_ends_with_its_parent(start, tmp_path) -> None:
    """Also when the parent is killed while the child works."""
    ref = start(student_ref()).ref
    code = (
        "import os, signal, sys, threading; from tasks.models.reference import ModelRef; "
        "from tasks.signals import make_signal; "
        "from tasks.engines.vllm import VllmEngine; "
        "e = VllmEngine(ModelRef(*sys.argv[1:3], device='cpu', vllm_python=sys.argv[3])); "
        "e.score([[9]], [[8]], make_signal(k=2)); "
        "print(e.children['states'].process.pid, flush=True); open(sys.argv[1] + '/fault', 'w').write('slow'); "
        "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start(); e.score([[9]], [[8]], make_signal(k=2))"
    )
    made = subprocess.run([sys.executable, "-c", code, ref.path, "", ref.vllm_python], capture_output=True, text=True)
    assert made.returncode == -signal.SIGKILL, made.stderr
    child = int(made.stdout)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.05)


def test_the_child_knows_nothing_of_ours() -> None:
    """Its interpreter has vLLM and pyarrow; whatever else it imported would be missing there."""
    source = Path(parent.CHILD).read_text()
    assert not [line for line in source.splitlines() if line.strip().startswith(("from tasks", "from configs", "from storage"))]

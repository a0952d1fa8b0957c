"""The engines against each other on real models, with the real vLLM of `make vllm`: `make engines`.

Not collected by `make test`. Prints the gaps that it measures.
"""

import os
import socket
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import tomli_w
from conftest import CHECKOUT
from prefect.testing.utilities import prefect_test_harness

from flows.distill import distill
from tasks.engines.base import Completion, Engine, Sampling, Signal, TokenScores
from tasks.engines.choose import engine, release
from tasks.models import ModelRef, Side

PYTHON = str(CHECKOUT / ".venv-vllm" / "bin" / "python")
SMOLLM2 = str(CHECKOUT / "models" / "smollm2")
LIMIT = 1e-3  # nats, float32
TOPICS = ("the tides", "a lost key", "bread", "prime numbers", "bees", "a haiku", "the moon", "fractions")
SIGNAL = Signal("topk", 16, 0.95)


@contextmanager
def served(folder: str) -> Iterator[str]:
    """The address of a vLLM server of a model folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", "float32", "--max-model-len", "auto", "--enforce-eager"]
    command += ["--max-logprobs", "400", "--logprobs-mode", "processed_logprobs"]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    environment.pop("PYTHONPATH", None)
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 300
            while not healthy(f"http://127.0.0.1:{port}"):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    pytest.fail(f"the server does not start:\n{log.read()[-4000:]}")
                time.sleep(1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


def healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def smollm2_url() -> Iterator[str]:
    with served(SMOLLM2) as url:
        yield url


@pytest.fixture
def engines(smollm2_url) -> Iterator[dict[str, Callable[[], Engine]]]:
    refs = {
        "transformers": ModelRef(SMOLLM2, "smollm2", device="cpu"),
        "vllm": ModelRef(SMOLLM2, "smollm2", device="cpu", engine="vllm", vllm_python=PYTHON),
        "server": ModelRef(SMOLLM2, "smollm2", device="cpu", engine="server", urls=(smollm2_url,)),
    }
    yield {name: lambda ref=ref: engine(ref) for name, ref in refs.items()}
    release()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    text_side = Side(ModelRef(SMOLLM2, "smollm2"))
    return [text_side.render([{"role": "user", "content": f"Write about {topic}."}]) for topic in TOPICS] * 8


def gaps(scores: list[TokenScores], others: list[TokenScores]) -> np.ndarray:
    return np.concatenate([abs(a.logprobs - b.logprobs) for a, b in zip(scores, others, strict=True)])


def test_engines_agree_on_the_same_tokens(engines, prompts) -> None:
    """64 completions: every engine's log-probs of every token, the kept ids and the rest; a shift by one is seen."""
    completions = [c.ids for c in engines["transformers"]().generate(prompts, list(range(64)), Sampling(24))]
    wanted = engines["transformers"]().score(prompts, completions, SIGNAL)
    shifted = [[prompt[-1], *ids[:-1]] for prompt, ids in zip(prompts, completions, strict=True)]
    for name in ("vllm", "server"):
        scores = engines[name]().score(prompts, completions, SIGNAL)
        gap = gaps(scores, wanted)
        print(f"\n{name} and transformers, {len(gap)} tokens: largest gap {gap.max():.2e}, mean {gap.mean():.2e} nats")
        assert gap.max() < LIMIT
        for ours, theirs in zip(wanted, scores, strict=True):
            same = ours.counts == theirs.counts  # where the mass stands just at top_p, one more or less is kept
            assert same.mean() > 0.9
            assert np.exp(theirs.rest[same]) == pytest.approx(np.exp(ours.rest[same]), abs=1e-4)
        late = engines[name]().score([prompt[:-1] for prompt in prompts], shifted, SIGNAL)
        gap = gaps(late, wanted)
        print(f"{name}, one position off: largest gap {gap.max():.2f}, mean {gap.mean():.2f} nats")
        assert gap.max() > 1000 * LIMIT
        assert gap.mean() > 100 * LIMIT


@pytest.mark.parametrize("name", ["vllm", "server"])
@pytest.mark.parametrize("sampling", [Sampling(16), Sampling(16, 0.7, 0.9, 20)], ids=["plain", "shaped"])
def test_a_completions_log_probs(engines, prompts, name: str, sampling: Sampling) -> None:
    """Those of the distribution drawn from, by seeds alone: greedy and plain ones are the embedded engine's scores."""
    some, seeds = prompts[:16], list(range(16))
    generator = engines[name]()
    made = generator.generate(some, seeds, sampling)
    again = generator.generate(some[::-1], seeds[::-1], sampling)[::-1]
    assert [c.ids for c in made] == [c.ids for c in again]
    assert len({tuple(c.ids) for c in made}) == 16
    greedy = generator.generate(some[:8], seeds[:8], Sampling(16, 0))
    embedded = engines["transformers"]()
    if sampling == Sampling(16):
        assert own_gap(embedded, some, made) < LIMIT
    else:
        assert own_gap(embedded, some, made) > 0.1
        assert max(max(c.logprobs) for c in made) <= 0
        wanted = [shaped(embedded, prompt, c, sampling) for prompt, c in zip(some, made, strict=True)]
        assert max(abs(np.array(c.logprobs) - w).max() for c, w in zip(made, wanted, strict=True)) < LIMIT
    assert [c.ids for c in greedy] == [c.ids for c in embedded.generate(some[:8], seeds[:8], Sampling(16, 0))]
    assert own_gap(embedded, some[:8], greedy) < LIMIT


def own_gap(grader: Engine, prompts: list[list[int]], made: list[Completion]) -> float:
    scores = grader.score(prompts, [c.ids for c in made], Signal("sampled"))
    return max(float(abs(np.array(c.logprobs) - s.logprobs).max()) for c, s in zip(made, scores, strict=True))


def shaped(grader: Engine, prompt: list[int], completion: Completion, sampling: Sampling) -> np.ndarray:
    """Log-probs under temperature, then top_k, then top_p, from the top 2,000 of the model's own."""
    (scored,) = grader.score([prompt], [completion.ids], Signal("topk", 20_000))
    found = []
    for t, (ids, own) in enumerate(zip(scored.top_ids.reshape(-1, 20_000), scored.top_logprobs.reshape(-1, 20_000))):
        law = own[: sampling.top_k].astype(np.float64) / sampling.temperature
        p = np.exp(law - np.logaddexp.reduce(law))
        p[np.cumsum(p) - p >= sampling.top_p] = 0
        p /= p.sum()
        found.append(np.log(p[ids[: sampling.top_k].tolist().index(completion.ids[t])]))
    return np.array(found)


# -- whole runs --------------------------------------------------------------------------------------------------------------


def run(root: Path, name: str, **teacher_and_student: dict) -> Path:
    """tests/recipes/tiny.toml, one round, under the same root: each has the same models, made once.

    Attention heads are as wide as vLLM's kernels for CPUs want them.
    """
    data = recipe("tiny", name=name, root=str(root), rounds=1)
    for role, shape in (("student", {"heads": 1}), ("teacher", {"width": 64})):
        maker = recipe(role)
        maker["student"]["scratch"] |= shape
        (root / f"{role}.toml").write_text(tomli_w.dumps(maker))
        data[role] |= teacher_and_student.get(role, {})
    (root / f"{name}.toml").write_text(tomli_w.dumps(data))
    assert distill(str(root / f"{name}.toml"))["rounds"] == 1
    release()
    return root / name


def recipe(which: str, **changes) -> dict:
    return tomllib.loads((CHECKOUT / "tests" / "recipes" / f"{which}.toml").read_text()) | changes


def test_every_engine_ends_in_the_same_tables(tmp_path) -> None:
    """And a server takes the trained student as it lies there."""
    vllm = {"engine": "vllm", "vllm_python": PYTHON}
    with prefect_test_harness(server_startup_timeout=120):
        embedded = run(tmp_path, "embedded")
        runs = [run(tmp_path, "child", student=vllm, teacher=vllm)]
        with served(str(tmp_path / "test-teacher-seed0" / "round=0001" / "student")) as url:
            runs.append(run(tmp_path, "served", teacher={"engine": "server", "urls": [url]}))
    for other in runs:
        files = sorted(path.relative_to(embedded) for path in embedded.rglob("*.parquet"))
        assert sorted(path.relative_to(other) for path in other.rglob("*.parquet")) == files
        for file in files:
            assert pq.read_schema(other / file).equals(pq.read_schema(embedded / file), check_metadata=True), file
        status = pl.read_parquet(other / "round=0001" / "scores" / "*.parquet", columns=["status"])
        assert set(status["status"]) == {"ok"}
    rollouts = pl.read_parquet(runs[0] / "round=0001" / "rollouts" / "*.parquet")
    assert set(rollouts.filter(source="student")["engine"]) == {"vllm-0.32.0"}
    # The served teacher scores the embedded student's own rollouts: the same numbers.
    ours, theirs = (
        np.concatenate(pl.read_parquet(r / "round=0001" / "scores" / "*.parquet")["logprobs"].to_list())
        for r in (embedded, runs[1])
    )
    print(f"\na served teacher in a run: largest gap {abs(ours - theirs).max():.2e} nats over {len(ours)} tokens")
    assert abs(ours - theirs).max() < 1.1e-3

    student = str(embedded / "round=0001" / "student")
    own = ModelRef(student, "", device="cpu")
    prompt = Side(own).render([{"role": "user", "content": "word"}])
    with served(student) as url:
        ref = ModelRef(student, "", device="cpu", engine="server", urls=(url,))
        (answer,) = engine(ref).generate([prompt], [0], Sampling(8, 0))
        body = {"model": student, "messages": [{"role": "user", "content": "word"}], "max_tokens": 8, "temperature": 0}
        chat = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]["message"]["content"]
    (wanted,) = engine(own).generate([prompt], [0], Sampling(8, 0))
    print(f"the trained student, served: {chat!r}")
    assert answer.ids == wanted.ids
    assert chat.strip() == Side(own).tokenizer.decode(answer.ids, skip_special_tokens=True).strip()

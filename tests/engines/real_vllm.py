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
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import tomli_w
from conftest import CHECKOUT
from prefect.testing.utilities import prefect_test_harness
from toys import full_logprobs

from configs.errors import BadInput
from flows.distill import distill
from tasks.engines.base import Completion, Engine, Sampling, TokenScores
from tasks.engines.choose import get_engine, release
from tasks.models.reference import ModelRef
from tasks.models.text import Side
from tasks.signals import make_signal

PYTHON = str(CHECKOUT / ".venv-vllm" / "bin" / "python")
SMOLLM2 = str(CHECKOUT / "models" / "smollm2")
LIMIT = 1e-3  # nats, float32
TOPICS = ("the tides", "a lost key", "bread", "prime numbers", "bees", "a haiku", "the moon", "fractions")
SIGNAL = make_signal("topk", 16, 0.95)


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
    yield {name: lambda ref=ref: get_engine(ref) for name, ref in refs.items()}
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
        apart = gaps(scores, wanted)
        print(f"\n{name} and transformers, {len(apart)} tokens: largest gap {apart.max():.2e}, mean {apart.mean():.2e} nats")
        assert apart.max() < LIMIT
        for ours, theirs in zip(wanted, scores, strict=True):
            same = (
                ours.columns["top_counts"] == theirs.columns["top_counts"]
            )  # where the mass stands just at top_p, one more or less is kept
            assert same.mean() > 0.9
            assert np.exp(theirs.columns["rest"][same]) == pytest.approx(np.exp(ours.columns["rest"][same]), abs=1e-4)
        late = engines[name]().score([prompt[:-1] for prompt in prompts], shifted, SIGNAL)
        apart = gaps(late, wanted)
        print(f"{name}, one position off: largest gap {apart.max():.2f}, mean {apart.mean():.2f} nats")
        assert apart.max() > 1000 * LIMIT
        assert apart.mean() > 100 * LIMIT


@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
def test_every_signal_from_hidden_states(name: str) -> None:
    """64 completions: the columns that a vLLM child's states make here are those of the embedded engine.

    Gemma scales its embeddings and norms, and has a head of 262,144 rows.
    """
    folder = str(CHECKOUT / "models" / name)
    own = ModelRef(folder, name, rendering="plain", device="cpu")
    child = replace(own, engine="vllm", vllm_python=PYTHON)
    some = [Side(own).render([{"role": "user", "content": f"Write about {topic}."}]) for topic in TOPICS] * 8
    completions = [c.ids for c in get_engine(own).generate(some, list(range(64)), Sampling(24))]
    for kind in ("hidden", "bytes", "topk"):
        signal = make_signal(kind, 16, 0.95)
        ours, theirs = (get_engine(ref).score(some, completions, signal) for ref in (own, child))
        apart = gaps(theirs, ours)
        print(f"\n{name}, {kind}, {len(apart)} tokens: largest gap {apart.max():.2e}, mean {apart.mean():.2e} nats")
        assert apart.max() < LIMIT
        for column in ours[0].columns:
            a, b = (np.concatenate([each.columns[column].reshape(-1) for each in all]).astype(float) for all in (ours, theirs))
            if len(a) == len(b):  # (where the mass stands just at top_p, one more or less is kept)
                assert (abs(a - b) <= 1e-2 + 1e-2 * abs(a)).mean() > 0.99, column
    shifted = [[prompt[-1], *ids[:-1]] for prompt, ids in zip(some, completions, strict=True)]
    apart = gaps(get_engine(child).score([prompt[:-1] for prompt in some], shifted, signal), ours)
    print(f"{name}, one position off: largest gap {apart.max():.2f}, mean {apart.mean():.2f} nats")
    assert apart.mean() > 100 * LIMIT
    release()


@pytest.mark.parametrize("name", ["vllm", "server"])
@pytest.mark.parametrize("sampling", [Sampling(16), Sampling(16, 0.7, 0.9, 20)], ids=["plain", "shaped"])
def test_a_completions_log_probs(engines, prompts, name: str, sampling: Sampling) -> None:
    """Those of the distribution drawn from; a completion depends on its seed alone; greedy ones take the likeliest."""
    some, seeds = prompts[:16], list(range(16))
    generator = engines[name]()
    made = generator.generate(some, seeds, sampling)
    again = generator.generate(some[::-1], seeds[::-1], sampling)[::-1]
    assert [c.ids for c in made] == [c.ids for c in again]
    assert len({tuple(c.ids) for c in made}) == 16
    assert gap(engines, some, made, sampling) < LIMIT
    assert sampling == Sampling(16) or gap(engines, some, made, Sampling(16)) > 0.1
    greedy = generator.generate(some, seeds, Sampling(16, 0))
    assert gap(engines, some, greedy, Sampling(16)) < LIMIT
    for law, completion in laws(engines, some, greedy):  # the likeliest, or one just as likely
        assert (law.max(1) - law[np.arange(len(law)), completion.ids]).max() < LIMIT


def test_more_prompts_than_a_step_has_room_for(engines, prompts) -> None:
    """Each completion as among few: vLLM cannot sample from a prompt in two parts on a CPU."""
    assert sum(map(len, prompts * 2)) > 2 * 2048
    generator = engines["vllm"]()
    made = generator.generate(prompts * 2, list(range(128)), Sampling(4))
    few = generator.generate(prompts[:8], list(range(8)), Sampling(4))
    assert [c.ids for c in made[:8]] == [c.ids for c in few]
    with pytest.raises(BadInput, match="a prompt has 2049 tokens; on a CPU vLLM can sample from prompts of at most 2048"):
        generator.generate([[1] * 2049], [0], Sampling(4))
    assert len(generator.generate([[1] * 2049], [0], Sampling(4, 0))[0].ids) <= 4


def laws(engines, prompts: list[list[int]], made: list[Completion]) -> Iterator[tuple[np.ndarray, Completion]]:
    """Log-probs `[tokens, V]` of the model itself, by a plain forward pass."""
    model = engines["transformers"]().model
    for prompt, completion in zip(prompts, made, strict=True):
        full = full_logprobs(model, prompt + completion.ids, model.config.vocab_size)
        yield full[len(prompt) - 1 : -1].numpy(), completion


def gap(engines, prompts: list[list[int]], made: list[Completion], sampling: Sampling) -> float:
    """The largest difference of a completion's log-probs from those under temperature, then top_k, then top_p."""
    largest = 0.0
    for law, completion in laws(engines, prompts, made):
        for row, token, logprob in zip(law, completion.ids, completion.logprobs, strict=True):
            order = np.argsort(-row)[: sampling.top_k or None]
            p = np.exp(row[order] / sampling.temperature)
            p /= p.sum()
            p[np.cumsum(p) - p >= sampling.top_p] = 0
            (place,) = np.flatnonzero(order == token)
            largest = max(largest, abs(float(np.log(p[place] / p.sum())) - logprob))
    return largest


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
    """And a server takes the trained student as it lies there (this one is too small to say much)."""
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
        status = pl.read_parquet(other / "round=0001" / "scores" / "*.parquet")["status"]
        assert (status == "ok").mean() > 0.5
        assert set(status) <= {"ok", "empty"}  # (a new student's first token may be half a character, and no text)
    rollouts = pl.read_parquet(runs[0] / "round=0001" / "rollouts" / "*.parquet")
    assert set(rollouts.filter(source="student")["engine"]) == {"vllm-0.32.0"}
    # The served teacher scores the embedded student's own rollouts: the same numbers.
    ours, theirs = (
        pl.read_parquet(r / "round=0001" / "scores" / "*.parquet")["logprobs"].explode().drop_nulls().to_numpy()
        for r in (embedded, runs[1])
    )
    print(f"\na served teacher in a run: largest gap {abs(ours - theirs).max():.2e} nats over {len(ours)} tokens")
    assert abs(ours - theirs).max() < 1.1e-3

    served_answer(embedded, "word")


def served_answer(run: Path, question: str) -> str:
    """What the run's student, in a server of its own, answers to a chat; greedy, and the same as with transformers."""
    student = str(run / "round=0001" / "student")
    own = ModelRef(student, "", device="cpu")
    messages = [{"role": "user", "content": question}]
    prompt = Side(own).render(messages)
    with served(student) as url:
        ref = ModelRef(student, "", device="cpu", engine="server", urls=(url,))
        (answer,) = get_engine(ref).generate([prompt], [0], Sampling(32, 0))
        body = {"model": student, "messages": messages, "max_tokens": 32, "temperature": 0}
        response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).raise_for_status()
    (wanted,) = get_engine(own).generate([prompt], [0], Sampling(32, 0))
    release()
    chat = response.json()["choices"][0]["message"]["content"]
    print(f"\n{run.name}'s student, served, asked {question!r}: {chat!r}")
    assert answer.ids == wanted.ids
    assert chat.strip() == Side(own).tokenizer.decode(answer.ids, skip_special_tokens=True).strip()
    return chat


def test_one_start_in_two_rounds(tmp_path, caplog) -> None:
    """SmolLM2 samples in vLLM: started in round 0, its child takes the weights of rounds 1 and 2. Ended each time: the same."""
    sampler = f"student={{model='models/smollm2', rendering='plain', engine='vllm', vllm_python='{PYTHON}'}}"
    rollouts = {}
    with prefect_test_harness(server_startup_timeout=120):
        for name in ("kept", "anew"):
            caplog.clear()
            for rounds in (2,) if name == "kept" else (1, 2):
                where = (f"root={tmp_path / name}", "name=run", *SMALL, sampler)
                distill(str(CHECKOUT / "configs" / "gemma3-to-smollm2.toml"), rounds=rounds, overrides=where)
                release()
            started, went_on = (sum(f"vLLM {what} with" in m for m in caplog.messages) for what in ("starts", "goes on"))
            print(f"\n{name}: vLLM started {started} times, took new weights {went_on} times")
            assert (started, went_on) == ((1, 2) if name == "kept" else (2, 2))
            files = sorted((tmp_path / name / "run").glob("round=000*/rollouts/*.parquet"))
            assert len(files) == 4
            rollouts[name] = [pl.read_parquet(file)["token_ids"].to_list() for file in files]
    assert rollouts["kept"] == rollouts["anew"]


SMALL = ("rounds=1", "prompts.eval=2", "evaluate.samples=0", "rollout.prompts=8", "rollout.shard_rows=4", "train.batch_size=4")


def real(root: Path, config: str, name: str, *overrides: str) -> Path:
    """A round of a recipe of configs/, eight rollouts long."""
    where = (f"root={root}", f"name={name}", *SMALL, *overrides)
    assert distill(str(CHECKOUT / "configs" / config), overrides=where)["rounds"] == 1
    release()
    return root / name


def test_a_real_recipe_by_every_engine(tmp_path, smollm2_url) -> None:
    """SmolLM2 teaches Gemma 3 embedded, from a child and from a server; then it learns from Gemma, and its child samples."""
    teacher = "teacher={{model='models/smollm2', {}}}"
    engines = {
        "embedded": teacher.format("engine='transformers'"),
        "child": teacher.format(f"engine='vllm', vllm_python='{PYTHON}'"),
        "served": teacher.format(f"engine='server', urls=['{smollm2_url}']"),
    }
    topk = ("score.signal=topk", "objective={name='gold'}")
    with prefect_test_harness(server_startup_timeout=120):
        runs = {name: real(tmp_path, "smollm2-to-gemma3.toml", name, *topk, used) for name, used in engines.items()}
        sampler = f"student={{model='models/smollm2', rendering='plain', engine='vllm', vllm_python='{PYTHON}'}}"
        mirror = real(tmp_path, "gemma3-to-smollm2.toml", "mirror", sampler)
    tables = {name: pl.read_parquet(run / "round=0001" / "scores" / "*.parquet") for name, run in runs.items()}
    for name in ("child", "served"):
        ours, theirs = (tables[which]["logprobs"].explode().drop_nulls().to_numpy() for which in ("embedded", name))
        apart = abs(ours - theirs)
        print(f"\n{name}, in a run of a real recipe: largest gap {apart.max():.2e} nats over {len(ours)} tokens")
        assert len(ours) > 100
        assert apart.max() < LIMIT + 1e-3  # stored in half precision
        losses = [pl.read_parquet(runs[which] / "round=0001" / "steps" / "*.parquet")["loss"] for which in ("embedded", name)]
        assert losses[1].to_list() == pytest.approx(losses[0].to_list(), rel=1e-2)
    rollouts = pl.read_parquet(mirror / "round=0001" / "rollouts" / "*.parquet")
    assert set(rollouts["engine"]) == {"vllm-0.32.0"}
    for run in (*runs.values(), mirror):
        files = sorted(path.relative_to(run) for path in run.rglob("*.parquet"))
        assert files == sorted(path.relative_to(runs["embedded"]) for path in runs["embedded"].rglob("*.parquet"))
    assert len(served_answer(mirror, "Write one short sentence with the word river.").split()) > 3

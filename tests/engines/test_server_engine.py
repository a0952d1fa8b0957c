"""The server engine against a real model behind real sockets: the same scores as the embedded engine, and every fault."""

import signal
import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from toys import full_logprobs, student_ref, teacher_ref, twin_ref

from configs.errors import BadInput, Unavailable
from tasks.engines import http, remote, server
from tasks.engines.base import Sampling, TokenScores
from tasks.engines.choose import check_engine
from tasks.engines.names import engine_name
from tasks.engines.server import ServerEngine
from tasks.engines.transformers import TransformersEngine
from tasks.models.reference import ModelRef
from tasks.models.text import side
from tasks.signals import make_signal


def at(ref: ModelRef, *fakes) -> ModelRef:
    return replace(ref, engine="server", urls=tuple(fake.url for fake in fakes))


def sequences(ref: ModelRef, rows: int = 9, seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and completions of many lengths; every second one ends with a stop, each of them in turn."""
    rng, stops = np.random.default_rng(seed), side(ref).stop_ids
    prompts = [rng.integers(6, 280, rng.integers(1, 9)).tolist() for _ in range(rows)]
    completions = [rng.integers(6, 280, rng.integers(1, 9)).tolist() for _ in range(rows)]
    return prompts, [ids + stops[i % len(stops) :][:1] * (i % 2) for i, ids in enumerate(completions)]


def named(scores: TokenScores) -> list[dict[int, float]]:
    """Of each token the ids that are kept, with their log-probs (near-equal ones may stand in another order)."""
    ends = np.cumsum(scores.columns["top_counts"])
    parts = [slice(end - count, end) for end, count in zip(ends, scores.columns["top_counts"], strict=True)]
    return [
        dict(zip(scores.columns["top_ids"][at].tolist(), scores.columns["top_logprobs"][at].tolist(), strict=True))
        for at in parts
    ]


# -- the same as the embedded engine ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ref", [student_ref, teacher_ref], ids=["one-stop", "several-stops"])
@pytest.mark.parametrize(("k", "top_p"), [(1, 1.0), (8, 1.0), (20, 0.6), (400, 2.0)], ids=["1", "8", "adaptive", "all"])
def test_scores_are_the_embedded_engines(ref, serve, monkeypatch, k: int, top_p: float) -> None:
    """Ids, counts, log-probs and rest, also when a shard is many requests at two addresses."""
    monkeypatch.setattr(server, "ENTRIES", 40 * (k + 1))
    fakes = [serve(ref()), serve(ref())]
    prompts, completions = sequences(ref())
    signal = make_signal("topk", k, top_p)
    wanted = TransformersEngine(ref()).score(prompts, completions, signal)
    for ours, theirs in zip(wanted, ServerEngine(at(ref(), *fakes)).score(prompts, completions, signal), strict=True):
        assert theirs.columns["top_counts"].tolist() == ours.columns["top_counts"].tolist()
        assert named(theirs) == [pytest.approx(each, abs=1e-3, rel=2**-10) for each in named(ours)]
        assert theirs.logprobs == pytest.approx(ours.logprobs, abs=1.1e-3)  # STOP_ERROR
        assert theirs.logprobs[:-1] == pytest.approx(ours.logprobs[:-1], abs=1e-4)
        assert np.exp(theirs.columns["rest"]) == pytest.approx(np.exp(ours.columns["rest"]), abs=2e-6)
        kinds = [
            (a.dtype, b.dtype)
            for a, b in zip((theirs.logprobs, *theirs.columns.values()), (ours.logprobs, *ours.columns.values()))
        ]
        assert all(a == b for a, b in kinds)
    assert all(fake.requests for fake in fakes)


def test_the_sampled_signal_has_log_probs_alone(serve) -> None:
    prompts, completions = sequences(teacher_ref())
    ours = TransformersEngine(teacher_ref()).score(prompts, completions, make_signal("sampled"))
    theirs = ServerEngine(at(teacher_ref(), serve(teacher_ref()))).score(prompts, completions, make_signal("sampled"))
    for a, b in zip(theirs, ours, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1.1e-3)
        assert a.columns == {}


def test_stops_that_were_not_returned_are_asked_for(serve, monkeypatch) -> None:
    """With k = 1 the other stops are hardly ever among the returned ids; without asking, the event is too small."""
    prompts, completions = sequences(teacher_ref(), 30)
    embedded = TransformersEngine(teacher_ref())
    wanted = np.array([s.logprobs[-1] for s in embedded.score(prompts, completions, make_signal(k=1))])
    remote_engine = ServerEngine(at(teacher_ref(), serve(teacher_ref())))

    def gaps() -> np.ndarray:
        return abs(np.array([s.logprobs[-1] for s in remote_engine.score(prompts, completions, make_signal(k=1))]) - wanted)

    assert gaps().max() < 1.1e-3
    monkeypatch.setattr(remote, "STOP_ERROR", np.inf)
    assert gaps().max() > 0.1


def test_a_padded_head_is_in_the_rest(serve) -> None:
    """Rows of the head that are no ids are never named, and never sampled; vLLM cannot leave them out of the sum."""
    ref = twin_ref()
    fake, size = serve(ref), len(side(ref).beta.values)
    prompts, completions = sequences(ref)
    engine = ServerEngine(at(ref, fake))
    for prompt, ids, scored in zip(prompts, completions, engine.score(prompts, completions, make_signal(k=30)), strict=True):
        full = full_logprobs(fake.model, prompt + ids, size + 7)[len(prompt) - 1 : -1].exp().numpy()
        owner = np.repeat(np.arange(len(ids)), scored.columns["top_counts"])
        named = np.bincount(owner, [full[t, i] for t, i in zip(owner, scored.columns["top_ids"])], len(ids))
        assert scored.columns["top_ids"].max() < size
        assert np.exp(scored.columns["rest"]) == pytest.approx(1 - named, abs=1e-5)
        assert (np.exp(scored.columns["rest"]) >= full[:, size:].sum(1) - 1e-6).all()
    sampled = engine.generate(prompts * 9, list(range(9 * len(prompts))), Sampling(4))
    assert max(max(completion.ids) for completion in sampled) < size
    del fake.requests[-1]["logit_bias"]  # (it is what keeps them out)
    assert max(fake.sample([9], 50, fake.requests[-1] | {"stop_token_ids": []})[0]) >= size


def test_greedy_completions_are_the_embedded_engines(serve) -> None:
    prompts, _ = sequences(teacher_ref())
    ours = TransformersEngine(teacher_ref()).generate(prompts, [0] * 9, Sampling(8, temperature=0))
    theirs = ServerEngine(at(teacher_ref(), serve(teacher_ref()))).generate(prompts, [0] * 9, Sampling(8, temperature=0))
    assert [c.ids for c in theirs] == [c.ids for c in ours]
    for a, b in zip(theirs, ours, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


@pytest.mark.parametrize("sampling", [Sampling(8), Sampling(8, 0.5, 0.8, 20)], ids=["plain", "shaped"])
def test_a_completion_depends_on_its_seed_alone(serve, sampling: Sampling) -> None:
    fake = serve(student_ref())
    engine, (prompts, _) = ServerEngine(at(student_ref(), fake)), sequences(student_ref())
    together = engine.generate(prompts, list(range(9)), sampling)
    backward = engine.generate(prompts[::-1], list(range(9))[::-1], sampling)[::-1]
    assert [c.ids for c in together] == [c.ids for c in backward]
    assert [c.ids for c in engine.generate(prompts, list(range(9, 18)), sampling)] != [c.ids for c in together]
    if sampling == Sampling(8):
        scored = TransformersEngine(student_ref()).score(prompts, [c.ids for c in together], make_signal("sampled"))
        for completion, score in zip(together, scored, strict=True):
            assert completion.logprobs == pytest.approx(score.logprobs, abs=1e-4)


def test_log_probs_of_another_distribution_are_refused(serve) -> None:
    """A server whose log-probs are the model's own will do where nothing is shaped, and not where something is."""
    fake = serve(student_ref(), processed=False)
    engine, prompts = ServerEngine(at(student_ref(), fake)), [[9, 8, 7]]
    engine.generate(prompts, [0], Sampling(4))
    engine.generate(prompts, [0], Sampling(4, temperature=0))
    for shaped in (Sampling(4, 0.7), Sampling(4, top_p=0.9), Sampling(4, top_k=5)):
        with pytest.raises(BadInput, match=rf"{fake.url}.*--logprobs-mode processed_logprobs"):
            engine.generate(prompts, [0], shaped)


# -- faults ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [500, 503, 408, 429, "reset", 1.0], ids=str)
def test_what_fails_for_a_moment_is_tried_again(serve, monkeypatch, fault) -> None:
    """The answers are in the right order, and every fault costs one request more."""
    monkeypatch.setattr(server, "PROMPTS", 2)
    monkeypatch.setattr(http, "SECONDS", 0.5)
    fake = serve(student_ref())
    prompts, completions = sequences(student_ref())
    wanted = ServerEngine(at(student_ref(), fake)).score(prompts, completions, make_signal(k=4))
    calm = len(fake.requests)
    fake.faults.extend([None, fault, None, fault])
    got = ServerEngine(at(student_ref(), fake)).score(prompts, completions, make_signal(k=4))
    assert [s.logprobs.tolist() for s in got] == [s.logprobs.tolist() for s in wanted]
    assert len(fake.requests) == 2 * calm + 2


def test_a_server_that_keeps_failing_is_named(serve) -> None:
    good, bad = serve(student_ref()), serve(student_ref())
    bad.faults.extend([500] * 1000)
    engine = ServerEngine(at(student_ref(), good, bad))
    with pytest.raises(Unavailable, match=rf"{bad.url}: no answer in 6 attempts \(status 500.*a fault on demand"):
        engine.generate([[9, 8]] * 4, [0, 1, 2, 3], Sampling(2))


def test_a_server_that_hangs_is_not_waited_for_all_day(serve, monkeypatch) -> None:
    """Two attempts as long as they may be, not six."""
    fake = serve(student_ref())
    engine = ServerEngine(at(student_ref(), fake))
    engine.check()
    monkeypatch.setattr(http, "SECONDS", 0.3)
    fake.faults.extend([5.0] * 6)
    with pytest.raises(Unavailable, match=rf"{fake.url}: no answer in 2 attempts \(ReadTimeout"):
        engine.generate([[9, 8]], [0], Sampling(2))


def test_a_dead_server_is_named_and_may_come_back(serve) -> None:
    fake = serve(student_ref())
    engine = ServerEngine(at(student_ref(), fake))
    engine.score([[9]], [[8]], make_signal())
    fake.stop()
    with pytest.raises(Unavailable, match=rf"{fake.url}: no answer"):
        engine.score([[9]], [[8]], make_signal())
    serve(student_ref(), port=int(fake.url.rpartition(":")[2]))
    engine.score([[9]], [[8]], make_signal())
    never = ServerEngine(replace(student_ref(), engine="server", urls=("http://127.0.0.1:9",)))
    with pytest.raises(Unavailable, match=r"http://127.0.0.1:9: no answer"):
        never.score([[9]], [[8]], make_signal())


def test_the_pauses_double(serve, pauses) -> None:
    fake = serve(student_ref())
    fake.faults.extend([500] * 6)
    with pytest.raises(Unavailable):
        ServerEngine(at(student_ref(), fake)).generate([[9, 8]], [0], Sampling(2))
    assert pauses == [1, 2, 4, 8, 16]


def test_nobody_waits_for_a_server_that_is_given_up(serve) -> None:
    """Neither a time-out of the task nor Ctrl-C: the requests that are under way are left alone."""
    fake = serve(student_ref())
    engine = ServerEngine(at(student_ref(), fake))
    engine.check()
    fake.faults.extend([20.0] * 8)

    def late(*_: object) -> None:
        raise TimeoutError("late")

    before, started = signal.signal(signal.SIGALRM, late), time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(TimeoutError, match="late"):
            engine.generate([[9, 8]] * 4, [0, 1, 2, 3], Sampling(2))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - started < 5
    asking = [thread for thread in threading.enumerate() if thread.name.startswith("Thread-") and not thread.daemon]
    assert asking == []  # the interpreter joins those that are no daemons at its end


@pytest.mark.parametrize("status", [401, 403])
def test_a_server_that_wants_a_key(serve, status: int) -> None:
    fake = serve(student_ref())
    fake.faults.append(status)
    with pytest.raises(BadInput, match=rf"{fake.url}: status {status} .*; set VLLM_API_KEY to a key that this server takes"):
        ServerEngine(at(student_ref(), fake)).generate([[9, 8]], [0], Sampling(2))
    assert len(fake.requests) == 1


def test_a_server_that_does_not_say_what_it_read(serve, monkeypatch) -> None:
    fake = serve(student_ref())
    choice = fake.choice
    monkeypatch.setattr(fake, "choice", lambda i, prompt, body: choice(i, prompt, {**body, "return_token_ids": False}))
    with pytest.raises(BadInput, match=rf"{fake.url}: .* it needs vLLM 0.30 or later"):
        ServerEngine(at(student_ref(), fake)).score([[9, 8]], [[7]], make_signal(k=2))


@pytest.mark.parametrize(
    ("recipe", "root", "fits"),
    [
        ("runs/maths/round=0003/student", "/data/runs/maths/round=0003/student", True),
        ("runs/maths/round=0003/student", "/data/runs/poetry/round=0003/student", False),
        ("runs/maths/round=0003/student", "/data/runs/maths/round=0007/student", False),
        ("Qwen/Qwen3-4B", "/models/Qwen3-4B/", True),
        ("Qwen/Qwen3-4B", "/models/Qwen3-8B", False),
    ],
)
def test_a_checkpoint_is_told_by_its_run_and_round(recipe: str, root: str, fits: bool) -> None:
    """Every run's are called `student`; two runs from one base model have one vocabulary, too."""
    engine = ServerEngine(replace(student_ref(), engine="server", urls=("http://a:1",)))
    engine.ref = replace(engine.ref, path=recipe)
    if fits:
        assert engine._find_model("http://a:1", [{"id": root}]) == root
    else:
        with pytest.raises(BadInput, match=f"http://a:1: serves {root}, not {recipe}"):
            engine._find_model("http://a:1", [{"id": root}])


@pytest.mark.parametrize("status", [400, 404, 422])
def test_a_refusal_is_not_tried_again(serve, status: int) -> None:
    fake = serve(student_ref())
    fake.faults.append(status)
    with pytest.raises(BadInput, match=rf"{fake.url}: status {status} for /v1/completions: a fault on demand"):
        ServerEngine(at(student_ref(), fake)).generate([[9, 8]], [0], Sampling(2))
    assert len(fake.requests) == 1


def test_more_ids_than_the_server_gives(serve) -> None:
    fake = serve(student_ref(), max_logprobs=20)
    with pytest.raises(BadInput, match=r"prompt logprobs of 64.*max allowed: 20.*the options that the server is started with"):
        ServerEngine(at(student_ref(), fake)).score([[9]], [[8]], make_signal(k=64))


def test_requests_in_flight_are_bounded(serve, monkeypatch) -> None:
    """Never more than IN_FLIGHT at one address, and more than one."""
    monkeypatch.setattr(server, "IN_FLIGHT", 3)
    fake = serve(student_ref())
    fake.faults.extend([0.05] * 12)
    busy, most = Counter(), []
    answer = fake.answer

    def watched(path, body):
        busy["now"] += 1
        most.append(busy["now"])
        result = answer(path, body)
        busy["now"] -= 1
        return result

    monkeypatch.setattr(fake, "answer", watched)
    ServerEngine(at(student_ref(), fake)).generate([[9, 8]] * 12, list(range(12)), Sampling(6))
    assert 1 < max(most) <= 3


# -- another model -----------------------------------------------------------------------------------------------------------


def test_another_model_is_refused_before_the_first_request(serve) -> None:
    fake = serve(student_ref(), name="somebody/else")
    fake.path = "/models/else"
    with pytest.raises(BadInput, match=rf"{fake.url}: serves somebody/else, not {student_ref().path}"):
        ServerEngine(at(student_ref(), fake)).score([[9]], [[8]], make_signal())
    assert not fake.requests


@pytest.mark.parametrize("spelling", ["the name", "the path", "the last part of it"])
def test_names_that_are_the_same_model(serve, spelling: str) -> None:
    ref = student_ref()
    fake = serve(ref)
    if spelling != "the name":
        fake.name = "served"
    if spelling == "the last part of it":
        fake.path = f"/elsewhere/{ref.path.rpartition('/')[2]}"
    engine = ServerEngine(at(ref, fake))
    engine.score([[9]], [[8]], make_signal())
    assert engine.names == {fake.url: fake.name}


def test_another_vocabulary_under_the_same_name_is_refused(serve) -> None:
    fakes = [serve(student_ref()), serve(teacher_ref(), name=student_ref().path)]
    with pytest.raises(BadInput, match=rf"{fakes[1].url}: serves .* with another vocabulary than {student_ref().path}"):
        ServerEngine(at(student_ref(), *fakes)).score([[9]], [[8]], make_signal())
    assert not fakes[0].requests
    assert not fakes[1].requests


def test_check_engine(serve) -> None:
    """Before a run: another model is refused; a server that is down is none of its business (all may be there already)."""
    fake = serve(teacher_ref(), name=student_ref().path)
    with pytest.raises(BadInput, match="another vocabulary"):
        check_engine(at(student_ref(), fake))
    check_engine(replace(student_ref(), engine="server", urls=("http://127.0.0.1:9",)))
    assert engine_name(at(student_ref(), fake), "score") == "server"


def test_places_are_not_part_of_a_key() -> None:
    ref = student_ref()
    moved = replace(ref, path="/else", urls=("http://a",), vllm_python="python", vllm_memory=0.5, device="cpu")
    assert ref.identity == moved.identity

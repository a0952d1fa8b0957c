"""A server that lies: what is not vLLM's interface is refused at once and in one line, and costs neither memory nor hours."""

import json
import re
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from toys import student_ref

from configs.errors import BadInput, Unavailable
from tasks.engines import http
from tasks.engines.base import Sampling
from tasks.engines.choose import check_engine
from tasks.engines.server import ServerEngine
from tasks.models.reference import ModelRef
from tasks.signals import make_signal

ESC = "\x1b"


class Liar:
    """Answers every request by `say(handler)`, and keeps what was asked."""

    def __init__(self, say: Callable[[BaseHTTPRequestHandler], None]):
        self.asked: list[tuple[str, dict[str, str]]] = []
        liar = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                liar.asked.append((self.path, dict(self.headers)))
                self.close_connection = True
                with suppress(OSError):  # the client has left
                    say(self)

            do_POST = do_GET

            def end_headers(self) -> None:
                self.send_header("Connection", "close")  # or the client may send its next request into the closing one
                super().end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


@pytest.fixture
def lie(monkeypatch) -> Iterator[Callable[..., Liar]]:
    monkeypatch.setattr(http, "PAUSE", 0.01)
    started: list[Liar] = []

    def start(say: Callable[[BaseHTTPRequestHandler], None]) -> Liar:
        started.append(Liar(say))
        return started[-1]

    yield start
    for one in started:
        one.http.shutdown()
        one.http.server_close()


def answer(body: bytes, status: int = 200, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def say(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return say


def endless(piece: bytes, pause: float = 0.0) -> Callable[[BaseHTTPRequestHandler], None]:
    """A body in chunks without an end; two gigabytes and two minutes are one here."""

    def say(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        until = time.monotonic() + 120
        for _ in range(2**31 // len(piece)):
            handler.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            if time.monotonic() > until:
                return
            time.sleep(pause)

    return say


def at(*urls: str) -> ModelRef:
    return replace(student_ref(), engine="server", urls=urls)


def refusal(url: str, kind: type[Exception] = BadInput) -> str:
    """The message with which the first request ends: one line, without anything that a terminal would obey."""
    with pytest.raises(kind) as caught:
        ServerEngine(at(url)).score([[9]], [[8]], make_signal(k=2))
    text = str(caught.value)
    assert text.startswith(f"{url}: ")
    assert text.isprintable()
    assert len(text) < 700
    return text


# -- another interface -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        (b"<!doctype html>\n<title>Welcome</title>", ["is not JSON, and begins: <!doctype html>"]),
        (f"{ESC}]0;owned\x07{ESC}[2J oh".encode(), ["is not JSON, and begins: \\x1b]0;owned\\x07\\x1b[2J oh"]),
        (b"", ["is not JSON, but empty"]),
        (b"  \n ", ["is not JSON, and begins with blanks"]),
        (b"x" * 5000, ["is not JSON, and begins: xxxx", "x…"]),
        (b"\xff\xfe\x00", ["is not JSON"]),
        (b"[" * 100_000, ["is not JSON"]),
        (b"[]", ["has another form (the whole of it: ", "and begins: []"]),
        (b"null", ["has another form"]),
        (b'{"data": {}}', ["has another form (data: "]),
        (b'{"data": [{"name": "x"}]}', ["has another form (data.0.id: Field required)"]),
        (b'{"data": []}', ["serves no model, not "]),
        (json.dumps({"data": [{"id": f"{ESC}[2J"}]}).encode(), ["serves \\x1b[2J, not "]),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_not_this_interface_is_refused_at_once(lie, body, parts):
    liar = lie(answer(body))
    text = refusal(liar.url)
    for part in parts:
        assert part in text
    assert len(liar.asked) == 1


def test_the_command_says_so_before_a_run(lie):
    """A server that is down is let through then; one that is something else is not."""
    with pytest.raises(BadInput, match="is not JSON"):
        check_engine(at(lie(answer(b"<html>")).url))


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_named_and_not_followed(lie, monkeypatch, status):
    """The key of this server is not for another one."""
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    other = lie(answer(b"{}"))
    address = other.url.replace("http://", "http://someone:word@") + f"/v1/models?token={ESC}abc"
    liar = lie(answer(b"", status, Location=address))
    text = refusal(liar.url)
    assert f"redirects /v1/models (status {status}, to {other.url}/v1/models), which is not followed" in text
    assert not any(word in text for word in ("word", "token", "abc", "secret"))
    assert len(liar.asked) == 1
    assert other.asked == []
    assert liar.asked[0][1]["Authorization"] == "Bearer secret"


def test_a_redirect_to_a_folder(lie):
    assert "to /login), which is not followed" in refusal(lie(answer(b"", 302, Location="/login")).url)


def test_an_answer_that_cannot_be_unpacked(lie):
    liar = lie(answer(b"no gzip", Content_Encoding="gzip"))
    assert "cannot be unpacked" in refusal(liar.url)
    assert len(liar.asked) == 1


# -- without an end ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [b" " * 2**16, b"[1," * 20_000], ids=["blanks", "numbers"])
def test_two_gigabytes_are_not_read(lie, piece):
    liar = lie(endless(piece))
    tracemalloc.start()
    try:
        text = refusal(liar.url)
        assert tracemalloc.get_traced_memory()[1] < 6 * http.ROOM
    finally:
        tracemalloc.stop()
    assert f"more than {http.ROOM:,} bytes, and begins" in text
    assert len(liar.asked) == 1


def test_a_long_answer_to_a_long_question_has_room(serve, monkeypatch):
    """What was asked for may be as long as it is."""
    engine = ServerEngine(at(serve(student_ref()).url))
    engine.check()
    monkeypatch.setattr(http, "ROOM", 0)
    assert len(engine.score([[9]] * 60, [[8] * 8] * 60, make_signal(k=60))) == 60


def test_a_body_that_drips_without_an_end_is_given_up(lie, monkeypatch):
    monkeypatch.setattr("tasks.engines.server.CHECK_SECONDS", 0.2)
    liar = lie(endless(b" ", 0.02))
    assert "does not end in 0.2 seconds" in refusal(liar.url, Unavailable)
    assert len(liar.asked) < http.ATTEMPTS


def test_an_error_without_an_end_is_cut(lie):
    def say(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(400)
        handler.send_header("Content-Length", str(2**31))
        handler.end_headers()
        for _ in range(2**11):
            handler.wfile.write(f"{ESC}[31mno ".encode() * 2**17)

    liar = lie(say)
    assert "status 400 for /v1/models: \\x1b[31mno " in refusal(liar.url)
    assert len(liar.asked) == 1


# -- for a moment ------------------------------------------------------------------------------------------------------


def test_a_dropped_connection_is_tried_again(lie):
    liar = lie(lambda handler: handler.connection.close())
    assert "no answer in 6 attempts" in refusal(liar.url, Unavailable)
    assert len(liar.asked) == http.ATTEMPTS


@pytest.mark.parametrize(
    ("header", "longest"),
    [
        ("7", 7),
        ("900", 60),
        ("-3", 16),
        ("soon", 16),
        ("", 16),
        (lambda: formatdate(time.time() + 30, usegmt=True), 30),
        ("1" * 400, 60),
    ],
    ids=["seconds", "too long", "negative", "a word", "nothing", "a date", "huge"],
)
def test_a_server_may_ask_for_a_pause(lie, pauses, header, longest):
    """In seconds or with a date, up to a minute; what it asks is not less than the pauses that double."""
    value = header() if callable(header) else header
    liar = lie(answer(b'{"error": "busy"}', 429, Retry_After=value))
    assert "no answer in 6 attempts (status 429 for /v1/models: busy)" in refusal(liar.url, Unavailable)
    assert max(pauses) == pytest.approx(max(longest, 16), abs=3)
    assert [pause >= 2**n for n, pause in enumerate(pauses)] == [True] * 5


# -- the right form, other numbers -------------------------------------------------------------------------------------


def nested(choice: dict[str, Any], *place: Any) -> Any:
    for part in place:
        choice = choice[part]
    return choice


def spoil(value: Any, *place: Any) -> Callable[[dict[str, Any]], None]:
    def change(choice: dict[str, Any]) -> None:
        nested(choice, *place[:-1])[place[-1]] = value

    return change


def rename(entries: dict[str, Any], name: str) -> None:
    """The last of a position's entries under another id."""
    entries[name] = entries.pop(list(entries)[-1])


SCORES = {
    "NaN": (spoil(float("nan"), "prompt_logprobs", -1, "8", "logprob"), "a log-prob of nan"),
    "positive": (spoil(0.5, "prompt_logprobs", -1, "8", "logprob"), "a log-prob of 0.5"),
    "-inf": (spoil(float("-inf"), "prompt_logprobs", -1, "8", "logprob"), "a log-prob of -inf"),
    "id too large": (lambda choice: rename(choice["prompt_logprobs"][-1], "330"), "id 330, where the vocabulary has 320"),
    "id far too large": (lambda choice: rename(choice["prompt_logprobs"][-1], "9" * 20), "has another form"),
    "negative id": (
        lambda choice: rename(choice["prompt_logprobs"][-1], "-1"),
        "has another form (choices.0.prompt_logprobs.1.-1",
    ),
    "no number for an id": (lambda choice: rename(choice["prompt_logprobs"][-1], "eight"), "has another form"),
    "text for a log-prob": (spoil("high", "prompt_logprobs", -1, "8", "logprob"), "has another form"),
    "too few positions": (lambda choice: choice["prompt_logprobs"].pop(), "prompt_logprobs for 1 tokens, of 2"),
    "none": (spoil(None, "prompt_logprobs"), "prompt_logprobs for 0 tokens, of 2"),
    "an empty position": (spoil(None, "prompt_logprobs", -1), "without the token itself (8)"),
    "without the token": (lambda choice: choice["prompt_logprobs"][-1].pop("8"), "without the token itself (8)"),
    "too many ids": (
        lambda choice: choice["prompt_logprobs"][-1].update({str(i): {"logprob": -9.0} for i in range(50, 60)}),
        "ids for a token",
    ),
    "more than all the mass": (
        lambda choice: [entry.update(logprob=-0.1) for entry in choice["prompt_logprobs"][-1].values()],
        "more than the whole mass",
    ),
    "other tokens": (spoil([1, 2, 3], "prompt_token_ids"), "answers for other tokens"),
    "no index": (lambda choice: choice.pop("index"), "has another form"),
}
SAMPLES = {
    "NaN": (spoil(float("nan"), "logprobs", "token_logprobs", 0), "a log-prob of nan"),
    "positive": (spoil(3, "logprobs", "token_logprobs", 0), "a log-prob of 3"),
    "id too large": (spoil(10**30, "token_ids", 0), "has another form"),
    "negative id": (spoil(-5, "token_ids", 0), "has another form (choices.0.token_ids.0"),
    "other lengths": (lambda choice: choice["token_ids"].append(9), "ids and"),
    "too long": (
        lambda choice: (spoil([9] * 50, "token_ids")(choice), spoil([-1.0] * 50, "logprobs", "token_logprobs")(choice)),
        "50 ids and 50 log-probs for at most 4 tokens",
    ),
    "empty": (
        lambda choice: (spoil([], "token_ids")(choice), spoil([], "logprobs", "token_logprobs")(choice)),
        "0 ids and 0 log-probs for at most 4 tokens",
    ),
    "no log-probs": (spoil(None, "logprobs"), "no log-probs"),
}


def spoiled(serve, monkeypatch, change: Callable[[dict[str, Any]], object]) -> ServerEngine:
    fake = serve(student_ref())
    choice = fake.choice

    def lied(*args: Any) -> dict[str, Any]:
        made = choice(*args)
        change(made)
        return made

    monkeypatch.setattr(fake, "choice", lied)
    return ServerEngine(at(fake.url))


@pytest.mark.parametrize(("change", "part"), SCORES.values(), ids=SCORES)
def test_scores_that_cannot_be(serve, monkeypatch, change, part):
    engine = spoiled(serve, monkeypatch, change)
    with pytest.raises(BadInput, match=re.escape(part)) as caught:
        engine.score([[9]], [[8]], make_signal(k=4))
    assert str(caught.value).startswith(engine.urls[0])


@pytest.mark.parametrize(("change", "part"), SAMPLES.values(), ids=SAMPLES)
def test_samples_that_cannot_be(serve, monkeypatch, change, part):
    engine = spoiled(serve, monkeypatch, change)
    with pytest.raises(BadInput, match=re.escape(part)) as caught:
        engine.generate([[9, 8]], [0], Sampling(4))
    assert str(caught.value).startswith(engine.urls[0])


def test_choices_that_are_missing(serve, monkeypatch):
    fake = serve(student_ref())
    answer_of = fake.answer
    monkeypatch.setattr(
        fake,
        "answer",
        lambda path, body: {**answer_of(path, body), "choices": []} if path.endswith("completions") else answer_of(path, body),
    )
    with pytest.raises(BadInput, match="answers for other tokens"):
        ServerEngine(at(fake.url)).score([[9]], [[8]], make_signal(k=4))


def test_an_honest_server_passes(serve, monkeypatch):
    engine = spoiled(serve, monkeypatch, lambda choice: None)
    assert len(engine.score([[9]], [[8]], make_signal(k=4))) == len(engine.generate([[9, 8]], [0], Sampling(4))) == 1

"""One request to a server: bounded in bytes and time, tried again where that may help; another kind of answer is refused."""

import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
from pydantic import TypeAdapter, ValidationError

from configs.errors import BadInput, Unavailable
from tasks.running.progress import logger

ATTEMPTS = 6
PAUSE = 1.0  # seconds before the second attempt, doubled with each
MOST_PAUSE = 60.0  # seconds; a server may ask for longer
SECONDS = 600.0  # until a response begins, and until it ends; after twice that nothing is tried again
ROOM = 2**24  # bytes of any answer, beside those of the numbers that were asked for
BUSY = {408, 425, 429}  # statuses with which a gateway asks to try later
SHOWN = 200  # characters of an answer
OTHER = "this is not the interface of vLLM; name an address where vLLM serves the model"

Answer = TypeVar("Answer")


class _Redirected(Exception):
    """The status, and where to."""


def connect(key: str | None) -> httpx.Client:
    """A client that sends `key` with each request, and follows no redirect: the key would go along."""

    def refuse_redirect(response: httpx.Response) -> None:  # before httpx reads the address, which may be none
        if 300 <= response.status_code < 400:
            raise _Redirected(f"status {response.status_code}, to {_place(response.headers.get('Location', ''))}")

    return httpx.Client(
        limits=httpx.Limits(max_connections=None),
        headers={"Authorization": f"Bearer {key}"} if key else {},
        event_hooks={"response": [refuse_redirect]},
    )


def call(
    client: httpx.Client,
    url: str,
    path: str,
    body: dict[str, Any] | None,
    *,
    shape: TypeAdapter[Answer],
    room: int = 0,
    attempts: int = ATTEMPTS,
    seconds: float | None = None,
) -> Answer:
    """The answer of the server at `url`, in its `shape`; `room` is the number of bytes that it may have beside ROOM.

    Raises Unavailable where every attempt failed in a way that another one may not, and BadInput for everything else: an
    answer that is not this interface's is no better the next time.
    """
    failure, started, asked = "", time.monotonic(), 0.0
    seconds = seconds or SECONDS
    for attempt in range(attempts):
        if attempt:
            if time.monotonic() - started > 2 * seconds:
                attempts = attempt
                break
            logger.info("%s: %s; trying again", url, failure)
            time.sleep(max(PAUSE * 2 ** (attempt - 1), asked))
        try:
            response, data = _fetch(client, url, path, body, room=ROOM + room, seconds=seconds)
        except httpx.TransportError as error:
            failure, asked = f"{type(error).__name__}: {show(str(error))}", 0.0
            continue
        except httpx.DecodingError as error:
            raise BadInput(f"{url}: its answer to {path} cannot be unpacked ({show(str(error))}); {OTHER}") from None
        except _Redirected as redirect:
            raise BadInput(
                f"{url}: redirects {path} ({redirect}), which is not followed; name the address that serves the model itself"
            ) from None
        status = response.status_code
        if status < 300:
            return _read(url, path, data, shape)
        failure, asked = f"status {status} for {path}: {_reason_of(data)}", _seconds_of(response.headers.get("Retry-After", ""))
        if status in (401, 403):
            raise BadInput(f"{url}: {failure}; set VLLM_API_KEY to a key that this server takes")
        if status < 500 and status not in BUSY:
            raise BadInput(f"{url}: {failure}; change the recipe, or the options that the server is started with")
    raise Unavailable(
        f"{url}: no answer in {attempts} attempt{'s' * (attempts > 1)} ({failure}); start this server again or name another"
    )


def show(text: str) -> str:
    """The first line of a text, cut, with what a terminal would act on escaped."""
    lines = text.strip().splitlines()
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in (lines[0] if lines else "")[:SHOWN])
    return line + "…" * (bool(lines) and len(lines[0]) > SHOWN)


def _fetch(
    client: httpx.Client, url: str, path: str, body: dict[str, Any] | None, *, room: int, seconds: float
) -> tuple[httpx.Response, bytes]:
    """A response and its body. One that is longer than `room` is not read to its end, and one that does not end is left."""
    method, data = "GET" if body is None else "POST", bytearray()
    with client.stream(method, url + path, json=body, timeout=httpx.Timeout(seconds, connect=10)) as response:
        began = time.monotonic()
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) > room and response.is_success:
                raise BadInput(f"{url}: its answer to {path} has more than {room:,} bytes, {_begin(data)}; {OTHER}")
            if len(data) > room:
                break
            if time.monotonic() - began > seconds:
                raise httpx.ReadTimeout(f"the answer does not end in {seconds:g} seconds")
    return response, bytes(data)


def _read(url: str, path: str, data: bytes, shape: TypeAdapter[Answer]) -> Answer:
    try:
        return shape.validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            raise BadInput(f"{url}: its answer to {path} is not JSON, {_begin(data)}; {OTHER}") from None
        place = ".".join(str(part) for part in first["loc"]) or "the whole of it"
        raise BadInput(
            f"{url}: its answer to {path} has another form ({show(place)}: {first['msg']}), {_begin(data)}; {OTHER}"
        ) from None


def _begin(data: bytes | bytearray) -> str:
    begin = show(bytes(data[: 8 * SHOWN]).decode(errors="replace"))
    return f"and begins: {begin}" if begin else "and begins with blanks" if data else "but empty"


def _place(address: str) -> str:
    """An address without user, key and query."""
    try:
        parts = urlsplit(address)
        return show(
            f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
            if parts.netloc
            else parts.path
        )
    except ValueError:
        return show(address)


def _reason_of(data: bytes) -> str:
    """The server's error message."""
    try:
        body = TypeAdapter(dict[str, Any]).validate_json(data)
        error = body.get("error", body)
        return show(str(error.get("message", error) if isinstance(error, dict) else error))
    except ValidationError:
        return show(data.decode(errors="replace"))


def _seconds_of(header: str) -> float:
    """How long a server asks to be left alone, in seconds or until a date; no longer than MOST_PAUSE."""
    try:
        seconds = float(header) if header.isdigit() else (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):
        return 0.0
    return min(max(seconds, 0.0), MOST_PAUSE)

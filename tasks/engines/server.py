"""The server engine: vLLM at one or several addresses, over its OpenAI-compatible HTTP interface, with ids instead of text."""

import os
import time
from collections.abc import Callable, Iterator
from multiprocessing.pool import ThreadPool
from typing import Any, TypeVar

import httpx
import numpy as np

from configs.errors import BadInput, Unavailable
from tasks.engines.base import Advance, Completion, Sampling, ignore_progress
from tasks.engines.remote import RemoteEngine
from tasks.models.reference import ModelRef
from tasks.running.progress import logger
from tasks.signals.base import Top

IN_FLIGHT = 32  # requests at one address at once
ENTRIES = 200_000  # log-probs per response
PROMPTS = 64  # per request
ATTEMPTS = 6
PAUSE = 1.0  # seconds before the second attempt, doubled with each
SECONDS = 600.0  # until a response begins, or continues; after twice that nothing is tried again
CHECK_SECONDS = 30.0  # the same for the check of what a server serves
BUSY = {408, 425, 429}  # statuses with which a gateway asks to try later
PROBE = "The naïve fox's 3.14159 jumps,\n\tif x != 0: return  “日本語” 👩‍👩‍👧 Ångström — Привет!"
PROBE_TOKENS = 512

Job = TypeVar("Job")
Result = TypeVar("Result")


class ServerEngine(RemoteEngine):
    """Requests go to the addresses in turn. Temporary failures (5xx, 429, resets, timeouts) are retried with longer and longer
    pauses.
    """

    def __init__(self, ref: ModelRef):
        super().__init__(ref)
        key = os.environ.get("VLLM_API_KEY")
        self.client = httpx.Client(
            limits=httpx.Limits(max_connections=None),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        self.urls = [url.rstrip("/") for url in ref.urls]
        self.names: dict[str, str] = {}  # the model's name at each address
        self.drawn: set[str] = set()  # addresses whose log-probs are known to be those of the distribution drawn from

    def generate(
        self, prompts: list[list[int]], seeds: list[int], sampling: Sampling, advance: Advance = ignore_progress
    ) -> list[Completion]:
        """Each completion is a request of its own, because a request has one seed."""
        self.check()
        if prompts and not sampling.plain and sampling.temperature:
            self._check_draws(prompts[0])
        options: dict[str, Any] = {"max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature}
        if sampling.temperature:
            options |= {"top_p": sampling.top_p, "top_k": sampling.top_k}
        options |= {"stop_token_ids": self.side.stop_ids, "ignore_eos": True, "logprobs": 0}
        if self.rows > self.size:
            options["logit_bias"] = {str(i): -100.0 for i in range(self.size, self.rows)}

        def complete(url: str, job: tuple[list[int], int]) -> Completion:
            (choice,) = self._complete(url, [job[0]], {**options, "seed": job[1]})
            return Completion(choice["token_ids"], choice["logprobs"]["token_logprobs"])

        completions = []
        for completion in self._map_jobs(complete, list(zip(prompts, seeds, strict=True))):
            completions.append(completion)
            advance(1)
        return completions

    def tops(self, prompts: list[list[int]], completions: list[list[int]], k: int) -> Iterator[Top]:
        self.check()
        sequences = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]

        def score(url: str, rows: range) -> list[Top]:
            choices = self._complete(url, [sequences[i] for i in rows], {"prompt_logprobs": k})
            return [_read_top(c["prompt_logprobs"], completions[i], k) for c, i in zip(choices, rows, strict=True)]

        for part in self._map_jobs(score, _split_rows([len(ids) for ids in sequences], k + 1)):
            yield from part

    def stops(self, contexts: list[list[int]]) -> np.ndarray:
        stops = self.side.stop_ids
        options = {"logprobs": len(stops), "logprob_token_ids": stops, "return_tokens_as_token_ids": True}

        def score_stops(url: str, rows: range) -> list[list[float]]:
            choices = self._complete(url, [contexts[i] for i in rows], options)
            return [[c["logprobs"]["top_logprobs"][0][f"token_id:{i}"] for i in stops] for c in choices]

        jobs = _split_rows([len(ids) for ids in contexts], 1)
        return np.array([row for part in self._map_jobs(score_stops, jobs) for row in part])

    def close(self) -> None:
        self.client.close()

    # -- before the first request ---------------------------------------------------------------------------------

    def check(self, attempts: int = ATTEMPTS) -> None:
        """Refuse addresses that serve another model or vocabulary, once each."""
        for url in self.urls:
            if url in self.names:
                continue
            name = self._find_model(url, self._call(url, "/v1/models", None, attempts, CHECK_SECONDS)["data"])
            body = {"model": name, "prompt": self.probe, "add_special_tokens": False}
            its_ids = self._call(url, "/tokenize", body, attempts, CHECK_SECONDS)["tokens"]
            if its_ids != (ids := self.side.tokenizer(self.probe, add_special_tokens=False)["input_ids"]):
                at = next((i for i, (a, b) in enumerate(zip(its_ids, ids)) if a != b), min(len(its_ids), len(ids)))
                raise BadInput(
                    f"{url}: serves {name} with another vocabulary than {self.ref.path}: in a probe text token {at} is "
                    f"{its_ids[at : at + 1] or 'missing'} there, {ids[at : at + 1] or 'missing'} here; "
                    "serve the recipe's model there"
                )
            self.names[url] = name
            logger.info("%s serves %s", url, name)

    @property
    def probe(self) -> str:
        """A text that two tokenizers encode differently: difficult passages, and tokens from the whole vocabulary."""
        texts = [token.decode(errors="replace") for token in self.side.beta.values if token]
        tokens = [text for text in texts if "\ufffd" not in text]
        return "\n".join([PROBE, *tokens[:: -(-len(tokens) // PROBE_TOKENS)]])

    def _find_model(self, url: str, models: list[dict[str, Any]]) -> str:
        """The served name of the recipe's model: the same name or path, or one with the same end."""
        for same in (str, _end_of):
            for model in models:
                if same(self.ref.path) in {same(model["id"]), same(model.get("root") or model["id"])}:
                    name: str = model["id"]
                    return name
        names = ", ".join(model["id"] for model in models)
        raise BadInput(
            f"{url}: serves {names}, not {self.ref.path}; serve that model there (--served-model-name {self.ref.path}), "
            "or name the served model in the recipe"
        )

    def _check_draws(self, prompt: list[int]) -> None:
        """Refuse a server that returns the model's log-probs for samples from a changed distribution.

        With top_k = 1 every token has log-prob 0 under the distribution drawn from, and another one under the model.
        """
        one_id = {"temperature": 1.0, "top_k": 1, "top_p": 1.0, "seed": 0, "max_tokens": 8, "ignore_eos": True, "logprobs": 0}
        for url in set(self.urls) - self.drawn:
            (choice,) = self._complete(url, [prompt], one_id)
            if any(choice["logprobs"]["token_logprobs"]):
                raise BadInput(
                    f"{url}: its log-probs are the model's, not those of the distribution that it samples from; start it "
                    "with --logprobs-mode processed_logprobs, or sample with temperature = 1, top_p = 1, top_k = 0"
                )
            self.drawn.add(url)

    # -- requests -------------------------------------------------------------------------------------------------

    def _map_jobs(self, work: Callable[[str, Job], Result], jobs: list[Job]) -> Iterator[Result]:
        """Call `work(url, job)` for all jobs, many at once, and yield the results in order. The first error ends it."""
        calls = [(self.urls[i % len(self.urls)], job) for i, job in enumerate(jobs)]
        # Daemon threads: an error here, a time-out, Ctrl-C and the end of the process do not wait for them.
        with ThreadPool(min(IN_FLIGHT * len(self.urls), max(len(jobs), 1))) as pool:
            yield from pool.imap(lambda call: work(*call), calls)

    def _complete(self, url: str, prompts: list[list[int]], options: dict[str, Any]) -> list[dict[str, Any]]:
        """One choice per prompt. Every option that a server's defaults could change is sent."""
        fixed = {"max_tokens": 1, "temperature": 0, "repetition_penalty": 1.0, "min_p": 0.0, "return_token_ids": True}
        body = {"model": self.names[url], "prompt": prompts, **fixed, **options}
        choices = sorted(self._call(url, "/v1/completions", body)["choices"], key=lambda choice: choice["index"])
        if [choice.get("prompt_token_ids") for choice in choices] != prompts:
            raise BadInput(f"{url}: answers for other tokens than those of the request; it needs vLLM 0.30 or later")
        return choices

    def _call(
        self, url: str, path: str, body: dict[str, Any] | None, attempts: int = ATTEMPTS, seconds: float | None = None
    ) -> dict[str, Any]:
        failure, started, seconds = "", time.monotonic(), seconds or SECONDS
        for attempt in range(attempts):
            if attempt:
                if time.monotonic() - started > 2 * seconds:
                    attempts = attempt
                    break
                logger.info("%s: %s; trying again", url, failure)
                time.sleep(PAUSE * 2 ** (attempt - 1))
            try:
                response = self.client.request(
                    "GET" if body is None else "POST", url + path, json=body, timeout=httpx.Timeout(seconds, connect=10)
                )
                if response.status_code < 400:
                    answer: dict[str, Any] = response.json()
                    return answer
            except (httpx.TransportError, ValueError) as error:
                failure = f"{type(error).__name__}: {error}"
                continue
            failure = f"status {response.status_code} for {path}: {_reason_of(response)}"
            if response.status_code in (401, 403):
                raise BadInput(f"{url}: {failure}; set VLLM_API_KEY to a key that this server takes")
            if response.status_code < 500 and response.status_code not in BUSY:
                raise BadInput(f"{url}: {failure}; change the recipe, or the options that the server is started with")
        raise Unavailable(
            f"{url}: no answer in {attempts} attempt{'s' * (attempts > 1)} ({failure}); start this server again or name another"
        )


def _end_of(name: str) -> str:
    """The last name of a path or hub id; for a run's checkpoint (`RUN/round=0003/student`) the last three names."""
    parts = name.rstrip("/").split("/")
    return "/".join(parts[-3:] if parts[-2:-1] and parts[-2].startswith("round=") else parts[-1:])


def _reason_of(response: httpx.Response) -> str:
    """The server's error message."""
    try:
        body = response.json()
        return str(body.get("error", body).get("message", body))[:500]
    except (ValueError, AttributeError):
        return response.text[:500]


def _read_top(positions: list[dict[str, Any] | None], completion: list[int], k: int) -> Top:
    """Read one `{id: {logprob}}` per position, which holds the actual token and the k likeliest ids."""
    n = len(completion)
    actual, ids, logprobs = np.empty(n), np.empty((n, k), np.int32), np.empty((n, k))
    for t, (entries, token) in enumerate(zip(positions[-n:], completion, strict=True)):
        assert entries is not None
        by_id = {int(i): entry["logprob"] for i, entry in entries.items()}
        actual[t] = by_id[token]
        if len(by_id) > k:
            del by_id[token]  # it is not among the likeliest
        best = sorted(by_id, key=by_id.__getitem__, reverse=True)
        ids[t], logprobs[t] = best, [by_id[i] for i in best]
    return Top(actual, ids, logprobs)


def _split_rows(lengths: list[int], width: int) -> list[range]:
    """Split rows, in order, so that a request has at most PROMPTS prompts and its response about ENTRIES log-probs."""
    parts: list[range] = []
    total = 0
    for row, length in enumerate(lengths):
        if not parts or len(parts[-1]) == PROMPTS or (total + length) * width > ENTRIES:
            parts.append(range(row, row))
            total = 0
        parts[-1] = range(parts[-1].start, row + 1)
        total += length
    return parts

"""The server engine: vLLM at one or several addresses, over its OpenAI-compatible HTTP interface, told ids and not text."""

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

IN_FLIGHT = 32  # requests at one address
ENTRIES = 200_000  # log-probs a response
PROMPTS = 64  # a request
ATTEMPTS = 6
PAUSE = 1.0  # seconds before the second attempt, doubled with each
SECONDS = 600.0  # until a response begins, or goes on; after twice that nothing is tried again
ASKED = 30.0  # the same, where a server is asked what it serves
BUSY = {408, 425, 429}  # a gateway's ways to say: later
PROBE = "The naïve fox's 3.14159 jumps,\n\tif x != 0: return  “日本語” 👩‍👩‍👧 Ångström — Привет!"
PROBE_TOKENS = 512

Job = TypeVar("Job")
Made = TypeVar("Made")


class ServerEngine(RemoteEngine):
    """Work goes to the addresses in turn. What fails for a moment (5xx, 429, resets, timeouts) is tried again, ever later."""

    def __init__(self, ref: ModelRef):
        super().__init__(ref)
        key = os.environ.get("VLLM_API_KEY")
        self.client = httpx.Client(
            limits=httpx.Limits(max_connections=None),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        self.urls = [url.rstrip("/") for url in ref.urls]
        self.names: dict[str, str] = {}  # what each address calls the model
        self.drawn: set[str] = set()  # addresses whose log-probs are those of the distribution drawn from

    def generate(
        self, prompts: list[list[int]], seeds: list[int], sampling: Sampling, advance: Advance = ignore_progress
    ) -> list[Completion]:
        """A request has one seed, so each completion is a request of its own."""
        self.check()
        if prompts and not sampling.plain and sampling.temperature:
            self._check_draws(prompts[0])
        wanted: dict[str, Any] = {"max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature}
        if sampling.temperature:
            wanted |= {"top_p": sampling.top_p, "top_k": sampling.top_k}
        wanted |= {"stop_token_ids": self.side.stop_ids, "ignore_eos": True, "logprobs": 0}
        if self.rows > self.size:
            wanted["logit_bias"] = {str(i): -100.0 for i in range(self.size, self.rows)}

        def complete(url: str, job: tuple[list[int], int]) -> Completion:
            (choice,) = self._complete(url, [job[0]], {**wanted, "seed": job[1]})
            return Completion(choice["token_ids"], choice["logprobs"]["token_logprobs"])

        made = []
        for completion in self._each(complete, list(zip(prompts, seeds, strict=True))):
            made.append(completion)
            advance(1)
        return made

    def tops(self, prompts: list[list[int]], completions: list[list[int]], k: int) -> Iterator[Top]:
        self.check()
        sequences = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]

        def score(url: str, rows: range) -> list[Top]:
            choices = self._complete(url, [sequences[i] for i in rows], {"prompt_logprobs": k})
            return [_top(c["prompt_logprobs"], completions[i], k) for c, i in zip(choices, rows, strict=True)]

        for part in self._each(score, _parts([len(ids) for ids in sequences], k + 1)):
            yield from part

    def stops(self, contexts: list[list[int]]) -> np.ndarray:
        stops = self.side.stop_ids
        wanted = {"logprobs": len(stops), "logprob_token_ids": stops, "return_tokens_as_token_ids": True}

        def ask(url: str, rows: range) -> list[list[float]]:
            choices = self._complete(url, [contexts[i] for i in rows], wanted)
            return [[c["logprobs"]["top_logprobs"][0][f"token_id:{i}"] for i in stops] for c in choices]

        jobs = _parts([len(ids) for ids in contexts], 1)
        return np.array([row for part in self._each(ask, jobs) for row in part])

    def close(self) -> None:
        self.client.close()

    # -- before the first request ---------------------------------------------------------------------------------

    def check(self, attempts: int = ATTEMPTS) -> None:
        """Refuse addresses that serve another model or vocabulary, once each."""
        for url in self.urls:
            if url in self.names:
                continue
            name = self._served(url, self._call(url, "/v1/models", None, attempts, ASKED)["data"])
            body = {"model": name, "prompt": self.probe, "add_special_tokens": False}
            theirs = self._call(url, "/tokenize", body, attempts, ASKED)["tokens"]
            if theirs != (ours := self.side.tokenizer(self.probe, add_special_tokens=False)["input_ids"]):
                at = next((i for i, (a, b) in enumerate(zip(theirs, ours)) if a != b), min(len(theirs), len(ours)))
                raise BadInput(
                    f"{url}: serves {name} with another vocabulary than {self.ref.path}: of a probe text its token {at} is "
                    f"{theirs[at : at + 1] or 'missing'}, here {ours[at : at + 1] or 'missing'}; serve the recipe's model there"
                )
            self.names[url] = name
            logger.info("%s serves %s", url, name)

    @property
    def probe(self) -> str:
        """A text that tells tokenizers apart: hard places, and tokens from all over the vocabulary."""
        texts = [token.decode(errors="replace") for token in self.side.beta.values if token]
        own = [text for text in texts if "\ufffd" not in text]
        return "\n".join([PROBE, *own[:: -(-len(own) // PROBE_TOKENS)]])

    def _served(self, url: str, models: list[dict[str, Any]]) -> str:
        """The served name of the recipe's model: the same name or path, or one that ends like it."""
        for same in (str, _last):
            for model in models:
                if same(self.ref.path) in {same(model["id"]), same(model.get("root") or model["id"])}:
                    name: str = model["id"]
                    return name
        names = ", ".join(model["id"] for model in models)
        raise BadInput(
            f"{url}: serves {names}, not {self.ref.path}; serve that model there (--served-model-name {self.ref.path}), "
            "or name the served one in the recipe"
        )

    def _check_draws(self, prompt: list[int]) -> None:
        """Drawn from one id alone, each token's log-prob is 0; the model's own is another."""
        one = {"temperature": 1.0, "top_k": 1, "top_p": 1.0, "seed": 0, "max_tokens": 8, "ignore_eos": True, "logprobs": 0}
        for url in set(self.urls) - self.drawn:
            (choice,) = self._complete(url, [prompt], one)
            if any(choice["logprobs"]["token_logprobs"]):
                raise BadInput(
                    f"{url}: its log-probs are the model's own, not those of the distribution that is drawn from; start it "
                    "with --logprobs-mode processed_logprobs, or sample with temperature = 1, top_p = 1, top_k = 0"
                )
            self.drawn.add(url)

    # -- requests -------------------------------------------------------------------------------------------------

    def _each(self, work: Callable[[str, Job], Made], jobs: list[Job]) -> Iterator[Made]:
        """`work(url, job)` of all jobs, in order, many at once; the first error ends it."""
        calls = [(self.urls[i % len(self.urls)], job) for i, job in enumerate(jobs)]
        # Threads that neither an error here, a time-out or Ctrl-C, nor the end of the process waits for.
        with ThreadPool(min(IN_FLIGHT * len(self.urls), max(len(jobs), 1))) as pool:
            yield from pool.imap(lambda call: work(*call), calls)

    def _complete(self, url: str, prompts: list[list[int]], options: dict[str, Any]) -> list[dict[str, Any]]:
        """One choice a prompt; what the server's own defaults could change is said."""
        fixed = {"max_tokens": 1, "temperature": 0, "repetition_penalty": 1.0, "min_p": 0.0, "return_token_ids": True}
        body = {"model": self.names[url], "prompt": prompts, **fixed, **options}
        choices = sorted(self._call(url, "/v1/completions", body)["choices"], key=lambda choice: choice["index"])
        if [choice.get("prompt_token_ids") for choice in choices] != prompts:
            raise BadInput(f"{url}: answers for other tokens than it was asked about; it needs vLLM 0.30 or later")
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
            failure = f"status {response.status_code} for {path}: {_reason(response)}"
            if response.status_code in (401, 403):
                raise BadInput(f"{url}: {failure}; set VLLM_API_KEY to a key that this server takes")
            if response.status_code < 500 and response.status_code not in BUSY:
                raise BadInput(f"{url}: {failure}; change the recipe, or what the server is started with")
        raise Unavailable(
            f"{url}: no answer in {attempts} attempt{'s' * (attempts > 1)} ({failure}); start this server again or name another"
        )


def _last(name: str) -> str:
    """What a path or hub id ends with: its last name, and of a run's checkpoint (`RUN/round=0003/student`) all three."""
    parts = name.rstrip("/").split("/")
    return "/".join(parts[-3:] if parts[-2:-1] and parts[-2].startswith("round=") else parts[-1:])


def _reason(response: httpx.Response) -> str:
    """What the server says is wrong."""
    try:
        said = response.json()
        return str(said.get("error", said).get("message", said))[:500]
    except (ValueError, AttributeError):
        return response.text[:500]


def _top(positions: list[dict[str, Any] | None], completion: list[int], k: int) -> Top:
    """Of `{id: {logprob}}` a position, which hold the actual token and the k likeliest."""
    n = len(completion)
    actual, ids, logprobs = np.empty(n), np.empty((n, k), np.int32), np.empty((n, k))
    for t, (entries, token) in enumerate(zip(positions[-n:], completion, strict=True)):
        assert entries is not None
        found = {int(i): entry["logprob"] for i, entry in entries.items()}
        actual[t] = found[token]
        if len(found) > k:
            del found[token]  # it is not among the likeliest
        best = sorted(found, key=found.__getitem__, reverse=True)
        ids[t], logprobs[t] = best, [found[i] for i in best]
    return Top(actual, ids, logprobs)


def _parts(lengths: list[int], width: int) -> list[range]:
    """Rows in order, cut so that a request has at most PROMPTS prompts and about ENTRIES log-probs come back."""
    parts: list[range] = []
    total = 0
    for row, length in enumerate(lengths):
        if not parts or len(parts[-1]) == PROMPTS or (total + length) * width > ENTRIES:
            parts.append(range(row, row))
            total = 0
        parts[-1] = range(parts[-1].start, row + 1)
        total += length
    return parts

"""The server engine: vLLM at one or several addresses, over its OpenAI-compatible HTTP interface, with ids instead of text."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from typing import Any, TypeVar

import numpy as np

from configs.errors import BadInput
from tasks.engines import answers
from tasks.engines.base import Advance, Completion, Sampling, ignore_progress
from tasks.engines.http import ATTEMPTS, OTHER, call, connect, show
from tasks.engines.remote import RemoteEngine
from tasks.models.reference import ModelRef
from tasks.running.progress import logger
from tasks.signals.base import Top

IN_FLIGHT = 32  # requests at one address at once
ENTRIES = 200_000  # log-probs per response
PROMPTS = 64  # per request
ENTRY_BYTES = 1024  # of the answer for each log-prob or id that is asked for, at most: a token may be a long text
CHECK_SECONDS = 30.0  # as http.SECONDS, for the check of what a server serves
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
        self.client = connect(os.environ.get("VLLM_API_KEY"))
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
            with _refuse_wrong(url):
                return answers.read_completion(choice, most=sampling.max_new_tokens, size=self.size)

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
            with _refuse_wrong(url):
                return [
                    answers.read_top(choice, prompts[i], completions[i], k, rows=self.rows)
                    for choice, i in zip(choices, rows, strict=True)
                ]

        for part in self._map_jobs(score, _split_rows([len(ids) for ids in sequences], k + 1)):
            yield from part

    def stops(self, contexts: list[list[int]]) -> np.ndarray:
        stops = self.side.stop_ids
        options = {"logprobs": len(stops), "logprob_token_ids": stops, "return_tokens_as_token_ids": True}

        def score_stops(url: str, rows: range) -> list[list[float]]:
            choices = self._complete(url, [contexts[i] for i in rows], options)
            with _refuse_wrong(url):
                return [answers.read_stops(choice, stops) for choice in choices]

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
            limits: dict[str, Any] = {"attempts": attempts, "seconds": CHECK_SECONDS}
            served = call(self.client, url, "/v1/models", None, shape=answers.MODELS, **limits)["data"]
            name = self._find_model(url, served)
            body = {"model": name, "prompt": self.probe, "add_special_tokens": False}
            its_ids = call(self.client, url, "/tokenize", body, shape=answers.TOKENS, **limits)["tokens"]
            if its_ids != (ids := self.side.tokenizer(self.probe, add_special_tokens=False)["input_ids"]):
                at = next((i for i, (a, b) in enumerate(zip(its_ids, ids)) if a != b), min(len(its_ids), len(ids)))
                raise BadInput(
                    f"{url}: serves {show(name)} with another vocabulary than {self.ref.path}: in a probe text token {at} is "
                    f"{its_ids[at : at + 1] or 'missing'} there, {ids[at : at + 1] or 'missing'} here; "
                    "serve the recipe's model there"
                )
            self.names[url] = name
            logger.info("%s serves %s", url, show(name))

    @property
    def probe(self) -> str:
        """A text that two tokenizers encode differently: difficult passages, and tokens from the whole vocabulary."""
        texts = [token.decode(errors="replace") for token in self.side.beta.values if token]
        tokens = [text for text in texts if "\ufffd" not in text]
        return "\n".join([PROBE, *tokens[:: -(-len(tokens) // PROBE_TOKENS)]])

    def _find_model(self, url: str, models: list[answers.Model]) -> str:
        """The served name of the recipe's model: the same name or path, or one with the same end."""
        for same in (str, _end_of):
            for model in models:
                if same(self.ref.path) in {same(model["id"]), same(model.get("root") or model["id"])}:
                    name: str = model["id"]
                    return name
        names = ", ".join(show(model["id"]) for model in models) or "no model"
        raise BadInput(
            f"{url}: serves {names}, not {self.ref.path}; serve that model there (--served-model-name {self.ref.path}), "
            "or name the served model in the recipe"
        )

    def _check_draws(self, prompt: list[int]) -> None:
        """Refuse a server that returns the model's log-probs for samples from a changed distribution.

        With top_k = 1 every token has log-prob 0 under the distribution drawn from, and another one under the model.
        """
        most = 8
        one_id = {
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
            "seed": 0,
            "max_tokens": most,
            "ignore_eos": True,
            "logprobs": 0,
        }
        for url in set(self.urls) - self.drawn:
            (choice,) = self._complete(url, [prompt], one_id)
            with _refuse_wrong(url):
                drawn = answers.read_completion(choice, most=most, size=self.rows)
            if any(drawn.logprobs):
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

    def _complete(self, url: str, prompts: list[list[int]], options: dict[str, Any]) -> list[answers.Choice]:
        """One choice per prompt. Every option that a server's defaults could change is sent."""
        fixed = {"max_tokens": 1, "temperature": 0, "repetition_penalty": 1.0, "min_p": 0.0, "return_token_ids": True}
        body: dict[str, Any] = {"model": self.names[url], "prompt": prompts, **fixed, **options}
        numbers = sum(map(len, prompts)) * (2 + options.get("prompt_logprobs", 0))
        numbers += len(prompts) * body["max_tokens"] * (2 + options.get("logprobs", 0))
        answer = call(self.client, url, "/v1/completions", body, shape=answers.CHOICES, room=ENTRY_BYTES * numbers)
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if [choice.get("prompt_token_ids") for choice in choices] != prompts:
            raise BadInput(f"{url}: answers for other tokens than those of the request; it needs vLLM 0.30 or later")
        return choices


@contextmanager
def _refuse_wrong(url: str) -> Iterator[None]:
    try:
        yield
    except answers.Wrong as error:
        raise BadInput(f"{url}: its answer to /v1/completions has {error}; {OTHER}") from None


def _end_of(name: str) -> str:
    """The last name of a path or hub id; for a run's checkpoint (`RUN/round=0003/student`) the last three names."""
    parts = name.rstrip("/").split("/")
    return "/".join(parts[-3:] if parts[-2:-1] and parts[-2].startswith("round=") else parts[-1:])


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

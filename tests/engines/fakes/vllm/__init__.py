"""What the child script uses of vLLM, over a toy model of random bigrams: no torch, starts in a moment.

A file `fault` in the model's folder breaks it: `start`, `memory` (an exception in a request), `killed`, `slow`.
Once the file exists that FAKE_VLLM_UNTIL names, every request kills it.
"""

import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np


def bigrams(rows: int) -> np.ndarray:
    """Log-probs `[rows, rows]` of the next id after each id; the last few ids are the likeliest."""
    logits = np.random.default_rng(0).normal(size=(rows, rows)) * 2
    logits[:, -4:] += 3
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


class SamplingParams(SimpleNamespace):
    pass


class LLM:
    def __init__(self, model, **options):
        assert options["dtype"] == "float32", options
        assert options["logprobs_mode"] == "processed_logprobs", options
        self.folder = Path(model)
        self.law = bigrams(json.loads((self.folder / "config.json").read_text())["vocab_size"])
        print("vLLM prints on standard output")
        if self.fault() == "start":
            raise RuntimeError("no room for the model")

    def fault(self):
        path = self.folder / "fault"
        if os.path.exists(os.environ.get("FAKE_VLLM_UNTIL", "")):
            return "killed"
        return path.read_text() if path.exists() else ""

    def generate(self, prompts, params, use_tqdm):
        if self.fault() == "memory":
            raise RuntimeError("out of memory in the middle of a shard")
        if self.fault() == "slow":
            time.sleep(60)
        if self.fault() == "killed":
            print("the last words before the kill", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        params = params if isinstance(params, list) else [params] * len(prompts)
        return [self.one(prompt["prompt_token_ids"], each) for prompt, each in zip(prompts, params, strict=True)]

    def one(self, prompt, params):
        if len(prompt) > 60:
            raise ValueError(f"the prompt of {len(prompt)} tokens is longer than the context of 60")
        output = SimpleNamespace(prompt_logprobs=None, outputs=[SimpleNamespace(token_ids=(), logprobs=None)])
        if (k := getattr(params, "prompt_logprobs", None)) is not None:
            assert params.flat_logprobs
            flat = SimpleNamespace(token_ids=[], logprobs=[])
            for before, actual in itertools.pairwise(prompt):
                ids = [actual, *np.argsort(-self.law[before])[:k].tolist()]
                flat.token_ids += ids
                flat.logprobs += self.law[before][ids].tolist()
            output.prompt_logprobs = flat
        elif asked := getattr(params, "logprob_token_ids", None):
            row = self.law[prompt[-1]]
            output.outputs[0].logprobs = [{i: SimpleNamespace(logprob=float(row[i])) for i in asked}]
        else:
            output.outputs[0] = self.sampled(prompt, params)
        return output

    def sampled(self, prompt, params):
        rng, ids, logprobs = np.random.default_rng(params.seed), [], []
        while len(ids) < params.max_tokens and not (ids and ids[-1] in params.stop_token_ids):
            logits = self.law[(prompt + ids)[-1]].copy()
            for i, bias in (params.logit_bias or {}).items():
                logits[i] += bias
            logits /= params.temperature or 1
            p = np.exp(logits) / np.exp(logits).sum()
            ids.append(int(rng.choice(len(p), p=p)) if params.temperature else int(p.argmax()))
            logprobs.append(float(np.log(p[ids[-1]])))
        return SimpleNamespace(token_ids=tuple(ids), logprobs=SimpleNamespace(logprobs=logprobs))

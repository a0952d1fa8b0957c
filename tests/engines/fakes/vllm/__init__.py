"""What the child script uses of vLLM, over a toy model that looks at one token: no torch, starts in a moment.

It samples from random bigrams and reads random states; other weights in the folder give others. Where FAKE_VLLM_LOG names a
file, a line there says what it did: `start`, `renew`, `sleep` or `wake`, what for, and the model's folder.

A file `fault` in the model's folder breaks it: `start`, `memory` (an exception in a request), `killed`, `slow`.
Once the file exists that FAKE_VLLM_UNTIL names, every request kills it.
"""

import json
import os
import signal
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np


def chance(folder: Path) -> np.random.Generator:
    """Numbers of this model's own."""
    return np.random.default_rng(zlib.crc32((folder / "model.safetensors").read_bytes()))


def sizes(folder: Path) -> tuple[int, int]:
    config = json.loads((folder / "config.json").read_text())
    return config["vocab_size"], config["hidden_size"]


def bigrams(folder: Path) -> np.ndarray:
    """Log-probs `[rows, rows]` of the next id after each id; the last few ids are the likeliest."""
    rows, _ = sizes(folder)
    logits = chance(folder).normal(size=(rows, rows)) * 2
    logits[:, -4:] += 3
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def states(folder: Path) -> np.ndarray:
    """Hidden states `[rows, width]` behind each id."""
    return 20 * chance(folder).normal(size=sizes(folder)).astype(np.float32)


class SamplingParams(SimpleNamespace):
    pass


class PoolingParams(SimpleNamespace):
    pass


class Tensor:
    """What is used of torch's."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, part):
        return Tensor(self.values[part])

    def float(self):
        return self

    def numpy(self):
        return self.values


class LLM:
    def __init__(self, model, **options):
        assert options["dtype"] == "float32", options
        self.work = options.get("runner", "generate")
        if self.work == "generate":
            assert options["logprobs_mode"] == "processed_logprobs", options
        else:
            assert (options["convert"], options["enable_prefix_caching"]) == ("embed", False), options
            assert vars(options["pooler_config"]) == {"task": "token_embed", "use_activation": False}, options
        self.read(model)
        self.log("start")
        print("vLLM prints on standard output")
        if self.fault() == "start":
            raise RuntimeError("no room for the model")

    def read(self, model):
        self.folder, self.stale = Path(model), False
        self.law, self.states = bigrams(self.folder), states(self.folder)

    def log(self, what):
        if path := os.environ.get("FAKE_VLLM_LOG"):
            with open(path, "a") as file:
                print(what, self.work, self.folder, file=file)

    def collective_rpc(self, name, kwargs):
        assert name == "reload_weights"
        self.read(kwargs["weights_path"])
        self.stale = True
        self.log("renew")

    def reset_prefix_cache(self):
        self.stale = False

    def sleep(self, level):
        self.log("sleep")

    def wake_up(self):
        self.log("wake")

    def fault(self):
        path = self.folder / "fault"
        if os.path.exists(os.environ.get("FAKE_VLLM_UNTIL", "")):
            return "killed"
        return path.read_text() if path.exists() else ""

    def generate(self, prompts, params, use_tqdm):
        assert self.work == "generate"
        self.begin(prompts)
        outputs = [self.sampled(p["prompt_token_ids"], each) for p, each in zip(prompts, params, strict=True)]
        return [SimpleNamespace(outputs=[output]) for output in outputs]

    def encode(self, prompts, params, pooling_task, use_tqdm):
        assert (self.work, pooling_task, params.use_activation) == ("pooling", "token_embed", False)
        self.begin(prompts)
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        return [SimpleNamespace(prompt_token_ids=p, outputs=SimpleNamespace(data=Tensor(self.states[p]))) for p in ids]

    def begin(self, prompts):
        assert not self.stale, "the cache is that of other weights"
        if self.fault() == "memory":
            raise RuntimeError("out of memory in the middle of a shard")
        if self.fault() == "slow":
            time.sleep(60)
        if self.fault() == "killed":
            print("the last words before the kill", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if (longest := max(len(prompt["prompt_token_ids"]) for prompt in prompts)) > 60:
            raise ValueError(f"the prompt of {longest} tokens is longer than the context of 60")

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

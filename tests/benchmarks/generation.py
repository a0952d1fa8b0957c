"""Generation beside transformers' own sampling loop on the same batch: `python tests/benchmarks/generation.py`.

Ratios are seconds over those of `model.generate(do_sample=True)`, which has no seed per row. No row ends before its last token.
Runs alternate, and the least of each counts. `head` is a model of one small layer with a head of 151,936 or 262,144 ids;
`smollm2` is SmolLM2-135M. Runs on an accelerator where there is one.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

CHECKOUT = Path(__file__).parents[2]
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "tests")]

import fetch  # noqa: E402

from tasks.engines.base import Sampling  # noqa: E402
from tasks.engines.transformers import TransformersEngine  # noqa: E402
from tasks.models.reference import ModelRef  # noqa: E402
from tasks.models.text import tokenizer_of  # noqa: E402

HEADS = {"head": "qwen3", "head262k": "gemma3"}


def folder_of(name: str, scratch: Path) -> Path:
    """The folder of a model to generate with. A name with a slash is one."""
    if "/" in name:
        return Path(name)
    if name not in HEADS:
        return fetch.MODELS / name
    side = tokenizer_of(str(fetch.MODELS / HEADS[name]))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(side.beta.values), hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, bos_token_id=None, eos_token_id=side.stop_ids[0],
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(scratch / name)
    side.tokenizer.save_pretrained(scratch / name)
    return scratch / name


def seconds(device: torch.device, work: Callable[..., object], *given: object) -> float:
    """On the CPU that of all threads: what else the machine does hardly counts."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    started = clock()
    work(*given)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return clock() - started


def theirs(model: PreTrainedModel, prompts: list[list[int]], pad: int, sampling: Sampling) -> None:
    """transformers' loop, prompts padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p,
        top_k=sampling.top_k, pad_token_id=pad, eos_token_id=None,
    )  # fmt: skip
    with torch.inference_mode():
        model.generate(ids, attention_mask=mask, generation_config=config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="*", default=["smollm2", *HEADS])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt, all of them different")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if not all("/" in name for name in given.models):
        fetch.main(["tokenizers", "smollm2"])
    cases = {
        "plain": (0, Sampling(given.tokens)),
        "padded prompts": (8, Sampling(given.tokens)),
        "top_k = 50": (0, Sampling(given.tokens, top_k=50)),
    }
    title = f"{given.rows} rows, {given.tokens} tokens, {given.threads} threads"
    table = Table("model", "case", "tokens per second", "times transformers'", title=title)
    with tempfile.TemporaryDirectory() as scratch:
        for name in given.models:
            engine = TransformersEngine(ModelRef(str(folder_of(name, Path(scratch))), name, dtype=given.dtype), given.rows)
            pad, stops = engine.side.pad_id, engine.side.stop_ids
            engine.side.stop_ids = [-1]  # no row ends, as in the loop beside
            for case, (shorter, sampling) in cases.items():
                draw = torch.Generator().manual_seed(0)
                lengths = [given.prompt - shorter * (i % 2) for i in range(given.rows)]
                prompts = [torch.randint(100, 40_000, (length,), generator=draw).tolist() for length in lengths]
                seeds, times = list(range(given.rows)), {"ours": [], "theirs": []}
                for repeat in range(given.repeats + 1):
                    took = seconds(engine.device, engine.generate, prompts, seeds, sampling)
                    other = seconds(engine.device, theirs, engine.model, prompts, pad, sampling)
                    if repeat:  # the first warms up
                        times["ours"].append(took)
                        times["theirs"].append(other)
                ours, other = min(times["ours"]), min(times["theirs"])
                table.add_row(name, case, f"{given.rows * given.tokens / ours:.0f}", f"{ours / other:.2f}")
            engine.side.stop_ids = stops
    Console(width=100).print(table)


if __name__ == "__main__":
    main()

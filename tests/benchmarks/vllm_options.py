"""What seeds per request and a bias on padded ids cost vLLM: `.venv-vllm/bin/python tests/benchmarks/vllm_options.py MODEL`.

Tokens a second of one batch, the best of three in turn, and ratios to sampling without either. It runs in vLLM's own
environment, on a GPU or the CPU.
"""

import argparse
import os
import time
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")


def main(model: str, rows: int, tokens: int) -> None:
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    llm = LLM(
        model=model,
        dtype="float32" if current_platform.is_cpu() else "bfloat16",
        skip_tokenizer_init=True,
        logprobs_mode="processed_logprobs",
        max_model_len=1024,
        enforce_eager=current_platform.is_cpu(),
        max_num_seqs=rows,
        disable_log_stats=True,
    )
    size = llm.model_config.get_vocab_size()
    bias = dict.fromkeys(range(size - 64, size), -100.0)
    prompts: Any = [{"prompt_token_ids": [100 + (row * 7 + t) % 1000 for t in range(16)]} for row in range(rows)]
    shared: dict[str, Any] = {
        "max_tokens": tokens,
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
        "flat_logprobs": True,
    }
    ways = {
        "neither": [SamplingParams(**shared)] * rows,
        "seeds": [SamplingParams(**shared, seed=row) for row in range(rows)],
        "bias of 64 ids": [SamplingParams(**shared, logit_bias=bias)] * rows,
        "both": [SamplingParams(**shared, seed=row, logit_bias=bias) for row in range(rows)],
    }
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(3):
        for name, params in ways.items():
            started = time.monotonic()
            llm.generate(prompts, params, use_tqdm=False)
            best[name] = min(best[name], time.monotonic() - started)
    for name, seconds in best.items():
        print(f"{name:16} {rows * tokens / seconds:10.1f} tokens/s, ratio {best['neither'] / seconds:.2f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    main(**vars(parser.parse_args()))

"""Generation and scoring with SmolLM2, transformers against vLLM in a process beside: `python tests/benchmarks/engines.py`.

Both use the cores that they find. Needs `make vllm`. Ratios are tokens a second over transformers'.
"""

import argparse
import sys
import time
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "tests")]

import fetch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from tasks.engines.base import Sampling  # noqa: E402
from tasks.engines.choose import get_engine, release  # noqa: E402
from tasks.models.reference import ModelRef  # noqa: E402
from tasks.models.text import side  # noqa: E402
from tasks.signals import make_signal  # noqa: E402

TOPICS = ("the tides", "a lost key", "bread", "prime numbers", "bees", "a haiku", "the moon", "fractions")


def main(samples: int, tokens: int, python: str, model: str) -> None:
    if "/" not in model:
        fetch.main([model])
    folder = model if "/" in model else str(fetch.MODELS / model)
    refs = {
        "transformers": ModelRef(folder, model),
        "vllm": ModelRef(folder, model, engine="vllm", vllm_python=python),
    }
    render = side(refs["transformers"]).render
    prompts = [render([{"role": "user", "content": f"Write about {topic}."}]) for topic in TOPICS for _ in range(samples)]
    seeds = list(range(len(prompts)))
    rates: dict[str, dict[str, float]] = {}
    completions: list[list[int]] = []
    for name, ref in refs.items():
        started = time.monotonic()
        loaded = get_engine(ref)
        first = loaded.generate(prompts[:2], seeds[:2], Sampling(2))
        loaded.score(prompts[:2], [c.ids for c in first], make_signal(k=64))
        rates[name] = {"seconds to start": time.monotonic() - started}
        started = time.monotonic()
        made = loaded.generate(prompts, seeds, Sampling(tokens))
        rates[name]["generate"] = sum(len(c.ids) for c in made) / (time.monotonic() - started)
        completions = completions or [c.ids for c in made]
        total = sum(map(len, completions))
        for label, signal in (("score, k = 64", make_signal(k=64)), ("score, sampled", make_signal("sampled"))):
            started = time.monotonic()
            loaded.score(prompts, completions, signal)
            rates[name][label] = total / (time.monotonic() - started)
        release()
    table = Table("tokens a second", *refs, "vllm / transformers")
    for what in rates["vllm"]:
        ours, theirs = (rates[name][what] for name in refs)
        table.add_row(what, f"{ours:.1f}", f"{theirs:.1f}", f"{theirs / ours:.2f}")
    Console(width=100).print(f"{len(prompts)} completions of at most {tokens} tokens; {total} tokens scored", table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=8, help="completions of each of 8 prompts")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--python", default=str(CHECKOUT / ".venv-vllm" / "bin" / "python"))
    parser.add_argument("--model", default="smollm2", help="or a folder")
    main(**vars(parser.parse_args()))

"""What scores cost beside the forward pass, head and log-softmax that they need: `python tests/benchmarks/scoring.py`.

Ratios are tokens per second over those of that bare pass, on the same tokens: 1 is as fast. Runs alternate, and the least of
each counts. Models are those of generation.py. Runs on an accelerator where there is one.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from generation import HEADS, fetch, folder_of, seconds
from rich.console import Console
from rich.table import Table

from tasks.engines.transformers import TransformersEngine
from tasks.models.reference import ModelRef
from tasks.models.weights import hidden_states, logits_of
from tasks.signals import make_signal

SIGNALS = {
    "sampled": make_signal("sampled"),
    "topk, k = 64": make_signal("topk", 64),
    "topk, k = 64, top_p = 0.99": make_signal("topk", 64, 0.99),
    "bytes, k = 64, top_p = 0.9985": make_signal("bytes", 64, 0.9985),
    "hidden": make_signal("hidden"),
}


@torch.inference_mode()
def bare(engine: TransformersEngine, ids: torch.Tensor, chunk: int) -> None:
    """The last hidden states of `ids` `[rows, time]`, and log-probs of `chunk` positions at a time."""
    for hidden in hidden_states(engine.model, ids).flatten(0, 1).split(chunk):
        logits_of(engine.model, hidden, engine.size).log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="*", default=["smollm2", *HEADS])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a completion")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if not all("/" in name for name in given.models):
        fetch.main(["tokenizers", "smollm2"])
    title = f"{given.rows} rows, {given.tokens} tokens, {given.threads} threads"
    table = Table("model", "signal", "tokens per second", "of the bare pass's", title=title)
    with tempfile.TemporaryDirectory() as scratch:
        for name in given.models:
            engine = TransformersEngine(ModelRef(str(folder_of(name, Path(scratch))), name, dtype=given.dtype))
            draw = torch.Generator().manual_seed(0)
            ids = torch.randint(100, 40_000, (given.rows, given.tokens + 1), generator=draw)
            prompts, completions = ids[:, :1].tolist(), ids[:, 1:].tolist()
            there = ids.to(engine.device)
            times: dict[str, list[float]] = {"": [], **{label: [] for label in SIGNALS}}
            for repeat in range(given.repeats + 1):
                for label, measured in times.items():
                    work = (bare, engine, there, 1024) if not label else (engine.score, prompts, completions, SIGNALS[label])
                    took = seconds(engine.device, *work)
                    if repeat:  # the first warms up
                        measured.append(took)
            for label in SIGNALS:
                least = min(times[label])
                table.add_row(name, label, f"{ids.numel() / least:.0f}", f"{min(times['']) / least:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()

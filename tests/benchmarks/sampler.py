"""What drawing a token costs beside torch.multinomial and log-softmax: `python tests/benchmarks/sampler.py`.

Milliseconds for logits `[rows, vocabulary]`, on an accelerator where there is one.
"""

import argparse
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from tasks.engines.base import Sampling
from tasks.engines.sampling import Sampler

DEVICE = torch.accelerator.current_accelerator() or torch.device("cpu")


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """The mean of some, behind three that warm up."""
    for _ in range(3):
        work()
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()
    return (time.perf_counter() - started) / repeats * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--repeats", type=int, default=20)
    given = parser.parse_args()
    logits = torch.randn(given.rows, given.vocabulary, device=DEVICE) * 3
    sampler, mass = Sampler(range(given.rows), Sampling(1), DEVICE), logits.softmax(-1)
    cases: dict[str, Callable[[], object]] = {
        "the seeded sampler": lambda: sampler.draw(logits.clone(), 0),
        "a copy of the logits, which is in it": logits.clone,
        "torch.multinomial": lambda: torch.multinomial(mass, 1),
        "log-softmax": lambda: logits.log_softmax(-1),
    }
    table = Table(f"[{given.rows}, {given.vocabulary:,}] on {DEVICE.type}", "ms")
    for name, work in cases.items():
        table.add_row(name, f"{milliseconds(work, given.repeats):.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()

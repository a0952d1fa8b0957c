"""A round of ours beside the same round through TRL's GOLD trainer (`round.py --versus trl`, `make versus`)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import torch
from rich.table import Table

from storage.read import scan

CHECKOUT = Path(__file__).parents[2]
PYTHON = CHECKOUT / ".venv-trl/bin/python"


def check() -> None:
    """End where TRL's environment is missing."""
    if not PYTHON.exists():
        sys.exit(f"{PYTHON}: there is no such Python; `make versus` makes TRL's environment")


def peak() -> float:
    """MiB at most of this process, or of the GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def prompts_of(run: str, number: int) -> list[str]:
    """The texts of a round's prompts."""
    asked = scan(run, "rollouts").filter(pl.col("round") == number).select("prompt_id").collect()
    prompts = scan(run, "prompts").select("prompt_id", "messages").collect()
    return [messages[-1]["content"] for messages in asked.join(prompts, on="prompt_id", how="left")["messages"].to_list()]


def through_trl(prompts: list[str], given: Any, learning_rate: float, micro: int) -> dict[str, float]:
    """The same round there, in a process of its own."""
    task = {
        "student": str(Path(given.student).resolve()),
        "teacher": str(Path(given.teacher).resolve()),
        "prompts": prompts,
        "tokens": given.tokens,
        "batch": given.batch,
        "micro": micro,
        "learning_rate": learning_rate,
        "threads": torch.get_num_threads(),
        "cpu_time": given.cpu_time,
    }
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = Path(__file__).with_name("trl_round.py")
    ended = subprocess.run(
        [PYTHON, script], input=json.dumps(task), stdout=subprocess.PIPE, text=True, env=environment, check=True
    )
    found: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return found


def table_of(ours: dict[str, float], theirs: dict[str, float]) -> Table:
    """Both side by side, and how many times theirs is ours."""
    for side in (ours, theirs):
        side["rate"] = side["tokens"] / side["seconds"]
    table = Table("a round: sampling, scoring, training, saving", "Potstill", "TRL's GOLD", "times ours")
    lines = (("seconds", ".1f"), ("tokens", ".0f"), ("steps", ".0f"), ("rate", ".1f"), ("peak_mib", ".0f"))
    words = {"tokens": "sampled tokens", "rate": "sampled tokens per second", "peak_mib": "MiB at most"}
    for name, form in lines:
        ratio = f"{theirs[name] / ours[name]:.2f}" if name in ("seconds", "rate", "peak_mib") else ""
        table.add_row(words.get(name, name), f"{ours[name]:{form}}", f"{theirs[name]:{form}}", ratio)
    return table

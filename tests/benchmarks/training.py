"""Training beside a plain loop in PyTorch: `python tests/benchmarks/training.py`, on a CPU or a GPU.

Tokens per second of the Trainer's steps over those of a loop by hand on the same rows: the same model, cross-entropy over
chunks of positions that are computed again in the backward pass, clipping, fused AdamW. The loop takes rows in the order given,
as many at a time as the Trainer does by rows. The least of some steps counts, on a CPU in seconds of all threads. Tokens are
counted without padding. `even` rows have one length, `ragged` ones between an eighth and all of it.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

CHECKOUT = Path(__file__).parents[2]
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "tests")]

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
from generation import fetch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from configs.load import validate_recipe  # noqa: E402
from storage.schemas import ALIGNED, ROLLOUTS  # noqa: E402
from tasks.models.reference import ModelRef, make_reference  # noqa: E402
from tasks.models.text import side  # noqa: E402
from tasks.models.weights import hidden_states, logits_of  # noqa: E402
from tasks.tokens.ragged import offsets_of, ragged  # noqa: E402
from tasks.training.precision import fast_products, make_optimizer  # noqa: E402
from tasks.training.student import load_for_training  # noqa: E402
from tasks.training.trainer import Trainer  # noqa: E402

PROMPT = 16
CHUNK = 256


def rows_of(lengths: np.ndarray, size: int) -> pa.Table:
    """Rows with a term of cross-entropy for each token behind the prompt, as training reads them."""
    draw = np.random.default_rng(0)
    kept = lengths - PROMPT
    offsets = offsets_of(kept)
    ids, place = draw.integers(100, size, offsets[-1]), np.concatenate([np.arange(n) for n in kept])
    columns = {
        "prompt_token_ids": pa.array(draw.integers(100, size, (len(lengths), PROMPT)).tolist(), pa.list_(pa.int32())),
        "token_ids": ragged(ids, offsets, pa.int32()),
        "status": pa.array(["ok"] * len(lengths)),
        "units": pa.array(kept, pa.int32()),
        "term_starts": ragged(place, offsets, pa.int32()),
        "term_ends": ragged(place + 1, offsets, pa.int32()),
        "target_counts": ragged(np.ones(len(ids), np.int64), offsets, pa.int32()),
        "target_ids": ragged(ids, offsets, pa.int32()),
        "target_logprobs": ragged(np.zeros(len(ids)), offsets, pa.float32()),
        "target_rest": ragged(np.full(len(ids), -np.inf), offsets, pa.float32()),
    }
    for name in ("term_inside", "term_behaviour", "unmatched_counts", "unmatched_logprobs"):
        columns[name] = pa.nulls(len(lengths), ALIGNED.field(name).type)
    assert ROLLOUTS.field("token_ids").type == columns["token_ids"].type
    return pa.table(columns)


def by_hand(ref: ModelRef, table: pa.Table, micro: int, half: bool) -> Iterator[None]:
    """A step of the plain loop each time it is asked for another one. With `half`, weights are in bfloat16, AdamW's too."""
    config = validate_recipe(recipe_of(ref, {}), "plain").train
    model = load_for_training(ref, False).to(torch.bfloat16 if half else torch.float32)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer, size, pad = make_optimizer(model.parameters(), config), len(side(ref).beta.values), side(ref).pad_id
    rows = [a + b for a, b in zip(table["prompt_token_ids"].to_pylist(), table["token_ids"].to_pylist(), strict=True)]
    terms = sum(len(row) - PROMPT for row in rows)

    def loss_of(hidden: torch.Tensor, actual: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits_of(model, hidden, size), actual, reduction="sum")

    while True:
        for start in range(0, len(rows), micro):
            some = rows[start : start + micro]
            width = max(map(len, some))
            ids = torch.tensor([row + [pad] * (width - len(row)) for row in some], device=model.device)
            real = torch.tensor([[PROMPT <= t < len(row) for t in range(width)] for row in some], device=model.device)
            autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda" and not half)
            with autocast:
                hidden, actual = hidden_states(model, ids)[:, :-1][real[:, 1:]], ids[real]
                parts = zip(hidden.split(CHUNK), actual.split(CHUNK), strict=True)
                loss = torch.stack([checkpoint(loss_of, *part, use_reentrant=False) for part in parts]).sum() / terms
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield


def recipe_of(ref: ModelRef, train: dict) -> dict:
    return {
        "name": "training",
        "student": {"model": ref.path},
        "prompts": {"source": "reasoning-gym", "task": "spell_backward"},
        "rollout": {"on_policy": 0.0},
        "objective": {"name": "sft"},
        "train": {"chunk_positions": CHUNK, "batch_size": 2**20, **train},
    }


def ours(ref: ModelRef, table: pa.Table, train: dict) -> Callable[[], None]:
    """A step of the Trainer."""
    trainer = Trainer(validate_recipe(recipe_of(ref, train), "training"), 1, student=ref)

    def step() -> None:
        with fast_products(trainer.accelerator.device.type == "cuda"):
            trainer._look(trainer._optimize(trainer._make_step(table, 0)))

    return step


def seconds(work: Callable[[], object]) -> float:
    """On the CPU that of all threads: what else the machine does hardly counts."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    started = clock()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--student", default="models/smollm2")
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of the longest row")
    parser.add_argument("--micro", type=int, default=4, help="rows of a forward pass, and as many of the longest in tokens")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.student.startswith("models/"):
        fetch.main(["smollm2"])
    config = validate_recipe(recipe_of(ModelRef(str(Path(given.student).resolve()), ""), {}), "student").student
    ref = replace(make_reference(config, str(config.model)), moves="")
    by_rows, by_tokens = {"micro_batch_size": given.micro}, {"micro_batch_tokens": given.micro * given.length}
    cases = {
        "by rows": by_rows,
        "by tokens": by_tokens,
        "by tokens, bfloat16 with masters": {**by_tokens, "param_dtype": "bfloat16"},
    }
    draw = np.random.default_rng(1)
    shapes = {
        "even": np.full(given.rows, given.length),
        "ragged": np.maximum(draw.integers(given.length // 8, given.length + 1, given.rows), PROMPT + 1),
    }
    kind = "float32 weights, autocast" if torch.cuda.is_available() else "float32"
    title = (
        f"{given.rows} rows of at most {given.length} tokens, {given.threads} threads; the loop: {given.micro} rows at a time"
    )
    table = Table("rows", "training", "tokens per second", "times the loop's, in " + kind, "in bfloat16 alone", title=title)
    for shape, lengths in shapes.items():
        rows = rows_of(lengths, len(side(ref).beta.values))
        times: dict[str, list[float]] = {}
        for name, train in {"loop": None, "loop, bfloat16": None, **cases}.items():
            loop = by_hand(ref, rows, given.micro, "bfloat16" in name)
            step = ours(ref, rows, train) if train is not None else (lambda loop=loop: next(loop))
            times[name] = [seconds(step) for _ in range(given.repeats + 1)][1:]  # the first warms up
            del loop, step
        for name in cases:
            took = min(times[name])
            ratios = (f"{min(times[loop]) / took:.2f}" for loop in ("loop", "loop, bfloat16"))
            table.add_row(shape, name, f"{lengths.sum() / took:.0f}", *ratios)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()

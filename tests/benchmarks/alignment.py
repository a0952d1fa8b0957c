"""Alignment's time beside the teacher tokenizer's own `encode_batch` of the same texts: `python tests/benchmarks/alignment.py`.

`units` is all that alignment needs: the teacher's ids, checked byte for byte, and the units of both sides. `stage` is the
whole align stage for the objective `alm`: byte accounts, log-probs of units, targets, and whether the student's ids are
canonical, which takes an `encode_batch` of the student's tokenizer. One thread; medians of interleaved runs.
"""

import os
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

os.environ["TOKENIZERS_PARALLELISM"] = "false"
CHECKOUT = Path(__file__).parents[2]
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "tests")]

import fetch  # noqa: E402
import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from configs.objectives import Alm  # noqa: E402
from configs.score import Score  # noqa: E402
from storage.schemas import ROLLOUTS, SCORES  # noqa: E402
from tasks import objectives  # noqa: E402
from tasks.align import align_rollouts  # noqa: E402
from tasks.models.pair import teacher_ids  # noqa: E402
from tasks.models.text import (  # noqa: E402
    Side,
    tokenizer_of,
)
from tasks.signals import make_signal  # noqa: E402
from tasks.tokens.align import align  # noqa: E402
from tasks.tokens.markers import NO_MARKERS  # noqa: E402
from tasks.tokens.ragged import flat  # noqa: E402

PAIRS = [
    ("llama3", "qwen3"),
    ("gemma3", "qwen3"),
    ("llama3", "gemma3"),
    ("qwen3", "llama2"),
    ("llama2", "gptoss"),
    ("gptoss", "deepseek_v3"),
]
PIECES, LENGTH, REPEATS = 1500, 800, 5


def main() -> None:
    fetch.main(["tokenizers"])
    texts = pieces()
    table = Table(
        "student → teacher",
        "encode_batch, s",
        "units, s",
        "× encode_batch",
        "stage, s",
        "× both encode_batch",
        "M tokens a second",
    )
    for names in PAIRS:
        own, other = (tokenizer_of(str(fetch.MODELS / name)) for name in names)
        steps = measured(texts, own, other)
        times = {name: [] for name in steps}
        for _ in range(REPEATS):
            for name, step in steps.items():
                started = time.perf_counter()
                tokens = step()
                times[name].append(time.perf_counter() - started)
        encode, own_encode, units, stage = (median(times[name]) for name in ("teacher", "student", "units", "stage"))
        cells = [
            f"{encode:.2f}",
            f"{units:.2f}",
            f"{units / encode:.2f}",
            f"{stage:.2f}",
            f"{stage / (encode + own_encode):.2f}",
        ]
        table.add_row(" → ".join(names), *cells, f"{tokens / units / 1e6:.2f}")
    Console(width=140).print(f"{len(texts)} texts, {sum(len(text.encode()) for text in texts) / 1e6:.1f} MB", table)


def measured(texts: list[str], own: Side, other: Side) -> dict[str, Callable[[], int]]:
    """The steps to be timed; each returns the tokens of both sides that it went through."""
    ids = own.encoder.encode(texts)
    rows = [
        {"rollout_id": str(i), "token_ids": row, "text": text, "finish_reason": "length"}
        for i, (row, text) in enumerate(zip(ids, texts, strict=True))
        if row and other.encoder.encode([text])[0]
    ]
    kept = [row["text"] for row in rows]
    rollouts = pa.Table.from_pylist(rows, ROLLOUTS)
    module = objectives.build(Alm(name="alm"), student=own.vocabulary, teacher=other.vocabulary)

    def encode(side: Side) -> int:
        return sum(map(len, side.tokenizer.backend_tokenizer.encode_batch(kept, add_special_tokens=False)))

    def units() -> int:
        z = pa.chunked_array(
            [pa.array(teacher_ids(rows, student=own, teacher=other, markers=NO_MARKERS), pa.list_(pa.int32()))]
        )
        y_ids, y_offsets = flat(rollouts["token_ids"])
        z_ids, z_offsets = flat(z)
        lengths = own.vocabulary.lengths[y_ids], other.vocabulary.lengths[z_ids]
        align(lengths[0], y_offsets, lengths[1], z_offsets, np.zeros(len(rows), bool))
        return len(y_ids) + len(z_ids)

    def stage() -> int:
        graded = teacher_ids(rows, student=own, teacher=other, markers=NO_MARKERS)
        scores = {
            "rollout_id": rollouts["rollout_id"],
            "token_ids": pa.array(graded, pa.list_(pa.int32())),
            "logprobs": pa.array([np.full(len(row or []), -1.0) for row in graded], pa.list_(pa.float32())),
            "status": pa.array(["ok"] * len(rows)),
        }
        unused = {field.name: pa.nulls(len(rows), field.type) for field in SCORES if field.name not in scores}
        config = Score(signal="sampled")
        align_rollouts(
            rollouts,
            pa.table(scores | unused).select(SCORES.names),
            module,
            make_signal(config.signal, config.k, config.top_p),
            student=own,
            teacher=other,
        )
        return 0

    return {"teacher": lambda: encode(other), "student": lambda: encode(own), "stage": stage, "units": units}


def pieces() -> list[str]:
    """Code and prose of the standard library, in pieces, from as many modules as it takes."""
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        found += [text[start : start + LENGTH] for start in range(0, len(text), LENGTH)]
    return found[:: max(len(found) // PIECES, 1)][:PIECES]


if __name__ == "__main__":
    main()

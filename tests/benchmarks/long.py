"""Peak memory of each stage with prompts and completions of thousands of tokens: `python tests/benchmarks/long.py`.

A whole round of tiny models with real vocabularies (SmolLM2's 49k ids under Qwen 3's 152k), for each signal, at two lengths.
All logits of a completion would show: `[8192, 151669]` in float32 are 5 GB. A stage's peak is what it takes above what is there
before it. Prompts are not all as long, so that they are padded. The student's samples are text and never end.
"""

import argparse
import ctypes
import functools
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[2]
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "tests")]

import torch  # noqa: E402
from loss_step import fetch, resident  # noqa: E402
from prefect.testing.utilities import prefect_test_harness  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from flows import distill as flow  # noqa: E402
from flows.looking import inspect  # noqa: E402
from storage.read import scan  # noqa: E402
from tasks.models.text import Side, tokenizer_of  # noqa: E402
from tasks.views.inspect import open_run  # noqa: E402
from tasks.views.report import write_report  # noqa: E402

STAGES = ("roll_out", "score_shard", "align_shard", "check_round", "train_round", "evaluate_model")
OBJECTIVES = {"bytes": "bytes", "topk": "gold", "hidden": "uld", "sampled": "opd"}
RECIPE = """
name = "{signal}"
root = "{root}/runs"
student = {{ model = "{root}/student", rendering = "plain" }}
teacher = {{ model = "{root}/teacher", rendering = "plain" }}
rollout = {{ prompts = {rows}, max_new_tokens = {length} }}
score = {{ signal = "{signal}", k = 64, top_p = 0.9985 }}
objective = {{ name = "{objective}" }}
train = {{ batch_size = {rows}, micro_batch_size = 1 }}
evaluate = {{ samples = 0, scorer = "exact" }}
gates = {{ lead = -1.0, truncated = 1.0, repetition = 1.0, supervised = 0.0, dropped = 1.0, length = 1000.0 }}
prompts = {{ source = "file", path = "{root}/prompts.jsonl", train = {rows}, eval = 1 }}
"""


def save_model(folder: Path, side: Side, context: int, *, writes_text: bool = False) -> None:
    """A model of one small layer. With `writes_text` it samples letters and spaces alone: what the others' rows of its head
    have in the first feature, which is the same everywhere, leaves them no mass.
    """
    torch.manual_seed(0)
    size = len(side.beta.values)
    config = LlamaConfig(
        vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=context, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=side.stop_ids[0],
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if writes_text:
        text = [i for i, value in enumerate(side.beta.values) if value and value.strip().isalpha() and value.isascii()]
        with torch.no_grad():
            model.model.embed_tokens.weight[:, 0] = 5.0
            model.lm_head.weight[:, 0] = -20.0
            model.lm_head.weight[text, 0] = 0.0
    model.save_pretrained(folder)
    side.tokenizer.save_pretrained(folder)


def peak_of(work: Callable[..., Any], *given: Any, **named: Any) -> tuple[Any, int]:
    """What some work returns, and the most bytes that it took above those that were there before it."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    made = work(*given, **named)
    return made, resident("VmHWM") - before


def measure(length: int, rows: int, root: Path) -> dict[str, dict[str, int]]:
    """MiB of each stage, by signal."""
    student, teacher = (tokenizer_of(str(fetch.MODELS / name)) for name in ("smollm2", "qwen3"))
    save_model(root / "student", student, 4 * length, writes_text=True)
    save_model(root / "teacher", teacher, 8 * length)
    code = "\n".join(path.read_text() for path in sorted((CHECKOUT / "tasks").rglob("*.py")))
    ids = student.encoder.encode([code])[0] or []
    with (root / "prompts.jsonl").open("w") as file:
        for number in range(rows + 1):
            start = 100 * number
            prompt = b"".join(student.beta.values[i] or b"" for i in ids[start : start + length - 64 * number])
            file.write(json.dumps({"prompt": prompt.decode(errors="ignore")}) + "\n")
    found: dict[str, dict[str, int]] = {}
    peaks: dict[str, int] = {}

    def watched(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            made, peak = peak_of(function, *args, **named)
            peaks[name] = max(peaks.get(name, 0), peak)
            return made

        return call

    for stage in STAGES:
        task = getattr(flow, stage)
        task.fn = watched(task.fn, stage)
    with prefect_test_harness(server_startup_timeout=120):
        for signal, objective in OBJECTIVES.items():
            peaks.clear()
            recipe = root / f"{signal}.toml"
            recipe.write_text(RECIPE.format(signal=signal, objective=objective, root=root, rows=rows, length=length))
            watched(flow.distill, "")(str(recipe))
            peaks.pop("")
            run = f"{root}/runs/{signal}"
            rollout = scan(run, "rollouts").select("rollout_id").head(1).collect().item()
            watched(inspect, "inspect")(run, rollout=rollout)
            watched(inspect, "inspect")(run, round=1)
            watched(write_report, "report")(open_run(run))
            if found:  # the first run's rollouts are taken over
                peaks.pop("roll_out")
            found[signal] = {name: peak >> 20 for name, peak in peaks.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--lengths", nargs=2, type=int, default=[2048, 8192], help="tokens of a prompt, and of a completion")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(given.one, given.rows, Path(folder))))
        return
    fetch.main(["tokenizers", "smollm2"])
    found = []
    for length in given.lengths:
        again = [sys.executable, __file__, "--one", str(length), "--rows", str(given.rows)]
        ended = subprocess.run(again, stdout=subprocess.PIPE, text=True, check=True)
        found.append(json.loads(ended.stdout.splitlines()[-1]))
    title = f"MiB above what is there before a stage, {given.rows} rows, prompts and completions of "
    table = Table("stage", *OBJECTIVES, title=title + " → ".join(f"{length:,}" for length in given.lengths) + " tokens")
    for stage in found[0]["bytes"]:
        cells = (" → ".join(str(by_length[signal].get(stage, "")) for by_length in found) for signal in OBJECTIVES)
        table.add_row(stage, *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()

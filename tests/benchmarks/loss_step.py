"""What each objective's loss step costs beside plain cross-entropy: `python tests/benchmarks/loss_step.py`.

One step is the forward and backward pass of the student, its head and the objective over 4 rows of 256 tokens of real
text, with SmolLM2's vocabulary under Qwen 3's. Cross-entropy runs over chunks of as many positions, checkpointed, through
the same head. Steps are interleaved; times are medians; memory is the peak above the model, its gradients and the batch, on a
CPU each in a process of its own (on Linux). `--student head64` is a student that is hardly more than its head. On a GPU weights
are cast to bfloat16 where they are used.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

CHECKOUT = Path(__file__).parents[2]
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "tests")]

import fetch  # noqa: E402

from configs.objectives import Bpm, Bytes, Gkd, Gold, Objective, Opd, Sft, Strict, Uld  # noqa: E402
from storage.schemas import ALIGNED, ROLLOUTS  # noqa: E402
from tasks import objectives  # noqa: E402
from tasks.models.reference import ModelRef  # noqa: E402
from tasks.models.text import Side, tokenizer_of  # noqa: E402
from tasks.models.weights import hidden_states, load_weights, logits_of  # noqa: E402
from tasks.objectives.base import Pairing  # noqa: E402
from tasks.tokens.align import align  # noqa: E402
from tasks.tokens.ragged import offsets_of  # noqa: E402
from tasks.training.batches import MicroBatch, collate  # noqa: E402
from tasks.training.student import Student  # noqa: E402

TEXTS = ("README.md", "LICENSE", "tasks/train.py", "tasks/tokens/vocabulary.py")
TEXTS += ("CHANGELOG.md", "flows/DESIGN.md", "configs/schema.py", "tasks/MATHS.md")
K = 64
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLAIN = "cross-entropy"
OBJECTIVES: dict[str, Objective] = {
    "gkd": Gkd(name="gkd"),
    "gold": Gold(name="gold"),
    "strict": Strict(name="strict"),
    "bytes": Bytes(name="bytes"),
    "bpm": Bpm(name="bpm"),
    "uld": Uld(name="uld"),
    "opd": Opd(name="opd"),
    "sft": Sft(name="sft"),
}


def pairing(student: Side, teacher: Side, count: int, tokens: int) -> Pairing:
    """Texts of `tokens` tokens under both tokenizers, with a made-up teacher: `K` ids a token, the actual one mostly the
    likeliest.
    """
    rng = np.random.default_rng(0)
    rows: list[tuple[list[int], list[int]]] = []
    for name in TEXTS[:count]:
        ids = student.encoder.encode([(CHECKOUT / name).read_text()])[0] or []
        ids = ids[: tokens - 1]
        while not ids or not (text := _text(student.beta.join(ids))):
            ids.pop()  # a code point that is cut
        rows.append((ids, teacher.encoder.encode([text])[0] or []))
    bodies = [[np.array(row[side]) for row in rows] for side in (0, 1)]
    sides = zip(bodies, (student, teacher), strict=True)
    lengths = [a for ids, own in sides for a in (own.vocabulary.lengths[np.concatenate(ids)], offsets_of([*map(len, ids)]))]
    stops = np.ones(len(rows), bool)
    units = align(*lengths, stops)
    s, z = ([np.append(ids, own.stop_ids[0]) for ids in body] for body, own in zip(bodies, (student, teacher), strict=True))
    actual = np.concatenate(z)
    share = np.exp(-rng.exponential(0.7, len(actual)))  # mass of the actual token
    tail = rng.dirichlet(np.full(K, 0.3), len(actual)) * (1 - share[:, None])  # the last is the rest
    gaps = rng.integers(1, teacher.vocabulary.size // K, (len(actual), K - 1))
    others = np.cumsum(gaps, 1) - 1
    others += others >= actual[:, None]
    masses = np.maximum(np.concatenate([share[:, None], tail], 1), 1e-9)
    logprobs = np.log(masses / masses.sum(1, keepdims=True))
    return Pairing(
        student_ids=np.concatenate(s),
        student_offsets=offsets_of([*map(len, s)]),
        teacher_ids=actual,
        teacher_offsets=offsets_of([*map(len, z)]),
        stops=stops,
        teacher_logprobs=logprobs[:, 0],
        top_ids=np.concatenate([actual[:, None], others], 1).ravel(),
        top_logprobs=logprobs[:, :-1].ravel(),
        top_offsets=np.arange(len(actual) + 1) * K,
        rest=logprobs[:, -1],
        units=units,
        behaviour=np.full(len(units.kind), -1.0),
    )


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return ""


def batch_of(objective: objectives.ObjectiveModule, paired: Pairing) -> MicroBatch:
    """The rows as one micro-batch, each behind a prompt of one token."""
    ids = np.split(paired.student_ids, paired.student_offsets[1:-1])
    columns = {
        **objective.project(paired).columns(),
        "prompt_token_ids": pa.array([[0]] * paired.rows, ROLLOUTS.field("prompt_token_ids").type),
        "token_ids": pa.array(ids, ROLLOUTS.field("token_ids").type),
    }
    for name in ("term_inside", "term_behaviour", "unmatched_counts", "unmatched_logprobs"):
        columns.setdefault(name, pa.nulls(paired.rows, ALIGNED.field(name).type))
    return collate(pa.table(columns), 0, DEVICE)


def plain(model: PreTrainedModel, batch: MicroBatch, size: int, chunk: int) -> torch.Tensor:
    """Chunked cross-entropy."""
    hidden = hidden_states(model, batch.ids)[batch.row, batch.time - 1]

    def chunk_loss(part: torch.Tensor, actual: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits_of(model, part, size), actual, reduction="sum")

    parts = zip(hidden.split(chunk), batch.actual.split(chunk), strict=True)
    return torch.stack([checkpoint(chunk_loss, part, actual, use_reentrant=False) for part, actual in parts]).sum()


def student_model(kind: str, path: str, size: int) -> PreTrainedModel:
    if kind != "head64":
        return load_weights(ModelRef(path, ""), torch.float32, DEVICE).train()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).train().to(DEVICE)


def steps(given: argparse.Namespace, names: list[str]) -> dict[str, Callable[[], torch.Tensor]]:
    """A forward pass for each of the names, all of one model."""
    kind, chunk = given.student, given.chunk
    folder = kind if "/" in kind else str(fetch.MODELS / "smollm2")
    student, teacher = tokenizer_of(folder), tokenizer_of(given.teacher)
    size = student.vocabulary.size
    model = student_model(kind, folder, size)
    two, one = (pairing(student, other, given.rows, given.tokens) for other in (teacher, student))
    made: dict[str, Callable[[], torch.Tensor]] = {}
    for name in names:
        alone = name in ("gkd", "sft", PLAIN)
        config = OBJECTIVES.get(name, OBJECTIVES["sft"])
        objective = objectives.build(config, student=student.vocabulary, teacher=(student if alone else teacher).vocabulary)
        batch = batch_of(objective, one if alone else two)
        if name == PLAIN:
            made[name] = partial(plain, model, batch, size, chunk)
        else:
            made[name] = partial(Student(model, [objective], size, chunk).to(DEVICE), batch.ids, batch)
    return made


def seconds(forward: Callable[[], torch.Tensor]) -> float:
    clock = time.process_time if DEVICE.type == "cpu" else time.perf_counter  # of all threads: other work hardly counts
    started = clock()
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
        loss = forward()
    loss.backward()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def resident(field: str) -> int:
    """Bytes by /proc: VmRSS now, VmHWM at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak(forward: Callable[[], torch.Tensor]) -> int:
    """Most bytes in use during a step, above what is there before it (the model, its gradients, the batch)."""
    seconds(forward)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        standing = torch.cuda.memory_allocated()
        seconds(forward)
        return torch.cuda.max_memory_allocated() - standing
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    seconds(forward)
    return resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--student", default="head64", help="head64, smollm2, or a folder")
    parser.add_argument("--teacher", default=str(fetch.MODELS / "qwen3"), help="whose tokenizer it is")
    parser.add_argument("--rows", type=int, default=4, help="at most eight")
    parser.add_argument("--tokens", type=int, default=256, help="of a row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=256, help="positions whose logits exist at once")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", nargs="*", choices=list(OBJECTIVES), default=list(OBJECTIVES))
    parser.add_argument("--times-alone", action="store_true", help="without memory, which takes a process for each")
    parser.add_argument("--peak", choices=[PLAIN, *OBJECTIVES], help="print this one's peak memory in bytes, nothing else")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.peak:
        print(peak(steps(given, [given.peak])[given.peak]))
        return
    if "/" not in given.student:
        fetch.main(["tokenizers", "smollm2"])
    names = [PLAIN, *given.only]
    made = steps(given, names)
    times: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(given.repeats + 1):
        for name, forward in made.items():
            took = seconds(forward)
            if repeat:  # the first warms up
                times[name].append(took)
    peaks = {name: peak(forward) for name, forward in made.items()} if DEVICE.type == "cuda" else {}
    del made
    middle = {name: median(values) for name, values in times.items()}
    title = f"{given.student}, {given.threads} threads, chunks of {given.chunk} positions, medians of {given.repeats}"
    table = Table("objective", "seconds", "times cross-entropy", "peak MB", title=title)
    for name in names:
        memory = f"{peaks[name] / 1e6:.0f}" if peaks else "-"
        if not peaks and not given.times_alone and Path("/proc/self/clear_refs").exists():
            again = [sys.executable, __file__, "--peak", name, *sys.argv[1:]]
            memory = f"{int(subprocess.run(again, check=True, stdout=subprocess.PIPE).stdout) / 1e6:.0f}"
        table.add_row(name, f"{middle[name]:.3f}", f"{middle[name] / middle[PLAIN]:.2f}", memory)
    Console().print(table)


if __name__ == "__main__":
    main()

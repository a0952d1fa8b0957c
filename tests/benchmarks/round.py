"""Where the seconds of a whole round go: `python tests/benchmarks/round.py`, on a CPU or a GPU.

A real run of some rounds, SmolLM2-135M learning from Gemma-3-270M unless other folders are given, in seconds of the clock.
Each counts once, in the innermost of: sampling, scoring, training, loading, saving, digests, commits (which wait for the disk)
and the rest of a stage. What manifests say of a stage leaves out digests and commits, so the table of stages names them apart.
Sampling, scoring and training stand beside their bounds, measured afterwards on the last round's own rows: transformers' loop,
the forward pass with head and log-softmax, and chunked cross-entropy with its backward pass, without the optimizer. With
`--versus trl` the last round's prompts go through TRL's GOLD trainer as well, with as many samples and steps (`make versus`).
"""

import argparse
import functools
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

CHECKOUT = Path(__file__).parents[2]
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "tests")]

import torch  # noqa: E402
import versus  # noqa: E402
from generation import fetch, seconds, theirs  # noqa: E402
from prefect.testing.utilities import prefect_test_harness  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from flows import distill as flow  # noqa: E402
from storage import lineage  # noqa: E402
from storage.clearing import word_bytes  # noqa: E402
from storage.store import Run, part, round_slot  # noqa: E402
from tasks.engines.base import Sampling  # noqa: E402
from tasks.engines.transformers import TransformersEngine  # noqa: E402
from tasks.engines.vllm import VllmEngine  # noqa: E402
from tasks.models import weights  # noqa: E402
from tasks.models.reference import ModelRef  # noqa: E402
from tasks.training.student import load_for_training  # noqa: E402
from tasks.training.trainer import Trainer  # noqa: E402

WORK = ("sampling", "scoring", "training", "evaluation's sampling", "evaluation's scoring")
EVALUATION = ("evaluation's sampling", "evaluation's scoring", "evaluate_model")
STAGES = ("roll_out", "score_shard", "align_shard", "check_round", "train_round", "evaluate_model")
RECIPE = """
name = "round"
rounds = {rounds}
student = {{ model = "{student}" }}
teacher = {{ model = "{teacher}", rendering = "plain" }}
rollout = {{ prompts = {prompts}, max_new_tokens = {tokens}, shard_rows = {prompts}, batch_size = {prompts} }}
score = {{ signal = "bytes", k = 64, top_p = 0.9985 }}
objective = {{ name = "bytes" }}
evaluate = {{ samples = 1, scorer = "exact" }}
gates = {{ lead = -1.0, truncated = 1.0, repetition = 1.0, supervised = 0.0, dropped = 1.0, length = 1000.0 }}

[prompts]
source = "reasoning-gym"
task = "spell_backward"
options = {{ min_word_len = 4, max_word_len = 8 }}
template = "Write one short sentence with the word {{word}}."
train = 1024
eval = 8

[train]
learning_rate = 2e-5
batch_size = {batch}
micro_batch_size = 4  # as in trl_round.py
chunk_positions = 128
"""

Calls = dict[str, list[tuple[ModelRef, list[list[int]], list[list[int]]]]]  # prompts and completions


class Clock:
    """Seconds by what is innermost, for each part of a run, and what the engines were called with."""

    now = staticmethod(time.perf_counter)  # or that of all threads of this process

    def __init__(self) -> None:
        self.parts: list[Counter[str]] = []
        self.events: list[Counter[str]] = []
        self.calls: list[Calls] = []
        self.names, self.since = ["everything else"], self.now()
        self.next()

    def next(self) -> None:
        """Begin another part: the first round, the second, …"""
        self.parts.append(Counter())
        self.events.append(Counter())
        self.calls.append({"generate": [], "score": []})

    def _count(self) -> None:
        now = self.now()
        self.parts[-1][self.names[-1]] += now - self.since
        self.since = now

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        self._count()
        self.names.append(name)
        try:
            yield
        finally:
            self._count()
            self.names.pop()

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            self.events[-1][name] += 1
            own = f"evaluation's {name}" if "evaluate_model" in self.names and name in ("sampling", "scoring") else name
            with self.inside(own):
                return function(*args, **named)

        return call

    def watch(self, function: Callable[..., Any], name: str) -> None:
        """Time a function under every name that a module has for it."""
        timed = self.timed(function, name)
        for module in list(sys.modules.values()):
            for key in [key for key, value in getattr(module, "__dict__", {}).items() if value is function]:
                setattr(module, key, timed)

    def watch_engine(self, kind: type[Any]) -> None:
        """Time an engine's methods, and keep what the round's own calls were about."""
        generate, score = self.timed(kind.generate, "sampling"), self.timed(kind.score, "scoring")

        def sample(engine: Any, prompts: list[list[int]], *args: Any, **named: Any) -> Any:
            made = generate(engine, prompts, *args, **named)
            if "roll_out" in self.names:
                self.calls[-1]["generate"].append((engine.ref, prompts, [list(completion.ids) for completion in made]))
            return made

        def scored(engine: Any, prompts: list[list[int]], completions: list[list[int]], *args: Any, **named: Any) -> Any:
            if "score_shard" in self.names:
                self.calls[-1]["score"].append((engine.ref, prompts, completions))
            return score(engine, prompts, completions, *args, **named)

        kind.generate, kind.score = sample, scored
        kind.__init__ = self.timed(kind.__init__, "starting engines")


def instrument(clock: Clock) -> None:
    for stage in STAGES:
        task = getattr(flow, stage)
        task.fn = clock.timed(task.fn, stage)
    for kind in (TransformersEngine, VllmEngine):
        clock.watch_engine(kind)
    Trainer.run = clock.timed(Trainer.run, "training")  # type: ignore[method-assign]
    Trainer._save = clock.timed(Trainer._save, "saving")  # type: ignore[method-assign]
    Run.commit = clock.timed(Run.commit, "commits")  # type: ignore[method-assign]
    clock.watch(weights._load, "loading")
    clock.watch(lineage.digest_local, "digests")
    settle = flow.settle

    def settled(*args: Any) -> None:
        settle(*args)
        clock._count()
        clock.next()

    flow.settle = settled


def forward(model: Any, ids: torch.Tensor, size: int, kept: int) -> None:
    """Log-probs at the last `kept` positions of every row."""
    with torch.inference_mode():
        for hidden in weights.hidden_states(model, ids)[:, -kept:].flatten(0, 1).split(1024):
            weights.logits_of(model, hidden, size).log_softmax(-1)


def cross_entropy_step(model: Any, ids: torch.Tensor, size: int, kept: int) -> None:
    """Chunked cross-entropy of the last `kept` tokens of every row, and its backward pass."""
    hidden = weights.hidden_states(model, ids)[:, -kept - 1 : -1].flatten(0, 1)

    def loss_of(part: torch.Tensor, actual: torch.Tensor) -> torch.Tensor:
        return cross_entropy(weights.logits_of(model, part, size), actual, reduction="sum")

    parts = zip(hidden.split(128), ids[:, -kept:].flatten().split(128), strict=True)
    torch.stack([checkpoint(loss_of, *part, use_reentrant=False) for part in parts]).sum().backward()


def bounds(calls: Calls, batch: int, tokens: int) -> dict[str, float]:
    """The seconds that the last round's sampling, scoring and training take at least, as of rows without padding.

    Logits exist at completions alone, as they do in the run.
    """
    found = {}
    for what, name in (("generate", "sampling"), ("score", "scoring")):
        (ref, prompts, completions), *_ = calls[what]
        every = [(len(a), len(b)) for _, old, new in calls[what] for a, b in zip(old, new, strict=True)]
        whole, written = sum(map(sum, every)), sum(b for _, b in every)
        engine = TransformersEngine(ref)
        if what == "generate":
            took = seconds_of(engine.device, theirs, engine.model, prompts, engine.side.pad_id, Sampling(tokens))
            found[name] = took * written / (len(prompts) * tokens)
        rows = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        width = min(map(len, rows))
        ids = torch.tensor([row[:width] for row in rows[:batch]], device=engine.device)
        kept, times, size = round(width * written / whole), whole / ids.numel(), engine.size
        if what == "score":
            found[name] = seconds_of(engine.device, forward, engine.model, ids, size, kept) * times
        engine.close()
        if what == "generate":
            model = load_for_training(ref, False).to(ids.device)
            found["training"] = seconds_of(ids.device, cross_entropy_step, model, ids, size, kept) * times
            del model
    return found


def seconds_of(device: torch.device, work: Callable[..., object], *given: object) -> float:
    """The least of two by the same clock, the first of which warms up as well."""
    took = []
    for _ in range(2):
        started = Clock.now()
        seconds(device, work, *given)
        took.append(Clock.now() - started)
    return min(took)


def main() -> None:
    ready = time.time() - psutil.Process().create_time()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--student", default="models/smollm2")
    parser.add_argument("--teacher", default="models/gemma3-270m")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8, help="rows of an optimizer step")
    parser.add_argument("--set", nargs="*", default=[], help="more of the recipe, such as student.engine=vllm")
    parser.add_argument("--versus", choices=["trl"])
    parser.add_argument("--no-bounds", action="store_true", help="leave them out, as --versus does")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count seconds of all threads: without disks and what else the machine does"
    )
    given = parser.parse_args()
    if given.versus:
        versus.check()
    if given.cpu_time:
        Clock.now = staticmethod(time.process_time)
    if given.student.startswith("models/"):
        fetch.main(["smollm2", "gemma3-270m"])
    clock, started = Clock(), time.perf_counter()
    with tempfile.TemporaryDirectory() as place, prefect_test_harness(server_startup_timeout=120):
        server = time.perf_counter() - started
        recipe = Path(place) / "round.toml"
        recipe.write_text(
            RECIPE.format(**{**vars(given), "student": Path(given.student).resolve(), "teacher": Path(given.teacher).resolve()})
        )
        instrument(clock)
        clock._count()
        clock.parts[-1].clear()
        flow.distill(str(recipe), overrides=(f"root={place}/runs", *given.set))
        clock._count()
        clock.next()
        run, most = Run(f"{place}/runs", "round"), versus.peak()
        least = {} if given.versus or given.no_bounds else bounds(clock.calls[-3], given.batch, given.tokens)
        show(clock, dict(run.manifests()), least, ready, server)
        if given.versus:
            spent, taken = clock.parts[-3], run.manifest(round_slot(given.rounds, "steps", part(0)))
            assert taken is not None
            ours = {
                "seconds": spent.total() - sum(spent[name] for name in EVALUATION),
                "tokens": tokens_of(clock.calls[-3]),
                "steps": taken["rows"],
                "peak_mib": most,
            }
            theirs = versus.through_trl(versus.prompts_of(run.path, given.rounds), given, 2e-5, 4)
            Console(width=120).print(versus.table_of(ours, theirs))


def tokens_of(calls: Calls) -> int:
    """The tokens that were sampled."""
    return sum(len(made) for _, _, completions in calls["generate"] for made in completions)


def show(clock: Clock, manifests: dict[str, Any], least: dict[str, float], ready: float, server: float) -> None:
    console = Console(width=120)
    console.print(f"start-up: {ready:.1f} s of imports, {server:.1f} s until Prefect's server answers")
    parts, events = clock.parts[:-2], clock.events[:-2]  # without what follows the last round, and the bounds
    rounds = range(1, len(parts))
    names = [*WORK, *sorted({name for part in parts for name in part} - {*WORK})]
    table = Table("seconds", "before", *(f"round {number}" for number in rounds), "last round's bound", "times")
    for name in names:
        bound = least.get(name, 0.0)
        last = parts[-1][name]
        more = (f"{bound:.1f}", f"{last / bound:.2f}") if bound else ("", "")
        table.add_row(name, *(f"{part[name]:.1f}" for part in parts), *more)
    totals = [part.total() for part in parts]
    table.add_row("in all", *(f"{total:.1f}" for total in totals))
    shares = [1 - sum(part[name] for name in WORK) / total for part, total in zip(parts, totals, strict=True)]
    table.add_row("not sampling, scoring, training", *(f"{share:.0%}" for share in shares))
    table.add_row("engines started", *(str(part["starting engines"]) for part in events))
    table.add_row("models loaded", *(str(part["loading"]) for part in events))
    sizes: Counter[int] = Counter()
    stages: dict[str, Counter[int]] = {}
    pieces = set()
    for slot, manifest in manifests.items():
        number = int(slot[6:10]) if slot.startswith("round=") else 0
        sizes[number] += manifest["bytes"] or 0
        stage = slot.split("/")[slot.startswith("round=")]
        stage = "train" if stage in ("student", "trainer", "steps") else stage
        if (number, manifest["key"]) not in pieces:
            stages.setdefault(stage, Counter())[number] += manifest["seconds"]
        pieces.add((number, manifest["key"]))
    table.add_row("written", *(word_bytes(sizes[number]) for number in (0, *rounds)))
    rate = tokens_of(clock.calls[-3]) / totals[-1]
    table.add_row("the last round's tokens per second", "", *[""] * (len(rounds) - 1), f"{rate:.1f}")
    console.print(table)
    by_stage = Table("stage, by its manifests", "before", *(f"round {number}" for number in rounds))
    for stage, times in stages.items():
        by_stage.add_row(stage, *(f"{times[number]:.1f}" for number in (0, *rounds)))
    apart = [part["digests"] + part["commits"] for part in parts]
    by_stage.add_row("digests and commits, in no manifest", *(f"{spent:.1f}" for spent in apart))
    console.print(by_stage)


if __name__ == "__main__":
    main()

"""Every stage on fixed inputs: what it makes is held against what it made when its code's number was last raised.

The inputs of a stage are the kept outputs of the stages before it, so that a change shows where it was made. Ids and
texts must be the same, numbers to rounding: other processors add up in another order.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors.numpy import load_file

from configs.load import validate_recipe
from configs.objectives import OBJECTIVES
from configs.schema import Recipe
from configs.signals import SIGNALS, signals_for
from storage.artifacts import Artifact, read_table
from storage.caches import writing_cache
from storage.lineage import digest_file
from storage.schemas import CACHED_TEXTS
from tasks import align, check, completions, evaluate, held_out, prompts, rewards, rollout, score, scratch, train, vocab
from tasks.models.reference import ModelRef, make_reference, refer_to_cache
from tasks.rows.round import Pair, Round, Shard, Vocabularies

KEPT = Path(__file__).parent / "kept"
STUDENT, TEACHER = Path(__file__).parent / "student", Path(__file__).parent / "teacher"
PROMPTS = Path(__file__).parent / "prompts.jsonl"
LEFT_OUT = {"engine", "seconds", "policy", "teacher"}  # versions, times, and digests of folders: no work of the stage
TOLERANCE = 1e-3  # nats, and the same relative to larger numbers; half precision is coarser than one processor's rounding


@dataclass(frozen=True)
class Case:
    """One output of a stage, and the constant that says which code made it."""

    name: str
    constant: str  # tasks/align.py CODE
    make: Callable[[Path], pa.Table]  # from an empty root for runs

    @property
    def kept(self) -> Path:
        return KEPT / f"{self.name}.parquet"

    @property
    def code(self) -> int:
        module, name = self.constant.split()
        number: int = getattr(MODULES[module], name)
        return number


MODULES = {
    f"tasks/{module.__name__.split('.')[-1]}.py": module
    for module in (align, check, completions, evaluate, held_out, prompts, rewards, rollout, score, scratch, train, vocab)
}


def recipe(root: Path, objective: str = "bytes", signal: str = "topk", **tables: Any) -> Recipe:
    data: dict[str, Any] = {
        "name": "golden",
        "root": str(root),
        "student": {"model": str(STUDENT)},
        "teacher": {"model": str(TEACHER)},
        "prompts": {"source": "file", "path": str(PROMPTS), "train": 8, "eval": 4},
        "rollout": {"prompts": 8, "max_new_tokens": 8, "on_policy": 0.5, "off_policy": "teacher"},
        "score": {"signal": signal, "k": 12},
        "objective": {"name": objective},
        "train": {"learning_rate": 1e-2, "batch_size": 4, "micro_batch_size": 2},
        "evaluate": {"samples": 1},
        "gates": {"truncated": 1.0, "repetition": 1.0, "supervised": 0.0, "dropped": 1.0},
    }
    if not OBJECTIVES[objective].needs_teacher or OBJECTIVES[objective].one_tokenizer:
        data["teacher"] = {"model": str(STUDENT)}
    if OBJECTIVES[objective].given_text:
        data["rollout"] |= {"on_policy": 0.0}
    if objective == "reward":
        data |= {"rollout": {"prompts": 8, "samples": 2, "max_new_tokens": 8}, "reward": {"weight": 0.5}}
    return validate_recipe(data | {name: data[name] | table for name, table in tables.items()}, "golden")


def kept(name: str) -> Artifact:
    path = KEPT / f"{name}.parquet"
    return Artifact(str(path), digest_file(path), pq.read_metadata(path).num_rows)


def reference_to(recipe: Recipe, role: str) -> ModelRef:
    config = getattr(recipe, role)
    return make_reference(config, config.model)


def round_of(recipe: Recipe, head: Artifact | None = None, **more: Any) -> Round:
    student = reference_to(recipe, "student")
    words = Vocabularies(student=kept("vocab-student"), teacher=kept("vocab-teacher"))
    pair = Pair(name="", recipe=recipe, teacher=reference_to(recipe, "teacher"), vocabularies=words, head=head)
    given = {"recipe": recipe, "number": 1, "student": student, "start": student, "pairs": (pair,)}
    return Round(**given, prompts=kept("prompts-train"), **more)


def signal_of(objective: str) -> str:
    return signals_for(OBJECTIVES[objective].reads)[0]


def scored(objective: str, signal: str) -> str:
    """Which kept scores an objective is aligned with: of the one tokenizer where it needs that."""
    return f"scores-{signal}" + "-same" * (reference_folder(objective) == STUDENT)


def reference_folder(objective: str) -> Path:
    return Path(recipe(Path("runs"), objective, signal_of(objective)).teacher.model)  # type: ignore[union-attr, arg-type]


# -- the stages ------------------------------------------------------------------------------------------------------------


# A function that is given no root gives one that makes a table under a root, when what it reads is kept.


def make_prompts(split: str) -> Callable[[Path], pa.Table]:
    return lambda root: read_table(getattr(prompts.make_prompts.fn(recipe(root)), split))


def make_scratch(root: Path) -> pa.Table:
    shape = {"vocab_size": 270, "layers": 1, "width": 8, "heads": 2, "feed_forward": 8, "context": 64}
    made = scratch.make_scratch.fn(recipe(root, student={"scratch": shape, "model": None}), kept("prompts-train"))
    return weights(Path(made.path))


def weights(folder: Path) -> pa.Table:
    """A model's tensors, one a row."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    values = [tensors[name].reshape(-1) for name in names]
    return pa.table({"name": names, "values": pa.array(values, pa.list_(pa.float32()))})


def match_vocabularies(role: str) -> Callable[[Path], pa.Table]:
    def make(root: Path) -> pa.Table:
        given = recipe(root)
        sides = {side: reference_to(given, side) for side in ("student", "teacher")}
        return read_table(getattr(vocab.match_vocabularies.fn(given, **sides), role))

    return make


# The models are random; with this seed all that they sample spells a text.
def sampling_round(root: Path) -> Round:
    return round_of(recipe(root).model_copy(update={"seed": 47}))


def complete(root: Path) -> pa.Table:
    return read_shard(completions.complete_shard.fn(sampling_round(root), Shard(0)).completions[0])


def roll_out(root: Path) -> pa.Table:
    return read_shard(rollout.roll_out.fn(sampling_round(root), Shard(0, completions=(kept("completions"),))).rollouts)


def roll_out_references(root: Path) -> pa.Table:
    given = recipe(root, rollout={"on_policy": 0.0, "off_policy": "reference"})
    return read_shard(rollout.roll_out.fn(round_of(given), Shard(0)).rollouts)


def score_rollouts(signal: str, one_tokenizer: bool = False) -> Callable[[Path], pa.Table]:
    readers = [o for o, c in OBJECTIVES.items() if SIGNALS[signal].gives & c.reads and c.one_tokenizer == one_tokenizer]

    def make(root: Path) -> pa.Table:
        shard = Shard(0, rollouts=kept("rollouts"))
        return read_shard(score.score_shard.fn(round_of(recipe(root, readers[0], signal)), shard).scores[0])

    return make


def reward_rollouts(root: Path) -> pa.Table:
    """The samples as if all were of one prompt, whose reference is what the first of them says."""
    rows, asked = read_table(kept("rollouts")), read_table(kept("prompts-train"))
    own = rows.filter(pc.field("source") == "student").slice(0, 1)
    same_prompt = pa.array(own["prompt_id"].to_pylist() * len(rows))
    rows = rows.set_column(rows.column_names.index("prompt_id"), "prompt_id", same_prompt)
    answer = pa.array(own["text"].to_pylist() * len(asked))
    asked = asked.set_column(asked.column_names.index("reference"), "reference", answer)
    given = replace(round_of(recipe(root, rollout={"keep": 2})), prompts=written(asked, root / "prompts.parquet"))
    return read_table(rewards.reward_rows.fn(given, [Shard(0, rollouts=written(rows, root / "rollouts.parquet"))]))


def written(table: pa.Table, path: Path) -> Artifact:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return Artifact(str(path), digest_file(path), len(table))


def keep_head(root: Path) -> pa.Table:
    given = recipe(root, "bytes", "hidden")
    folder = Path(score.keep_head.fn(given, reference_to(given, "teacher")).path)
    return pa.table(
        {"values": pa.array([load_file(folder / "head.safetensors")["weight"].reshape(-1)], pa.list_(pa.float32()))}
    )


def align_rollouts(objective: str, signal: str) -> Callable[[Path], pa.Table]:
    def make(root: Path) -> pa.Table:
        given = recipe(root, objective, signal)
        head = score.keep_head.fn(given, reference_to(given, "teacher")) if SIGNALS[signal].needs_head else None
        scores = (kept(scored(objective, signal)),) if OBJECTIVES[objective].needs_teacher else ()
        shard = Shard(0, rollouts=kept("rollouts"), scores=scores)
        return read_shard(align.align_shard.fn(round_of(given, head=head), shard).aligned)

    return make


def check_round(root: Path) -> pa.Table:
    shard = Shard(0, rollouts=kept("rollouts"), aligned=kept("aligned-bytes-topk"))
    return read_table(check.check_round.fn(round_of(recipe(root, gates={"engine_max": 9.0})), (shard,)))


def train_round(objective: str) -> Callable[[Path], pa.Table]:
    """Losses and gradients of two steps, and the weights behind them."""

    def make(root: Path) -> pa.Table:
        given = recipe(root, objective, signal_of(objective))
        shard = Shard(0, rollouts=kept("rollouts"), aligned=kept(f"aligned-{objective}-{signal_of(objective)}"))
        worth = kept("rewards") if given.graded else None
        made = train.train_round.fn(round_of(given, rewards=worth), (shard,))
        table = weights(Path(made.student.path))
        steps = read_table(Artifact(made.student.path.replace("/student", "/steps/part-00000.parquet"), ""))
        figures = {name: steps[name].to_pylist() for name in ("loss", "grad_norm", "learning_rate", "units", "tokens")}
        more = pa.table({"name": list(figures), "values": pa.array(list(figures.values()), pa.list_(pa.float32()))})
        return pa.concat_tables([more, table])

    return make


def evaluate_model(root: Path) -> pa.Table:
    given = recipe(root)
    student, teachers = reference_to(given, "student"), {"": reference_to(given, "teacher")}
    return read_table(evaluate.evaluate_model.fn(given, 1, "student", kept("prompts-eval"), model=student, teachers=teachers))


def compare_cached(root: Path) -> pa.Table:
    """The student on a cache of the kept rollouts, whoever wrote them."""
    rows, scores = read_table(kept("rollouts")), read_table(kept("scores-bytes"))
    columns = {name: (rows if name in rows.column_names else scores)[name] for name in CACHED_TEXTS.names}
    columns |= {name: scores[name] for name in ("token_ids", "logprobs")}
    asked = read_table(kept("prompts-train"))
    with writing_cache(str(root / "cache")) as writer:
        writer.add_texts(pa.table(columns).filter(pc.equal(scores["status"], "ok")))
        writer.finish(asked.drop_columns(["split"]), read_table(kept("vocab-teacher")), {"teacher": {"digest": ""}}, "")
    more = {"rollout": {"on_policy": 0.0}, "teacher": {"cache": str(root / "cache"), "model": None}, "score": {"k": 64}}
    given = recipe(root, "bytes", "bytes", **more)
    refs = {"student": reference_to(given, "student"), "teacher": refer_to_cache(str(root / "cache"))}
    return read_table(held_out.compare_cached.fn(given, 1, kept("prompts-train"), **refs))


def read_shard(artifact: Artifact | None) -> pa.Table:
    assert artifact is not None
    return read_table(artifact)


def cases() -> Iterator[Case]:
    """In an order in which each finds what it reads."""
    yield Case("prompts-train", "tasks/prompts.py CODE", make_prompts("train"))
    yield Case("prompts-eval", "tasks/prompts.py CODE", make_prompts("eval"))
    yield Case("scratch", "tasks/scratch.py CODE", make_scratch)
    yield Case("vocab-student", "tasks/vocab.py CODE", match_vocabularies("student"))
    yield Case("vocab-teacher", "tasks/vocab.py CODE", match_vocabularies("teacher"))
    yield Case("completions", "tasks/completions.py CODE", complete)
    yield Case("rollouts", "tasks/rollout.py CODE", roll_out)
    yield Case("rollouts-references", "tasks/rollout.py CODE", roll_out_references)
    for signal in SIGNALS:
        yield Case(f"scores-{signal}", "tasks/score.py CODE", score_rollouts(signal))
    yield Case("scores-topk-same", "tasks/score.py CODE", score_rollouts("topk", one_tokenizer=True))
    yield Case("rewards", "tasks/rewards.py CODE", reward_rollouts)
    yield Case("head", "tasks/score.py HEAD_CODE", keep_head)
    for objective, config in OBJECTIVES.items():
        signals = signals_for(config.reads) if not config.one_tokenizer else [signal_of(objective)]
        for signal in signals if config.needs_teacher else signals[:1]:
            yield Case(f"aligned-{objective}-{signal}", "tasks/align.py CODE", align_rollouts(objective, signal))
    yield Case("gates", "tasks/check.py CODE", check_round)
    for objective in OBJECTIVES:
        yield Case(f"train-{objective}", "tasks/train.py CODE", train_round(objective))
    yield Case("evals", "tasks/evaluate.py CODE", evaluate_model)
    yield Case("evals-cached", "tasks/held_out.py CODE", compare_cached)


# -- comparing -------------------------------------------------------------------------------------------------------------


def hold(case: Case, root: Path) -> str | None:
    """What is wrong with a case; None: its stage makes what it made when its number was last raised."""
    module, name = case.constant.split()
    if not case.kept.exists():
        return f"{case.name}: nothing is kept of it yet; run `make golden`"
    wanted = pq.read_table(case.kept)
    was = int((wanted.schema.metadata or {})[b"code"])
    if was != case.code:
        return f"{case.name}: {name} of {module} is {case.code}, what is kept was made by {was}; run `make golden`"
    if reason := differ(case.make(root), wanted):
        return (
            f"{case.name}: {module} makes something else than it did ({reason}), and {name} is still {was}: stored work would "
            f"be taken for what it is not. Raise {name} to {was + 1}, then run `make golden`"
        )
    return None


def differ(found: pa.Table, wanted: pa.Table) -> str | None:
    """Where two tables are not the same, but for rounding; None where they are."""
    names = [name for name in found.column_names if name not in LEFT_OUT]
    if names != [name for name in wanted.column_names if name not in LEFT_OUT]:
        return f"its columns are {', '.join(names)}"
    if len(found) != len(wanted):
        return f"{len(found)} rows, not {len(wanted)}"
    for name in names:
        for row, (value, kept_value) in enumerate(zip(found[name].to_pylist(), wanted[name].to_pylist(), strict=True)):
            if not same(value, kept_value):
                return f"column {name}, row {row}: {value!r:.100}, not {kept_value!r:.100}"
    return None


def same(value: Any, other: Any) -> bool:
    if isinstance(value, list) and isinstance(other, list):
        if len(value) != len(other):
            return False
        if value and all(isinstance(item, float) for item in (*value, *other)):
            return bool(np.allclose(value, other, TOLERANCE, TOLERANCE, equal_nan=True))
        return all(map(same, value, other))
    if isinstance(value, float) and isinstance(other, float):
        return bool(np.isclose(value, other, TOLERANCE, TOLERANCE, equal_nan=True))
    return bool(value == other)


def raised(case: Case) -> bool:
    """Whether the number of a case is not that of what is kept of it."""
    return not case.kept.exists() or int(pq.read_schema(case.kept).metadata[b"code"]) != case.code


def keep_all() -> list[str]:
    """Keep what the stages make now. Refused where one changed and its number did not: that is what the number is for.

    Stages whose number was not raised are held before anything is kept. Behind those that were raised they read other inputs
    then, so what they make is kept anew under the same number.
    """
    new = {case.name for case in cases() if raised(case)}
    with tempfile.TemporaryDirectory() as folder:
        held = (hold(case, Path(folder) / case.name) for case in cases() if case.name not in new)
        refused = [reason for reason in held if reason]
        for case in cases() if new and not refused else ():
            table = case.make(Path(folder) / f"{case.name}-anew")
            if case.name in new or differ(table, pq.read_table(case.kept)):
                KEPT.mkdir(exist_ok=True)
                pq.write_table(table.replace_schema_metadata({"code": str(case.code)}), case.kept, compression="zstd")
                print(f"{case.name}: kept, code {case.code}")
    return refused


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit("\n".join(keep_all()) or None)

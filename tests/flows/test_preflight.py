"""Preflight and gates (DESIGN.md §7): each thing that would spoil a run is caught, by name, and nothing else is."""

import json
import math
import tomllib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import tomli_w
from helpers import files

from configs.errors import Stopped
from configs.gates import Gates
from configs.load import load_recipe
from configs.schema import Recipe
from flows.distill import distill
from flows.preflight import preflight
from storage.artifacts import Artifact
from storage.read import scan
from storage.store import Run
from tasks.check import read_gates
from tasks.engines.base import TokenScores
from tasks.engines.choose import release
from tasks.engines.transformers import TransformersEngine
from tasks.gates.cost import disk_need, memory_needs
from tasks.gates.gate import Gate, require
from tasks.gates.rendering import judge_of
from tasks.gates.round import draw_samples, lead_gate, repetition, round_gates
from tasks.models.reference import ModelRef, make_reference
from tasks.preflight import Sample, examine, roll_out_sample
from tasks.rows.sources import deal_prompts

SHAPE = {"layers": 1, "width": 48, "heads": 2, "feed_forward": 64, "context": 64}


def written(path: Path, data: dict[str, Any]) -> Path:
    path.write_text(tomli_w.dumps(data))
    return path


@pytest.fixture(scope="module")
def taught(server, tmp_path_factory) -> dict[str, Path]:
    """Recipes of a teacher that has learnt to answer, of another that has not, and the prompts, in a folder of their own."""
    folder = tmp_path_factory.mktemp("taught")
    words = [f"{a}{b}{c}" for a in "abcd" for b in "eiou" for c in "lmnr"]
    rows = [{"prompt": f"what is {word}?", "reference": "a word, yes"} for word in words]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = {}
    for name, size, epochs in (("good", 300, 40), ("student", 310, 40), ("poor", 320, 1)):
        recipe = {
            "name": name,
            "root": str(folder / "runs"),
            "student": {"scratch": {"vocab_size": size, **SHAPE}},
            "prompts": {"source": "file", "path": "prompts.jsonl", "train": 40, "eval": 12},
            "rollout": {"on_policy": 0.0, "prompts": 40, "max_new_tokens": 12},
            "objective": {"name": "sft"},
            "train": {"learning_rate": 1e-2, "batch_size": 16, "micro_batch_size": 16, "epochs": epochs},
            "evaluate": {"samples": 1},
        }
        made[name] = Path(distill(str(written(folder / f"{name}.toml", recipe)))["student"])
    return made | {"prompts": folder / "prompts.jsonl"}


@pytest.fixture
def pair(taught, tmp_path) -> Callable[..., Path]:
    """Writes a recipe with the taught models, and with changes (`train__batch_size=8`)."""

    def write(**changes: Any) -> Path:
        data: dict[str, Any] = {
            "name": "pair",
            "root": str(tmp_path / "runs"),
            "student": {"model": str(taught["student"])},
            "teacher": {"model": str(taught["good"])},
            "prompts": {"source": "file", "path": str(taught["prompts"]), "train": 40, "eval": 12},
            "rollout": {"prompts": 32, "max_new_tokens": 12},
            "score": {"k": 64},
            "objective": {"name": "bytes"},
            "train": {"learning_rate": 1e-4, "batch_size": 16, "micro_batch_size": 16},
            "evaluate": {"samples": 1},
        }
        for key, value in changes.items():
            *tables, last = key.split("__")
            table = data
            for name in tables:
                table = table.setdefault(name, {})
            table[last] = value
        return written(tmp_path / "pair.toml", data)

    return write


def found(path: Path, student: Path | None = None, teacher: Path | None = None) -> dict[str, Gate]:
    """The gates of a recipe by name, with other models where they are given."""
    recipe = load_recipe(path)
    release()  # a patched engine is not the one that was loaded

    def ref(role: str, other: Path | None) -> ModelRef:
        config = getattr(recipe, role)
        return make_reference(config, str(other or config.model))

    teachers = {"": ref("teacher", teacher)}
    return {gate.name: gate for gate in examine(recipe, 16, student=ref("student", student), teachers=teachers)}


def breached(gates: dict[str, Gate]) -> set[str]:
    return {name for name, gate in gates.items() if gate.ok is False}


def changed(model: Path, target: Path, change: Callable[[Path], None]) -> Path:
    """A copy of a model's folder with a change made to it."""
    target.mkdir()
    for path in model.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    change(target)
    return target


# -- preflight ---------------------------------------------------------------------------------------------------------


def test_a_sound_recipe_passes(pair):
    gates = found(pair())
    assert breached(gates) == set()
    assert gates["lead"].detail.startswith("teacher 1.000, student 1.000")
    assert gates["own teacher"].value == pytest.approx(0, abs=0.01)
    measured = {name for name, gate in gates.items() if gate.ok}
    assert measured >= {"student: template", "teacher: room", "engine, largest", "teacher's engine", "disk", "cpu: memory"}


@pytest.mark.parametrize(
    "changes",
    [
        {"objective__name": "reward", "reward__weight": 1.0, "rollout__samples": 2},
        {"objective__name": "sft", "rollout__on_policy": 0.0},
    ],
    ids=lambda changes: changes["objective__name"],
)
def test_a_teacher_that_no_objective_reads_is_measured_by_its_answers_alone(pair, changes):
    gates = found(pair(**changes))
    assert breached(gates) == set()
    assert gates["lead"].ok
    assert not gates.keys() & {"own teacher", "noise", "supervised", "teacher's engine"}


def test_a_run_on_references_is_measured_on_references(pair):
    """And a run on both sources on both."""
    recipe = load_recipe(pair(rollout__on_policy=0.0, rollout__off_policy="reference"))
    student, teacher = (make_reference(config, str(config.model)) for config in (recipe.student, recipe.teacher))
    prompts = deal_prompts(recipe.prompts, recipe.seed, judge_of(recipe, {})).tables()["train"]
    rollouts = roll_out_sample(Sample(recipe, prompts, student, teacher))
    assert set(rollouts["source"].to_pylist()) == {"reference"}
    assert rollouts["text"].equals(prompts["reference"])
    gates = found(pair(rollout__on_policy=0.0, rollout__off_policy="reference"))
    assert breached(gates) == set()
    assert gates["truncated"].value is gates["engine, largest"].value is None  # the student samples nothing
    assert gates["noise"].value is not None
    assert gates["supervised"].value is not None
    mixed = load_recipe(pair(rollout__on_policy=0.5, rollout__off_policy="teacher"))
    sources = roll_out_sample(Sample(mixed, prompts, student, teacher))["source"].to_pylist()
    assert set(sources) == {"student", "teacher"}


def test_the_disk_that_a_run_needs_by_hand(pair):
    """Of five rounds of 32 rows: 10, 20 and 3 bytes a row, 1000 weights in float32 with two moments."""

    def needs(**changes) -> float:
        return disk_need(load_recipe(pair(rounds=5, **changes)), {"rollouts": 10, "scores": 20, "aligned": 3}, 1000)

    rows = 32 * 5 * (10 + 20 + 3)
    assert needs() == rows + 5 * 4000 + 2 * 8000  # the newest trainer's state, while the next one is made
    assert needs(keep__trainers="all") == rows + 5 * 12_000
    assert needs(keep__students=1, keep__trainers=9) == rows + 2 * 4000 + 5 * 8000
    assert needs(keep__students="best") == rows + 3 * 4000 + 2 * 8000
    assert needs(keep__scores=2, keep__rollouts=1) == 32 * (2 * 10 + 3 * 20 + 5 * 3) + 5 * 4000 + 2 * 8000
    assert needs(train__param_dtype="bfloat16") == rows + 5 * 2000 + 2 * 12_000


def test_memory_is_held_against_each_device_that_has_to_hold_it(pair):
    """A served teacher needs none here; adapters need the frozen weights and little more; processes on a CPU add up."""

    def needs(**changes) -> dict[str, float]:
        recipe = load_recipe(pair(**changes))
        student, teacher = (make_reference(c, str(c.model)) for c in (recipe.student, recipe.teacher))
        return {str(device): need for device, need in memory_needs(recipe, student, {student: 10, teacher: 1000}).items()}

    models = {role: tomllib.loads(pair().read_text())[role] for role in ("student", "teacher")}
    assert needs() == {"cpu": 4000}
    served = {**models["teacher"], "engine": "server", "urls": ["http://gpu:8000"]}
    assert needs(teacher=served, score={"signal": "topk"}) == {"cpu": 160}
    assert needs(teacher={**models["teacher"], "dtype": "bfloat16"}) == {"cpu": 2000}
    assert needs(teacher=served, score={"signal": "topk"}, train={"processes": 3}) == {"cpu": 480}
    assert needs(teacher=served, score={"signal": "topk"}, student={**models["student"], "lora": {}}) == {"cpu": 40}
    apart = needs(teacher={**models["teacher"], "device": "cuda:1"}, student={**models["student"], "device": "cuda:0"})
    assert apart == {"cuda:0": 160, "cuda:1": 4000}
    halves = {"processes": 2, "sharding": "full"}
    assert needs(teacher=served, score={"signal": "topk"}, student={**models["student"], "device": "cuda"}, train=halves) == {
        "cuda": 80
    }


def test_a_template_that_doubles_bos(pair, taught, tmp_path):
    def double(folder: Path) -> None:
        template = folder / "chat_template.jinja"
        template.write_text("{{ bos_token }}" + template.read_text())

    gates = found(pair(), teacher=changed(taught["good"], tmp_path / "doubled", double))
    assert "teacher: template" in breached(gates)
    assert gates["teacher: template"].value == 16
    assert "2 BOS" in gates["teacher: template"].detail


def test_a_tokenizer_of_the_same_size_that_belongs_to_other_weights(pair, taught, tmp_path):
    def swap(folder: Path) -> None:
        path = folder / "tokenizer.json"
        data = json.loads(path.read_text())
        special = {token["id"] for token in data["added_tokens"]}
        pieces = sorted((i, piece) for piece, i in data["model"]["vocab"].items() if i not in special)
        ids = [i for i, _ in pieces]
        data["model"]["vocab"] |= {piece: ids[(n + 7) % len(ids)] for n, (_, piece) in enumerate(pieces)}
        path.write_text(json.dumps(data))

    gates = found(pair(), teacher=changed(taught["good"], tmp_path / "swapped", swap))
    assert "teacher: chance" in breached(gates)
    assert gates["teacher: spelled"].ok  # its bytes are as right as they were
    assert "does not belong to the weights" in gates["teacher: chance"].kind.advice


def test_scores_that_are_shifted_by_one_position(pair, taught, monkeypatch):
    score = TransformersEngine.score

    def shifted(self: TransformersEngine, *arguments: Any) -> list[TokenScores]:
        return [replace(s, logprobs=np.roll(s.logprobs, 1)) for s in score(self, *arguments)]

    monkeypatch.setattr(TransformersEngine, "score", shifted)
    assert "teacher's engine" in breached(found(pair(), teacher=taught["poor"]))


@pytest.mark.parametrize("shift", [1, -1])
def test_sampled_logprobs_that_are_shifted_by_one_position(pair, taught, monkeypatch, shift):
    generate = TransformersEngine.generate

    def shifted(self: TransformersEngine, *arguments: Any) -> list[Any]:
        return [replace(c, logprobs=np.roll(c.logprobs, shift).tolist()) for c in generate(self, *arguments)]

    monkeypatch.setattr(TransformersEngine, "generate", shifted)
    assert "engine, mean" in breached(found(pair(), student=taught["poor"]))


def test_an_engine_that_samples_at_another_temperature(pair, taught, monkeypatch):
    generate = TransformersEngine.generate

    def colder(self: TransformersEngine, prompts: Any, seeds: Any, sampling: Any, *rest: Any) -> list[Any]:
        return generate(self, prompts, seeds, replace(sampling, temperature=0.5 * sampling.temperature), *rest)

    monkeypatch.setattr(TransformersEngine, "generate", colder)
    assert "engine, mean" in breached(found(pair(), student=taught["poor"]))


def test_a_teacher_that_is_worse_than_its_student(pair, taught):
    gates = found(pair(), teacher=taught["poor"])
    assert "lead" in breached(gates)
    assert gates["lead"].value < -0.5


def test_prompts_that_leave_no_room(pair):
    gates = found(pair(rollout__max_new_tokens=60))
    assert breached(gates) == {"student: room", "teacher: room"}
    assert "engine, mean" not in gates  # nothing was run that could not work


def test_scores_that_are_never_the_same(pair, monkeypatch):
    score, rng = TransformersEngine.score, np.random.default_rng(0)

    def noisy(self: TransformersEngine, *arguments: Any) -> list[TokenScores]:
        return [replace(s, logprobs=s.logprobs + rng.normal(size=len(s.logprobs))) for s in score(self, *arguments)]

    monkeypatch.setattr(TransformersEngine, "score", noisy)
    assert "noise" in breached(found(pair()))


def test_a_loss_against_itself(pair, monkeypatch):
    """What the objective reads are other tokens' distributions: the student is not its own teacher any more."""
    score = TransformersEngine.score

    def wrong(self: TransformersEngine, *arguments: Any) -> list[TokenScores]:
        return [
            replace(s, columns={**s.columns, "top_ids": (s.columns["top_ids"] + 5) % 290}) if s.columns else s
            for s in score(self, *arguments)
        ]

    monkeypatch.setattr(TransformersEngine, "score", wrong)
    assert "own teacher" in breached(found(pair()))


@pytest.mark.parametrize("signal", ["hidden", "bytes"])
def test_signals_pass(pair, signal):
    assert breached(found(pair(score__signal=signal))) == set()


def test_the_command(potstill, pair, tmp_path, taught):
    """A table, exit status 1 with what to do, and of the run itself nothing is written."""
    ended = potstill("preflight", pair(gates__supervised=1.0, gates__own_teacher=0.0), "--prompts", 8)
    assert ended.status == 1, ended.err
    assert "own teacher" in ended.out
    assert "BREACHED" in ended.out
    assert "own teacher: the student has a loss against itself" in ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "runs").exists()
    ended = potstill("preflight", pair(), "--prompts", 8)
    assert ended.status == 0, ended.err
    assert "BREACHED" not in ended.out


def test_a_new_student_has_nothing_to_try(server, taught):
    rows = preflight(str(taught["prompts"].parent / "good.toml"))
    assert [row["gate"] for row in rows] == ["prompts"]


def test_answers_that_are_cut_are_found_before_the_run_that_they_would_stop(pair):
    gates = found(pair(rollout__max_new_tokens=2))
    assert (gates["truncated"].value, gates["truncated"].detail) == (1.0, "16 of 16 samples")
    assert "truncated" in breached(gates)
    assert found(pair(gates__truncated=1.0, rollout__max_new_tokens=2))["truncated"].ok


# -- gates of a round --------------------------------------------------------------------------------------------------


def test_a_breached_gate_stops_the_run_and_a_wider_one_lets_it_go_on(potstill, pair, tmp_path):
    ended = potstill("run", pair(gates__truncated=0.0, rollout__max_new_tokens=2))
    assert ended.status == 1, ended.err
    message = ended.err[ended.err.index("potstill: ") :]
    assert "round 1: stopped by a gate" in message
    assert "truncated: 100.0% (32 of 32 samples), at most 0.0% is allowed; raise rollout.max_new_tokens" in message
    assert "[gates]; they may change, and the same command then goes on" in message
    assert "Traceback" not in ended.err
    run = tmp_path / "runs" / "pair"
    before = files(run)
    assert any("round=0001/rollouts" in name for name in before)
    assert not (run / "round=0001" / "student").exists()
    gates = scan(str(run), "gates").collect()
    assert dict(gates.select("gate", "value").iter_rows())["truncated"] == 1.0
    ended = potstill("run", pair(gates__truncated=1.0, rollout__max_new_tokens=2))
    assert ended.status == 0, ended.err
    after = files(run)
    assert {name for name in before if after.get(name) == before[name]} >= {
        n for n in before if any(stage in n for stage in ("rollouts", "scores", "gates"))
    }
    assert "truncated = 1.0" in (run / "run.toml").read_text()


def test_a_gradient_that_explodes_stops_the_round(potstill, pair, tmp_path):
    ended = potstill("run", pair(gates__grad_norm=1e-9))
    assert ended.status == 1, ended.err
    assert "round 1, step 1: the gradient's norm is" in ended.err
    assert not (tmp_path / "runs" / "pair" / "round=0001" / "steps").exists()
    assert potstill("run", pair()).status == 0


def test_a_teacher_without_a_lead_stops_before_the_first_round(server, pair, taught, tmp_path):
    with pytest.raises(Stopped, match="round 0: stopped by a gate\n  lead: -"):
        distill(str(pair(teacher__model=str(taught["poor"]))))
    assert {path.name for path in (tmp_path / "runs" / "pair").glob("round=*")} == {"round=0000"}


def test_repetition_by_counting():
    rng = np.random.default_rng(0)
    for _ in range(200):
        rows = [rng.integers(0, int(rng.integers(1, 5)), int(rng.integers(0, 15))) for _ in range(4)]
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
        wanted = []
        for row in rows:
            runs = [tuple(row[i : i + 4].tolist()) for i in range(len(row) - 3)]
            wanted.append(1 - len(set(runs)) / len(runs) if runs else 0.0)
        assert repetition(np.concatenate(rows).astype(np.int32), offsets, 5) == pytest.approx(wanted)


def test_the_figures_of_a_round_by_hand(tmp_path):
    run = Run(str(tmp_path), "x")

    def kept(name: str, rows: list[dict[str, Any]]) -> Artifact:
        return run.build_table(
            f"round=0001/{name}/part-00000", {"name": name}, lambda: pa.Table.from_pylist(rows), lambda _: None
        )

    rollouts = kept(
        "rollouts",
        [
            {"source": "student", "finish_reason": "length", "token_ids": [1, 1, 1, 1, 1]},
            {"source": "student", "finish_reason": "stop", "token_ids": [1, 2, 3]},
            {"source": "reference", "finish_reason": "length", "token_ids": [4] * 50},
        ],
    )
    names = ("supervised_bytes", "unmatched_bytes", "dropped_bytes", "tail_bytes")
    rows = [("ok", 5, 1, 0, 1), ("ok", 3, 0, 0, 0), ("lossy_text", 0, 0, 10, 0)]
    aligned = kept("aligned", [dict(zip(("status", *names), row, strict=True)) for row in rows])
    gates = {gate.name: gate for gate in round_gates([rollouts], [aligned], 10, Gates(), tokens_before=1.0)}
    assert {name: gate.value for name, gate in gates.items()} == pytest.approx(
        {"supervised": 0.4, "dropped": 1 / 3, "truncated": 0.5, "repetition": 0.25, "tokens": 4.0, "length": 4.0}
    )
    assert [name for name, gate in gates.items() if gate.ok is False] == ["dropped"]
    longer = {gate.name: gate.value for gate in round_gates([rollouts], [aligned], 10, Gates(), tokens_before=20.0)}
    assert longer["length"] == pytest.approx(5.0)  # as far down as up
    nothing = round_gates([], [], 10, Gates(), None)
    assert {gate.ok for gate in nothing} == {None}


@pytest.mark.parametrize("counts", [[40], [40, 3, 40], [1] * 50])
def test_the_engine_is_held_against_the_trainer_in_every_shard(counts, tmp_path):
    """As many samples of each as there are and fit; of none off-policy."""
    run, shards = Run(str(tmp_path), "x"), []
    for number, count in enumerate(counts):
        rows = [
            {"prompt_token_ids": [number], "token_ids": [i], "logprobs": [-1.0] if i % 2 else None} for i in range(2 * count)
        ]
        make = partial(pa.Table.from_pylist, rows)
        shards.append(run.build_table(f"round=0001/rollouts/part-{number:05d}", {"n": number}, make, lambda _: None))
    drawn = Counter(ids[0] for ids in draw_samples(shards)["prompt_token_ids"].to_pylist())
    share = -(-32 // len(counts))
    assert drawn == Counter({number: min(share, count) for number, count in enumerate(counts)})


def test_of_long_samples_fewer_are_compared(tmp_path):
    """The first of each shard always; then in turn, while there are few tokens."""
    run, shards = Run(str(tmp_path), "x"), []
    for number, length in enumerate((20_000, 5_000, 40_000)):
        rows = [{"prompt_token_ids": [number] * 1000, "token_ids": [7] * (length - 1000), "logprobs": [-1.0]}] * 9
        make = partial(pa.Table.from_pylist, rows)
        shards.append(run.build_table(f"round=0001/rollouts/part-{number:05d}", {"n": number}, make, lambda _: None))
    assert [ids[0] for ids in draw_samples(shards)["prompt_token_ids"].to_pylist()] == [0, 1, 2]
    assert [ids[0] for ids in draw_samples(shards[:2])["prompt_token_ids"].to_pylist()] == [0, 1]
    assert len(draw_samples(shards[1:2])) == 6


def test_what_is_no_number_holds_no_limit():
    assert Gate("loss", math.nan, 1.0).ok is False
    assert Gate("loss", np.float64(2), 1.0).ok is False  # numpy's False is another object
    assert Gate("matched", math.nan, 1.0).ok is False
    with pytest.raises(Stopped, match="length: nan"):
        require([Gate("length", math.nan, 1.0)], "here")


def test_gates_come_back_from_their_table(tiny):
    for number in (1, 2):
        table = scan(str(tiny), "gates").filter(pl.col("round") == number).collect()
        gates = read_gates(table.to_arrow(), Gates())
        assert [gate.value for gate in gates] == table["value"].to_list()
        (truncated,) = table.filter(pl.col("gate") == "truncated")["value"]
        for limit in (truncated, truncated - 0.01):
            judged = {gate.name: gate.ok for gate in read_gates(table.to_arrow(), Gates(truncated=limit))}
            assert judged["truncated"] == (limit >= truncated)
            assert judged["tokens"] is None
            assert None not in (judged["supervised"], judged["engine, mean"], judged["engine, largest"])
        assert {gate.name for gate in gates} == {
            "supervised", "dropped", "truncated", "repetition", "tokens", "length", "engine, mean", "engine, largest",
        }  # fmt: skip
    (drift,) = table.filter(pl.col("gate") == "length")["value"]
    lengths = scan(str(tiny), "rollouts").filter(pl.col("source") == "student").group_by("round")
    one, two = lengths.agg(pl.col("token_ids").list.len().mean()).sort("round").collect()["token_ids"]
    assert drift == pytest.approx(max(one / two, two / one))


def test_the_lead_is_held_against_by_its_upper_end():
    """The 95% interval of the mean difference of prompts, by its plain formula; chance stops no run."""
    rng = np.random.default_rng(1)
    limits = Recipe.model_fields["gates"].default

    def evals(shares: np.ndarray) -> pa.Table:
        rows = [
            {"prompt_id": str(n), "decoding": "sampled", "correct": bool(rng.random() < share)}
            for n, share in enumerate(shares)
            for _ in range(4)
        ]
        return pa.Table.from_pylist(rows)

    def means(table: pa.Table) -> np.ndarray:
        correct = table["correct"].to_numpy(zero_copy_only=False).reshape(-1, 4)
        order = np.argsort([str(n) for n in range(len(correct))])
        return correct.mean(1)[order]

    teacher, student = evals(np.full(50, 0.5)), evals(np.full(50, 0.55))
    apart = means(teacher) - means(student)
    gate = lead_gate(limits, teacher=teacher, student=student)
    assert gate.value == pytest.approx(apart.mean() + 1.96 * apart.std(ddof=1) / math.sqrt(50))
    assert gate.ok
    assert lead_gate(limits, teacher=evals(np.full(50, 0.1)), student=evals(np.full(50, 0.9))).ok is False
    ungraded = pa.Table.from_pylist([{"prompt_id": "none", "decoding": "sampled", "correct": None}], teacher.schema)
    both = {"teacher": pa.concat_tables([teacher, ungraded]), "student": pa.concat_tables([student, ungraded])}
    assert lead_gate(limits, **both) == gate  # what has no reference is no wrong answer
    assert lead_gate(limits, teacher=ungraded, student=ungraded).value is None
    nothing = lead_gate(limits, teacher=evals(np.zeros(5)), student=evals(np.zeros(5)))
    assert (nothing.ok, nothing.record()["limit"]) == (None, "at least 0")
    assert nothing.detail.endswith("for free text, which is seldom equal to its reference, go by the divergence")
    assert all(
        a <= b for a, b in pairwise([0.0, lead_gate(limits, teacher=evals(np.ones(5)), student=evals(np.zeros(5))).value])
    )

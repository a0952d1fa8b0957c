"""A cache: exported from a run, it teaches in the place of the teacher, and what cannot be done with it is refused."""

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w
from helpers import TINY, files, refused

from configs.errors import BadInput
from configs.load import load_recipe
from flows.distill import distill
from storage.caches import CacheWriter, open_cache
from storage.lineage import digest_file
from storage.read import scan
from storage.schemas import CACHED_TEXTS
from storage.store import Run
from tasks.caches.export import export_cache
from tasks.models.reference import make_reference, refer_to_cache
from tasks.preflight import examine

# Every training prompt has a text, and a teacher that writes what is likely writes what can be spelled.
LAWS = {"rollout__on_policy": 0.0, "rollout__off_policy": "teacher", "score__signal": "bytes", "prompts__train": 64}
LAWS |= {"rollout__top_k": 5}
FROM_CACHE = {**LAWS, "score__k": None}


@pytest.fixture
def taught(recipe, models, tmp_path) -> Callable[..., Path]:
    """A run by a teacher that is gone when it is over, so that nothing can come from it any more."""

    def run(name: str = "taught", **changes: Any) -> Path:
        folder = tmp_path / "gone"
        shutil.copytree(models["teacher"], folder)
        path = recipe(name=name, teacher={"model": str(folder)}, **{**LAWS, **changes})
        distill(str(path), rounds=1)
        shutil.rmtree(folder)
        return tmp_path / "runs" / name

    return run


def learn(
    recipe: Callable[..., Path], cache: Path, tmp_path: Path, name: str = "learnt", rounds: int = 1, **changes: Any
) -> Path:
    """A run by a cache, under a root of its own: nothing is taken over."""
    given = {"root": str(tmp_path / "elsewhere"), "teacher": {"cache": str(cache)}, **FROM_CACHE, **changes}
    distill(str(recipe(name=name, **given)), rounds=rounds)
    return tmp_path / "elsewhere" / name


def table_of(run: Path, table: str) -> pa.Table:
    """A table of a run's rounds in order, without what names a machine's versions."""
    parts = sorted(run.glob(f"round=*/{table}/*.parquet"))
    return pa.concat_tables([pq.read_table(part) for part in parts]).drop_columns(["engine"] if table == "rollouts" else [])


@pytest.mark.parametrize(("source", "role"), [("teacher", "student"), ("reference", "student"), ("teacher", "teacher")])
def test_a_cache_teaches_as_its_teacher_did(source, role, taught, recipe, models, tmp_path):
    """The same rows, targets and weights as with the teacher there, bit for bit: nothing is rounded here.

    The student has a tokenizer of its own, or the teacher's.
    """
    student = {"model": str(models[role])}
    before = taught(rollout__off_policy=source, student=student)
    told = export_cache(str(before), str(tmp_path / "cache"), error=0, top_p=1.0)
    assert told["texts"] == 64
    after = learn(recipe, tmp_path / "cache", tmp_path, student=student)
    assert str(tmp_path) not in (after / "round=0001" / "README.md").read_text()
    assert table_of(after, "rollouts").equals(table_of(before, "rollouts"))
    assert set(table_of(after, "rollouts")["source"].to_pylist()) == {source}
    assert table_of(after, "aligned").equals(table_of(before, "aligned"))
    steps = [scan(str(run), "steps").drop("seconds").sort("step").collect() for run in (before, after)]
    assert steps[0].equals(steps[1])
    students = [dict(Run(str(run.parent), run.name).manifests())["round=0001/student"]["digest"] for run in (before, after)]
    assert students[0] == students[1]
    scores = [table_of(run, "scores") for run in (before, after)]
    assert scores[0].schema.equals(scores[1].schema)
    for name in ("rollout_id", "teacher", "token_ids", "logprobs", "law_counts", "rest", "status"):
        assert scores[0][name].equals(scores[1][name]), name


def test_rounding_is_within_its_limit(taught, tmp_path):
    before, tables = taught(), {}
    for error in (0.0, 0.001):
        out = tmp_path / f"cache-{error}"
        told = export_cache(str(before), str(out), error=error, top_p=1.0)
        tables[error] = pl.read_parquet(out / "texts" / "*.parquet")
        assert told["rounding"]["largest"] <= error
        assert (told["rounding"]["largest"] > 0) == (error > 0)
    size = {error: sum(file.stat().st_size for file in (tmp_path / f"cache-{error}" / "texts").iterdir()) for error in tables}
    assert size[0.001] < size[0.0]
    whole, rounded = (tables[error].with_row_index() for error in (0.0, 0.001))
    for name in ("prompt_id", "token_ids", "law_classes", "law_counts"):
        assert whole[name].equals(rounded[name])
    # By hand, token by token: the sum over events of p |Δ log p|.
    for before_row, after_row in zip(whole.to_dicts(), rounded.to_dicts(), strict=True):
        place = 0
        for count, rest, other in zip(before_row["law_counts"], before_row["rest"], after_row["rest"], strict=True):
            pairs = zip(before_row["law_logprobs"][place:][:count], after_row["law_logprobs"][place:][:count], strict=True)
            change = sum(np.exp(p) * abs(q - p) for p, q in pairs)
            change += np.exp(rest) * abs(other - rest) if np.isfinite(rest) else 0
            assert change <= 0.001
            place += count
        gaps = np.abs(np.array(before_row["logprobs"]) - after_row["logprobs"])
        assert gaps.max() <= 0.001


def test_a_cut_cache_has_the_likeliest_events(taught, tmp_path):
    """The fewest that have the mass that is asked for; what is dropped goes to the rest. By hand, token by token."""
    before = taught(score__k=257)
    for top_p in (0.9, 1.0):
        export_cache(str(before), str(tmp_path / f"cache-{top_p}"), error=0, top_p=top_p)
    rows = [pl.read_parquet(tmp_path / f"cache-{top_p}" / "texts" / "*.parquet").to_dicts() for top_p in (1.0, 0.9)]
    fewer = 0
    for whole, cut in zip(*rows, strict=True):
        at, there = 0, 0
        for token, (count, kept) in enumerate(zip(whole["law_counts"], cut["law_counts"], strict=True)):
            law, short = (
                dict(zip(row["law_classes"][start:][:n], np.exp(row["law_logprobs"][start:][:n]), strict=True))
                for row, start, n in ((whole, at, count), (cut, there, kept))
            )
            assert short.items() <= law.items()
            dropped = [law[event] for event in law.keys() - short.keys()]
            fewer += len(dropped)
            if dropped:
                assert min(short.values()) >= max(dropped)
                assert sum(short.values()) >= 0.9 - 1e-6
            assert sum(short.values()) - min(short.values()) < 0.9 + 1e-6
            assert np.exp(cut["rest"][token]) == pytest.approx(np.exp(whole["rest"][token]) + sum(dropped), rel=1e-5)
            at, there = at + count, there + kept
    assert fewer > 1000
    assert json.loads((tmp_path / "cache-0.9" / "cache.json").read_text())["signal"]["top_p"] == 0.9


def test_a_third_tokenizer_learns_from_the_prompts_of_a_cache(taught, recipe, tmp_path):
    """A new student of its own tokenizer, on a machine that has nothing but the cache."""
    export_cache(str(taught()), str(tmp_path / "cache"), error=0.001, top_p=1.0)
    prompts = {"source": "cache", "dataset": str(tmp_path / "cache"), "eval": 8}
    shape = {"vocab_size": 310, "layers": 1, "width": 32, "heads": 2, "feed_forward": 64, "context": 64}
    given = {"student": {"scratch": shape}, "prompts": prompts, "rollout__prompts": 56, "train__learning_rate": 3e-3}
    run = learn(recipe, tmp_path / "cache", tmp_path, rounds=2, **given)
    evals = scan(str(run), "evals").filter(decoding="cached").collect()
    held_out = set(scan(str(run), "prompts").filter(split="eval").collect()["prompt_id"])
    assert set(evals["prompt_id"]) == held_out
    assert len(held_out) == 8
    mean = evals.group_by("round").agg(pl.col("divergence").mean()).sort("round")["divergence"].to_list()
    assert mean[0] > mean[1] > mean[2] > 0
    assert not set(scan(str(run), "rollouts").collect()["prompt_id"]) & held_out


def test_a_student_that_is_the_teacher_is_at_no_distance_from_its_cache(taught, recipe, models, tmp_path):
    """And another one is at some, before it is trained."""
    export_cache(str(taught(score__k=257)), str(tmp_path / "cache"), error=0, top_p=1.0)
    prompts = {"source": "cache", "dataset": str(tmp_path / "cache"), "eval": 16}
    found = {}
    for role in ("teacher", "student"):
        given = {"student": {"model": str(models[role])}, "prompts": prompts}
        run = learn(recipe, tmp_path / "cache", tmp_path / role, rounds=0, **given)
        evals = scan(str(run), "evals").filter(decoding="cached").collect()
        found[role] = evals["divergence"].drop_nulls().to_numpy()
    assert np.abs(found["teacher"]).max() < 1e-3
    assert found["student"].mean() > 0.05


def test_texts_of_a_prompt_take_turns(taught, recipe, tmp_path, caplog):
    before = taught(rollout__samples=3, rollout__prompts=16)
    export_cache(str(before), str(tmp_path / "cache"), error=0.001, top_p=1.0)
    prompts = {"source": "cache", "dataset": str(tmp_path / "cache"), "eval": 4}
    run = learn(recipe, tmp_path / "cache", tmp_path, rounds=3, prompts=prompts, rollout__prompts=12, rollout__samples=1)
    there = pl.read_parquet(tmp_path / "cache" / "texts" / "*.parquet")
    used = scan(str(run), "completions").collect().group_by("prompt_id").agg(pl.col("token_ids").n_unique().alias("used"))
    assert "for the second time" not in caplog.text
    learn(recipe, tmp_path / "cache", tmp_path / "more", prompts=prompts, rollout__prompts=12, rollout__samples=9)
    assert "of 40 rows have a text for the second time" in caplog.text
    counts = used.join(there.group_by("prompt_id").agg(pl.len().alias("there")), on="prompt_id")
    assert counts["used"].equals(counts["there"].rename("used"))


def test_only_texts_that_the_student_did_not_write_are_exported_and_each_once(taught, tmp_path):
    before = taught("half", rollout__on_policy=0.5)
    told = export_cache(str(before), str(tmp_path / "cache"), error=0.001, top_p=1.0)
    sources = scan(str(before), "rollouts").collect()["source"]
    assert told["on_policy"] == (sources == "student").sum() > 0
    assert told["texts"] + told["twice"] + told["unscored"] == (sources == "teacher").sum()
    text = pl.read_parquet(tmp_path / "cache" / "texts" / "*.parquet")
    assert text.select("prompt_id", "token_ids").is_unique().all()
    card = (tmp_path / "cache" / "README.md").read_text()
    assert "license: unknown" in card
    assert f"Left out were {told['on_policy']} samples of a student" in card
    assert str(tmp_path) not in card + (tmp_path / "cache" / "cache.json").read_text()


def test_preflight_needs_no_teacher(taught, recipe, models, tmp_path):
    export_cache(str(taught()), str(tmp_path / "cache"), error=0.001, top_p=1.0)
    path = recipe(**{"teacher": {"cache": str(tmp_path / "cache")}, **FROM_CACHE})
    given = load_recipe(path)
    student = make_reference(given.student, str(models["student"]))
    gates = {
        gate.name: gate for gate in examine(given, 8, student=student, teachers={"": refer_to_cache(str(tmp_path / "cache"))})
    }
    assert {"student: chance", "own teacher", "supervised", "loss", "hours"} <= gates.keys()
    assert not {"lead", "noise", "teacher's engine", "teacher: chance", "expected"} & gates.keys()
    assert gates["own teacher"].value == pytest.approx(0, abs=1e-3)
    assert gates["supervised"].value > 0.3


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ready(tiny, models, tmp_path_factory) -> Path:
    """A cache of the session's small models."""
    folder = tmp_path_factory.mktemp("ready")
    data = tomllib.loads(TINY.read_text())
    data |= {"root": str(folder / "runs"), **{role: {"model": str(models[role])} for role in ("student", "teacher")}}
    for place, value in LAWS.items():
        table, name = place.split("__")
        data[table][name] = value
    (folder / "tiny.toml").write_text(tomli_w.dumps(data))
    distill(str(folder / "tiny.toml"), rounds=1)
    export_cache(str(folder / "runs" / "tiny"), str(folder / "cache"), error=0.001, top_p=1.0)
    return folder / "cache"


def copied(ready: Path, tmp_path: Path) -> Path:
    shutil.copytree(ready, tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"rollout__on_policy": 0.5}, ["rollout.on_policy = 0.5", "need the teacher itself", "set rollout.on_policy = 0"]),
        ({"rollout__off_policy": "reference"}, ["set rollout.off_policy = 'teacher'"]),
        ({"score__signal": "topk"}, ["score.signal = 'topk'", "set score.signal = 'bytes'"]),
        ({"score__k": 8}, ["score.k", "leave it out"]),
        ({"score__top_p": 0.5}, ["score.top_p", "leave it out"]),
        ({"objective__name": "gold"}, ["objective.name = 'gold' cannot be computed from score.signal = 'bytes'"]),
        ({"teacher__dtype": "float16"}, ["teacher: dtype is about a model", "leave it out"]),
        ({"teacher__model": "x"}, ["exactly one of model, recipe, scratch, cache"]),
        ({"student": {"cache": "x"}}, ["student.cache", "no weights to train"]),
    ],
)
def test_what_needs_the_teacher_is_refused(changes, parts, ready, recipe, potstill, tmp_path):
    path = recipe(**{"teacher": {"cache": str(ready)}, **FROM_CACHE, **changes})
    refused(potstill("run", path), *parts)
    assert not (tmp_path / "runs").exists()


def test_prompts_without_a_text_are_refused(ready, recipe, potstill, tmp_path):
    path = recipe(**{"teacher": {"cache": str(ready)}, **FROM_CACHE, "seed": 5})
    refused(potstill("run", path), "teacher.cache", "has no text of prompt", "more", "prompts.source = 'cache'")
    assert not (tmp_path / "runs").exists()


def corrupt(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (lambda cache: shutil.rmtree(cache), ["no cache in a folder of this name"]),
        (lambda cache: (cache / "cache.json").unlink(), ["not a cache (no cache.json in it)"]),
        (lambda cache: (cache / "cache.json").write_text("{"), ["cache.json: not the description of a cache"]),
        (lambda cache: corrupt(cache / "texts" / "part-00000.parquet"), ["texts/part-00000.parquet: its content was altered"]),
        (lambda cache: corrupt(cache / "vocab.parquet"), ["vocab.parquet: its content was altered"]),
        (lambda cache: (cache / "prompts.parquet").unlink(), ["prompts.parquet: missing"]),
    ],
)
def test_a_damaged_cache_is_refused(spoil, parts, ready, recipe, potstill, tmp_path):
    cache = copied(ready, tmp_path)
    path = recipe(**{"teacher": {"cache": str(cache)}, **FROM_CACHE})
    spoil(cache)
    refused(potstill("run", path), *parts)
    assert not (tmp_path / "runs").exists()


def retell(cache: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    told = json.loads((cache / "cache.json").read_text())
    change(told)
    (cache / "cache.json").write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda told: told.update(format=2), "a cache of format 2, and this version of potstill reads 1"),
        (lambda told: told["files"].update({"../../secret": "0" * 64}), "names '../../secret', which is no file of a cache"),
        (lambda told: told["files"].pop("vocab.parquet"), "does not name prompts.parquet and vocab.parquet"),
        (lambda told: told.update(files=[]), "does not name prompts.parquet and vocab.parquet"),
        (lambda told: told.pop("teacher"), "not the description of a cache"),
    ],
)
def test_a_cache_that_says_something_else_is_refused(change, part, ready, tmp_path):
    retell(cache := copied(ready, tmp_path), change)
    with pytest.raises(BadInput, match=part.replace("(", r"\(").replace(".", r"\.")):
        open_cache(str(cache))


def rewrite(cache: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Another content of the first text, of which the digests are right."""
    file, parts = cache / "texts" / "part-00000.parquet", sorted((cache / "texts").iterdir())
    rows = pa.concat_tables(map(pq.read_table, parts)).to_pylist()
    change(rows[0])
    shutil.rmtree(cache / "texts")
    CacheWriter(cache).add_texts(pa.Table.from_pylist(rows, CACHED_TEXTS))

    def tell(told: dict[str, Any]) -> None:
        others = {name: digest for name, digest in told["files"].items() if not name.startswith("texts/")}
        told["files"] = {**others, "texts/part-00000.parquet": digest_file(file)}

    retell(cache, tell)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda row: row["token_ids"].__setitem__(0, 9999), "token ids beyond its vocabulary"),
        (lambda row: row["token_ids"].append(1), "lists of different lengths"),
        (lambda row: row["law_counts"].__setitem__(0, 1 + row["law_counts"][0]), "counts that do not add up"),
        (lambda row: row["law_classes"].__setitem__(0, 257), "next bytes that are none"),
        (lambda row: row["law_logprobs"].__setitem__(0, 2.0), "log-probs that are none"),
        (lambda row: row["rest"].__setitem__(0, float("nan")), "log-probs that are none"),
        (lambda row: row.update(logprobs=None), "a null in it"),
    ],
)
def test_laws_that_cannot_be_are_refused(change, part, ready, recipe, tmp_path):
    rewrite(cache := copied(ready, tmp_path), change)
    path = recipe(**{"teacher": {"cache": str(cache)}, **FROM_CACHE})
    with pytest.raises(BadInput, match=part):
        distill(str(path), rounds=1)


def test_a_run_does_not_go_on_with_another_cache(ready, recipe, tmp_path):
    cache = copied(ready, tmp_path)
    path = recipe(**{"teacher": {"cache": str(cache)}, **FROM_CACHE})
    distill(str(path), rounds=1)
    before = files(tmp_path / "runs")
    rewrite(cache, lambda row: row["logprobs"].__setitem__(0, -1.0))
    with pytest.raises(BadInput, match="began with another teacher: the laws of"):
        distill(str(path), rounds=2)
    assert files(tmp_path / "runs") == before


def test_scores_are_taken_over_by_digest_and_lead_to_the_cache(ready, recipe, potstill, tmp_path):
    one = recipe(**{"name": "one", "teacher": {"cache": str(ready)}, **FROM_CACHE})
    distill(str(one), rounds=1)
    cache = copied(ready, tmp_path)  # elsewhere: the same digest
    two = recipe(**{"name": "two", "teacher": {"cache": str(cache)}, **FROM_CACHE, "objective__beta": 0.5})
    distill(str(two), rounds=1)
    manifests = dict(Run(str(tmp_path / "runs"), "two").manifests())
    assert manifests["round=0001/scores/part-00000"]["taken_from"] == "one"
    assert "taken_from" not in manifests["round=0001/aligned/part-00000"]
    ended = potstill("inspect", tmp_path / "runs" / "two", "--lineage")
    assert ended.status == 0, ended.err
    assert open_cache(str(cache)).digest[:12] in ended.out
    assert potstill("inspect", tmp_path / "runs" / "two", "--verify").status == 0
    assert potstill("inspect", tmp_path / "runs" / "two", "--round", "1").status == 0
    assert potstill("report", tmp_path / "runs" / "two").status == 0
    assert potstill("inspect", tmp_path / "runs" / "two", "--rollout", "0001-000000-000").status == 0


def test_the_cache_of_a_hub(ready, recipe, tmp_path, monkeypatch):
    """A snapshot that this machine has fetched is used without a network; without one there is one message."""
    hub, commit = tmp_path / "hub" / "datasets--me--laws", "0" * 40
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    path = recipe(**{"teacher": {"cache": "me/laws"}, **FROM_CACHE})
    with pytest.raises(BadInput, match="me/laws: no cache in a folder of this name, nor a data set of the hub"):
        distill(str(path), rounds=1)
    assert not (tmp_path / "runs").exists()
    shutil.copytree(ready, hub / "snapshots" / commit)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(commit)
    assert distill(str(path), rounds=1)["rounds"] == 1
    scores = dict(Run(str(tmp_path / "runs"), "tiny").manifests())["round=0001/scores/part-00000"]
    assert scores["inputs"]["teacher"]["digest"] == open_cache(str(ready)).digest


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_cache_once(ready, potstill, tmp_path):
    run, out = ready.parent / "runs" / "tiny", tmp_path / "out"
    ended = potstill("cache", "export", run, out)
    assert ended.status == 0, ended.err
    assert "bytes per token on disk" in ended.out
    assert open_cache(str(out)).digest == open_cache(str(ready)).digest, "the same run gives the same cache"
    before = files(tmp_path)
    refused(potstill("cache", "export", run, out), "out: exists and is not empty; give a new folder")
    refused(potstill("cache", "export", run, tmp_path / "more", "--error", "3"), "--error 3.0: give nats")
    refused(potstill("cache", "export", tmp_path, tmp_path / "more"), "not a run")
    assert files(tmp_path) == before


def test_a_run_without_laws_is_no_cache(tiny, potstill, tmp_path):
    refused(potstill("cache", "export", tiny, tmp_path / "out"), "score.signal = 'topk'", "score.signal = 'bytes'")
    assert not (tmp_path / "out").exists()


def test_a_run_of_samples_alone_is_no_cache(recipe, potstill, tmp_path):
    distill(str(recipe(name="own", score__signal="bytes", rollout__on_policy=1.0)), rounds=1)
    refused(potstill("cache", "export", tmp_path / "runs" / "own", tmp_path / "out"), "64 are the student's own samples")
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith((".out", "out"))] == []

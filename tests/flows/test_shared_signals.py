"""What is stored of the teacher, and who can use it again."""

from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

from flows.distill import distill
from storage.read import scan
from storage.schemas import COMPLETIONS
from storage.store import Run

OTHER = {"vocab_size": 280, "layers": 1, "width": 32, "heads": 2, "feed_forward": 64, "context": 64}


def taken(run: Path) -> set[str]:
    return {slot for slot, manifest in Run(str(run.parent), run.name).manifests() if "taken_from" in manifest}


def test_two_students_learn_from_one_cache_of_teacher_text(recipe, tmp_path):
    """`bytes` has no student's tokenizer in it: a second student, with other tokens, has nothing written or scored for it."""
    changes = {
        "rollout__on_policy": 0.0,
        "rollout__off_policy": "teacher",
        "rollout__max_new_tokens": 40,
        "score__signal": "bytes",
        "score__k": 64,
    }
    root = tmp_path / "runs"
    distill(str(recipe(name="first", **changes)), rounds=2)
    distill(str(recipe(name="second", student={"scratch": OTHER}, **changes)), rounds=2)
    stages = ("completions", "scores")
    expected = {f"round=000{n}/{stage}/part-0000{part}" for n in (1, 2) for stage in stages for part in (0, 1)}
    assert taken(root / "second") >= expected
    assert not taken(root / "first") & expected
    assert not any("/rollouts/" in slot or "/aligned/" in slot for slot in taken(root / "second"))
    for name in ("completions", "scores"):
        files = [root / run / "round=0001" / name / "part-00000.parquet" for run in ("first", "second")]
        assert files[0].samefile(files[1])
    assert pq.read_schema(root / "first" / "round=0001" / "completions" / "part-00000.parquet").equals(COMPLETIONS)

    rollouts = scan(str(root / "*"), "rollouts").collect()
    by_run = rollouts.group_by("run", maintain_order=True).agg("rollout_id", "text", "token_ids")
    assert by_run["text"][0].to_list() == by_run["text"][1].to_list()
    assert by_run["token_ids"][0].to_list() != by_run["token_ids"][1].to_list()
    aligned = scan(str(root / "*"), "aligned").group_by("run").agg(pl.col("supervised_bytes").sum()).collect()
    assert (aligned["supervised_bytes"] > 0).all()
    steps = scan(str(root / "*"), "steps").collect()
    assert set(steps["run"]) == {"first", "second"}
    assert (steps["grad_norm"] > 0).all()


def test_hidden_states_are_cut_at_alignment(recipe, tmp_path):
    """The teacher's head is kept once a run, and another k or objective takes over the scores as they are."""
    root = tmp_path / "runs"
    distill(str(recipe(name="all", score__signal="hidden", score__k=300)), rounds=1)
    distill(str(recipe(name="few", score__signal="hidden", score__k=4, objective={"name": "gold"})), rounds=1)
    assert (root / "all" / "teacher" / "head.safetensors").is_file()
    scores = {f"round=0001/scores/part-0000{part}" for part in (0, 1)}
    assert taken(root / "few") >= scores | {"teacher"}
    counts = {
        run: scan(str(root / run), "aligned").select(pl.col("target_counts").explode()).collect() for run in ("all", "few")
    }
    assert counts["few"]["target_counts"].max() <= 4 < counts["all"]["target_counts"].max()
    assert scan(str(root / "few"), "scores").select(pl.col("top_ids").is_null().all()).collect().item()


@pytest.mark.parametrize("signal", ["sampled", "bytes", "hidden"])
def test_a_signal_trains_what_needs_less(recipe, tmp_path, signal):
    result = distill(str(recipe(name=signal, score__signal=signal, objective={"name": "alm"})), rounds=1)
    assert result["rounds"] == 1
    assert (scan(str(tmp_path / "runs" / signal), "steps").collect()["loss"] > 0).all()

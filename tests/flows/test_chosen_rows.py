"""Rows chosen by reward, in a run: what is left out is not scored and not trained on, and everything says so."""

import re

import polars as pl
import pyarrow.parquet as pq

from flows.distill import distill
from storage.read import scan
from storage.schemas import REWARDS
from storage.store import Run
from tasks.views.inspect import show_round
from tasks.views.report import render_report


def test_rows_are_chosen_by_their_score(recipe, tmp_path):
    root = tmp_path / "runs"
    changes = {"rollout__samples": 4, "rollout__prompts": 16, "rollout__shard_rows": 30}  # prompts lie in two shards
    distill(str(recipe(name="plain", **changes)), rounds=1)
    assert not any("/rewards" in slot for slot, _ in Run(str(root), "plain").manifests())
    distill(str(recipe(name="some", rollout__keep=1, **changes)), rounds=1)
    run = Run(str(root), "some")
    manifests = dict(run.manifests())
    assert "taken_from" in manifests["round=0001/rollouts/part-00000"]
    assert manifests["round=0001/rewards/part-00000"]["rows"] > 0

    rewards, rollouts, scores, aligned = (
        scan(str(root / "some"), table).collect() for table in ("rewards", "rollouts", "scores", "aligned")
    )
    own = rollouts.filter(source="student")
    assert pq.read_schema(next((root / "some").glob("**/rewards/*.parquet"))).equals(REWARDS)
    assert rewards["rollout_id"].to_list() == own["rollout_id"].to_list()
    kept = own.join(rewards, on="rollout_id").filter("kept")
    assert (kept.group_by("prompt_id").len()["len"] == 1).all()
    assert set(kept["prompt_id"]) == set(own["prompt_id"])
    gone = set(rewards.filter(~pl.col("kept"))["rollout_id"])
    assert gone
    for table in (scores, aligned):
        assert set(table.filter(status="left_out")["rollout_id"]) == gone
    assert scores.filter(status="left_out")["token_ids"].null_count() == len(gone)
    trained = aligned.filter(pl.col("status") == "ok", pl.col("units") > 0)
    assert scan(str(root / "some"), "steps").collect()["rows"].sum() == len(trained)
    shown = show_round(str(root / "some"), 1)["Samples that went on to training (rollout.keep)"]
    assert [(row["samples"], row["count"]) for row in shown] == [("went on", len(kept)), ("left out", len(gone))]
    assert re.search(rf"<td>left out</td><td>{len(gone)}</td>", render_report(run))

    before = {slot: manifest["digest"] for slot, manifest in manifests.items()}
    distill(str(recipe(name="some", rollout__keep=1, **changes)), rounds=1)
    assert {slot: manifest["digest"] for slot, manifest in run.manifests()} == before


def test_rewards_teach_beside_the_objective_and_alone(recipe, tmp_path):
    root = tmp_path / "runs"
    changes = {"rollout__samples": 4, "rollout__prompts": 16, "rollout__shard_rows": 30}
    distill(str(recipe(name="plain", **changes)), rounds=1)
    distill(str(recipe(name="both", reward__weight=0.5, **changes)), rounds=1)
    distill(
        str(recipe(name="alone", reward__weight=0.5, rollout__on_policy=1.0, objective={"name": "reward"}, **changes)), rounds=1
    )
    manifests = {name: dict(Run(str(root), name).manifests()) for name in ("plain", "both", "alone")}
    assert "taken_from" in manifests["both"]["round=0001/scores/part-00000"]  # the teacher's signal is the same
    assert not any("/scores" in slot for slot in manifests["alone"])

    rewards = scan(str(root / "both"), "rewards").collect()
    assert rewards["kept"].all()
    assert (rewards["advantage"] != 0).any()
    steps = {name: scan(str(root / name), "steps").collect() for name in manifests}
    assert steps["both"]["loss"].to_list() != steps["plain"]["loss"].to_list()
    aligned = scan(str(root / "alone"), "aligned").collect()
    worth = scan(str(root / "alone"), "rewards").collect().filter(pl.col("advantage") != 0)
    assert steps["alone"]["rows"].sum() == len(aligned.filter(status="ok").join(worth, on="rollout_id")) > 0
    assert steps["alone"]["units"].sum() == 0

"""`potstill compare`: one cache, several objectives, paired by prompts and seeds."""

import re

import numpy as np
import polars as pl
import pytest
from helpers import files, refused

from flows.compare import compare
from storage.read import scan
from storage.store import Run
from tasks.views.compare import compare_runs
from tasks.views.estimates import estimate_difference

OBJECTIVES = ("bytes", "gold:merge=sum", "alm")


@pytest.fixture(scope="module")
def made(server, models, tmp_path_factory):
    """The root of the runs of three objectives and two seeds, one round each, and the rows that were shown."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "pair.toml").write_text(PAIR.format(**models))
    rows = compare(str(folder / "pair.toml"), OBJECTIVES, (0, 1), overrides=(f"root={folder / 'runs'}",))
    return folder, rows


PAIR = """
name = "pair"
[student]
model = "{student}"
[teacher]
model = "{teacher}"
[prompts]
source = "reasoning-gym"
task = "spell_backward"
options = {{ min_word_len = 3, max_word_len = 4 }}
template = "{{word}}"
train = 64
eval = 24
[rollout]
prompts = 32
max_new_tokens = 8
[objective]
name = "bytes"
beta = 0.5
[train]
learning_rate = 1e-3
batch_size = 16
micro_batch_size = 16
[evaluate]
samples = 2
[gates]
dropped = 1.0
truncated = 1.0
repetition = 1.0
supervised = 0.0
lead = -1.0
"""


def test_a_seeds_first_rollouts_and_scores_are_made_once(made):
    folder, _ = made
    names = {f"pair-{label}-seed{seed}" for label in ("bytes", "gold-merge-sum", "alm") for seed in (0, 1)}
    assert {path.name for path in (folder / "runs").iterdir()} == names
    for seed in (0, 1):
        runs = [Run(str(folder / "runs"), f"pair-{label}-seed{seed}") for label in ("bytes", "gold-merge-sum", "alm")]
        for stage in ("rollouts", "scores"):
            found = [run.manifest(f"round=0001/{stage}/part-00000") for run in runs]
            assert len({manifest["digest"] for manifest in found}) == 1
            assert ["taken_from" in manifest for manifest in found] == [False, True, True]
        assert len({run.manifest("round=0001/student")["digest"] for run in runs}) == 3
    objectives = [
        Run(str(folder / "runs"), f"pair-{name}-seed0").frozen_recipe().objective for name in ("bytes", "gold-merge-sum")
    ]
    assert objectives[0].beta == 0.5  # the recipe's own
    assert (objectives[1].merge, objectives[1].beta) == ("sum", 1.0)  # said, and its default


def test_rows_are_what_the_tables_say(made):
    folder, rows = made
    assert [row["objective"] for row in rows] == list(OBJECTIVES)
    assert rows[0]["difference"] == ""
    evals = scan(f"{folder}/runs/*", "evals").filter(round=1, model="student", decoding="sampled").collect()
    accuracy = dict(evals.group_by("run").agg(pl.col("correct").mean()).iter_rows())
    for row, label in zip(rows, ("bytes", "gold-merge-sum", "alm")):
        wanted = np.mean([accuracy[f"pair-{label}-seed{seed}"] for seed in (0, 1)])
        assert float(row["accuracy"]) == pytest.approx(wanted, abs=6e-4)
        if row["difference"]:
            value, low, high = map(float, re.findall(r"[+-]\d\.\d+", row["difference"]))
            first = np.mean([accuracy[f"pair-bytes-seed{seed}"] for seed in (0, 1)])
            assert value == pytest.approx(wanted - first, abs=6e-4)
            assert low <= value <= high


def test_a_second_call_does_nothing(made):
    folder, rows = made
    before = files(folder / "runs")
    assert compare(str(folder / "pair.toml"), OBJECTIVES, (0, 1), overrides=(f"root={folder / 'runs'}",)) == rows
    assert files(folder / "runs") == before


def test_the_command(potstill, made):
    folder, rows = made
    ended = potstill(
        "compare",
        folder / "pair.toml",
        "--objectives",
        ",".join(OBJECTIVES),
        "--seeds",
        "0,1",
        "--set",
        f"root={folder / 'runs'}",
    )
    assert ended.status == 0, ended.err
    for row in rows:
        assert row["objective"] in ended.out
        assert row["accuracy"] in ended.out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--objectives", "bytes"), ("objectives: bytes", "two or more")),
        (("--objectives", "bytes,bytes"), ("objectives: bytes, bytes", "twice")),
        (("--objectives", "bytes,gold", "--seeds", "1,1"), ("seeds: 1, 1", "twice")),
        (("--objectives", "bytes,gold", "--seeds", "1,a"), ("--seeds 1,a", "0,1,2")),
        (("--objectives", "bytes,gold", "--seeds", "-1"), ("--seeds -1",)),
        (("--objectives", "bytes,silver"), ("objective.name", "silver", "gold")),
        (("--objectives", "bytes,gold:merge=product"), ("objective.merge", "product", "chain")),
        (("--objectives", "bytes,gold:merge"), ("objective.merge", "field=value")),
        (("--objectives", "bytes,gold", "--rounds", "0"), ("--rounds 0", "1 or more")),
        (("--objectives", "bytes,gkd"), ("gkd", "one tokenizer")),
        ((), ("objectives",)),
    ],
)
def test_what_cannot_be_compared(potstill, made, tmp_path, arguments, parts):
    folder, _ = made
    refused(potstill("compare", folder / "pair.toml", *arguments, "--set", f"root={tmp_path / 'runs'}"), *parts)
    assert not (tmp_path / "runs").exists()


def test_an_interval_of_one_seed_is_the_prompts():
    """Against the normal approximation of a mean's interval."""
    apart = np.random.default_rng(1).normal(0.1, 0.5, 400)
    found = estimate_difference([apart])
    half = 1.96 * apart.std(ddof=1) / 20
    assert found.value == pytest.approx(apart.mean())
    assert (found.low, found.high) == pytest.approx((apart.mean() - half, apart.mean() + half), abs=0.15 * half)


def test_seeds_that_differ_widen_the_interval():
    """Two levels: the variance of seeds over their number, beside that of prompts; equal answers differ by nothing."""
    rng = np.random.default_rng(2)
    shifts = [-0.3, -0.1, 0.1, 0.3]
    found = estimate_difference([rng.normal(shift, 0.1, 500) for shift in shifts])
    between = 1.96 * np.std(shifts) / 2  # of a bootstrap: the variance of the four themselves
    assert found.high - found.low == pytest.approx(2 * between, rel=0.1)
    nothing = estimate_difference([np.zeros(5), np.zeros(5)])
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, 0)


def test_a_prompt_is_compared_with_itself(made, tmp_path):
    """Answers of known worth, in shuffled rows, and greedy ones alone: the difference and its interval by hand."""
    folder, _ = made
    rng, right = np.random.default_rng(3), {}
    for label in ("bytes", "alm"):
        copy = tmp_path / label / "round=0001"
        for table in ("evals", "steps"):
            (copy / table).mkdir(parents=True)
            frame = scan(f"{folder}/runs/pair-{label}-seed0", table).filter(round=1).collect()
            if table == "evals":
                frame = frame.filter(decoding="greedy").sort("prompt_id")
                right[label] = rng.random(len(frame)) < (0.3 if label == "bytes" else 0.7)
                frame = frame.with_columns(correct=pl.Series(right[label])).sample(fraction=1, shuffle=True, seed=1)
            frame.write_parquet(copy / table / "student.parquet")
    first, second = compare_runs({"bytes": [str(tmp_path / "bytes")], "alm": [str(tmp_path / "alm")]}, 1)
    assert (first["accuracy"], second["accuracy"]) == tuple(f"{right[label].mean():.3f}" for label in ("bytes", "alm"))
    apart = right["alm"].astype(float) - right["bytes"]
    value, low, high = map(float, re.findall(r"[+-]\d\.\d+", second["difference"]))
    half = 1.96 * apart.std() / len(apart) ** 0.5
    assert value == pytest.approx(apart.mean(), abs=6e-4)
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.3 * half)

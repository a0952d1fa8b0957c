"""Training from stored tables (MATHS.md §8; property 16): what Parquet and half precision keep, and how rows become batches."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import named
from toys import (
    SEEDS,
    Rows,
    ToySide,
    losses,
    random_rows,
    random_vocabulary,
    rollouts_table,
    scores_of,
    student_ref,
    topk_scores,
)
from training import CPU, OBJECTIVES, loss_and_gradient, plain_rows, student_module

from configs.objectives import Gkd, Objective, Sft
from storage.artifacts import Artifact, read_table, write_parquet
from tasks import objectives
from tasks.align import align_rollouts
from tasks.training.batches import ALIGNED_COLUMNS, ROLLOUT_COLUMNS, collate, optimizer_batches


@pytest.mark.parametrize("objective", OBJECTIVES, ids=named)
def test_parquet_keeps_every_loss(objective: Objective, tmp_path: Path) -> None:
    """Aligned tables come back from Parquet as they went: nothing is lost but what their types say."""
    table = plain_rows(objective)
    write_parquet(table, tmp_path / "aligned.parquet")
    back = read_table(Artifact(str(tmp_path / "aligned.parquet"), "", len(table)))
    assert back.equals(table)
    module = student_module(objective)
    first, second = (loss_and_gradient(module, collate(t, 0, CPU)) for t in (table, back))
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])


HALF = 2.0**-11  # the largest relative error of half precision


def stored(rows: Rows, tmp_path: Path, objective: Objective) -> torch.Tensor:
    """Losses of the rows by way of Parquet files of rollouts and scores, in the types of the public schemas."""
    results = []
    for ids, t in zip(rows.teacher_ids, rows.t, strict=True):
        best = np.argsort(-t, axis=1, kind="stable")
        actual = [np.logaddexp.reduce(p[rows.teacher.stop_ids]) if i in rows.teacher.stop_ids else p[i] for p, i in zip(t, ids)]
        results.append(
            topk_scores(
                np.array(actual, np.float32),
                best.ravel().astype(np.int32),
                np.take_along_axis(t, best, 1).ravel().astype(np.float16),
                np.full(len(ids), t.shape[1], np.int16),
                np.full(len(ids), -np.inf, np.float32),
            )
        )
    own, other = ToySide(rows.student), ToySide(rows.teacher)
    tables = {
        "rollouts": rollouts_table([[0]] * len(rows.stops), rows.student_ids, own, logprobs=rows.behaviour),  # type: ignore[arg-type]
        "scores": scores_of(results, rows.teacher_ids),
    }
    for name, table in tables.items():
        write_parquet(table, tmp_path / name)
        tables[name] = read_table(Artifact(str(tmp_path / name), ""))
    module = objectives.build(objective, student=rows.student, teacher=rows.teacher)
    aligned = align_rollouts(tables["rollouts"], tables["scores"], module, student=own, teacher=other)  # type: ignore[arg-type]
    for name in ROLLOUT_COLUMNS:
        aligned = aligned.append_column(name, tables["rollouts"][name])
    (chunk,) = collate(aligned, 0, CPU).chunks(10**9)
    span, terms = chunk.at, chunk.terms
    return module(torch.from_numpy(np.concatenate(rows.s))[span], terms)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_half_precision_of_stored_scores(beta: float, tmp_path: Path) -> None:
    """gkd from stored scores is within the error that half-precision log-probs allow: log t is off by at most 2⁻¹¹ of
    itself, which moves a term by at most Σ (s + t) · δ · (1 + |log t/s|), and as much again to renormalise (property 16)."""
    for seed in range(8):
        rng = np.random.default_rng(seed)
        toy = random_vocabulary(rng, stops=2, controls=0)
        rows = random_rows(rng, toy, toy, same_ids=True)
        objective = Gkd(name="gkd", beta=beta)
        exact, got = losses(objectives.build(objective, student=toy, teacher=toy), rows), stored(rows, tmp_path, objective)
        s, t = np.concatenate(rows.s), np.concatenate(rows.t)
        allowed = 2 * ((np.exp(s) + np.exp(t)) * HALF * abs(t) * (1 + abs(t - s))).sum(1)
        assert (abs(exact - got).numpy() <= allowed + 1e-5).all()
        assert (exact != got).any()  # there is an error


@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if o.name != "sft"], ids=named)
def test_stored_scores_of_two_vocabularies(objective: Objective, tmp_path: Path) -> None:
    """The other objectives lose no more by storage than a few times the largest error of a log-prob."""
    for seed in range(8):
        rng = np.random.default_rng(seed)
        rows = random_rows(rng, random_vocabulary(rng, stops=2), random_vocabulary(rng, stops=3))
        exact, got = (
            losses(objectives.build(objective, student=rows.student, teacher=rows.teacher), rows),
            stored(rows, tmp_path, objective),
        )
        delta = HALF * max(abs(t).max() for t in rows.t)
        tokens = max(end - start for t in rows.teacher_ids for start, end in [(0, len(t))])
        assert abs(exact - got).max() <= 4 * delta * tokens
        assert abs(exact - got).max() < 0.05 * exact.abs().max()


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, size=st.integers(1, 9), counts=st.lists(st.integers(0, 7), min_size=1, max_size=4))
def test_optimizer_batches(seed: int, size: int, counts: list[int]) -> None:
    """Every row that can be trained on comes once, whatever the shards; all batches but the last are full; seeded."""
    rng = np.random.default_rng(seed)
    table = plain_rows(Sft(name="sft"))
    statuses = table.schema.get_field_index("status")
    with_folder = Path(student_ref().path).parent / "batches"
    with_folder.mkdir(exist_ok=True)
    shards, wanted = [], []
    for shard, count in enumerate(counts):
        rows = table.take(rng.integers(0, len(table), count)) if count else table.slice(0, 0)
        good = rng.random(count) < 0.7
        rows = rows.set_column(statuses, "status", pa.array(np.where(good, "ok", "no_unit").astype(object), pa.string()))
        labels = [[shard, number] for number in range(count)]
        rows = rows.set_column(
            rows.schema.get_field_index("prompt_token_ids"), "prompt_token_ids", pa.array(labels, pa.list_(pa.int32()))
        )
        wanted += [label for label, keep in zip(labels, good, strict=True) if keep]
        paths = [str(with_folder / f"{kind}-{shard}.parquet") for kind in ("rollouts", "aligned")]
        for path, columns in zip(paths, (ROLLOUT_COLUMNS, ALIGNED_COLUMNS), strict=True):
            write_parquet(rows.select(columns), Path(path))
        shards.append(tuple(Artifact(path, "", count) for path in paths))
    batches = [batch["prompt_token_ids"].to_pylist() for batch in optimizer_batches(shards, size, seed)]
    assert sorted(label for batch in batches for label in batch) == wanted
    assert all(len(batch) == size for batch in batches[:-1])
    assert all(0 < len(batch) <= size for batch in batches)
    assert batches == [batch["prompt_token_ids"].to_pylist() for batch in optimizer_batches(shards, size, seed)]

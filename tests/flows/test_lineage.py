"""`inspect --lineage` and `--verify`: where a checkpoint comes from, and whether it is all as it was."""

import json
import shutil
from pathlib import Path

import pytest

from tasks.views.trace import ELSEWHERE, trace_lineage


def rows(run: Path, number: int | None = None) -> list[dict]:
    return next(iter(trace_lineage(str(run), number).values()))


@pytest.mark.parametrize("number", [1, 2, None])
def test_a_checkpoint_is_traced_to_all_of_its_round(tiny, number):
    found, last = rows(tiny, number), number or 2
    assert found[0]["artifact"] == f"round=000{last}/student"
    places = {row["artifact"].removesuffix(" (see above)") for row in found}
    shards = {f"round=000{last}/{table}/part-0000{part}" for table in ("rollouts", "scores", "aligned") for part in (0, 1)}
    assert shards | {"prompts/train", "vocab/student", "vocab/teacher"} <= places
    assert "round=0001/student of test-teacher-seed0" in places
    assert ("round=0001/student" if last == 2 else "round=0001/student of test-student-seed0") in places
    for row in found:  # each digest is the one that the named manifest has
        slot, _, run = row["artifact"].removesuffix(" (see above)").partition(" of ")
        if row["artifact"] != ELSEWHERE:
            manifest = json.loads((tiny.parent / (run or "tiny") / "_manifests" / f"{slot}.json").read_text())
            assert manifest["digest"].startswith(row["digest"])


def test_lineage_as_a_command(potstill, tiny):
    ended = potstill("inspect", tiny, "--lineage", "--round", 1)
    assert (ended.status, ended.err) == (0, "")
    assert "Lineage of round=0001/student of tiny" in ended.out
    assert "learning_rate" in ended.out
    assert "torch" in ended.out
    ended = potstill("inspect", tiny, "--lineage", "--round", 7)
    assert ended.status == 2
    assert "no checkpoint of round 7; there are 1 to 2" in ended.err


def test_verify(potstill, tiny, tmp_path):
    run = tmp_path / "copied" / "tiny"
    shutil.copytree(tiny, run)
    ended = potstill("inspect", run, "--verify")
    assert ended.status == 0
    count = len(list((run / "_manifests").rglob("*.json"))) - 1  # the optimizer's state of round 1 was cleared
    assert f"{count} of {count} artifacts are what their manifests say; 1 more cleared" in ended.out
    (run / "round=0001/scores/part-00001.parquet").unlink()
    weights = run / "round=0002/student/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[1000] ^= 1
    weights.write_bytes(data)
    (run / "round=0002/trainer/extra").write_text("x")
    manifest = run / "_manifests/prompts/train.json"
    manifest.write_text(manifest.read_text().replace("spell_backward", "spell_forward"))
    boast = run / "_manifests/vocab/student.json"
    said = json.loads(boast.read_text())
    boast.write_text(json.dumps(said | {"rows": 10**30}))
    ended = potstill("inspect", run, "--verify")
    assert ended.status == 1
    for place, problem in {
        "round=0001/scores/part-00001": "missing",
        "round=0002/student ": "content was altered",
        "round=0002/trainer": "bytes",
        "prompts/train": "manifest was altered",
        "vocab/student": "its manifest says 1000000000000000000000000000000",
    }.items():
        assert any(place in line and problem in line for line in ended.out.splitlines()), place
    assert f"{count - 5} of {count}" in ended.out

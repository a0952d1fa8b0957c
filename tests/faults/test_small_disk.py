"""Ten rounds on a disk that does not hold what they write."""

import tomllib

import pytest
import tomli_w
from killing import TINY, Run, committed, damages, halves, redone, resize
from stopping import one_message

DISK = 60_000  # KiB
SHAPE = {"vocab_size": 330, "tokenizer_text": "references", "layers": 2, "width": 160, "heads": 2, "feed_forward": 320}


@pytest.mark.slow
def test_ten_rounds_on_a_small_disk(potstill, disk, tmp_path):
    """With all optimizer states they fill it. Cleared of them, by hand and then by default, it holds them, and more."""
    resize(disk, DISK)
    data = tomllib.loads(TINY.read_text())
    data |= {"root": str(disk / "runs"), "rounds": 10, "student": {"scratch": {**SHAPE, "context": 64}}}
    data["teacher"] = {"recipe": str(TINY.parent / "teacher.toml")}
    data["prompts"] |= {"eval": 4}
    data["rollout"] |= {"prompts": 16, "max_new_tokens": 6, "on_policy": 1.0}
    config, root, run = tmp_path / "tiny.toml", disk / "runs", disk / "runs" / "tiny"
    config.write_text(tomli_w.dumps(data))

    assert potstill.run("run", config, "--set", "keep.trainers=all") == 1, potstill.err
    assert "No space left on device" in one_message(potstill.err)
    full = committed(root)
    assert "tiny/round=0004/trainer" in full
    assert "tiny/round=0010/trainer" not in full
    assert potstill.run("clean", run, "--trainers", "1", "--yes") == 0, potstill.err
    assert redone(full, committed(root)) == set()

    assert potstill.run("run", config) == 0, potstill.err
    assert redone(full, committed(root)) == set(), "made again although it was committed"
    manifests = dict(Run(str(root), "tiny").manifests())
    assert sum(manifest["bytes"] for manifest in manifests.values()) > DISK * 1024, "more than the disk was written"
    trainers = {slot: bool(manifest.get("cleared")) for slot, manifest in manifests.items() if slot.endswith("/trainer")}
    assert trainers == {f"round={number:04d}/trainer": number < 10 for number in range(1, 11)}
    assert sorted(path.parent.name for path in run.glob("*/trainer")) == ["round=0010"]
    assert len(list(run.glob("*/student"))) == 11

    assert potstill.run("inspect", run, "--lineage") == 0, potstill.err
    assert "(keep.trainers" in potstill.out
    assert potstill.run("inspect", run, "--verify") == 0, potstill.err
    assert "9 more cleared" in potstill.out + potstill.err
    assert potstill.run("run", config, "--rounds", "11") == 0, potstill.err
    assert sorted(path.parent.name for path in run.glob("*/trainer")) == ["round=0011"]
    before = committed(root)
    told = ("--objectives", "bytes,gold", "--seeds", "0", "--rounds", "1")
    assert potstill.run("compare", config, *told) == 0, potstill.err
    assert redone(before, committed(root)) == set()
    assert damages(root) == {}
    assert halves(root) == []

"""What `report` and `inspect` say of a run with a damaged file: one line that names the artifact and what makes it again."""

import shutil
from pathlib import Path

import polars as pl
import pytest

SCORES, ROLLOUTS = "round=0001/scores/part-00000", "round=0001/rollouts/part-00000"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def reschema(path: Path) -> None:
    pl.DataFrame({"other": [1, 2, 3]}).write_parquet(path)


def retype(path: Path) -> None:
    pl.read_parquet(path).with_columns(text=pl.lit(7)).write_parquet(path)


@pytest.mark.parametrize(
    ("slot", "damage"),
    [
        (ROLLOUTS, cut),
        (ROLLOUTS, reschema),
        (ROLLOUTS, retype),
        (SCORES, Path.unlink),
        (SCORES, empty),
    ],
    ids=["cut", "schema", "type", "missing", "empty"],
)
def test_a_damaged_table_is_named(potstill, tiny, tmp_path, slot, damage):
    run = tmp_path / "tiny"
    shutil.copytree(tiny, run)
    (run / "report.html").unlink()
    damage(run / f"{slot}.parquet")
    ended = potstill("report", run)
    assert ended.status == 2, ended.err
    assert ended.err.count("\n") == 1, ended.err
    assert slot in ended.err
    assert "potstill run" in ended.err
    assert not (run / "report.html").exists()
    ended = potstill("inspect", run)
    assert ended.status == 0, ended.err
    assert "Damaged artifacts" in ended.out
    assert slot in ended.out
    ended = potstill("inspect", run, "--round", "1")
    assert ended.status in (0, 2)
    assert "Traceback" not in ended.err
    assert slot in ended.err + ended.out


def test_a_manifest_that_cannot_be_read_is_named(potstill, tiny, tmp_path):
    run = tmp_path / "tiny"
    shutil.copytree(tiny, run)
    (run / f"_manifests/{SCORES}.json").write_text("{")
    ended = potstill("report", run)
    assert ended.status == 2
    assert f"{SCORES}: its manifest cannot be read" in ended.err

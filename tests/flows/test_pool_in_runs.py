"""DESIGN.md §6: vLLM starts once a run, and what a run writes does not depend on what stays loaded."""

import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers import CHECKOUT

from flows.distill import distill
from tasks.engines import choose, pool
from tasks.engines.choose import release

FAKES = CHECKOUT / "tests" / "engines" / "fakes"


@pytest.fixture
def python(tmp_path) -> str:
    """An interpreter with the fake vLLM."""
    path = tmp_path / "python"
    code = f"import runpy; sys.path.insert(0, {str(FAKES)!r}); sys.argv = sys.argv[2:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    path.write_text(f"#!{sys.executable}\nimport sys\n{code}\n")
    path.chmod(0o755)
    return str(path)


def test_the_second_round_starts_no_engine(recipe, models, tmp_path, monkeypatch, python) -> None:
    """Its child and the teacher's stay; the student's takes the new weights. A fresh engine a use writes the same bytes."""
    log = tmp_path / "log"
    monkeypatch.setenv("FAKE_VLLM_LOG", str(log))
    vllm = {"engine": "vllm", "vllm_python": python}
    gates = {
        "engine_mean": 1000.0,
        "engine_max": 1000.0,
        "truncated": 1.0,
        "repetition": 1.0,
        "lead": -1.0,
        "length": 1000.0,
        "supervised": 0.0,
        "dropped": 1.0,
    }
    roles = {role: {"model": str(models[role]), **vllm} for role in ("student", "teacher")}

    def run(name: str) -> dict[str, object]:
        release()
        log.write_text("")
        distill(str(recipe(name=name, root=str(tmp_path / name), gates=gates, **roles)), rounds=2)
        assert not choose._engines  # a process that waits for its next run holds no GPU
        return digests(tmp_path / name / name)

    monkeypatch.setattr(pool, "free_memory", lambda device: 2**50)
    kept = run("kept")
    lines = [line.split() for line in log.read_text().splitlines()]
    starts = Counter((work, folder) for what, work, folder in lines if what == "start")
    assert set(starts.values()) == {1}
    first = next(i for i, line in enumerate(lines) if line[0] == "renew")
    assert not [line for line in lines[first:] if line[0] == "start"], "after the first round"
    renewed = [Path(folder).parent.name for what, work, folder in lines if (what, work) == ("renew", "generate")]
    assert renewed == ["round=0001", "round=0002"]

    monkeypatch.setattr(pool, "free_memory", lambda device: 0)  # no room for two: each is ended for the next
    fresh = run("fresh")
    assert len([line for line in log.read_text().splitlines() if line.startswith("start")]) > len(starts)
    assert kept == fresh


def digests(run: Path) -> dict[str, object]:
    """The tables and weights of a run, but for times."""
    import polars as pl

    tables = {str(f.relative_to(run)): pl.read_parquet(f) for f in sorted(run.glob("round=*/*/*.parquet"))}
    found: dict[str, object] = {name: table.drop("seconds", strict=False).to_dicts() for name, table in tables.items()}
    return found | {str(f.relative_to(run)): f.read_bytes() for f in sorted(run.glob("round=*/*/*.safetensors"))}

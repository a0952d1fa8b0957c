"""A run whose teacher is served elsewhere: the same tables, and what a server's failures leave."""

import shutil
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers import CHECKOUT

from configs.errors import BadInput, Unavailable
from configs.load import load_recipe
from configs.models import Scratch
from flows.distill import distill
from flows.refuse import check_recipe
from storage.read import scan
from tasks.engines import choose, http
from tasks.engines.choose import release
from tasks.scratch import init_model, train_tokenizer

sys.path.append(str(CHECKOUT / "tests" / "engines"))

from fake_server import FakeServer

FAKES = CHECKOUT / "tests" / "engines" / "fakes"


@pytest.fixture
def fake(models, monkeypatch):
    """A server of the tiny teacher."""
    monkeypatch.setattr(http, "PAUSE", 0.01)
    made = FakeServer(str(models["teacher"]))
    yield made
    made.stop()


def served(models, *urls: str) -> dict:
    return {"model": str(models["teacher"]), "engine": "server", "urls": list(urls)}


def test_a_served_teacher_ends_in_the_same_tables(recipe, models, fake, tmp_path):
    """Schemas and files equal; the scores of the same rollouts too, but for rounding. Its weights need not be here."""
    root, here = tmp_path / "runs", tmp_path / "weightless" / models["teacher"].relative_to(models["teacher"].parents[2])
    shutil.copytree(models["teacher"], here, ignore=shutil.ignore_patterns("*.safetensors"))
    distill(str(recipe(name="embedded")), rounds=1)
    distill(str(recipe(name="served", teacher={**served(models, fake.url), "model": str(here)})), rounds=1)
    files = sorted(path.relative_to(root / "embedded") for path in (root / "embedded").rglob("*.parquet"))
    assert sorted(path.relative_to(root / "served") for path in (root / "served").rglob("*.parquet")) == files
    assert all(pq.read_schema(root / "served" / f).equals(pq.read_schema(root / "embedded" / f)) for f in files)
    ours, theirs = (scan(str(root / name), "scores").sort("rollout_id").collect() for name in ("embedded", "served"))
    assert ours["rollout_id"].to_list() == theirs["rollout_id"].to_list()
    for name in ("logprobs", "top_logprobs", "rest"):
        a, b = (np.exp(table[name].explode().drop_nulls().to_numpy()) for table in (ours, theirs))
        assert len(a) > 100
        assert np.allclose(a, b, atol=2e-3), name
    assert len(fake.requests) > 4


@pytest.mark.usefixtures("impatient")
def test_a_run_goes_on_after_its_server_failed(recipe, models, fake, tmp_path):
    """In the middle of a round's scores: what is committed stays, and the end is that of a run without failures."""
    calm = distill(str(recipe(name="calm", teacher=served(models, fake.url))), rounds=1)
    before = len(fake.requests)
    shutil.rmtree(tmp_path / "runs")  # (or its scores would be taken over)
    path = recipe(name="failing", teacher=served(models, fake.url))
    fake.faults.extend([None] * (before - 3) + [500] * 100_000)
    with pytest.raises(Unavailable, match=f"{fake.url}: no answer in 6 attempts"):
        distill(str(path), rounds=1)
    shards = sorted((tmp_path / "runs" / "failing" / "round=0001").glob("*/part-*.parquet"))
    assert shards, "the server failed before the round"
    times = [shard.stat().st_mtime_ns for shard in shards]
    assert not list((tmp_path / "runs" / "failing" / "round=0001" / "student").glob("*"))
    fake.faults.clear()
    result = distill(str(path), rounds=1)
    assert [shard.stat().st_mtime_ns for shard in shards] == times
    assert [row["divergence"] for row in result["table"]] == [row["divergence"] for row in calm["table"]]


def test_a_complete_run_needs_no_server(recipe, models, fake):
    """A second call does nothing, whoever has gone; nor does one that names another address."""
    distill(str(recipe(teacher=served(models, fake.url))), rounds=1)
    asked = len(fake.requests)
    fake.stop()
    choose._connect.cache_clear()
    assert distill(str(recipe(teacher=served(models, fake.url))), rounds=1)["rounds"] == 1
    assert distill(str(recipe(teacher=served(models, "http://127.0.0.1:9"))), rounds=1)["rounds"] == 1
    assert len(fake.requests) == asked


def test_servers_of_another_model_are_refused_before_anything_is_written(recipe, models, tmp_path):
    """Another vocabulary under the right name."""
    shape = Scratch(vocab_size=300, layers=1, width=16, heads=2, feed_forward=16, context=64)
    tokenizer = train_tokenizer(shape, ["quick brown foxes jump " * 5])
    tokenizer.save_pretrained(tmp_path / "other")
    init_model(shape, tokenizer, 0).save_pretrained(tmp_path / "other")
    other = FakeServer(str(tmp_path / "other"), name=str(models["teacher"]))
    try:
        with pytest.raises(BadInput, match=f"{other.url}: serves .* with another vocabulary"):
            check_recipe(load_recipe(recipe(teacher=served(models, other.url))))
        assert not (tmp_path / "runs").exists()
        assert not other.requests
    finally:
        other.stop()


def test_a_dead_child_ends_the_command_with_its_last_words(potstill, recipe, models, tmp_path):
    """Exit status 1: nothing is wrong with the recipe. No traceback of ours."""
    python = tmp_path / "python"
    words = "'version' in sys.argv and sys.exit(print('1.2.3')); sys.exit('CUDA out of memory')"
    python.write_text(f"#!{sys.executable}\nimport sys\n{words}\n")
    python.chmod(0o755)
    student = {"model": str(models["student"]), "engine": "vllm", "vllm_python": str(python)}
    ended = potstill("run", recipe(student=student), "--rounds", "1", patient=False)
    release()
    assert ended.status == 1, ended.err
    assert "ended with status 1; its last output:\n  CUDA out of memory" in ended.err
    assert "the same command goes on" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.usefixtures("impatient")
def test_a_run_goes_on_after_its_child_was_killed(recipe, models, tmp_path, monkeypatch):
    """With every try, in the middle of a round's scores: what is committed stays, and the end is that of a calm run."""
    python = tmp_path / "python"
    code = f"import runpy; sys.path.insert(0, {str(FAKES)!r}); sys.argv = sys.argv[2:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    python.write_text(f"#!{sys.executable}\nimport sys\n{code}\n")
    python.chmod(0o755)
    teacher = {"model": str(models["teacher"]), "engine": "vllm", "vllm_python": str(python)}
    calm = distill(str(recipe(name="calm", teacher=teacher)), rounds=1)
    shutil.rmtree(tmp_path / "runs")
    path, done = recipe(name="failing", teacher=teacher), tmp_path / "runs" / "failing" / "round=0001"
    monkeypatch.setenv("FAKE_VLLM_UNTIL", str(done / "scores" / "part-00000.parquet"))
    release()
    with pytest.raises(Unavailable, match=r"was killed \(SIGKILL\); its last output:\n(.*\n)*  the last words before the kill"):
        distill(str(path), rounds=1)
    shards = sorted(done.glob("*/part-*.parquet"))
    assert [shard.parent.name for shard in shards] == ["rollouts", "rollouts", "scores"]
    times = [shard.stat().st_mtime_ns for shard in shards]
    monkeypatch.delenv("FAKE_VLLM_UNTIL")
    assert distill(str(path), rounds=1)["table"] == calm["table"]
    assert [shard.stat().st_mtime_ns for shard in shards] == times
    release()


def test_an_interpreter_that_is_not_there(potstill, recipe, models, tmp_path):
    student = {"model": str(models["student"]), "engine": "vllm", "vllm_python": str(tmp_path / "python")}
    ended = potstill("run", recipe(student=student))
    assert ended.status == 2, ended.err
    assert f"vllm_python: {tmp_path / 'python'} is not a Python with vLLM" in ended.err
    assert not (tmp_path / "runs").exists()

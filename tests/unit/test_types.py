"""What the type checker refuses: arguments of one type in the wrong order, in what passes between stages."""

from pathlib import Path

import pytest
from mypy import api

CHECKOUT = Path(__file__).parents[2]
CACHE = str(CHECKOUT / ".mypy_cache")  # that `make check` fills
pytestmark = pytest.mark.slow

CALLS = """
from configs.compute import Compute
from configs.schema import Recipe
from flows.compute import RunShards, run_in_time
from storage.artifacts import Artifact
from tasks import objectives
from tasks.align import align_shard
from tasks.evaluate import evaluate_model
from tasks.models.reference import ModelRef
from tasks.rows.round import Pair, Round, Shard, Vocabularies
from tasks.tokens.vocabulary import Vocabulary
from tasks.vocab import match_vocabularies

def call(recipe: Recipe, compute: Compute, s: ModelRef, t: ModelRef, a: Artifact, v: Vocabulary, run: RunShards) -> None:
    words = Vocabularies(student=a, teacher=a)
    pair = Pair(name="", recipe=recipe, teacher=t, vocabularies=words)
    round = Round(recipe=recipe, number=1, student=s, pairs=(pair,), start=s, prompts=a)
    run(align_shard, round, (Shard(0),))
    run_in_time(compute, evaluate_model, recipe, 0, "student", a, model=s, teachers={"": t})
"""
SWAPPED = {
    "Round(recipe, 1, s, (pair,), s, a)": "Too many positional arguments",
    "Vocabularies(a, a)": "Too many positional arguments",
    "run(align_shard, (Shard(0),), round)": "Argument 2",
    "run(evaluate_model, round, (Shard(0),))": "Argument 1",
    'run_in_time(compute, evaluate_model, recipe, 0, "student", a, "", s, {"": t})': "Too many positional arguments",
    "match_vocabularies(recipe, t, s)": "No overload variant",
    "objectives.build(recipe.objective, v, v)": "Too many positional arguments",
    "Shard(a, 0)": "Argument 1",
}


def test_swapped_arguments_are_type_errors(tmp_path: Path) -> None:
    file = tmp_path / "calls.py"
    file.write_text(CALLS + "".join(f"    {call}\n" for call in SWAPPED))
    said, errors, _ = api.run([str(file), "--config-file", str(CHECKOUT / "pyproject.toml"), "--cache-dir", CACHE])
    assert not errors
    lines = file.read_text().splitlines()
    found = {lines[int(line.split(":")[1]) - 1].strip(): line for line in said.splitlines() if ": error:" in line}
    assert found.keys() == SWAPPED.keys(), said
    for call, reason in SWAPPED.items():
        assert any(reason in line for line in said.splitlines() if line.startswith(found[call].split(": error:")[0])), said

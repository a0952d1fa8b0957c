"""Peak memory of a round's data path: ten times the rollouts through sampling, scoring, alignment and the training reader.

Each size runs in a process of its own, with an engine that makes its numbers up at once. Prints the peak of each and their
ratio, and fails above 1.10: memory is bounded by the shard, not by the round.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from configs.load import validate_recipe
from storage.store import Run
from tasks.align import align_shard
from tasks.engines.base import Completion, Sampling, TokenScores
from tasks.engines.transformers import TransformersEngine
from tasks.models.reference import device_of, make_reference
from tasks.models.text import side
from tasks.prompts import make_prompts
from tasks.rollout import roll_out
from tasks.rows.plan import count_shards
from tasks.rows.round import Pair, Round, Shard
from tasks.score import score_shard
from tasks.scratch import init_model, train_tokenizer
from tasks.signals.base import Signal
from tasks.training.batches import collate, optimizer_batches
from tasks.vocab import match_vocabularies

LIMIT = 1.10
SHARD, TOKENS, K = 512, 128, 16


def made_up_generate(self: TransformersEngine, prompts: list, seeds: list[int], sampling: Sampling) -> list[Completion]:
    text = np.flatnonzero(self.side.vocabulary.lengths == 1)
    text = text[[self.side.vocabulary.beta.values[i] < b"\x80" for i in text]]
    rng = np.random.default_rng(seeds[0])
    ids = rng.choice(text, (len(prompts), sampling.max_new_tokens))
    return [Completion(row.tolist(), [-1.0] * len(row)) for row in ids]


def made_up_score(self: TransformersEngine, prompts: list, completions: list[list[int]], signal: Signal) -> list[TokenScores]:
    rng = np.random.default_rng(len(prompts))
    results = []
    for ids in completions:
        top = np.argsort(rng.random((len(ids), self.size)), 1)[:, : signal.k].astype(np.int32)
        logprobs = np.full((len(ids), signal.k), np.log(0.9 / signal.k), np.float16)
        rest = np.full(len(ids), np.log(0.1), np.float32)
        counts = np.full(len(ids), signal.k, np.int16)
        columns = {"top_ids": top.ravel(), "top_logprobs": logprobs.ravel(), "top_counts": counts, "rest": rest}
        results.append(TokenScores(logprobs[:, 0].astype(np.float32), columns))
    return results


def round_of(rollouts: int, folder: Path) -> None:
    TransformersEngine.generate = made_up_generate  # type: ignore[method-assign]
    TransformersEngine.score = made_up_score  # type: ignore[method-assign]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"What is {n}?"}) for n in range(600)))
    shape = {"vocab_size": 400, "layers": 1, "width": 16, "heads": 2, "feed_forward": 16, "context": 512}
    data = {
        "name": "memory",
        "root": str(folder / "runs"),
        "student": {"model": str(folder / "student")},
        "teacher": {"model": str(folder / "teacher")},
        "prompts": {"source": "file", "path": str(folder / "prompts.jsonl"), "train": 500, "eval": 20},
        "rollout": {"prompts": rollouts, "shard_rows": SHARD, "max_new_tokens": TOKENS},
        "score": {"k": K},
        "objective": {"name": "bytes"},
    }
    recipe = validate_recipe(data, "memory")
    scratch = validate_recipe({**data, "student": {"scratch": shape}}, "memory").student.scratch
    assert scratch is not None
    for role, text in (("student", "hello what is 12"), ("teacher", "the number is what it is")):
        tokenizer = train_tokenizer(scratch, [text])
        tokenizer.save_pretrained(folder / role)
        init_model(scratch, tokenizer, 0).save_pretrained(folder / role)
    student, teacher = (make_reference(config, str(config.model)) for config in (recipe.student, recipe.teacher) if config)
    Run(recipe.root, recipe.name).freeze(recipe)
    prompts, vocab = make_prompts.fn(recipe), match_vocabularies.fn(recipe, student=student, teacher=teacher)
    assert student is not None
    pair = Pair(name="", recipe=recipe, teacher=teacher, vocabularies=vocab)
    round = Round(recipe=recipe, number=1, student=student, pairs=(pair,), start=student, prompts=prompts.train)
    pairs = []
    for number in range(count_shards(recipe.rollout)):
        shard = align_shard.fn(round, score_shard.fn(round, roll_out.fn(round, Shard(number))))
        assert shard.rollouts is not None
        assert shard.aligned is not None
        pairs.append((shard.rollouts, shard.aligned))
    tokens = 0
    for table in optimizer_batches(pairs, 64, 0):
        tokens += collate(table, side(student).pad_id, device_of(student)).tokens
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"rollouts": rollouts, "tokens": tokens, "peak_mib": round(peak, 1)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rollouts", type=int, default=2048, help="of the smaller round (default: %(default)s)")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.one:
            return round_of(options.one, Path(folder))
    found = []
    for rollouts in (options.rollouts, 10 * options.rollouts):
        ended = subprocess.run(
            [sys.executable, __file__, "--one", str(rollouts)], stdout=subprocess.PIPE, text=True, check=True
        )
        found.append(json.loads(ended.stdout.splitlines()[-1]))
        print("{rollouts:>8} rollouts, {tokens:>9} tokens: peak {peak_mib} MiB".format(**found[-1]), flush=True)
    ratio = found[1]["peak_mib"] / found[0]["peak_mib"]
    print(f"ratio {ratio:.3f} (limit {LIMIT})")
    sys.exit(ratio > LIMIT)


if __name__ == "__main__":
    main()

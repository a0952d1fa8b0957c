"""Self-distillation from a privileged context: a small model as its own teacher, which has the answer in its prompt.

    python tests/benchmarks/privileged.py [--seeds 0,1,2] [--root runs/privileged]

Makes the words and, for each seed, a model that has learnt to read a prompt with the answer in it (`privileged/reader.toml`).
Then it distils from itself (`privileged/privileged.toml`): with the answer in the teacher's prompt, from its weights before
round 1 or of each round, and in the same context. Prints accuracies with 95% intervals.
"""

import argparse
import json
import random
import shutil
from collections.abc import Iterable
from pathlib import Path

import flows  # noqa: F401  (Prefect's defaults, before anything imports Prefect)
from configs.errors import Stopped
from flows.distill import distill
from tasks.rows.sources import load_gym_dataset
from tasks.views.rounds import format_rounds, summarise_rounds

RECIPES = Path(__file__).parent / "privileged"
OPTIONS = {"min_word_len": 3, "max_word_len": 6}
READ = 12_000  # words that the reader learns from; the others are distilled and evaluated on
PLAIN = 0.2  # share of the reader's rows that have no answer in the prompt
RUNS = {
    "the answer, weights before round 1": (),
    "the same context": ("teacher.template={prompt}",),
    "the answer, weights of each round": ("teacher.weights=round",),
}


def write_words(folder: Path) -> None:
    """`reader.jsonl` and `words.jsonl`, which have no word in common."""
    items = load_gym_dataset("spell_backward", OPTIONS, seed=0, size=60_000)
    words = sorted({item["metadata"]["word"].lower() for item in items})
    chance = random.Random(0)
    chance.shuffle(words)
    with_answers = [word if chance.random() < PLAIN else f"{word} = {word[::-1]}" for word in words[:READ]]
    _write(folder / "reader.jsonl", with_answers)
    _write(folder / "words.jsonl", words[READ:])


def _write(path: Path, prompts: Iterable[str]) -> None:
    rows = ({"prompt": prompt, "reference": prompt.split(" = ")[0][::-1]} for prompt in prompts)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seeds", default="0,1,2")
    arguments.add_argument("--root", type=Path, default=Path("runs/privileged"))
    given = arguments.parse_args()
    given.root.mkdir(parents=True, exist_ok=True)
    write_words(given.root)
    for recipe in RECIPES.glob("*.toml"):
        shutil.copy(recipe, given.root)
    print("| teacher reads | seed | teacher | student before | after | greedy before | after |\n|---|---|---|---|---|---|---|")
    for title, changes in RUNS.items():
        for seed in given.seeds.split(","):
            name = f"{title.replace(', ', '-').replace(' ', '-')}-seed{seed}"
            settings = (f"name={name}", f"seed={seed}", f'root="{given.root}"', *changes)
            try:
                distill(str(given.root / "privileged.toml"), overrides=settings)
            except Stopped as stop:
                print(f"{name}: {stop}")
            rows = {row["model"]: row for row in format_rounds(summarise_rounds(str(given.root / name)))}
            teacher, before, after = (row for place, row in enumerate(rows.values()) if place in (0, 1, len(rows) - 1))
            cells = [teacher["sampled"], before["sampled"], after["sampled"], before["greedy"], after["greedy"]]
            print(f"| {title} | {seed} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

"""Two teachers of two tasks, each with its own tokenizer and neither able at the other's, and one of them alone.

    python tests/benchmarks/teachers.py [--seeds 0,1,2] [--rounds 10] [--root runs/teachers]

Makes words with two tasks, backward and each letter's next one, and for each seed the teachers and a student that knows a bit
of both (`teachers/*.toml`). Then it distils from both, and from the first alone on all rows. Prints sampled accuracies with 95%
intervals by task, and the share of the teacher's lead that the student has gained.
"""

import argparse
import json
import random
import shutil
from pathlib import Path

import polars as pl

import flows  # noqa: F401  (Prefect's defaults, before anything imports Prefect)
from configs.errors import Stopped
from flows.distill import distill
from storage.read import scan
from tasks.rows.sources import load_gym_dataset
from tasks.views.estimates import Estimate, estimate_accuracy

RECIPES = Path(__file__).parent / "teachers"
OPTIONS = {"min_word_len": 3, "max_word_len": 6}
TASKS = {"back": lambda word: word[::-1], "next": lambda word: "".join(chr((ord(c) - 96) % 26 + 97) for c in word)}
WORDS = 8_500  # of each task
ALONE = 'teachers=[{name="back", recipe="back.toml"}]'  # it grades the other task's rows, too
NO_LEAD = "gates.lead=-1.0"  # on those it is no better than the student


def write_words(folder: Path) -> None:
    """`back.jsonl` and `next.jsonl`: the task's name, a word, and what is right."""
    items = load_gym_dataset("spell_backward", OPTIONS, seed=0, size=60_000)
    words = sorted({word for item in items if (word := item["metadata"]["word"].lower()).isascii() and word.isalpha()})
    random.Random(0).shuffle(words)
    for number, (task, answer) in enumerate(TASKS.items()):
        own = words[number * WORDS : (number + 1) * WORDS]
        rows = ({"prompt": f"{task} {word}", "reference": answer(word)} for word in own)
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def accuracies(run: Path, model: str, number: int) -> dict[str, Estimate]:
    """Sampled accuracy by task of a model in a round."""
    tasks = scan(str(run), "prompts").select("prompt_id", task=pl.col("messages").list.first().struct["content"].str.head(4))
    evals = scan(str(run), "evals").filter(pl.col("round") == number, model=model, decoding="sampled")
    table = evals.join(tasks, on="prompt_id").collect()
    return {task: estimate_accuracy(table.filter(task=task)) for task in TASKS if len(table.filter(task=task))}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seeds", default="0,1,2")
    arguments.add_argument("--rounds", type=int, default=10)
    arguments.add_argument("--root", type=Path, default=Path("runs/teachers"))
    given = arguments.parse_args()
    given.root.mkdir(parents=True, exist_ok=True)
    if not (given.root / "back.jsonl").exists():
        write_words(given.root)
    for recipe in RECIPES.glob("*.toml"):
        shutil.copy(recipe, given.root)
    print("| taught by | seed | task | teacher | student before | after | recovered |\n|---|---|---|---|---|---|---|")
    for seed in given.seeds.split(","):
        teachers: dict[str, Estimate] = {}
        for title, changes in {"both": (), "back alone": (ALONE, NO_LEAD)}.items():
            name = f"{title.replace(' ', '-')}-seed{seed}"
            settings = (f"name={name}", f"seed={seed}", f'root="{given.root}"', *changes)
            try:
                distill(str(given.root / "teachers.toml"), rounds=given.rounds, overrides=settings)
            except Stopped as stop:
                print(f"{name}: {stop}")
            run = given.root / name
            teachers = teachers or accuracies(run, "teacher", 0)
            before, after = accuracies(run, "student", 0), accuracies(run, "student", given.rounds)
            for task, teacher in teachers.items():
                share = (after[task].value - before[task].value) / (teacher.value - before[task].value)
                row = [title, seed, task, teacher, before[task], after[task], f"{share:.0%}"]
                print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()

"""Seconds to a command's first line and to its end, against the bare import of torch, transformers, prefect and polars.

A run of 20 rounds is made for real on tests/recipes/tiny.toml; then each student gets a file of 500 MB of zeros, manifests and
keys with it, and 200 copies of a small run come beside it. Every command is timed several times, all in turn, and the least
counts. `--checkout` measures another version on the same runs.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from storage.lineage import digest_folder, digest_json
from storage.store import Run

HERE = Path(__file__).parents[2]
TINY = HERE / "tests" / "recipes" / "tiny.toml"
SMALL = {"rollout.prompts": 16, "rollout.shard_rows": 16, "evaluate.samples": 0}
BARE = "import torch, transformers, prefect, polars"


def told(root: Path, rounds: int) -> list[str]:
    changes = {"root": root, "rounds": rounds, **SMALL}
    return [str(TINY), *(word for key, value in changes.items() for word in ("--set", f"{key}={value}"))]


def run_potstill(checkout: Path, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "flows.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
    )


def finish(*arguments: object) -> None:
    """Run this checkout's command to its end."""
    process = run_potstill(HERE, *arguments)
    said = process.communicate()[0]
    assert process.returncode == 0, said


def make(alone: Path, large: Path, rounds: int, size: int, beside: int) -> None:
    """The run with the runs that made its models, and a copy of them with large students beside other runs."""
    finish("run", *told(alone, rounds))
    shutil.copytree(alone, large)
    grow(Run(str(large), "tiny"), size)
    for number in range(beside):
        shutil.copytree(large / "test-teacher-seed0", large / f"other-{number:03d}", copy_function=os.link)
    finish("run", *told(large, rounds))


def grow(run: Run, size: int) -> None:
    """Give each round's student a file of `size` zeros, and all manifests the digests and keys that follow."""
    changed: dict[str, str] = {}
    for slot, manifest in sorted(run.manifests(), key=lambda pair: (pair[0].split("/")[0], "/evals/" in pair[0])):
        inputs = json.dumps(manifest["inputs"])
        for old, new in changed.items():
            inputs = inputs.replace(old, new)
        manifest["inputs"] = json.loads(inputs)
        manifest["key"] = digest_json(manifest["inputs"])
        if re.fullmatch(r"round=\d+/student", slot):
            folder = Path(run.path, manifest["path"])
            with open(folder / "zeros", "wb") as file:
                file.truncate(size)
            changed[manifest["digest"]] = manifest["digest"] = digest_folder(folder)
            manifest["bytes"] += size
        Path(run.path, "_manifests", f"{slot}.json").write_text(json.dumps(manifest, indent=1))


def time_lines(process: subprocess.Popen, until: str = "") -> tuple[float, float]:
    """Seconds to the first line and to the end; with `until` to the line that has it, after which the process is ended."""
    started, first, said = time.monotonic(), 0.0, []
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line)
        first = first or time.monotonic() - started
        if until and until in line:
            process.terminate()
            ended = time.monotonic() - started
            process.communicate()
            return first, ended
    status, ended = process.wait(), time.monotonic() - started
    assert (status, until) == (0, ""), "".join(said)
    return first or ended, ended


def cases(alone: Path, large: Path, rounds: int) -> Iterator[tuple[str, list[object], str]]:
    for name, root in (("alone", alone), ("large, beside others", large)):
        yield f"run that is complete, {name}", ["run", *told(root, rounds)], ""
        yield f"inspect, {name}", ["inspect", root / "tiny"], ""
        yield f"report, {name}", ["report", root / "tiny"], ""
        yield f"run, one more round, {name}", ["run", *told(root, rounds), "--rounds", rounds + 1], f"round={rounds + 1:04d}/"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--megabytes", type=int, default=500, help="of each student (default: %(default)s)")
    parser.add_argument("--beside", type=int, default=200, help="other runs (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--checkout", type=Path, help="another version to be measured on the same runs")
    parser.add_argument("--folder", type=Path, help="where the runs are kept; used again if they are there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        alone, large = folder / "alone", folder / "large"
        if not alone.exists():
            make(alone, large, options.rounds, options.megabytes * 1_000_000, options.beside)
        checkouts = {"": HERE} | ({"before: ": options.checkout.resolve()} if options.checkout else {})
        todo = {"--help": (HERE, ["--help"], "")}
        for prefix, checkout in checkouts.items():
            todo |= {prefix + name: (checkout, told, until) for name, told, until in cases(alone, large, options.rounds)}
        bare: list[float] = []
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in todo}
        for _ in range(options.repeats):
            started = time.monotonic()
            subprocess.run([sys.executable, "-c", BARE], check=True)
            bare.append(time.monotonic() - started)
            for name, (checkout, arguments, until) in todo.items():
                found[name].append(time_lines(run_potstill(checkout, *arguments), until))
                for left in (alone, large):
                    forget_round(Run(str(left), "tiny"), options.rounds + 1)
    print(f"{'bare imports':<50} {min(bare):>8.2f} s")
    print(f"{'':<50} {'first line':>18} {'end':>18}")
    for name, times in found.items():
        first, ended = (min(column) for column in zip(*times, strict=True))
        print(f"{name:<50} {first:>8.2f} s = {first / min(bare):>5.2f} {ended:>8.2f} s = {ended / min(bare):>5.2f}")


def forget_round(run: Run, number: int) -> None:
    """Remove what a run that was ended has made of a round."""
    for place in ("", "_manifests"):
        shutil.rmtree(Path(run.path, place, f"round={number:04d}"), ignore_errors=True)


if __name__ == "__main__":
    main()

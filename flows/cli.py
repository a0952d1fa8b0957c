"""The `potstill` command."""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

import flows  # noqa: F401  (Prefect's defaults, before anything imports Prefect)
from configs.errors import BadInput, CannotWrite, Stopped, Unavailable


def _whole(_: Any, tokens: Sequence[Any]) -> int:
    return int(tokens[0].value)  # cyclopts itself would round 1.5


Whole = Annotated[int, Parameter(converter=_whole)]
Set = Annotated[tuple[str, ...], Parameter(name="--set", negative="")]

app = App(
    name="potstill",
    help="On-policy distillation of a large language model into a small one of any family.",
    suppress_keyboard_interrupt=False,  # `main` says what a stop means
)
out = Console(width=None if sys.stdout.isatty() else 140)


def main() -> None:
    """Entry point: a user's mistake is one message and exit status 2; a stop or a full disk is one message too."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app(exit_on_error=False, print_error=False)
    except (BadInput, CycloptsError) as error:
        _end(str(error), 2)
    except (CannotWrite, Stopped) as error:
        _end(str(error), 1)
    except Unavailable as error:
        _end(f"{error}\npotstill: the same command goes on from what is committed", 1)
    except KeyboardInterrupt as stop:
        status = 143 if isinstance(stop, Terminated) else 130
        _end("stopped; the same command goes on from what is committed", status)


class Terminated(KeyboardInterrupt):
    """SIGTERM: from a scheduler, a container's stop, a machine's shutdown."""


def _terminate(*_: Any) -> None:
    raise Terminated


def _end(message: str, status: int) -> NoReturn:
    print(f"potstill: {message}", file=sys.stderr)
    sys.exit(status)


@app.command
def run(
    config: Path,
    *,
    rounds: Whole | None = None,
    set_: Set = (),
) -> None:
    """Run, or go on with, the run of a recipe until it has N rounds. A second identical call does nothing.

    Every field of a recipe, with its default and limits, is in configs/schema.py.

    Parameters
    ----------
    config
        The recipe: a TOML file, such as configs/quickstart.toml.
    rounds
        Go on until the run has so many rounds; the recipe's own number if left out.
    set_
        Set a field of the recipe, as `--set train.learning_rate=1e-4`; may be repeated.
    """
    if rounds is not None and rounds < 0:
        raise BadInput(f"--rounds {rounds}: give 0 or more")
    _plain_logs()
    from configs.load import load

    recipe = load(config, set_)
    from flows.distill import check, distill
    from storage.store import Run

    check(recipe)  # before a server is started for nothing
    Run(recipe.root, recipe.name).check_free()
    result = distill(str(config), rounds=rounds, overrides=set_)
    _print("Rounds", result["table"])
    out.print(f"Everything lies in {result['run']}; the last student in {result['student']}", soft_wrap=True, highlight=False)


@app.command
def preflight(
    config: Path,
    *,
    prompts: Whole = 64,
    set_: Set = (),
) -> None:
    """Check a recipe before it costs anything: exit status 1 where a limit of its [gates] is breached.

    Parameters
    ----------
    config
        The recipe: a TOML file, such as configs/quickstart.toml.
    prompts
        How many of its prompts to try.
    set_
        Set a field of the recipe, as `--set rollout.max_new_tokens=512`; may be repeated.
    """
    if prompts < 1:
        raise BadInput(f"--prompts {prompts}: give 1 or more")
    _plain_logs()
    from configs.load import load

    recipe = load(config, set_)
    from flows.distill import check
    from flows.preflight import preflight as examine

    check(recipe)  # before a server is started for nothing
    rows = examine(str(config), prompts=prompts, overrides=set_)
    _print("Preflight", [{key: row[key] for key in ("gate", "found", "limit", "verdict", "detail")} for row in rows])
    if breached := [f"{row['gate']}: {row['advice']}" for row in rows if row["verdict"] == "BREACHED"]:
        raise Stopped("\n  ".join([f"{config}: {len(breached)} of {len(rows)} gates breached", *breached]))


@app.command
def compare(
    config: Path,
    *,
    objectives: str,
    seeds: str = "",
    rounds: Whole | None = None,
    set_: Set = (),
) -> None:
    """Run a recipe under several objectives, and show how they differ on the same prompts and seeds, with intervals.

    Parameters
    ----------
    config
        The recipe: a TOML file, such as configs/quickstart.toml.
    objectives
        Two or more, as bytes,gold:merge=sum,alm; the others are held against the first.
    seeds
        Seeds of the runs of each, as 0,1,2; the recipe's own if left out.
    rounds
        Compare after so many rounds; the recipe's number if left out.
    set_
        Set a field of the recipe, as `--set rollout.prompts=512`; may be repeated.
    """
    if rounds is not None and rounds < 1:
        raise BadInput(f"--rounds {rounds}: give 1 or more")
    if not all(seed.strip().isdecimal() for seed in seeds.split(",") if seeds):
        raise BadInput(f"--seeds {seeds}: give whole numbers with commas between them, such as 0,1,2")
    _plain_logs()
    from flows.compare import compare as hold_together
    from flows.compare import planned

    names, numbers = tuple(objectives.split(",")), tuple(int(seed) for seed in seeds.split(",") if seeds)
    planned(str(config), names, numbers, set_)  # before a server is started for nothing
    _print("Objectives", hold_together(str(config), objectives=names, seeds=numbers, rounds=rounds, overrides=set_))


@app.command
def inspect(
    run: str,
    *,
    round: Whole | None = None,
    rollout: str | None = None,
    lineage: Annotated[bool, Parameter(negative="")] = False,
    verify: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Show the tables of a run, of one of its rounds, one rollout token by token, or where a checkpoint comes from.

    Parameters
    ----------
    run
        A run's folder or URI, such as runs/quickstart.
    round
        Show this round: byte accounts and some of its rollouts.
    rollout
        Show the rollout with this `rollout_id`: each token's bytes, both models' log-probs, its unit.
    lineage
        Show what the last checkpoint (or that of `--round`) was made from, with digests, options and versions.
    verify
        Compute every digest again; name what was altered or is missing, and exit with 1 if anything is.
    """
    from tasks import inspect as show
    from tasks import trace
    from tasks.rounds import records, rounds_table

    show.check_run(run)
    if verify:
        damages = trace.damages(run)
        _print("Altered or missing", damages)
        out.print(f"{trace.committed(run) - len(damages)} of {trace.committed(run)} artifacts are what their manifests say")
        sys.exit(bool(damages))
    if lineage:
        for title, rows in trace.lineage(run, round).items():
            _print(title, rows)
    elif rollout is not None:
        for title, rows in show.one_rollout(run, rollout).items():
            _print(title, rows)
    elif round is not None:
        for title, rows in show.one_round(run, round).items():
            _print(title, rows)
    else:
        _print("Rounds", records(rounds_table(run)))
        _print("Tables", show.tables(run))


@app.command
def report(run: str) -> None:
    """Write a run's report.html: one file with its figures, charts and shaded samples, for any browser.

    Parameters
    ----------
    run
        A run's folder or URI, such as runs/quickstart.
    """
    from tasks import inspect as show
    from tasks.report import write_report

    show.check_run(run)
    out.print(write_report(show.run_at(run)), soft_wrap=True, highlight=False)


@app.command
def align(
    student: str,
    teacher: str,
    *,
    text: str = "The quick brown fox doesn't jump: naïve café, 3.14159 👩‍👩‍👧",
    file: Path | None = None,
    out_: Annotated[Path | None, Parameter(name="--out")] = None,
) -> None:
    """Show a text's two tokenizations side by side, or align a file of texts.

    Parameters
    ----------
    student
        Hub id, folder or .gguf file; its tokenizer alone is read.
    teacher
        Hub id, folder or .gguf file; its tokenizer alone is read.
    text
        The text to show.
    file
        A .jsonl or .parquet file with a `text` column, in place of a text.
    out_
        Write the units of every row to this Parquet file: the model-free columns of `aligned`.
    """
    from tasks import texts as show
    from tasks.models import tokenizer_of

    own, other = tokenizer_of(student), tokenizer_of(teacher)
    names, texts = ["text"], [text]
    if file is not None:
        names, texts = show.read_texts(file)
    elif out_ is not None:
        raise BadInput("--out writes the units of a file: give --file too")
    aligned = show.aligned_texts(names, texts, own, other)
    if out_ is not None:
        show.write(aligned.table, out_)
    elif file is None and aligned.table["status"][0].as_py() == "ok":
        for pair in show.two_rows(text, aligned.table.to_pylist()[0], own, other, out.width - 10):
            for role, line in zip(("student", "teacher"), pair, strict=True):
                out.print(Text(f"{role}  {line}"))
            out.print()
    for title, rows in show.summary(aligned, own, other).items():
        _print(title, rows)


def _plain_logs() -> None:
    """Our lines on standard error; of Prefect's only what it cannot go on with."""
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("potstill")
    logger.addHandler(handler)
    logger.propagate = False


def _print(title: str, rows: list[dict[str, Any]]) -> None:
    if not rows:
        out.print(f"{title}: none")
        return
    table = Table(title=title, title_justify="left", highlight=False)
    for column in rows[0]:
        numeric = all(isinstance(row[column], int | float | None) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if value is None else str(value)) for value in row.values()))  # text, not markup
    out.print(table)


if __name__ == "__main__":
    main()

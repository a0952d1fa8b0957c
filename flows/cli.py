"""The `potstill` command."""

import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter
from rich.text import Text

import flows  # noqa: F401  (Prefect's defaults, before anything imports Prefect)
from configs.errors import BadInput, CannotWrite, Stopped, Unavailable
from flows.terminal import Terminated, catch_sigterm, end, log_plainly, out, print_line, print_table


def _whole(_: Any, tokens: Sequence[Any]) -> int:
    return int(tokens[0].value)  # cyclopts itself would round 1.5


Whole = Annotated[int, Parameter(converter=_whole)]
Set = Annotated[tuple[str, ...], Parameter(name="--set", negative="")]

app = App(
    name="potstill",
    help="On-policy distillation of a large language model into a small one of any family.",
    version=version("potstill"),
    suppress_keyboard_interrupt=False,  # `main` says what a stop means
)


def main() -> None:
    """Entry point: a user's mistake is one message and exit status 2; a stop or a full disk is one message too."""
    catch_sigterm()
    try:
        app(exit_on_error=False, print_error=False)
    except (BadInput, CycloptsError) as error:
        end(str(error), 2)
    except (CannotWrite, Stopped) as error:
        end(str(error), 1)
    except Unavailable as error:
        end(f"{error}\npotstill: the same command goes on from what is committed", 1)
    except KeyboardInterrupt as stop:
        status = 143 if isinstance(stop, Terminated) else 130
        end("stopped; the same command goes on from what is committed", status)


@app.command
def run(
    config: Path,
    *,
    rounds: Whole | None = None,
    set_: Set = (),
) -> None:
    """Run, or go on with, the run of a recipe until it has N rounds. A second identical call does nothing.

    The fields of a recipe are described in configs/README.md and configs/schema.py.

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
    log_plainly()
    from configs.load import load_recipe

    recipe = load_recipe(config, set_)
    from flows.distill import distill
    from flows.refuse import check_recipe
    from storage.store import Run

    check_recipe(recipe)  # before a server is started for nothing
    Run(recipe.root, recipe.name).check_free()
    result = distill(str(config), rounds=rounds, overrides=set_)
    print_table("Rounds", result["table"])
    print_line(f"The run is in {result['run']}, its last student in {result['student']}")


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
    log_plainly()
    from configs.load import load_recipe

    recipe = load_recipe(config, set_)
    from flows.preflight import preflight as examine
    from flows.refuse import check_recipe

    check_recipe(recipe, rendering=False)  # before a server is started for nothing
    rows = examine(str(config), prompts=prompts, overrides=set_)
    print_table("Preflight", [{key: row[key] for key in ("gate", "value", "limit", "result", "detail")} for row in rows])
    if breached := [f"{row['gate']}: {row['advice']}" for row in rows if row["result"] == "BREACHED"]:
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
    log_plainly()
    from flows.compare import compare as hold_together
    from flows.compare import plan_runs

    names, numbers = tuple(objectives.split(",")), tuple(int(seed) for seed in seeds.split(",") if seeds)
    plan_runs(str(config), names, numbers, set_)  # before a server is started for nothing
    print_table("Objectives", hold_together(str(config), objectives=names, seeds=numbers, rounds=rounds, overrides=set_))


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
    from tasks.views import inspect as show
    from tasks.views import trace
    from tasks.views.rounds import format_rounds, summarise_rounds

    show.check_run(run)
    if verify:
        damages = trace.find_damage(run)
        print_table("Altered or missing", damages)
        total = trace.count_artifacts(run)
        out.print(f"{total - len(damages)} of {total} artifacts are what their manifests say")
        sys.exit(bool(damages))
    if lineage:
        for title, rows in trace.trace_lineage(run, round).items():
            print_table(title, rows)
    elif rollout is not None:
        for title, rows in show.show_rollout(run, rollout).items():
            print_table(title, rows)
    elif round is not None:
        for title, rows in show.show_round(run, round).items():
            print_table(title, rows)
    else:
        print_table("Rounds", format_rounds(summarise_rounds(run)))
        print_table("Tables", show.list_tables(run))


@app.command
def report(run: str) -> None:
    """Write a run's report.html: one file with its figures, charts and shaded samples, for any browser.

    Parameters
    ----------
    run
        A run's folder or URI, such as runs/quickstart.
    """
    from tasks.views import inspect as show
    from tasks.views.report import write_report

    show.check_run(run)
    out.print(write_report(show.open_run(run)), soft_wrap=True, highlight=False)


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
    from tasks.models.text import tokenizer_of
    from tasks.views import texts as show

    own, other = tokenizer_of(student), tokenizer_of(teacher)
    names, texts = ["text"], [text]
    if file is not None:
        names, texts = show.read_texts(file)
    elif out_ is not None:
        raise BadInput("--out writes the units of a file: give --file too")
    aligned = show.align_texts(names, texts, own, other)
    if out_ is not None:
        show.write_units(aligned.table, out_)
    elif file is None and aligned.table["status"][0].as_py() == "ok":
        for pair in show.format_pairs(text, aligned.table.to_pylist()[0], own, other, out.width - 10):
            for role, line in zip(("student", "teacher"), pair, strict=True):
                out.print(Text(f"{role}  {line}"))
            out.print()
    for title, rows in show.summarise(aligned, own, other).items():
        print_table(title, rows)


if __name__ == "__main__":
    main()

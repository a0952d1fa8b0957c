"""The `potstill` command."""

import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter
from rich.text import Text

import flows  # noqa: F401  (Prefect's defaults, before anything imports Prefect)
from configs.errors import BadInput, CannotWrite, Damaged, Stopped, Unavailable
from flows.ending import end, ending, work_on
from flows.terminal import log_plainly, out, print_line, print_table
from tasks.views.escapes import escape_controls


def _parse_whole(_: Any, tokens: Sequence[Any]) -> int:
    return int(tokens[0].value)  # cyclopts itself would round 1.5


Whole = Annotated[int, Parameter(converter=_parse_whole)]
Flag = Annotated[bool, Parameter(negative="")]
Set = Annotated[tuple[str, ...], Parameter(name="--set", negative="")]
ROUNDS = "Rounds (accuracies with 95% intervals; divergence: nats per byte; tokens: mean length)"

app = App(
    name="potstill",
    help="On-policy distillation of a large language model into a small one of any family.",
    version=version("potstill"),
    suppress_keyboard_interrupt=False,  # `ending` handles it
)


def main() -> None:
    """Entry point. A user's mistake, a stop and a full disk each end with one message; `configs.errors` has their statuses."""
    with ending():
        try:
            app(exit_on_error=False, print_error=False)
        except (BadInput, CycloptsError) as error:
            end(str(error), 2)
        except (CannotWrite, Damaged, Stopped) as error:
            end(str(error), 1)
        except Unavailable as error:
            end(f"{error}\npotstill: the same command goes on from what is committed", 1)


@app.command
def run(
    config: Path,
    *,
    rounds: Whole | None = None,
    set_: Set = (),
) -> None:
    """Run a recipe, or continue its run, until it has N rounds. An identical second call does nothing.

    The fields of a recipe are described in configs/README.md and configs/schema.py.

    Parameters
    ----------
    config
        The recipe: a TOML file, such as configs/quickstart.toml.
    rounds
        Number of rounds after which to stop, counted from the start of the run. Default: the recipe's.
    set_
        Set a field of the recipe, such as `--set train.learning_rate=1e-4`. May be repeated.
    """
    if rounds is not None and rounds < 0:
        raise BadInput(f"--rounds {rounds}: give 0 or more")
    log_plainly()
    from configs.load import load_recipe

    recipe = load_recipe(config, set_)
    work_on(recipe, rounds)
    from flows.start import announce, check_data, find_result
    from storage.store import Run

    Run(recipe.root, recipe.name).check_recipe(recipe)
    Run(recipe.root, recipe.name).check_free()
    announce(config, recipe, rounds)
    if (result := find_result(recipe, rounds)) is None:
        from flows.server import start_server

        wait_for_server = start_server()  # beside the imports and the checks
        check_data(recipe)
        from flows.refuse import check_recipe

        check_recipe(recipe)
        from flows.distill import distill

        wait_for_server()
        result = distill(str(config), rounds=rounds, overrides=set_)
    print_table(ROUNDS, result["table"])
    print_line(f"The run is in {result['run']}, its last student in {result['student']}")


@app.command
def preflight(
    config: Path,
    *,
    prompts: Whole = 64,
    set_: Set = (),
) -> None:
    """Check a recipe on a few prompts before it is run. The exit status is 1 where a limit of its [gates] is breached.

    Parameters
    ----------
    config
        The recipe: a TOML file, such as configs/quickstart.toml.
    prompts
        Number of its prompts to try.
    set_
        Set a field of the recipe, such as `--set rollout.max_new_tokens=512`. May be repeated.
    """
    if prompts < 1:
        raise BadInput(f"--prompts {prompts}: give 1 or more")
    log_plainly()
    from configs.load import load_recipe

    recipe = load_recipe(config, set_)
    from flows.server import start_server

    wait_for_server = start_server()  # beside the imports and the checks
    from flows.preflight import preflight as run_preflight
    from flows.refuse import check_recipe

    check_recipe(recipe, rendering=False)
    wait_for_server()
    rows = run_preflight(str(config), prompts=prompts, overrides=set_)
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
    """Run a recipe under several objectives. Show how they differ on the same prompts and seeds, with 95% intervals.

    Parameters
    ----------
    config
        The recipe: a TOML file, such as configs/quickstart.toml.
    objectives
        Two or more objectives, such as bytes,gold:merge=sum,alm. The others are compared with the first.
    seeds
        Seeds of each objective's runs, such as 0,1,2. Default: the recipe's seed.
    rounds
        Number of rounds after which to compare. Default: the recipe's.
    set_
        Set a field of the recipe, such as `--set rollout.prompts=512`. May be repeated.
    """
    if rounds is not None and rounds < 1:
        raise BadInput(f"--rounds {rounds}: give 1 or more")
    if not all(seed.strip().isdecimal() for seed in seeds.split(",") if seeds):
        raise BadInput(f"--seeds {seeds}: give whole numbers with commas between them, such as 0,1,2")
    log_plainly()
    from flows.server import start_server

    wait_for_server = start_server()  # beside the imports and the checks
    from flows.compare import compare as run_comparison
    from flows.compare import plan_runs

    names, numbers = tuple(objectives.split(",")), tuple(int(seed) for seed in seeds.split(",") if seeds)
    plan_runs(str(config), names, numbers, set_)
    wait_for_server()
    rows = run_comparison(str(config), objectives=names, seeds=numbers, rounds=rounds, overrides=set_)
    print_table("Objectives (difference: of accuracy; divergence: nats per byte; seconds: of training)", rows)


@app.command
def inspect(
    run: str,
    *,
    round: Whole | None = None,
    rollout: str | None = None,
    lineage: Flag = False,
    verify: Flag = False,
) -> None:
    """Show a run's tables, one of its rounds, one rollout token by token, or what a checkpoint was made from.

    Parameters
    ----------
    run
        A run's folder or URI, such as runs/quickstart.
    round
        Show this round: its byte accounts and some of its rollouts.
    rollout
        Show the rollout with this `rollout_id`: the text that each side read, and each token's bytes, its unit, and both
        models' log-probs.
    lineage
        Show what the last checkpoint (or that of `--round`) was made from, with digests, options and versions.
    verify
        Compute every digest again and list altered or missing artifacts. The exit status is 1 if there are any.
    """
    from tasks.views import inspect as show
    from tasks.views import trace
    from tasks.views.rounds import format_rounds, summarise_rounds

    show.check_run(run)
    if verify:
        damages = trace.find_damage(run)
        print_table("Altered or missing artifacts", damages)
        total = trace.count_artifacts(run)
        out.print(f"{total - len(damages)} of {total} artifacts are what their manifests say")
        sys.exit(bool(damages))
    with trace.refuse_damage(run):
        if lineage:
            tables = trace.trace_lineage(run, round)
        elif rollout is not None:
            from tasks.views.rollout import show_rollout

            tables = show_rollout(run, rollout)
        elif round is not None:
            tables = show.show_round(run, round)
        else:
            rounds, prompts = format_rounds(summarise_rounds(run)), show.show_prompts(run)
            tables = {ROUNDS: rounds, "Prompts": prompts, "Tables": show.list_tables(run)}
    if damages := trace.find_damage(run, read=False):
        print_table("Damaged artifacts; the same `potstill run` command makes them again", damages)
    for title, rows in tables.items():
        print_table(title, rows)


@app.command
def report(run: str) -> None:
    """Write a run's report.html: one file with its figures, charts and shaded samples, for a browser.

    Parameters
    ----------
    run
        A run's folder or URI, such as runs/quickstart.
    """
    from tasks.views import inspect as show
    from tasks.views.report import write_report
    from tasks.views.trace import refuse_damage

    show.check_run(run)
    with refuse_damage(run, sizes_first=True):
        print_line(write_report(show.open_run(run)))


@app.command
def push(run: str, repo: str, *, round: Whole | None = None, best: Flag = False, public: Flag = False) -> None:
    """Send a round's student and its model card to the Hugging Face Hub. The token is taken from HF_TOKEN.

    Parameters
    ----------
    run
        A run's folder or URI, such as runs/quickstart.
    repo
        The repository, such as user/quickstart; made where it is missing.
    round
        The round to send. Default: the last.
    best
        Send the round that is best by the recipe's `evaluate.best`.
    public
        Make a new repository public, not private.
    """
    from flows.push import push_student

    print_line(push_student(run, repo, number=round, best=best, public=public))


@app.command
def align(
    student: str,
    teacher: str,
    *,
    text: str = "The quick brown fox doesn't jump: naïve café, 3.14159 👩‍👩‍👧",
    file: Path | None = None,
    out_: Annotated[Path | None, Parameter(name="--out")] = None,
) -> None:
    """Show two tokenizations of a text side by side, or align a file of texts.

    Parameters
    ----------
    student
        Hub id, folder or .gguf file. Only its tokenizer is read.
    teacher
        Hub id, folder or .gguf file. Only its tokenizer is read.
    text
        The text to show.
    file
        A .jsonl or .parquet file with a `text` column, in place of a text.
    out_
        Write the units of every row of the file to this Parquet file: the columns of `aligned` that need no model.
    """
    from tasks.models.text import tokenizer_of
    from tasks.views import texts as show

    student_side, teacher_side = tokenizer_of(student), tokenizer_of(teacher)
    names, texts = ["text"], [text]
    if file is not None:
        names, texts = show.read_texts(file)
    elif out_ is not None:
        raise BadInput("--out writes the units of a file: give --file, too")
    aligned = show.align_texts(names, texts, student_side, teacher_side)
    if out_ is not None:
        show.write_units(aligned.table, out_)
    elif file is None and aligned.table["status"][0].as_py() == "ok":
        for pair in show.format_pairs(text, aligned.table.to_pylist()[0], student_side, teacher_side, out.width - 10):
            for role, line in zip(("student", "teacher"), pair, strict=True):
                out.print(Text(escape_controls(f"{role}  {line}")))
            out.print()
    for title, rows in show.summarise_alignment(aligned, student_side, teacher_side).items():
        print_table(title, rows)


@app.command
def up() -> None:
    """Start Prefect's server, a worker and the deployments of prefect.yaml, all in one. Ctrl-C ends all of it.

    A server that PREFECT_API_URL or a profile of Prefect names is used in place of a new one.
    """
    from flows.up import bring_up

    bring_up(print_line)


app.command("flows.recipe:recipe", help="Write a commented recipe to start from, or tell what a recipe may say.")


if __name__ == "__main__":
    main()

"""The commands that look at a run, a recipe or two tokenizers, and hand on: inspect, report, push, align."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.text import Text

from configs.errors import BadInput
from flows.options import ROUNDS, Flag, Whole
from flows.terminal import log_plainly, out, print_line, print_table
from tasks.running.progress import logger
from tasks.views.escapes import escape_controls


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
    from tasks.views.rounds import tabulate_rounds

    show.check_run(run)
    if verify:
        damages = trace.find_damage(run)
        print_table("Altered or missing artifacts", damages)
        total, cleared = trace.count_artifacts(run)
        more = f"; {cleared} more cleared" if cleared else ""
        out.print(f"{total - len(damages)} of {total} artifacts are what their manifests say{more}")
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
            rounds, prompts = tabulate_rounds(run), show.show_prompts(run)
            tables = {ROUNDS: rounds, "Prompts": prompts, "Tables": show.list_tables(run)}
    if damages := trace.find_damage(run, read=False):
        print_table("Damaged artifacts; the same `potstill run` command makes them again", damages)
    for title, rows in tables.items():
        print_table(title, rows)


def report(run: str) -> None:
    """Write a run's report.html: one file with its figures, charts and shaded samples, for a browser.

    Parameters
    ----------
    run
        A run's folder or URI, such as runs/quickstart.
    """
    from tasks.views import inspect as show
    from tasks.views.trace import refuse_damage

    show.check_run(run)
    log_plainly()
    with refuse_damage(run, sizes_first=True):
        logger.info("%s: reading its tables, and prompts as both sides' tokenizers give them", run)
        from tasks.views.report import write_report

        print_line(write_report(show.open_run(run)))


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
    from tasks.rows.messages import is_text
    from tasks.views import texts as show

    if not is_text(text):
        raise BadInput(f"--text {text!a:.60}: not UTF-8; give a text that is")
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

"""What a flow run shows in Prefect's UI: its progress, a table of rounds, a summary, the report's address."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import runtime
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from configs.load import load_recipe
from configs.schema import Recipe
from flows.start import describe_result
from storage.artifacts import Artifact
from storage.store import Run, round_slot
from tasks.running.progress import logger
from tasks.views.card import FILE, write_card
from tasks.views.rounds import tabulate_rounds

HEADLINE = {"sampled": "", "greedy": "", "recovered": "", "divergence": " nats per byte"}  # figures and their units


class Publication:
    """The artifacts of one flow run that takes `run` from `done` rounds to `target`."""

    def __init__(self, run: Run, recipe: Recipe, *, done: int, target: int):
        self.run, self.recipe, self.done, self.target = run, recipe, done, target
        self.bar = create_progress_artifact(
            100 * done / max(target, done, 1),
            key=slug(run.name, "progress"),
            description=f"rounds of {run.name}, {target} in all",
        )

    def add_round(self, number: int) -> None:
        """Publish a finished round: the table of rounds, the progress, one line in the log."""
        rows = tabulate_rounds(self.run.address)
        description = f"after round {number} (accuracies with 95% intervals; divergence: nats per byte)"
        create_table_artifact(rows, key=slug(self.run.name, "rounds"), description=description)
        update_progress_artifact(self.bar, 100 * number / self.target)  # type: ignore[arg-type]
        figures = [f"{key} {rows[-1][key]}{unit}" for key, unit in HEADLINE.items() if rows[-1].get(key) is not None]
        logger.info("round %d: %s", number, ", ".join(figures))
        write_card(self.run, number)

    def complete_round(self, number: int) -> None:
        """Write the card of a round that was committed, and stopped before it had one."""
        if not self.run.fs.exists(f"{self.run.path}/{round_slot(number, FILE)}"):
            write_card(self.run, number)

    def finish(self, student: Artifact) -> dict[str, Any]:
        """Publish the summary and the report, if a round was added. Returns the flow's result: run, rounds, last student."""
        if self.target > self.done:
            # Charts' libraries take half a second, which a start need not wait for.
            from tasks.views.report import write_report
            from tasks.views.summary import summarise_run

            address = write_report(self.run)
            link = Path(address).as_uri() if self.run.local else address
            about = f"{self.run.name}: rounds, charts, and answers before and after"
            create_markdown_artifact(
                summarise_run(self.run, self.recipe), key=slug(self.run.name, "summary"), description=about
            )
            about = "the report: one file with everything that it shows; a browser opens it from its own address bar"
            create_link_artifact(link, link_text=address, key=slug(self.run.name, "report"), description=about)
        return describe_result(self.run, student)


def named(describe: Callable[[Recipe, dict[str, Any]], str]) -> Callable[[], str]:
    """For a flow's `flow_run_name`: what `describe` says of its recipe and parameters; else the name of the recipe's file."""

    def name() -> str:
        told = runtime.flow_run.parameters
        try:
            return describe(load_recipe(told["config"], told["overrides"]), told)
        except Exception:  # the flow says what is wrong
            return Path(told["config"]).stem

    return name


def name_rounds(name: str, *, done: int, target: int) -> str:
    """What a flow run is called: its recipe and the rounds that it adds, as `quickstart · rounds 4–10`."""
    if target <= done:
        return f"{name} · complete"
    return f"{name} · round {target}" if target == done + 1 else f"{name} · rounds {done + 1}–{target}"


def slug(*parts: str) -> str:
    """The key of an artifact in Prefect: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")

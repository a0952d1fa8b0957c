"""What a flow run shows in Prefect's UI: its progress, a table of rounds, a summary, a link to the report."""

import re
from typing import Any

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from flows.start import describe_result
from storage.artifacts import Artifact
from storage.store import Run
from tasks.running.progress import logger
from tasks.views.rounds import format_markdown, format_rounds, summarise_rounds

HEADLINE = {"sampled": "", "greedy": "", "recovered": "", "divergence": " nats per byte"}  # figures and their units


class Publication:
    """The artifacts of one flow run that takes `run` from `done` rounds to `target`."""

    def __init__(self, run: Run, done: int, target: int):
        self.run, self.done, self.target = run, done, target
        self.bar = create_progress_artifact(100 * done / max(target, done, 1), key=slug(run.name, "progress"))

    def add_round(self, number: int) -> None:
        """Publish a finished round: the table of rounds, the progress, one line in the log."""
        rows = format_rounds(summarise_rounds(self.run.address))
        description = f"after round {number} (accuracies with 95% intervals; divergence: nats per byte)"
        create_table_artifact(rows, key=slug(self.run.name, "rounds"), description=description)
        update_progress_artifact(self.bar, 100 * number / self.target)  # type: ignore[arg-type]
        figures = [f"{key} {rows[-1][key]}{unit}" for key, unit in HEADLINE.items() if rows[-1].get(key) is not None]
        logger.info("round %d: %s", number, ", ".join(figures))

    def finish(self, student: Artifact) -> dict[str, Any]:
        """Publish the summary, and the report if a round was added. Returns the flow's result: run, rounds, last student."""
        table = summarise_rounds(self.run.address)
        create_markdown_artifact(format_markdown(table, self.run.address), key=slug(self.run.name, "summary"))
        if self.target > self.done:
            from tasks.views.report import write_report  # its charts' libraries are half a second of a start

            create_link_artifact(write_report(self.run), link_text="report", key=slug(self.run.name, "report"))
        return describe_result(self.run, student)


def slug(*parts: str) -> str:
    """The key of an artifact in Prefect: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")

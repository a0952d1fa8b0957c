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

from storage.artifacts import Artifact
from storage.store import Run
from tasks.running.progress import logger
from tasks.views.report import write_report
from tasks.views.rounds import format_rounds, summarise_rounds, to_markdown

HEADLINE = ("sampled", "greedy", "recovered", "divergence")


class Publication:
    """The artifacts of one flow run that takes `run` from `done` rounds to `target`."""

    def __init__(self, run: Run, done: int, target: int):
        self.run, self.done, self.target = run, done, target
        self.bar = create_progress_artifact(100 * done / max(target, done, 1), key=slug(run.name, "progress"))

    def add_round(self, number: int) -> None:
        """After a round: the table of rounds, the progress, one line in the log."""
        rows = format_rounds(summarise_rounds(self.run.address))
        create_table_artifact(rows, key=slug(self.run.name, "rounds"), description=f"after round {number}")
        update_progress_artifact(self.bar, 100 * number / self.target)  # type: ignore[arg-type]
        figures = [f"{key} {rows[-1][key]}" for key in HEADLINE if rows[-1].get(key) is not None]
        logger.info("round %d: %s", number, ", ".join(figures))

    def finish(self, student: Artifact) -> dict[str, Any]:
        """A summary, and the report where a round was added. What the flow returns: where all lies, and the rounds."""
        table = summarise_rounds(self.run.address)
        create_markdown_artifact(to_markdown(table, self.run.address), key=slug(self.run.name, "summary"))
        if self.target > self.done:
            create_link_artifact(write_report(self.run), link_text="report", key=slug(self.run.name, "report"))
        return {
            "run": self.run.address,
            "rounds": self.run.rounds_done(),
            "student": student.path,
            "table": format_rounds(table),
        }


def slug(*parts: str) -> str:
    """A key of an artifact in Prefect: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")

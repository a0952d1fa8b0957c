"""`[track]`: experiment trackers, through Accelerate, follow the rounds of a run.

They are fed from the tables of each round once it is complete. So they show what is kept and nothing else: a round that was
stopped and is made again is sent once, and one that was taken over from another run is sent, too. `track.json` in the run's
folder says which rounds each tracker has.
"""

import json
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from pydantic import NonNegativeInt, TypeAdapter

from configs.errors import BadInput
from configs.load import flatten
from configs.schema import Recipe
from configs.track import TrackerName
from storage.store import Run
from tasks.running.progress import logger
from tasks.views.metrics import list_metrics

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

FILE = "track.json"
IN_THE_EXTRA = ("tensorboard", "trackio", "wandb")
IN_THE_RUN = ("dvclive", "tensorboard")  # write a folder of theirs in the run's


@dataclass(frozen=True)
class Sent:
    """What `track.json` says."""

    id: str = ""  # by which wandb knows the run again
    sent: dict[str, NonNegativeInt] = field(default_factory=dict)  # the last round that each tracker has


SENT = TypeAdapter(Sent)


def check_trackers(recipe: Recipe) -> None:
    """Refuse trackers that are not installed, or that cannot write where the run lies."""
    if missing := [name for name in recipe.track.names if find_spec(name) is None]:
        packages = sorted({"-e '.[trackers]'" if name in IN_THE_EXTRA else name.replace("_", "-") for name in missing})
        raise BadInput(f"track.with: {', '.join(missing)}: not installed: pip install {' '.join(packages)}")
    here = [name for name in recipe.track.names if name in IN_THE_RUN]
    if here and not Run(recipe.root, recipe.name).local:
        raise BadInput(f"track.with: {here[0]} writes to a local disk, and root is {recipe.root}; choose wandb or trackio")


class Trackers:
    """The trackers of a run. What one of them has not had yet is sent to it first."""

    def __init__(self, run: Run, recipe: Recipe):
        self.run, self.recipe = run, recipe
        self.started: dict[TrackerName, GeneralTracker] = {}
        try:
            found = SENT.validate_json(run.read_text(FILE)) if run.fs.exists(f"{run.path}/{FILE}") else Sent()
        except ValueError:
            raise BadInput(
                f"{run.path}/{FILE}: not what was written there; remove it, and every round is sent to the trackers again"
            ) from None
        self.id = found.id or uuid.uuid4().hex
        self.sent = found.sent

    def have(self, number: int) -> bool:
        """Whether each of them has the rounds up to `number`."""
        return all(self.sent.get(name, -1) >= number for name in self.recipe.track.names)

    def send(self, number: int) -> None:
        """Send the rounds up to `number`. A run does not end by what a tracker raises: it is logged, and sent again later."""
        for name in self.recipe.track.names:
            try:
                with redirect_stdout(sys.stderr):  # what they print is no result
                    self._send(name, number)
            except Exception as error:
                logger.info("track.with: %s: %s: %s; the same command sends it again", name, type(error).__name__, error)

    def _send(self, name: TrackerName, last: int) -> None:
        for number in range(self.sent.get(name, -1) + 1, last + 1):
            if name not in self.started:
                self.started[name] = self._start(name)
            for step, figures in list_metrics(self.run.address, number):
                self.started[name].log(figures, step=step)
            self.sent[name] = number
            self.run.write_text(FILE, json.dumps(asdict(Sent(self.id, self.sent)), indent=1))

    def _start(self, name: TrackerName) -> "GeneralTracker":
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        project, run, place = self.recipe.track.project, self.run.name, self.run.path
        arguments: dict[TrackerName, tuple[tuple[str, ...], dict[str, Any]]] = {
            "tensorboard": ((name, place), {}),  # it joins them
            "trackio": ((project,), {"name": run, "resume": "allow"}),
            "wandb": ((project,), {"name": run, "id": self.id, "resume": "allow"}),
            "aim": ((run,), {"experiment": project}),
            "clearml": ((project,), {"task_name": run}),
            "comet_ml": ((project,), {}),
            "dvclive": ((project,), {"dir": f"{place}/{name}", "resume": True}),
            "mlflow": ((project,), {"run_name": run}),
            "swanlab": ((project,), {"experiment_name": run}),
        }
        given, named = arguments[name]
        tracker: GeneralTracker = LOGGER_TYPE_TO_CLASS[name](*given, **named)
        tracker.start()
        if name != "tensorboard" or name not in self.sent:  # which would show them as one more run
            options = flatten(self.recipe.model_dump(mode="json", exclude_none=True))
            plain = {
                key: value if isinstance(value, bool | int | float | str) else json.dumps(value)
                for key, value in options.items()
            }
            tracker.store_init_configuration(plain)
        return tracker

    def finish(self) -> None:
        """Let each tracker write what it holds back."""
        for name, tracker in self.started.items():
            try:
                with redirect_stdout(sys.stderr):
                    tracker.finish()
            except Exception as error:
                logger.info("track.with: %s: %s: %s", name, type(error).__name__, error)


@contextmanager
def follow(run: Run, recipe: Recipe) -> Iterator[Trackers]:
    """The trackers that the recipe names, until the run ends in whatever way."""
    trackers = Trackers(run, recipe)
    try:
        yield trackers
    finally:
        trackers.finish()

"""`[track]` of a recipe: experiment trackers that follow a run. They change nothing of it."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, create_model

from configs.fields import Table

TrackerName = Literal["tensorboard", "trackio", "wandb", "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab"]


class TrackFields(Table):
    """Experiment trackers that follow a run: its optimizer steps, gates and evaluations."""

    project: str = Field("potstill", min_length=1, description="the project there; a run has the recipe's name in it")

    @property
    def names(self) -> tuple[TrackerName, ...]:
        """The field `with`, which is a word of Python's."""
        names: tuple[TrackerName, ...] = getattr(self, "with")
        return names


if TYPE_CHECKING:
    Track = TrackFields
else:
    about = "trackers to send to, as ['trackio', 'wandb'] (the `trackers` extra has tensorboard, trackio and wandb)"
    Track = create_model(
        "Track",
        __base__=TrackFields,
        __doc__=TrackFields.__doc__,
        __module__=__name__,
        **{"with": (tuple[TrackerName, ...], Field((), description=about))},
    )

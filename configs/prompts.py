"""`[prompts]` of a recipe: where prompts come from."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from configs.fields import Float, Int, LocalPath, Table


class PromptSource(Table):
    train: Int | None = Field(None, ge=1, description="training prompts; left out: all that are not held out")
    eval: Int = Field(128, ge=1, description="held-out prompts, disjoint from the training ones")
    template: str = Field(
        "{question}", min_length=1, description="the user message; names a row's fields in braces, {question} the plain one"
    )


class GymPrompts(PromptSource):
    """Procedural tasks with scorers; their supply has no end."""

    source: Literal["reasoning-gym"]
    train: Int = Field(1024, ge=1, description="training prompts")
    task: str = Field(min_length=1, description="name of a reasoning-gym dataset")
    options: dict[str, Any] = Field(default_factory=dict, description="options of that dataset")


class Columns(Table):
    """Columns that take the place of a convention's."""

    prompt: str | None = Field(None, min_length=1, description="text, or a list of messages")
    reference: str | None = Field(None, min_length=1, description="text, a number, or true or false")


class TablePrompts(PromptSource):
    """Rows in a convention of data sets (tasks/rows/conventions.py); columns it does not read are kept as metadata."""

    convention: str | None = Field(None, min_length=1, description="left out: recognised from the columns")
    columns: Columns = Columns()
    turns: Literal["last", "all"] = Field(
        "last",
        description="which answers of a conversation are learnt from: the last one, or each of the assistant's, a row a turn",
    )
    unusable: Literal["refuse", "leave_out"] = Field(
        "refuse",
        description="rows that cannot be read, or that a side cannot read whole or has no room for: refuse ends the command, "
        "leave_out goes on without them, counted by reason",
    )


class WeightedPath(Table):
    """Rows from one of several places."""

    path: LocalPath = Field(description="as prompts.path")
    weight: Float | None = Field(None, gt=0, description="its share of the training prompts, relative to the others'")
    add: dict[str, Any] = Field(
        {},
        description="columns that each of its rows gets, as { task = 'sums' }, for teachers.where or a template to name",
        exclude_if=lambda columns: not columns,
    )


class FilePrompts(TablePrompts):
    """Rows of files."""

    source: Literal["file"]
    path: LocalPath | None = Field(
        None, description="a file, a folder of them or a pattern such as data/*.parquet; relative to the recipe"
    )
    paths: tuple[WeightedPath, ...] = Field((), description="several of them, in place of path")

    @model_validator(mode="after")
    def _one_of_them(self) -> "FilePrompts":
        if (self.path is None) == (not self.paths):
            found = "both are missing" if self.path is None else "both are there"
            raise ValueError(f"give prompts.path or prompts.paths: {found}")
        return self

    @property
    def entries(self) -> tuple[WeightedPath, ...]:
        return self.paths or (WeightedPath(path=self.path or ""),)


class HubPrompts(TablePrompts):
    """A Hugging Face dataset (needs the `hub` extra); columns as for `file`."""

    source: Literal["hub"]
    dataset: str = Field(min_length=1, description="hub id or local folder")
    subset: str | None = Field(None, description="the dataset's configuration, where it has several")
    hub_split: str = Field("train", min_length=1, description="the dataset's split to read from")


class CachePrompts(Table):
    """The prompts of a cache, each of which has a text in it."""

    source: Literal["cache"]
    dataset: str = Field(min_length=1, description="as teacher.cache: a folder that `potstill cache export` wrote, or a hub id")
    train: Int | None = Field(None, ge=1, description="training prompts; left out: all that are not held out")
    eval: Int = Field(128, ge=1, description="held-out prompts, disjoint from the training ones")


Prompts = Annotated[GymPrompts | FilePrompts | HubPrompts | CachePrompts, Field(discriminator="source")]

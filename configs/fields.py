"""What every table of a recipe is made of."""

from typing import Annotated

import pydantic
from pydantic import BaseModel, ConfigDict

Int = Annotated[int, pydantic.Strict()]  # TOML knows its types: neither "3" nor true is a number
Float = Annotated[float, pydantic.Strict()]


class Table(BaseModel):
    """A TOML table: immutable, and a key that nothing reads is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

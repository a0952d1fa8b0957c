"""What the options of several commands have in common."""

from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import Parameter


def _parse_whole(_: Any, tokens: Sequence[Any]) -> int:
    return int(tokens[0].value)  # cyclopts itself would round 1.5


Whole = Annotated[int, Parameter(converter=_parse_whole)]
Flag = Annotated[bool, Parameter(negative="")]
Set = Annotated[tuple[str, ...], Parameter(name="--set", negative="")]
ROUNDS = "Rounds (accuracies with 95% intervals; divergence: nats per byte; tokens: mean length)"

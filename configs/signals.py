"""What can be stored of a teacher at every token, beside the log-prob of the token itself (MATHS.md §6). Each is declared once.

How a signal is stored and read is `tasks/signals/NAME.py`; its columns are in `storage/schemas.py`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

# What an objective can be computed from: the log-probs of the tokens that are there, distributions over the teacher's
# ids, or laws of the next byte.
Quantity = Literal["path", "ids", "laws"]


@dataclass(frozen=True)
class SignalKind:
    """One value of `score.signal`."""

    name: str
    gives: frozenset[Quantity]
    whole: bool = False  # made from whole distributions or hidden states, which the engine 'transformers' alone has
    cut: bool = False  # score.k and score.top_p decide what is stored; else what is read later
    counts_ids: bool = False  # score.k counts ids of the teacher's vocabulary
    needs_head: bool = False  # to be read it needs the teacher's head, which is kept once a run


SIGNALS = {
    kind.name: kind
    for kind in (
        SignalKind("topk", frozenset(("path", "ids")), cut=True, counts_ids=True),
        SignalKind("bytes", frozenset(("path", "laws")), whole=True, cut=True),
        SignalKind("hidden", frozenset(("path", "ids", "laws")), whole=True, counts_ids=True, needs_head=True),
        SignalKind("sampled", frozenset(("path",))),
    )
}

if TYPE_CHECKING:
    SignalName = str
else:
    SignalName = Literal[tuple(SIGNALS)]


def signals_for(reads: frozenset[Quantity]) -> list[str]:
    """Names of the signals that an objective which `reads` one of these quantities can be computed from."""
    return [name for name, kind in SIGNALS.items() if kind.gives & reads]

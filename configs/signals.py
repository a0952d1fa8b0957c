"""The signals of a teacher: what is stored at every token, beside its log-prob (MATHS.md §6). Each is declared once.

`tasks/signals/NAME.py` stores and reads a signal; its columns are in `storage/schemas.py`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

# What an objective can be computed from: log-probs of the actual tokens, distributions over the teacher's ids, or next-byte
# laws.
Quantity = Literal["path", "ids", "laws"]


@dataclass(frozen=True)
class SignalKind:
    """One value of `score.signal`."""

    name: str
    gives: frozenset[Quantity]
    whole: bool = False  # made from whole distributions or hidden states, which a server does not give
    cut: bool = False  # score.k and score.top_p decide what is stored; otherwise what is read later
    counts_ids: bool = False  # score.k counts ids of the teacher's vocabulary
    needs_head: bool = False  # reading it needs the teacher's head, which is kept once per run


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
    """Names of the signals from which an objective that `reads` one of these quantities can be computed."""
    return [name for name, kind in SIGNALS.items() if kind.gives & reads]

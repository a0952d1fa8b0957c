"""Signals, one per file: how an engine stores them and how objectives read them (MATHS.md §6)."""

from importlib import import_module

from tasks.signals.base import Signal


def make_signal(kind: str = "topk", k: int = 64, top_p: float = 1.0) -> Signal:
    """Make the signal `kind` of configs/signals.py: `<Kind>Signal` in the file of its name.

    At most `k` events per token are kept, fewer once they hold the mass `top_p`.
    """
    signal: Signal = getattr(import_module(f"tasks.signals.{kind}"), f"{kind.capitalize()}Signal")(k, top_p)
    return signal

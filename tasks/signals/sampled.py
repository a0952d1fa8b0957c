"""`sampled`: only the log-probs of the completion's tokens."""

from tasks.signals.base import Signal


class SampledSignal(Signal):
    """No columns, and no events."""

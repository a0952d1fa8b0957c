"""`sampled`: nothing beside the log-probs of the tokens that are there."""

from tasks.signals.base import Signal


class SampledSignal(Signal):
    pass

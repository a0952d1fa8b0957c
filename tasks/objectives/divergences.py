"""Divergences between two distributions over the same few events, and the bucket for the rest (MATHS.md §4)."""

from typing import Literal

import torch

# Log masses are raised to at least this, in nats: an event that is impossible on one side costs at most 20 nats, not infinity.
FLOOR = -20.0


def jsd(t: torch.Tensor, s: torch.Tensor, beta: float, floor: float = FLOOR) -> torch.Tensor:
    """JSD_β(T‖S) = β·KL(T‖M) + (1-β)·KL(S‖M) with M = βT + (1-β)S, over the last dimension: `[…]`, in nats.

    `t` and `s` `[…, K]` are log masses of the same events; -inf on both sides is padding. By convention β = 0 is forward
    KL(T‖S) and β = 1 reverse KL(S‖T), although it is JSD_β / β that tends to KL(T‖S) as β → 0. (GKD, arXiv 2306.13649)
    """
    t_mass, s_mass = t.exp(), s.exp()
    t, s = t.clamp(min=floor), s.clamp(min=floor)
    if beta == 0:
        return (t_mass * (t - s)).sum(-1)
    if beta == 1:
        return (s_mass * (s - t)).sum(-1)
    mixed = (beta * t_mass + (1 - beta) * s_mass).clamp(min=torch.finfo(t.dtype).tiny).log().clamp(min=floor)
    return (beta * t_mass * (t - mixed) + (1 - beta) * s_mass * (s - mixed)).sum(-1)


def log_rest(s: torch.Tensor) -> torch.Tensor:
    """log(1 - Σ exp s), `[…, 1]`, of log masses `s` `[…, K]`: the log mass outside the events."""
    return (1 - s.exp().sum(-1, keepdim=True)).clamp(min=torch.finfo(s.dtype).eps).log()


def bucketed_jsd(
    t: torch.Tensor,
    t_rest: torch.Tensor,
    s: torch.Tensor,
    beta: float,
    rest: Literal["bucket", "drop", "renormalise"] = "bucket",
) -> torch.Tensor:
    """JSD_β on a truncated support, with one more event for the mass outside it: `[…]`, in nats.

    `t` and `s` `[…, K]` are log masses on the support. `t_rest` `[…]` is the teacher's log mass outside; the student's is what
    `s` leaves of 1. With the bucket it is a divergence of two distributions: never negative, a lower bound of the full one,
    and exact where the support is everything.
    """
    if rest == "renormalise":
        none = t.isneginf().all(-1, keepdim=True)  # no event at all: nothing to compare
        t, s = t.masked_fill(none, 0.0), s.masked_fill(none, 0.0)
        return jsd(t.log_softmax(-1), s.log_softmax(-1), beta)
    if rest == "drop":
        return jsd(t, s, beta)
    return jsd(torch.cat([t, t_rest[..., None]], -1), torch.cat([s, log_rest(s)], -1), beta)

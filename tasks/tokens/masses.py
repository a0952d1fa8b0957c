"""Probabilities read from logits in few passes over the vocabulary: single ids, sums over sets of ids, the likeliest."""

from collections.abc import Callable
from typing import Any, Protocol

import torch

STRIDE = 32  # ids of which the largest is found first


def find_likeliest(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of `values` `[rows, N]` (all, if there are fewer), the largest first, and where they stand.

    They are in those k groups of ids whose maxima are the largest: one pass over the values, and few are sorted.
    """
    size, width = values.shape[1], values.shape[1] // STRIDE
    if 2 * k > width:
        return torch.topk(values, min(k, size))
    maxima = values[:, : STRIDE * width].unflatten(1, (STRIDE, width)).amax(1)
    groups = maxima.topk(k, sorted=False).indices
    members = (torch.arange(STRIDE, device=values.device)[:, None] * width + groups[:, None, :]).flatten(1)
    left_over = torch.arange(STRIDE * width, size, device=values.device).expand(len(values), -1)
    candidates = torch.cat([members, left_over], 1)
    top, at = values.gather(1, candidates).topk(k)
    return top, candidates.gather(1, at)


class Sums(Protocol):
    """Sums of masses over sets of ids."""

    def add_up(self, mass: torch.Tensor) -> torch.Tensor:
        """`[positions, sets]` from masses `[positions, V]`."""
        ...

    def spread(self, of_sets: torch.Tensor, of_others: torch.Tensor) -> torch.Tensor:
        """`[positions, V]`: to each id the value `[positions, sets]` of its set, or `[positions, 1]` where it has none."""
        ...


class _Masses(torch.autograd.Function):
    """softmax and what is read of it. The backward pass turns the masses into the gradient, in place: it can run once.

    New arrays of the logits' size are what a loss step spends most time on, on a CPU: their pages have to be made.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, find: Callable[[torch.Tensor], torch.Tensor], sums: Sums | None) -> Any:
        mass = logits.softmax(-1)
        places = find(mass)
        read = mass.view(-1)[places]
        totals = mass.new_zeros(len(mass), 0) if sums is None else sums.add_up(mass)
        ctx.save_for_backward(mass, places, read, totals)
        ctx.sums = sums
        ctx.mark_non_differentiable(places)
        return read, totals, places

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        mass, places, read, totals = ctx.saved_tensors
        of_read, of_totals = gradients[0] * read, gradients[1]
        # d mass_j / d logit_i = mass_i · (δ_ij - mass_j): each gradient less their mean under the distribution
        mean = (of_totals * totals).sum(-1).index_add_(0, places // mass.shape[1], of_read)[:, None]
        gradient = mass.mul_(-mean if ctx.sums is None else ctx.sums.spread(of_totals - mean, -mean))
        gradient.view(-1).index_add_(0, places, of_read)
        return gradient, None, None


def read_masses(
    logits: torch.Tensor, find: Callable[[torch.Tensor], torch.Tensor], sums: Sums | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Masses of the softmax of `logits` `[positions, V]`: of single ids `[N]`, of `sums` `[positions, sets]`, and the places.

    `find` gives the places `[N]` to read, as position · V + id. What it does with the masses has no gradient; it may change
    them for a time.
    """
    read, totals, places = _Masses.apply(logits, find, sums)  # type: ignore[no-untyped-call]
    return read, totals, places

"""Masses read from logits: against the softmax of plain autograd, and a sort."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import SEEDS, random_vocabulary

from tasks.objectives.classes import Subset
from tasks.tokens.byte_laws import ByteLaws
from tasks.tokens.masses import STRIDE, find_likeliest, read_masses


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 40 * STRIDE), st.integers(1, 40))
def test_the_likeliest_are_those_of_a_sort(seed: int, size: int, k: int) -> None:
    """Also among equal values, of which any may be taken, and where nearly all are impossible."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 50, (3, size)) if seed % 2 else rng.normal(size=(3, size))
    values = torch.from_numpy(np.where(rng.random((3, size)) < rng.choice([0.0, 0.98]), -np.inf, values))
    top, ids = find_likeliest(values, k)
    assert torch.equal(top, values.sort(-1, descending=True).values[:, :k])
    assert torch.equal(top, values.gather(1, ids))
    assert all(len(set(row)) == len(row) for row in ids.tolist())


@pytest.mark.parametrize("kind", ["single ids", "a subset", "cells"])
@settings(max_examples=25, deadline=None)
@given(seed=SEEDS)
def test_masses_and_gradients_are_those_of_autograd(kind: str, seed: int) -> None:
    """Of single ids, some of them read several times, and of sums over sets of ids."""
    rng = np.random.default_rng(seed)
    words = random_vocabulary(rng, stops=2, controls=2)
    chosen = np.unique(words.representative[rng.integers(0, words.size, words.size // 2)])
    sums = {"single ids": None, "a subset": Subset(words, chosen), "cells": ByteLaws(words)}[kind]
    logits = torch.from_numpy(rng.normal(size=(4, words.size)) * 2)
    places = torch.from_numpy(rng.integers(0, logits.numel(), 30))
    weights = torch.from_numpy(rng.normal(size=30))

    def gradient(read: torch.Tensor, totals: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        loss = (read * weights).sum() + (totals.log() * torch.arange(1, 1 + totals.shape[1])).sum()
        (found,) = torch.autograd.grad(loss, given)
        return found

    plain = logits.clone().requires_grad_()
    mass = plain.softmax(-1)
    wanted = mass.new_zeros(4, 0) if sums is None else sums.add_up(mass)
    ours = logits.clone().requires_grad_()
    read, totals, found = read_masses(ours, lambda _: places, sums)
    assert torch.equal(found, places)
    assert torch.allclose(read, mass.view(-1)[places])
    assert torch.allclose(totals, wanted)
    assert torch.allclose(gradient(read, totals, ours), gradient(mass.view(-1)[places], wanted, plain), atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(1, 60))
def test_the_likeliest_classes_of_a_subset(seed: int, k: int) -> None:
    """A class counts with all its ids, one outside the subset not at all; the masses are then what they were."""
    rng = np.random.default_rng(seed)
    words = random_vocabulary(rng, stops=2, controls=2)
    chosen = np.unique(words.representative[rng.integers(0, words.size, words.size // 2)])
    mass = torch.from_numpy(rng.dirichlet(np.full(words.size, 0.3), 3)).float()
    before = mass.clone()
    found = Subset(words, chosen).top(mass, k)
    assert torch.equal(mass, before)
    for row, ids in zip(before.numpy(), found.tolist(), strict=True):
        whole = {i: sum(float(row[j]) for j in range(words.size) if words.representative[j] == i) for i in chosen.tolist()}
        assert [whole[i] for i in ids] == pytest.approx(sorted(whole.values(), reverse=True)[:k], rel=1e-5)

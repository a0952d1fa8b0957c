"""`gkd`, and what equals it with one tokenizer (MATHS.md §5; properties 1, 11 and 14), against loops over positions."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from naive import BETAS, MERGES, losses_of, naive_gkd
from toys import SEEDS, losses, random_rows, random_vocabulary, with_student
from toys import vocabulary as toy_vocabulary

from configs.objectives import Bytes, Gkd, Gold, Uld
from tasks import objectives


@pytest.mark.parametrize("k", [None, 4])
@pytest.mark.parametrize("controls", [0, 2])
@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, beta=BETAS)
def test_one_tokenizer(controls: int, k: int | None, seed: int, beta: float) -> None:
    """gkd, and gold with every merge, are JSD_β(t_i, s_i) at every position, stop and control ids included (property 1)."""
    rng = np.random.default_rng(seed)
    toy = random_vocabulary(rng, stops=2, controls=controls)
    rows = random_rows(rng, toy, toy, same_ids=True)
    wanted = naive_gkd(rows, beta, k)
    assert losses_of(rows, Gkd(name="gkd", beta=beta), k) == pytest.approx(wanted, abs=2e-5)
    for merge in MERGES:
        assert losses_of(rows, Gold(name="gold", beta=beta, merge=merge), k) == pytest.approx(wanted, abs=2e-5)


@pytest.mark.parametrize("merge", MERGES)
def test_a_student_that_is_its_teacher_has_no_loss(merge: str) -> None:
    rng = np.random.default_rng(5)
    toy = random_vocabulary(rng, stops=2, controls=2)
    rows = random_rows(rng, toy, toy, same_ids=True)
    rows = with_student(rows, rows.t)
    for beta in (0.0, 0.5, 1.0):
        assert losses_of(rows, Gold(name="gold", beta=beta, merge=merge)) == pytest.approx(
            [0] * sum(map(len, rows.s)), abs=1e-5
        )
        assert losses_of(rows, Bytes(name="bytes", beta=beta)) == pytest.approx([0] * sum(map(len, rows.s)), abs=1e-5)
    assert losses_of(rows, Uld(name="uld")) == pytest.approx([0] * sum(map(len, rows.s)), abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_forward_kl_has_gradient_s_minus_t(seed: int) -> None:
    """At every position, for one tokenizer and the whole vocabulary (property 14)."""
    rng = np.random.default_rng(seed)
    toy = toy_vocabulary([b"a", b"b", b"c", b"ab", b"bca", None], [5])
    rows = random_rows(rng, toy, toy, same_ids=True)
    logits = torch.from_numpy(np.concatenate(rows.s)).requires_grad_()
    module = objectives.build(Gkd(name="gkd", beta=0.0), student=toy, teacher=toy)
    (gradient,) = torch.autograd.grad(losses(module, rows, s=logits.log_softmax(-1)).sum(), logits)
    wanted = np.exp(np.concatenate(rows.s)) - np.exp(np.concatenate(rows.t))
    assert gradient.numpy() == pytest.approx(wanted, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(SEEDS, BETAS)
def test_a_larger_top_k_never_lowers_the_loss(seed: int, beta: float) -> None:
    """The truncated divergence grows with k to the full one, at every position (property 11)."""
    rng = np.random.default_rng(seed)
    toy = toy_vocabulary([b"a", b"b", b"c", b"ab", b"bca", None], [5])
    rows = random_rows(rng, toy, toy, same_ids=True)
    values = [losses_of(rows, Gkd(name="gkd", beta=beta), k) for k in range(1, toy.size + 1)]
    assert all(a <= b + 1e-5 for low, high in pairwise(values) for a, b in zip(low, high, strict=True))
    assert values[-1] == pytest.approx(naive_gkd(rows, beta), abs=2e-5)
    assert min(values[0]) >= -1e-6

"""Divergences (MATHS.md §4; properties 2, 11 and 14), against torch's kl_div, golden numbers and finite differences."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn.functional import kl_div
from toys import SEEDS, random_logprobs

from tasks.objectives.divergences import bucketed_jsd, jsd, log_rest

BETAS = st.sampled_from([0.0, 0.1, 0.37, 0.5, 0.9, 1.0])
INNER = st.floats(0.01, 0.99)


def two(seed: int, size: int = 7, scale: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    t, s = random_logprobs(rng, 2, size, scale)
    return torch.from_numpy(t), torch.from_numpy(s)


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p‖q) of log-probs, by torch."""
    return kl_div(q, p, log_target=True, reduction="sum")


def by_definition(t: torch.Tensor, s: torch.Tensor, beta: float) -> torch.Tensor:
    if beta == 0:
        return kl(t, s)
    if beta == 1:
        return kl(s, t)
    mixture = (beta * t.exp() + (1 - beta) * s.exp()).log()
    return beta * kl(t, mixture) + (1 - beta) * kl(s, mixture)


@pytest.mark.parametrize(("beta", "value"), [(0, 0.023912), (0.1, 0.002143), (0.5, 0.005860), (0.9, 0.002083), (1, 0.023088)])
def test_golden_numbers(beta: float, value: float) -> None:
    """S = (.6, .3, .1), T = (.5, .4, .1): forward KL(T‖S) at β = 0, reverse KL(S‖T) at 1; swapped, 0 and 1 change places."""
    s, t = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.5, 0.4, 0.1]).log()
    assert float(jsd(t, s, beta)) == pytest.approx(value, abs=1e-6)
    assert float(jsd(s, t, 1 - beta)) == pytest.approx(value, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(SEEDS, BETAS | INNER)
def test_equals_the_definition(seed: int, beta: float) -> None:
    t, s = two(seed)
    assert torch.allclose(jsd(t, s, beta), by_definition(t, s, beta), atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(SEEDS, INNER, st.floats(0.1, 4))
def test_bounds_and_symmetry(seed: int, beta: float, scale: float) -> None:
    """0 ≤ JSD_β ≤ H_b(β), zero iff equal, JSD_β(T, S) = JSD_{1-β}(S, T)."""
    t, s = two(seed, scale=scale)
    value = float(jsd(t, s, beta))
    entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert 0 < value <= entropy + 1e-12
    assert float(jsd(t, t, beta)) == pytest.approx(0, abs=1e-12)
    assert value == pytest.approx(float(jsd(s, t, 1 - beta)), abs=1e-12)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_the_upper_bound_is_reached(beta: float) -> None:
    """H_b(β) where the two share no event; events that neither has (-inf) count nothing."""
    t, s = torch.tensor([0.5, 0.5, 0, 0]).log(), torch.tensor([0, 0, 1.0, 0]).log()
    entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert float(jsd(t, s, beta)) == pytest.approx(entropy, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_limits_at_the_ends(seed: int) -> None:
    """JSD_β / β → KL(T‖S) as β → 0 and JSD_β / (1-β) → KL(S‖T) as β → 1: the ends jump in scale, by convention."""
    t, s = two(seed)
    small = 1e-7
    forward, reverse = kl(t, s), kl(s, t)
    assert torch.allclose(jsd(t, s, small) / small, forward, rtol=1e-3)
    assert torch.allclose(jsd(t, s, 1 - small) / small, reverse, rtol=1e-3)
    assert torch.allclose(jsd(t, s, 0.0), forward)
    assert torch.allclose(jsd(t, s, 1.0), reverse)
    assert jsd(t, s, small) < 0.01 * jsd(t, s, 0.0)


@settings(max_examples=60, deadline=None)
@given(SEEDS, BETAS, st.data())
def test_the_rest_bucket(seed: int, beta: float, data: st.DataObject) -> None:
    """Never negative, at most the full divergence, never less on a larger support, exact on all of it (nested supports)."""
    t, s = two(seed)
    order = data.draw(st.permutations(range(len(t))))
    full, before = by_definition(t, s, beta), -1e-9
    for size in range(1, len(order) + 1):
        inside, outside = order[:size], order[size:]
        t_rest = t[outside].logsumexp(0) if outside else torch.tensor(-torch.inf, dtype=t.dtype)
        value = float(bucketed_jsd(t[inside], t_rest, s[inside], beta))
        # Independently: the divergence of the two distributions over the support and one more event.
        if outside:
            merged_t = torch.cat([t[inside], t[outside].logsumexp(0, keepdim=True)])
            merged_s = torch.cat([s[inside], s[outside].logsumexp(0, keepdim=True)])
            assert value == pytest.approx(float(by_definition(merged_t, merged_s, beta)), abs=1e-9)
        assert before <= value + 1e-9
        assert -1e-9 <= value <= full + 1e-9
        before = value
    assert before == pytest.approx(float(full), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(SEEDS, BETAS)
def test_drop_and_renormalise_by_name(seed: int, beta: float) -> None:
    """`drop` sums over the support alone; `renormalise` compares the two conditional distributions on it."""
    t, s = two(seed)
    inside, t_rest = [0, 2, 3], t[[1, 4, 5, 6]].logsumexp(0)
    t_in, s_in = t[inside], s[inside]
    renormalised = by_definition(t_in - t_in.logsumexp(0), s_in - s_in.logsumexp(0), beta)
    assert torch.allclose(bucketed_jsd(t_in, t_rest, s_in, beta, "renormalise"), renormalised, atol=1e-10)
    t_mass, s_mass = t_in.exp(), s_in.exp()
    if beta in (0, 1):
        dropped = (t_mass * (t_in - s_in)).sum() if beta == 0 else (s_mass * (s_in - t_in)).sum()
    else:
        m = (beta * t_mass + (1 - beta) * s_mass).log()
        dropped = (beta * t_mass * (t_in - m) + (1 - beta) * s_mass * (s_in - m)).sum()
    assert torch.allclose(bucketed_jsd(t_in, t_rest, s_in, beta, "drop"), dropped, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(SEEDS, BETAS, st.sampled_from(["bucket", "drop", "renormalise"]))
def test_padding_of_the_support_counts_nothing(seed: int, beta: float, rest: str) -> None:
    """Events at -inf on both sides (how ragged supports are padded) change neither value nor gradient."""
    t, s = two(seed)
    t_rest = torch.tensor(math.log(0.2), dtype=t.dtype)
    t_in, s_in = t[:4] + math.log(0.8) - t[:4].logsumexp(0), (s[:4] - 0.1).clone().requires_grad_()
    padding = torch.full((3,), -torch.inf, dtype=t.dtype)
    plain = bucketed_jsd(t_in, t_rest, s_in, beta, rest)
    padded = bucketed_jsd(torch.cat([t_in, padding]), t_rest, torch.cat([s_in, padding]), beta, rest)
    assert torch.allclose(plain, padded, atol=1e-12)
    (wanted,), (got,) = (torch.autograd.grad(value, s_in) for value in (plain, padded))
    assert torch.allclose(wanted, got, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_moving_mass_out_of_the_support_raises_the_divergence(seed: int) -> None:
    """Where the teacher has nothing outside, each share of the student that leaves the support costs more (property 18)."""
    t, s = two(seed)
    assume(float(kl(s, t)) < 8)
    for beta in (0.0, 0.3, 0.5, 0.9, 1.0):
        values = [
            float(bucketed_jsd(t, torch.tensor(-torch.inf), s + math.log(1 - share), beta)) for share in (0, 0.02, 0.1, 0.3)
        ]
        assert values == sorted(values)
        assert values[1] > values[0] + 1e-4


@settings(max_examples=25, deadline=None)
@given(SEEDS, BETAS)
def test_gradients_are_finite_differences(seed: int, beta: float) -> None:
    """With respect to the student's logits, with and without a rest bucket (torch's gradcheck); KL(T‖S)'s is S - T."""
    t, s = two(seed)
    logits = s.clone().requires_grad_()
    t_rest = t[4:].logsumexp(0)
    assert torch.autograd.gradcheck(lambda x: jsd(t, x.log_softmax(-1), beta), (logits,), atol=1e-6)
    assert torch.autograd.gradcheck(lambda x: bucketed_jsd(t[:4], t_rest, x.log_softmax(-1)[:4], beta), (logits,), atol=1e-6)
    (gradient,) = torch.autograd.grad(jsd(t, logits.log_softmax(-1), 0.0), logits)
    assert torch.allclose(gradient, s.exp() - t.exp(), atol=1e-10)


def test_impossible_events_cost_much_but_not_infinitely() -> None:
    """A mass of zero on one side gives a finite loss and finite gradients, at every β."""
    t = torch.tensor([1.0, 0, 0], dtype=torch.float64).log()
    for beta in (0.0, 0.5, 1.0):
        logits = torch.tensor([-60.0, 60.0, 0.0], dtype=torch.float64, requires_grad=True)
        value = jsd(t, logits.log_softmax(-1), beta)
        (gradient,) = torch.autograd.grad(value, logits)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()
        assert value > (0.6 if beta == 0.5 else 10)


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_log_rest(seed: int) -> None:
    _, s = two(seed)
    assert torch.allclose(log_rest(s[:3]), s[3:].logsumexp(0, keepdim=True), atol=1e-9)


@pytest.mark.parametrize("rest", ["bucket", "drop", "renormalise"])
def test_a_support_without_events(rest: str) -> None:
    """Where no event of the teacher's has a counterpart the value and its gradient are finite, whatever becomes of the rest."""
    padding = torch.full((2,), -torch.inf, dtype=torch.float64)
    s = torch.tensor([0.4, 0.6], dtype=torch.float64).log().requires_grad_()
    kept = s.masked_fill(torch.tensor([True, True]), -torch.inf)
    value = bucketed_jsd(padding, torch.tensor(0.0, dtype=torch.float64), kept, 0.5, rest)
    (gradient,) = torch.autograd.grad(value, s)
    assert float(value.detach()) == pytest.approx(0, abs=1e-9)
    assert torch.isfinite(gradient).all()

"""Intervals of accuracy, seeds, and scorers."""

import hashlib
import json
import math

import numpy as np
import polars as pl
import pytest

from tasks.rows.scorers import make_scorer
from tasks.rows.sources import load_gym_dataset
from tasks.running.seeds import derive_seed, derive_uniform
from tasks.views.estimates import estimate_accuracy


def evals(correct: np.ndarray) -> pl.DataFrame:
    """`[prompts, samples]` of outcomes as the evals table has them."""
    prompts, samples = correct.shape
    ids = np.repeat([f"p{i}" for i in range(prompts)], samples)
    return pl.DataFrame({"prompt_id": ids, "correct": correct.ravel()}).sample(fraction=1, shuffle=True, seed=0)


def wilson(p: float, n: int) -> tuple[float, float]:
    """The two shares q for which p is 1.96 standard errors of q away: the roots of (p - q)² = z² q(1 - q) / n."""
    z = 1.959963984540054
    a, b, c = 1 + z * z / n, -(2 * p + z * z / n), p * p
    root = math.sqrt(b * b - 4 * a * c)
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


@pytest.mark.parametrize(("right", "prompts"), [(0, 16), (1, 16), (8, 16), (128, 256), (250, 256), (256, 256), (1, 1)])
def test_greedy_accuracy_has_a_wilson_interval(right, prompts):
    """One completion a prompt: as many independent draws as prompts."""
    estimate = estimate_accuracy(evals(np.arange(prompts)[:, None] < right))
    low, high = wilson(right / prompts, prompts)
    assert estimate.value == pytest.approx(right / prompts)
    assert estimate.low == pytest.approx(max(low, 0), abs=1e-6)
    assert estimate.high == pytest.approx(min(high, 1), abs=1e-6)


def test_a_published_example():
    """Wilson 95% for 81 of 263 is 0.2553 to 0.3662 (Newcombe 1998, table I)."""
    estimate = estimate_accuracy(evals(np.arange(263)[:, None] < 81))
    assert (round(estimate.low, 4), round(estimate.high, 4)) == (0.2553, 0.3662)


@pytest.mark.parametrize(
    ("name", "prompts", "samples", "spread"),
    [("alike", 64, 4, None), ("somewhat clustered", 64, 4, 2.0), ("each always right or wrong", 64, 4, 0.01)],
)
def test_intervals_of_sampled_accuracy_cover(name, prompts, samples, spread):
    """In 95% of simulated evaluations the true share lies inside, however much a prompt's samples have in common.

    Prompts' own shares are drawn from a beta law with mean 0.3; `spread` is the sum of its parameters.
    """
    random, true, trials = np.random.default_rng(1), 0.3, 400
    inside, widths = 0, []
    for _ in range(trials):
        shares = np.full(prompts, true) if spread is None else random.beta(true * spread, (1 - true) * spread, prompts)
        estimate = estimate_accuracy(evals(random.random((prompts, samples)) < shares[:, None]))
        inside += estimate.low <= true <= estimate.high
        widths.append(estimate.high - estimate.low)
    error = math.sqrt(0.95 * 0.05 / trials)
    assert abs(inside / trials - 0.95) < 3 * error + 0.01, name
    # Independent samples count in full, a prompt's identical samples as one.
    draws = {None: prompts * samples, 0.01: prompts}.get(spread)
    if draws is not None:
        low, high = wilson(true, draws)
        assert np.mean(widths) == pytest.approx(high - low, rel=0.06)


def test_samples_of_a_prompt_count_once_where_they_agree():
    """Twice the same samples say nothing new: the interval stays."""
    once = np.arange(50)[:, None] < 20
    estimate, twice = estimate_accuracy(evals(once)), estimate_accuracy(evals(np.repeat(once, 2, axis=1)))
    assert (twice.low, twice.high) == (pytest.approx(estimate.low), pytest.approx(estimate.high))


def test_an_estimate_as_people_read_it():
    assert str(estimate_accuracy(evals(np.arange(263)[:, None] < 81))) == "0.308 [0.255, 0.366]"


# -- seeds -------------------------------------------------------------------------------------------------------------


def test_seeds_are_stable():
    """The first 62 bits of `printf '7' | sha256sum`, and of `printf 'rollout\\x1f7\\x1f2\\x1fabc\\x1f5\\x1f0'`."""
    assert derive_seed(7) == 0x7902699BE42C8A8E >> 2
    assert derive_seed("rollout", 7, 2, "abc", 5, 0) == 0x29234C1F9868D834 >> 2


def test_seeds_differ_by_every_part_and_its_place():
    seeds = [
        derive_seed(1, 2, 3),
        derive_seed(3, 2, 1),
        derive_seed(1, 2),
        derive_seed(12, 3),
        derive_seed(1, 23),
        derive_seed(1, 2, 3, 0),
        derive_seed("1 2 3"),
    ]
    assert len(set(seeds)) == len(seeds)
    assert derive_seed(1, "2") == derive_seed("1", 2)
    assert len({derive_seed("x", i) for i in range(10_000)}) == 10_000


def test_seeds_fit_in_an_int64():
    values = np.array([derive_seed("range", i) for i in range(2000)])
    assert values.dtype == np.int64
    assert values.min() >= 0
    assert values.max() < 2**62
    assert values.max() > 2**61


def test_uniform_is_uniform():
    values = np.sort([derive_uniform("u", i) for i in range(4000)])
    assert values[0] >= 0
    assert values[-1] < 1
    # Kolmogorov-Smirnov: 1.95 / √n is passed by one seed in a thousand.
    assert np.abs(values - (np.arange(4000) + 0.5) / 4000).max() < 1.95 / math.sqrt(4000)
    digest = hashlib.sha256(b"u\x1f3").digest()
    assert derive_uniform("u", 3) == (int.from_bytes(digest[:8], "big") >> 2) / 2**62


# -- scorers -----------------------------------------------------------------------------------------------------------


def test_exact_match():
    score = make_scorer("exact")
    row = {"reference": " abc ", "metadata": None}
    assert [score(text, row) for text in ("abc", "abc\n", "ab", "")] == [1.0, 1.0, 0.0, 0.0]
    assert score("", {"reference": None, "metadata": "{}"}) == 1.0


def test_a_tasks_own_scorer():
    """reasoning-gym grades, also an answer in its tags; other prompts fall back to exact match."""
    options = {"min_word_len": 3, "max_word_len": 6}
    entry = load_gym_dataset("spell_backward", options)[0]
    metadata = {"task": "spell_backward", "options": options, "entry": entry}
    row = {"reference": entry["answer"], "metadata": json.dumps(metadata)}
    for kind in ("task", "exact"):
        score = make_scorer(kind)
        assert score(entry["answer"], row) == 1.0
        assert score(entry["answer"][::-1] + "x", row) < 1.0
    assert make_scorer("task")(f"It is <answer>{entry['answer']}</answer>", row) == 1.0
    assert make_scorer("exact")(f"<answer>{entry['answer']}</answer>", row) == 0.0
    assert make_scorer("task")("yes", {"reference": "yes", "metadata": '{"topic": "x"}'}) == 1.0

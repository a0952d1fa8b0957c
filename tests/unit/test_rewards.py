"""Advantages among the samples of a prompt, and which samples go on."""

import math
import statistics
from collections import defaultdict

import numpy as np
import pytest

from configs.errors import BadInput
from configs.load import load_recipe, select_content
from tasks.rewards import advantages, choose_rows, mean_score
from tests.flows.helpers import TINY

RANDOM = np.random.default_rng(5)
SCORES = RANDOM.choice([0.0, 0.25, 1.0, math.nan], 300)
GROUPS = np.array([f"p{i}" for i in RANDOM.integers(0, 60, 300)], dtype=object)


def by_group() -> dict[str, list[int]]:
    rows = defaultdict(list)
    for row, group in enumerate(GROUPS):
        rows[group].append(row)
    return rows


def test_advantages_are_standard_scores_of_a_prompt():
    found = advantages(SCORES, GROUPS)
    assert found.dtype == np.float32
    for rows in by_group().values():
        graded = [SCORES[row] for row in rows if not math.isnan(SCORES[row])]
        for row in rows:
            if math.isnan(SCORES[row]) or len(set(graded)) == 1:
                assert found[row] == 0
            else:
                expected = (SCORES[row] - statistics.fmean(graded)) / statistics.pstdev(graded)
                assert found[row] == pytest.approx(expected, rel=1e-4)


def test_equal_scores_have_no_advantage_whatever_their_mean_rounds_to():
    assert not advantages(np.full(7, 0.1), np.array(["p"] * 7, dtype=object)).any()
    assert len(advantages(np.zeros(0), np.zeros(0, dtype=object))) == 0


@pytest.mark.filterwarnings("error")
def test_the_mean_score_is_of_what_was_graded():
    assert mean_score(SCORES) == pytest.approx(statistics.fmean(score for score in SCORES if not math.isnan(score)))
    assert math.isnan(mean_score(np.full(3, math.nan)))
    assert math.isnan(mean_score(np.zeros(0)))


def test_right_and_wrong_leave_out_what_cannot_be_graded():
    right, wrong = choose_rows(SCORES, GROUPS, "right"), choose_rows(SCORES, GROUPS, "wrong")
    assert (right == (SCORES == 1)).all()
    assert (right | wrong).sum() == (~np.isnan(SCORES)).sum()
    assert not (right & wrong).any()
    assert choose_rows(SCORES, GROUPS, "all").all()


@pytest.mark.parametrize("most", [1, 2, 5, 300])
def test_a_number_keeps_the_best_of_each_prompt(most):
    kept = choose_rows(SCORES, GROUPS, most)
    for rows in by_group().values():
        best = sorted(rows, key=lambda row: -1.0 if math.isnan(SCORES[row]) else SCORES[row], reverse=True)
        assert [row for row in rows if kept[row]] == sorted(best[:most])  # sorted() is stable in reverse, too


@pytest.mark.parametrize("value", ['"best"', "0", "true", "1.5"])
def test_another_word_is_refused_with_what_would_be_right(value):
    with pytest.raises(BadInput, match=r"rollout\.keep.*'right'.*how many samples a prompt, 1 or more"):
        load_recipe(TINY, (f"rollout.keep={value}",))


def test_there_must_be_samples_to_choose_from():
    with pytest.raises(BadInput, match=r"rollout\.keep = 'right'.*rollout\.on_policy = 0 makes none"):
        load_recipe(TINY, ("rollout.keep=right", "rollout.on_policy=0.0"))


def test_rollouts_have_the_same_key_whatever_is_kept():
    plain, chosen = load_recipe(TINY), load_recipe(TINY, ("rollout.keep=2",))
    assert select_content(plain, "rollout") == select_content(chosen, "rollout")
    assert "keep" not in select_content(plain, "rollout")

"""The bootstrap: its intervals cover, whole groups are drawn, medians and class means weigh as they should."""
import numpy as np
import pytest

from polysense.tasks.result import (
    bootstrap,
    class_mean_of,
    classification,
    grouped_mean_of,
    grouped_median_of,
    mean_of,
    metric,
    mid_rank,
)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    for trial in range(200):
        low, high = bootstrap(mean_of((rng.random(150) < 0.3).astype(float)), 150, seed=trial, draws=300)
        hits += low <= 0.3 <= high
    assert 0.89 <= hits / 200 <= 0.99


def test_the_interval_has_the_width_of_theory():
    outcome = (np.arange(1000) % 4 == 0).astype(float)
    low, high = bootstrap(mean_of(outcome), 1000)
    assert (high - low) / 2 == pytest.approx(1.96 * (0.25 * 0.75 / 1000) ** 0.5, rel=0.08) and low < 0.25 < high
    assert (low, high) == bootstrap(mean_of(outcome), 1000) != bootstrap(mean_of(outcome), 1000, seed=1)


def test_blocks_of_resamples_do_not_change_their_number(monkeypatch):
    seen = []
    bootstrap(lambda w: seen.append(w.shape) or (w.sum(1) == w.shape[1]).astype(float), 50_000, draws=200)
    assert sum(s[0] for s in seen) == 200 and max(s[0] * s[1] for s in seen) <= 4_000_000
    assert bootstrap(lambda w: w.sum(1), 50, draws=100) == (50.0, 50.0)          # every resample has n samples


def test_captions_of_one_picture_are_drawn_together():
    """Five copies of each outcome add no knowledge: the interval stays that of the pictures, not of the captions."""
    outcome = (np.arange(200) % 2).astype(float)
    alone = metric(mean_of(outcome), 200)
    copies = metric(grouped_mean_of(np.repeat(outcome, 5), np.repeat(np.arange(200), 5), 200), 200)
    assert copies[:3] == pytest.approx(alone[:3])


def test_a_grouped_mean_counts_captions_and_a_median_is_in_the_middle():
    value, group = np.array([5.0, 1.0, 3.0, 2.0]), np.array([0, 0, 1, 1])
    assert grouped_mean_of(value, group, 2)(np.array([[1.0, 1.0], [2.0, 1.0], [0.0, 3.0]])).tolist() == [2.75, 17 / 6, 2.5]
    assert grouped_median_of(value, group)(np.array([[1.0, 1.0], [3.0, 0.0], [0.0, 1.0]])).tolist() == [2.0, 1.0, 2.0]


def test_class_mean_counts_every_class_once():
    correct, label = np.array([1.0, 1.0, 1.0, 0.0]), np.array([0, 0, 0, 2])
    assert class_mean_of(correct, label, 3)(np.ones((1, 4))).tolist() == [0.5]
    assert class_mean_of(correct, label, 3)(np.array([[4.0, 0, 0, 0]])).tolist() == [1.0]      # a class that was not drawn is left out


def test_mid_rank_against_counting():
    scores = np.array([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0], [0.0, 5.0, 5.0]])
    assert mid_rank(scores, scores[np.arange(3), [0, 1, 2]]).tolist() == [1.0, 2.0, 1.5]


def test_top_five_is_reported_where_it_says_something():
    scores, label = np.eye(6)[[0, 1, 2, 3]], np.array([0, 1, 2, 5])
    wide = classification("e", "s", "d", scores, label, tuple("abcdef"))
    assert wide.value == 0.75 and wide.classes == {"a": (1.0, 1), "b": (1.0, 1), "c": (1.0, 1), "f": (0.0, 1)}
    assert "top5_accuracy" in wide.metrics
    assert "top5_accuracy" not in classification("e", "s", "d", scores[:, :4], label.clip(max=3), tuple("abcd")).metrics

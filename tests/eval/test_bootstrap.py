"""Bootstrap over videos: by hand, against a slow resampler, and what pairing gains."""

import numpy as np
import pytest

from rlt_retrieval.eval.bootstrap import ResampledMeans, resampled_means

NAN = np.nan


def test_each_resample_weighs_whole_videos_by_hand():
    """Two videos, so a resample holds a twice, both, or b twice: only three means are possible in each direction."""
    means = resampled_means(
        np.array([0.0, 0.2, 1.0]), ["a", "a", "b"], np.array([0.5, 1.0]), ["a", "b"], num_resamples=400
    )
    assert set(means.video_to_text.round(9)) == {0.1, 0.4, 1.0}
    assert set(means.text_to_video.round(9)) == {0.5, 0.75, 1.0}
    # Both directions come from the same resample: a twice gives the pair (0.1, 0.5), and so on.
    pairs = set(zip(means.video_to_text.round(9), means.text_to_video.round(9), strict=True))
    assert pairs == {(0.1, 0.5), (0.4, 0.75), (1.0, 1.0)}
    np.testing.assert_allclose(means.mean, (means.video_to_text + means.text_to_video) / 2)
    share_mixed = (means.video_to_text.round(9) == 0.4).mean()
    assert 0.4 < share_mixed < 0.6  # drawn with probability 1/2


def test_queries_left_out_do_not_count():
    means = resampled_means(
        np.array([NAN, 0.2, 1.0]), ["a", "a", "b"], np.ones(2), ["b", "c"], num_resamples=200
    )
    known = means.video_to_text[~np.isnan(means.video_to_text)]
    assert {0.2, 0.6, 1.0} <= set(known.round(9))
    assert np.isnan(means.text_to_video).any()  # a three times: no text
    assert means.intervals()["video_to_text"] is not None


@pytest.mark.parametrize("scores", [[0.5, 0.5, NAN], [NAN, NAN, NAN]])
def test_a_direction_whose_counted_queries_are_of_one_video_has_no_interval(scores) -> None:
    """Its resamples would all give the same mean: an interval of no width, as if it were certain."""
    means = resampled_means(np.array([0.1, 0.2, 0.9]), list("aab"), np.array(scores), list("aab"))
    intervals = means.intervals()
    assert list(intervals) == ["text_to_video", "video_to_text", "mean"]
    assert (intervals["text_to_video"], intervals["mean"]) == (None, None)
    assert intervals["video_to_text"] == pytest.approx((0.15, 0.9))
    assert means.minus(means).intervals()["mean"] is None


def test_equals_a_slow_resampler(rng):
    """The same draws, averaged query by query."""
    videos = [f"v{n}" for n in rng.integers(0, 7, 60)]
    scores = rng.random(60)
    fast = resampled_means(scores, videos, scores[:5], videos[:5], num_resamples=50, seed=3)
    names = sorted(set(videos))
    draws = np.random.default_rng(3).multinomial(len(names), np.full(len(names), 1 / len(names)), 50)
    for weights, mean in zip(draws, fast.video_to_text, strict=True):
        drawn = [
            score
            for name, times in zip(names, weights, strict=True)
            for video, score in zip(videos, scores, strict=True)
            for _ in range(times if video == name else 0)
        ]
        assert mean == pytest.approx(np.mean(drawn), abs=1e-12)


def test_the_interval_is_the_middle_95_percent():
    means = np.arange(1001) / 1000
    assert ResampledMeans(means, means, means).intervals()["mean"] == pytest.approx((0.025, 0.975))


def test_it_covers_the_truth_about_as_often_as_it_says():
    """Queries of a video share an effect; an interval over queries would cover far less often."""
    covered = 0
    for trial in range(200):
        rng = np.random.default_rng(trial)
        effects = rng.standard_normal(30).repeat(20)
        scores = effects + 0.1 * rng.standard_normal(600)
        videos = [str(n) for n in np.arange(30).repeat(20)]
        interval = resampled_means(scores, videos, scores, videos, num_resamples=300, seed=trial).intervals()[
            "mean"
        ]
        covered += interval.low <= 0 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_pairing_takes_out_what_two_models_share(rng):
    videos = [str(n) for n in rng.integers(0, 20, 400)]
    difficulty = rng.standard_normal(20)[[int(v) for v in videos]]
    a, b = difficulty + 0.1, difficulty + 0.01 * rng.standard_normal(400)
    of_a, of_b = (resampled_means(x, videos, x, videos) for x in (a, b))
    paired, alone = of_a.minus(of_b).intervals()["mean"], of_a.intervals()["mean"]
    assert paired.low > 0.09
    assert paired.high - paired.low < 0.02 < alone.high - alone.low


def test_one_video_says_nothing_of_the_spread():
    means = resampled_means(np.ones(3), ["a"] * 3, np.ones(2), ["a"] * 2)
    assert means.intervals() == {"video_to_text": None, "text_to_video": None, "mean": None}


def test_the_seed_decides():
    arguments = (np.arange(5.0), list("abcde"), np.arange(5.0), list("abcde"))
    first, again, other = (resampled_means(*arguments, seed=seed).mean for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()

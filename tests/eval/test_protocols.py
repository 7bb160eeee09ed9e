"""Captioned-video retrieval: pairing, several captions, repeated captions, collapse."""

import json

import numpy as np
import pytest

from rlt_retrieval.errors import MetricsError
from rlt_retrieval.eval.protocols import (
    captions_protocol,
    choice_accuracy,
    fine_inner_products,
    inner_products,
    similarity_protocol,
)

DIRECTION_KEYS = [
    "recall@1",
    "recall@5",
    "recall@10",
    "median_rank",
    "mean_rank",
    "mAP",
    "nDCG",
    "num_queries",
    "left_out",
    "tied",
]


def unit(vectors):
    vectors = np.asarray(vectors, dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_a_perfect_model_scores_one():
    result = captions_protocol(np.eye(12), np.eye(12), np.arange(12)).to_dict()
    for direction in ("text_to_video", "video_to_text"):
        scores = result[direction]
        assert [scores[key] for key in DIRECTION_KEYS[:7]] == pytest.approx([1] * 7)
    assert (result["num_videos"], result["num_texts"], result["num_merged_texts"]) == (12, 12, 0)


def test_json_keys_are_stable():
    result = json.loads(json.dumps(captions_protocol(np.eye(3), np.eye(3), [0, 1, 2]).to_dict()))
    assert list(result) == ["text_to_video", "video_to_text", "num_videos", "num_texts", "num_merged_texts"]
    assert list(result["text_to_video"]) == list(result["video_to_text"]) == DIRECTION_KEYS


def test_a_collapsed_model_scores_zero(rng):
    """Catches a matrix product that rounds equal pairs differently, which would break the ties."""
    one = unit(rng.standard_normal((1, 67)))
    videos, texts = one.repeat(1103, 0), unit(rng.standard_normal((1, 67))).repeat(41, 0)
    result = captions_protocol(videos, texts, np.arange(41))
    assert (result.text_to_video.ranks.recall[10], result.video_to_text.ranks.recall[10]) == (0.0, 0.0)
    assert result.text_to_video.ranks.median_rank == 1103
    assert result.video_to_text.ranks.median_rank == 41


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("products", "size"),
    [(inner_products, 1e25), (fine_inner_products, 1e170), (fine_inner_products, np.inf)],
)
def test_products_that_overflow_are_refused_by_name(products, size):
    videos = np.eye(3)
    videos[1, 1] = size
    texts = np.eye(3) * min(size, 1e200)
    with pytest.raises(MetricsError, match=r"video embedding 1 .*overflows; normalise") as raised:
        products(videos, texts)
    assert "\n" not in str(raised.value)


def test_a_video_succeeds_at_the_best_of_its_captions():
    videos = np.eye(2)
    texts = np.array([[0.1, 0.9], [0.9, 0.1], [0.2, 0.8]])  # captions of video 0, 0, 1
    result = captions_protocol(videos, texts, [0, 0, 1])
    assert result.video_to_text.ranks.recall[1] == 0.5  # video 1 finds the first caption of video 0
    assert result.text_to_video.ranks.recall[1] == pytest.approx(2 / 3)
    # Video 0 ranks its captions 1 and 3: (1/1 + 2/3) / 2. Video 1 ranks its own 2: 1/2.
    assert result.video_to_text.mean_average_precision == pytest.approx((5 / 6 + 1 / 2) / 2)


def test_the_same_caption_on_two_videos_is_one_text_with_two_right_videos():
    videos, texts = np.eye(3), np.array([[1.0, 0.5, 0.0], [1.0, 0.5, 0.0], [0.0, 0.0, 1.0]])
    captions = ["a dog", "a dog", "a cat"]
    merged, apart = (
        captions_protocol(videos, texts, [0, 1, 2], captions),
        captions_protocol(videos, texts, [0, 1, 2]),
    )
    assert (merged.num_texts, merged.num_merged_texts, apart.num_texts) == (2, 1, 3)
    assert merged.text_to_video.ranks.recall[1] == 1.0
    assert merged.text_to_video.ranks.num_queries == 2
    assert merged.text_to_video.mean_average_precision == pytest.approx(1.0)
    # Apart, the second "a dog" finds video 0 first, and every dog video ties with its twin's caption.
    assert apart.text_to_video.ranks.recall[1] == pytest.approx(2 / 3)
    assert apart.video_to_text.ranks.tied == 2


def test_a_caption_given_twice_to_one_video_is_one_text():
    result = captions_protocol(np.eye(2), np.eye(2)[[0, 0, 1]], [0, 0, 1], ["a", "a", "b"])
    assert (result.num_texts, result.video_to_text.ranks.recall[1]) == (2, 1.0)


def test_a_video_without_caption_is_searched_but_no_query():
    videos = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    result = captions_protocol(videos, np.array([[0.95, 0.05], [0.0, 1.0]]), [1, 2])
    assert (result.video_to_text.ranks.num_queries, result.video_to_text.ranks.left_out) == (2, 1)
    assert result.text_to_video.ranks.mean_rank == pytest.approx((2 + 1) / 2)


def test_from_similarity_equals_from_embeddings(rng):
    videos, texts = unit(rng.standard_normal((9, 6))), unit(rng.standard_normal((9, 6)))
    similarity = (videos.astype(np.float64) @ texts.astype(np.float64).T).astype(np.float32)
    assert similarity_protocol(similarity, np.eye(9, dtype=bool)) == captions_protocol(
        videos, texts, np.arange(9)
    )


def test_many_videos_are_multiplied_in_parts(rng):
    """More rows than one product takes: catches a last part that is dropped."""
    videos = unit(rng.standard_normal((2500, 16)))
    result = captions_protocol(videos, videos, np.arange(2500))
    assert result.text_to_video.ranks.recall[1] == 1.0


@pytest.mark.parametrize(
    ("video_of_text", "texts", "message"),
    [
        ([0, 1], None, "expected one integer for each of 3 texts"),
        ([0.0, 1.0, 2.0], None, "float64"),
        ([0, 1, 3], None, "rows 0 to 3, expected rows of 3 videos"),
        ([-1, 1, 2], None, "rows -1 to 2"),
        ([0, 1, 2], ["a"], "1 strings for 3 text embeddings"),
    ],
)
def test_a_pairing_that_does_not_fit_is_refused(video_of_text, texts, message):
    with pytest.raises(MetricsError, match=message):
        captions_protocol(np.eye(3), np.eye(3), video_of_text, texts)


def test_embeddings_that_do_not_fit_are_refused():
    with pytest.raises(MetricsError, match="of the same D"):
        captions_protocol(np.eye(3), np.eye(4), [0, 1, 2, 2])
    with pytest.raises(MetricsError, match="of the same D"):
        captions_protocol(np.eye(3), np.empty((0, 3)), np.empty(0, dtype=int))
    texts = np.eye(3)
    texts[2, 0] = np.nan
    with pytest.raises(MetricsError, match="text embedding 2: NaN"):
        captions_protocol(np.eye(3), texts, [0, 1, 2])


# --- choosing one caption among a few -----------------------------------------------------------------------


def test_the_right_choice_must_win():
    z = np.eye(2)
    choices = np.array([[[0.9, 0.0], [0.8, 5.0], [-1.0, 0.0]], [[9.0, 0.1], [9.0, 0.3], [0.0, 0.2]]])
    # products: item 0: 0.9, 0.8, -1; item 1: 0.1, 0.3, 0.2
    assert choice_accuracy(z, choices, [0, 1]) == 1.0
    assert choice_accuracy(z, choices, [0, 2]) == 0.5
    assert choice_accuracy(z, choices, [2, 0]) == 0.0


def test_choices_below_zero_are_compared_too():
    """Catches a right choice that is compared with a zero left in its own place."""
    z, choices = np.ones((1, 1)), np.array([[[-0.5], [-0.9]]])
    assert choice_accuracy(z, choices, [0]) == 1.0
    assert choice_accuracy(z, choices, [1]) == 0.0


def test_a_model_that_cannot_tell_the_choices_apart_scores_zero(rng):
    """Catches ties that count for the model, and sums that round equal choices differently."""
    z = unit(rng.standard_normal((301, 67)))
    choices = unit(rng.standard_normal((301, 67)))[:, None].repeat(4, axis=1)
    assert choice_accuracy(z, choices, rng.integers(4, size=301)) == 0.0


def test_accuracy_is_that_of_one_item_at_a_time(rng):
    z, choices = unit(rng.standard_normal((50, 8))), rng.standard_normal((50, 4, 8))
    right = rng.integers(4, size=50)
    alone = [choice_accuracy(z[i : i + 1], choices[i : i + 1], right[i : i + 1]) for i in range(50)]
    winners = np.einsum("nd,ncd->nc", z, choices).argmax(axis=1)
    assert choice_accuracy(z, choices, right) == pytest.approx(np.mean(alone))
    assert choice_accuracy(z, choices, right) == pytest.approx((winners == right).mean())
    assert choice_accuracy(z, choices, winners) == 1.0


@pytest.mark.parametrize(
    ("num_items", "shape", "right", "message"),
    [
        (2, (2, 3, 4), [0, 1], "of the same items and D"),
        (3, (2, 3, 3), [0, 1], "of the same items and D"),
        (2, (2, 3), [0, 1], "of the same items and D"),
        (2, (2, 1, 3), [0, 0], "at least 2 choices"),
        (0, (0, 2, 3), [], "non-empty"),
        (2, (2, 3, 3), [0], "expected one integer for each of 2 items"),
        (2, (2, 3, 3), [0.0, 1.0], "float64"),
        (2, (2, 3, 3), [0, 3], "places 0 to 3, expected places of 3 choices"),
        (2, (2, 3, 3), [-1, 0], "places -1 to 0"),
    ],
)
def test_choices_that_do_not_fit_are_refused(num_items, shape, right, message):
    with pytest.raises(MetricsError, match=message):
        choice_accuracy(np.ones((num_items, 3)), np.ones(shape), right)


def test_choices_with_nan_are_refused():
    z, choices = np.ones((3, 2)), np.ones((3, 4, 2))
    choices[1, 2, 0] = np.nan
    with pytest.raises(MetricsError, match="item 1: NaN"):
        choice_accuracy(z, choices, [0, 0, 0])
    z[0, 1] = np.nan
    with pytest.raises(MetricsError, match="item 0: NaN"):
        choice_accuracy(z, choices, [0, 0, 0])

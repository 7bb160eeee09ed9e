"""The EPIC-KITCHENS-100 protocol: oracle, sub-matrix of a partial set, ties, intervals, paired differences."""

import json

import numpy as np
import pytest
from ek100_oracle import SENTENCE_CLASSES, clip_classes, clip_ids, oracle_embeddings, sentence_set

from rlt_retrieval.annotations import (
    Classes,
    Ek100Dataset,
    Ek100Sentence,
    ek100_files,
    read_ek100_clips,
    read_ek100_sentences,
    relevancy,
)
from rlt_retrieval.errors import MetricsError
from rlt_retrieval.eval import evaluate
from rlt_retrieval.eval.ek100 import Ek100Result, compare, ek100_protocol, video_of
from rlt_retrieval.eval.protocols import fine_inner_products


def oracle_result(num_clips=10, num_official=10, noise=0.0, seed=0):
    z = oracle_embeddings([*clip_classes(num_clips), *SENTENCE_CLASSES])
    z_video, z_text = z[:num_clips], z[num_clips:]
    z_video = z_video + noise * np.random.default_rng(seed).standard_normal(z_video.shape)
    return ek100_protocol(
        z_video, clip_ids(num_clips), clip_classes(num_clips), z_text, sentence_set(num_official)
    )


def official_sentences(count):
    return tuple(Ek100Sentence(f"P0{1 + n % 2}_01_{n}", "cut", Classes(0, (1,))) for n in range(count))


def test_an_oracle_scores_one_in_both_directions():
    values = oracle_result().to_dict()
    for direction in ("text_to_video", "video_to_text", "mean"):
        assert values[direction]["mAP"] == pytest.approx(1, abs=1e-9)
        assert values[direction]["nDCG"] == pytest.approx(1, abs=1e-9)
    assert (values["num_videos"], values["num_texts"], values["partial"]) == (10, 5, False)
    assert values["num_source_videos"] == 3
    assert oracle_result().note is None


def test_numbers_are_those_of_the_relevancies_and_inner_products(rng):
    z_video, z_text = rng.standard_normal((10, 4)), rng.standard_normal((5, 4))
    result = ek100_protocol(z_video, clip_ids(10), clip_classes(10), z_text, sentence_set(10))
    expected = evaluate(z_video @ z_text.T, relevancy(clip_classes(10), SENTENCE_CLASSES))
    assert result.scores == expected


def test_scores_that_differ_by_less_than_float32_shows_are_no_tie():
    """Clip 0 is nearer to its sentence by 1e-9; in float32 that would be a tie, and count against it."""
    z_text = np.array([[0.5, 0.0], [0.5 - 1e-9, 0.0]])
    sentences = sentence_set(2).sentences[::2][:2]  # of no common class
    classes = [sentence.classes for sentence in sentences]
    result = ek100_protocol(
        np.eye(2)[:1], clip_ids(1), classes[:1], z_text, Ek100Dataset("test", 1, sentences)
    )
    assert result.scores.mean_average_precision.video_to_text == 1
    assert result.to_dict()["video_to_text"]["tied"] == 0


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e8])
def test_equal_pairs_tie_whatever_the_matrix_product_rounds(rng, size):
    """As a collapsed model's; the size of the embeddings changes nothing."""
    videos = np.repeat(rng.standard_normal((1, 67)), 1103, 0)
    texts = np.repeat(rng.standard_normal((1, 67)), 41, 0)
    products = fine_inner_products(size * videos, size * texts)
    assert products.dtype == np.float64
    assert (products == products[0, 0]).all()
    assert products[0, 0] == pytest.approx(size**2 * videos[0] @ texts[0], rel=1e-9)


def test_a_partial_set_is_scored_on_its_sub_matrix_and_says_so():
    """Three clips of classes 0, 1, 2: sentences 3 and 4 have no exact match there, but partly fitting clips."""
    result = oracle_result(num_clips=3, num_official=9668)
    assert result.is_partial
    assert result.note == "partial, 3 of 9,668, not comparable; 5 of 3,842 sentences"
    scores = result.scores
    assert (scores.mean_average_precision.text_to_video_left_out, scores.ndcg.text_to_video_left_out) == (
        2,
        0,
    )
    assert scores.mean_average_precision.mean == pytest.approx(1)
    values = result.to_dict()
    assert values["text_to_video"]["mAP_left_out"] == 2
    assert (values["partial"], values["num_official_clips"]) == (True, 9668)


@pytest.mark.parametrize(
    ("clips", "sentences", "note"),
    [
        (9668, 3842, None),
        (9668, 3841, "partial, 3,841 of 3,842 sentences, not comparable"),
        (9667, 3842, "partial, 9,667 of 9,668, not comparable"),
    ],
)
def test_the_official_test_split_is_whole_with_all_its_sentences_too(clips, sentences, note):
    dataset = Ek100Dataset("test", 9668, official_sentences(sentences))
    one = oracle_result()
    result = Ek100Result(one.scores, one.clip_queries, one.sentence_queries, clip_ids(clips), dataset)
    assert (result.is_partial, result.note) == (note is not None, note)


def test_the_train_split_is_not_comparable_even_when_whole():
    z = oracle_embeddings([*clip_classes(5), *SENTENCE_CLASSES])
    result = ek100_protocol(z[:5], clip_ids(5), clip_classes(5), z[5:], sentence_set(5, "train"))
    assert (result.is_partial, result.note) == (False, "the train split, not comparable")


def test_equal_texts_of_other_classes_stay_apart():
    sentences = (
        Ek100Sentence("P01_01_0", "cut", Classes(0, (1,))),
        Ek100Sentence("P01_01_1", "cut", Classes(1, (2,))),
    )
    result = ek100_protocol(
        np.eye(2),
        ["P01_01_0", "P01_01_1"],
        [s.classes for s in sentences],
        np.eye(2),
        Ek100Dataset("test", 2, sentences),
    )
    assert result.scores.mean_average_precision.mean == 1
    assert result.to_dict()["num_texts"] == 2


def test_a_collapsed_model_ties_everywhere_and_gains_nothing_from_it():
    z_video, z_text = np.ones((10, 3)), np.ones((5, 3))
    values = ek100_protocol(z_video, clip_ids(10), clip_classes(10), z_text, sentence_set(10)).to_dict()
    assert (values["text_to_video"]["tied"], values["video_to_text"]["tied"]) == (5, 10)
    assert values["mean"]["mAP"] < 0.5


def test_intervals_hold_the_means_and_repeat():
    first, again = oracle_result(noise=0.5).to_dict(), oracle_result(noise=0.5).to_dict()
    assert first["intervals"] == again["intervals"]
    for metric in ("mAP", "nDCG"):
        for direction in ("text_to_video", "video_to_text", "mean"):
            low, high = first["intervals"][metric][direction]
            assert low <= first[direction][metric] <= high
    assert json.loads(json.dumps(first))["intervals"]["mAP"]["mean"] == list(
        first["intervals"]["mAP"]["mean"]
    )


def test_a_paired_difference_is_the_difference_of_the_means_with_its_own_interval():
    good, bad = oracle_result(noise=0.2), oracle_result(noise=1.5)
    for metric, name in (("mean_average_precision", "mAP"), ("ndcg", "nDCG")):
        for direction, row in compare(good, bad)[name].items():
            expected = getattr(getattr(good.scores, metric), direction) - getattr(
                getattr(bad.scores, metric), direction
            )
            assert row["difference"] == pytest.approx(expected)
            assert row["interval"].low <= expected <= row["interval"].high
    assert compare(good, good)["mAP"]["mean"] == {"difference": 0.0, "interval": (0.0, 0.0)}


def test_a_comparison_needs_the_same_clips():
    with pytest.raises(MetricsError, match="10 and 9 clips that are not the same"):
        compare(oracle_result(), oracle_result(num_clips=9))


@pytest.mark.parametrize(
    ("rows", "ids", "message"),
    [
        ((9, 5), 10, "9 video and 5 text embeddings: expected a row for each of 10 clips and 5 sentences"),
        ((10, 4), 10, "10 video and 4 text embeddings"),
        ((10, 5), 0, "clip P01_01_0 is there twice"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows, ids, message):
    names = clip_ids(10) if ids else ["P01_01_0"] * 10
    with pytest.raises(MetricsError, match=message):
        ek100_protocol(
            np.ones((rows[0], 3)), names, clip_classes(10), np.ones((rows[1], 3)), sentence_set(10)
        )


def test_nan_is_refused():
    z = np.ones((10, 3))
    z[4, 1] = np.nan
    with pytest.raises(MetricsError, match="video embedding 4: NaN"):
        ek100_protocol(z, clip_ids(10), clip_classes(10), np.ones((5, 3)), sentence_set(10))


# ---- on the official annotations ----


@pytest.fixture
def official(shared_data):
    clips_csv, sentences_csv = ek100_files(shared_data / "ek100_mir", "test")
    clips = read_ek100_clips(clips_csv)
    return clips, read_ek100_sentences(sentences_csv, clips)


def test_an_id_says_its_video(official):
    """What the bootstrap counts on."""
    clips, sentences = official
    assert all(video_of(clip.narration_id) == clip.video_id for clip in clips)
    assert {video_of(s.narration_id) for s in sentences} <= {clip.video_id for clip in clips}


def test_random_scores_give_the_published_random_row(official):
    """Published: 5.7 mAP, 10.9 nDCG (percent, mean of both directions; Damen et al., IJCV 2022)."""
    clips, sentences = official
    rng = np.random.default_rng(0)
    scores = evaluate(
        rng.random((len(clips), len(sentences)), dtype=np.float32),
        relevancy([clip.classes for clip in clips], [s.classes for s in sentences]),
    )
    assert 100 * scores.mean_average_precision.mean == pytest.approx(5.7, abs=0.1)
    assert 100 * scores.ndcg.mean == pytest.approx(10.9, abs=0.1)

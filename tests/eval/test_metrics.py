"""mAP, nDCG, recall, ranks: hand-worked tables, a slow reference, the official evaluation's numbers."""

import json
import math
import subprocess
import sys
import tracemalloc

import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rlt_retrieval.errors import MetricsError
from rlt_retrieval.eval import evaluate, mean_average_precision, metrics, ndcg, recall_at_k

# ---- the reference: one query at a time, straight from the definitions ----


def ranked_slowly(scores, relevancies):
    """Highest score first; among equal scores the less relevant first."""
    return [r for _, r in sorted(zip(scores, relevancies, strict=True), key=lambda pair: (-pair[0], pair[1]))]


def average_precision_slowly(ranked):
    precisions = [sum(ranked[: k + 1]) / (k + 1) for k in range(len(ranked)) if ranked[k] == 1]
    return sum(precisions) / len(precisions) if precisions else math.nan


def ndcg_slowly(ranked):
    cut = sum(r > 0 for r in ranked)
    best = sorted(ranked, reverse=True)
    gain, ideal = (sum(r / math.log2(k + 2) for k, r in enumerate(order[:cut])) for order in (ranked, best))
    return gain / ideal if ideal else math.nan


def tie_decides_slowly(scores, relevancies):
    pairs = list(zip(scores, relevancies, strict=True))
    return any(s == t and r != q for i, (s, r) in enumerate(pairs) for t, q in pairs[:i])


def rank_slowly(scores, right):
    best = max(score for score, is_right in zip(scores, right, strict=True) if is_right)
    return 1 + sum(score >= best for score, is_right in zip(scores, right, strict=True) if not is_right)


@st.composite
def scored(draw):
    """Similarities with many ties or hardly any, soft relevancies with at least one exact match."""
    shape = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    level = st.sampled_from([-1.0, 0.0, 0.25, 1.0]) | st.floats(-1, 1, allow_subnormal=False)
    similarity = draw(arrays(np.float64, shape, elements=level))
    relevancy = draw(arrays(np.float64, shape, elements=st.sampled_from([0.0, 0.0, 1 / 6, 0.5, 1.0])))
    relevancy[draw(st.integers(0, shape[0] - 1)), draw(st.integers(0, shape[1] - 1))] = 1.0
    return similarity, relevancy


def as_numbers(evaluation):
    return [
        x for name in ("text_to_video", "video_to_text", "mean") for x in evaluation.to_dict()[name].values()
    ]


# ---- AP and nDCG by hand ----


def in_rank_order(*relevancies):
    """A single video query whose texts are already in rank order."""
    return np.arange(len(relevancies), 0, -1.0)[None], np.array(relevancies, dtype=float)[None]


@pytest.mark.parametrize(
    ("ranked", "expected"),
    [
        ([1, 0, 0], 1.0),
        ([0, 0, 1], 1 / 3),
        ([1, 0, 1], (1 / 1 + 2 / 3) / 2),
        # Soft relevancies add to the precision, but only exact matches read it.
        ([0.5, 1, 0, 1], (1.5 / 2 + 2.5 / 4) / 2),
        ([0.5, 0.5, 1], 2 / 3),
        ([1, 0.5, 0.5], 1.0),
    ],
)
def test_average_precision_by_hand(ranked, expected):
    assert mean_average_precision(*in_rank_order(*ranked)).video_to_text == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("ranked", "expected"),
    [
        ([1, 0, 0], 1.0),
        # One relevant item: K = 1, so at rank 2 it is beyond the cut and gains nothing.
        ([0, 1, 0], 0.0),
        ([0, 1, 1], (1 / math.log2(3)) / (1 + 1 / math.log2(3))),
        ([0.5, 1, 0, 1], (0.5 + 1 / math.log2(3)) / (1 + 1 / math.log2(3) + 0.5 / 2)),
        ([0.25, 0, 0], 1.0),
    ],
)
def test_ndcg_by_hand(ranked, expected):
    assert ndcg(*in_rank_order(*ranked)).video_to_text == pytest.approx(expected, abs=1e-12)


def test_both_directions_and_their_mean():
    similarity = np.array([[0.9, 0.1], [0.8, 0.2]])
    result = mean_average_precision(similarity, np.eye(2))
    assert result.video_to_text == pytest.approx((1 + 1 / 2) / 2)  # video 1 prefers text 0
    assert result.text_to_video == pytest.approx(1.0)  # each text prefers its own video
    assert result.mean == pytest.approx((0.75 + 1) / 2)


def test_among_equal_scores_the_less_relevant_comes_first():
    similarity, relevancy = np.full((1, 3), 0.5), np.array([[1, 0.5, 0]])
    assert mean_average_precision(similarity, relevancy).video_to_text == pytest.approx(1.5 / 3)
    # K = 2: relevancies 0 and 0.5 come first.
    expected = (0.5 / math.log2(3)) / (1 + 0.5 / math.log2(3))
    assert ndcg(similarity, relevancy).video_to_text == pytest.approx(expected)


def test_only_ties_that_decide_something_are_counted():
    similarity = np.array([[0.5, 0.5, 0.1], [0.5, 0.5, 0.1], [0.9, 0.5, 0.5], [0.5, 0.5, 0.5]])
    relevancy = np.array([[1, 0.5, 0], [1, 1, 0], [0.5, 0.25, 0], [0, 0, 0]])
    result = evaluate(similarity, relevancy)
    # Video 0: 1 or 0.5 first. Video 1: either way 1. Video 2: no exact match, so mAP leaves it out. Video 3: nothing.
    assert (result.mean_average_precision.video_to_text_tied, result.ndcg.video_to_text_tied) == (1, 2)
    # Text 0 and 1: videos 0, 1 and 3 tie; 1 and 0 differ. Text 2 has nothing to find.
    assert (result.mean_average_precision.text_to_video_tied, result.ndcg.text_to_video_tied) == (2, 2)
    assert (result.to_dict()["video_to_text"]["tied"], result.to_dict()["text_to_video"]["tied"]) == (2, 2)


def test_a_query_with_nothing_to_find_is_left_out_and_counted():
    similarity = np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.4]])
    relevancy = np.array([[1, 0.5], [0, 0], [0.5, 0.5]])
    average_precision, gain = mean_average_precision(similarity, relevancy), ndcg(similarity, relevancy)
    assert (average_precision.video_to_text_left_out, average_precision.text_to_video_left_out) == (2, 1)
    assert (gain.video_to_text_left_out, gain.text_to_video_left_out) == (1, 0)
    assert average_precision.video_to_text == pytest.approx(1.0)


def test_matches_the_official_evaluation(shared_data):
    oracle = json.loads((shared_data / "ek100_mir" / "oracle_small.json").read_text())
    similarity, relevancy = np.array(oracle["similarity"]), np.array(oracle["relevancy"])
    result, expected = evaluate(similarity, relevancy), oracle["expected"]
    for scores, name in ((result.mean_average_precision, "mAP"), (result.ndcg, "nDCG")):
        seen = {"v2t": scores.video_to_text, "t2v": scores.text_to_video, "avg": scores.mean}
        assert seen == pytest.approx(expected[name], abs=1e-9)
    for direction, sim, rel in (("v2t", similarity, relevancy), ("t2v", similarity.T, relevancy.T)):
        queries = metrics.query_scores(sim, rel)
        for name, values in (("AP", queries.average_precision), ("nDCG", queries.ndcg)):
            assert values == pytest.approx(oracle["expected_per_query"][f"{name}_{direction}"], abs=1e-9)


def test_matches_an_independent_implementation_on_binary_relevancies(rng):
    """Where a pair is right or wrong, AP is the textbook one, and nDCG that cut at the number of right items."""
    relevancy = rng.random((30, 20)) < 0.2
    relevancy[:, 0] = True
    similarity = rng.permutation(relevancy.size).reshape(relevancy.shape).astype(float)
    scores = metrics.query_scores(similarity, relevancy)
    for query in range(len(relevancy)):
        num_right = int(relevancy[query].sum())
        qrels = [ir_measures.Qrel("q", str(item), int(right)) for item, right in enumerate(relevancy[query])]
        run = [ir_measures.ScoredDoc("q", str(item), score) for item, score in enumerate(similarity[query])]
        expected = ir_measures.calc_aggregate([ir_measures.AP, ir_measures.nDCG @ num_right], qrels, run)
        assert scores.average_precision[query] == pytest.approx(expected[ir_measures.AP], abs=1e-9)
        assert scores.ndcg[query] == pytest.approx(expected[ir_measures.nDCG @ num_right], abs=1e-9)


# ---- fast = slow ----


@settings(max_examples=150, deadline=None)
@given(scored(), st.integers(1, 30))
def test_fast_scores_equal_the_slow_reference(pair, pairs_per_chunk):
    """Catches wrong tie runs across rows, chunks that drop rows, and a cut at another K."""
    similarity, relevancy = pair
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "PAIRS_PER_CHUNK", pairs_per_chunk)
        for sim, rel in ((similarity, relevancy), (similarity.T, relevancy.T)):
            ranked = [ranked_slowly(*row) for row in zip(sim.tolist(), rel.tolist(), strict=True)]
            fast = metrics.query_scores(sim, rel)
            np.testing.assert_allclose(fast[0], [average_precision_slowly(r) for r in ranked], atol=1e-12)
            np.testing.assert_allclose(fast[1], [ndcg_slowly(r) for r in ranked], atol=1e-12)
            assert fast.tied.tolist() == [tie_decides_slowly(*row) for row in zip(sim, rel, strict=True)]


@settings(max_examples=100, deadline=None)
@given(scored(), st.integers(1, 30))
def test_fast_ranks_equal_the_slow_reference(pair, pairs_per_chunk):
    similarity, positive = pair[0], pair[1] == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "PAIRS_PER_CHUNK", pairs_per_chunk)
        result = recall_at_k(similarity, positive, ks=(1, 2))
    for scores, sim, right in (
        (result.video_to_text, similarity, positive),
        (result.text_to_video, similarity.T, positive.T),
    ):
        ranks = np.array([rank_slowly(*row) for row in zip(sim, right, strict=True) if row[1].any()])
        assert (scores.num_queries, scores.left_out) == (len(ranks), len(sim) - len(ranks))
        assert scores.recall == {1: (ranks <= 1).mean(), 2: (ranks <= 2).mean()}
        assert (scores.median_rank, scores.mean_rank) == (np.median(ranks), pytest.approx(ranks.mean()))


@settings(max_examples=60, deadline=None)
@given(scored(), st.randoms(use_true_random=False))
def test_the_order_of_videos_and_texts_does_not_matter(pair, random):
    similarity, relevancy = pair
    rows, columns = list(range(similarity.shape[0])), list(range(similarity.shape[1]))
    random.shuffle(rows)
    random.shuffle(columns)
    shuffled = similarity[rows][:, columns], relevancy[rows][:, columns]
    assert as_numbers(evaluate(*shuffled)) == pytest.approx(as_numbers(evaluate(*pair)), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(scored())
def test_evaluate_equals_the_two_metrics_and_swaps_with_the_matrix(pair):
    similarity, relevancy = pair
    result, swapped = evaluate(similarity, relevancy), evaluate(similarity.T, relevancy.T)
    assert result.mean_average_precision == mean_average_precision(similarity, relevancy)
    assert result.ndcg == ndcg(similarity, relevancy)
    assert result.to_dict()["text_to_video"] == swapped.to_dict()["video_to_text"]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int8])
def test_scores_of_other_types_rank_as_in_float64(rng, dtype):
    similarity, relevancy = rng.integers(-9, 9, (12, 15)).astype(dtype), rng.choice([0, 0.5, 1], (12, 15))
    assert evaluate(similarity, relevancy) == evaluate(similarity.astype(np.float64), relevancy)


def test_working_memory_is_that_of_a_chunk(rng):
    """Six million pairs, 46 MiB of relevancies alone: a copy of the matrix would show."""
    similarity, relevancy = rng.random((4000, 1500), dtype=np.float32), rng.choice([0, 0.5, 1], (4000, 1500))
    tracemalloc.start()
    evaluate(similarity, relevancy)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 100 * metrics.PAIRS_PER_CHUNK


def test_masked_scores_rank_last():
    similarity = np.array([[-np.inf, 0.3, 0.1]])
    assert recall_at_k(similarity, np.array([[True, False, False]])).video_to_text.median_rank == 3
    assert mean_average_precision(similarity, np.array([[1, 0, 0]])).video_to_text == pytest.approx(1 / 3)


# ---- recall and ranks by hand ----


def test_ranks_by_hand():
    similarity = np.array([[0.9, 0.5, 0.1], [0.7, 0.6, 0.6], [0.3, 0.2, 0.1]])
    result = recall_at_k(similarity, np.eye(3, dtype=bool), ks=(1, 3)).video_to_text
    # Ranks 1, 3 (0.7 is higher, the other 0.6 ties and counts), 3.
    assert result.recall == {1: pytest.approx(1 / 3), 3: 1.0}
    assert (result.median_rank, result.mean_rank, result.tied) == (3.0, pytest.approx(7 / 3), 1)


def test_a_collapsed_model_has_recall_zero():
    result = recall_at_k(np.full((20, 30), 0.25), np.eye(20, 30, dtype=bool))
    for scores, num_items in ((result.video_to_text, 30), (result.text_to_video, 20)):
        assert scores.recall == {1: 0.0, 5: 0.0, 10: 0.0}
        assert (scores.median_rank, scores.tied) == (num_items, 20)
    assert result.text_to_video.left_out == 10


def test_several_right_items_count_at_the_best_and_do_not_push_each_other_down():
    similarity = np.array([[0.5, 0.9, 0.9, 0.1]])
    positive = np.array([[False, True, True, True]])
    assert recall_at_k(similarity, positive).video_to_text.recall[1] == 1.0


# ---- refusals ----


@pytest.mark.parametrize("metric", [mean_average_precision, ndcg, evaluate])
def test_nan_is_refused_and_the_row_named(metric, monkeypatch):
    monkeypatch.setattr(metrics, "PAIRS_PER_CHUNK", 4)  # the row is in a later chunk
    similarity = np.zeros((5, 2))
    similarity[3, 1] = np.nan
    with pytest.raises(MetricsError, match="similarity row 3, column 1: NaN"):
        metric(similarity, np.ones((5, 2)))
    with pytest.raises(MetricsError, match="similarity row 3, column 1: NaN"):
        recall_at_k(similarity, np.ones((5, 2), dtype=bool))


@pytest.mark.parametrize("bad", [np.nan, -0.5, 1.5])
def test_relevancies_outside_the_unit_interval_are_refused(bad):
    relevancy = np.ones((2, 2))
    relevancy[1, 0] = bad
    with pytest.raises(MetricsError, match=r"relevancy row 1, column 0: .* expected a number in \[0, 1\]"):
        evaluate(np.zeros((2, 2)), relevancy)


@pytest.mark.parametrize(("similarity", "relevancy"), [((2, 3), (3, 2)), ((4,), (4,)), ((0, 3), (0, 3))])
def test_shapes_that_do_not_fit_are_refused(similarity, relevancy):
    with pytest.raises(MetricsError, match="expected the same non-empty shape"):
        evaluate(np.zeros(similarity), np.zeros(relevancy))


def test_nothing_to_find_is_refused():
    half = np.full((2, 2), 0.5)
    assert ndcg(half, half).mean == 1.0
    with pytest.raises(MetricsError, match="mAP: no pair has relevancy 1"):
        mean_average_precision(half, half)
    with pytest.raises(MetricsError, match="nDCG: no pair has relevancy > 0"):
        ndcg(half, half * 0)
    with pytest.raises(MetricsError, match="none is True"):
        recall_at_k(half, half > 1)


def test_recall_wants_a_mask_and_k_from_one():
    with pytest.raises(MetricsError, match="float64, expected bool"):
        recall_at_k(np.eye(2), np.eye(2))
    with pytest.raises(MetricsError, match="k counts from 1"):
        recall_at_k(np.eye(2), np.eye(2, dtype=bool), ks=(0, 1))


def test_importing_eval_loads_no_torch_and_no_matplotlib():
    code = (
        "import sys, rlt_retrieval.eval, rlt_retrieval.eval.protocols, rlt_retrieval.eval.report; "
        "print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"

"""Dual softmax and QB-norm on hand-worked numbers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rlt_retrieval.eval.rescoring import DUAL_SOFTMAX, QB_NORM, dual_softmax, extra_rows, qb_norm


def test_dual_softmax_by_hand():
    """Scale ln 2 over scores 0, 1, 2 gives powers of two: 1, 2, 4."""
    similarity = np.array([[1.0, 0.0], [2.0, 1.0]])  # two queries, two items
    # Item 0: 2 and 4 of 6; item 1: 1 and 2 of 3.
    expected = [[1 * 2 / 6, 0], [2 * 4 / 6, 1 * 2 / 3]]
    np.testing.assert_allclose(dual_softmax(similarity, scale=math.log(2)), expected, atol=1e-12)


def test_dual_softmax_takes_a_hub_away_from_queries_it_fits_less():
    similarity = np.array([[0.50, 0.45], [0.90, 0.10]], dtype=np.float32)
    assert similarity.argmax(axis=1).tolist() == [0, 0]
    rescored = dual_softmax(similarity)
    assert rescored.dtype == np.float64
    assert rescored.argmax(axis=1).tolist() == [1, 0]


def test_dual_softmax_does_not_overflow():
    rescored = dual_softmax(np.array([[50.0, -50.0], [-50.0, 50.0]]), scale=100)
    np.testing.assert_allclose(rescored, [[50, 0], [0, 50]], atol=1e-12)


def test_qb_norm_by_hand():
    """Items e1, e2; bank queries (2, 0) and (1, 0) with scale ln 2: Z = 2² + 2¹ = 6 and 2⁰ + 2⁰ = 2; A = {item 0}."""
    gallery, bank, scale = np.eye(2), np.array([[2.0, 0.0], [1.0, 0.0]]), math.log(2)
    similarity = np.array([[3.0, 2.0], [0.0, 1.0]])  # query 0 finds item 0 first, query 1 item 1
    rescored = qb_norm(similarity, gallery, bank, scale)
    # Query 0: 2³/6 = 4/3 and 2²/2 = 2, so item 1 is first now. Query 1: item 1 is not in A, it stays.
    np.testing.assert_allclose(2 ** rescored[0], [8 / 6, 4 / 2], atol=1e-12)
    np.testing.assert_array_equal(rescored[1], similarity[1])


def test_a_bank_that_never_finds_a_first_hit_changes_nothing():
    similarity = np.array([[0.2, 0.9], [0.1, 0.8]])
    np.testing.assert_array_equal(qb_norm(similarity, np.eye(2), np.array([[1.0, 0.0]])), similarity)


@given(arrays(np.float64, (2500, 3), elements=st.floats(-1, 1)))
def test_a_large_bank_is_probed_in_parts(bank):
    """More bank rows than one product takes."""
    gallery = np.array([[1.0, 0.2, 0.0], [0.0, 1.0, 0.5]])
    similarity = np.array([[0.3, 0.9], [0.8, 0.1]])
    exponentials = np.exp(20 * bank @ gallery.T)
    first = set((bank @ gallery.T).argmax(axis=1))
    expected = similarity.copy()
    for row in range(2):
        if similarity[row].argmax() in first:
            expected[row] -= np.log(exponentials.sum(axis=0)) / 20
    np.testing.assert_allclose(qb_norm(similarity, gallery, bank), expected, atol=1e-9)


def test_each_direction_gets_its_own_prior():
    similarity = np.arange(1, 7, dtype=np.float32).reshape(2, 3) / 10
    seen = []

    def score(matrix):
        assert matrix.shape == (2, 3)
        seen.append(matrix)
        return {"text_to_video": f"t2v of {len(seen)}", "video_to_text": f"v2t of {len(seen)}"}

    rows = extra_rows(similarity, np.eye(2), np.eye(2)[:1], score)
    assert rows == {
        DUAL_SOFTMAX: {"text_to_video": "t2v of 1", "video_to_text": "v2t of 2"},
        QB_NORM: {"text_to_video": "t2v of 3"},
    }
    np.testing.assert_allclose((seen[0] / similarity).sum(axis=1), 1)  # texts are the queries
    np.testing.assert_allclose((seen[1] / similarity).sum(axis=0), 1)
    assert list(extra_rows(similarity, np.eye(2), None, score)) == [DUAL_SOFTMAX]


@pytest.mark.parametrize("axis", [0, 1])
def test_priors_of_one_direction_sum_to_one_over_its_queries(rng, axis):
    similarity = rng.uniform(0.1, 0.4, (5, 7))
    rescored = dual_softmax(similarity) if axis == 0 else dual_softmax(similarity.T).T
    np.testing.assert_allclose((rescored / similarity).sum(axis=axis), 1)

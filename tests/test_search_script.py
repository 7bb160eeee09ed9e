"""benchmarks/search.py on a small index: its files are the product's, its page has every bar."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest
from small_models import small_model

from rlt_retrieval import VideoIndex, VideoTextModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import search


def test_every_row_is_a_clip_that_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "CLIPS_PER_VIDEO", 30)
    z_ND = search.unit_vectors(70, 8, seed=1)
    np.testing.assert_allclose(np.linalg.norm(z_ND, axis=1), 1, rtol=1e-6)
    search.write_index(tmp_path / "my.index", z_ND)
    with VideoIndex.open(tmp_path / "my.index", device="cpu") as index:
        assert index.counts().clips == 70
        assert index.counts().videos["ok"] == 3
        for row, hits in enumerate(index.search_vectors(z_ND, 1)):
            assert hits[0].clip_id == row + 1
            assert hits[0].start_seconds == 10 * (row % 30)
    assert (tmp_path / "my.index" / "vectors.faiss").exists()


def test_the_page_has_a_verdict_for_every_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(VideoTextModel, "create", lambda *_, **__: small_model())
    search.run(argparse.Namespace(rows=300, dimension=16, repeats=1, save=False))
    page = capsys.readouterr().out
    for bar in ("search / FAISS, 1 queries", "search / FAISS, 64 queries", "open / reading vectors.faiss"):
        assert page.count(f"- {bar}: ") == 1


def test_open_is_what_the_first_answer_takes_beyond_a_search() -> None:
    searches = {1: {"faiss": 1.0, "ours": 1.05, "text": 0.1}}
    opening = {"read": 2.0, "open": 3.0, "first answer": 3.5}
    page = search.tables(searches, opening)
    assert "search / FAISS, 1 queries: 1.050, bar ≤ 1.100: reached" in page
    assert "open / reading vectors.faiss: 1.500, bar ≤ 2.000: reached" in page

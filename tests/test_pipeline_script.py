"""benchmarks/pipeline.py on a tiny model: both ways do the same work, and the page says what was measured."""

import os
import sys
from pathlib import Path

import pytest
from small_models import small_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import pipeline


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "model"
    small_model(layout="frame", num_frames=4).save(folder)
    return folder


def test_the_page_of_a_tiny_model(
    model_folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 s of a film are two windows; the small model of the memory part is its own. One core: fewer processes."""
    monkeypatch.setattr(pipeline, "num_cores", lambda: 1)
    monkeypatch.setattr(pipeline, "FILMS", {pipeline.CROWDED: pipeline.FILMS[pipeline.CROWDED]})
    pipeline.main(
        ["--model", str(model_folder), "--minutes", "0.2", "--long", "0.2", "0.4", "--repeats", "1",
         "--device", "cpu", "--workers", "1", "--threads", "1"]
    )  # fmt: skip
    page = capfd.readouterr().out
    lines = [line.split("|") for line in page.splitlines() if line.startswith("|")]
    assert [cells[1].strip() for cells in lines[2:]] == list(pipeline.FILMS)
    assert [cells[2].strip() for cells in lines[2:]] == ["2"]
    assert "Peak of a file of 0.4 minutes" in page
    assert page.count("bar ≤ 1.100") == 2
    assert page.count(f"\n- {pipeline.CROWDED}, ") == 2


def test_the_limit_is_shared_by_the_cores_or_the_slower_stage() -> None:
    row = {"decode": 6.0, "encode": 2.0}
    assert pipeline.limit(row, {"device": "cpu", "workers": 1}, 2) == 4
    assert pipeline.limit(row, {"device": "cuda", "workers": 2}, 16) == 3
    assert pipeline.limit(row, {"device": "cuda", "workers": 6}, 16) == 2


def test_films_are_copied_until_they_fill_the_minutes(tmp_path: Path) -> None:
    chosen = pipeline.films(None, 0.5, tmp_path)
    assert {kind: len(files) for kind, files in chosen.items()} == dict.fromkeys(pipeline.FILMS, 2)
    assert pipeline.film_seconds(chosen["handheld"][1]) == pytest.approx(20)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_the_peak_counts_a_process_and_knows_when_it_is_gone() -> None:
    peaks = pipeline.peak_bytes_of(os.getpid())
    assert peaks[os.getpid()] > 1e7
    assert pipeline.peak_bytes_of(2**30) == {}

"""benchmarks/encode.py and what benchmarks share: what is counted and judged, never how long it takes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from rlt_retrieval.encoders.tokenizer import RunLengthTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import encode
import measuring


def row(keep: float, **seconds: float) -> encode.Row:
    return encode.Row("clip", {"c": keep, "e": keep}, seconds, {"b": 1e-5, "f": 3e-4})


def test_bars_are_judged_on_summed_times_of_the_clips_that_count():
    rows = [
        row(0.2, a=10.0, b=10.0, c=1.0, d=4.0, f=4.0, e=1.0),
        row(0.4, a=10.0, b=11.0, c=4.1, d=4.0, f=4.0, e=1.9),
        row(0.9, a=10.0, b=10.4, c=9.9, d=4.0, f=4.7, e=4.9),  # keeps too much to count for c and e
    ]
    assert encode.judged(rows, "fp32") == [
        "b/a over 3 clips: 1.047, bar ≤ 1.050: reached",
        "largest |b - a| in units of 0.0001: 0.100, bar ≤ 1.000: reached",
        "f/d over 3 clips: 1.058, bar ≤ 1.050: NOT reached",
        "largest |f - d| in units of 0.0001: 3.000, bar ≤ 1.000: NOT reached",
        "c/a over 2 clips, keep 0.300: 0.255, bar ≤ 0.255: reached",
        "e/d over 2 clips, keep 0.300: 0.362, bar ≤ 0.350: NOT reached",
    ]


def test_one_layout_is_judged_alone():
    rows = [row(0.9, d=4.0, f=4.0, e=1.0)]
    assert [line.split()[0] for line in encode.judged(rows, "fp32")] == ["f/d", "largest"]
    assert encode.plot(rows).startswith(b"\x89PNG")


def test_both_layouts_are_measured_and_equal_their_baselines(monkeypatch, capsys):
    arguments = ["encode.py", "--backbone", "ViT-S-32-alt", "--num-frames", "2", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(measuring, "PLANTED_SHARES", (0.1,))
    encode.main()
    page = capsys.readouterr().out
    assert "| planted 0.1 |" in page
    differences = [line for line in page.splitlines() if "largest" in line]
    assert len(differences) == 2
    assert all(line.endswith(": reached") for line in differences)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_planted_clips_change_as_much_as_they_say(share):
    clip = measuring.planted_clip(share, 3, 64, 8, np.random.default_rng(0))
    kept = RunLengthTokenizer(8, threshold=0.1).keep_mask(clip)[1:]
    assert kept.float().mean() == pytest.approx(share, abs=0.02)


def test_repetitions_alternate_and_their_median_counts(monkeypatch):
    calls: list[str] = []
    times = iter([5.0, 1.0, 2.0, 9.0, 3.0, 4.0])
    monkeypatch.setattr(measuring, "seconds", lambda run, clock: (run(), next(times))[1])
    runs = {"x": lambda: calls.append("x"), "y": lambda: calls.append("y")}
    assert measuring.alternated(runs, 3) == {"x": 3.0, "y": 4.0}
    assert calls == ["x", "y"] * 3


def test_the_named_clips_are_taken_where_all_are_there(tmp_path):
    for name in (*measuring.CLIPS, "another.mp4"):
        (tmp_path / name).touch()
    assert [path.name for path in measuring.videos(tmp_path)] == list(measuring.CLIPS)
    assert len(measuring.videos(tmp_path, everything=True)) == 9
    (tmp_path / measuring.CLIPS[0]).unlink()
    assert len(measuring.videos(tmp_path)) == 8
    assert measuring.videos(tmp_path)[0].name == "another.mp4"


def test_a_result_is_printed_and_kept_only_if_asked(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measuring, "RESULTS", tmp_path)
    measuring.publish("speed", "Speed", "fast", save=False)
    assert not list(tmp_path.iterdir())
    measuring.publish("speed", "Speed", "fast", save=True)
    (kept,) = tmp_path.iterdir()
    assert kept.name.startswith("speed_")
    assert kept.read_text().startswith("# Speed\n\n2")
    assert capsys.readouterr().out.count("fast") == 2

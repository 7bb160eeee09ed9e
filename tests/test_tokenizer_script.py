"""benchmarks/tokenizer.py: what is counted and judged, never how long it takes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import measuring
import tokenizer


def row(case: str, **seconds: float) -> tokenizer.Row:
    return tokenizer.Row("clip", case, 0.5, dict.fromkeys(tokenizer.COLUMNS, 99.0) | seconds)


def test_bars_are_judged_on_times_summed_over_clips_case_by_case() -> None:
    rows = [
        row("frame, anchor", whole=1.0, decode=2.0, encode=10.0),
        row("frame, previous", whole=3.0, decode=10.0, encode=200.0),
        row("frame, anchor", whole=1.0, decode=8.0, encode=40.0),
    ]
    assert tokenizer.judged(rows) == [
        "frame, anchor: whole/decode: 0.200, bar ≤ 0.200: reached",
        "frame, anchor: whole/encode: 0.040, bar ≤ 0.020: NOT reached",
        "frame, previous: whole/decode: 0.300, bar ≤ 0.200: NOT reached",
        "frame, previous: whole/encode: 0.015, bar ≤ 0.020: reached",
    ]


def test_a_case_has_its_own_times_and_the_clips_decode() -> None:
    """Catches a case that is given another one's column, or none."""
    taken = {"decode": 1.0, f"decode{tokenizer.ALL}": 2.0}
    for index, case in enumerate(("a", "b")):
        own = [part for part in tokenizer.COLUMNS if not part.startswith("decode")]
        taken |= {f"{case}: {part}": 10.0 * index + place for place, part in enumerate(own)}
    seconds = tokenizer.seconds_of("b", taken)
    assert list(seconds) == list(tokenizer.COLUMNS)
    assert (seconds["decode"], seconds[f"decode{tokenizer.ALL}"]) == (1.0, 2.0)
    assert (seconds["cut"], seconds["encode"]) == (10.0, 16.0)


def test_runs_have_the_threads_they_are_given() -> None:
    before = torch.get_num_threads()
    assert tokenizer.with_threads(before + 1, torch.get_num_threads)() == before + 1
    assert torch.get_num_threads() == before


def test_every_case_of_every_clip_is_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A planted video through H.264: of three frames the first is whole, of the others the planted share is kept."""
    monkeypatch.setattr(
        sys,
        "argv",
        ["tokenizer.py", "--backbone", "ViT-S-32-alt", "--num-frames", "3", "--repeats", "1"],
    )
    monkeypatch.setattr(measuring, "PLANTED_SHARES", (0.0, 0.25))
    monkeypatch.setattr(tokenizer, "PLANTED_FPS", 1)
    tokenizer.main()
    lines = capsys.readouterr().out.splitlines()
    listed = [
        [cell.strip() for cell in line.split("|")[1:4]] for line in lines if line.startswith("| planted")
    ]
    cases = [f"{layout}, {reference}" for layout in tokenizer.LAYOUTS for reference in tokenizer.REFERENCES]
    keeps = {"planted 0": 1 / 3, "planted 0.25": (1 + 2 * 12 / 49) / 3}
    assert [cells[:2] for cells in listed] == [[clip, case] for clip in keeps for case in cases]
    assert [float(cells[2]) for cells in listed] == [
        pytest.approx(keep, abs=0.02) for keep in keeps.values() for _ in cases
    ]
    assert sum("bar ≤" in line for line in lines) == len(cases) * len(tokenizer.BARS)

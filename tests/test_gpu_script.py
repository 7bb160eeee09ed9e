"""benchmarks/gpu.py at tiny size on the CPU: every part answers, what fails is a line, baselines are what they say."""

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from small_models import repeating_frames, small_model

from rlt_retrieval import pack

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import encode
import gpu
import gpu_bench
import gpu_model_parts
from gpu_bench import TINY, Aim, Bench, Row

CPU = ["--device", "cpu", "--tiny", "--quick"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """The whole run; its files lie in `out`."""
    folder = tmp_path_factory.getbasetemp() / "gpu"
    return gpu.main([*CPU, "--out", str(folder)])


def test_every_part_answers(rows: list[Row]) -> None:
    """Only what needs a GPU says so; catches a part whose code path is broken."""
    assert {row.part for row in rows} == set(gpu.PARTS)
    failed = {row.case for row in rows if row.note.startswith("failed")}
    needs_gpu = {row.case for row in rows if "flash_attn" in row.case or "fused" in row.case}
    needs_gpu |= {row.case for row in rows if row.part == 5 and row.case.endswith(", torch")}
    assert failed <= needs_gpu
    assert all(row.figures for row in rows if row.case not in needs_gpu)
    assert all(value > 0 for row in rows for name, value in row.figures.items() if "of 4" not in name)


def test_each_aim_is_judged(rows: list[Row]) -> None:
    """Four keep ratios of two layouts: a share of the ceiling each, a speed-up where half is dropped or nothing."""
    for part, speed_ups in ((2, 6), (3, 4)):
        names = [aim.name for row in rows if row.part == part for aim in row.aims]
        assert sum("share of ceiling" in name for name in names) == 8
        assert sum("times as fast as dense" in name for name in names) == speed_ups


def test_compiled_blocks_are_not_compiled_again_for_every_length(rows: list[Row]) -> None:
    compiled = [row.figures for row in rows if row.part == 3 and "compiled" in row.case]
    assert len(compiled) == 3
    assert all(figures["graphs of 4 other lengths"] <= 2 for figures in compiled)


def test_files_hold_every_row(rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "gpu"
    report = json.loads((folder / "gpu.json").read_text())
    assert report["meaningless times"] is True
    assert sorted((row["part"], row["case"]) for row in report["rows"]) == sorted(
        (r.part, r.case) for r in rows
    )
    assert "the times mean nothing" in (folder / "gpu.md").read_text()


def test_a_case_that_fails_is_a_line_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Row:
        raise ImportError("no module | here\nsecond line")

    def cases(bench: Bench) -> Iterator[gpu_bench.Case]:
        yield "broken", fails
        yield "whole", lambda: Row(1, "whole", {"ms": 1.5}, (Aim("speed", 2.0, 1.5),))

    monkeypatch.setitem(gpu.PARTS, 1, (cases, 60))
    rows = gpu.main([*CPU, "--parts", "1"])
    assert [row.note for row in rows] == ["failed: ImportError: no module / here", ""]
    assert "speed: 2.000, bar ≥ 1.500: reached" in gpu.as_text(rows)
    monkeypatch.setitem(gpu.PARTS, 1, (cases, -1))
    assert [row.note[:8] for row in gpu.main([*CPU, "--parts", "1"])] == ["left out"] * 2


def test_without_a_gpu_the_full_run_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["--quick"])
    assert "--device cpu --tiny runs every code path" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["joint", "frame"])
def test_dense_batches_are_the_dense_clips_of_the_encoding_benchmark(layout: str) -> None:
    """And ours with everything kept."""
    model = small_model(layout=layout, threshold=-1.0)
    for name in ("temporal_embedding", "run_length_embedding"):
        if layout == "joint":
            torch.nn.init.zeros_(getattr(model.video, name))
    clips = torch.stack([repeating_frames(6, 1.0, seed) for seed in range(3)])
    pixels = Bench(torch.device("cpu"), TINY).pixels(model, clips)
    with torch.inference_mode():
        seen = gpu_model_parts.DENSE[layout](model.clip.visual, pixels)
        one = {
            "joint": partial(encode.dense_joint, model.clip.visual),
            "frame": partial(encode.frame_by_frame, model.clip),
        }[layout]
        torch.testing.assert_close(seen, torch.cat([one(clip) for clip in pixels]), atol=1e-5, rtol=0)
        torch.testing.assert_close(model.encode_video(clips), seen, atol=1e-5, rtol=0)
    assert seen.shape == (3, 32)


@pytest.mark.parametrize("layout", ["joint", "frame"])
@pytest.mark.parametrize("multiple", [1, 64, 1000])
def test_a_padded_batch_gives_the_same_clips(layout: str, multiple: int) -> None:
    """One more clip fills the token axis; catches padding that reaches into the last clip."""
    model = small_model(layout=layout)
    packed = pack([model.tokenizer(repeating_frames(6, 0.3, seed)) for seed in range(3)])
    padded = gpu_model_parts.padded(packed, multiple)
    assert multiple == 1 or (padded.num_tokens + len(padded)) % multiple == 0
    assert padded.num_tokens == int(padded.cu_seqlens[-1])
    with torch.inference_mode():
        expected = model.encode_tokens(packed)
        torch.testing.assert_close(model.encode_tokens(padded)[:3], expected, atol=1e-5, rtol=0)

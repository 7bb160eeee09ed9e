"""The bench itself: every reducer at the cost of rlt, and what a row says, on tiny clips and towers."""

import itertools
import sys

import numpy as np
import pytest
import torch
from small_models import repeating_frames, small_config, small_model

from rlt_retrieval.bench.clips import BenchClip
from rlt_retrieval.bench.costs import mean_cost
from rlt_retrieval.bench.fidelity import copied_forward, relative_errors
from rlt_retrieval.bench.matching import MAX_STEPS, match
from rlt_retrieval.bench.memory import peak_bytes
from rlt_retrieval.bench.reducers import ReducerTable, bench_reducers, describe_model, is_random
from rlt_retrieval.bench.report import plot, table_text
from rlt_retrieval.config import REDUCERS, Reducer
from rlt_retrieval.model import VideoTextModel

NUM_CLIPS = 13


def clips_of(changes: list[float], captions: bool = True) -> list[BenchClip]:
    """Clips whose patches change as often, six frames each, with noise that no exact comparison survives."""
    clips = []
    for n, change in enumerate(changes):
        noise = torch.randint(0, 3, (6, 3, 32, 32), generator=torch.Generator().manual_seed(n))
        frames = repeating_frames(6, change, seed=n).clamp(max=250) + noise.to(torch.uint8)
        clips.append(BenchClip(f"clip {n}", frames, (f"caption {n}",) if captions else ()))
    return clips


def fading_frames(seed: int) -> torch.Tensor:
    """Each patch fades to another at a speed of its own, so that every threshold drops other tokens."""
    generator = torch.Generator().manual_seed(seed)
    before, after = torch.randint(0, 256, (2, 3, 32, 32), generator=generator)
    speeds = torch.rand(4, 4, generator=generator).repeat_interleave(8, 0).repeat_interleave(8, 1)
    times = torch.arange(6)[:, None, None, None]
    return torch.lerp(before.float(), after.float(), (0.1 * times * speeds)).to(torch.uint8)


CLIPS = clips_of(list(np.linspace(0.1, 0.6, NUM_CLIPS)))
FRAMES = [clip.frames_TCHW for clip in CLIPS]


def bench_model(layout: str, **vision: object) -> VideoTextModel:
    return small_model({"layers": 4, **vision}, layout=layout, threshold=0.1, reference="anchor")


@pytest.fixture(scope="module", params=["frame", "joint"])
def table(request: pytest.FixtureRequest) -> ReducerTable:
    return bench_reducers(bench_model(request.param), CLIPS, repeats=1)


# ------------------------------------------------------------------------------------------- matching


@pytest.mark.parametrize("layout", ["frame", "joint"])
@pytest.mark.parametrize("reducer", ["gated", "motion", "rlt+random", "rlt+tome"])
def test_finely_set_reducers_meet_the_cost_of_rlt(layout: str, reducer: Reducer) -> None:
    model, frames = bench_model(layout), [fading_frames(seed) for seed in range(NUM_CLIPS)]
    target = match(model, "rlt", frames, None).cost.flops
    found = match(model, reducer, frames, target)
    assert 0.3 < target / mean_cost(model.with_settings(reducer="none"), frames).flops < 0.8
    assert found.cost.flops == pytest.approx(target, rel=0.02)
    again = model.with_settings(reducer=reducer, **found.changes)
    assert mean_cost(again, frames) == found.cost
    if "+" in reducer:
        assert found.changes["threshold"] == 0.05


@pytest.mark.parametrize(
    ("layout", "reducer"),
    [
        *itertools.product(["frame", "joint"], ["frames", "resolution", "tome", "vid_tldr"]),
        ("frame", "centerclip"),
    ],
)
def test_others_come_as_near_as_any_keep_ratio(layout: str, reducer: Reducer) -> None:
    model = bench_model(layout)
    target = match(model, "rlt", FRAMES, None).cost.flops
    found = match(model, reducer, FRAMES, target).cost.flops
    every = [
        mean_cost(model.with_settings(reducer=reducer, keep_ratio=ratio / 100), FRAMES).flops
        for ratio in range(1, 101)
    ]
    nearest = min(every, key=lambda flops: abs(flops - target))
    assert abs(found / target - 1) <= max(abs(nearest / target - 1), 0.005) + 1e-9


def test_a_search_takes_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tries = bench_model("frame"), []
    real = VideoTextModel.with_settings
    monkeypatch.setattr(
        VideoTextModel,
        "with_settings",
        lambda self, **changes: tries.append(changes) or real(self, **changes),
    )
    match(model, "frames", FRAMES, 0.5 * mean_cost(model, FRAMES).flops)
    assert len(tries) <= 2 + MAX_STEPS


# ------------------------------------------------------------------------------------------- the table


def test_every_reducer_has_a_row_and_those_that_cannot_run_a_reason(table: ReducerTable) -> None:
    assert [row.reducer for row in table.rows] == list(REDUCERS)
    for row in table.rows:
        if table.model["layout"] == "joint" and row.reducer == "centerclip":
            assert "takes layout 'frame'" in row.note
            assert (row.flops, row.whole_seconds, row.error) == (None, None, None)
        else:
            assert row.flops_share
            assert row.whole_seconds > 0  # type: ignore[operator]
            assert len(row.rows) == 4


def test_rows_are_at_the_cost_of_rlt_or_say_that_they_are_not(table: ReducerTable) -> None:
    rows = {row.reducer: row for row in table.rows if row.flops}
    assert rows["none"].flops_share == rows["none"].tokens_share == 1
    assert rows["random"].tokens_share == rows["rlt"].tokens_share
    for name, row in rows.items():
        off = row.flops / rows["rlt"].flops - 1  # type: ignore[operator]
        said = f"its nearest to rlt's FLOPs is {off:+.1%}"
        assert row.note == (said if name != "none" and abs(off) > 0.02 else "")


def test_quality_is_beside_the_full_model(table: ReducerTable) -> None:
    rows = {row.reducer: row for row in table.rows if row.flops}
    full = rows["none"]
    assert (full.error, full.cosine, full.overlap) == (pytest.approx(0, abs=1e-9), pytest.approx(1), 1)
    assert all(0 < row.error < 10 for name, row in rows.items() if name != "none")  # type: ignore[operator]
    assert all(0 <= row.text_to_video <= 1 for row in rows.values())  # type: ignore[operator]
    assert table.notes == ()


def test_the_error_of_rlt_in_parts() -> None:
    """Pixel error by one batch of all clips, by the public interface."""
    model = bench_model("frame")
    row = next(row for row in bench_reducers(model, CLIPS, ["rlt"], repeats=1).rows if row.reducer == "rlt")
    whole = model.with_settings(reducer="none")
    with torch.no_grad():
        z_full, z_copied, z = (
            found.numpy()
            for found in (
                whole.encode_video(FRAMES),
                whole.encode_video([copied_forward(model.tokenizer(frames)) for frames in FRAMES]),
                model.encode_video(FRAMES),
            )
        )
    assert row.error == pytest.approx(relative_errors(z_full, z).mean(), abs=1e-4)
    assert row.pixel_error == pytest.approx(relative_errors(z_full, z_copied).mean(), abs=1e-4)
    assert row.context_error == row.error - row.pixel_error  # type: ignore[operator]


def test_asked_for_a_few_it_measures_them_and_what_they_are_compared_with() -> None:
    table = bench_reducers(bench_model("frame"), CLIPS[:3], ["frames"], repeats=1)
    assert [row.reducer for row in table.rows] == ["none", "frames", "rlt"]


# ---------------------------------------------------------------------------- what cannot be said is not said


def test_random_weights_give_cost_only() -> None:
    model = VideoTextModel.create(small_config(), None, device="cpu", num_frames=6)
    assert is_random(model)
    table = bench_reducers(model, CLIPS, ["rlt"], repeats=1)
    assert table.notes == ("random weights: cost only",)
    assert {(row.error, row.overlap, row.text_to_video, row.pixel_error) for row in table.rows} == {
        (None,) * 4
    }
    text = table_text(table)
    assert "R@1" not in text
    assert "cosine" not in text
    assert "- random weights: cost only" in text


def test_few_clips_have_no_overlap_and_clips_without_captions_no_retrieval() -> None:
    table = bench_reducers(bench_model("joint"), clips_of([0.3, 0.5], captions=False), ["rlt"], repeats=1)
    assert all(row.cosine and row.overlap is None and row.text_to_video is None for row in table.rows)
    assert [note.partition(":")[0] for note in table.notes] == [
        "11 clips or fewer",
        "clips without a caption",
    ]
    one = bench_reducers(bench_model("joint"), CLIPS[:1], ["rlt"], repeats=1)
    assert one.notes == ("one clip: nothing to compare its embedding with, cost only",)
    same = bench_reducers(bench_model("joint"), [CLIPS[0]] * 3, ["rlt"], repeats=1)
    assert "give clips that differ: cost only" in same.notes[0]
    assert all(row.encoder_seconds and row.error is None for row in same.rows)


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="peak memory of a process is read on Linux only"
)
def test_peak_memory_is_about_what_was_held_at_once() -> None:
    def work() -> float:
        return float(
            sum(torch.full((8_000_000,), float(n)).sum() for n in range(3))
        )  # 32 MB, one after the other

    total, peak = peak_bytes(work, torch.device("cpu"))
    assert total == 3 * 8_000_000
    assert peak == pytest.approx(32_000_000, rel=0.5)


@pytest.mark.parametrize(
    ("origin", "name"),
    [
        ({"path": "/somewhere/runs/finetune/model"}, "finetune"),
        ({"path": "/somewhere/mine"}, "mine"),
        ({"pretrained": "openai"}, "openai"),
        ({"pretrained": "hf-hub:owner/name"}, "hf-hub:owner/name"),
        ({"pretrained": "/weights/b16.safetensors"}, "b16.safetensors"),
        ({"pretrained": None}, "random"),
        (None, "unknown"),
    ],
)
def test_weights_are_named_without_folders(origin: dict[str, str | None] | None, name: str) -> None:
    model = bench_model("frame")
    model.origin = origin
    assert describe_model(model)["weights"] == name


# --------------------------------------------------------------------------------------------- report


def test_the_table_as_text(table: ReducerTable) -> None:
    lines = table_text(table).splitlines()
    assert lines[0].startswith(f"## Layout {table.model['layout']}: custom")
    assert "13 clips of 6 frames, 32x32 pixels, on cpu; rlt: threshold 0.1, anchor" in lines[2]
    cells = {line.split("|")[1].strip(): line for line in lines if line.startswith("|")}
    assert set(REDUCERS) < set(cells)
    assert "R@1 %" in cells["reducer"]
    assert ("pixel error" in cells["reducer"]) == (table.model["layout"] == "frame")
    assert "keep_ratio 0." in cells["tome"]


def test_the_plot_is_a_picture_and_the_same_every_time(table: ReducerTable) -> None:
    png = plot([table])
    assert png.startswith(b"\x89PNG")
    assert plot([table]) == png
    assert plot([table, table]) != png

"""`rlt-retrieval bench reducers` and `rlt-retrieval models` as a user meets them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_runs import Ran, runner
from small_models import small_config

from rlt_retrieval.config import REDUCERS
from rlt_retrieval.model import VideoTextModel


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Ran]]:
    yield from runner(capfd)


@pytest.fixture
def bench(run: Callable[..., Ran], tmp_path: Path, tiny_video: Callable[..., Path]) -> Callable[..., Ran]:
    """`bench reducers` of two captioned videos, decoded in this process."""
    for n in range(2):
        tiny_video(tmp_path / "videos" / f"{n}.mp4", seed=n).with_suffix(".txt").write_text(f"caption {n}")
    options = ("--workers", "0", "--device", "cpu", "--repeats", "1")
    return lambda *more: run("bench", "reducers", tmp_path / "videos", *more, *options)


def test_a_trained_model_in_its_own_layout(
    bench: Callable[..., Ran], tiny_model_path: Path, tmp_path: Path
) -> None:
    ran = bench("--model", tiny_model_path, "--json", "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    (table,) = ran.json["tables"]
    assert [row["reducer"] for row in table["rows"]] == list(REDUCERS)
    assert (table["model"]["layout"], table["clips"]) == ("frame", {"number": 2, "captioned": 2})
    assert table["rows"][0]["text_to_video"] is not None
    assert {"date", "machine", "versions"} < ran.json.keys()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "bench.json",
        "bench.md",
        "bench.png",
    ]
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == ran.json
    page = (tmp_path / "out" / "bench.md").read_text()
    assert str(tmp_path) not in page + ran.out  # results are to be shown, not where they were made
    assert "Tokens and CLS in the MLP of each block, layout frame" in page
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_stock_weights_in_both_layouts_or_the_one_asked_for(
    bench: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    create = VideoTextModel.create
    monkeypatch.setattr(
        VideoTextModel,
        "create",
        lambda backbone, weights, **options: create(small_config(), weights, **options),
    )
    stock = ("--backbone", "ViT-B-32", "--pretrained", "none", "--set", "num_frames=2")
    ran = bench(*stock)
    assert ran.code == 0, ran.err
    assert [line for line in ran.out.splitlines() if line.startswith("## ")] == [
        "## Layout frame: custom, random",
        "## Layout joint: custom, random",
    ]
    assert ran.out.count("- random weights: cost only") == 2
    assert "| centerclip | –" in ran.out.partition("Layout joint")[2]
    assert "cosine" not in ran.out
    assert bench(*stock, "--set", "layout=joint").out.count("## Layout joint") == 1


def test_broken_files_are_named_and_make_exit_code_3(
    bench: Callable[..., Ran], tiny_model_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "videos" / "bad.mp4").write_text("no video")
    ran = bench("--model", tiny_model_path)
    assert ran.code == 3
    assert f"skipped {tmp_path}/videos/bad.mp4: not a readable video" in ran.err
    assert "2 clips of 4 frames" in ran.out


def test_mistakes_are_one_line(run: Callable[..., Ran], tmp_path: Path) -> None:
    for arguments, code, message in (
        ([], 2, "Missing argument"),
        (["v", "--model", "m", "--backbone", "b"], 2, "--model excludes --backbone"),
        (["v", "--backbone", "b"], 2, "--backbone b needs --pretrained"),
        (["v", "--set", "layout=both"], 1, "layout"),
        (["v", "--model", tmp_path], 1, "is not a saved model"),
    ):
        ran = run("bench", "reducers", *arguments)
        assert (ran.code, ran.out) == (code, "")
        assert message in ran.err.splitlines()[-1]


# --------------------------------------------------------------------------------------------- models


def test_models_lists_what_is_supported(run: Callable[..., Ran]) -> None:
    ran = run("models")
    assert ran.code == 0
    lines = {line.split()[0]: line for line in ran.out.splitlines()}
    assert "224x224" in lines["ViT-B-16"]
    assert "openai" in lines["ViT-B-16"]
    assert "35.1" in lines["ViT-B-16"]
    assert "RN50" not in lines


def test_names_and_all_bring_the_reasons(run: Callable[..., Ran]) -> None:
    ran = run("models", "rn50", "pe-core-b")
    lines = {line.split()[0]: line for line in ran.out.splitlines()}
    assert "convolutions" in lines["RN50"]
    assert "PE-Core-B-16" in lines
    assert "ViT-B-16" not in lines
    rows = run("models", "--all", "--json").json
    assert {bool(row["reason"]) for row in rows} == {True, False}
    none = run("models", "no-such-model")
    assert (none.code, none.out) == (1, "")
    assert "no model of open_clip has no-such-model in its name" in none.err

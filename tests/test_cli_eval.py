"""`rlt-retrieval eval` as a user meets it: protocols, reports, other people's embeddings, and wrong usage."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from cli_runs import Ran, runner
from ek100_files import write_ek100_csvs
from ek100_oracle import clip_classes, clip_ids, oracle_embeddings, sentence_set
from small_videos import tiny_mp4

from rlt_retrieval.annotations import Ek100Clip
from rlt_retrieval.data.shards import ShardSample, write_shards
from rlt_retrieval.eval.embedding_file import read_embeddings, write_embeddings

NUM_CLIPS = 10


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Ran]]:
    yield from runner(capfd, "eval")


def make_ek100_shards(folder: Path, num_official_clips: int = NUM_CLIPS) -> Path:
    """Ten clips of three videos and five sentences, as `shards make --format ek100` leaves them."""
    samples = [
        ShardSample(
            name, tiny_mp4(seed=n), (f"narration {n}",), name.rpartition("_")[0], n, n + 1, classes=classes
        )
        for n, (name, classes) in enumerate(zip(clip_ids(NUM_CLIPS), clip_classes(NUM_CLIPS), strict=True))
    ]
    write_shards(samples, folder, samples_per_shard=4)
    (folder / "dataset.json").write_text(json.dumps(sentence_set(num_official_clips).to_dict()))
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return make_ek100_shards(tmp_path / "shards")


@pytest.fixture
def with_model(run: Callable[..., Ran], tiny_model_path: Path) -> Callable[..., Ran]:
    return lambda *more: run(*more, "--model", tiny_model_path, "--device", "cpu", "--workers", "0")


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    ids, classes = clip_ids(NUM_CLIPS), clip_classes(NUM_CLIPS)
    clips = [
        Ek100Clip(name, name.rpartition("_")[0], n, n + 1, f"narration {n}", classes[n])
        for n, name in enumerate(ids)
    ]
    sentences = sentence_set(NUM_CLIPS).sentences
    named = [clip for clip in clips if clip.narration_id not in {s.narration_id for s in sentences}]
    extra = [Ek100Clip(s.narration_id, s.narration_id[:6], 0, 1, s.text, s.classes) for s in sentences]
    return write_ek100_csvs(tmp_path / "annotations", [*named, *extra], sentences)


def npz(path: Path, annotations: Path, noise: float = 0.0) -> Path:
    """A perfect model's embeddings of all clips of the CSV, worse by `noise`."""
    from rlt_retrieval.annotations import ek100_files, read_ek100_clips, read_ek100_sentences

    clips_csv, sentences_csv = ek100_files(annotations, "test")
    clips = read_ek100_clips(clips_csv)
    sentences = read_ek100_sentences(sentences_csv, clips)
    z = oracle_embeddings([row.classes for row in (*clips, *sentences)])
    z += noise * np.random.default_rng(0).standard_normal(z.shape)
    write_embeddings(
        path,
        [clip.narration_id for clip in clips],
        z[: len(clips)],
        [sentence.narration_id for sentence in sentences],
        z[len(clips) :],
    )
    return path


# ---- shards and a model ----


def test_shards_of_ek100_are_scored_by_its_protocol_unasked(
    shards: Path, with_model: Callable[..., Ran]
) -> None:
    ran = with_model(shards, "--json")
    assert ran.code == 0, ran.err
    assert (ran.json["protocol"], ran.json["num_videos"], ran.json["num_texts"]) == ("ek100", 10, 5)
    assert (ran.json["partial"], ran.json["note"]) == (False, None)
    assert set(ran.json["mean"]) == {"mAP", "nDCG"}
    assert list(ran.json["extra_rows"]) == ["dual softmax (uses all test queries)"]
    captions = with_model(shards, "--protocol", "captions", "--json")
    assert (captions.json["protocol"], captions.json["num_texts"]) == ("captions", 10)


def test_a_partial_set_is_a_note_and_exit_code_3(tmp_path: Path, with_model: Callable[..., Ran]) -> None:
    ran = with_model(make_ek100_shards(tmp_path / "some", num_official_clips=9668))
    assert ran.code == 3
    assert "partial, 10 of 9,668, not comparable" in ran.out


def test_a_report_of_shards_has_thumbnails_and_its_embeddings_score_the_same(
    tmp_path: Path, shards: Path, with_model: Callable[..., Ran]
) -> None:
    ran = with_model(shards, "--report", tmp_path / "deep" / "report", "--json")
    assert ran.code == 0, ran.err
    report = tmp_path / "deep" / "report"
    result = json.loads((report / "result.json").read_text())
    assert result.items() >= ran.json.items()
    assert "43.4" in (report / "result.md").read_text()
    assert (report / "report.html").read_text().count('alt="P0') >= 20  # hits of five sentences
    assert (report / "tokens_kept.png").is_file()
    file = read_embeddings(report / "embeddings.npz")
    assert (file.video_ids, len(file.text_ids)) == (clip_ids(NUM_CLIPS), 5)


def test_a_query_bank_gives_a_row_of_its_own(
    tmp_path: Path, shards: Path, with_model: Callable[..., Ran]
) -> None:
    (tmp_path / "bank.txt").write_text("open fridge\nwash plate\n")
    values = json.loads((shards / "dataset.json").read_text()) | {"split": "train"}
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "dataset.json").write_text(json.dumps(values))
    for bank in (tmp_path / "bank.txt", tmp_path / "train"):
        rows = with_model(shards, "--query-bank", bank, "--json").json["extra_rows"]
        assert set(rows["QB-norm (uses a query bank; text to video only)"]) == {"text_to_video"}
    leak = with_model(shards, "--query-bank", shards)
    assert (leak.code, "test" in leak.last_error) == (1, True)


def test_msrvtt_says_when_it_is_not_the_test_set(
    tmp_path: Path, with_model: Callable[..., Ran], tiny_shards: Callable[..., list[Path]]
) -> None:
    tiny_shards(tmp_path / "shards", ["one", "two", "one"])
    ran = with_model(tmp_path / "shards", "--protocol", "msrvtt", "--report", tmp_path / "report")
    assert ran.code == 0
    assert "3 videos and 3 texts, not the 1,000 of each" in ran.out
    assert "CLIP4Clip" in (tmp_path / "report" / "result.md").read_text()


def test_ek100_needs_sentences_and_classes(
    tmp_path: Path, shards: Path, with_model: Callable[..., Ran], tiny_shards: Callable[..., list[Path]]
) -> None:
    tiny_shards(tmp_path / "plain", ["one", "two"])
    plain = with_model(tmp_path / "plain", "--protocol", "ek100")
    assert (plain.code, "no sentences beside these shards (dataset.json)" in plain.last_error) == (1, True)
    os.link(shards / "dataset.json", tmp_path / "plain" / "dataset.json")
    without = with_model(tmp_path / "plain")
    assert (
        without.code,
        "clip-00 in" in without.last_error,
        "no verb and noun classes" in without.last_error,
    ) == (
        1,
        True,
        True,
    )


# ---- embeddings of any model ----


def test_embeddings_are_scored_and_compared(
    tmp_path: Path, annotations: Path, run: Callable[..., Ran]
) -> None:
    good, bad = npz(tmp_path / "good.npz", annotations), npz(tmp_path / "bad.npz", annotations, noise=0.5)
    arguments = ("--embeddings", good, "--annotations", annotations, "--compare", bad)
    ran = run(*arguments, "--json")
    assert ran.code == 3, ran.err  # a few of 9,668
    assert ran.json["mean"]["mAP"] == pytest.approx(1, abs=1e-6)
    comparison = ran.json["comparison"]
    assert comparison["with"] == str(bad)
    row = comparison["difference"]["mAP"]["mean"]
    assert row["difference"] == pytest.approx(1 - comparison["values"]["mean"]["mAP"], abs=1e-6)
    assert row["interval"][0] <= row["difference"] <= row["interval"][1]
    text = run(*arguments, "--report", tmp_path / "report").out
    assert f"{good} minus {bad}, with 95 % intervals over videos:" in text
    assert (
        f"  mAP mean: {row['difference']:+.4f}  {row['interval'][0]:+.4f} to {row['interval'][1]:+.4f}"
        in text
    )
    assert "## Minus" in (tmp_path / "report" / "result.md").read_text()
    assert "<img" in (tmp_path / "report" / "report.html").read_text()


def test_a_comparison_of_other_clips_is_one_line(
    tmp_path: Path, annotations: Path, run: Callable[..., Ran]
) -> None:
    whole = npz(tmp_path / "whole.npz", annotations)
    file = read_embeddings(whole)
    write_embeddings(
        tmp_path / "part.npz", file.video_ids[2:], file.z_video_ND[2:], file.text_ids, file.z_text_ND
    )
    ran = run("--embeddings", whole, "--annotations", annotations, "--compare", tmp_path / "part.npz")
    assert (ran.code, "a paired difference needs the same clips" in ran.last_error) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give SHARDS and --model, or --embeddings and --annotations"),
        (["shards"], "give SHARDS and --model, or --embeddings and --annotations"),
        (["--model", "m"], "give SHARDS and --model, or --embeddings and --annotations"),
        (["--embeddings", "a.npz"], "--embeddings needs --annotations"),
        (["shards", "--embeddings", "a.npz", "--model", "m"], "--embeddings excludes SHARDS, --model"),
        (["--embeddings", "a.npz", "--query-bank", "b.txt"], "--embeddings excludes --query-bank"),
        (["--embeddings", "a.npz", "--protocol", "ek100"], "--embeddings excludes --protocol"),
        (["shards", "--model", "m", "--annotations", "d"], "SHARDS excludes --annotations"),
        (["shards", "--model", "m", "--compare", "b.npz", "--split", "train"], "SHARDS excludes --split, --compare"),
    ],
)  # fmt: skip
def test_mixtures_are_wrong_usage(run: Callable[..., Ran], arguments: list[str], message: str) -> None:
    ran = run(*arguments)
    assert ran.code == 2
    assert message in ran.last_error


def test_a_missing_file_is_one_line(tmp_path: Path, run: Callable[..., Ran], annotations: Path) -> None:
    ran = run("--embeddings", tmp_path / "none.npz", "--annotations", annotations)
    assert (ran.code, "none.npz: cannot be read" in ran.last_error) == (1, True)
    elsewhere = run("--embeddings", npz(tmp_path / "a.npz", annotations), "--annotations", tmp_path)
    assert (elsewhere.code, "no EPIC_100_retrieval_test.csv" in elsewhere.last_error) == (1, True)

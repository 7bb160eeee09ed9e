"""EPIC-KITCHENS-100: where videos are found, what is written of the official CSVs, and the shortest of clips."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from made_videos import SMALL, grey_frames, mux, numbers

from rlt_retrieval.annotations import Classes, read_dataset, read_ek100_clips
from rlt_retrieval.cli import main
from rlt_retrieval.data.making import make_shards
from rlt_retrieval.data.shards import ShardSample, read_shard
from rlt_retrieval.data.sources import SourceClip
from rlt_retrieval.data.sources.ek100 import Ek100Source, read_ek100
from rlt_retrieval.data.video import cut_span, decode_clip, encode_mp4
from rlt_retrieval.errors import AnnotationError, SourceError, VideoDecodeError

HEADER = "narration_id,video_id,start_timestamp,stop_timestamp,narration,verb_class,all_noun_classes"
FPS = 10


def annotations_at(folder: Path, *clips: tuple[str, str, str]) -> Path:
    """Official-form files of (narration_id, start, stop) seconds; every clip has a sentence of its own."""
    folder.mkdir(exist_ok=True)
    rows = [
        f'{name},{name.rpartition("_")[0]},00:00:{start},00:00:{stop},do {name},{i},"[{i}, 7]"'
        for i, (name, start, stop) in enumerate(clips)
    ]
    sentences = [f"{name},do {name}" for name, _, _ in clips]
    (folder / "EPIC_100_retrieval_test.csv").write_text("\n".join([HEADER, *rows]))
    (folder / "EPIC_100_retrieval_test_sentence.csv").write_text(
        "\n".join(["narration_id,narration", *sentences])
    )
    return folder


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def write_video(path: Path, num_frames: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_mp4(grey_frames(num_frames), fps=FPS))
    return path


def make(source: Ek100Source, out_dir: Path) -> list[ShardSample]:
    settings = {"samples_per_shard": 4, "short_side": 16, "num_workers": 0, "timeout_seconds": 60.0}
    report = make_shards(source.clips, out_dir, absent=source.absent, dataset=source.describe(), **settings)
    return [s for path in report.shards for s in read_shard(path) if isinstance(s, ShardSample)]


# ------------------------------------------------------------------------------------------------ what is found


def test_videos_are_found_by_participant_in_its_folder_videos_and_flat(tmp_path: Path) -> None:
    names = ("P01_11_0", "P01_101_3", "P02_7_1", "P03_2_0", "P04_1_0")
    folder = annotations_at(tmp_path / "a", *((name, "01.00", "02.50") for name in names))
    layouts = ("P01/P01_11.MP4", "P01/videos/P01_101.mp4", "P02_7.Mp4", "P03/rgb_frames/P03_2.mp4")
    source = read_ek100(folder, touch(tmp_path / "v", *layouts, "P04/P04_1.MP4.part"), "test")
    first = SourceClip(
        tmp_path / "v" / layouts[0],
        ("do P01_11_0",),
        "P01_11_0",
        *(1.0, 2.5),
        video_id="P01_11",
        classes=Classes(0, (0, 7)),
    )
    assert source.clips[0] == first
    assert [clip.video for clip in source.clips] == [tmp_path / "v" / layout for layout in layouts[:3]]
    assert source.missing == {"P03_2": 1, "P04_1": 1}
    assert source.absent[0].video == tmp_path / "v" / "P03" / "P03_2.MP4"
    assert (source.dataset.split, source.dataset.num_official_clips) == ("test", 9668)
    assert [sentence.text for sentence in source.dataset.sentences] == [f"do {name}" for name in names]


def test_a_video_in_two_places_is_taken_from_its_participants_folder(tmp_path: Path) -> None:
    folder = annotations_at(tmp_path / "a", ("P01_1_0", "00.00", "01.00"))
    places = ("P01/P01_1.MP4", "P01/videos/P01_1.MP4", "P01_1.MP4")
    for first in range(3):
        root = touch(tmp_path / str(first), *places[first:])
        assert read_ek100(folder, root, "test").clips[0].video == root / places[first]


def test_what_cannot_be_a_source_is_said_in_one_line(tmp_path: Path) -> None:
    folder = annotations_at(tmp_path / "a", ("P01_1_0", "00.00", "01.00"), ("P02_1_0", "00.00", "01.00"))
    with pytest.raises(
        SourceError, match=r"v/P01/P01_1\.MP4: no such video, nor any other of the 2 .*; give"
    ):
        read_ek100(folder, touch(tmp_path / "v", "P05/P05_1.MP4"), "test")
    with pytest.raises(SourceError, match="none: no such folder; give the folder that holds the EPIC"):
        read_ek100(folder, tmp_path / "none", "test")
    with pytest.raises(SourceError, match="not a folder"):
        read_ek100(folder, tmp_path / "v" / "P05" / "P05_1.MP4", "test")
    with pytest.raises(AnnotationError, match=r"no EPIC_100_retrieval_train\.csv"):
        read_ek100(folder, tmp_path / "v", "train")


# ----------------------------------------------------------------------------------------------- what is written


def test_every_clip_is_its_own_span_under_its_narration_id(tmp_path: Path) -> None:
    spans = {f"P01_1_{i}": (i * 0.3, i * 0.3 + 0.5) for i in range(6)}
    rows = [(name, f"{start:05.2f}", f"{stop:05.2f}") for name, (start, stop) in spans.items()]
    folder = annotations_at(
        tmp_path / "a", *rows, ("P09_1_0", "00.00", "01.00"), ("P09_1_1", "00.00", "01.00")
    )
    write_video(tmp_path / "v" / "P01" / "P01_1.MP4", 25)
    source = read_ek100(folder, tmp_path / "v", "test")
    samples = make(source, tmp_path / "out")
    assert [sample.key for sample in samples] == list(spans)
    for i, sample in enumerate(samples):
        start, stop = spans[sample.key]
        assert (sample.video_id, sample.captions, sample.classes) == (
            "P01_1",
            (f"do {sample.key}",),
            Classes.of(i, (i, 7)),
        )
        assert (sample.start_seconds, sample.end_seconds) == (pytest.approx(start), pytest.approx(stop))
        assert numbers(decode_clip(sample.media, num_frames=5, transform=SMALL)) == [
            3 * i + n for n in range(5)
        ]
    assert read_dataset([tmp_path / "out" / "clips-000000.tar"]) == source.dataset
    written = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert (written["num_clips"], written["num_missing_clips"], written["missing_videos"]) == (
        6,
        2,
        {"P09_1": 2},
    )
    listed = map(json.loads, (tmp_path / "out" / "failures.jsonl").read_text().splitlines())
    assert [(line["key"], line["shard"]) for line in listed] == [
        (key, str(tmp_path / "v" / "P09" / "P09_1.MP4")) for key in ("P09_1_0", "P09_1_1")
    ]


STAND_INS = {"P03_26": 4, "P26_30": 3, "P28_23": 6, "P04_26": 3}  # the shortest test videos: clips of each


def test_the_official_test_split_over_a_few_stand_ins(
    shared_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    annotations = shared_data / "ek100_mir"
    rows = read_ek100_clips(annotations / "EPIC_100_retrieval_test.csv")
    for video_id in STAND_INS:  # 25 s at one frame a second hold all clips of these
        path = tmp_path / "v" / video_id.split("_")[0] / f"{video_id}.MP4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_mp4(grey_frames(25), fps=1))
    command = [
        "shards",
        "make",
        str(annotations),
        str(tmp_path / "out"),
        *["--format", "ek100", "--split", "test"],
    ]
    options = ["--videos", str(tmp_path / "v"), "--short-side", "32", "--workers", "0", "--json"]
    with pytest.raises(SystemExit) as stop:
        main([*command, *options, "--dry-run"])
    planned = json.loads(capfd.readouterr().out)
    assert stop.value.code == 0
    assert (planned["clips"], planned["missing_clips"], planned["missing_videos"]) == (16, 9652, 134)
    assert planned["missing_hours"] > 1
    assert planned["hours"] == pytest.approx(0.01, abs=0.005)
    assert not (tmp_path / "out").exists()

    with pytest.raises(SystemExit) as stop:
        main([*command, *options])
    printed = capfd.readouterr()
    assert stop.value.code == 3
    assert json.loads(printed.out) == {
        "clips": 16,
        "captioned": 16,
        "missing_videos": 134,
        "missing_clips": 9652,
        "shards": 1,
        "skipped": 0,
    }
    *missing, where = printed.err.splitlines()
    assert len(missing) == 134
    assert where == f"what was left out is listed in {tmp_path / 'out' / 'failures.jsonl'}"
    assert printed.err.startswith("missing P01_11: 148 clips\n")
    expected = [row.narration_id for row in rows if row.video_id in STAND_INS]
    shard = tmp_path / "out" / "clips-000000.tar"
    assert [sample.key for sample in read_shard(shard)] == expected
    listed = [
        json.loads(line)["key"] for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()
    ]
    assert listed == [row.narration_id for row in rows if row.video_id not in STAND_INS]
    dataset = read_dataset([shard])
    assert dataset is not None
    assert (dataset.num_official_clips, len(dataset.sentences)) == (9668, 3842)


@pytest.mark.acceptance
def test_a_killed_make_goes_on_and_ends_with_the_same_files(tmp_path: Path) -> None:
    rows = [(f"P01_1_{i}", f"{i * 0.1:05.2f}", f"{i * 0.1 + 1:05.2f}") for i in range(40)]
    folder = annotations_at(tmp_path / "a", *rows, ("P09_1_0", "00.00", "01.00"))
    write_video(tmp_path / "v" / "P01_1.MP4", 60)

    def command(out: str) -> list[str]:
        options = [
            "--videos",
            str(tmp_path / "v"),
            "--clips-per-shard",
            "4",
            "--workers",
            "1",
            "--split",
            "test",
        ]
        start = [sys.executable, "-m", "rlt_retrieval", "shards", "make", str(folder), str(tmp_path / out)]
        return [*start, "--format", "ek100", *options]

    killed = subprocess.Popen(command("out"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "out").glob("clips-*.tar")) and killed.poll() is None:
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    for out in ("out", "whole"):
        done = subprocess.run(command(out), capture_output=True, text=True)
        assert (done.returncode, done.stderr.splitlines()[0]) == (3, "missing P09_1: 1 clip")
        assert done.stderr.endswith(f"listed in {tmp_path / out / 'failures.jsonl'}\n")
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files


# ------------------------------------------------------------------------------------------------ short clips


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [
        (0.30, 0.50, {3, 4}),  # 0.2 s: two frames for sixteen
        (0.31, 0.39, {3}),  # between two frames: the one on screen
        (0.00, 0.01, {0}),
        (0.35, 0.45, {3, 4}),
        (1.95, 1.96, {19}),  # within the last frame
        (1.50, 60.0, set(range(15, 20))),  # past the end: what is there
        (1.99, 60.0, {19}),
    ],
)
@pytest.mark.parametrize("is_training", [False, True])
def test_a_clip_shorter_than_its_frames_repeats_what_is_on_screen(
    start: float, stop: float, expected: set[int], is_training: bool
) -> None:
    video = encode_mp4(grey_frames(20), fps=FPS)
    media = cut_span(video, start_seconds=start, end_seconds=stop, short_side=16)
    rng = np.random.default_rng(0) if is_training else None
    clip = decode_clip(media, num_frames=16, transform=SMALL, rng=rng)
    assert clip.frames_TCHW.shape[0] == 16
    assert set(numbers(clip)) == expected
    assert numbers(clip) == sorted(numbers(clip))
    assert clip.end_seconds == pytest.approx(min(stop, 2.0) - start, abs=1e-4)


def test_a_clip_in_a_long_gap_between_frames_shows_the_frame_before() -> None:
    media = cut_span(mux([0, 1000, 5000]), start_seconds=2.0, end_seconds=2.2)
    assert numbers(decode_clip(media, num_frames=4, transform=SMALL)) == [1] * 4


@pytest.mark.parametrize("frames_per_second", [50, 60])
def test_a_short_clip_at_the_rates_of_the_data_set(frames_per_second: int) -> None:
    video = encode_mp4(grey_frames(60), fps=frames_per_second)
    media = cut_span(video, start_seconds=0.2, end_seconds=0.4)
    first, last = round(0.2 * frames_per_second), round(0.4 * frames_per_second) - 1
    shown = numbers(decode_clip(media, num_frames=16, transform=SMALL))
    assert (shown[0], shown[-1]) == (first, last)
    assert np.diff(shown).max() <= 1


def test_a_span_wholly_past_the_end_is_an_unreadable_clip_and_listed(tmp_path: Path) -> None:
    folder = annotations_at(tmp_path / "a", ("P01_1_0", "00.50", "01.00"), ("P01_1_1", "07.00", "08.00"))
    video = write_video(tmp_path / "v" / "P01_1.MP4", 20)
    with pytest.raises(VideoDecodeError, match=r"the span starts at 7 s but the video ends at 2\.00 s"):
        cut_span(video, start_seconds=7.0, end_seconds=8.0)
    samples = make(read_ek100(folder, tmp_path / "v", "test"), tmp_path / "out")
    assert [sample.key for sample in samples] == ["P01_1_0"]
    (line,) = map(json.loads, (tmp_path / "out" / "failures.jsonl").read_text().splitlines())
    assert line["key"] == "P01_1_1"
    assert line["reason"].startswith("the span starts at 7 s")


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def usage(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """What `shards make` says to wrong options."""

    def run(*options: str) -> str:
        touch(tmp_path, "videos/a.mp4")
        with pytest.raises(SystemExit) as stop:
            main(["shards", "make", str(tmp_path / "videos"), str(tmp_path / "out"), *options])
        assert stop.value.code == 2
        return capfd.readouterr().err

    return run


def test_options_of_other_formats_are_wrong_usage(usage: Callable[..., str]) -> None:
    for format_ in ("ek100", "msrvtt"):
        for options in ([], ["--videos", "."], ["--split", "test"]):
            assert f"--format {format_} needs --videos DIR and --split" in usage(
                "--format", format_, *options
            )
    assert "--split goes with --format ek100 or msrvtt" in usage("--split", "test")
    assert "--split goes with --format ek100 or msrvtt" in usage("--format", "jsonl", "--split", "test")
    assert "--videos does not go with a folder of videos" in usage("--videos", ".")
    assert "--videos does not go with a folder of videos" in usage("--videos", ".", "--format", "folder")

"""Folder and CSV sources: what is found, how captions merge, and that every mistake names its place."""

from pathlib import Path

import pytest

from rlt_retrieval.data.sources import SourceClip, read_source
from rlt_retrieval.data.sources.csv_file import read_csv
from rlt_retrieval.data.sources.folder import VIDEO_EXTENSIONS, list_videos, read_folder
from rlt_retrieval.errors import SourceError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def csv_at(root: Path, text: str | bytes) -> Path:
    touch(root, "a.mp4", "b.mp4", "sub/c.webm")
    path = root / "clips.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_folder_lists_videos_of_any_case_sorted_and_no_hidden_ones(tmp_path):
    touch(tmp_path, "b.MP4", "sub/a.mkv", "notes.txt", ".hidden.mp4", ".cache/x.mp4", "c.mp4.part", "z.m2ts")
    (tmp_path / "folder.mp4").mkdir()
    assert [p.relative_to(tmp_path).as_posix() for p in list_videos(tmp_path)] == [
        "b.MP4",
        "sub/a.mkv",
        "z.m2ts",
    ]


def test_a_folder_below_a_hidden_one_can_be_the_source(tmp_path):
    touch(tmp_path, ".data/videos/a.mp4")
    assert len(list_videos(tmp_path / ".data" / "videos")) == 1


@pytest.mark.parametrize("extension", VIDEO_EXTENSIONS)
def test_every_extension_counts(tmp_path, extension):
    touch(tmp_path, f"a.{extension}")
    assert len(list_videos(tmp_path)) == 1


def test_folder_captions_are_the_lines_of_the_side_file(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4", "b.avi", "d.x.mp4")
    (tmp_path / "a.txt").write_text("\ufeffa dog runs\n\n  it jumps  \na dog runs\n", encoding="utf-8")
    (tmp_path / "d.x.txt").write_text("dotted")
    clips = {clip.name: clip for clip in read_folder(tmp_path)}
    assert clips["a.mp4"] == SourceClip(tmp_path / "a.mp4", ("a dog runs", "it jumps"), "a.mp4")
    assert clips["b.mp4"].captions == ()
    assert clips["d.x.mp4"].captions == ("dotted",)
    assert len(clips) == 4  # names stay different for files that differ in extension only


def test_folder_errors(tmp_path):
    with pytest.raises(SourceError, match="no such folder"):
        list_videos(tmp_path / "none")
    with pytest.raises(SourceError, match=r"no video in this folder; looked for \.mp4, \.mov"):
        list_videos(tmp_path)
    touch(tmp_path, "a.mp4")
    with pytest.raises(SourceError, match="not a folder"):
        list_videos(tmp_path / "a.mp4")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SourceError, match=r"a\.txt: not readable as UTF-8"):
        read_folder(tmp_path)


def test_csv_merges_captions_of_one_span_and_keeps_spans_apart(tmp_path):
    path = csv_at(
        tmp_path,
        "\ufeffvideo,caption,start_seconds,end_seconds,caption_10,licence,caption_2\n"
        'a.mp4,"a dog, running",,,ten,MIT,two\n'
        "./a.mp4,it runs,0,,,MIT,two\n"
        "\n"
        "a.mp4,the end,1.5,3,,MIT,\n"
        "sub/c.webm,from two,2,,,MIT,\n",
    )
    whole, span, tail = read_csv(path)
    assert whole == SourceClip(tmp_path / "a.mp4", ("a dog, running", "two", "ten", "it runs"), "a.mp4")
    assert span == SourceClip(tmp_path / "a.mp4", ("the end",), "a.mp4@1.5-3.0", 1.5, 3.0)
    assert (tail.name, tail.start_seconds, tail.end_seconds) == ("sub/c.webm@2.0-end", 2.0, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("video,text\na.mp4,x\n", r"clips\.csv, line 1: no column 'caption', found: video, text"),
        ("", "line 1: no column 'video', found: nothing"),
        ("video,caption\n", "no rows"),
        ("video,caption\na.mp4,x\nb.mp4, \n", "line 3: empty caption"),
        ("video,caption\na.mp4,a dog, running\n", "line 2: 3 cells, the header has 2; quote captions"),
        ("video,caption\n,x\n", "line 2: no video"),
        ("video,caption\nz.mp4,x\n", r"line 2: no such video .*z\.mp4"),
        ("video,caption,start_seconds\na.mp4,x,soon\n", "line 2: start_seconds is 'soon'"),
        ("video,caption,start_seconds\na.mp4,x,-1\n", "line 2: start_seconds is '-1'"),
        ("video,caption,end_seconds\na.mp4,x,nan\n", "line 2: end_seconds is 'nan'"),
        (
            "video,caption,start_seconds,end_seconds\na.mp4,x,3,3\n",
            "line 2: end_seconds 3 is not after start_seconds 3",
        ),
        ('video,caption\na.mp4,"open\n', "line 2: not valid CSV"),
        (b"video,caption\na.mp4,caf\xe9\n", "not UTF-8"),
    ],
)
def test_csv_errors_name_the_line(tmp_path, text, message):
    with pytest.raises(SourceError, match=message) as caught:
        read_csv(csv_at(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_read_source_takes_folders_and_csv_for_what_they_are(tmp_path):
    path = csv_at(tmp_path, "video,caption\na.mp4,x\n")
    assert [clip.captions for clip in read_source(path)] == [("x",)]
    assert len(read_source(tmp_path)) == 3
    renamed = path.rename(tmp_path / "clips.tsv")
    assert len(read_source(renamed, format="csv")) == 1
    with pytest.raises(SourceError, match=r"neither a folder nor a \.csv"):
        read_source(renamed)
    with pytest.raises(SourceError, match="no such folder or file"):
        read_source(tmp_path / "gone")
    with pytest.raises(SourceError, match="cannot be read"):
        read_source(tmp_path / "gone.csv")
    with pytest.raises(SourceError, match="not a folder"):
        read_source(renamed, format="folder")


def test_the_manifest_of_the_real_clips_reads(shared_data):
    clips = read_source(shared_data / "videos" / "manifest.csv")
    assert len(clips) == 56
    assert all(len(clip.captions) == 2 and clip.video.is_file() for clip in clips)
    assert {clip.name for clip in clips} == {path.name for path in list_videos(shared_data / "videos")}

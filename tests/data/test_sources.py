"""Folder, CSV, JSONL and MSR-VTT sources: what is found, how captions merge, and that every mistake names its place."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlt_retrieval.data.sources import Source, SourceClip, read_source
from rlt_retrieval.data.sources.csv_file import read_csv
from rlt_retrieval.data.sources.folder import VIDEO_EXTENSIONS, list_videos, read_folder
from rlt_retrieval.data.sources.jsonl_file import read_jsonl
from rlt_retrieval.data.sources.msrvtt import read_msrvtt
from rlt_retrieval.errors import SourceError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def jsonl_at(root: Path, *lines: Any) -> Path:
    """Objects as JSON, text as it is."""
    touch(root, "a.mp4", "b.mp4", "sub/c.webm")
    path = root / "clips.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


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
    whole, span, tail = read_csv(path).clips
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
    assert [clip.captions for clip in read_source(path).clips] == [("x",)]
    assert len(read_source(tmp_path).clips) == 3
    lines = jsonl_at(tmp_path, {"video": "a.mp4", "caption": "y"})
    assert [clip.captions for clip in read_source(lines).clips] == [("y",)]
    renamed = path.rename(tmp_path / "clips.tsv")
    assert len(read_source(renamed, format="csv").clips) == 1
    with pytest.raises(SourceError, match=r"neither a folder nor a \.csv or \.jsonl"):
        read_source(renamed)
    with pytest.raises(SourceError, match="no such folder or file"):
        read_source(tmp_path / "gone")
    with pytest.raises(SourceError, match="cannot be read"):
        read_source(tmp_path / "gone.csv")
    with pytest.raises(SourceError, match="not a folder"):
        read_source(renamed, format="folder")
    with pytest.raises(ValueError, match="format 'msrvtt' needs videos_dir and split"):
        read_source(tmp_path, format="msrvtt")


def test_the_manifest_of_the_real_clips_reads(shared_data):
    clips = read_source(shared_data / "videos" / "manifest.csv").clips
    assert len(clips) == 56
    assert all(len(clip.captions) == 2 and clip.video.is_file() for clip in clips)
    assert {clip.name for clip in clips} == {path.name for path in list_videos(shared_data / "videos")}


# --------------------------------------------------------------------------------------------------- JSON lines


def test_jsonl_lines_of_one_clip_add_up_and_names_and_spans_keep_clips_apart(tmp_path):
    path = jsonl_at(
        tmp_path,
        '\ufeff{"video": "a.mp4", "captions": ["a dog\\u2028runs", " it jumps ", ""], "licence": "MIT"}',
        "",
        {"video": "./a.mp4", "caption": "it jumps", "captions": ["a cat"], "start_seconds": 0},
        {"video": "a.mp4", "caption": "the end", "start_seconds": 1.5, "end_seconds": 3},
        {"video": "sub/c.webm", "caption": "c", "name": "v_c", "end_seconds": None},
    )
    assert read_jsonl(path) == Source(
        clips=[
            SourceClip(tmp_path / "a.mp4", ("a dog\u2028runs", "it jumps", "a cat"), "a.mp4"),
            SourceClip(tmp_path / "a.mp4", ("the end",), "a.mp4@1.5-3.0", 1.5, 3.0),
            SourceClip(tmp_path / "sub/c.webm", ("c",), "v_c"),
        ]
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ("[" * 100_000, "line 2: not valid JSON"),
        ("[1]", "line 2: expected an object, found list"),
        ({"caption": "x"}, "line 2: no video; write its path"),
        ({"video": 3, "caption": "x"}, "line 2: video is 3; write it as text"),
        ({"video": "z.mp4", "caption": "x"}, r"line 2: no such video .*z\.mp4; paths are relative"),
        ({"video": "a.mp4"}, "line 2: no caption"),
        ({"video": "a.mp4", "captions": [" "]}, "line 2: no caption"),
        ({"video": "a.mp4", "captions": "x"}, "line 2: captions is 'x'; write a list"),
        ({"video": "a.mp4", "captions": [1]}, r"line 2: captions is \[1\]; write a list"),
        ({"video": "a.mp4", "caption": 1}, "line 2: caption is 1; write it as text"),
        ({"video": "a.mp4", "caption": "x", "start_seconds": "soon"}, "line 2: start_seconds is 'soon'"),
        ({"video": "a.mp4", "caption": "x", "start_seconds": True}, "line 2: start_seconds is 'True'"),
        ({"video": "a.mp4", "caption": "x", "start_seconds": [1]}, r"line 2: start_seconds is '\[1\]'"),
        ('{"video": "a.mp4", "caption": "x", "end_seconds": NaN}', "line 2: end_seconds is 'nan'"),
        ({"video": "a.mp4", "caption": "x", "end_seconds": 0}, "line 2: end_seconds 0 is not after"),
        ({"video": "a.mp4", "caption": "x", "name": "b.mp4"}, "line 2: the name 'b.mp4' is that of another"),
    ],
)
def test_jsonl_errors_name_the_line(tmp_path, line, message):
    with pytest.raises(SourceError, match=message) as caught:
        read_jsonl(jsonl_at(tmp_path, {"video": "b.mp4", "caption": "b"}, line))
    assert "\n" not in str(caught.value)


def test_jsonl_files_that_are_none(tmp_path):
    with pytest.raises(SourceError, match=r"clips\.jsonl: no rows"):
        read_jsonl(jsonl_at(tmp_path, ""))
    with pytest.raises(SourceError, match="cannot be read"):
        read_jsonl(tmp_path / "gone.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"video": "caf\xe9"}')
    with pytest.raises(SourceError, match="not UTF-8"):
        read_jsonl(tmp_path / "latin.jsonl")


def test_with_a_folder_of_videos_some_may_be_absent_but_not_all(tmp_path):
    touch(tmp_path, "videos/a.mp4")
    (tmp_path / "clips.csv").write_text("video,caption,end_seconds\nz.mp4,x,1\nz.mp4,x,2\na.mp4,y,\n")
    lines = [{"video": "z.mp4", "caption": "x", "end_seconds": n} for n in (1, 2)]
    jsonl_at(tmp_path, *lines, {"video": "a.mp4", "caption": "y"})
    for name in ("clips.csv", "clips.jsonl"):
        source = read_source(tmp_path / name, videos_dir=tmp_path / "videos")
        assert source.clips == [SourceClip(tmp_path / "videos" / "a.mp4", ("y",), "a.mp4")]
        assert [clip.name for clip in source.absent] == ["z.mp4@0.0-1.0", "z.mp4@0.0-2.0"]
        missing = {str(tmp_path / "videos" / "z.mp4"): 2}
        assert source.missing == missing
        assert source.describe() == {"missing_videos": missing}
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(SourceError, match=r"empty/z\.mp4: no such video, nor any other of the 2 of this"):
            read_source(tmp_path / name, videos_dir=tmp_path / "empty")
        with pytest.raises(SourceError, match="none: no such folder"):
            read_source(tmp_path / name, videos_dir=tmp_path / "none")


# ------------------------------------------------------------------------------------------------------- MSR-VTT


def msrvtt_at(
    root: Path, test_ids: tuple[str, ...] = ("video7", "video9"), name: str = "MSRVTT_data.json"
) -> Path:
    """Videos 6 to 9 with two sentences each, in the forms that the data set is passed around in."""
    ids = [f"video{i}" for i in (6, 7, 8, 9)]
    sentences = [{"video_id": v, "caption": f"{v} {n}", "sen_id": n} for n in (0, 1) for v in ids]
    root.mkdir(exist_ok=True)
    (root / name).write_text(json.dumps({"videos": [{"video_id": v} for v in ids], "sentences": sentences}))
    rows = [f"ret{i},msr{v[5:]},{v},a test sentence of {v}" for i, v in enumerate(test_ids)]
    (root / "MSRVTT_JSFUSION_test.csv").write_text("\n".join(["key,vid_key,video_id,sentence", *rows]) + "\n")
    return root


def test_msrvtt_test_has_the_one_sentence_of_the_csv_and_training_all_of_the_others(tmp_path, caplog):
    folder = msrvtt_at(tmp_path / "annotations")
    touch(tmp_path, "v/TestVideo/video7.mp4", "v/video9.webm", "v/video6.mp4", "v/video8.mp4")
    test = read_msrvtt(folder, tmp_path / "v", "test")
    assert test.clips == [
        SourceClip(tmp_path / "v" / file, (f"a test sentence of {name}",), name, video_id=name)
        for name, file in (("video7", "TestVideo/video7.mp4"), ("video9", "video9.webm"))
    ]
    assert "2 videos in the test split, the official one has 1000" in caplog.text
    train = read_source(folder, "msrvtt", videos_dir=tmp_path / "v", split="train")
    assert {clip.name: clip.captions for clip in train.clips} == {
        "video6": ("video6 0", "video6 1"),
        "video8": ("video8 0", "video8 1"),
    }
    assert not test.absent
    assert not train.absent


def test_msrvtt_takes_the_two_files_of_the_first_publication(tmp_path):
    touch(tmp_path, "v/video6.mp4", "v/video8.mp4")
    folder = msrvtt_at(tmp_path / "a", name="whole.json")
    whole = json.loads((folder / "whole.json").read_text())
    for name, ids in (("train_val", ("video6", "video7")), ("test", ("video8", "video9"))):
        part = {key: [row for row in rows if row["video_id"] in ids] for key, rows in whole.items()}
        (folder / f"{name}_videodatainfo.json").write_text(json.dumps(part))
    train = read_msrvtt(folder, tmp_path / "v", "train")
    assert {clip.name: len(clip.captions) for clip in train.clips} == {"video6": 2, "video8": 2}
    (folder / "test_videodatainfo.json").unlink()
    with pytest.raises(
        SourceError, match=r"no MSRVTT_data\.json or videodatainfo\.json or train_val_video.* with "
    ):
        read_msrvtt(folder, tmp_path / "v", "train")


def test_msrvtt_lists_absent_videos(tmp_path):
    folder = msrvtt_at(tmp_path / "a")
    touch(tmp_path, "v/video7.mp4", "empty/other.mp4")
    source = read_msrvtt(folder, tmp_path / "v", "test")
    assert [clip.name for clip in source.clips] == ["video7"]
    assert source.missing == {"video9": 1}
    with pytest.raises(SourceError, match=r"empty/video7\.mp4: no such video, nor any other of the 2"):
        read_msrvtt(folder, tmp_path / "empty", "test")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("MSRVTT_JSFUSION_test.csv", "key,video_id\nret0,video7\n", "line 2: no video_id or no sentence"),
        ("MSRVTT_JSFUSION_test.csv", "video_id,sentence\nv,x\nv,y\n", "line 3: v is there twice"),
        (
            "MSRVTT_JSFUSION_test.csv",
            "video_id,sentence\nv,x\nw,y, z\n",
            "line 3: not the 2 cells of the header",
        ),
        ("MSRVTT_JSFUSION_test.csv", "video_id,sentence,key\nv,x\n", "line 2: not the 3 cells of the header"),
        ("MSRVTT_JSFUSION_test.csv", "", "no rows with video_id and sentence"),
        ("MSRVTT_data.json", "{", "MSRVTT_data.json: no JSON with videos and sentences"),
        ("MSRVTT_data.json", '{"videos": 1}', "no JSON with videos and sentences"),
        ("MSRVTT_data.json", '{"videos": [{"video_id": "v"}], "sentences": []}', "no sentence for v"),
        ("MSRVTT_data.json", '{"videos": [{"video_id": 7}], "sentences": []}', "video_id is 7, no string"),
        (
            "MSRVTT_data.json",
            '{"videos": [{"video_id": "v"}], "sentences": [{"video_id": "v", "caption": null}]}',
            "caption is None, no string",
        ),
        (
            "MSRVTT_data.json",
            '{"videos": [{"video_id": "v"}], "sentences": [{"video_id": null, "caption": "x"}]}',
            "video_id is None, no string",
        ),
        ("MSRVTT_data.json", '{"videos": [], "sentences": []}', "no video outside the 1k-A test split"),
    ],
)
def test_msrvtt_errors_are_one_line(tmp_path, file, text, message):
    folder = msrvtt_at(tmp_path / "a")
    touch(tmp_path, "v/video7.mp4")
    (folder / file).write_text(text)
    with pytest.raises(SourceError, match=message) as caught:
        read_msrvtt(folder, tmp_path / "v", "train")
    assert "\n" not in str(caught.value)
    (folder / file).unlink()
    with pytest.raises(SourceError, match=f"no {file}.*give the folder with the MSR-VTT annotations"):
        read_msrvtt(folder, tmp_path / "v", "train")


# ----------------------------------------------------------------------------- the scripts of docs/protocols

PROTOCOLS = Path(__file__).resolve().parents[2] / "docs" / "protocols"
MADE_ANNOTATIONS = {
    "msvd": {
        "AllVideoDescriptions.txt": "# comment\n\n-4w_5_15 a squirrel eats\nb_1_2 not listed\n-4w_5_15 it eats a nut\n",
        "test_list.txt": "-4w_5_15\n",
    },
    "didemo": {
        "test_data.json": '[{"video": "a@N02.mov", "description": "a dog runs "},'
        ' {"video": "b.avi", "description": "b"}, {"video": "a@N02.mov", "description": "it stops"}]'
    },
    "vatex": {
        "vatex_validation_v1.0.json": '[{"videoID": "G9z_000179_000189", "enCap": ["one", "two"], "chCap": ["x"]},'
        ' {"videoID": "other", "enCap": ["z"]}]',
        "test_list.txt": "G9z_000179_000189\n",
    },
    "activitynet": {
        "val_1.json": '{"v_a": {"duration": 9.5, "timestamps": [[0, 2]], "sentences": ["A man sits.", " He leaves."]}}'
    },
}
READ_BACK = {
    "msvd": [("-4w_5_15.avi", "-4w_5_15", ("a squirrel eats", "it eats a nut"), None)],
    "didemo": [("a@N02.mov", "a@N02.mov", ("a dog runs it stops",), 30.0), ("b.avi", "b.avi", ("b",), 30.0)],
    "vatex": [("G9z_000179_000189.mp4", "G9z_000179_000189", ("one", "two"), None)],
    "activitynet": [("v_a.mp4", "v_a", ("A man sits. He leaves.",), None)],
}


@pytest.mark.parametrize("name", READ_BACK)
def test_the_script_of_a_protocol_page_writes_what_is_read(tmp_path, monkeypatch, name):
    (script,) = re.findall(
        r"^```python\n(.*?)^```", (PROTOCOLS / f"{name}.md").read_text(), re.DOTALL | re.MULTILINE
    )
    monkeypatch.chdir(tmp_path)
    for file, text in MADE_ANNOTATIONS[name].items():
        Path(file).write_text(text)
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)
    touch(tmp_path, *(f"videos/{video}" for video, *_ in READ_BACK[name]))
    (lines,) = tmp_path.glob("*.jsonl")
    source = read_jsonl(lines, tmp_path / "videos")
    assert [(c.video.name, c.name, c.captions, c.end_seconds) for c in source.clips] == READ_BACK[name]
    assert f"shards make {lines.name} " in (PROTOCOLS / f"{name}.md").read_text()

"""Shards: keys, reproducible writing, foreign and torn tars, exact-once reading.

Media are short byte strings: none of these tests needs a video.
"""

import errno
import gzip
import json
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_shards import write_numbered, write_tar
from webdataset.tariterators import base_plus_ext

from rlt_retrieval.annotations import Classes
from rlt_retrieval.data.shards import (
    BadSample,
    ShardSample,
    expand_shards,
    iter_samples,
    read_shard,
    sanitize_key,
    write_shards,
)
from rlt_retrieval.errors import ShardError


def sample(key: str, *captions: str, group: str | None = None) -> ShardSample:
    return ShardSample(key, f"media of {key}".encode(), captions, f"{key}.mov", 1.5, 4.0, group)


# --- keys ---------------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(st.text(max_size=120), st.text(max_size=120))
def test_keys_survive_the_tar_and_do_not_collide(a, b):
    key = sanitize_key(a)
    assert base_plus_ext(f"{key}.mp4") == (key, "mp4")
    assert 0 < len(key) <= 80
    assert (key == sanitize_key(b)) == (a == b)


def test_keys_of_awkward_names():
    assert sanitize_key("clip_01-a") == "clip_01-a"
    assert sanitize_key("../a b.mp4") == "~2e~2e~2fa~20b~2emp4"
    long = [sanitize_key("x" * n) for n in (80, 81, 82)]
    assert len(set(long)) == 3
    assert long[0] == "x" * 80
    assert sanitize_key("") != sanitize_key("~h")
    assert sanitize_key(os.fsdecode(b"caf\xe9")) != sanitize_key("caf\xe9")  # a file name that is not UTF-8


# --- writing ------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_and_twice_gives_the_same_bytes(tmp_path):
    samples = [sample(f"k{i}", f"é {i}", "x", group=None if i % 2 else "g") for i in range(5)]
    first = write_shards(samples, tmp_path / "a", samples_per_shard=2)
    second = write_shards(iter(samples), tmp_path / "b", samples_per_shard=2)
    assert [path.name for path in first] == ["clips-000000.tar", "clips-000001.tar", "clips-000002.tar"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [p.name for p in first]
    back = [read for path in first for read in read_shard(path)]
    expected = [ShardSample(**{**vars(s), "shard": str(first[i // 2])}) for i, s in enumerate(samples)]
    assert back == expected
    with tarfile.open(first[0]) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}


@pytest.mark.parametrize("classes", [Classes(0, (2,)), Classes(3, ()), Classes(96, (1, 20))])
def test_classes_are_written_as_ids_and_read_back(tmp_path, classes):
    marked = ShardSample("k", b"media", ("c",), "v", 0.0, None, classes=classes)
    (path,) = write_shards([marked], tmp_path, samples_per_shard=1)
    with tarfile.open(path) as tar:
        meta = json.load(tar.extractfile("k.json"))
    assert (meta["verb_class"], meta["noun_classes"]) == (classes.verb, list(classes.nouns))
    (back,) = read_shard(path)
    assert back.classes == classes
    assert isinstance(back.classes, Classes)


def test_a_sample_without_classes_writes_what_it_always_wrote(tmp_path):
    (path,) = write_shards([sample("k", "c")], tmp_path, samples_per_shard=1)
    with tarfile.open(path) as tar:
        text = tar.extractfile("k.json").read()
    assert text == b'{"captions": ["c"], "end_seconds": 4.0, "start_seconds": 1.5, "video_id": "k.mov"}'
    (back,) = read_shard(path)
    assert back.classes is None


def test_bad_keys_and_used_folders_are_refused(tmp_path):
    with pytest.raises(ShardError, match="'a': given to two samples"):
        write_shards([sample("a"), sample("b"), sample("a")], tmp_path / "a", samples_per_shard=2)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["clips-000000.tar"]
    with pytest.raises(ShardError, match="already holds shards"):
        write_shards([sample("a")], tmp_path / "a", samples_per_shard=2)
    for key in ("a.b", "a/b", "", "x" * 81, "é"):
        with pytest.raises(ShardError, match="use sanitize_key"):
            write_shards([sample(key)], tmp_path / "b", samples_per_shard=2)
    with pytest.raises(ShardError, match="no sample to write"):
        write_shards([], tmp_path / "b", samples_per_shard=2)
    with pytest.raises(ValueError, match="samples_per_shard"):
        write_shards([sample("a")], tmp_path / "b", samples_per_shard=0)


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        ShardError, match=r"clips-000000\.tar: cannot write \(No space left on device\); free space"
    ):
        write_shards([sample("a")], tmp_path, samples_per_shard=2)
    assert not list(tmp_path.iterdir())


def test_an_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ShardError, match="file/shards: cannot write") as caught:
        write_shards([sample("a")], tmp_path / "file" / "shards", samples_per_shard=2)
    assert "\n" not in str(caught.value)


# --- finding shards -----------------------------------------------------------------------------------------


def test_files_folders_and_braces_expand_each_file_once(tmp_path):
    paths = write_numbered(tmp_path / "s", [1, 1, 1])
    (tmp_path / "s" / ".clips-000003.tar.tmp").touch()
    (tmp_path / "s" / "dataset.json").touch()
    assert expand_shards([tmp_path / "s"]) == paths
    assert expand_shards([str(tmp_path / "s" / "clips-{000001..000002}.tar")]) == paths[1:]
    assert expand_shards([paths[2], tmp_path / "s", str(paths[0])]) == [paths[2], paths[0], paths[1]]
    odd = write_tar(tmp_path / "{odd}.tar", [])
    assert expand_shards([odd]) == [odd]


@pytest.mark.parametrize(
    "source",
    [
        "pipe:cat x.tar",
        "http://host/x.tar",
        "s3://bucket/{0..3}.tar",
        "file:/tmp/x.tar",
        Path("gs://b/x.tar"),
    ],
)
def test_urls_and_shell_forms_are_refused(source):
    with pytest.raises(ShardError, match="URLs and shell forms are not read"):
        expand_shards([source])


def test_missing_and_empty_sources_are_named(tmp_path):
    write_numbered(tmp_path / "s", [1])
    with pytest.raises(ShardError, match="no shards given"):
        expand_shards([])
    with pytest.raises(ShardError, match=r"clips-000001\.tar: no such shard file or folder"):
        expand_shards([str(tmp_path / "s" / "clips-{000000..000001}.tar")])
    with pytest.raises(ShardError, match="braces do not match"):
        expand_shards([str(tmp_path / "clips-{0..1.tar")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ShardError, match=r"no \.tar file in this folder"):
        expand_shards([tmp_path / "empty"])
    with pytest.raises(ShardError, match="cannot be read"):
        list(read_shard(tmp_path / "gone.tar"))


# --- reading what others wrote ------------------------------------------------------------------------------


def test_members_of_any_order_and_kind(tmp_path):
    long_json = {
        "caption": "long",
        "start_seconds": 2,
        "end_seconds": 3.5,
        "video_id": 7,
        "other": "x" * 10**5,
    }
    path = write_tar(
        tmp_path / "x.tar",
        [
            ("./", b""),
            ("dir/00.json", b'{"caption": "a", "captions": ["b", " a "], "caption_x": 1}'),
            ("dir/00.mp4", b"video"),
            ("dir/00.jpg", b"thumbnail"),
            ("dir/00.txt", b"\xef\xbb\xbfc\n"),
            ("dir/00.cls", b"3"),
            ("1.txt.gz", gzip.compress(b"packed")),
            ("22.PNG", b"picture"),
            ("1.webm", b"video 1"),
            ("333.mkv", b"video 3"),
            ("333.json", json.dumps(long_json).encode()),
        ],
    )
    zero, one, two, three = read_shard(path)
    assert (zero.key, zero.media, zero.captions) == ("dir/00", b"video", ("b", "a", "c"))
    assert (one.media, one.captions, one.video_id) == (b"video 1", ("packed",), "1")
    assert (two.media, two.captions, two.end_seconds) == (b"picture", (), None)
    assert (three.captions, three.video_id, three.start_seconds, three.end_seconds) == (
        ("long",),
        "7",
        2.0,
        3.5,
    )


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.json", b"{}")], "no video or image member, only: json"),
        (
            [("a.b.mp4", b"v")],
            r"no video or image member, only: b.mp4 (a suffix is all after a name's first dot)",
        ),
        ([("a.mp4", b"")], "mp4: empty"),
        ([("a.mp4", b"v"), ("a.mp4", b"w")], "two members named a.mp4"),
        ([("a.mp4", b"v"), ("a.json", b"{")], "json: not valid"),
        ([("a.mp4", b"v"), ("a.json", b"[" * 100_000)], "json: not valid"),
        ([("a.mp4", b"v"), ("a.json", b"\xff")], "json: not valid"),
        ([("a.mp4", b"v"), ("a.json", b"[1]")], "json: expected an object, found list"),
        ([("a.mp4", b"v"), ("a.json", b'{"captions": "x"}')], "json: captions is not a list"),
        ([("a.mp4", b"v"), ("a.json", b'{"captions": [1]}')], "json: a caption is not text"),
        ([("a.mp4", b"v"), ("a.json", b'{"end_seconds": "1"}')], "json: end_seconds is not a number"),
        ([("a.mp4", b"v"), ("a.json", b'{"start_seconds": NaN}')], "json: start_seconds is not a number"),
        (
            [("a.mp4", b"v"), ("a.json", b'{"verb_class": "1", "noun_classes": []}')],
            "json: verb_class is not a class id: '1'",
        ),
        ([("a.mp4", b"v"), ("a.json", b'{"noun_classes": [1]}')], "json: verb_class is not a class id: None"),
        (
            [("a.mp4", b"v"), ("a.json", b'{"verb_class": -1, "noun_classes": []}')],
            "json: verb_class is not a class id: -1",
        ),
        (
            [("a.mp4", b"v"), ("a.json", b'{"verb_class": 1}')],
            "json: noun_classes is not a list of class ids: None",
        ),
        (
            [("a.mp4", b"v"), ("a.json", b'{"verb_class": 1, "noun_classes": [true]}')],
            "json: noun_classes is not a list of class ids: [True]",
        ),
        (
            [("a.mp4", b"v"), ("a.json", b'{"verb_class": 1, "noun_classes": [99999999999]}')],
            "json: noun_classes is not a list of class ids",
        ),
        ([("a.mp4", b"v"), ("a.txt", b"\xff")], "txt: not UTF-8"),
        ([("a.mp4", b"v"), ("a.txt.gz", b"text")], "txt.gz: not gzip data"),
        ([("a.mp4", b"v"), ("a.txt.gz", gzip.compress(b"text")[:-9])], "txt.gz: not gzip data"),
    ],
)
def test_a_bad_sample_gives_its_reason_and_spares_the_others(tmp_path, members, reason):
    path = write_tar(tmp_path / "x.tar", [("0.mp4", b"v"), *members, ("b.mp4", b"v")])
    before, bad, after = read_shard(path)
    assert (before.key, after.key) == ("0", "b")
    assert (bad.key, bad.shard) == ("a", str(path))
    assert isinstance(bad, BadSample)
    assert reason in bad.reason


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_torn_tar_gives_whole_samples_then_one_truncated(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("torn")
    path = write_shards([sample(f"k{i}", "c") for i in range(4)], folder, samples_per_shard=4)[0]
    whole = list(read_shard(path))
    content = path.read_bytes()
    end_mark = len(content.rstrip(b"\0")) // 512 * 512 + 512
    path.write_bytes(content[: data.draw(st.integers(0, end_mark + 511))])
    *samples, bad = read_shard(path)
    assert samples == whole[: len(samples)]
    assert isinstance(bad, BadSample)
    assert "truncated" in bad.reason
    assert bad.shard == str(path)


def test_a_tear_keeps_all_samples_before_it(tmp_path):
    path = write_shards([sample(f"k{i}", "c") for i in range(4)], tmp_path, samples_per_shard=4)[0]
    with tarfile.open(path) as tar:
        offset = tar.getmember("k2.mp4").offset_data
    path.write_bytes(path.read_bytes()[: offset + 3])
    *samples, bad = read_shard(path)
    assert [s.key for s in samples] == ["k0", "k1"]
    assert bad.key == "k2"


def test_damage_in_the_middle_and_files_that_are_no_tar(tmp_path):
    path = write_shards([sample(f"k{i}", "c") for i in range(4)], tmp_path, samples_per_shard=4)[0]
    with tarfile.open(path) as tar:
        offset = tar.getmember("k2.json").offset
    content = bytearray(path.read_bytes())
    content[offset : offset + 100] = b"\x55" * 100
    path.write_bytes(content)
    *samples, bad = read_shard(path)
    assert [s.key for s in samples] == ["k0"]  # k1's members may go on in the damaged part
    assert "damaged" in bad.reason
    for junk in (b"", b"not a tar", gzip.compress(bytes(content)), b"\x80" * 4096):
        path.write_bytes(junk)
        (bad,) = read_shard(path)
        assert "not a plain tar archive" in bad.reason


def test_foreign_shards(shared_data):
    folder = shared_data / "foreign_shards"
    clips = list(read_shard(folder / "video2dataset__return_all_test.tar"))
    assert [len(clip.captions) for clip in clips] == [1] * 6
    assert [clip.key for clip in clips][2:4] == ["000000356", "0000008_00001"]
    assert clips[3].captions == ("a man in a suit and orange tie standing at a podium .",)
    for number, count in [(1, 4), (2, 3), (3, 2)]:
        images = list(read_shard(folder / f"clip-retrieval__image{number}.tar"))
        assert [image.captions for image in images] == [()] * count
        assert all(image.media.startswith(b"\xff\xd8") for image in images)
    for name, count, suffix in [("compressed", 3, "txt.gz"), ("mpdata", 100, "mp")]:
        bad = list(read_shard(folder / f"webdataset__{name}.tar"))
        assert [type(item) for item in bad] == [BadSample] * count
        assert all(f"only: {suffix} (" in item.reason for item in bad)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(1, 5))
def test_evaluation_reads_every_sample_once_over_all_ranks(tmp_path_factory, sizes, world_size):
    paths = write_numbered(tmp_path_factory.mktemp("ranks") / "s", sizes)
    by_rank = [[s.key for s in iter_samples(paths, rank=r, world_size=world_size)] for r in range(world_size)]
    assert sorted(key for keys in by_rank for key in keys) == [f"{i:04d}" for i in range(sum(sizes))]
    assert max(map(len, by_rank)) - min(map(len, by_rank)) <= 1

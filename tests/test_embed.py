"""The inference loop: batching must not show in the embeddings, and every sample comes out once and in order."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_ek100 import made_classes, write_ek100_copy

from rlt_retrieval.annotations import read_dataset
from rlt_retrieval.data.failures import FailureLog
from rlt_retrieval.data.shards import ShardSample, expand_shards, read_shard
from rlt_retrieval.data.video import decode_clip
from rlt_retrieval.embed import (
    TEXT_BATCH,
    THUMBNAIL,
    LoaderOptions,
    ShardEmbeddings,
    embed_clips,
    embed_shards,
    embed_texts,
    evaluate_shards,
    middle_frames,
    score,
)
from rlt_retrieval.encoders.packing import PackedTokens, VideoTokens
from rlt_retrieval.errors import ShardError
from rlt_retrieval.model import VideoTextModel

HERE = LoaderOptions(num_workers=0)
CAPTIONS = ["a red square", "a blue circle", "a red square", "", "a star"]

TinyShards = Callable[..., list[Path]]


def clips_of(model: VideoTextModel, numbers: list[int]) -> list[VideoTokens]:
    """Clips of 4 frames, of which the last `number` repeat: 16 * (4 - number) tokens."""
    generator = torch.Generator().manual_seed(0)
    clips = []
    for number in numbers:
        frames_TCHW = torch.randint(0, 256, (4, 3, 32, 32), generator=generator, dtype=torch.uint8)
        frames_TCHW[4 - number :] = frames_TCHW[3 - number]
        clips.append(model.tokenizer(frames_TCHW))
    return clips


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    numbers=st.lists(st.integers(0, 3), min_size=1, max_size=8),
    token_budget=st.integers(1, 300),
    num_threads=st.integers(1, 5),
)
def test_batches_keep_the_budget_the_order_and_the_embeddings(
    tiny_model: VideoTextModel, numbers: list[int], token_budget: int, num_threads: int
) -> None:
    options = LoaderOptions(token_budget=token_budget, num_threads=num_threads)
    clips = clips_of(tiny_model, numbers)
    batches = list(embed_clips(tiny_model, enumerate(clips), options))
    for batch in batches:
        assert len(batch) == 1 or sum(len(clips[label]) for label, _ in batch) <= token_budget
    embedded = [pair for batch in batches for pair in batch]
    assert [label for label, _ in embedded] == list(range(len(clips)))
    for label, z_D in embedded:
        ((_, alone_D),) = next(embed_clips(tiny_model, [(label, clips[label])], HERE))
        assert z_D.dtype == np.float32
        np.testing.assert_allclose(z_D, alone_D, atol=1e-5)
        assert np.linalg.norm(z_D) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("lanes", [1, 2])
def test_clips_are_embedded_as_they_come(tiny_model: VideoTextModel, lanes: int) -> None:
    """An index commits batch by batch: the loop must not wait for the end of the stream."""
    read = []

    def clips():
        for label, tokens in enumerate(clips_of(tiny_model, [0] * 8)):
            read.append(label)
            yield label, tokens

    batches = embed_clips(tiny_model, clips(), LoaderOptions(token_budget=64, num_threads=lanes))
    next(batches)
    # The batch that came, those in the lanes, as many that wait for one, the clip that closed the last one.
    assert len(read) == 1 + lanes + lanes + 1
    batches.close()


def test_lanes_leave_the_number_of_threads_alone_and_share_theirs(
    tiny_model: VideoTextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    encode = VideoTextModel.encode_tokens

    def noted(self: VideoTextModel, packed: PackedTokens) -> torch.Tensor:
        seen.add((threading.current_thread() is threading.main_thread(), torch.get_num_threads()))
        return encode(self, packed)

    monkeypatch.setattr(VideoTextModel, "encode_tokens", noted)
    monkeypatch.setattr("rlt_retrieval.embed.LANES", 2)
    before = torch.get_num_threads()
    clips = enumerate(clips_of(tiny_model, [0, 0, 0]))
    assert len(list(embed_clips(tiny_model, clips, LoaderOptions(token_budget=1, num_threads=5)))) == 3
    assert seen == {(False, 2)}
    assert torch.get_num_threads() == before


def test_an_error_in_a_lane_is_raised_where_the_clips_are_wanted(tiny_model: VideoTextModel) -> None:
    wrong = clips_of(tiny_model, [0])[0]
    wrong = VideoTokens(wrong.patches, wrong.positions, wrong.run_lengths, (4, 5, 5))
    with pytest.raises(ValueError, match="a grid of 5x5 patches"):
        list(embed_clips(tiny_model, [("wrong", wrong)], HERE))


def test_equal_texts_are_encoded_once_and_all_come_back(
    tiny_model: VideoTextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    encode_text = VideoTextModel.encode_text

    def counted(self: VideoTextModel, texts: list[str]) -> torch.Tensor:
        assert len(texts) <= TEXT_BATCH
        encoded.extend(texts)
        return encode_text(self, texts)

    monkeypatch.setattr(VideoTextModel, "encode_text", counted)
    distinct = [f"clip number {number}" for number in range(TEXT_BATCH + 5)]
    z_QD = embed_texts(tiny_model, [*distinct, *reversed(distinct)])
    assert encoded == distinct
    np.testing.assert_array_equal(z_QD[: len(distinct)], z_QD[: len(distinct) - 1 : -1])
    np.testing.assert_allclose(z_QD[3], encode_text(tiny_model, distinct[3:4]).detach()[0], atol=1e-5)
    assert embed_texts(tiny_model, []).shape == (0, tiny_model.dimension)


def test_shards_come_out_in_order_with_captions_and_token_counts(
    tiny_model: VideoTextModel, tiny_shards: TinyShards, tmp_path: Path
) -> None:
    shards = tiny_shards(tmp_path, CAPTIONS, samples_per_shard=2)
    failures = FailureLog(None, 0.5)
    progress: list[int] = []
    embedded = embed_shards(tiny_model, shards, HERE, failures=failures, on_progress=progress.append)
    assert embedded.keys == ["clip-00", "clip-01", "clip-02", "clip-04"]
    assert embedded.captions == [(text,) for text in CAPTIONS if text]
    assert embedded.shards == [str(shards[0])] * 2 + [str(shards[1]), str(shards[2])]
    assert embedded.classes == [None] * 4
    assert [(failure.key, failure.reason.split(";")[0]) for failure in failures.failures] == [
        ("clip-03", "no caption")
    ]
    assert progress == [1, 2, 3, 4]
    assert embedded.all_tokens.tolist() == [64] * 4
    assert (embedded.kept_tokens <= 64).all()
    assert 0.5 < embedded.keep_ratio <= 1  # noise changes everywhere
    dense = embed_shards(
        tiny_model.with_settings(reducer="none"), shards, HERE, failures=FailureLog(None, 0.5)
    )
    assert dense.keep_ratio == 1


def test_ranks_embed_every_clip_exactly_once(
    tiny_model: VideoTextModel, tiny_shards: TinyShards, tmp_path: Path
) -> None:
    shards = tiny_shards(tmp_path, ["one", "two", "three", "four", "five"], samples_per_shard=2)
    whole = embed_shards(tiny_model, shards, HERE)
    parts = [embed_shards(tiny_model, shards, HERE, rank=rank, world_size=3) for rank in range(3)]
    assert sorted(key for part in parts for key in part.keys) == whole.keys
    for part in parts:
        for key, z_D in zip(part.keys, part.z_ND, strict=True):
            np.testing.assert_allclose(z_D, whole.z_ND[whole.keys.index(key)], atol=1e-5)


def test_a_worker_process_gives_what_this_process_gives(
    tiny_model: VideoTextModel, tiny_shards: TinyShards, tmp_path: Path
) -> None:
    shards = tiny_shards(tmp_path, ["one", "two", "three"])
    here = embed_shards(tiny_model, shards, HERE)
    there = embed_shards(tiny_model, shards, LoaderOptions(num_workers=1))
    assert (there.keys, there.captions) == (here.keys, here.captions)
    np.testing.assert_array_equal(there.kept_tokens, here.kept_tokens)
    np.testing.assert_allclose(there.z_ND, here.z_ND, atol=1e-5)


def test_scores_count_merged_captions_and_skipped_samples(
    tiny_model: VideoTextModel, tiny_shards: TinyShards, tmp_path: Path
) -> None:
    tiny_shards(tmp_path, CAPTIONS)
    options = LoaderOptions(num_workers=0, max_bad_fraction=0.5)
    values = evaluate_shards(tiny_model, [tmp_path], options).to_dict()
    assert (values["num_videos"], values["num_texts"], values["num_merged_texts"]) == (4, 3, 1)
    assert values["skipped"] == 1
    assert values["text_to_video"]["num_queries"] == 3


def test_too_many_bad_samples_or_none_good_are_refused(
    tiny_model: VideoTextModel, tiny_shards: TinyShards, tmp_path: Path
) -> None:
    tiny_shards(tmp_path / "some", CAPTIONS)
    with pytest.raises(ShardError, match=r"1 of 5 samples bad, more than max_bad_fraction = 0.1"):
        evaluate_shards(tiny_model, [tmp_path / "some"], HERE)
    tiny_shards(tmp_path / "none", ["", ""])
    with pytest.raises(ShardError, match=r"none: no good sample to score .clip-00: no caption"):
        evaluate_shards(tiny_model, [tmp_path / "none"], LoaderOptions(num_workers=0, max_bad_fraction=1))


def test_a_training_run_scores_what_its_ranks_embedded_by_the_protocol_of_the_data(
    tiny_model: VideoTextModel, tiny_shards: TinyShards, tmp_path: Path
) -> None:
    plain = tiny_shards(tmp_path / "plain", ["one", "two", "three", "one"], samples_per_shard=3)
    folder = write_ek100_copy(tmp_path / "plain", tmp_path / "ek100")
    shards = expand_shards([folder])
    dataset = read_dataset(shards)
    assert dataset is not None
    parts = [embed_shards(tiny_model, shards, HERE, rank=rank, world_size=3) for rank in range(3)]
    embedded = ShardEmbeddings.joined(parts)
    assert sorted(embedded.keys) == ["clip-00", "clip-01", "clip-02", "clip-03"]
    for key, classes in zip(embedded.keys, embedded.classes, strict=True):
        assert classes == made_classes(int(key[-2:]))
    values, alone = (
        score(tiny_model, embedded, dataset).to_dict(),
        evaluate_shards(tiny_model, [folder], HERE),
    )
    assert values["num_texts"] == len(dataset.sentences)
    for metric in ("mAP", "nDCG"):
        assert values["mean"][metric] == pytest.approx(alone.to_dict()["mean"][metric])
    captions = score(tiny_model, embed_shards(tiny_model, plain, HERE), None)
    assert captions == evaluate_shards(tiny_model, plain, HERE).result


def test_thumbnails_are_the_middle_frames_of_the_clips_asked_for(
    tiny_model: VideoTextModel, tiny_shards: TinyShards, tmp_path: Path
) -> None:
    """Two shards that use the same keys: the right one is opened."""
    shards = [
        *tiny_shards(tmp_path / "a", ["one", "two", "three"], samples_per_shard=2),
        *tiny_shards(tmp_path / "b", ["", "other"]),
    ]
    embedded = embed_shards(tiny_model, shards, LoaderOptions(num_workers=0, max_bad_fraction=0.5))
    media = {
        (s.shard, s.key): s.media for shard in shards for s in read_shard(shard) if isinstance(s, ShardSample)
    }
    rows = [3, 0, 2, 0]
    for row, frames in zip(rows, middle_frames(embedded, rows, HERE), strict=True):
        assert frames is not None
        clip = media[embedded.shards[row], embedded.keys[row]]
        expected = decode_clip(clip, num_frames=1, transform=THUMBNAIL).frames_TCHW
        assert frames.shape == (1, 3, 90, 160)
        np.testing.assert_array_equal(frames, expected)
    assert middle_frames(embedded, [], HERE) == []
    tiny_shards(tmp_path / "b2", ["other"])  # no such clip any more: a picture less, and nothing else
    (tmp_path / "b2" / "clips-000000.tar").replace(shards[-1])
    assert [frames is None for frames in middle_frames(embedded, [0, 3], HERE)] == [False, True]


def test_ek100_clips_without_their_dataset_json_are_not_scored_by_captions_silently(
    tiny_model: VideoTextModel, tiny_shards: TinyShards, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_shards(tmp_path / "plain", ["one", "two", "three"])
    folder = write_ek100_copy(tmp_path / "plain", tmp_path / "ek100")
    (folder / "dataset.json").unlink()
    evaluate_shards(tiny_model, [folder], HERE, protocol="captions")
    assert not caplog.messages
    evaluate_shards(tiny_model, [folder], HERE)
    assert "no dataset.json beside them" in caplog.text

"""The clips of the synthetic proof, and the scores that the proof is made of.

Shapes: N clips, T frames, D embedding.
"""

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlt_retrieval import RunLengthTokenizer, VideoTextModel

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import event_clips  # noqa: E402
import train_frame_models  # noqa: E402
from event_clips import KIND_SHARES, EventSpec, Scene, Story, all_stories, render, split  # noqa: E402
from train_frame_models import Phase  # noqa: E402

SCENE = Scene("bricks", "snow", "ring", "red", "orange star")
MOTION_WORDS = (
    "move",
    "appear",
    "leave",
    "enter",
    "turn",
    "come",
    "go",
    "change",
    "sway",
    "drift",
    "pan",
    "fly",
)
STILL_CAMERA = {"none": 1.0, "sway": 0.0, "speck": 0.0, "pan": 0.0}


@pytest.fixture
def without_motion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_clips, "MOTION_SHARES", STILL_CAMERA)


# --- stories ------------------------------------------------------------------------------------------------


def test_captions_say_what_is_shown_and_for_a_while() -> None:
    alone = replace(SCENE, companion=None)
    assert SCENE.caption() == "a red ring, beside an orange star, over bricks and snow"
    assert (
        Story(alone, SCENE).caption() == "a red ring, for a while beside an orange star, over bricks and snow"
    )
    assert (
        Story(SCENE, replace(SCENE, colour="blue")).caption()
        == "a ring, red and for a while blue, beside an orange star, over bricks and snow"
    )
    assert alone.caption() == "a red ring, over bricks and snow"


def test_test_captions_are_distinct_without_motion_words_and_half_have_events() -> None:
    _, stories = split(seed=0, num_test=1024)
    captions = {story.caption() for story in stories}
    assert len(stories) == len(captions) == len({story.contents() for story in stories}) == 1024
    assert sum(story.during is not None for story in stories) == 512
    words = {word.strip(",") for caption in captions for word in caption.split()}
    assert not [word for word in words if word.startswith(MOTION_WORDS)]


def test_no_test_contents_are_trained_on_and_nothing_shown_is_new_at_the_test() -> None:
    train, test = split(seed=3, num_test=1024)
    everything = [story for stories in train.values() for story in stories]
    assert not {story.contents() for story in everything} & {story.contents() for story in test}
    assert set(train) == set(KIND_SHARES)
    assert len(everything) > 4000
    for name in Scene.__dataclass_fields__:
        assert {getattr(s.during or s.scene, name) for s in test} <= {
            getattr(s.during or s.scene, name) for s in everything
        }


def test_seeds_give_different_splits_and_one_seed_the_same() -> None:
    assert split(seed=0, num_test=64)[1] == split(seed=0, num_test=64)[1]
    assert split(seed=0, num_test=64)[1] != split(seed=1, num_test=64)[1]


def test_training_clips_are_of_stories_to_train_on_and_kinds_have_their_shares() -> None:
    train, _ = split(seed=0, num_test=1024)
    kinds = {story: kind for kind, stories in train.items() for story in stories}
    clips = islice(event_clips.training_clips(seed=0, group_size=1, spec=EventSpec(num_frames=1)), 400)
    drawn = Counter(kinds[clip.story] for clip in clips)
    for kind, share in KIND_SHARES.items():
        assert drawn[kind] / 400 == pytest.approx(share, abs=0.1)


def test_a_group_holds_different_stories_over_one_backdrop() -> None:
    clips = list(islice(event_clips.training_clips(seed=0, group_size=8, spec=EventSpec(num_frames=1)), 32))
    groups = [clips[i : i + 8] for i in range(0, 32, 8)]
    assert [len({clip.story for clip in group}) for group in groups] == [8] * 4
    assert [len({clip.story.backdrop() for clip in group}) for group in groups] == [1] * 4
    assert len({clip.story.backdrop() for clip in clips}) > 1


# --- clips --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_motion")
@pytest.mark.parametrize("kind", ["companion", "colour"])
def test_an_event_is_seen_in_its_frames_and_in_no_other(kind: str) -> None:
    story = all_stories(kind)[1234]
    clip = render(story, np.random.default_rng(0), EventSpec(noise=0.0))
    shown_T = (clip.frames_TCHW != clip.frames_TCHW[~clip.inside_T][:1]).any(axis=(1, 2, 3))
    assert (shown_T == clip.inside_T).all()
    assert (clip.frames_TCHW[clip.inside_T] == clip.frames_TCHW[clip.start]).all()


@pytest.mark.usefixtures("without_motion")
def test_noise_stays_below_the_threshold_and_an_event_does_not() -> None:
    story = Story(replace(SCENE, companion=None), SCENE)
    clip = render(story, np.random.default_rng(1))
    mask_thw = RunLengthTokenizer(8, threshold=0.1, reference="anchor").keep_mask(
        torch.from_numpy(clip.frames_TCHW)
    )
    changes_T = np.flatnonzero(mask_thw.any(2).any(1).numpy())
    assert set(changes_T) == {0, clip.start, clip.end} - {len(clip.frames_TCHW)}
    assert mask_thw[1:].float().mean() < 0.1


@given(seed=st.integers(0, 2**32 - 1), num_frames=st.integers(4, 20))
def test_events_last_as_long_as_the_spec_says(seed: int, num_frames: int) -> None:
    spec = EventSpec(num_frames=num_frames)
    start, end = event_clips._draw_span(np.random.default_rng(seed), spec)
    assert 0 <= start < end <= num_frames
    shortest, longest = spec.event_share
    assert max(1, round(shortest * num_frames)) <= end - start <= max(1, round(longest * num_frames))


def test_rlt_keeps_less_than_half_of_the_test_set() -> None:
    clips = event_clips.held_out_clips(seed=0, num_test=64)
    tokenizer = RunLengthTokenizer(8, threshold=0.1, reference="anchor")
    kept = [tokenizer.keep_mask(torch.from_numpy(clip.frames_TCHW)).float().mean().item() for clip in clips]
    assert 0.08 < np.mean(kept) < 0.5


# --- scores -------------------------------------------------------------------------------------------------


def test_found_first_counts_ties_against_the_query() -> None:
    z_text_ND = np.eye(3, dtype=np.float32)
    z_video_ND = np.array([[1, 0, 0], [0, 0.6, 0.8], [0, 0.6, 0.8]], dtype=np.float32)
    assert train_frame_models.found_first(z_video_ND, z_text_ND).tolist() == [True, False, False]


def test_moment_auc_on_a_hand_worked_clip() -> None:
    # scores 0.0, 0.6, 0.6, 0.8; inside are frames 2 and 3: 3 of 4 pairs right, 1 a tie
    z_TD = np.array([[1, 0], [0.8, 0.6], [0.8, 0.6], [0.6, 0.8]], dtype=np.float32)
    inside_T = np.array([False, False, True, True])
    aucs_E = train_frame_models.moment_aucs([z_TD], np.array([[0, 1]], dtype=np.float32), [inside_T])
    assert aucs_E.tolist() == [3.5 / 4]


# --- training -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def event_model() -> VideoTextModel:
    return train_frame_models.train_events(0, (Phase(2, 4, 1, 2), Phase(1, 4, 2, 4)), num_test=8)


def test_event_models_are_trained_in_the_frame_layout_on_all_tokens(event_model: VideoTextModel) -> None:
    assert (event_model.config.video.layout, event_model.config.video.reducer) == ("frame", "none")
    again = train_frame_models.train_events(0, (Phase(2, 4, 1, 2), Phase(1, 4, 2, 4)), num_test=8)
    assert again.sha256() == event_model.sha256()
    shorter = train_frame_models.train_events(0, (Phase(2, 4, 1, 2),), num_test=8)
    assert shorter.sha256() != event_model.sha256()


def test_scores_of_a_model_cover_all_clips_and_all_events(event_model: VideoTextModel) -> None:
    scores = train_frame_models.score_events(event_model, event_clips.held_out_clips(seed=0, num_test=8))
    assert scores.found_first_N.shape == (8,)
    assert scores.moment_auc_E.shape == (4,)
    assert ((scores.moment_auc_E >= 0) & (scores.moment_auc_E <= 1)).all()


def test_videos_are_told_apart_by_an_image_tower(tmp_path: Path, tiny_video: Callable[..., Path]) -> None:
    for seed in range(2):
        tiny_video(tmp_path / f"{seed}.mp4", seconds=2.5, seed=seed)
    tiny_video(tmp_path / "short.mp4", seconds=0.5)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    halves = train_frame_models.read_halves(tmp_path, side=40, num_frames=3)
    assert halves.first_VTCHW.shape == halves.second_VTCHW.shape == (2, 3, 3, 40, 40)
    model = train_frame_models.train_on_videos(halves.first_VTCHW, side=32, steps=2)
    figures = train_frame_models.video_figures(
        model, train_frame_models.read_halves(tmp_path, side=32, num_frames=3)
    )
    assert figures["videos"] == 2


def test_augmented_pictures_have_the_size_of_the_model(rng: np.random.Generator) -> None:
    frame_CHW = torch.full((3, 40, 60), 77, dtype=torch.uint8)
    picture_CHW = train_frame_models.augmented(frame_CHW, 32, rng)
    assert picture_CHW.shape == (3, 32, 32)
    assert (picture_CHW == 77).all()

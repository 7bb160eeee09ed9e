"""Every reducer as a choice of the model: settings in, embeddings out, in any batch.

Shapes: T frames, R rows, Z embedding.
"""

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import gradients, repeating_frames, small_model
from torch import Tensor

from rlt_retrieval.config import RATIO_REDUCERS, REDUCERS
from rlt_retrieval.encoders.packing import covering_tokens, pack
from rlt_retrieval.errors import ModelError
from rlt_retrieval.model import VideoTextModel

UNCHANGED_AT_ONE = ("frames", "resolution", "tome", "vid_tldr", "centerclip")
CASES = [
    (reducer, layout)
    for reducer in REDUCERS
    for layout in ("frame", "joint")
    if (reducer, layout) != ("centerclip", "joint")
]


def clips() -> list[Tensor]:
    return [repeating_frames(6, change, seed=index) for index, change in enumerate((0.3, 0.0, 0.8))]


def model_of(reducer: str, layout: str, **settings: Any) -> VideoTextModel:
    values = {"threshold": 0.05, **({"keep_ratio": 0.5} if reducer in RATIO_REDUCERS else {}), **settings}
    return small_model({"layers": 3}, layout=layout, reducer=reducer, **values)


@pytest.mark.parametrize(("reducer", "layout"), CASES)
def test_a_clip_has_one_embedding_in_any_batch(reducer: str, layout: str) -> None:
    model = model_of(reducer, layout)
    with torch.no_grad():
        z_BZ = model.encode_video(clips())
        for z_Z, clip in zip(z_BZ, clips(), strict=True):
            torch.testing.assert_close(z_Z, model.encode_video([clip])[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(z_BZ.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize(("reducer", "layout"), CASES)
def test_gradients_reach_the_weights(reducer: str, layout: str) -> None:
    model = model_of(reducer, layout)
    z_BZ = model.encode_video(clips())
    found = gradients((z_BZ * torch.linspace(-1, 1, z_BZ.shape[1])).sum(), model.clip.visual)
    assert found["conv1.weight"].abs().max() > 0
    assert all(bool(gradient.isfinite().all()) for gradient in found.values())


@pytest.mark.parametrize(("reducer", "layout"), [case for case in CASES if case[0] in UNCHANGED_AT_ONE])
def test_a_ratio_of_one_changes_nothing(reducer: str, layout: str) -> None:
    model = model_of(reducer, layout, keep_ratio=1.0)
    with torch.no_grad():
        full = model.with_settings(reducer="none").encode_video(clips())
        torch.testing.assert_close(model.encode_video(clips()), full, atol=1e-5, rtol=0)


@pytest.mark.parametrize("reducer", REDUCERS)
def test_the_same_pixels_give_the_same_tokens_in_a_worker_too(reducer: str) -> None:
    """Also from frames that lie in memory in another order."""
    tokenizer = model_of(reducer, "frame").tokenizer
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again == tokenizer
    frames = clips()[0]
    tokens, others = tokenizer(frames), again(frames.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))
    for name in ("patches", "positions", "run_lengths", "covering"):
        seen, expected = getattr(others, name), getattr(tokens, name)
        assert seen is expected is None or torch.equal(seen, expected)


@pytest.mark.parametrize("reducer", ["gated", "motion"])
def test_tokens_that_stand_for_other_cells_are_the_keys(reducer: str) -> None:
    """A patch that changes and changes back (gated), a picture that moves by a patch (motion)."""
    model = model_of(reducer, "frame")
    still = repeating_frames(1, 0.0, seed=7, side=40)[0]
    frames = still[:, :32, :32].repeat(6, 1, 1, 1)
    if reducer == "gated":
        frames[2, :, :8, :8] = 255 - frames[2, :, :8, :8]
    else:
        frames[3:] = still[:, :32, 8:]
    tokens = model.tokenizer(frames)
    assert tokens.covering is not None
    assert not torch.equal(tokens.covering, covering_tokens(pack([replace(tokens, covering=None)]))[0])
    plan = model.video.plan(pack([tokens]))
    assert plan.key_rows is not None
    computed = tokens.positions[:, 0].unique().long()
    keys_SK = plan.rows[plan.key_rows].reshape(len(computed), -1)
    assert torch.equal(keys_SK[:, 1:] - 1, tokens.covering[computed].flatten(1).long())


@pytest.mark.parametrize("reducer", ["vid_tldr", "centerclip"])
def test_whole_clips_are_asked_for(reducer: str) -> None:
    tokens = model_of("rlt", "frame").tokenizer(clips()[1])
    with pytest.raises(ValueError, match=f"of 96 tokens are there; reducer '{reducer}' reads whole clips"):
        model_of(reducer, "frame").encode_tokens(pack([tokens]))


def test_the_frames_of_a_medoid_segment_share_an_embedding() -> None:
    frames = model_of("centerclip", "frame").encode_frames([clips()[2]])
    assert [len(z_TZ) for z_TZ in frames] == [6]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"reducer": "centerclip", "layout": "joint", "keep_ratio": 0.5},
            "reducer 'centerclip' takes layout 'frame'",
        ),
        (
            {"reducer": "gated", "layout": "joint", "tubelet_size": 2},
            "reducer 'gated' takes tubelet_size 1",
        ),
        ({"reducer": "rlt", "keep_ratio": 0.0}, "keep_ratio"),
        ({"reducer": "tome"}, "reducer 'tome' needs keep_ratio"),
        ({"reducer": "rlt", "refresh_every": -1}, "refresh_every"),
        ({"reducer": "evs"}, "reducer: Input should be 'none', 'frames'"),
    ],
)
def test_impossible_settings_say_why(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        VideoTextModel.create("ViT-B-32", None, **settings)


def test_settings_that_belong_to_the_weights_stay() -> None:
    with pytest.raises(ModelError, match="layout belongs to the weights"):
        model_of("rlt", "frame").with_settings(layout="joint")

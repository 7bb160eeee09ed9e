"""Layout "frame" against a frame-by-frame walk that remembers what each layer saw at each place.

Shapes: T frames, H' x W' patches, C = H' W' cells, D width, Z embedding, L blocks.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import (
    assert_gradients_agree,
    gradients,
    pixels,
    repeating_frames,
    small_model,
)
from torch import Tensor
from torch.nn import functional as F

from rlt_retrieval.encoders.layouts import frame_plan
from rlt_retrieval.encoders.packing import VideoTokens, covering_tokens, pack
from rlt_retrieval.model import VideoTextModel

TOWERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "avg pooling": {"pool_type": "avg"},
    "attention pooling": {"attentional_pool": True},
}


def covering_of(tokens: VideoTokens) -> Tensor:
    """int64 [T, C]: the token that stands for each cell, by looking backwards from each."""
    if tokens.covering is not None:
        return tokens.covering.flatten(1).long()
    num_frames, height, width = tokens.grid
    at = {tuple(place): index for index, place in enumerate(tokens.positions.tolist())}
    covering = torch.zeros(num_frames, height * width, dtype=torch.int64)
    for t in range(num_frames):
        for y in range(height):
            for x in range(width):
                latest = max(s for s in range(t + 1) if (s, y, x) in at)
                covering[t, y * width + x] = at[latest, y, x]
    return covering


def remembering_walk(model: VideoTextModel, tokens: VideoTokens) -> Tensor:
    """[T, Z], a unit embedding a frame: open_clip's own modules, one frame and one token memory a layer."""
    visual = model.clip.visual
    dtype = visual.conv1.weight.dtype
    covering_TC = covering_of(tokens)
    hidden: list[dict[int, Tensor]] = [{} for _ in range(len(visual.transformer.resblocks) + 1)]
    frames = tokens.positions[:, 0].tolist()
    z_frames: list[Tensor] = []
    for t in range(tokens.grid[0]):
        new = [index for index, frame in enumerate(frames) if frame == t]
        if not new:
            z_frames.append(z_frames[-1])
            continue
        for index in new:
            _, y, x = tokens.positions[index].tolist()
            patch_D = visual.conv1(pixels(model, tokens.patches[index], dtype)).flatten()
            hidden[0][index] = visual.ln_pre(
                patch_D + visual.positional_embedding[1 + y * tokens.grid[2] + x]
            )
        cls_D = visual.ln_pre(visual.class_embedding + visual.positional_embedding[0])
        for layer, block in enumerate(visual.transformer.resblocks):
            queries_QD = torch.stack([cls_D, *(hidden[layer][index] for index in new)])
            keys_KD = torch.stack([cls_D, *(hidden[layer][index] for index in covering_TC[t].tolist())])
            q, k = block.ln_1(queries_QD)[None], block.ln_1(keys_KD)[None]
            queries_QD = queries_QD + block.attn(q, k, k, need_weights=False)[0][0]
            queries_QD = queries_QD + block.mlp(block.ln_2(queries_QD))
            cls_D = queries_QD[0]
            hidden[layer + 1].update(zip(new, queries_QD[1:], strict=True))
        seen = torch.stack([cls_D, *(hidden[-1][index] for index in covering_TC[t].tolist())])
        pooled, _ = visual._pool(seen[None])
        z_frames.append(F.normalize((pooled @ visual.proj).flatten(), dim=-1))
    return torch.stack(z_frames)


def clips_of_all_kinds() -> list[Tensor]:
    """About 100 %, 40 % and one frame of the tokens, and one whose frames stand still in between."""
    clips = [repeating_frames(n, change, seed=n) for n, change in ((4, 1.0), (6, 0.3), (8, 0.0))]
    return [*clips, repeating_frames(3, 0.5, seed=3)[[0, 1, 1, 1, 1, 2, 2]]]


def two_steps_back(tokens: VideoTokens) -> VideoTokens:
    """Dropped cells are covered by the left neighbour's token of the first frame: nothing like a run."""
    num_frames, height, width = tokens.grid
    covering = covering_of(tokens).clone().reshape(num_frames, height, width)
    kept = torch.zeros(tokens.grid, dtype=torch.bool)
    kept[tuple(tokens.positions.long().unbind(1))] = True
    shifted = covering[:1].roll(1, 2).expand_as(covering)
    return replace(tokens, covering=torch.where(kept, covering, shifted).int())


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("given_covering", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_the_layout_equals_the_remembering_walk(
    tower: str, given_covering: bool, dtype: torch.dtype, tolerance: float
) -> None:
    """Values and gradients; frames that keep nothing repeat the one before and add to its weight."""
    model = small_model(TOWERS[tower], layout="frame").to(dtype)
    clips = [model.tokenizer(clip) for clip in clips_of_all_kinds()]
    if given_covering:
        clips = [two_steps_back(tokens) for tokens in clips]
    z_BZ = model.encode_tokens(pack(clips))
    expected = torch.stack([F.normalize(remembering_walk(model, tokens).sum(0), dim=-1) for tokens in clips])
    torch.testing.assert_close(z_BZ, expected, atol=1e-5 if dtype == torch.float32 else 1e-12, rtol=0)
    direction = torch.randn(z_BZ.shape, generator=torch.Generator().manual_seed(5), dtype=dtype)
    seen = gradients((z_BZ * direction).sum(), model)
    assert_gradients_agree(seen, gradients((expected * direction).sum(), model), tolerance)


@pytest.mark.parametrize("tower", TOWERS)
def test_without_gradients_the_buffer_gives_the_same(tower: str) -> None:
    """The path that writes only what changes; catches keys of one clip that leak into the next."""
    model = small_model(TOWERS[tower], layout="frame")
    clips = [model.tokenizer(clip) for clip in clips_of_all_kinds()]
    for packed in (pack(clips), pack([two_steps_back(tokens) for tokens in clips])):
        with torch.no_grad():
            seen = model.encode_tokens(packed)
        torch.testing.assert_close(seen, model.encode_tokens(packed), atol=1e-6, rtol=0)


def test_frame_embeddings_make_the_clips() -> None:
    model = small_model(layout="frame")
    clips = clips_of_all_kinds()
    with torch.no_grad():
        frames = model.encode_frames(clips)
        assert [len(z_TZ) for z_TZ in frames] == [4, 6, 8, 7]
        expected = torch.stack([F.normalize(z_TZ.sum(0), dim=-1) for z_TZ in frames])
        torch.testing.assert_close(model.encode_video(clips), expected, atol=1e-6, rtol=0)
        for z_TZ, clip in zip(frames, clips, strict=True):
            walked = remembering_walk(model, model.tokenizer(clip))
            torch.testing.assert_close(z_TZ, walked, atol=1e-5, rtol=0)


def test_joint_models_have_no_frame_embeddings() -> None:
    with pytest.raises(ValueError, match="layout 'joint' has no embedding a frame"):
        small_model(layout="joint").encode_frames(clips_of_all_kinds())


def test_whole_new_frames_need_no_chosen_keys() -> None:
    """Nothing dropped: the keys are the frames' own rows, as in open_clip."""
    model = small_model(layout="frame")
    packed = pack([model.tokenizer(repeating_frames(4, 1.0)[[0, 1, 1, 2, 3]])])
    assert frame_plan(packed).key_rows is None
    assert frame_plan(packed).sequence_weights.tolist() == [1, 2, 1, 1]


@pytest.mark.parametrize("tower", TOWERS)
def test_a_static_clip_costs_one_frame_and_equals_it(tower: str) -> None:
    model = small_model(TOWERS[tower], layout="frame")
    frames = repeating_frames(6, 0.0)
    plan = model.video.plan(pack([model.tokenizer(frames)]))
    assert plan.cu_q.tolist() == [0, 17]
    assert plan.sequence_weights.tolist() == [6]
    with torch.no_grad():
        z_BZ = model.encode_video([frames, frames[:1]])
    torch.testing.assert_close(z_BZ[0], z_BZ[1], atol=1e-5, rtol=0)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=4), st.integers(0, 99))
def test_every_frame_sees_the_token_of_each_cell(kinds: list[tuple[float, bool]], seed: int) -> None:
    """Clips of different lengths, with a covering of their own or without: the plan's rows are all tokens once."""
    clips = []
    for index, (change, given_covering) in enumerate(kinds):
        tokens = tokens_of(repeating_frames(2 + index, change, seed=seed + index))
        clips.append(two_steps_back(tokens) if given_covering else tokens)
    packed = pack(clips)
    plan = frame_plan(packed)
    assert plan.rows[plan.rows > 0].tolist() == list(range(1, packed.num_tokens + 1))
    assert float(plan.sequence_weights.sum()) == sum(grid[0] for grid in packed.grids)
    key_rows = torch.arange(len(plan.rows)) if plan.key_rows is None else plan.key_rows
    keys_SK = plan.rows[key_rows].reshape(len(plan.sequence_weights), 17)
    assert (keys_SK[:, 0] == 0).all()
    covering_BTC = covering_tokens(packed).flatten(2)
    expected_SC = []
    for clip, (tokens, start) in enumerate(zip(clips, packed.cu_seqlens.tolist(), strict=False)):
        covering_TC = start + covering_of(tokens)
        assert torch.equal(covering_BTC[clip, : len(covering_TC)], covering_TC)
        expected_SC.append(covering_TC[tokens.positions[:, 0].unique().long()])
    assert torch.equal(keys_SK[:, 1:] - 1, torch.cat(expected_SC))


def tokens_of(frames_TCHW: Tensor) -> VideoTokens:
    from rlt_retrieval.encoders.tokenizer import RunLengthTokenizer

    return RunLengthTokenizer(8, 1, 0.0)(frames_TCHW)

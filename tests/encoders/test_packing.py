"""Packing keeps every clip's tokens together and in order."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import repeating_frames

from rlt_retrieval.encoders.packing import PackedTokens, VideoTokens, pack
from rlt_retrieval.encoders.tokenizer import RunLengthTokenizer


def clips_of(lengths: list[int], tubelet: int = 1) -> list[VideoTokens]:
    tokenizer = RunLengthTokenizer(8, tubelet, 0.0)
    return [tokenizer(repeating_frames(length, 0.4, seed=index)) for index, length in enumerate(lengths)]


def unpack(packed: PackedTokens) -> list[VideoTokens]:
    bounds = packed.cu_seqlens.tolist()
    return [
        VideoTokens(
            packed.patches[start:end],
            packed.positions[start:end],
            packed.run_lengths[start:end],
            packed.grids[clip],
        )
        for clip, (start, end) in enumerate(itertools.pairwise(bounds))
    ]


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5), tubelet=st.sampled_from([1, 2]))
@settings(max_examples=25, deadline=None)
def test_round_trip(lengths: list[int], tubelet: int) -> None:
    clips = clips_of(lengths, tubelet)
    packed = pack(clips)
    assert len(packed) == len(clips)
    assert packed.num_tokens == sum(map(len, clips))
    assert packed.max_seqlen == max(map(len, clips))
    assert packed.cu_seqlens.dtype == torch.int32
    for before, after in zip(clips, unpack(packed), strict=True):
        assert after.grid == before.grid
        for name in ("patches", "positions", "run_lengths"):
            assert torch.equal(getattr(after, name), getattr(before, name))


def test_seeds_travel_and_the_copy_on_a_device_is_whole() -> None:
    packed = pack(clips_of([2, 3]), [7, 2**40])
    moved = packed.to("cpu")
    assert moved.clip_seeds == (7, 2**40)
    assert (moved.grids, moved.max_seqlen) == (packed.grids, packed.max_seqlen)
    assert torch.equal(moved.patches, packed.patches)


@pytest.mark.parametrize(
    ("clips", "seeds", "message"),
    [
        ([], (), "pack\\(\\) got no clip"),
        (clips_of([2]) + clips_of([2], tubelet=2), (), "different patch shapes .* use one tokenizer"),
        (clips_of([2, 2]), (1,), "1 seeds for 2 clips"),
    ],
)
def test_what_cannot_be_packed_is_refused(
    clips: list[VideoTokens], seeds: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pack(clips, seeds)


def test_the_keep_mask_of_tokens_is_the_tokenizers() -> None:
    tokenizer = RunLengthTokenizer(8, 1, 0.1)
    frames = torch.randint(0, 256, (4, 3, 16, 24), dtype=torch.uint8)
    frames[2] = frames[1]
    assert torch.equal(tokenizer(frames).keep_mask, tokenizer.keep_mask(frames))

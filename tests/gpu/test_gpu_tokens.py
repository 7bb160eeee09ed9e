"""Tokenizing on a GPU: bit-equal to the CPU, fused or not, and with one wait for the device.

Shapes: B clips, T frames, H x W pixels.
"""

import warnings

import pytest
import torch
from small_models import repeating_frames
from torch import Tensor

from rlt_retrieval import PackedTokens, RunLengthTokenizer, pack

pytestmark = pytest.mark.needs_cuda

TOKENIZERS = [
    RunLengthTokenizer(patch, tubelet, threshold, reference, every)  # type: ignore[arg-type]
    for patch, tubelet in ((8, 1), (8, 2), (14, 1), (16, 2))
    for threshold in (-1.0, 0.0, 0.1)
    for reference in ("previous", "anchor")
    for every in (0, 3, 8)
]


def clips(patch: int) -> Tensor:
    """uint8 [B, T, 3, H, W]: still, in parts moving, wholly moving, and a slow fade."""
    moving = [
        repeating_frames(11, change, seed, 4 * patch, patch) for seed, change in enumerate((0, 0.1, 0.5, 1))
    ]
    fade = torch.full_like(moving[0], 64) + torch.arange(11, dtype=torch.uint8).mul(3)[:, None, None, None]
    return torch.stack([*moving, fade])[..., : 2 * patch, :].contiguous()


def assert_equal(seen: PackedTokens, expected: PackedTokens) -> None:
    for name in ("patches", "positions", "run_lengths", "cu_seqlens"):
        assert torch.equal(getattr(seen, name).cpu(), getattr(expected, name)), name
    assert (seen.max_seqlen, seen.grids) == (expected.max_seqlen, expected.grids)


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=repr)
def test_masks_and_tokens_are_those_of_the_cpu(tokenizer: RunLengthTokenizer) -> None:
    from rlt_retrieval.encoders.fused import tokenize_on_device

    frames_BTCHW = clips(tokenizer.patch_size)
    expected = pack([tokenizer(frames_TCHW) for frames_TCHW in frames_BTCHW])
    on_device = frames_BTCHW.cuda()
    for frames_TCHW, there in zip(frames_BTCHW, on_device, strict=True):
        assert torch.equal(tokenizer.keep_mask(there).cpu(), tokenizer.keep_mask(frames_TCHW))
    assert_equal(pack([tokenizer(frames_TCHW) for frames_TCHW in on_device]), expected)
    assert_equal(tokenize_on_device(on_device, tokenizer), expected)


@pytest.mark.parametrize("every", [0, 8])
def test_the_fused_tokenizer_waits_for_the_device_once(every: int) -> None:
    from rlt_retrieval.encoders.fused import tokenize_on_device

    frames_BTCHW, tokenizer = clips(16).cuda(), RunLengthTokenizer(16, 1, 0.1, "anchor", every)
    tokenize_on_device(frames_BTCHW, tokenizer)  # compiles
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            tokenize_on_device(frames_BTCHW, tokenizer)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in caught if "called a synchronizing" in str(warning.message)]
    assert len(waits) == 1, waits

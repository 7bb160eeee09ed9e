"""Whole models through a stand-in for flash-attn on the CPU: it checks what `flash_attn_varlen_func` demands, then
computes by sdpa. tests/gpu/test_gpu_attention.py compares the real kernel.

Shapes: T packed tokens, N heads, H head size, B clips, D embedding.
"""

import sys
import types
from typing import Any

import pytest
import torch
from small_models import assert_gradients_agree, gradients, repeating_frames, small_model
from torch import Tensor

from rlt_retrieval import PackedTokens, VideoTextModel, pack
from rlt_retrieval.encoders import attention
from rlt_retrieval.encoders.attention import Backend, attend_varlen

NO_WINDOW = (-1, -1)
HALF = (torch.bfloat16, torch.float16)

# Settings, what changes of the tower, and the head size that the kernel must see in each of its two blocks.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], list[int]]] = {
    "joint": ({"layout": "joint"}, {}, [16, 16]),
    "length bias": ({"layout": "joint", "length_bias": True}, {}, [24, 24]),
    "length bias, CLS counts": ({"layout": "joint", "length_bias": True, "cls_bias": "log_T"}, {}, [24, 24]),
    "frame": ({"layout": "frame"}, {}, [16, 16]),
    "merged keys": ({"layout": "frame", "reducer": "rlt+tome", "keep_ratio": 0.5}, {}, [16, 24]),
    "tubelets": ({"layout": "joint", "tubelet_size": 2}, {}, [16, 16]),
    "head of 80": ({"layout": "frame"}, {"width": 160, "head_width": 80, "attn_pooler_heads": 2}, [80, 80]),
}


def check_offsets(cu_seqlens: Tensor, longest: int, num_tokens: int, device: torch.device) -> None:
    lengths = cu_seqlens.diff()
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.ndim == 1
    assert cu_seqlens.is_contiguous()
    assert cu_seqlens.device == device
    assert int(cu_seqlens[0]) == 0
    assert int(cu_seqlens[-1]) == num_tokens
    assert int(lengths.min()) > 0  # an empty sequence has no output and divides by zero
    assert type(longest) is int
    assert longest == int(lengths.max())


def check_tensors(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor) -> None:
    assert q_TNH.dtype in HALF
    assert q_TNH.dtype == k_TNH.dtype == v_TNH.dtype
    assert q_TNH.device == k_TNH.device == v_TNH.device
    assert q_TNH.ndim == 3
    assert q_TNH.shape[1:] == k_TNH.shape[1:]
    assert k_TNH.shape == v_TNH.shape
    assert q_TNH.shape[-1] % 8 == 0
    assert q_TNH.shape[-1] <= 256
    assert all(tensor.stride(-1) == 1 for tensor in (q_TNH, k_TNH, v_TNH))


@pytest.fixture
def head_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Installs the stand-in, with the arguments of flash-attn 2.6; head size of each call."""
    seen = []

    def flash_attn_varlen_func(  # type: ignore[no-untyped-def]
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=NO_WINDOW,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        check_tensors(q, k, v)
        check_offsets(cu_seqlens_q, max_seqlen_q, len(q), q.device)
        check_offsets(cu_seqlens_k, max_seqlen_k, len(k), q.device)
        assert len(cu_seqlens_q) == len(cu_seqlens_k)
        assert (dropout_p, causal, window_size, softcap, alibi_slopes) == (0.0, False, NO_WINDOW, 0.0, None)
        assert (deterministic, return_attn_probs, block_table) == (False, False, None)
        assert softmax_scale is None or type(softmax_scale) is float
        seen.append(q.shape[-1])
        arguments = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale
        return attend_varlen(q, k, v, *arguments, backend="sdpa")

    stand_in = types.ModuleType("flash_attn")
    stand_in.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)

    def can_run(backend: str, q_TNH: Tensor) -> bool:
        """As the product decides, but for the device."""
        return backend == "flash_attn" and q_TNH.dtype in HALF and q_TNH.shape[-1] % 8 == 0

    monkeypatch.setattr(attention, "_can_run_kernel", can_run)
    return seen


def model_and_tokens(kind: str) -> tuple[VideoTextModel, PackedTokens]:
    """Clips that stand still, change in parts, change wholly, and one of a single kept frame."""
    settings, vision, _ = MODELS[kind]
    model = small_model(vision, **settings)
    clips = [repeating_frames(6, change, seed) for seed, change in enumerate((0.0, 0.3, 1.0, 0.1))]
    return model, pack([model.tokenizer(clip) for clip in clips])


def embedded(model: VideoTextModel, packed: PackedTokens, backend: Backend) -> Tensor:
    model.video.backend = backend
    with torch.autocast("cpu", torch.bfloat16):
        return model.video(packed)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("backend", ["flash_attn", "auto"])
def test_models_give_the_kernel_what_it_takes(head_sizes: list[int], kind: str, backend: Backend) -> None:
    """Embeddings and gradients of the sdpa branch; catches int64 offsets, float32 queries beside bfloat16 keys, a
    longest length that a plan of one query a sequence forgets, and a bias of an odd head size."""
    model, packed = model_and_tokens(kind)
    z_BD = embedded(model, packed, backend)
    assert head_sizes == MODELS[kind][2]
    expected_BD = embedded(model, packed, "sdpa")
    torch.testing.assert_close(z_BD, expected_BD, atol=1e-6, rtol=0)
    direction = torch.randn(z_BD.shape, generator=torch.Generator().manual_seed(0))
    seen = gradients((z_BD * direction).sum(), model)
    assert_gradients_agree(seen, gradients((expected_BD * direction).sum(), model), 1e-2)


@pytest.mark.parametrize("kind", ["joint", "length bias", "frame"])
def test_inference_takes_the_kernel_too(head_sizes: list[int], kind: str) -> None:
    """Without gradients sdpa has a way of its own for layout "frame"; a kernel has not."""
    model, packed = model_and_tokens(kind)
    with torch.inference_mode():
        z_BD = embedded(model, packed, "auto")
        assert len(head_sizes) == len(model.video.tower.blocks)
        torch.testing.assert_close(z_BD, embedded(model, packed, "sdpa"), atol=1e-2, rtol=0)


def test_a_pooling_head_attends_through_the_kernel(head_sizes: list[int]) -> None:
    """Its queries are a few a sequence, its keys weighted by their run lengths: an extra pair of head dimensions."""
    model = small_model({"attentional_pool": True}, layout="joint")
    packed = pack([model.tokenizer(repeating_frames(6, 0.3))])
    z_BD = embedded(model, packed, "flash_attn")
    assert len(head_sizes) == len(model.video.tower.blocks) + 1
    torch.testing.assert_close(z_BD, embedded(model, packed, "sdpa"), atol=1e-6, rtol=0)

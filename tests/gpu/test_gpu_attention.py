"""Attention kernels on a GPU against the sdpa reference in float32, values and gradients.

Shapes: T packed tokens, N heads, H head size.
"""

import pytest
import torch
from torch import Tensor

from rlt_retrieval.encoders import attention
from rlt_retrieval.encoders.attention import Backend, attend_biased

pytestmark = pytest.mark.needs_cuda

# Joint: whole clips of different lengths. Frame: few queries over all keys of a frame.
LENGTHS = {"joint": ([300, 1, 129, 64], [300, 1, 129, 64]), "frame": ([98, 1, 197, 40], [197, 197, 197, 197])}


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32)


def inputs(layout: str, head_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Views into one tensor, as a tower's joint projection gives them."""
    generator = torch.Generator("cuda").manual_seed(0)
    total = max(sum(lengths) for lengths in LENGTHS[layout])
    qkv_T3NH = torch.randn(total, 3, 2, head_size, device="cuda", generator=generator).to(torch.bfloat16)
    q, k, v = qkv_T3NH.to(dtype).requires_grad_().unbind(1)
    return q[: sum(LENGTHS[layout][0])], k[: sum(LENGTHS[layout][1])], v[: sum(LENGTHS[layout][1])]


def attended(
    backend: Backend, layout: str, head_size: int, biased: bool, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """The output and the gradients of q, k and v."""
    q, k, v = inputs(layout, head_size, dtype)
    lengths_q, lengths_k = LENGTHS[layout]
    bias = torch.arange(len(k), device="cuda").remainder(16).add(1.0).log() if biased else None
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    out = attend_biased(q, k, v, cu_q, cu_k, max(lengths_q), max(lengths_k), bias, backend=backend)
    direction = torch.randn(out.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    return out, *torch.autograd.grad((out.float() * direction).sum(), (q, k, v))


@pytest.mark.parametrize("backend", ["flash_attn", "torch", "sdpa"])
@pytest.mark.parametrize("layout", LENGTHS)
@pytest.mark.parametrize("head_size", [64, 80])
@pytest.mark.parametrize("biased", [False, True])
def test_kernels_equal_sdpa(backend: Backend, layout: str, head_size: int, biased: bool) -> None:
    """bfloat16 rounds to 0.4 %; catches kernels that misread strides, offsets, the scale or the padded head."""
    if backend == "flash_attn" and not attention._has_package("flash_attn"):
        pytest.skip("flash-attn is not installed")
    seen = attended(backend, layout, head_size, biased, torch.bfloat16)
    expected = attended("sdpa", layout, head_size, biased, torch.float32)
    for name, a, b in zip(("output", "dq", "dk", "dv"), seen, expected, strict=True):
        error = float((a.float() - b).norm() / b.norm())
        assert error < 0.02, f"{name}: {error}"


def test_auto_takes_a_kernel_for_packed_sequences() -> None:
    q, *_ = inputs("joint", 64, torch.bfloat16)
    assert attention._choose("auto", q) in ("flash_attn", "torch")

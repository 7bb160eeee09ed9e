"""Every attention backend against a softmax loop written out; the GPU kernels through stand-ins.

Shapes: T packed tokens, N heads, H head size.
"""

import importlib
import math
import sys
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlt_retrieval.encoders import attention
from rlt_retrieval.encoders.attention import attend_varlen, with_key_bias

LENGTHS_Q, LENGTHS_K = [3, 1, 7, 2], [5, 1, 2, 9]


def naive(
    q_TNH: Tensor,
    k_TNH: Tensor,
    v_TNH: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    bias_T: Tensor | None = None,
) -> Tensor:
    """Query by query and head by head."""
    out = []
    for sequence in range(len(cu_q) - 1):
        keys = range(int(cu_k[sequence]), int(cu_k[sequence + 1]))
        for query in range(int(cu_q[sequence]), int(cu_q[sequence + 1])):
            heads = []
            for head in range(q_TNH.shape[1]):
                logits = torch.stack([scale * q_TNH[query, head] @ k_TNH[key, head] for key in keys])
                if bias_T is not None:
                    logits = logits + bias_T[keys.start : keys.stop]
                weights = logits.exp() / logits.exp().sum()
                heads.append(sum(w * v_TNH[key, head] for w, key in zip(weights, keys, strict=True)))
            out.append(torch.stack(heads))
    return torch.stack(out)


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def tensors(head_size: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(LENGTHS_Q), 2, head_size), (sum(LENGTHS_K), 2, head_size), (sum(LENGTHS_K), 2, head_size)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, backend: attention.Backend = "sdpa"
) -> Tensor:
    cu_q, cu_k = offsets(LENGTHS_Q), offsets(LENGTHS_K)
    return attend_varlen(q, k, v, cu_q, cu_k, max(LENGTHS_Q), max(LENGTHS_K), scale, backend=backend)


def assert_same(seen: Tensor, expected: Tensor, inputs: tuple[Tensor, ...], tolerance: float) -> None:
    """Values and the gradients of every input."""
    torch.testing.assert_close(seen, expected, atol=tolerance, rtol=tolerance)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    direction = direction.to(expected.dtype)
    for a, b in zip(
        torch.autograd.grad((seen * direction).sum(), inputs),
        torch.autograd.grad((expected * direction).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_sdpa_equals_the_softmax_loop(scale: float | None) -> None:
    """Catches a sequence that sees its neighbour's keys, and a scale that is dropped."""
    q, k, v = tensors()
    expected = naive(q, k, v, offsets(LENGTHS_Q), offsets(LENGTHS_K), scale or 1 / math.sqrt(6))
    assert_same(attend(q, k, v, scale), expected, (q, k, v), 1e-12)


@pytest.mark.parametrize("head_size", [6, 16])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-6)])
def test_key_bias_equals_an_explicit_one(head_size: int, dtype: torch.dtype, tolerance: float) -> None:
    """Run lengths of 1 to 16; catches a bias that the scale shrinks."""
    q, k, v = tensors(head_size, dtype)
    bias_T = torch.arange(1, sum(LENGTHS_K) + 1).float().log()
    cu_q, cu_k = offsets(LENGTHS_Q), offsets(LENGTHS_K)
    expected = naive(q, k, v, cu_q, cu_k, 1 / math.sqrt(head_size), bias_T.to(dtype))
    q_wide, k_wide, v_wide, scale = with_key_bias(q, k, v, bias_T)
    assert q_wide.shape[-1] % 8 == 0
    out = attend(q_wide, k_wide, v_wide, scale)[..., :head_size]
    assert_same(out, expected, (q, k, v), tolerance)


def test_in_bfloat16_two_channels_carry_the_bias_better_than_one() -> None:
    """Weights of keys that differ in nothing but their run length; one channel is off by up to 0.4 % of the bias."""
    runs = torch.arange(1, 17).double()
    ones = torch.ones(16, 1, 16, dtype=torch.bfloat16)
    v = torch.eye(16, dtype=torch.bfloat16)[:, None]
    q_wide, k_wide, _, scale = with_key_bias(ones[:1] * 0, ones, v, runs.log().float())
    exact = runs / runs.sum()

    def worst(k: Tensor) -> float:
        logits = scale * (q_wide.double() @ k.double().mT.squeeze(1).mT.squeeze(1).mT).flatten()
        return float(((logits.softmax(0) - exact) / exact).abs().max())

    one_channel = k_wide.clone()
    one_channel[..., 17] = 0
    assert worst(k_wide) < 5e-4 < 2e-3 < worst(one_channel)


def test_auto_takes_sdpa_on_the_cpu_and_says_it_once(said: Callable[[str], list[str]]) -> None:
    attention._announce.cache_clear()
    q, k, v = tensors()
    for _ in range(3):
        torch.testing.assert_close(attend(q, k, v, backend="auto"), attend(q, k, v))
    assert said("attention backend") == ["attention backend on cpu: sdpa"]


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("flash", "attention backend 'flash' is unknown; choose auto, sdpa, torch, flash_attn"),
        (
            "flash_attn",
            "'flash_attn' needs its package and bfloat16/float16 CUDA tensors .* use 'auto' or 'sdpa'",
        ),
        ("torch", "'torch' needs its package and .* got torch.float64 on cpu, head size 6"),
    ],
)
def test_a_backend_that_cannot_run_is_refused_in_one_line(backend: attention.Backend, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        attend(*tensors(), backend=backend)
    assert "\n" not in str(caught.value)


def check_kernel_arguments(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
) -> None:
    """What both flash kernels demand."""
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16
    assert q.shape[1:] == k.shape[1:]
    assert k.shape == v.shape
    assert q.shape[-1] % 8 == 0
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (int(cu_q[-1]), int(cu_k[-1])) == (len(q), len(k))
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    assert type(max_q) is type(max_k) is int


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Both kernels replaced by stand-ins with the argument names of every supported version; what was called."""
    calls = []

    def flash_attn_varlen_func(
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
    ):  # type: ignore[no-untyped-def]
        calls.append("flash_attn")
        check_kernel_arguments(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        assert (dropout_p, causal) == (0.0, False)
        arguments = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale
        return attend_varlen(q, k, v, *arguments, backend="sdpa")

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None):  # type: ignore[no-untyped-def]
        calls.append("torch")
        check_kernel_arguments(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
        return attend_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, backend="sdpa")

    stand_in = types.ModuleType("flash_attn")
    stand_in.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(attention, "_can_run_kernel", lambda backend, q: True)
    return calls


@pytest.mark.parametrize("backend", ["flash_attn", "torch"])
@pytest.mark.parametrize("biased", [False, True])
def test_kernels_get_what_they_take(kernels: list[str], backend: attention.Backend, biased: bool) -> None:
    """Shapes, int32 offsets and argument names; with a key bias the padded head size and the old scale."""
    q, k, v = tensors(16, torch.bfloat16)
    scale = None
    if biased:
        q, k, v, scale = with_key_bias(q, k, v, torch.arange(sum(LENGTHS_K)).float().log1p())
    torch.testing.assert_close(attend(q, k, v, scale, backend), attend(q, k, v, scale))
    assert kernels == [backend]


def test_auto_prefers_flash_attn_then_torch(kernels: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors(16, torch.bfloat16)
    attend(q, k, v, backend="auto")
    monkeypatch.setattr(attention, "_can_run_kernel", lambda backend, q: backend == "torch")
    attend(q, k, v, backend="auto")
    assert kernels == ["flash_attn", "torch"]


def test_a_flash_attn_that_does_not_import_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, said: Callable[[str], list[str]]
) -> None:
    """A wheel built for another torch must not stop `auto`; catches a look at the folder instead of an import."""

    def broken(name: str) -> types.ModuleType:
        raise ImportError(f"{name}: undefined symbol")

    monkeypatch.setattr(importlib, "import_module", broken)
    attention._has_package.cache_clear()
    assert not attention._has_package("flash_attn")
    attention._has_package.cache_clear()
    assert said("does not import") == [
        "attention backend flash_attn is installed but does not import: flash_attn: undefined symbol"
    ]
